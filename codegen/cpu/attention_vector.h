// Attention with fused multiply-adds on vectors: any CPU, any head size; bf16 and fp16 are widened to fp32 tile by tile.
//
// Forward (Milakov & Gimelshein's online softmax; Dao's flash attention): one task a query block. Scores are computed
// transposed, keys down and queries across the lanes, so that maximum and sum over keys need no shuffles and keys and
// values are read as they lie; only the queries are transposed, once a task.
//
// Backward: one task a head, or a part of a head's key blocks where there are fewer heads than threads. A task walks
// its key blocks; for each it keeps the gradients of keys and values, and adds to its own gradient of all queries. So
// nothing is shared and nothing is atomic; parts of a head are added up in order. Keys are across the lanes, and only
// keys and values are transposed, once a key block.
#pragma once
#include "problem.h"

namespace {

// The rows [start, start + rows) of a view as floats with rows of `width`: in place if they lie so, else copied.
template <typename T>
const float* tile_of(const T* from, int64_t stride, int64_t rows, int64_t size, float* scratch, int64_t width) {
  if constexpr (std::is_same_v<T, float>)
    if (stride == width && size == width && rows % L == 0) return from;
  copy_in(from, stride, rows, size, scratch, width, round_up(rows, 16));
  return scratch;
}

template <typename T>
int forward_vector(const Problem& p, const View& q, const View& k, const View& v, const View& out, float* lse) {
  const int64_t width = round_up(p.size, 16), rows = (p.seq_q + p.block - 1) / p.block;
  const int64_t lanes = round_up(std::min(p.block, p.seq_q), 16);
  const Layout layout{p.row_ptr, p.col_idx, p.layout_heads, rows, (p.seq_k + p.block - 1) / p.block};
  const int64_t tasks = p.batch * p.heads * rows;
  const int64_t need = 3 * lanes * width + 3 * TILE * std::max(width, lanes) + 4 * lanes;
  const int64_t threads = std::min(p.threads, tasks);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    Memory memory(need + 256);
    Carve carve{memory.base};
    float* queries = carve.take(lanes * width);    // a copy of the query block, later the output
    float* across = carve.take(lanes * width);     // queries, transposed: [size][lanes], times scale * log2(e)
    float* sums = carve.take(lanes * width);       // output, transposed: [size][lanes]
    float* scores = carve.take(TILE * lanes);      // [keys][lanes], in powers of 2
    float* key_copy = carve.take(TILE * width);
    float* value_copy = carve.take(TILE * width);
    float* top = carve.take(lanes);                // running maximum
    float* total = carve.take(lanes);              // running denominator
    float* fade = carve.take(lanes);               // what a new maximum multiplies the sums with
    if (!memory.base) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
      if (!memory.base) continue;
      const int64_t b = task / (p.heads * rows), h = task / rows % p.heads;
      const int64_t row = rows - 1 - task % rows;  // the longest rows of a causal layout first
      const int64_t begin = row * p.block, count = std::min(p.block, p.seq_q - begin), used = round_up(count, 16);
      copy_in(q.at<T>(b, h, begin), q.row, count, p.size, queries, width, used);
      transpose_tile(queries, width, used, float(p.scale) * LOG2E, across, lanes);
      std::memset(sums, 0, sizeof(float) * p.size * lanes);
      for (int64_t i = 0; i < used; i++) top[i] = -INF, total[i] = 0;

      tiles(layout.row(h, row), p.block, p.seq_k, [&](int64_t start, int64_t keys) {
        if (p.causal && start > begin + count - 1) return;
        const int64_t padded = round_up(keys, MR);
        const float* key = tile_of(k.at<T>(b, h, start), k.row, keys, p.size, key_copy, width);
        product<true, Start::zero>(padded, used, p.size, key, width, across, lanes, scores, lanes);
        hide(p, scores, lanes, used, b, start, keys, padded, begin);
        for (int64_t i = 0; i < used; i += L) {
          Vec high = load(top + i);
          for (int64_t j = 0; j < padded; j++) high = maximum(high, load(scores + j * lanes + i));
          const Vec base = high == -INF ? Vec{} : high;
          const Vec factor = exp2(load(top + i) - base);
          Vec sum = load(total + i) * factor;
          for (int64_t j = 0; j < padded; j++) {
            const Vec e = exp2(load(scores + j * lanes + i) - base);
            store(scores + j * lanes + i, e);
            sum += e;
          }
          store(top + i, high);
          store(total + i, sum);
          store(fade + i, factor);
        }
        const float* value = tile_of(v.at<T>(b, h, start), v.row, keys, p.size, value_copy, width);
        product<false, Start::scale>(p.size, used, keys, value, width, scores, lanes, sums, lanes, fade);
      });

      finish<T>(p, out, lse, b, h, begin, count, Queries{sums, top, total, fade, lanes, used}, queries, width);
    }
  }
  return failed;
}

