// Dense tiles in scratch memory: copies in and out of the user's tensors, and the products that attention is made of.
#pragma once
#include "vectors.h"

namespace {

constexpr int MR = 8;  // rows of a register tile; every M below is a multiple of it

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// to[r][0..width) = from[r][0..size), r < rows; lanes past `size` and rows past `rows` up to `height` are 0.
template <typename T>
void copy_in(const T* from, int64_t stride, int64_t rows, int64_t size, float* to, int64_t width, int64_t height) {
  const int64_t whole = size / L * L;
  for (int64_t r = 0; r < rows; r++) {
    const T* source = from + r * stride;
    float* row = to + r * width;
    int64_t c = 0;
    for (; c < whole; c += L) store(row + c, load(source + c));
    for (; c < size; c++) row[c] = widen(source[c]);
    for (; c < width; c++) row[c] = 0;
  }
  std::memset(to + rows * width, 0, sizeof(float) * (height - rows) * width);
}

// to[r][0..size) = from[r][0..size) * scale
template <typename T>
void copy_out(const float* from, int64_t width, int64_t rows, int64_t size, float scale, T* to, int64_t stride) {
  const int64_t whole = size / L * L;
  for (int64_t r = 0; r < rows; r++) {
    const float* row = from + r * width;
    T* target = to + r * stride;
    int64_t c = 0;
    for (; c < whole; c += L) store(target + c, load(row + c) * scale);
    for (; c < size; c++) target[c] = narrow(row[c] * scale, T{});
  }
}

// to[c][r] = from[r][c] * scale, both with rows of whole vectors: `rows` and `width` are multiples of L.
inline void transpose_tile(const float* from, int64_t width, int64_t rows, float scale, float* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < width; c += L) {
      Vec x[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) x[i] = load(from + (r + i) * width + c) * scale;
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < L; i++) store(to + (c + i) * stride + r, x[i]);
    }
}

enum class Start { zero, add, scale };  // what a product is added to: nothing, C, or C times a factor for each lane

// C[0..MR)[NV vectors] (+)= sum over k < depth of A(m, k) * B[k][lanes].
// A(m, k) is a[m * step + k] (ROWS) or a[k * step + m].
template <int NV, bool ROWS, Start START>
inline void micro(int64_t depth, const float* a, int64_t step, const float* b, int64_t b_step, float* c, int64_t c_step,
                  const float* factor) {
  Vec sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) sum[m][n] = Vec{};
  const float* row[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) row[m] = ROWS ? a + m * step : a + m;
  for (int64_t k = 0; k < depth; k++) {
    Vec right[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) right[n] = load(b + k * b_step + n * L);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const Vec left = splat(ROWS ? row[m][k] : a[k * step + m]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) sum[m][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) {  // C joins last: small sums added to a large one round less than one long sum
      float* where = c + m * c_step + n * L;
      if constexpr (START == Start::add) sum[m][n] += load(where);
      if constexpr (START == Start::scale) sum[m][n] += load(where) * load(factor + n * L);
      store(where, sum[m][n]);
    }
}

// C[rows][lanes] (+)= A B; rows a multiple of MR, lanes of L. `factor`, one a lane, serves Start::scale.
template <bool ROWS, Start START>
void product(int64_t rows, int64_t lanes, int64_t depth, const float* a, int64_t step, const float* b, int64_t b_step,
             float* c, int64_t c_step, const float* factor = nullptr) {
  const int64_t row_step = ROWS ? step : 1;
  int64_t n = 0;
  for (; n + 2 * L <= lanes; n += 2 * L)
    for (int64_t m = 0; m < rows; m += MR)
      micro<2, ROWS, START>(depth, a + m * row_step, step, b + n, b_step, c + m * c_step + n, c_step, factor + n);
  for (; n < lanes; n += L)
    for (int64_t m = 0; m < rows; m += MR)
      micro<1, ROWS, START>(depth, a + m * row_step, step, b + n, b_step, c + m * c_step + n, c_step, factor + n);
}

}  // namespace
