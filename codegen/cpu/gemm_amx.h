// fp32 matrix products on AMX tiles (amx.h): operands as sums of three bf16, six of nine partial products.
//
// A thread packs some rows of A and some columns of B into its L2 and multiplies them in pairs of 32 rows and columns:
// the blocking of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008), but for B, which
// they pack once for all. Here every thread packs what it needs itself, between products, which hide it in part, and
// waits for no other. A pair's sum over DEPTH elements starts at zero and is added to others with vectors, so that
// rounding errors do not grow with the number of elements as one long chain of additions would let them.
#pragma once
#include "gemm_tiles.h"

#ifdef HAVE_AMX
namespace {

constexpr int64_t DEPTH = 128;  // longest sum inside tiles: a pair of packed rows is 24 KiB, half of L1
constexpr int64_t PARTS = 4;    // of what is packed at once, at most

// How many elements of the sum are packed at once: with 256, A takes 384 KiB and B 192 KiB of L2, and more were slower.
// But C is read and written once for each such block, which takes longer if its rows are long.
inline int64_t sum_of(int64_t n) { return n > 4096 ? PARTS * DEPTH : 2 * DEPTH; }

// Whether the tiles' result has fp32's accuracy. An infinite number less its highest part is NaN. Tiles take bf16
// numbers below 2^-126 as 0 and flush such sums: an error of at most 2^-126 (|a| + |b| + 1) an element of the sum, which
// must be nothing beside the rounding of the largest products.
inline bool within_range(const Extent& a, const Extent& b, int64_t k) {
  constexpr double huge = 0x1p126;
  const double left = a.largest(), right = b.largest(), product = left * right;
  if (!(left < huge && right < huge && product * double(k) < huge)) return false;
  return product == 0 || double(k) * 0x1p-126 * (left + right + 1) <= 0x1p-26 * product;
}

// Rows of A or columns of B, packed as [part of the depth][tile][step][plane], and which packing a piece holds.
struct Packed {
  uint32_t* base;
  uint32_t* ready;  // [part][piece]
  int64_t slot, pieces, depth, sums;  // words of a part, its pieces; elements

  int64_t sums_of(int64_t part) const { return std::min(depth, sums - part * depth); }
  int64_t steps(int64_t part) const { return (sums_of(part) + STEP - 1) / STEP; }
  uint32_t* at(int64_t part, int64_t side) const { return base + part * slot + side / SIDE * steps(part) * WORDS; }
  uint32_t& flag(int64_t part, int64_t side) const { return ready[part * pieces + side / PIECE]; }
};

// What a thread multiplies before it looks at what comes: some rows of A with some columns of B, over `sums` elements.
struct Step {
  int64_t batch, k, sums, i, rows, j, columns;
  uint32_t a, b;  // number of the packing

  int64_t parts() const { return (sums + DEPTH - 1) / DEPTH; }
  int64_t depth() const { return round_up((sums + parts() - 1) / parts(), STEP); }  // parts of equal depth
};

// The steps of a thread, in their order: rows meet columns forwards and backwards in turn.
class Steps {
  const Gemm& g;
  const Shares& shares;
  const int64_t sum, first, last;  // elements of the sum in a step, units
  int64_t batch = 0, k = 0, unit, begin = 0, panels = 0, panel = 0;
  bool back = false;
  uint32_t a = 0, b = 0;

 public:
  Steps(const Gemm& problem, const Shares& rows, int64_t thread, int64_t threads)
      : g(problem), shares(rows), sum(sum_of(g.n)), first(rows.units() * thread / threads),
        last(rows.units() * (thread + 1) / threads), unit(first - 1) {}

  // The step after `to`; false: there is none.
  bool next(Step& to) {
    while (panel == panels) {
      if (first == last) return false;
      if (++unit == last) {
        unit = first;
        if ((k += sum) >= g.k) {
          k = 0;
          if (++batch == g.batch) return false;
        }
      }
      begin = shares.begin(unit, g.n);
      panels = (shares.end(unit, g.n) - begin + WIDTH - 1) / WIDTH, panel = 0;
      back = !back;
    }
    const int64_t i = shares.row(unit), j = begin + (back ? panels - 1 - panel : panel) * WIDTH;
    const bool other = !a || batch != to.batch || k != to.k;
    a += other || i != to.i, b += other || j != to.j;
    to = {batch, k, std::min(sum, g.k - k), i, std::min(shares.height, g.m - i),
          j,     std::min(WIDTH, shares.end(unit, g.n) - j), a, b};
    panel++;
    return true;
  }
};

class Worker {
  const Gemm& g;
  Steps steps;
  const int64_t a_slot, b_slot;
  float* gathered;  // sums of a step
  uint32_t *left, *right;
  uint32_t left_ready[PARTS * HEIGHT / PIECE] = {}, right_ready[PARTS * WIDTH / PIECE] = {};
  Beside beside;

  Packed rows(const Step& s) { return {left, left_ready, a_slot, HEIGHT / PIECE, s.depth(), s.sums}; }
  Packed columns(const Step& s) { return {right, right_ready, b_slot, WIDTH / PIECE, s.depth(), s.sums}; }

