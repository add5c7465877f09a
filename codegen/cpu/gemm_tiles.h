// Products of packed tiles for gemm_amx.h, and what is done beside them.
#pragma once
#include "gemm_pack.h"
#include "gemm_share.h"

#ifdef HAVE_AMX
namespace {

constexpr int64_t PAIR = 32 * 32;  // sums that are computed at once

// Sums of a pair of 32 rows and 32 columns on their way to where the thread gathers them, or from there to C. Two rows
// at a time are written between the products of the pair that follows, which then hide them.
class Result {
  enum class Way { gather, put_plain, put_added, put };
  alignas(64) float memory[2][PAIR];
  int current = 0;
  Way way = Way::gather;
  int64_t rows = 0;                                   // that are left
  const float *from = nullptr, *bias = nullptr;       // of the row that is next, as the following pointers
  float *gathered = nullptr, *c = nullptr;            // sums of earlier parts of the depth; where they go
  const float* coming = nullptr;  // where in C the sums go that are being computed; null: not there
  int64_t c_row = 0, coming_row = 0, bias_row = 0, bias_column = 0;
  __mmask16 lanes[2] = {};
  bool first = true, add = false;
  float alpha = 1;

  Vec sum(int j) const { return first ? load(from + j * 16) : load(from + j * 16) + load(gathered + j * 16); }
  void put(int j) {
    Vec x = sum(j);
    float* to = c + j * 16;
    x *= splat(alpha);
    if (add) x += (Vec)_mm512_maskz_loadu_ps(lanes[j], to);
    if (bias) {
      const float* y = bias + j * 16 * bias_column;
      x += bias_column ? (Vec)_mm512_maskz_loadu_ps(lanes[j], y) : splat(*y);
    }
    _mm512_mask_storeu_ps(to, lanes[j], (__m512)x);
  }

 public:
  // Where the tiles of the next pair are to be stored; the first part of the depth goes where it is gathered.
  float* sums(float* gather, bool direct) { return direct ? gather : memory[current]; }
  void some() {
    for (int n = 0; n < 2 && rows > 0; n++, rows--, from += 32, gathered += 32, c += c_row) {
      if (coming) {
        __builtin_prefetch(coming, 1, 2), __builtin_prefetch(coming + 16, 1, 2);
        coming += coming_row;
      }
      switch (way) {
        case Way::gather:
          store(gathered, sum(0)), store(gathered + 16, sum(1));
          break;
        case Way::put_plain:
          store(c, sum(0)), store(c + 16, sum(1));
          break;
        case Way::put_added:
          store(c, sum(0) + load(c)), store(c + 16, sum(1) + load(c + 16));
          break;
        case Way::put:
          put(0);
          if (lanes[1]) put(1);
          bias += bias_row;
      }
    }
  }
  // The next sums go to C's rows `to`, which are fetched while the ones before are written.
  void expect(const float* to, int64_t to_row) { coming = to, coming_row = to_row; }
  void finish() {
    while (rows > 0) some();
  }
  // The tiles that were stored are the next result, of m x n, to be added to `gather`.
  void take(float* gather, int64_t m) {
    finish();
    asm volatile("" ::: "memory");  // the compiler does not know that tile stores write memory
    from = memory[current];
    current = 1 - current;
    gathered = gather, way = Way::gather, first = false, c_row = 0, rows = m;
  }
  // It is the last part of the depth (only: the first too), and C's from row i and column j, to which it is added or
  // where it is put, with the bias.
  void take_last(const Gemm& g, float* gather, bool only, int64_t batch, int64_t i, int64_t j, int64_t m, int64_t n,
                 bool adds) {
    take(gather, m);
    first = only, add = adds, alpha = float(g.alpha);
    c = g.c + batch * g.c_batch + i * g.c_row + j, c_row = g.c_row;
    bias = g.bias && !adds ? g.bias + i * g.bias_row + j * g.bias_column : nullptr;
    bias_row = bias ? g.bias_row : 0, bias_column = g.bias_column;
    lanes[0] = n >= 16 ? 0xffff : (1u << n) - 1;
    lanes[1] = n >= 32 ? 0xffff : n <= 16 ? 0 : (1u << (n - 16)) - 1;
    way = bias || alpha != 1 || n < 32 ? Way::put : add ? Way::put_added : Way::put_plain;
  }
};

// What a thread does between tile products, which take 16 cycles each and leave most of the processor idle.
struct Beside {
  Result result;
  Packer packer;

  // Not inlined: copies of it would not fit into what the processor has decoded.
  __attribute__((noinline)) void turn() {
    result.some();
    packer.some();
  }
};

// M x N tiles (1 or 2 each), summed over `steps` packed steps into `sums`: small partial products first, and each group
// of products needs one new operand.
template <int M, int N>
inline void multiply(const uint32_t* a, const uint32_t* b, int64_t steps, float* sums, Beside& beside) {
  const int64_t outer = steps * WORDS;
  const auto left = [&](int plane) {  // in use once, where columns are used for all rows: a hint for L1
    const uint32_t* x = a + plane * TILE_WORDS;
    _tile_stream_loadd(4, x, 64);
    if constexpr (M == 2) _tile_stream_loadd(5, x + outer, 64);
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
    beside.turn();
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
  _tile_stored(0, sums, 128);
  if constexpr (N == 2) _tile_stored(1, sums + 16, 128);
  if constexpr (M == 2) _tile_stored(2, sums + 16 * 32, 128);
  if constexpr (M == 2 && N == 2) _tile_stored(3, sums + 16 * 32 + 16, 128);
}

}  // namespace
#endif
