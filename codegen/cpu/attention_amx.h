// Attention on AMX tiles (amx.h): bf16 operands as they are, fp16 and fp32 ones as sums of two and three bf16.
//
// Queries lie across the lanes in both directions. Forward: the keys and values of some heads are packed once, then one
// task a query block, as in attention_vector.h. Backward: queries and output gradients of some heads are packed once,
// then one task a part of a head's key blocks; a task adds to its own gradient of all queries, so nothing is atomic.
#pragma once
#include "amx.h"
#include "problem.h"

#ifdef HAVE_AMX
namespace {

constexpr int64_t PACKED = 16 << 20;       // bytes of packed operands that stay in cache and cost few page faults
constexpr int64_t PACKED_MOST = 96 << 20;  // what they may take to give each thread a head, unless one head needs more

template <typename T>
constexpr int PLANES_OF = std::is_same_v<T, float> ? 3 : std::is_same_v<T, bf16> ? 1 : 2;

inline int64_t chunk_of(const Problem& p) { return p.block % 32 ? 16 : 32; }  // divides every block: tiles start at one

// How many heads are packed at once.
inline int64_t heads_at_once(const Problem& p, int64_t bytes_a_head) {
  const int64_t wanted = std::max(PACKED / bytes_a_head, std::min(p.threads, PACKED_MOST / bytes_a_head));
  return std::max<int64_t>(1, std::min(p.batch * p.heads, wanted));
}

// Scores of `rows` keys become probabilities, packed as a right operand summed over keys; top and total are updated.
// Returns whether a maximum moved, so that the sums so far must be multiplied with `fade`. What is read next is fetched
// meanwhile.
template <int PLANES>
bool softmax_packed(const float* scores, int64_t lanes, int64_t used, int64_t rows, int64_t chunk, float factor,
                    float* top, float* total, float* fade, const Tiles& to, Ahead values, Ahead keys) {
  Ints moved{};
  for (int64_t i = 0; i < used; i += L) {
    Vec high = load(scores + i);
    for (int64_t j = 1; j < rows; j++) high = maximum(high, load(scores + j * lanes + i));
    const Vec before = load(top + i);
    high = maximum(high * factor, before);
    const Vec base = high == -INF ? Vec{} : high;
    const Vec shrink = exp2(before - base);
    Vec sum = load(total + i) * shrink;
    for (int64_t k = 0; k * chunk < rows; k++) {
      uint32_t* tile = to.at(i / 16, k);
      const float* x = scores + k * chunk * lanes + i;
      const bool both = k * chunk + 16 < rows && chunk == 32;
      for (int64_t j = 0; j < 16; j++) {
        values.fetch(PLANES);
        keys.fetch(PLANES);
        const Vec low = exp2(load(x + j * lanes) * factor - base);
        const Vec high_row = both ? exp2(load(x + (j + 16) * lanes) * factor - base) : Vec{};
        sum += low + high_row;
        Ints a[PLANES], b[PLANES];
        planes_of<PLANES>(low, a);
        planes_of<PLANES>(high_row, b);
#pragma GCC unroll 3
        for (int n = 0; n < PLANES; n++) {
          const Ints packed = pair(a[n], b[n]);
          std::memcpy(tile + n * to.plane + j * 16, &packed, 64);
        }
      }
    }
    moved |= high != before;
    store(top + i, high);
    store(total + i, sum);
    store(fade + i, shrink);
  }
  bool any = false;
  for (int n = 0; n < L; n++) any |= moved[n] != 0;
  return any;
}

template <typename T>
int forward_amx(const Problem& p, const View& q, const View& k, const View& v, const View& out, float* lse) {
  constexpr int PLANES = PLANES_OF<T>;
  const int64_t width = round_up(p.size, 16), deep = (p.size + 31) / 32, chunk = chunk_of(p);
  const int64_t rows = (p.seq_q + p.block - 1) / p.block, lanes = round_up(std::min(p.block, p.seq_q), 16);
  const Layout layout{p.row_ptr, p.col_idx, p.layout_heads, rows, (p.seq_k + p.block - 1) / p.block};
  const int64_t key_tiles = (p.seq_k + 15) / 16, chunks = (p.seq_k + chunk - 1) / chunk;
  const int64_t key_words = key_tiles * deep * PLANES * TILE_WORDS;
  const int64_t value_words = chunks * (width / 16) * PLANES * TILE_WORDS;
  const int64_t heads = p.batch * p.heads, group = heads_at_once(p, (key_words + value_words) * 4);
  const int64_t threads = std::min(p.threads, heads * rows);
  Memory packed((key_words + value_words) * group);
  if (!packed.base) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    const int64_t probability_words = (TILE / chunk) * (lanes / 16) * PLANES * TILE_WORDS;
    Memory memory(lanes * deep * 16 * PLANES + TILE * lanes + probability_words + 2 * width * lanes + 4 * lanes + 512);
    Carve carve{memory.base};
    const Tiles queries = tiles_of<PLANES>(carve.take(lanes * deep * 16 * PLANES), deep);
    const Tiles probabilities = tiles_of<PLANES>(carve.take(probability_words), TILE / chunk);
    float *scores = carve.take(TILE * lanes), *sums = carve.take(width * lanes), *result = carve.take(width * lanes);
    float *top = carve.take(lanes), *total = carve.take(lanes), *fade = carve.take(lanes);
    if (!memory.base) {
#pragma omp atomic write
      failed = 1;
    }
    std::vector<std::pair<int64_t, int64_t>> list;  // the tiles of a query block: first key, keys
    TileConfig config;
    for (int64_t first = 0; first < heads; first += group) {
      const int64_t here = std::min(group, heads - first);
      const auto keys_of = [&](int64_t i) { return tiles_of<PLANES>(packed.base + i * key_words, deep); };
      const auto values_of = [&](int64_t i) {  // [chunk][row tile][plane]
        float* base = packed.base + group * key_words + i * value_words;
        return Tiles{reinterpret_cast<uint32_t*>(base), PLANES * TILE_WORDS, width / 16 * PLANES * TILE_WORDS,
                     TILE_WORDS};
      };
#pragma omp for schedule(static) collapse(2)
      for (int64_t i = 0; i < here; i++)
        for (int64_t r = 0; r < layout.width; r++) {
          const int64_t b = (first + i) / p.heads, h = (first + i) % p.heads, start = r * p.block;
          const int64_t count = std::min(p.block, p.seq_k - start);
          Tiles to = keys_of(i);
          to.base = to.at(start / 16, 0);
          pack_rows<PLANES, false>(k.at<T>(b, h, start), k.row, count, p.size, to);
          to = values_of(i);
          to.base = to.at(0, start / chunk);
          pack_columns<PLANES, true>(v.at<T>(b, h, start), v.row, count, p.size, chunk, to);
        }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < here * rows; task++) {
        if (!memory.base) continue;
        const int64_t i = task / rows, b = (first + i) / p.heads, h = (first + i) % p.heads;
        const int64_t row = rows - 1 - task % rows;  // the longest rows of a causal layout first
        const int64_t begin = row * p.block, count = std::min(p.block, p.seq_q - begin), used = round_up(count, 16);
        pack_rows<PLANES, true>(q.at<T>(b, h, begin), q.row, count, p.size, queries);
        std::memset(sums, 0, sizeof(float) * width * lanes);
        for (int64_t n = 0; n < used; n++) top[n] = -INF, total[n] = 0;
        list.clear();
        tiles(layout.row(h, row), p.block, p.seq_k, [&](int64_t start, int64_t keys) {
          if (!p.causal || start < begin + count) list.push_back({start, keys});
        });
        for (size_t n = 0; n < list.size(); n++) {
          const auto [start, keys] = list[n];
          const int64_t padded = round_up(keys, 16), depth = (keys + chunk - 1) / chunk;
          Tiles key = keys_of(i), value = values_of(i);
          key.base = key.at(start / 16, 0);
          value.base = value.at(0, start / chunk);
          amx_product<PLANES>(padded / 16, used / 16, deep, key, queries, scores, lanes, 16, false);
          hide(p, scores, lanes, used, b, start, keys, padded, begin);
          Ahead keys_of_next;
          if (n + 1 < list.size())
            keys_of_next = Ahead(keys_of(i).at(list[n + 1].first / 16, 0), padded / 16 * key.outer);
          if (softmax_packed<PLANES>(scores, lanes, used, padded, chunk, float(p.scale) * LOG2E, top, total, fade,
                                     probabilities, Ahead(value.base, depth * value.depth), keys_of_next))
            for (int64_t d = 0; d < width; d++)
              for (int64_t x = 0; x < used; x += L)
                store(sums + d * lanes + x, load(sums + d * lanes + x) * load(fade + x));
          amx_product<PLANES>(width / 16, used / 16, depth, value, probabilities, sums, lanes, 16, true);
        }
        finish<T>(p, out, lse, b, h, begin, count, Queries{sums, top, total, fade, lanes, used}, result, width);
      }
    }
  }
  return failed;
}

