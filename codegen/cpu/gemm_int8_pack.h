// Operands of gemm_int8.h: scaled, rounded to integers, and stored as tiles of their digits.
//
// A tile is 16 rows of 16 times four digits. Four digits are those of the elements i, i + 16, i + 32 and i + 48 of 64
// along the dimension that is summed over: then they are a few shifts away from four vectors of floats.
#pragma once
#include "gemm_amx.h"

#if defined(HAVE_AMX) && defined(__AMX_INT8__) && defined(__AVX512DQ__)
#define HAVE_AMX_INT8 1
namespace {
namespace int8 {

constexpr int64_t STEP = 64;     // elements of the sum that a tile holds
constexpr int64_t DEPTH = 256;   // longest sum between two joins, and of one scale: two packed tile columns are 24 KiB
constexpr int64_t SUM = 1024;    // depth of what is packed at once
constexpr int64_t HEIGHT = 256;  // rows of A that a thread packs for itself: 768 KiB, in L2 while
constexpr int64_t BLOCK = 2048;  // columns of B that are packed at once for all threads: 6 MiB
constexpr int TOGETHER = 4;      // tiles whose lines of memory are neighbours, where elements of a sum are not

// Of rows of A or columns of B over one part of the depth.
struct Scales {
  float* inverse;  // 2^8 over the scale; 0: all elements are taken as 0
  float* energy;   // sum of the squares of the integers
  float* live;     // how many elements are not 0
  double* unit;    // square of what an integer counts
};

// A packed block of an operand, [part of the depth][tile][step][digit], and its scales.
struct Packed {
  uint32_t* base;
  int64_t parts, depth, sums, tiles;

