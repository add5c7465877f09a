// fp32 matrix products as products of 8-bit integers on AMX tiles, whose sums are exact (Ozaki's scheme; Ootomo, Ozaki and
// Yokota, "DGEMM on integer matrix multiplication unit", 2024). Integer tiles multiply twice as fast as those of bf16.
//
// Over at most DEPTH elements of the sum, a row of A or a column of B is multiplied with a scale that makes its largest
// element 127 * 2^16 or a little less, and rounded to an integer q = d0 2^16 + d1 2^8 + d2 of three signed digits. Of
// the nine products of digits six are computed, or eight. Results are joined in fp32 with what earlier parts summed to.
//
// The error is proportional to the largest elements, not to each element, as fp32's is. So it is predicted from scales
// and squares (Guard), and rows and columns of the result that are too small beside the prediction are named: they are to
// be computed otherwise.
#pragma once
#include "gemm_int8_guard.h"

#ifdef HAVE_AMX_INT8
namespace {
namespace int8 {

// Sums of products of digits of 16 rows and two times 16 columns on their way to where the thread gathers them, or from
// there to C. A row at a time is joined between the products that follow, which hide it as long as it is short: the
// processor decodes a tile load into so many parts that little room is left.
template <bool EIGHT>
class Result {
  enum class Way { gather_first, gather, put_plain, put };
  static constexpr int64_t SUMS = EIGHT ? 5 : 3;  // of a column tile: weights 2^32, 2^24, 2^16, and twice 2^8
  alignas(64) int32_t memory[2][2][SUMS][TILE_WORDS];
  int current = 0;
  Way way = Way::gather;
  int64_t row = 0, rows = 0, c_row = 0, bias_row = 0, bias_column = 0, coming_row = 0;
  const int32_t* from = nullptr;  // of the row that is next, as the following pointers
  float* gathered = nullptr;      // sums of earlier parts of the depth
  float *c = nullptr, *row_squares = nullptr, *column_squares = nullptr;
  const float *left = nullptr, *right = nullptr, *left_weight = nullptr, *right_weight = nullptr, *bias = nullptr;
  const float* coming = nullptr;  // where in C the sums go that are being computed; null: not there
  __mmask16 lanes[2] = {};
  bool first = true, add = false;
  float alpha = 1;

  static Ints ints(const int32_t* p) {
    Ints x;
    std::memcpy(&x, p, 64);
    return x;
  }
  Vec joined(int j, Vec of_row) const {
    const int32_t* s = from + j * SUMS * TILE_WORDS;
    const Vec high = __builtin_convertvector(ints(s) * 256 + ints(s + TILE_WORDS), Vec);
    Ints low = ints(s + 2 * TILE_WORDS);
    if constexpr (EIGHT) low += (ints(s + 3 * TILE_WORDS) + ints(s + 4 * TILE_WORDS) + 128) >> 8;
    return (high * 256.0f + __builtin_convertvector(low, Vec)) * of_row * load(right + j * 16);
  }
  // Adds the squares of a row's elements, over the norms of their operands, to those of the row and of their columns.
  void square(Vec x, Vec y) {
    const Vec of_row = splat(*left_weight++);
    x *= of_row * load(right_weight), y *= of_row * load(right_weight + 16);
    if (way == Way::put) {
      x = (Vec)_mm512_maskz_mov_ps(lanes[0], (__m512)x);
      y = (Vec)_mm512_maskz_mov_ps(lanes[1], (__m512)y);
    }
    store(column_squares, x * x + load(column_squares));
    store(column_squares + 16, y * y + load(column_squares + 16));
    store(row_squares, x * x + (y * y + load(row_squares)));
    row_squares += 16;
  }
  void put(Vec x, int j) {
    float* to = c + j * 16;
    x *= splat(alpha);
    if (add) x += (Vec)_mm512_maskz_loadu_ps(lanes[j], to);
    if (bias) {
      const float* y = bias + j * 16 * bias_column;
      x += bias_column ? (Vec)_mm512_maskz_loadu_ps(lanes[j], y) : splat(*y);
    }
    _mm512_mask_storeu_ps(to, lanes[j], (__m512)x);
  }
  void write() {
    const Vec of_row = splat(*left++);
    Vec x = joined(0, of_row), y = joined(1, of_row);
    from += 16;
    if (way == Way::gather_first) {
      store(gathered, x), store(gathered + 16, y);
    } else if (way == Way::gather) {
      store(gathered, x + load(gathered)), store(gathered + 16, y + load(gathered + 16));
    } else {
      if (!first) x += load(gathered), y += load(gathered + 16);
      square(x, y);
      if (way == Way::put_plain) {
        store(c, x), store(c + 16, y);
      } else {
        put(x, 0);
        if (lanes[1]) put(y, 1);
        bias += bias_row;
      }
      c += c_row;
    }
    gathered += 32;
  }