  void list_part(const Packed& to, int64_t part, Piece piece, int64_t sides) {
    piece.from += part * to.depth * piece.sum;
    piece.sums = int32_t(to.sums_of(part));
    for (int64_t x = 0; x < sides; x += PIECE, piece.from += PIECE * piece.side) {
      piece.sides = int32_t(std::min(PIECE, sides - x));
      piece.to = to.at(part, x), piece.ready = &to.flag(part, x);
      beside.packer.add(piece);
    }
  }
  // Lists what a step needs of one part of the sum and the step before does not have.
  void list(const Step& s, int64_t part, const Step& before) {
    if (s.b != before.b) {
      const float* from = g.b + s.batch * g.b_batch + s.k * g.b_row + s.j * g.b_column;
      list_part(columns(s), part, {from, g.b_column, g.b_row, 0, 0, nullptr, nullptr, s.b, false}, s.columns);
    }
    if (s.a != before.a) {
      const float* from = g.a + s.batch * g.a_batch + s.i * g.a_row + s.k * g.a_column;
      list_part(rows(s), part, {from, g.a_row, g.a_column, 0, 0, nullptr, nullptr, s.a, true}, s.rows);
    }
  }
  // The sums of all parts are gathered. What is packed for `then` replaces, part by part, what is done with.
  void multiply_step(const Step& s, const Step* then) {
    const Packed a = rows(s), b = columns(s);
    const int64_t down = (s.rows + 31) / 32, pairs = (s.columns + 31) / 32 * down, parts = s.parts();
    const bool add = g.accumulate || s.k > 0;
    Result& result = beside.result;
    for (int64_t part = 0; part < parts; part++) {
      const bool last = part + 1 == parts, direct = part == 0 && !last;
      for (int64_t p = 0; p < pairs; p++) {
        const int64_t column = p / down, x = column * 32, steps = a.steps(part);
        const int64_t y = (column % 2 ? down - 1 - p % down : p % down) * 32;  // the last rows are in L1 still
        const int64_t m = std::min<int64_t>(32, s.rows - y), n = std::min<int64_t>(32, s.columns - x);
        beside.packer.wait(a.flag(part, y), s.a);
        beside.packer.wait(b.flag(part, x), s.b);
        asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
        const uint32_t *above = a.at(part, y), *aside = b.at(part, x);
        float *gather = gathered + p * PAIR, *sums = result.sums(gather, direct);
        result.expect(last ? g.c + s.batch * g.c_batch + (s.i + y) * g.c_row + s.j + x : nullptr, g.c_row);
        if (m > 16 && n > 16)
          multiply<2, 2>(above, aside, steps, sums, beside);
        else if (m > 16)
          multiply<2, 1>(above, aside, steps, sums, beside);
        else if (n > 16)
          multiply<1, 2>(above, aside, steps, sums, beside);
        else
          multiply<1, 1>(above, aside, steps, sums, beside);
        if (last)
          result.take_last(g, gather, part == 0, s.batch, s.i + y, s.j + x, m, n, add);
        else if (!direct)
          result.take(gather, m);
      }
      for (int64_t q = part; then && q < then->parts() && (q == part || last); q++) list(*then, q, s);
    }
    result.finish();
  }

 public:
  // Words of a part of the sum.
  static int64_t slot(int64_t sides, int64_t k) {
    return sides / SIDE * (round_up(std::min(k, DEPTH), STEP) / STEP) * WORDS;
  }

  // `memory` is this thread's: sums of a step, slots of rows and of columns.
  Worker(const Gemm& problem, const Shares& shares, int64_t thread, int64_t threads, uint32_t* memory)
      : g(problem), steps(problem, shares, thread, threads), a_slot(slot(shares.height, g.k)),
        b_slot(slot(WIDTH, g.k)), gathered(reinterpret_cast<float*>(memory)), left(memory + shares.height * WIDTH),
        right(left + sum_of(g.n) / DEPTH * a_slot) {}
  void run() {
    Step now{}, then{};
    if (!steps.next(now)) return;
    for (int64_t part = 0; part < now.parts(); part++) list(now, part, then);
    for (bool more = true; more; now = then) {
      then = now;
      more = steps.next(then);
      multiply_step(now, more ? &then : nullptr);
    }
  }
  const Range& range(bool of_a) const { return beside.packer.range[of_a]; }
};

// 0; 1: no memory; 2: the operands need fp32's range, and C is to be computed otherwise.
inline int gemm_amx(const Gemm& g) {
  const Shares shares(g.m, g.n, g.threads);
  const int64_t part = Worker::slot(shares.height, g.k) + Worker::slot(WIDTH, g.k);
  const int64_t own = shares.height * WIDTH + sum_of(g.n) / DEPTH * part;  // words of a thread
  KeptMemory scratch(g.threads * own);
  if (!scratch.words()) return 1;
  Extent a_extent, b_extent;
#pragma omp parallel num_threads(g.threads)
  {
    const int64_t thread = omp_get_thread_num();
    TileConfig config;
    Worker worker(g, shares, thread, omp_get_num_threads(), scratch.words() + thread * own);
    worker.run();
    a_extent.add(worker.range(true));
    b_extent.add(worker.range(false));
  }
  return within_range(a_extent, b_extent, g.k) ? 0 : 2;
}

}  // namespace
#endif
