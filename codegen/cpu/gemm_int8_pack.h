// Operands of gemm_int8.h: scaled, rounded to integers, and stored as tiles of their digits.
//
// A tile is 16 rows of 16 times four digits. Four digits are those of the elements i, i + 16, i + 32 and i + 48 of 64
// along the dimension that is summed over: then they are a few shifts away from four vectors of floats.
#pragma once
#include "gemm_amx.h"

#if defined(HAVE_AMX) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
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
  double* unit;     // square of what an integer counts
  float* inverse;   // 2^8 over the scale; 0: all elements are taken as 0
  float* energy;    // sum of the squares of the integers,
  float* second;    // of their second digits,
  float* third;     // and of their third
  float* live;      // how many elements are not 0
};

// A packed block of an operand, [part of the depth][tile][step][digit], and its scales.
struct Packed {
  uint32_t* base;
  int64_t parts, depth, sums, tiles;
  float* weights;  // of rows or columns: one over the norm of their first SUM elements

  // 32-bit words for `sides` rows or columns, `depth` deep. A last part may be shorter than the others, and a pair of
  // columns reads scales of 32.
  static int64_t words(int64_t sides, int64_t depth) {
    const int64_t parts = (depth + DEPTH - 1) / DEPTH, whole = round_up(sides, 32);
    return whole / SIDE * (depth / STEP + parts) * WORDS + parts * 7 * whole;
  }
  int64_t depth_of(int64_t part) const { return std::min(depth, sums - part * depth); }
  int64_t steps(int64_t part) const { return (depth_of(part) + STEP - 1) / STEP; }
  uint32_t* at(int64_t part, int64_t side) const {
    return base + (part * tiles * (depth / STEP) + side / SIDE * steps(part)) * WORDS;
  }
  Scales scales_of(int64_t part, int64_t side) const {
    const int64_t whole = round_up(tiles, 2) * SIDE;
    double* units = reinterpret_cast<double*>(base + tiles * (depth / STEP) * parts * WORDS);
    float* at = reinterpret_cast<float*>(units + parts * whole) + part * whole + side;
    const int64_t next = parts * whole;
    return {units + part * whole + side, at, at + next, at + 2 * next, at + 3 * next, at + 4 * next};
  }
};

inline Ints magnitude(Vec x) { return (Ints)x & 0x7fffffff; }
inline Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }

// What 16 rows or columns look like: the largest magnitudes, as a float's bits, and the bits that any element has.
struct Seen {
  Ints most{}, bits{};

  void see(Vec x) { most = larger(most, magnitude(x)), bits |= (Ints)x; }
};

// Of 16 rows of `sums` adjacent elements.
inline Seen see_rows(const float* from, int64_t stride, int64_t sides, int64_t sums) {
  Ints most[16], bits[16];
  for (int i = 0; i < 16; i++) {
    const float* x = from + i * stride;
    Seen two[2];
    if (i < sides) {
      int64_t k = 0;
      for (; k + 32 <= sums; k += 32)
        for (int n = 0; n < 2; n++) two[n].see(load(x + k + n * 16));
      for (; k < sums; k += 16) two[0].see(load_some(x + k, sums - k));
    }
    most[i] = larger(two[0].most, two[1].most), bits[i] = two[0].bits | two[1].bits;
  }
  transpose(most);
  transpose(bits);
  for (int i = 1; i < 16; i++) most[0] = larger(most[0], most[i]), bits[0] |= bits[i];
  return {most[0], bits[0]};
}

// Of TOGETHER tiles whose elements of a sum are `stride` apart. They are copied to `to` [sums][TOGETHER][16]: at strides of
// powers of two caches hold few of them, and they are read again soon.
inline void see_columns(const float* from, int64_t stride, int64_t sides, int64_t sums, float* to,
                        Seen (&seen)[TOGETHER]) {
  constexpr int64_t soon = 24;  // rows that are fetched meanwhile
  for (int64_t k = 0; k < sums; k++, from += stride, to += TOGETHER * SIDE)
    for (int t = 0; t < TOGETHER; t++) {
      __builtin_prefetch(from + soon * stride + t * SIDE, 0, 3);
      const Vec x = sides >= (t + 1) * SIDE ? load(from + t * SIDE) : load_some(from + t * SIDE, sides - t * SIDE);
      seen[t].see(x);
      store(to + t * SIDE, x);
    }
}

constexpr double FLUSHED = 0x1p-188;  // unit where all elements, which are not all 0, are taken as 0