template <typename T>
struct AmxGradients {  // of one task: the gradients of some key blocks, and their share of the queries' gradient
  static constexpr int PLANES = PLANES_OF<T>;
  const Problem& p;
  const View &grad, &q, &k, &v, &dk, &dv;
  const Layout& layout;  // transposed: row = key block, columns = query blocks
  int64_t width, deep, chunk, keys_max;
  // scratch, see carve()
  Tiles key, key_down, value, query, above, probability, score_grad, score_grad_down;
  float *scores, *grads, *key_grad, *value_grad, *shift, *delta;
  std::vector<std::pair<int64_t, int64_t>> list;  // the tiles of a key block: first query, queries
  Ahead ahead[5];  // what the next of them reads

  AmxGradients(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& dk,
               const View& dv, const Layout& layout)
      : p(p), grad(grad), q(q), k(k), v(v), dk(dk), dv(dv), layout(layout), width(round_up(p.size, 16)),
        deep((p.size + 31) / 32), chunk(chunk_of(p)), keys_max(round_up(std::min(p.block, p.seq_k), 16)) {}

  int64_t floats() const {
    const int64_t rows = keys_max / 16, lanes = TILE / chunk, key_chunks = (keys_max + chunk - 1) / chunk;
    const int64_t tiles = 2 * rows * deep + key_chunks * (width / 16) + 2 * lanes * (width / 16) + 2 * rows * lanes +
                          key_chunks * (TILE / 16);
    return tiles * PLANES * TILE_WORDS + 2 * keys_max * TILE + 2 * keys_max * width + 2 * TILE + 1024;
  }

