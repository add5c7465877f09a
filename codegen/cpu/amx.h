// Products on AMX tiles of bf16, at bf16, fp16 or fp32 accuracy.
//
// A number is kept as PLANES bf16 numbers that add up to it: one for bf16 operands, two for fp16, three for fp32 (8 bits
// of the significand each, so the sum is exact). Of the nine products of two sums of three the six largest are computed;
// what is left out is below 2^-24 of the result, as fp32 rounding is (Henry, Tang and Heinecke, "Leveraging the bfloat16
// artificial intelligence datatype for higher-precision computations", 2019). Of the four of two sums of two the three
// largest are: what is left out is below 2^-16, and rounding to fp16 is 2^-11.
//
// Operands are stored as tiles of 16 rows of 16 pairs of bf16, 1 KiB each. A pair holds the elements i and i + 16 of 32
// along the dimension that is summed over: then a pair is one shift and one mask away from two vectors of floats.
#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512F__) && defined(__linux__)
#define HAVE_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t TILE_WORDS = 256;  // 32-bit words of a tile

// Whether the system lets this process use tiles (it asks once).
inline bool amx_allowed() {
  static const bool allowed = [] {
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return allowed;
}

// All eight tiles 16 x 64 bytes while it lives; then whatever other code had configured before.
struct TileConfig {
  alignas(64) uint8_t before[64];
  TileConfig() {
    alignas(64) uint8_t ours[64] = {1};  // palette 1
    for (int t = 0; t < 8; t++) ours[16 + 2 * t] = 64, ours[48 + t] = 16;
    _tile_storeconfig(before);
    asm volatile("" : "+m"(before), "+m"(ours));  // GCC's intrinsics name only the first bytes of what they read
    _tile_loadconfig(ours);
  }
  ~TileConfig() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
  TileConfig(const TileConfig&) = delete;
};

// The planes of each lane, as the upper halves of 32-bit words.
template <int PLANES>
inline void planes_of(Vec x, Ints (&plane)[PLANES]) {
  const Ints upper = Ints{} + int32_t(0xffff0000);
  if constexpr (PLANES == 1) {
    const Ints bits = (Ints)x;
    plane[0] = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  } else if constexpr (PLANES == 2) {
    plane[0] = ((Ints)x + 0x8000) & upper;
    plane[1] = (Ints)(x - (Vec)plane[0]) + 0x8000;  // an fp16 number leaves at most 3 bits; others are rounded
  } else {
    static_assert(PLANES == 3);
    plane[0] = ((Ints)x + 0x8000) & upper;
    const Vec rest = x - (Vec)plane[0];
    plane[1] = (Ints)rest & upper;  // cut, not rounded: that saves an instruction, and what it costs is below 2^-24
    plane[2] = (Ints)(rest - (Vec)plane[1]);
  }
}

inline Ints pair(Ints low, Ints high) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  return (Ints)((Words)low >> 16) | (high & int32_t(0xffff0000));
}

// Operands of a product: `tiles` tiles along rows (or columns), `depth` along the sum; steps in words.
struct Tiles {
  uint32_t* base;
  int64_t outer, depth, plane;

  uint32_t* at(int64_t i, int64_t k) const { return base + i * outer + k * depth; }
};

// Tiles stored [outer][depth][plane].
template <int PLANES>
inline Tiles tiles_of(float* memory, int64_t depth) {
  return {reinterpret_cast<uint32_t*>(memory), depth * PLANES * TILE_WORDS, PLANES * TILE_WORDS, TILE_WORDS};
}

// Memory that will be read soon, fetched a few lines at a time while something else is computed.
struct Ahead {
  const char *next, *end;

