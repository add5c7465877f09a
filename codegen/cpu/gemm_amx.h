// fp32 matrix products on AMX tiles (amx.h): operands as sums of three bf16, six of nine partial products.
//
// The blocking is that of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", 2008): a block of
// B is packed once for all threads; a thread packs rows of A into its L2 and multiplies them with all columns of the
// block, in pairs of 32 rows and 32 columns. A pair's sum over DEPTH elements starts at zero and is added to C with
// vectors, so that rounding errors do not grow with the number of elements as one long chain of additions would let them.
#pragma once
#include <atomic>
#include <cmath>
#include <mutex>

#include "amx.h"
#include "problem.h"

#ifdef HAVE_AMX
extern "C" struct Gemm {  // C[batch, m, n] = (C +) alpha A[batch, m, k] B[batch, k, n] (+ bias[n]); strides in elements
  int64_t batch, m, n, k;
  const float* a;
  int64_t a_batch, a_row, a_column;
  const float* b;
  int64_t b_batch, b_row, b_column;
  const float* bias;  // null: none
  int64_t bias_row, bias_column;
  float* c;
  int64_t c_batch, c_row;  // elements of a row are adjacent
  int64_t threads;
  int64_t accumulate;  // add to what C holds; without bias
  double alpha;        // of fp32
  int64_t products;    // of integer digits: 6 or 8; this and what follows is gemm_int8.h's
  double limit;        // largest error that may be predicted of a row or column, over what its norm counts as
  uint8_t* beyond;     // result: which of C's m rows and n columns exceed it
  int64_t rows, columns;  // result: how many
  double worst;        // result: the largest prediction
};

namespace {

constexpr int64_t STEP = 32;         // elements of the sum that a tile holds
constexpr int64_t SIDE = 16;         // rows or columns of a tile
constexpr int64_t DEPTH = 128;       // longest sum inside tiles: a pair of packed tile rows is 24 KiB, half of L1
constexpr int64_t SUM = 512;         // depth of what is packed at once
constexpr int64_t HEIGHT = 256;      // rows of A that a thread packs for itself: 768 KiB, which stay in L2 while
constexpr int64_t WIDTH = 128;       // so many columns of B pass, whose sums are gathered there: 128 KiB
constexpr int64_t BLOCK = 2048;      // columns of B that are packed at once for all threads: 6 MiB
constexpr int64_t PAIR = 32 * 32;    // sums that are computed at once
constexpr int64_t WORDS = 3 * TILE_WORDS;  // of a packed tile with its planes

typedef uint32_t Words __attribute__((vector_size(64)));

// Largest magnitude, as twice a float's bits: infinities and NaNs are the largest.
struct Range {
  Words most{};

  void see(Vec x) {
    const Words twice = (Words)x + (Words)x;
    most = (Words)_mm512_max_epu32((__m512i)most, (__m512i)twice);
  }
};

struct Extent {  // of a whole operand
  std::atomic<uint32_t> most{0};