  void carve(float* base) {
    Carve c{base};
    const int64_t rows = keys_max / 16, lanes = TILE / chunk, key_chunks = (keys_max + chunk - 1) / chunk;
    const auto take = [&](int64_t outer, int64_t depth) {
      return tiles_of<PLANES>(c.take(outer * depth * PLANES * TILE_WORDS), depth);
    };
    key = take(rows, deep), value = take(rows, deep), key_down = take(width / 16, key_chunks);
    query = take(width / 16, lanes), above = take(width / 16, lanes);
    probability = take(rows, lanes), score_grad = take(rows, lanes), score_grad_down = take(TILE / 16, key_chunks);
    scores = c.take(keys_max * TILE), grads = c.take(keys_max * TILE);
    key_grad = c.take(keys_max * width), value_grad = c.take(keys_max * width);
    shift = c.take(TILE), delta = c.take(TILE);
  }

  // Key block `row` of a head. `queries` and `grads_above` are the head's packed operands; `shifts` and `deltas` its
  // per-query values; `dq` its gradient of the queries, [seq_q / 16][width][16].
  void block(int64_t b, int64_t h, int64_t row, const Tiles& queries, const Tiles& grads_above, const float* shifts,
             const float* deltas, float* dq) {
    const int64_t begin = row * p.block, keys = std::min(p.block, p.seq_k - begin), padded = round_up(keys, 16);
    const int64_t key_chunks = (keys + chunk - 1) / chunk;
    pack_rows<PLANES, false>(k.at<T>(b, h, begin), k.row, keys, p.size, key);
    pack_rows<PLANES, false>(v.at<T>(b, h, begin), v.row, keys, p.size, value);
    pack_columns<PLANES, true>(k.at<T>(b, h, begin), k.row, keys, p.size, chunk, key_down);
    std::memset(key_grad, 0, sizeof(float) * padded * width);
    std::memset(value_grad, 0, sizeof(float) * padded * width);
    list.clear();
    tiles(layout.row(h, row), p.block, p.seq_q, [&](int64_t start, int64_t count) {
      if (!p.causal || start + count > begin) list.push_back({start, count});
    });
    for (size_t n = 0; n < list.size(); n++) {
      const auto [start, count] = list[n];
      const int64_t used = round_up(count, 16), lanes = (count + chunk - 1) / chunk;
      for (int64_t i = 0; i < used; i++) {
        shift[i] = i < count ? shifts[start + i] : INF;
        delta[i] = i < count ? deltas[start + i] : 0;
      }
      Tiles right = queries;
      right.base = right.at(start / 16, 0);
      amx_product<PLANES>(padded / 16, used / 16, deep, key, right, scores, TILE, 16, false);
      right = grads_above;
      right.base = right.at(start / 16, 0);
      amx_product<PLANES>(padded / 16, used / 16, deep, value, right, grads, TILE, 16, false);
      pack_columns<PLANES, false>(q.at<T>(b, h, start), q.row, count, p.size, chunk, query);
      pack_columns<PLANES, false>(grad.at<T>(b, h, start), grad.row, count, p.size, chunk, above);
      hide(p, scores, TILE, used, b, begin, keys, padded, start);
      if (n + 1 < list.size()) {
        const int64_t next = list[n + 1].first, words = used / 16 * queries.outer;
        ahead[0] = Ahead(queries.at(next / 16, 0), words);
        ahead[1] = Ahead(grads_above.at(next / 16, 0), words);
        ahead[2] = Ahead(dq + next * width, used * width);
        if (q.row == p.size) ahead[3] = Ahead(q.at<T>(b, h, next), used * p.size);
        if (grad.row == p.size) ahead[4] = Ahead(grad.at<T>(b, h, next), used * p.size);
      }
      softmax_backward(used, padded);
      amx_product<PLANES>(padded / 16, width / 16, lanes, probability, above, value_grad, width, 16, true);
      amx_product<PLANES>(padded / 16, width / 16, lanes, score_grad, query, key_grad, width, 16, true);
      amx_product<PLANES>(width / 16, used / 16, key_chunks, key_down, score_grad_down, dq + start * width, 16,
                          16 * width, true);
    }
    copy_out(key_grad, width, keys, p.size, float(p.scale), dk.at<T>(b, h, begin), dk.row);
    copy_out(value_grad, width, keys, p.size, 1.0f, dv.at<T>(b, h, begin), dv.row);
  }

