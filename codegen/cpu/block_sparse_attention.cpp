// Block-sparse attention on CPU, forward and backward. Interface: dscompile/codegen/cpu/kernels.py.
//
// Forward (Milakov & Gimelshein's online softmax; Dao's flash attention): one task a query block. Scores are computed
// transposed, keys down and queries across the lanes, so that maximum and sum over keys need no shuffles and keys and
// values are read as they lie; only the queries are transposed, once a task.
//
// Backward: one task a head, or a part of a head's key blocks where there are fewer heads than threads. A task walks its
// key blocks; for each it keeps the gradients of keys and values, and adds to its own gradient of all queries. So nothing
// is shared and nothing is atomic; parts of a head are added up in order. Keys are across the lanes, and only keys and
// values are transposed, once a key block.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "tiles.h"

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t TILE = 64;  // keys (forward) or queries (backward) computed at once: a tile of scores stays in L1

struct View {  // [batch, heads, seq, size], elements of `size` adjacent
  char* data;
  int64_t batch, head, row;  // strides in elements

  template <typename T>
  T* at(int64_t b, int64_t h, int64_t r) const {
    return reinterpret_cast<T*>(data) + b * batch + h * head + r * row;
  }
};

struct Columns {  // the column blocks of one row of a layout; no list means all
  const int32_t* list;
  int64_t count;
  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

struct Layout {  // CSR with absolute offsets; no offsets means dense
  const int32_t *offsets, *columns;
  int64_t heads, rows, width;

  Columns row(int64_t head, int64_t r) const {
    if (!offsets) return {nullptr, width};
    const int32_t* p = offsets + (heads == 1 ? 0 : head) * (rows + 1) + r;
    return {columns + p[0], p[1] - p[0]};
  }
};

}  // namespace

extern "C" struct Problem {
  int64_t batch, heads, seq_q, seq_k, size, block, layout_heads;
  const int32_t *row_ptr, *col_idx, *t_row_ptr, *t_col_idx;
  const uint8_t* key_padding;  // [batch, seq_k], or null
  int64_t causal, threads;
  double scale;
};

namespace {

struct Memory {  // scratch of one thread, cache lines apart from others'
  float* base;
  explicit Memory(int64_t floats) : base(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64) + 64))) {}
  ~Memory() { std::free(base); }
  Memory(const Memory&) = delete;
};

struct Carve {  // hands out parts of a Memory
  float* next;
  float* take(int64_t floats) {
    float* p = next;
    next += round_up(floats, 16);
    return p;
  }
};

// f(start, count) for runs of adjacent blocks of at most TILE elements of a sequence.
template <typename F>
void tiles(const Columns& columns, int64_t block, int64_t seq, const F& f) {
  for (int64_t i = 0; i < columns.count;) {
    const int64_t first = columns[i];
    int64_t n = 1;
    while (i + n < columns.count && (n + 1) * block <= TILE && columns[i + n] == first + n) n++;
    const int64_t end = std::min((first + n) * block, seq);
    for (int64_t start = first * block; start < end; start += TILE) f(start, std::min(TILE, end - start));
    i += n;
  }
}

// The rows [start, start + rows) of a view as floats with rows of `width`: in place if they lie so, else copied.
template <typename T>
const float* tile_of(const T* from, int64_t stride, int64_t rows, int64_t size, float* scratch, int64_t width) {
  if constexpr (std::is_same_v<T, float>)
    if (stride == width && size == width && rows % L == 0) return from;
  copy_in(from, stride, rows, size, scratch, width, round_up(rows, 16));
  return scratch;
}