  template <typename T>
  Ahead(const T* from, int64_t count) : next(reinterpret_cast<const char*>(from)), end(next + count * sizeof(T)) {}
  Ahead() : next(nullptr), end(nullptr) {}
  void fetch(int lines) {
    for (; lines > 0 && next < end; lines--, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

inline Vec load_some(const float* p, int64_t n) {
  const __mmask16 lanes = n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1;
  return (Vec)_mm512_maskz_loadu_ps(lanes, p);
}

inline Vec load_some(const bf16* p, int64_t n) {
  const __mmask16 lanes = n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1;
  const Halves bits = (Halves)_mm256_maskz_loadu_epi16(lanes, p);
  return (Vec)(__builtin_convertvector(bits, Ints) << 16);
}

#ifdef HAVE_FP16
inline Vec load_some(const fp16* p, int64_t n) {
  const __mmask16 lanes = n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1;
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}
#endif

// As pack, below; WHOLE: all rows and lanes exist.
template <int PLANES, bool TRANSPOSED, bool WHOLE, typename T>
inline void pack_some(const T* low, int64_t low_rows, int64_t low_lanes, const T* high, int64_t high_rows,
                      int64_t high_lanes, int64_t stride, uint32_t* to, int64_t plane_step, int64_t later) {
  Ints packed[TRANSPOSED ? PLANES : 1][16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const T *x = low + i * stride, *y = high + i * stride;
    if (later) {
      __builtin_prefetch(x + later, 0, 2);
      __builtin_prefetch(y + later, 0, 2);
    }
    Ints a[PLANES], b[PLANES];
    planes_of<PLANES>(WHOLE ? load(x) : load_some(x, i < low_rows ? low_lanes : 0), a);
    planes_of<PLANES>(WHOLE ? load(y) : load_some(y, i < high_rows ? high_lanes : 0), b);
#pragma GCC unroll 3
    for (int n = 0; n < PLANES; n++) {
      const Ints x_y = pair(a[n], b[n]);
      if constexpr (TRANSPOSED)
        packed[n][i] = x_y;
      else
        std::memcpy(to + n * plane_step + i * 16, &x_y, 64);
    }
  }
  for (int n = 0; TRANSPOSED && n < PLANES; n++) {
    transpose(packed[n]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) std::memcpy(to + n * plane_step + i * 16, &packed[n][i], 64);
  }
}

// One tile of pairs (low row i, high row i), i < 16. `low` and `high` point at rows `stride` apart, of which the first
// so many exist, each with so many lanes; the rest is 0. TRANSPOSED stores lanes down and rows across. What lies `later`
// elements on is fetched meanwhile.
template <int PLANES, bool TRANSPOSED, typename T>
void pack(const T* low, int64_t low_rows, int64_t low_lanes, const T* high, int64_t high_rows, int64_t high_lanes,
          int64_t stride, uint32_t* to, int64_t plane_step, int64_t later = 0) {
  if (low_rows >= 16 && low_lanes >= 16 && high_rows >= 16 && high_lanes >= 16)
    pack_some<PLANES, TRANSPOSED, true>(low, 16, 16, high, 16, 16, stride, to, plane_step, later);
  else
    pack_some<PLANES, TRANSPOSED, false>(low, low_rows, low_lanes, high, high_rows, high_lanes, stride, to, plane_step,
                                         later);
}

// Rows [0, rows) of a matrix, to be summed along their `size` elements: as left operand, or TRANSPOSED as right one. A
// tile at each call.
template <int PLANES, bool TRANSPOSED, typename T>
struct PackRows {
  const T* from;
  int64_t stride, rows, size;
  Tiles to;
  int64_t later = 0, i = 0, k = 0;

  int64_t pieces() const { return (rows + 15) / 16 * ((size + 31) / 32); }
  void operator()() {
    const T* x = from + i * 16 * stride + k * 32;
    pack<PLANES, TRANSPOSED>(x, rows - i * 16, size - k * 32, x + 16, rows - i * 16, size - k * 32 - 16, stride,
                             to.at(i, k), to.plane, later);
    if (++k * 32 >= size) k = 0, i++;
  }
};

// Rows [0, rows) of a matrix, to be summed along the rows, `chunk` (16 or 32) of them a tile: as right operand, or
// TRANSPOSED as left one. A tile at each call.
template <int PLANES, bool TRANSPOSED, typename T>
struct PackColumns {
  const T* from;
  int64_t stride, rows, size, chunk;
  Tiles to;
  int64_t later = 0, i = 0, k = 0;

  int64_t pieces() const { return (rows + chunk - 1) / chunk * ((size + 15) / 16); }
  void operator()() {
    const T* x = from + k * chunk * stride + i * 16;
    const int64_t high = chunk == 32 ? rows - k * 32 - 16 : 0;
    pack<PLANES, TRANSPOSED>(x, rows - k * chunk, size - i * 16, x + 16 * stride, high, size - i * 16, stride,
                             to.at(i, k), to.plane, later);
    if (++i * 16 >= size) i = 0, k++;
  }
};

// All of a packing at once.
template <typename Pack>
void all(Pack pack) {
  for (int64_t n = pack.pieces(); n > 0; n--) pack();
}

}  // namespace
#endif