  void add(const Range& range) {
    const uint32_t high = _mm512_reduce_max_epu32((__m512i)range.most);
    for (uint32_t old = most; high > old && !most.compare_exchange_weak(old, high);) {
    }
  }
  double largest() const {  // infinite or NaN if any element is
    const uint32_t bits = most >> 1;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

// Whether the tiles' result has fp32's accuracy. An infinite number less its highest part is NaN. Tiles take bf16 numbers
// below 2^-126 as 0 and flush such sums: an error of at most 2^-126 (|a| + |b| + 1) an element of the sum, which must be
// nothing beside the rounding of the largest products.
inline bool within_range(const Extent& a, const Extent& b, int64_t k) {
  constexpr double huge = 0x1p126;
  const double left = a.largest(), right = b.largest(), product = left * right;
  if (!(left < huge && right < huge && product * double(k) < huge)) return false;
  return product == 0 || double(k) * 0x1p-126 * (left + right + 1) <= 0x1p-26 * product;
}

// One tile of an operand. SUMMED_ACROSS: the elements that are summed are adjacent in memory (rows of `from`), else
// its rows are summed over. FLIP: lanes and rows change places. `sums` and `sides` say how many exist. The same part of
// what follows `ahead` elements later is fetched meanwhile.
template <bool SUMMED_ACROSS, bool FLIP>
inline void pack_tile(const float* from, int64_t stride, int64_t ahead, int64_t sides, int64_t sums, uint32_t* to,
                      Range& range) {
  Ints packed[3][16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    Vec low, high;
    const float* later = from + i * stride + ahead;
    __builtin_prefetch(later, 0, 2);
    __builtin_prefetch(later + (SUMMED_ACROSS ? 16 : 16 * stride), 0, 2);
    if constexpr (SUMMED_ACROSS) {
      const float* row = from + i * stride;
      low = load_some(row, i < sides ? sums : 0);
      high = load_some(row + 16, i < sides ? sums - 16 : 0);
    } else {
      low = load_some(from + i * stride, i < sums ? sides : 0);
      high = load_some(from + (i + 16) * stride, i + 16 < sums ? sides : 0);
    }
    range.see(low);
    range.see(high);
    Ints x[3], y[3];
    planes_of<3>(low, x);
    planes_of<3>(high, y);
    for (int n = 0; n < 3; n++) packed[n][i] = pair(x[n], y[n]);
  }
  for (int n = 0; n < 3; n++) {
    if constexpr (FLIP) transpose(packed[n]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) std::memcpy(to + n * TILE_WORDS + i * 16, &packed[n][i], 64);
  }
}

// A packed block of an operand, [part of the depth][tile][step][plane].
struct Packed {
  const uint32_t* base;
  int64_t parts, depth, sums, tiles;

  int64_t steps(int64_t part) const { return (std::min(depth, sums - part * depth) + STEP - 1) / STEP; }
  const uint32_t* at(int64_t part, int64_t side) const {
    return base + (part * tiles * (depth / STEP) + side / SIDE * steps(part)) * WORDS;
  }
};

// Packs part `thread` of `threads` of a block with `sides` rows (LEFT: of A) or columns (of B) and `sums` elements to
// sum. `side` and `sum` are the strides, one of them 1.
template <bool LEFT>
Packed pack_block(const float* from, int64_t side, int64_t sum, int64_t sides, int64_t sums, uint32_t* to,
                  int64_t thread, int64_t threads, Range& range) {
  const int64_t tiles = (sides + SIDE - 1) / SIDE, parts = (sums + DEPTH - 1) / DEPTH;
  const Packed packed{to, parts, round_up((sums + parts - 1) / parts, STEP), sums, tiles};  // parts of equal depth
  const int64_t together = sum == 1 ? 1 : 4;  // tiles whose lines of memory are neighbours
  const int64_t groups = (tiles + together - 1) / together;
  for (int64_t g = groups * thread / threads; g < groups * (thread + 1) / threads; g++)
    for (int64_t part = 0; part < parts; part++)
      for (int64_t s = 0; s < packed.steps(part); s++)
        for (int64_t t = g * together; t < std::min(tiles, (g + 1) * together); t++) {
          const int64_t k = part * packed.depth + s * STEP;
          const float* x = from + t * SIDE * side + k * sum;
          uint32_t* y = const_cast<uint32_t*>(packed.at(part, t * SIDE)) + s * WORDS;
          if (sum == 1)
            pack_tile<true, !LEFT>(x, side, 2 * STEP, sides - t * SIDE, sums - k, y, range);
          else
            pack_tile<false, LEFT>(x, sum, STEP * sum, sides - t * SIDE, sums - k, y, range);
        }
  return packed;
}

// Sums of a pair of 32 rows and 32 columns on their way to where the thread gathers them, or from there to C. A few rows
// at a time are written between the products of the pair that follows, which then hide them.
class Result {
  alignas(64) float memory[2][PAIR];
  int current = 0;
  float* gathered = nullptr;  // sums of earlier parts of the depth
  float* c = nullptr;         // null: gather
  const float* coming = nullptr;  // where in C the sums go that are being computed; null: not there
  int64_t coming_row = 0;
  const float* bias = nullptr;
  int64_t row = 0, rows = 0, c_row = 0, bias_row = 0, bias_column = 0;
  __mmask16 lanes[2] = {};
  bool first = true, add = false;
  float alpha = 1;

  void write(int64_t i, int64_t j) {
    const int64_t at = i * 32 + j * 16;
    Vec x = load(memory[1 - current] + at);
    if (!first) x += load(gathered + at);
    if (!c) return store(gathered + at, x);
    float* to = c + i * c_row + j * 16;
    x *= splat(alpha);
    if (add) x += (Vec)_mm512_maskz_loadu_ps(lanes[j], to);
    if (bias) {
      const float* from = bias + i * bias_row + j * 16 * bias_column;
      x += bias_column ? (Vec)_mm512_maskz_loadu_ps(lanes[j], from) : splat(*from);
    }
    _mm512_mask_storeu_ps(to, lanes[j], (__m512)x);
  }

 public:
  float* sums() { return memory[current]; }
  void some() {
    for (int n = 0; n < 2 && row < rows; n++, row++) {
      if (coming) {
        const float* line = coming + row * coming_row;
        __builtin_prefetch(line, 1, 2), __builtin_prefetch(line + 16, 1, 2);
      }
      write(row, 0);
      if (lanes[1]) write(row, 1);
    }
  }
  // The next sums go to C's rows `to`, which are fetched while the ones before are written.
  void expect(const float* to, int64_t to_row) { coming = to, coming_row = to_row; }
  void finish() {
    while (row < rows) some();
  }
  // What is in sums() is the next result, of m x n; it is the first part of the depth, and belongs to `gather`.
  void take(float* gather, bool is_first, int64_t m, int64_t n) {
    finish();
    asm volatile("" ::: "memory");  // the compiler does not know that tile stores write memory
    current = 1 - current;
    gathered = gather, first = is_first, c = nullptr;
    row = 0, rows = m;
    lanes[0] = n >= 16 ? 0xffff : (1u << n) - 1;
    lanes[1] = n >= 32 ? 0xffff : n <= 16 ? 0 : (1u << (n - 16)) - 1;
  }
  // It is also the last: C's from row i and column j, to which it is added or where it is put, with the bias.
  void put(const Gemm& g, int64_t batch, int64_t i, int64_t j, bool adds) {
    c = g.c + batch * g.c_batch + i * g.c_row + j, c_row = g.c_row, add = adds, alpha = float(g.alpha);
    bias = g.bias && !adds ? g.bias + i * g.bias_row + j * g.bias_column : nullptr;
    bias_row = g.bias_row, bias_column = g.bias_column;
  }
};

// M x N tiles (1 or 2 each), summed over `steps` packed steps: small partial products first, and each group of products
// needs one new operand.
template <int M, int N>
inline void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, Result& result, Ahead& ahead) {
  const int64_t outer = steps * WORDS;
  const auto left = [&](int plane) {
    const uint32_t* x = a + plane * TILE_WORDS;
    _tile_loadd(4, x, 64);
    if constexpr (M == 2) _tile_loadd(5, x + outer, 64);
  };
  const auto right = [&](int plane) {
    const uint32_t* x = b + plane * TILE_WORDS;
    _tile_loadd(6, x, 64);
    if constexpr (N == 2) _tile_loadd(7, x + outer, 64);
  };
  const auto product = [&] {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
    result.some();
    ahead.fetch(2);
  };
  _tile_zero(0);
  if constexpr (N == 2) _tile_zero(1);
  if constexpr (M == 2) _tile_zero(2);
  if constexpr (M == 2 && N == 2) _tile_zero(3);
  for (int64_t k = 0; k < steps; k++, a += WORDS, b += WORDS) {
    left(2), right(0), product();
    left(1), product();
    right(1), product();
    left(0), product();
    right(2), product();
    right(0), product();
  }
  float* sums = result.sums();
  _tile_stored(0, sums, 128);
  if constexpr (N == 2) _tile_stored(1, sums + 16, 128);
  if constexpr (M == 2) _tile_stored(2, sums + 16 * 32, 128);
  if constexpr (M == 2 && N == 2) _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// One block of C from row `i` and column `j` on: `rows` (HEIGHT at most), all that `a` holds, and `columns` (WIDTH at
// most) of what `b` holds from `column` on. The sums of all parts of the depth are gathered in `gathered`. Meanwhile
// the columns of the next part, or of the block that begins at `next`, are fetched.
inline void multiply_block(const Gemm& g, const Packed& a, const Packed& b, int64_t batch, int64_t i, int64_t j,
                           int64_t rows, int64_t column, int64_t columns, bool add, float* gathered, int64_t next) {
  const int64_t down = (rows + 31) / 32, pairs = (columns + 31) / 32 * down;
  Result result;
  asm volatile("" ::: "memory");  // nor that tile loads read it
  for (int64_t part = 0; part < a.parts; part++) {
    const bool last = part + 1 == a.parts;
    const int64_t then = last ? 0 : part + 1;
    Ahead ahead(b.at(then, last ? next : column), (columns + 15) / SIDE * b.steps(then) * WORDS);
    for (int64_t p = 0; p < pairs; p++) {
      const int64_t y = p % down * 32, x = p / down * 32, steps = a.steps(part);
      const int64_t m = std::min<int64_t>(32, rows - y), n = std::min<int64_t>(32, columns - x);
      const uint32_t *left = a.at(part, y), *right = b.at(part, column + x);
      result.expect(last ? g.c + batch * g.c_batch + (i + y) * g.c_row + j + x : nullptr, g.c_row);
      if (m > 16 && n > 16)
        multiply<2, 2>(left, right, steps, result, ahead);
      else if (m > 16)
        multiply<2, 1>(left, right, steps, result, ahead);
      else if (n > 16)
        multiply<1, 2>(left, right, steps, result, ahead);
      else
        multiply<1, 1>(left, right, steps, result, ahead);
      result.take(gathered + p * PAIR, part == 0, m, n);
      if (last) result.put(g, batch, i + y, j + x, add);
    }
  }
  result.finish();
  asm volatile("" ::: "memory");
}

// Scratch memory that is kept between calls, for one call at a time; others take their own.
class Scratch {
  static inline std::mutex mutex;
  static inline Memory* kept = nullptr;
  static inline int64_t kept_words = 0;
  bool ours;
  Memory* memory;

 public:
  explicit Scratch(int64_t words) : ours(mutex.try_lock()), memory(nullptr) {
    if (!ours) {
      memory = new Memory(words);
    } else {
      if (kept_words < words) delete kept, kept = new Memory(words), kept_words = kept->base ? words : 0;
      memory = kept;
    }
  }
  ~Scratch() {
    if (ours)
      mutex.unlock();
    else
      delete memory;
  }
  Scratch(const Scratch&) = delete;
  uint32_t* words() const { return reinterpret_cast<uint32_t*>(memory->base); }
};

// How the threads share C: units of `height` rows and 1 / `across` of a block's columns, by rows as far as they go, since
// each thread packs its own. A unit's neighbour in the same rows is the same thread's where it can be.
struct Shares {
  int64_t height, down, across;

  Shares(int64_t m, int64_t threads) {
    constexpr int64_t low = 64;  // fewer rows reuse a column of B too little
    down = (m + HEIGHT - 1) / HEIGHT;
    if (round_up(down, threads) * low <= m) down = round_up(down, threads);
    height = round_up((m + down - 1) / down, 32);
    down = (m + height - 1) / height;
    across = down % threads ? threads : 1;
  }
  int64_t units() const { return down * across; }
  int64_t row(int64_t unit) const { return unit / across * height; }
  int64_t begin(int64_t unit, int64_t columns) const {
    return (columns + 31) / 32 * (unit % across) / across * 32;
  }
  int64_t end(int64_t unit, int64_t columns) const {
    return std::min(columns, (columns + 31) / 32 * (unit % across + 1) / across * 32);
  }
};

// 0; 1: no memory; 2: the operands need fp32's range, and C is to be computed otherwise.
inline int gemm_amx(const Gemm& g) {
  const Shares shares(g.m, g.threads);
  const int64_t steps = round_up(std::min(g.k, SUM), STEP) / STEP, wide = round_up(std::min(g.n, BLOCK), 32);
  const int64_t a_words = shares.height / SIDE * steps * WORDS, b_words = wide / SIDE * steps * WORDS;
  const int64_t own = a_words + shares.height * WIDTH;  // of a thread
  Scratch scratch(b_words + g.threads * own);
  uint32_t* right = scratch.words();
  if (!right) return 1;
  Extent a_extent, b_extent;
#pragma omp parallel num_threads(g.threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    uint32_t* left = right + b_words + thread * own;
    float* gathered = reinterpret_cast<float*>(left + a_words);
    Range a_range, b_range;
    TileConfig config;
    for (int64_t batch = 0; batch < g.batch; batch++)
      for (int64_t k = 0; k < g.k; k += SUM)
        for (int64_t j = 0; j < g.n; j += BLOCK) {
          const int64_t sums = std::min(SUM, g.k - k), columns = std::min(BLOCK, g.n - j);
          const Packed b = pack_block<false>(g.b + batch * g.b_batch + k * g.b_row + j * g.b_column, g.b_column,
                                             g.b_row, columns, sums, right, thread, threads, b_range);
#pragma omp barrier
          const int64_t first = shares.units() * thread / threads, last = shares.units() * (thread + 1) / threads;
          Packed a{};
          for (int64_t unit = first; unit < last; unit++) {
            const int64_t i = shares.row(unit), rows = std::min(shares.height, g.m - i);
            if (unit == first || i != shares.row(unit - 1))
              a = pack_block<true>(g.a + batch * g.a_batch + i * g.a_row + k * g.a_column, g.a_row, g.a_column, rows,
                                   sums, left, 0, 1, a_range);
            const int64_t begin = shares.begin(unit, columns), end = shares.end(unit, columns);
            for (int64_t x = begin; x < end; x += WIDTH)
              multiply_block(g, a, b, batch, i, j + x, rows, x, std::min(WIDTH, end - x), g.accumulate || k > 0,
                             gathered, x + WIDTH < end ? x + WIDTH : begin);
          }
#pragma omp barrier
        }
    a_extent.add(a_range);
    b_extent.add(b_range);
  }
  return within_range(a_extent, b_extent, g.k) ? 0 : 2;
}

}  // namespace
#endif
