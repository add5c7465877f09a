// Vectors of floats as wide as the machine's, and the few things attention does with them.
// GCC's and Clang's vector extensions: the same source serves AVX-512, AVX2, SSE and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes of a vector
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float Vec __attribute__((vector_size(L * 4)));
typedef int32_t Ints __attribute__((vector_size(L * 4)));
typedef uint16_t Halves __attribute__((vector_size(L * 2)));

struct bf16 {
  uint16_t bits;
};

#if defined(__FLT16_MAX__)
#define HAVE_FP16 1  // GCC 12 and Clang 15: older compilers have no such type on x86
typedef _Float16 fp16;
typedef fp16 Fp16s __attribute__((vector_size(L * 2)));
#endif

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float INF = __builtin_inff();

inline Vec splat(float x) { return x - Vec{}; }  // not plus: -0.0 + 0.0 is 0.0, which would cost an addition

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec maximum(Vec a, Vec b) {  // b if either is NaN
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);  // GCC makes a comparison and a blend of the line below
#else
  return a > b ? a : b;
#endif
}

inline Vec load(const bf16* p) {  // a bf16 is the upper half of a float
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Ints) << 16);
}

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float widen(float x) { return x; }

inline Ints rounded(Vec v) {  // to the nearest bf16, ties to even, in the lower 16 bits; NaN stays NaN
  Ints bits = (Ints)v;
  Ints even = (bits >> 16) & 1;
  Ints result = ((bits + 0x7fff + even) >> 16) & 0xffff;
  return v == v ? result : Ints{} + 0x7fc0;
}

inline void store(bf16* p, Vec v) {
  Halves h = __builtin_convertvector(rounded(v), Halves);
  std::memcpy(p, &h, sizeof h);
}

inline float narrow(float x, float) { return x; }
inline bf16 narrow(float x, bf16) {
  bf16 all[L];
  store(all, splat(x));
  return all[0];
}

#ifdef HAVE_FP16
#if defined(__AVX512F__)  // GCC converts these vectors one element at a time
inline Vec load(const fp16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(fp16* p, Vec v) {  // to nearest, ties to even; past 65504 infinite
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
#else
inline Vec load(const fp16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));  // GCC converts lane by lane below
#endif
  Fp16s h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Vec);
}
inline void store(fp16* p, Vec v) {  // to nearest, ties to even; past 65504 infinite
#if defined(__AVX512F__)
  return _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  const Fp16s h = __builtin_convertvector(v, Fp16s);
  std::memcpy(p, &h, sizeof h);
}
#endif
inline float widen(fp16 x) { return x; }
inline fp16 narrow(float x, fp16) { return fp16(x); }
#endif

// 2^x within 2 ulp down to 2^-126; at and below 2^-127, as for masked scores of -inf, exactly 0; NaN stays NaN.
// Coefficients: Cephes' exp2f.
inline Vec exp2(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the mantissa's low bits
  const Vec t = maximum(splat(-127.0f), x);  // 1 * 2^-127 has exponent bits 0 and mantissa bits 0
  const Vec moved = t + shift;
  const Vec f = t - (moved - shift);
  Vec p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return (Vec)((Ints)p + ((Ints)moved << 23));
}

template <int S, typename V, int... J>
inline void exchange(V& a, V& b, std::integer_sequence<int, J...>) {
  V low = __builtin_shufflevector(a, b, ((J & S) ? L + J - S : J)...);
  V high = __builtin_shufflevector(a, b, ((J & S) ? L + J : J + S)...);
  a = low;
  b = high;
}

template <int S, typename V>
inline void transpose_step(V (&x)[L]) {
#pragma GCC unroll 16
  for (int i = 0; i < L; i++)
    if (!(i & S)) exchange<S>(x[i], x[i + S], std::make_integer_sequence<int, L>{});
}

template <typename V>
inline void transpose(V (&x)[L]) {  // L vectors of L lanes, in place
  transpose_step<1>(x);
  transpose_step<2>(x);
  if constexpr (L >= 8) transpose_step<4>(x);
  if constexpr (L >= 16) transpose_step<8>(x);
}

}  // namespace
