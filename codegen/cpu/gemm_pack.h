// Packing of the operands of gemm_amx.h, a few vectors at a time between the tile products that it hides behind.
//
// An operand is packed in pieces. A thread lists them in a Packer, in the order in which it needs them, and calls some()
// between products; before it uses a piece, it waits for it: packs what is listed up to it.
#pragma once
#include <atomic>

#include "amx.h"
#include "problem.h"

#ifdef HAVE_AMX
namespace {

constexpr int64_t STEP = 32;               // elements of the sum that a tile holds
constexpr int64_t SIDE = 16;               // rows or columns of a tile
constexpr int64_t WORDS = 3 * TILE_WORDS;  // of a packed tile with its planes
constexpr int64_t PIECE = 64;              // rows or columns packed as one: lines of memory that are neighbours

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

struct Piece {  // at most PIECE rows (LEFT: of A) or columns (of B), and their elements of one part of the sum
  const float* from;
  int64_t side, sum;  // strides, one of them 1
  int32_t sides, sums;
  uint32_t* to;     // [tile][step][plane]
  uint32_t* ready;  // becomes `number`
  uint32_t number;
  bool left;
};

// The tiles of a piece: neighbours in memory follow each other.
struct Cursor {
  const float *from = nullptr, *line = nullptr;  // the tile's, and of the first of its neighbours
  uint32_t *to = nullptr, *to_line = nullptr;
  int64_t stride = 0, beside = 0;  // between its 16 rows in memory, and between the two vectors of a row
  int64_t next_from = 0, next_line = 0, next_to = 0, next_to_line = 0;
  int at = 0, count = 0, line_number = 0, left = 0;  // of neighbours; tiles with this one

  void begin(const Piece& p) {
    const int across = (p.sides + SIDE - 1) / SIDE, deep = (p.sums + STEP - 1) / STEP;
    const bool rows = p.sum == 1;
    from = line = p.from, to = to_line = p.to, at = line_number = 0, left = across * deep, count = rows ? deep : across;
    stride = rows ? p.side : p.sum, beside = rows ? 16 : 16 * p.sum;
    const int64_t side = SIDE * p.side, sum = STEP * p.sum;
    next_from = rows ? sum : side, next_line = rows ? side : sum;
    next_to = rows ? WORDS : deep * WORDS, next_to_line = rows ? deep * WORDS : WORDS;
  }
  // false: that was the last.
  bool next() {
    if (left <= 1) return left = 0;
    left--;
    if (++at < count) {
      from += next_from, to += next_to;
    } else {
      at = 0, line_number++, from = line += next_line, to = to_line += next_to_line;
    }
    return true;
  }
};

// The pieces that a thread packs, in their order. A tile takes TURNS turns; its 16 rows of memory are pairs of vectors.
class Packer {
  static constexpr uint32_t LENGTH = 64;  // of the list: more than two steps need
  static constexpr int TURNS = 8;
  static constexpr int AHEAD = 1;  // tiles that are fetched before they are packed
  uint32_t first = 0, end = 0;                      // of the list: what is being packed; past the last
  Cursor now, later;                                // the tile that is packed, and the one that is fetched,
  uint32_t later_piece = 0;                         // which is this piece's
  int turn = 0, lead = 0;                           // of the tile; tiles to be fetched before the first is packed
  const float *from = nullptr, *fetched = nullptr;  // rows of the tiles whose turn it is
  bool left = false, flip = false;                  // of the piece: of A; rows and columns change places
  bool whole = false;                               // it has whole tiles only, else
  int rows[2] = {};                                 // so many rows exist of each half of the tile,
  __mmask16 lanes[2] = {};                          // and these lanes of their vectors
  alignas(64) float corners[2][4][4][16];  // of a tile that is transposed: [half][rows][column][lane]
  Piece list[LENGTH];