  // From scores and gradients of probabilities, [keys][TILE queries]: probabilities packed as a left operand summed by
  // query; gradients of scores (but for the factor `scale`) packed so too, and as a right operand summed over keys.
  void softmax_backward(int64_t used, int64_t padded) {
    for (int64_t i = 0; i < used; i += chunk) {
      const bool right = chunk == 32 && i + 16 < used;
      for (int64_t j = 0; j < padded; j += chunk) {
        const bool below = chunk == 32 && j + 16 < padded;
        if (right && below)
          quarter<true, true>(i, j);
        else if (right)
          quarter<true, false>(i, j);
        else if (below)
          quarter<false, true>(i, j);
        else
          quarter<false, false>(i, j);
      }
    }
  }

  // 16 or (BELOW) 32 keys from `j`, for 16 or (RIGHT) 32 queries from `i`.
  template <bool RIGHT, bool BELOW>
  void quarter(int64_t i, int64_t j) {
    const float factor = float(p.scale) * LOG2E;
    Vec minus[2], mean[2];
    for (int c = 0; c < 1 + RIGHT; c++) minus[c] = load(shift + i + 16 * c), mean[c] = load(delta + i + 16 * c);
    uint32_t* down = score_grad_down.at(i / 16, j / chunk);
    for (int64_t n = 0; n < 16; n++) {
      for (int a = 0; a < 5; a++) ahead[a].fetch(a < 2 ? 2 * PLANES : 4);
      Ints s[2][2][PLANES];  // gradients of scores: key n or n + 16, query lanes i or i + 16
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        Ints e[2][PLANES];
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
          const int64_t where = (j + n + 16 * r) * TILE + i + 16 * c;
          const bool there = (BELOW || !r) && (RIGHT || !c);
          const Vec x = there ? exp2(load(scores + where) * factor - minus[c]) : Vec{};
          planes_of<PLANES>(x, e[c]);
          planes_of<PLANES>(there ? x * (load(grads + where) - mean[c]) : Vec{}, s[r][c]);
        }
        if (r && !BELOW) break;
        uint32_t* left = probability.at(j / 16 + r, i / chunk) + n * 16;
        uint32_t* right = score_grad.at(j / 16 + r, i / chunk) + n * 16;
#pragma GCC unroll 3
        for (int plane = 0; plane < PLANES; plane++) {
          put(left + plane * TILE_WORDS, pair(e[0][plane], e[1][plane]));
          put(right + plane * TILE_WORDS, pair(s[r][0][plane], s[r][1][plane]));
        }
      }
#pragma GCC unroll 2
      for (int c = 0; c < 1 + RIGHT; c++)
#pragma GCC unroll 3
        for (int plane = 0; plane < PLANES; plane++)
          put(down + c * score_grad_down.outer + plane * TILE_WORDS + n * 16, pair(s[0][c][plane], s[1][c][plane]));
    }
  }

  static void put(uint32_t* to, Ints x) { std::memcpy(to, &x, 64); }
};

