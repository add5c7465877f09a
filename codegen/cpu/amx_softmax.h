// Softmax between tile products, forward and backward, in the pieces that amx_product.h wants: scores come as tiles store
// them, probabilities go as tiles load them.
#pragma once
#include "amx.h"
#include "problem.h"

#ifdef HAVE_AMX
namespace {

constexpr float SLACK = 8;  // powers of 2 that scores may exceed what they are shifted by
constexpr int64_t SIDE = 32;  // keys and queries whose scores are computed at once

// Scores, [used / 16][height][16], that do not count become -inf, as `hide` makes them.
inline void hide_packed(const Problem& p, float* scores, int64_t height, int64_t used, int64_t b, int64_t first_key,
                        int64_t keys, int64_t padded, int64_t first_query) {
  const bool diagonal = p.causal && first_key + keys - 1 > first_query;
  if (!diagonal && padded == keys && !p.key_padding) return;
  for (int64_t j = 0; j < padded; j++) {
    const bool whole = j >= keys || (p.key_padding && p.key_padding[b * p.seq_k + first_key + j]);
    const int64_t end = whole ? used : diagonal ? std::min(used, first_key + j - first_query) : 0;
    for (int64_t i = 0; i < end; i += 16)
      _mm512_mask_storeu_ps(scores + i * height + j * 16, end - i >= 16 ? 0xffff : (1u << (end - i)) - 1, (__m512)splat(-INF));
  }
}

// Scores of `rows` keys become probabilities, packed as a right operand summed over keys; top and total are updated.
// A maximum that grows by less than SLACK is left: results do not depend on what scores are shifted by. A call does 16
// queries' maximum, or their probabilities of a pair of keys.
template <int PLANES>
struct Softmax {
  const float* scores;  // [used / 16][height][16]
  int64_t height, used, rows, chunk;
  int64_t diagonal;  // of 32 queries from `i` on, rows from diagonal + i + 32 on are hidden
  float factor;
  float *top, *total, *fade;
  Tiles to;
  bool first;  // of its queries: nothing to update
  bool moved = false;  // whether the sums so far must be multiplied with `fade`
  int64_t i = 0, step = 0;
  Vec base{}, sum{};

  int64_t seen() const { return std::min(rows, diagonal + i / 32 * 32 + 32); }  // rows of queries from `i` on
  int64_t steps() const { return 1 + (seen() + chunk - 1) / chunk * 8; }       // for 16 queries
  int64_t pieces() {
    int64_t sum = 0;
    for (i = 0; i < used; i += 16) sum += steps();
    i = 0;
    return sum;
  }

  void operator()() {
    if (step == 0)
      begin();
    else
      pairs((step - 1) / 8, (step - 1) % 8 * 2), pairs((step - 1) / 8, (step - 1) % 8 * 2 + 1);
    if (++step == steps()) {
      store(total + i, sum);
      step = 0, i += 16;
    }
  }

 private:
  void begin() {
    const float* x = scores + i * height;
    Vec most[4] = {load(x), load(x + 16), load(x + 32), load(x + 48)};
    for (int64_t j = 4, end = seen(); j < end; j += 4)
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) most[n] = maximum(most[n], load(x + (j + n) * 16));
    const Vec high = maximum(maximum(most[0], most[1]), maximum(most[2], most[3])) * factor;
    if (first) {
      base = high == -INF ? Vec{} : high;
      sum = Vec{};
      return store(top + i, high);
    }
    const Vec before = load(top + i);
    const Ints grown = high > before + SLACK;
    const Vec now = grown ? high : before;
    base = now == -INF ? Vec{} : now;
    const Vec shrink = exp2(before - base);
    moved |= _mm512_test_epi32_mask((__m512i)grown, (__m512i)grown) != 0;
    sum = load(total + i) * shrink;
    store(top + i, now);
    store(fade + i, shrink);
  }
  void pairs(int64_t k, int64_t j) {
    if (chunk == 32 && k * 32 + 16 < seen())
      probabilities<true>(k, j);
    else
      probabilities<false>(k, j);
  }
  template <bool BOTH>
  void probabilities(int64_t k, int64_t j) {
    uint32_t* tile = to.at(i / 16, k) + j * 16;
    const float* x = scores + i * height + (k * chunk + j) * 16;
    const Vec low = exp2(load(x) * factor - base), high = BOTH ? exp2(load(x + 16 * 16) * factor - base) : Vec{};
    sum += low + high;
    Ints a[PLANES], b[PLANES];
    planes_of<PLANES>(low, a);
    planes_of<PLANES>(high, b);
#pragma GCC unroll 3
    for (int plane = 0; plane < PLANES; plane++) {
      const Ints packed = pair(a[plane], b[plane]);
      std::memcpy(tile + plane * to.plane, &packed, 64);
    }
  }
};