 public:
  int32_t* sums(int j) { return memory[current][j][0]; }
  void some() {
    if (row < rows) {
      if (coming) {
        __builtin_prefetch(coming, 1, 2), __builtin_prefetch(coming + 16, 1, 2);
        coming += coming_row;
      }
      write();
      row++;
    }
  }
  // The next sums go to C's rows `to`, which are fetched while the ones before are written.
  void expect(const float* to, int64_t to_row) { coming = to, coming_row = to_row; }
  void finish() {
    while (row < rows) some();
  }
  // What is in sums() is the next result, of m x n; it is the first part of the depth, and belongs to `gather`.
  void take(float* gather, bool is_first, int64_t m, int64_t n, const float* of_rows, const float* of_columns) {
    finish();
    asm volatile("" ::: "memory");  // the compiler does not know that tile stores write memory
    from = memory[current][0][0];
    current = 1 - current;
    gathered = gather, first = is_first, way = first ? Way::gather_first : Way::gather;
    left = of_rows, right = of_columns;
    row = 0, rows = m;
    lanes[0] = n >= 16 ? 0xffff : (1u << n) - 1;
    lanes[1] = n >= 32 ? 0xffff : n <= 16 ? 0 : (1u << (n - 16)) - 1;
  }
  // It is also the last: C's from row i and column j, to which it is added or where it is put, with the bias.
  void put(const Gemm& g, int64_t batch, int64_t i, int64_t j, bool adds, const float* of_rows, const float* of_columns,
           float* squares_of_rows, float* squares_of_columns) {
    c = g.c + batch * g.c_batch + i * g.c_row + j, c_row = g.c_row, add = adds, alpha = float(g.alpha);
    bias = g.bias && !adds ? g.bias + i * g.bias_row + j * g.bias_column : nullptr;
    bias_row = bias ? g.bias_row : 0, bias_column = g.bias_column;
    way = bias || add || alpha != 1 || lanes[1] != 0xffff ? Way::put : Way::put_plain;
    left_weight = of_rows, right_weight = of_columns;
    row_squares = squares_of_rows, column_squares = squares_of_columns;
  }
};

// 16 rows and N (1 or 2) times 16 columns, summed over `steps` packed steps. Of the digits' products first those with at
// least the weight 2^16, in an order that loads 13 tiles for 12 products; an accumulator comes again late enough.
template <int N, bool EIGHT>
inline void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, Result<EIGHT>& result, Ahead& ahead) {
  const uint32_t* other = b + steps * WORDS;
  const auto left = [&](int64_t k, int digit) { _tile_loadd(6, a + k * WORDS + digit * TILE_WORDS, 64); };
  const auto right = [&](int64_t k, int digit) { _tile_loadd(7, b + k * WORDS + digit * TILE_WORDS, 64); };
  const auto beside = [&](int64_t k, int digit) { _tile_loadd(7, other + k * WORDS + digit * TILE_WORDS, 64); };
  const auto more = [&] { result.some(), ahead.fetch(2); };
  const auto zero = [] {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  };
  zero();
  for (int64_t k = 0; k < steps; k++) {
    left(k, 0);
    right(k, 2);
    _tile_dpbssd(2, 6, 7);
    if constexpr (N == 2) {
      beside(k, 2);
      _tile_dpbssd(5, 6, 7);
      beside(k, 0);
      _tile_dpbssd(3, 6, 7);
    }
    more();
    right(k, 0);
    _tile_dpbssd(0, 6, 7);
    right(k, 1);
    _tile_dpbssd(1, 6, 7);
    if constexpr (N == 2) {
      beside(k, 1);
      _tile_dpbssd(4, 6, 7);
    }
    more();
    left(k, 1);
    if constexpr (N == 2) {
      _tile_dpbssd(5, 6, 7);
      right(k, 1);
    }
    _tile_dpbssd(2, 6, 7);
    if constexpr (N == 2) {
      beside(k, 0);
      _tile_dpbssd(4, 6, 7);
    }
    more();
    right(k, 0);
    _tile_dpbssd(1, 6, 7);
    left(k, 2);
    _tile_dpbssd(2, 6, 7);
    if constexpr (N == 2) {
      beside(k, 0);
      _tile_dpbssd(5, 6, 7);
    }
    more();
  }
  int32_t *first = result.sums(0), *second = result.sums(1);
  _tile_stored(0, first, 64);
  _tile_stored(1, first + TILE_WORDS, 64);
  _tile_stored(2, first + 2 * TILE_WORDS, 64);
  if constexpr (N == 2) {
    _tile_stored(3, second, 64);
    _tile_stored(4, second + TILE_WORDS, 64);
    _tile_stored(5, second + 2 * TILE_WORDS, 64);
  }
  if constexpr (!EIGHT) return;
  zero();
  for (int64_t k = 0; k < steps; k++) {
    left(k, 1);
    right(k, 2);
    _tile_dpbssd(0, 6, 7);
    if constexpr (N == 2) {
      beside(k, 2);
      _tile_dpbssd(2, 6, 7);
    }
    left(k, 2);
    right(k, 1);
    _tile_dpbssd(1, 6, 7);
    if constexpr (N == 2) {
      beside(k, 1);
      _tile_dpbssd(3, 6, 7);
    }
    more();
  }
  _tile_stored(0, first + 3 * TILE_WORDS, 64);
  _tile_stored(1, first + 4 * TILE_WORDS, 64);
  if constexpr (N == 2) {
    _tile_stored(2, second + 3 * TILE_WORDS, 64);
    _tile_stored(3, second + 4 * TILE_WORDS, 64);
  }
}

// One block of C from row `i` and column `j` on: `rows`, all that `a` holds, and `columns` (WIDTH at most) of what `b`
// holds from `column` on. The sums of all parts of the depth are gathered. Meanwhile the columns of the next part, or of
// the block that begins at `next`, are fetched.
template <bool EIGHT>
inline void multiply_block(const Gemm& g, const Packed& a, const Packed& b, int64_t batch, int64_t i, int64_t j,
                           int64_t rows, int64_t column, int64_t columns, bool add, float* gathered, int64_t next,
                           Guard& guard) {
  const int64_t down = (rows + SIDE - 1) / SIDE, pairs = (columns + 31) / 32 * down;
  Result<EIGHT> result;
  asm volatile("" ::: "memory");  // nor that tile loads read it
  for (int64_t part = 0; part < a.parts; part++) {
    const bool last = part + 1 == a.parts;
    const int64_t then = last ? 0 : part + 1;
    Ahead ahead(b.at(then, last ? next : column), (columns + 15) / SIDE * b.steps(then) * WORDS);
    for (int64_t p = 0; p < pairs; p++) {
      const int64_t y = p % down * SIDE, x = p / down * 32, steps = a.steps(part);
      const int64_t m = std::min<int64_t>(SIDE, rows - y), n = std::min<int64_t>(32, columns - x);
      result.expect(last ? g.c + batch * g.c_batch + (i + y) * g.c_row + j + x : nullptr, g.c_row);
      if (n > 16)
        multiply<2>(a.at(part, y), b.at(part, column + x), steps, result, ahead);
      else
        multiply<1>(a.at(part, y), b.at(part, column + x), steps, result, ahead);
      result.take(gathered + p * 512, part == 0, m, n, a.scales_of(part, y).inverse,
                  b.scales_of(part, column + x).inverse);
      if (last) result.put(g, batch, i + y, j + x, add, a.weights + y, b.weights + column + x, guard.row.square + (i + y) * SIDE, guard.column.square + j + x);
    }
  }
  result.finish();
  asm volatile("" ::: "memory");
  guard.expect(a, b, 0, rows, column, columns, i, j, EIGHT);
}

// 0; 1: no memory; 2: the operands need fp32's range; 4: some rows or columns are too unequal for the digits (of some
// batch, if there are several), and those of C to be computed otherwise. The parts of `g` that are results are written.
inline int gemm_int8(Gemm& g) {
  const Shares shares(g.m, g.threads);
  const int64_t depth = round_up(std::min(g.k, SUM), STEP), wide = round_up(std::min(g.n, BLOCK), 32);
  const int64_t a_words = Packed::words(shares.height, depth), b_words = Packed::words(wide, depth);
  const int64_t own = a_words + shares.height * WIDTH, guarded = Guard::words(g);
  const int64_t weights = round_up(g.m, 32) + round_up(g.n, 32);
  KeptMemory scratch(b_words + g.threads * (own + guarded) + weights);
  uint32_t* right = scratch.words();
  if (!right) return 1;
  uint32_t* guards = right + b_words + g.threads * own;
  float* weights_of_a = reinterpret_cast<float*>(guards + g.threads * guarded);
  float* weights_of_b = weights_of_a + round_up(g.m, 32);
  std::atomic<bool> out_of_range{false};
  g.worst = 0, g.rows = 0, g.columns = 0;
#pragma omp parallel num_threads(g.threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    uint32_t* left = right + b_words + thread * own;
    float* gathered = reinterpret_cast<float*>(left + a_words);
    Guard guard(g, guards + thread * guarded);
    bool fits = true;
    TileConfig config;
    const auto block = g.products == 8 ? multiply_block<true> : multiply_block<false>;
    for (int64_t batch = 0; batch < g.batch; batch++) {
      std::memset(guards + thread * guarded, 0, guarded * 4);
      for (int64_t k = 0; k < g.k; k += SUM)
        for (int64_t j = 0; j < g.n; j += BLOCK) {
          const int64_t sums = std::min(SUM, g.k - k), columns = std::min(BLOCK, g.n - j);
          const Packed b = pack_block<false>(g.b + batch * g.b_batch + k * g.b_row + j * g.b_column, g.b_column,
                                             g.b_row, columns, sums, right, weights_of_b + j, k == 0, thread, threads, fits);
#pragma omp barrier
          const int64_t first = shares.units() * thread / threads, last = shares.units() * (thread + 1) / threads;
          Packed a{};
          for (int64_t unit = first; unit < last; unit++) {
            const int64_t i = shares.row(unit), rows = std::min(shares.height, g.m - i);
            if (unit == first || i != shares.row(unit - 1))
              a = pack_block<true>(g.a + batch * g.a_batch + i * g.a_row + k * g.a_column, g.a_row, g.a_column, rows,
                                   sums, left, weights_of_a + i, k == 0, 0, 1, fits);
            const int64_t begin = shares.begin(unit, columns), end = shares.end(unit, columns);
            for (int64_t x = begin; x < end; x += WIDTH)
              block(g, a, b, batch, i, j + x, rows, x, std::min(WIDTH, end - x), g.accumulate || k > 0,
                             gathered, x + WIDTH < end ? x + WIDTH : begin, guard);
          }
#pragma omp barrier
        }
      int64_t beyond[2] = {};
      double worst = 0;
      look(g, guards, thread, threads, beyond, worst);
#pragma omp critical
      g.worst = std::max(g.worst, worst), g.rows += beyond[0], g.columns += beyond[1];
#pragma omp barrier
    }
    if (!fits) out_of_range = true;
  }
  return out_of_range ? 2 : g.rows || g.columns ? 4 : 0;
}

}  // namespace int8
}  // namespace
#endif