template <typename T>
struct VectorGradients {  // of one task: the gradients of some key blocks, and their share of the queries' gradient
  const Problem& p;
  const View &grad, &q, &k, &v, &dk, &dv;
  const Layout& layout;  // transposed: row = key block, columns = query blocks
  const float *shift, *delta;
  int64_t width, lanes;
  float *key, *key_across, *value_across, *query_copy, *grad_copy, *probability, *score_grad, *key_grad, *value_grad,
      *hide;  // scratch, see carve()

  static int64_t floats(int64_t width, int64_t lanes) {
    return lanes * width * 5 + 2 * TILE * width + 2 * TILE * lanes + lanes + 256;
  }

  void carve(float* base) {
    Carve c{base};
    key = c.take(lanes * width), key_across = c.take(lanes * width), value_across = c.take(lanes * width);
    key_grad = c.take(lanes * width), value_grad = c.take(lanes * width);
    query_copy = c.take(TILE * width), grad_copy = c.take(TILE * width);
    probability = c.take(TILE * lanes), score_grad = c.take(TILE * lanes), hide = c.take(lanes);
  }

  void block(int64_t b, int64_t h, int64_t row, float* dq) {
    const int64_t begin = row * p.block, keys = std::min(p.block, p.seq_k - begin), used = round_up(keys, 16);
    bool hidden = used != keys;
    for (int64_t j = 0; j < used; j++) {
      const bool padding = j >= keys || (p.key_padding && p.key_padding[b * p.seq_k + begin + j]);
      hide[j] = padding ? -INF : 0;
      hidden |= padding;
    }
    copy_in(v.at<T>(b, h, begin), v.row, keys, p.size, key, width, used);
    transpose_tile(key, width, used, 1.0f, value_across, lanes);
    copy_in(k.at<T>(b, h, begin), k.row, keys, p.size, key, width, used);
    transpose_tile(key, width, used, 1.0f, key_across, lanes);
    std::memset(key_grad, 0, sizeof(float) * used * width);
    std::memset(value_grad, 0, sizeof(float) * used * width);

    tiles(layout.row(h, row), p.block, p.seq_q, [&](int64_t start, int64_t count) {
      if (p.causal && start + count - 1 < begin) return;
      const int64_t padded = round_up(count, MR), first = (b * p.heads + h) * p.seq_q + start;
      const float* query = tile_of(q.at<T>(b, h, start), q.row, count, p.size, query_copy, width);
      const float* above = tile_of(grad.at<T>(b, h, start), grad.row, count, p.size, grad_copy, width);
      product<true, Start::zero>(padded, used, p.size, query, width, key_across, lanes, probability, lanes);
      product<true, Start::zero>(padded, used, p.size, above, width, value_across, lanes, score_grad, lanes);
      softmax_backward(first, start, count, begin, used, hidden);
      std::memset(probability + count * lanes, 0, sizeof(float) * (padded - count) * lanes);
      std::memset(score_grad + count * lanes, 0, sizeof(float) * (padded - count) * lanes);
      product<false, Start::add>(used, width, count, probability, lanes, above, width, value_grad, width);
      product<false, Start::add>(used, width, count, score_grad, lanes, query, width, key_grad, width);
      product<true, Start::add>(padded, width, keys, score_grad, lanes, key, width, dq + start * width, width);
    });
    copy_out(key_grad, width, keys, p.size, float(p.scale), dk.at<T>(b, h, begin), dk.row);
    copy_out(value_grad, width, keys, p.size, 1.0f, dv.at<T>(b, h, begin), dv.row);
  }

