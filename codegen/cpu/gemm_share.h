// What a matrix product on AMX tiles is asked for, how threads share it, and the memory it keeps.
#pragma once
#include <cmath>
#include <numeric>

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

constexpr int64_t HEIGHT = 256;  // rows of A that a thread packs for itself, which stay in its L2 while
constexpr int64_t WIDTH = 128;   // so many columns of B pass, whose sums are gathered there: 128 KiB

// How the threads share C: units of `height` rows and 1 / `across` of its columns (or of a block's). A unit's neighbour
// in the same rows is the same thread's where it can be.
struct Shares {
  int64_t height, down, across;

  // Where a block of B is packed for all threads: by rows as far as they go, since each thread packs its own.
  Shares(int64_t m, int64_t threads) {
    constexpr int64_t low = 64;  // fewer rows reuse a column of B too little
    down = (m + HEIGHT - 1) / HEIGHT;
    if (round_up(down, threads) * low <= m) down = round_up(down, threads);
    split(m);
    across = down % threads ? threads : 1;
  }
  // Where each thread packs for itself: units that are nearly square, as many for each thread. Packing an element takes
  // as long as 80 multiplications (measured on one machine; it only has to be about right).
  Shares(int64_t m, int64_t n, int64_t threads) : height(0), down(0), across(0) {
    constexpr double packing = 80;
    double least = INFINITY;
    for (int64_t a = 1; a <= threads; a++) {
      Shares other = *this;
      other.across = a, other.down = round_up((m + HEIGHT - 1) / HEIGHT, threads / std::gcd(a, threads));
      other.split(m);
      const double rows = other.height, columns = round_up((n + a - 1) / a, 32);
      const double time = (other.units() + threads - 1) / threads * (rows * columns + packing * (rows + columns));
      if (time < least) least = time, *this = other;
    }
  }
  void split(int64_t m) {
    height = round_up((m + down - 1) / down, 32);
    down = (m + height - 1) / height;
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

}  // namespace
#endif