template <typename T>
int backward_amx(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& out,
                 const float* lse, const View& dq, const View& dk, const View& dv) {
  constexpr int PLANES = PLANES_OF<T>;
  const int64_t width = round_up(p.size, 16), deep = (p.size + 31) / 32;
  const int64_t heads = p.batch * p.heads, blocks = (p.seq_k + p.block - 1) / p.block;
  const Layout layout{p.t_row_ptr, p.t_col_idx, p.layout_heads, blocks, (p.seq_q + p.block - 1) / p.block};
  const int64_t query_tiles = (p.seq_q + 15) / 16, words = query_tiles * deep * PLANES * TILE_WORDS;
  int64_t group = heads_at_once(p, 2 * words * 4);
  if (group < heads && group > p.threads) group -= group % p.threads;
  const int64_t parts = std::min(blocks, parts_of(group, p.threads)), threads = std::min(p.threads, group * parts);
  const int64_t dq_floats = query_tiles * 16 * width, slots = parts > 1 ? group * parts : threads;
  Memory packed(2 * words * group), rows(2 * heads * p.seq_q), sums(dq_floats * slots);
  if (!packed.base || !rows.base || !sums.base) return 1;
  float *shift = rows.base, *delta = rows.base + heads * p.seq_q;
  prepare<T>(p, grad, out, lse, shift, delta);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    AmxGradients<T> task{p, grad, q, k, v, dk, dv, layout};
    Memory memory(task.floats() + 16 * width);
    if (memory.base) {
      task.carve(memory.base + 16 * width);
    } else {
#pragma omp atomic write
      failed = 1;
    }
    TileConfig config;
    for (int64_t first = 0; first < heads; first += group) {
      const int64_t here = std::min(group, heads - first);
      const auto queries_of = [&](int64_t i) { return tiles_of<PLANES>(packed.base + i * words, deep); };
      const auto above_of = [&](int64_t i) { return tiles_of<PLANES>(packed.base + (group + i) * words, deep); };
#pragma omp for schedule(static) collapse(2)
      for (int64_t i = 0; i < here; i++)
        for (int64_t piece = 0; piece < query_tiles; piece++) {
          const int64_t b = (first + i) / p.heads, h = (first + i) % p.heads, start = piece * 16;
          const int64_t count = std::min<int64_t>(16, p.seq_q - start);
          Tiles to = queries_of(i);
          to.base = to.at(piece, 0);
          pack_rows<PLANES, true>(q.at<T>(b, h, start), q.row, count, p.size, to);
          to = above_of(i);
          to.base = to.at(piece, 0);
          pack_rows<PLANES, true>(grad.at<T>(b, h, start), grad.row, count, p.size, to);
        }
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < here * parts; t++) {
        if (!memory.base) continue;
        const int64_t i = t / parts, part = t % parts, bh = first + i, h = bh % p.heads;
        float* sum = sums.base + dq_floats * (parts > 1 ? t : omp_get_thread_num());
        std::memset(sum, 0, sizeof(float) * dq_floats);
        const int64_t end = part_begin(layout, h, p.causal, part + 1, parts);
        for (int64_t r = part_begin(layout, h, p.causal, part, parts); r < end; r++)
          task.block(bh / p.heads, h, r, queries_of(i), above_of(i), shift + bh * p.seq_q, delta + bh * p.seq_q, sum);
        if (parts == 1)
          for (int64_t piece = 0; piece < query_tiles; piece++)
            write_queries<T>(p, dq, bh, piece, sum, dq_floats, 1, width, memory.base);
      }
      if (parts > 1) {
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < here; i++)
          for (int64_t piece = 0; piece < query_tiles; piece++)
            if (memory.base)
              write_queries<T>(p, dq, first + i, piece, sums.base + dq_floats * i * parts, dq_floats, parts, width,
                               memory.base);
      }
    }
  }
  return failed;
}

}  // namespace
#endif