// Scales of 16 rows or columns: 127 * 2^16 over the largest. Numbers of 16 bits or fewer (whole numbers, bf16) stay what
// they are with a power of two, and then few digits are left out. Below 2^-100 everything is taken as 0.
inline Vec scales(const Seen& seen, const Scales& to, bool& fits) {
  constexpr int32_t huge = (127 + 100) << 23, tiny = (127 - 100) << 23;
  const Ints most = seen.most;
  if (_mm512_cmpge_epi32_mask((__m512i)most, (__m512i)(Ints{} + huge))) fits = false;
  Ints scale = (Ints)(splat(127.0f * 65536.0f) / (Vec)most) & (most >= tiny);
  scale &= (seen.bits & 0xff) ? Ints{} - 1 : Ints{} + int32_t(0xff800000);
  const Vec inverse = (Vec)((Ints)(splat(256.0f) / (Vec)scale) & (most >= tiny));
  store(to.inverse, inverse);
  for (int i = 0; i < 16; i++) {
    const double one = double(inverse[i]) * 0x1p-8;
    to.unit[i] = most[i] >= tiny ? one * one : most[i] ? FLUSHED : 0;
  }
  return (Vec)scale;
}

// What is summed of 16 rows or columns while they are packed, still in 16 parts.
struct Counts {
  Vec energy[16]{};
  Ints second[16]{}, third[16]{}, live[16]{};

  void put(bool across, double deep, const Scales& to) {
    if (across) transpose(energy), transpose(second), transpose(third), transpose(live);
    for (int i = 1; i < 16; i++)
      energy[0] += energy[i], second[0] += second[i], third[0] += third[i], live[0] += live[i];
    store(to.energy, energy[0]);
    store(to.second, __builtin_convertvector(second[0], Vec));
    store(to.third, __builtin_convertvector(third[0], Vec));
    store(to.live, __builtin_convertvector(live[0], Vec));
    for (int i = 0; i < 16; i++)  // an error of a tile's digits' size, in units that are large enough
      if (to.unit[i] == FLUSHED) to.second[i] = to.third[i] = float(5476 * deep);
  }
};

inline Ints add_squares(Ints sum, Ints digits) {  // of four bytes each; -128 counts as -127
  const __m512i size = _mm512_min_epu8(_mm512_abs_epi8((__m512i)digits), _mm512_set1_epi8(127));
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, size, size);
}

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
    counts.second[i] = add_squares(counts.second[i], packed[1][i]);
    counts.third[i] = add_squares(counts.third[i], packed[2][i]);
  }
  for (int n = 0; n < 3; n++) {
    if constexpr (FLIP) transpose(packed[n]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) std::memcpy(to + n * TILE_WORDS + i * 16, &packed[n][i], 64);
  }
}

// Packs part `thread` of `threads` of a block with `sides` rows (LEFT: of A) or columns (of B) and `sums` elements to
// sum. `side` and `sum` are the strides, one of them 1. `fits` becomes false where an element is huge or not a number.
// `weights` are written if these elements are the `first` of the sum.
template <bool LEFT>
Packed pack_block(const float* from, int64_t side, int64_t sum, int64_t sides, int64_t sums, uint32_t* to,
                  float* weights, bool first, int64_t thread, int64_t threads, bool& fits) {
  const int64_t tiles = (sides + SIDE - 1) / SIDE, parts = (sums + DEPTH - 1) / DEPTH;
  const Packed packed{to, parts, round_up((sums + parts - 1) / parts, STEP), sums, tiles,
                      weights};  // parts of equal depth
  const bool across = sum == 1;
  alignas(64) float copy[DEPTH * TOGETHER * SIDE];
  const int64_t together = across ? 1 : TOGETHER, groups = (tiles + together - 1) / together;
  for (int64_t g = groups * thread / threads; g < groups * (thread + 1) / threads; g++)
    for (int64_t part = 0; part < parts; part++) {
      const int64_t begin = g * together, count = std::min(together, tiles - begin), deep = packed.depth_of(part);
      const float* block = from + begin * SIDE * side + part * packed.depth * sum;
      const int64_t ahead = part + 1 < parts ? packed.depth : SIDE * side - part * packed.depth;
      Seen seen[TOGETHER];
      Vec scale[TOGETHER];
      Counts counts[TOGETHER];
      if (across)
        seen[0] = see_rows(block, side, sides - begin * SIDE, deep);
      else
        see_columns(block, sum, sides - begin * SIDE, deep, copy, seen);
      for (int64_t t = 0; t < count; t++)
        scale[t] = scales(seen[t], packed.scales_of(part, (begin + t) * SIDE), fits);
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
        const int64_t at = (begin + t) * SIDE;
        counts[t].put(across, double(deep), packed.scales_of(part, at));
        for (int64_t i = at; first && part + 1 == parts && i < at + SIDE; i++) {
          double squares = 0;
          for (int64_t p = 0; p < parts; p++) {
            const Scales of = packed.scales_of(p, i);
            squares += *of.unit * double(*of.energy);
          }
          weights[i] = squares > 0 ? float(1 / std::sqrt(squares)) : 1;
        }
      }
    }
  return packed;
}

}  // namespace int8
}  // namespace
#endif