template <typename T>
int forward(const Problem& p, const View& q, const View& k, const View& v, const View& out, float* lse) {
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
        for (int64_t j = 0; j < padded; j++)
          if (j >= keys || (p.key_padding && p.key_padding[b * p.seq_k + start + j]))
            for (int64_t i = 0; i < used; i++) scores[j * lanes + i] = -INF;
        if (p.causal)
          for (int64_t j = std::max<int64_t>(0, begin - start + 1); j < keys; j++)
            for (int64_t i = 0; i < std::min(used, start + j - begin); i++) scores[j * lanes + i] = -INF;
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

      for (int64_t i = 0; i < used; i += L) {
        const Vec sum = load(total + i);
        store(fade + i, sum > 0 ? 1.0f / sum : Vec{});
      }
      for (int64_t d = 0; d < p.size; d++)
        for (int64_t i = 0; i < used; i += L) {
          float* where = sums + d * lanes + i;
          store(where, load(where) * load(fade + i));
        }
      // `sums` has p.size rows, not `width`: rows past it are whatever is there, and never written out.
      for (int64_t i = 0; i < used; i += L)
        for (int64_t d = 0; d < width; d += L) {
          Vec x[L];
#pragma GCC unroll 16
          for (int n = 0; n < L; n++) x[n] = load(sums + (d + n) * lanes + i);
          transpose(x);
#pragma GCC unroll 16
          for (int n = 0; n < L; n++) store(queries + (i + n) * width + d, x[n]);
        }
      copy_out(queries, width, count, p.size, 1.0f, out.at<T>(b, h, begin), out.row);
      float* logs = lse + (b * p.heads + h) * p.seq_q + begin;
      for (int64_t i = 0; i < count; i++) logs[i] = total[i] > 0 ? top[i] * LN2 + __builtin_logf(total[i]) : -INF;
    }
  }
  return failed;
}

// Per query: what its scores are shifted by (lse in powers of 2), and the product of its output and its gradient.
template <typename T>
void prepare(const Problem& p, const View& grad, const View& out, const float* lse, float* shift, float* delta) {
  const int64_t rows = p.batch * p.heads * p.seq_q;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const int64_t b = r / (p.heads * p.seq_q), h = r / p.seq_q % p.heads, i = r % p.seq_q;
    const T *x = grad.at<T>(b, h, i), *y = out.at<T>(b, h, i);
    Vec sum{};
    int64_t c = 0;
    for (; c + L <= p.size; c += L) sum += load(x + c) * load(y + c);
    float total = 0;
    for (int n = 0; n < L; n++) total += sum[n];
    for (; c < p.size; c++) total += widen(x[c]) * widen(y[c]);
    delta[r] = total;
    shift[r] = lse[r] == -INF ? INF : lse[r] * LOG2E;  // a query that sees nothing: all its probabilities are 0
  }
}

// Where part `part` of `parts` of a head's key blocks begins: parts have about equally many blocks to compute.
int64_t part_begin(const Layout& layout, int64_t head, bool causal, int64_t part, int64_t parts) {
  if (part == parts) return layout.rows;
  std::vector<int64_t> until(layout.rows + 1, 0);
  for (int64_t r = 0; r < layout.rows; r++) {
    const Columns columns = layout.row(head, r);
    int64_t n = columns.count;
    if (causal && columns.list) n = std::count_if(columns.list, columns.list + n, [&](int32_t c) { return c >= r; });
    if (causal && !columns.list) n = std::max<int64_t>(0, n - r);
    until[r + 1] = until[r] + n;
  }
  return std::lower_bound(until.begin(), until.end(), until.back() * part / parts) - until.begin();
}

template <typename T>
struct Gradients {  // of one task: the gradients of some key blocks, and their share of the queries' gradient
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
int backward(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& out,
             const float* lse, const View& dq, const View& dk, const View& dv) {
  const int64_t width = round_up(p.size, 16), lanes = round_up(std::min(p.block, p.seq_k), 16);
  const int64_t heads = p.batch * p.heads, blocks = (p.seq_k + p.block - 1) / p.block;
  const Layout layout{p.t_row_ptr, p.t_col_idx, p.layout_heads, blocks, (p.seq_q + p.block - 1) / p.block};
  int64_t parts = 1;
  if (heads < p.threads) parts = std::min(blocks, (p.threads + heads - 1) / heads);
  if (heads > p.threads && heads < 2 * p.threads) parts = std::min<int64_t>(blocks, 2);
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
    Memory memory(Gradients<T>::floats(width, lanes));
    Gradients<T> task{p, grad, q, k, v, dk, dv, layout, shift, delta, width, lanes};
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

#define ENTRIES(name, type)                                                                                            \
  extern "C" int attention_forward_##name(const Problem* p, const View* q, const View* k, const View* v,               \
                                          const View* out, float* lse) {                                               \
    return forward<type>(*p, *q, *k, *v, *out, lse);                                                                   \
  }                                                                                                                    \
  extern "C" int attention_backward_##name(const Problem* p, const View* grad, const View* q, const View* k,           \
                                           const View* v, const View* out, const float* lse, const View* dq,           \
                                           const View* dk, const View* dv) {                                           \
    return backward<type>(*p, *grad, *q, *k, *v, *out, lse, *dq, *dk, *dv);                                            \
  }

ENTRIES(f32, float)
ENTRIES(bf16, bf16)
