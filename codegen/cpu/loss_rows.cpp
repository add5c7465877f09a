// Cross-entropy of rows of logits, and in their place its gradient. Interface: dscompile/codegen/cpu/loss_kernel.py.
//
// A row comes from memory once, for its maximum; its exponentials and its gradient find it in a core's own cache.
#include <cmath>

#include "problem.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes fetched ahead: a row is cold, and what is computed hides little of the wait
constexpr int64_t RUN = 4096;    // elements that are summed in fp32; their sums in fp64

template <typename T>
void load_lanes(const T* from, int64_t n, float (&lanes)[L], float rest) {
  for (int64_t i = 0; i < L; i++) lanes[i] = i < n ? widen(from[i]) : rest;
}

// f(vector, first element) for a row's elements in order; what a last vector lacks is `rest`.
template <typename T, typename F>
inline void each(const T* row, int64_t begin, int64_t end, float rest, const F& f) {
  int64_t i = begin;
  for (; i + L <= end; i += L) f(load(row + i), i);
  if (i == end) return;
  float lanes[L];
  load_lanes(row + i, end - i, lanes, rest);
  f(load(lanes), i);
}

template <typename T>
inline void put(T* row, int64_t i, int64_t end, Vec x) {
  if (i + L <= end) return store(row + i, x);
  float lanes[L];
  store(lanes, x);
  for (int64_t n = 0; i + n < end; n++) row[i + n] = narrow(lanes[n], T{});
}

template <typename T>
float largest(const T* row, int64_t n) {
  Vec most = splat(-INF);
  each(row, 0, n, -INF, [&](Vec x, int64_t i) {
    __builtin_prefetch(reinterpret_cast<const char*>(row + i) + AHEAD, 1, 2);
    most = maximum(x, most);
  });
  float lanes[L], result = -INF;
  store(lanes, most);
  for (float x : lanes) result = std::max(result, x);
  return result;
}

// The loss of one row; GRADIENT: the row becomes its gradient, `share` (1, or 0 where it does not count) times.
template <bool GRADIENT, typename T>
double loss_of(T* row, int64_t n, int64_t target, float share) {
  constexpr bool KEEP = GRADIENT && std::is_same_v<T, float>;  // 16 bits would round the exponentials
  const float top = largest(row, n), chosen = widen(row[target]);
  const auto power = [&](Vec x) { return exp2((x - top) * LOG2E); };
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += RUN) {
    const int64_t end = std::min(n, begin + RUN);
    Vec sum{};
    each(row, begin, end, -INF, [&](Vec x, int64_t i) {
      const Vec e = power(x);
      sum += e;
      if constexpr (KEEP) put(row, i, end, e);
    });
    float lanes[L];
    store(lanes, sum);
    for (float x : lanes) total += x;
  }
  if constexpr (GRADIENT) {
    const float factor = float(share / total);
    const float hit = KEEP ? widen(row[target]) * factor : float(std::exp(double(chosen) - top) * (share / total));
    each(row, 0, n, 0, [&](Vec x, int64_t i) { put(row, i, n, (KEEP ? x : power(x)) * factor); });
    row[target] = narrow(hit - share, T{});
  }
  return std::log(total) + top - chosen;
}

template <typename T>
void losses(T* logits, int64_t rows, int64_t n, const int64_t* target, const uint8_t* counted, bool gradient,
            double* loss, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const float share = !counted || counted[r];
    T* row = logits + r * n;
    const double x = gradient ? loss_of<true>(row, n, target[r], share) : loss_of<false>(row, n, target[r], share);
    loss[r] = share ? x : 0;
  }
}

}  // namespace

// `logits` [rows, n], adjacent; `target` in [0, n) also where `counted` (null: all) is 0; `loss` [rows].
#define ENTRY(name, type)                                                                                            \
  extern "C" void loss_rows_##name(type* logits, int64_t rows, int64_t n, const int64_t* target,                      \
                                   const uint8_t* counted, int gradient, double* loss, int64_t threads) {            \
    losses(logits, rows, n, target, counted, gradient, loss, threads);                                               \
  }

ENTRY(f32, float)
ENTRY(bf16, bf16)
#ifdef HAVE_FP16
ENTRY(f16, fp16)
#endif