  // 32-bit words for `sides` rows or columns, `depth` deep. A last part may be shorter than the others, and a pair of
  // columns reads scales of 32.
  static int64_t words(int64_t sides, int64_t depth) {
    const int64_t parts = (depth + DEPTH - 1) / DEPTH, whole = round_up(sides, 32);
    return whole / SIDE * (depth / STEP + parts) * WORDS + parts * whole * 5;
  }
  int64_t depth_of(int64_t part) const { return std::min(depth, sums - part * depth); }
  int64_t steps(int64_t part) const { return (depth_of(part) + STEP - 1) / STEP; }
  uint32_t* at(int64_t part, int64_t side) const {
    return base + (part * tiles * (depth / STEP) + side / SIDE * steps(part)) * WORDS;
  }
  Scales scales_of(int64_t part, int64_t side) const {
    const int64_t whole = round_up(tiles, 2) * SIDE;
    double* units = reinterpret_cast<double*>(base + tiles * (depth / STEP) * parts * WORDS);
    float* floats = reinterpret_cast<float*>(units + parts * whole);
    return {floats + part * whole + side, floats + (parts + part) * whole + side,
            floats + (2 * parts + part) * whole + side, units + part * whole + side};
  }
};

inline Ints magnitude(Vec x) { return (Ints)x & 0x7fffffff; }
inline Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }

// The largest magnitudes, as a float's bits, of 16 rows of `sums` adjacent elements.
inline Ints largest_of_rows(const float* from, int64_t stride, int64_t sides, int64_t sums) {
  Ints row[16];
  for (int i = 0; i < 16; i++) {
    const float* x = from + i * stride;
    Ints two[2] = {};
    if (i < sides) {
      int64_t k = 0;
      for (; k + 32 <= sums; k += 32)
        for (int n = 0; n < 2; n++) two[n] = larger(two[n], magnitude(load(x + k + n * 16)));
      for (; k < sums; k += 16) two[0] = larger(two[0], magnitude(load_some(x + k, sums - k)));
    }
    row[i] = larger(two[0], two[1]);
  }
  transpose(row);
  for (int i = 1; i < 16; i++) row[0] = larger(row[0], row[i]);
  return row[0];
}

// The same of TOGETHER tiles whose elements of a sum are `stride` apart. They are copied to `to` [sums][TOGETHER][16]: at
// strides of powers of two caches hold few of them, and they are read again soon.
inline void largest_of_columns(const float* from, int64_t stride, int64_t sides, int64_t sums, float* to,
                               Ints (&most)[TOGETHER]) {
  constexpr int64_t soon = 24;  // rows that are fetched meanwhile
  for (int t = 0; t < TOGETHER; t++) most[t] = Ints{};
  for (int64_t k = 0; k < sums; k++, from += stride, to += TOGETHER * SIDE)
    for (int t = 0; t < TOGETHER; t++) {
      __builtin_prefetch(from + soon * stride + t * SIDE, 0, 3);
      const Vec x = sides >= (t + 1) * SIDE ? load(from + t * SIDE) : load_some(from + t * SIDE, sides - t * SIDE);
      most[t] = larger(most[t], magnitude(x));
      store(to + t * SIDE, x);
    }
}

// Scales of 16 rows or columns: 127 * 2^16 over the largest. Below 2^-100 everything is taken as 0, which the Guard counts
// as an error of as much as it can be.
inline Vec scales(Ints most, const Scales& to, bool& fits) {
  constexpr int32_t huge = (127 + 100) << 23, tiny = (127 - 100) << 23;
  if (_mm512_cmpge_epi32_mask((__m512i)most, (__m512i)(Ints{} + huge))) fits = false;
  const Vec scale = splat(127.0f * 65536.0f) / (Vec)most;
  const Vec inverse = (Vec)((Ints)(splat(256.0f) / scale) & (most >= tiny));
  store(to.inverse, inverse);
  for (int i = 0; i < 16; i++) {
    const double one = double(inverse[i]) * 0x1p-8;
    to.unit[i] = most[i] >= tiny ? one * one : most[i] ? 0x1p-188 : 0;
  }
  return (Vec)((Ints)scale & (most >= tiny));
}

// What is summed of 16 rows or columns while they are packed, still in 16 parts.
struct Counts {
  Vec energy[16]{};
  Ints live[16]{};
};

// One tile of an operand and its digits. SUMMED_ACROSS: the elements that are summed are adjacent in memory (rows of
// `from`), else its rows are summed over. FLIP: lanes and rows change places. `sums` and `sides` say how many exist. The
// same part of what follows `ahead` elements later is fetched meanwhile.
template <bool SUMMED_ACROSS, bool FLIP>
inline void pack_tile(const float* from, int64_t stride, int64_t ahead, int64_t sides, int64_t sums, Vec scale,
                      uint32_t* to, Counts& counts) {
  const Ints inner = Ints{} + 0x00ff00ff, lower = Ints{} + 0xffff, upper = Ints{} + int32_t(0xffff0000);
  Ints packed[3][16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i++) {
    Ints x[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
      const float* at = SUMMED_ACROSS ? from + i * stride + n * 16 : from + (i + n * 16) * stride;
      if constexpr (SUMMED_ACROSS) __builtin_prefetch(at + ahead, 0, 2);
      const Vec value = SUMMED_ACROSS ? load_some(at, i < sides ? sums - n * 16 : 0) * splat(scale[i])
                                      : load_some(at, i + n * 16 < sums ? sides : 0) * scale;
      counts.energy[i] += value * value;
      counts.live[i] = (Ints)_mm512_mask_add_epi32((__m512i)counts.live[i], _mm512_test_epi32_mask(
          (__m512i)value, (__m512i)(Ints{} + 0x7fffffff)), (__m512i)counts.live[i], (__m512i)(Ints{} + 1));
      x[n] = (Ints)_mm512_cvtps_epi32((__m512)value) + 0x808080;  // digits become bytes less 128
    }
    const Ints outer01 = (x[0] & inner) | ((x[1] & inner) << 8), outer23 = (x[2] & inner) | ((x[3] & inner) << 8);
    const Ints middle01 = ((x[0] >> 8) & inner) | (x[1] & ~inner), middle23 = ((x[2] >> 8) & inner) | (x[3] & ~inner);
    packed[0][i] = (((outer01 >> 16) & lower) | (outer23 & upper)) ^ int32_t(0x80808080);
    packed[1][i] = ((middle01 & lower) | (middle23 << 16)) ^ int32_t(0x80808080);
    packed[2][i] = ((outer01 & lower) | (outer23 << 16)) ^ int32_t(0x80808080);
  }
  for (int n = 0; n < 3; n++) {
    if constexpr (FLIP) transpose(packed[n]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) std::memcpy(to + n * TILE_WORDS + i * 16, &packed[n][i], 64);
  }
}

// Packs part `thread` of `threads` of a block with `sides` rows (LEFT: of A) or columns (of B) and `sums` elements to
// sum. `side` and `sum` are the strides, one of them 1. `fits` becomes false where an element is huge or not a number.
template <bool LEFT>
Packed pack_block(const float* from, int64_t side, int64_t sum, int64_t sides, int64_t sums, uint32_t* to,
                  int64_t thread, int64_t threads, bool& fits) {
  const int64_t tiles = (sides + SIDE - 1) / SIDE, parts = (sums + DEPTH - 1) / DEPTH;
  const Packed packed{to, parts, round_up((sums + parts - 1) / parts, STEP), sums, tiles};  // parts of equal depth
  const bool across = sum == 1;
  alignas(64) float copy[DEPTH * TOGETHER * SIDE];
  const int64_t together = across ? 1 : TOGETHER, groups = (tiles + together - 1) / together;
  for (int64_t g = groups * thread / threads; g < groups * (thread + 1) / threads; g++)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t begin = g * together, count = std::min(together, tiles - begin), deep = packed.depth_of(part);
      const float* block = from + begin * SIDE * side + part * packed.depth * sum;
      const int64_t ahead = part + 1 < parts ? packed.depth : SIDE * side - part * packed.depth;
      Ints most[TOGETHER];
      Vec scale[TOGETHER];
      Counts counts[TOGETHER];
      if (across)
        most[0] = largest_of_rows(block, side, sides - begin * SIDE, deep);
      else
        largest_of_columns(block, sum, sides - begin * SIDE, deep, copy, most);
      for (int64_t t = 0; t < count; t++)
        scale[t] = scales(most[t], packed.scales_of(part, (begin + t) * SIDE), fits);
      for (int64_t s = 0; s < packed.steps(part); s++)
        for (int64_t t = 0; t < count; t++) {
          const float* x = block + t * SIDE * side + s * STEP * sum;
          uint32_t* y = packed.at(part, (begin + t) * SIDE) + s * WORDS;
          const int64_t exist = sides - (begin + t) * SIDE, rest = deep - s * STEP;
          if (across)
            pack_tile<true, !LEFT>(x, side, ahead, exist, rest, scale[t], y, counts[t]);
          else
            pack_tile<false, LEFT>(copy + (s * STEP * TOGETHER + t) * SIDE, TOGETHER * SIDE, 0, exist, rest, scale[t], y,
                                   counts[t]);
        }
      for (int64_t t = 0; t < count; t++) {
        const Scales of = packed.scales_of(part, (begin + t) * SIDE);
        if (across) transpose(counts[t].energy), transpose(counts[t].live);
        Vec energy{};
        Ints live{};
        for (int i = 0; i < 16; i++) energy += counts[t].energy[i], live += counts[t].live[i];
        store(of.energy, energy);
        store(of.live, __builtin_convertvector(live, Vec));
      }
    }
  return packed;
}

}  // namespace int8
}  // namespace
#endif