// From scores of SIDE keys and queries at most, and gradients of their probabilities, both [queries / 16][SIDE][16]:
// probabilities packed as a left operand summed by query; gradients of scores (but for the factor `scale`) packed so too,
// and as a right operand summed over keys. A call does one key,
// or two 16 apart, of 16 or 32 queries.
template <int PLANES>
struct SoftmaxBackward {
  const Problem* p;
  int64_t b, first_key, keys, first_query;  // what is hidden; `keys` counts those that exist
  float *scores, *grads;
  const float *shift, *delta;  // by query: see prepare
  int64_t used, padded, chunk;
  Tiles probability, score_grad, score_grad_down;
  int64_t i = 0, j = 0, n = -1;  // query, key, key inside 16

  int64_t pieces() const { return 1 + (used + chunk - 1) / chunk * ((padded + chunk - 1) / chunk) * 16; }

  void operator()() {
    if (n < 0) {
      hide_packed(*p, scores, SIDE, used, b, first_key, keys, padded, first_query);
      n = 0;
      return;
    }
    const bool right = chunk == 32 && i + 16 < used, below = chunk == 32 && j + 16 < padded;
    if (right && below)
      rows<true, true>();
    else if (right)
      rows<true, false>();
    else if (below)
      rows<false, true>();
    else
      rows<false, false>();
    if (++n < 16) return;
    n = 0, j += chunk;
    if (j >= padded) j = 0, i += chunk;
  }

 private:
  // Keys j + n and (BELOW) j + n + 16, queries from i for 16 or (RIGHT) 32.
  template <bool RIGHT, bool BELOW>
  void rows() {
    const float factor = float(p->scale) * LOG2E;
    const float *x = scores + i * SIDE + (j + n) * 16, *g = grads + i * SIDE + (j + n) * 16;
    const Vec minus[2] = {load(shift + i), RIGHT ? load(shift + i + 16) : Vec{}};
    const Vec mean[2] = {load(delta + i), RIGHT ? load(delta + i + 16) : Vec{}};
    uint32_t* left = probability.at(j / 16, i / chunk) + n * 16;
    uint32_t* right = score_grad.at(j / 16, i / chunk) + n * 16;
    uint32_t* down = score_grad_down.at(i / 16, j / chunk) + n * 16;
    const int64_t below = probability.outer, beside = score_grad_down.outer;
    Vec e[2][2], s[2][2];  // probabilities and gradients of scores: key, query lanes
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const int a = r / 2, c = r % 2;
      const bool there = (BELOW || !a) && (RIGHT || !c);
      e[a][c] = there ? exp2(load(x + c * 16 * SIDE + a * 256) * factor - minus[c]) : Vec{};
      s[a][c] = there ? e[a][c] * (load(g + c * 16 * SIDE + a * 256) - mean[c]) : Vec{};
    }
    Ints planes[2][2][PLANES];
#pragma GCC unroll 2
    for (int a = 0; a < 1 + BELOW; a++) {
      Ints u[PLANES], v[PLANES];
      planes_of<PLANES>(e[a][0], u);
      planes_of<PLANES>(e[a][1], v);
#pragma GCC unroll 3
      for (int plane = 0; plane < PLANES; plane++) put(left + a * below + plane * TILE_WORDS, pair(u[plane], v[plane]));
    }
#pragma GCC unroll 2
    for (int a = 0; a < 2; a++) {
      planes_of<PLANES>(s[a][0], planes[a][0]);
      planes_of<PLANES>(s[a][1], planes[a][1]);
      if (a && !BELOW) break;
#pragma GCC unroll 3
      for (int plane = 0; plane < PLANES; plane++)
        put(right + a * below + plane * TILE_WORDS, pair(planes[a][0][plane], planes[a][1][plane]));
    }
#pragma GCC unroll 2
    for (int c = 0; c < 1 + RIGHT; c++)
#pragma GCC unroll 3
      for (int plane = 0; plane < PLANES; plane++)
        put(down + c * beside + plane * TILE_WORDS, pair(planes[0][c][plane], planes[1][c][plane]));
  }

  static void put(uint32_t* to, Ints x) { std::memcpy(to, &x, 64); }
};

}  // namespace
#endif