  static __mmask16 mask(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
  void begin_tile(const Piece& p) {
    from = now.from, fetched = later.from;
    if (whole) return;
    const bool adjacent = p.sum == 1;
    const int sides = p.sides - SIDE * (adjacent ? now.line_number : now.at);
    const int sums = p.sums - STEP * (adjacent ? now.at : now.line_number);
    rows[0] = adjacent ? sides : sums, rows[1] = adjacent ? sides : sums - 16;
    lanes[0] = mask(adjacent ? sums : sides), lanes[1] = mask(adjacent ? sums - 16 : sides);
  }
  void fetch_next() {
    if (!later.next() && later_piece + 1 != end) later.begin(list[++later_piece % LENGTH]);
  }
  void begin_piece(const Piece& p) {
    now.begin(p);
    // A tile of B has its columns across, one of A its rows down; what is adjacent in memory lies across when loaded.
    left = p.left, flip = (p.sum == 1) != left, whole = p.sides % SIDE == 0 && p.sums % STEP == 0;
    if (int32_t(later_piece - first) <= 0) later = now, later_piece = first, lead = AHEAD;
    begin_tile(p);
  }
  // Row `i` of a half of the tile, which is at `x`.
  template <bool WHOLE>
  Vec take(int half, int i, const float* x) const {
    return WHOLE ? load(x) : (Vec)_mm512_maskz_loadu_ps(i < rows[half] ? lanes[half] : 0, x);
  }
  // Two vectors become row `i` of the tile's planes.
  void give(int i, Vec low, Vec high) const {
    Ints x[3], y[3];
    planes_of<3>(low, x);
    planes_of<3>(high, y);
    for (int n = 0; n < 3; n++) {
      const Ints both = pair(x[n], y[n]);
      std::memcpy(now.to + n * TILE_WORDS + i * 16, &both, 64);
    }
  }
  template <bool WHOLE>
  void rows_of() {
    Range seen = range[left];
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++, from += now.stride) {
      const int i = 2 * turn + n;
      const Vec low = take<WHOLE>(0, i, from), high = take<WHOLE>(1, i, from + now.beside);
      seen.see(low), seen.see(high);
      give(i, low, high);
    }
    range[left] = seen;
  }
  // Four rows and columns change places inside each quarter of a vector.
  template <bool WHOLE>
  void quarters_of() {
    Range seen = range[left];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      Vec x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        x[i] = take<WHOLE>(half, 4 * turn + i, from + half * now.beside + i * now.stride);
        seen.see(x[i]);
      }
      const __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]);
      const __m512d b = (__m512d)_mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]);
      const __m512d c = (__m512d)_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]);
      const __m512d d = (__m512d)_mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]);
      float(&corner)[4][16] = corners[half][turn];
      store(corner[0], (Vec)_mm512_unpacklo_pd(a, c)), store(corner[1], (Vec)_mm512_unpackhi_pd(a, c));
      store(corner[2], (Vec)_mm512_unpacklo_pd(b, d)), store(corner[3], (Vec)_mm512_unpackhi_pd(b, d));
    }
    from += 4 * now.stride;
    range[left] = seen;
  }
  // Then quarters: of columns 4 q + `column`, q < 4.
  void columns_of(int column) {
    Vec y[2][4];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      __m512 x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) x[i] = (__m512)load(corners[half][i][column]);
      const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x88), b = _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
      const __m512 c = _mm512_shuffle_f32x4(x[2], x[3], 0x88), d = _mm512_shuffle_f32x4(x[2], x[3], 0xdd);
      y[half][0] = (Vec)_mm512_shuffle_f32x4(a, c, 0x88), y[half][1] = (Vec)_mm512_shuffle_f32x4(b, d, 0x88);
      y[half][2] = (Vec)_mm512_shuffle_f32x4(a, c, 0xdd), y[half][3] = (Vec)_mm512_shuffle_f32x4(b, d, 0xdd);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) give(4 * q + column, y[0][q], y[1][q]);
  }
  template <bool WHOLE>
  void pack() {
    if (!flip)
      rows_of<WHOLE>();
    else if (turn < 4)
      quarters_of<WHOLE>();
    else
      columns_of(turn - 4);
  }
  void advance() {
    const Piece& p = list[first % LENGTH];
    if (!now.left) begin_piece(p);
    for (int n = 0; n < 2; n++, fetched += later.stride)
      __builtin_prefetch(fetched, 0, 3), __builtin_prefetch(fetched + later.beside, 0, 3);
    if (lead == 0) {
      if (whole)
        pack<true>();
      else
        pack<false>();
    }
    if (++turn < TURNS) return;
    turn = 0;
    fetch_next();
    if (lead > 0) {
      lead--, fetched = later.from;
    } else if (now.next()) {
      begin_tile(p);
    } else {
      *p.ready = p.number;
      first++;
    }
  }

 public:
  Range range[2];  // of B and of A
  Packer() = default;
  Packer(const Packer&) = delete;

  // Packs a few vectors, if there are any to pack.
  void some() {
    if (first != end) advance();
  }
  void add(const Piece& piece) { list[end++ % LENGTH] = piece; }
  // Packs until a piece is packed, which is listed.
  void wait(const uint32_t& ready, uint32_t number) {
    while (ready != number) advance();
  }
};

}  // namespace
#endif