  // Scores become probabilities, and gradients of probabilities those of scores (but for the factor `scale`).
  void softmax_backward(int64_t first, int64_t start, int64_t count, int64_t begin, int64_t used, bool hidden) {
    const float factor = float(p.scale) * LOG2E;
    for (int64_t i = 0; i < count; i++) {
      float *s = probability + i * lanes, *g = score_grad + i * lanes;
      const float minus = shift[first + i], mean = delta[first + i];
      if (hidden)
        for (int64_t j = 0; j < used; j += L) store(s + j, load(s + j) + load(hide + j));
      if (p.causal)
        for (int64_t j = std::max<int64_t>(0, start + i - begin + 1); j < used; j++) s[j] = -INF;
      for (int64_t j = 0; j < used; j += L) {
        const Vec e = exp2(load(s + j) * factor - minus);
        store(s + j, e);
        store(g + j, e * (load(g + j) - mean));
      }
    }
  }
};

template <typename T>
int backward_vector(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& out,
             const float* lse, const View& dq, const View& dk, const View& dv) {
  const int64_t width = round_up(p.size, 16), lanes = round_up(std::min(p.block, p.seq_k), 16);
  const int64_t heads = p.batch * p.heads, blocks = (p.seq_k + p.block - 1) / p.block;
  const Layout layout{p.t_row_ptr, p.t_col_idx, p.layout_heads, blocks, (p.seq_q + p.block - 1) / p.block};
  const int64_t parts = std::min(blocks, parts_of(heads, p.threads));
  const int64_t tasks = heads * parts, threads = std::min(p.threads, tasks);
  const int64_t dq_floats = round_up(p.seq_q, 16) * width;
  Memory rows(2 * heads * p.seq_q);
  // A gradient of the queries for each task that has one to itself: all tasks, or those that run at once.
  Memory sums(dq_floats * (parts > 1 ? tasks : threads));
  if (!rows.base || !sums.base) return 1;
  float *shift = rows.base, *delta = rows.base + heads * p.seq_q;
  prepare<T>(p, grad, out, lse, shift, delta);
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    Memory memory(VectorGradients<T>::floats(width, lanes));
    VectorGradients<T> task{p, grad, q, k, v, dk, dv, layout, shift, delta, width, lanes};
    if (memory.base) {
      task.carve(memory.base);
    } else {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic)
    for (int64_t t = 0; t < tasks; t++) {
      if (!memory.base) continue;
      const int64_t bh = t / parts, part = t % parts, b = bh / p.heads, h = bh % p.heads;
      float* sum = sums.base + dq_floats * (parts > 1 ? t : omp_get_thread_num());
      std::memset(sum, 0, sizeof(float) * dq_floats);
      const int64_t end = part_begin(layout, h, p.causal, part + 1, parts);
      for (int64_t r = part_begin(layout, h, p.causal, part, parts); r < end; r++) task.block(b, h, r, sum);
      if (parts == 1) copy_out(sum, width, p.seq_q, p.size, float(p.scale), dq.at<T>(b, h, 0), dq.row);
    }
  }
  if (parts == 1 || failed) return failed;
  const int64_t pieces = (p.seq_q + TILE - 1) / TILE;
#pragma omp parallel for num_threads(p.threads) schedule(static) collapse(2)
  for (int64_t bh = 0; bh < heads; bh++)
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t start = piece * TILE, count = std::min(TILE, p.seq_q - start);
      float* sum = sums.base + dq_floats * bh * parts + start * width;
      for (int64_t part = 1; part < parts; part++)
        for (int64_t i = 0; i < count * width; i += L) store(sum + i, load(sum + i) + load(sum + part * dq_floats + i));
      copy_out(sum, width, count, p.size, float(p.scale), dq.at<T>(bh / p.heads, bh % p.heads, start), dq.row);
    }
  return 0;
}

}  // namespace
