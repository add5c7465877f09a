// What a call asks for: tensors, layout, masks; and scratch memory.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <type_traits>
#include <vector>

#include "tiles.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Whether a layout's rows lie inside its list of `nnz` columns, and each row's columns ascend inside [0, width).
inline bool valid(const int32_t* offsets, const int32_t* columns, int64_t nnz, int64_t heads, int64_t rows,
                  int64_t width) {
  for (int64_t h = 0; offsets && h < heads; h++)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t begin = offsets[h * (rows + 1) + r], end = offsets[h * (rows + 1) + r + 1];
      if (begin < 0 || end < begin || end > nnz) return false;
      for (int64_t i = begin; i < end; i++)
        if (columns[i] < 0 || columns[i] >= width || (i > begin && columns[i] <= columns[i - 1])) return false;
    }
  return true;
}

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
  int64_t nnz, t_nnz;          // lengths of col_idx and t_col_idx
  int64_t causal, threads;
  double scale;
};

namespace {

struct Memory {  // scratch memory, on large pages where it is large: tiles jump between pages all the time
  float* base;

  explicit Memory(int64_t floats) {
    const int64_t large = 2 << 20, bytes = floats * 4 + 64, page = bytes >= 2 * large ? large : 64;
    base = static_cast<float*>(std::aligned_alloc(page, round_up(bytes, page)));
#ifdef __linux__
    if (base && page == large) madvise(base, round_up(bytes, page), MADV_HUGEPAGE);
#endif
  }
  ~Memory() { std::free(base); }
  Memory(const Memory&) = delete;
};

// Scratch memory of a call, kept for the next one unless it is large: the system clears fresh pages, which takes as long
// as a short call. One call at a time has it; others take their own.
class KeptMemory {
  static constexpr int64_t MOST = 64 << 20;  // bytes
  static inline std::mutex mutex;
  static inline Memory* kept = nullptr;
  static inline int64_t kept_floats = 0;
  bool ours;
  Memory* memory;

 public:
  explicit KeptMemory(int64_t floats) : ours(floats * 4 <= MOST && mutex.try_lock()), memory(nullptr) {
    if (!ours) {
      memory = new Memory(floats);
    } else {
      if (kept_floats < floats) delete kept, kept = new Memory(floats), kept_floats = kept->base ? floats : 0;
      memory = kept;
    }
  }
  ~KeptMemory() {
    if (ours)
      mutex.unlock();
    else
      delete memory;
  }
  KeptMemory(const KeptMemory&) = delete;
  float* base() const { return memory->base; }
  uint32_t* words() const { return reinterpret_cast<uint32_t*>(memory->base); }
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

// What the forward keeps of a query block, queries across `lanes` lanes of which `used` hold some.
struct Queries {
  float *sums, *top, *total, *spare;  // [size][lanes] output sums; maximum (in powers of 2), denominator, scratch
  int64_t lanes, used;
};

// Divide by the denominators and write output and lse ([batch][seq_q][heads]) of a query block; `rows` is scratch
// [used][width].
template <typename T>
void finish(const Problem& p, const View& out, float* lse, int64_t b, int64_t h, int64_t begin, int64_t count,
            const Queries& x, float* rows, int64_t width) {
  for (int64_t i = 0; i < x.used; i += L) {
    const Vec total = load(x.total + i);
    store(x.spare + i, total == 0 ? Vec{} : 1.0f / total);
  }
  for (int64_t i = 0; i < x.used; i += L) {
    const Vec share = load(x.spare + i);
    for (int64_t d = 0; d < width; d += L) {
      Vec tile[L];
#pragma GCC unroll 16
      for (int n = 0; n < L; n++) tile[n] = d + n < p.size ? load(x.sums + (d + n) * x.lanes + i) * share : Vec{};
      transpose(tile);
#pragma GCC unroll 16
      for (int n = 0; n < L; n++) store(rows + (i + n) * width + d, tile[n]);
    }
  }
  copy_out(rows, width, count, p.size, 1.0f, out.at<T>(b, h, begin), out.row);
  for (int64_t i = 0; i < count; i++)
    lse[(b * p.seq_q + begin + i) * p.heads + h] =
        x.total[i] == 0 ? -INF : x.top[i] * LN2 + __builtin_logf(x.total[i]);
}

// Per query: what its scores are shifted by (lse in powers of 2), and the product of its output and its gradient. Of
// queries [start, start + count) of a head, to shift[0] and delta[0] on.
template <typename T>
void prepare_rows(const Problem& p, const View& grad, const View& out, const float* lse, int64_t b, int64_t h,
                  int64_t start, int64_t count, float* shift, float* delta) {
  for (int64_t i = 0; i < count; i++) {
    const T *x = grad.at<T>(b, h, start + i), *y = out.at<T>(b, h, start + i);
    Vec sum{};
    int64_t c = 0;
    for (; c + L <= p.size; c += L) sum += load(x + c) * load(y + c);
    float total = 0;
    for (int n = 0; n < L; n++) total += sum[n];
    for (; c < p.size; c++) total += widen(x[c]) * widen(y[c]);
    delta[i] = total;
    const float log = lse[(b * p.seq_q + start + i) * p.heads + h];
    shift[i] = log == -INF ? INF : log * LOG2E;  // a query that sees nothing: all its probabilities are 0
  }
}

// Of all queries, [batch][heads][seq_q].
template <typename T>
void prepare(const Problem& p, const View& grad, const View& out, const float* lse, float* shift, float* delta) {
  const int64_t heads = p.batch * p.heads, pieces = (p.seq_q + TILE - 1) / TILE;
#pragma omp parallel for num_threads(p.threads) schedule(static) collapse(2)
  for (int64_t bh = 0; bh < heads; bh++)
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t start = piece * TILE, to = bh * p.seq_q + start;
      prepare_rows<T>(p, grad, out, lse, bh / p.heads, bh % p.heads, start, std::min(TILE, p.seq_q - start), shift + to,
                      delta + to);
    }
}

// Where part `part` of `parts` of a head's key blocks begins: parts have about equally many blocks to compute.
inline int64_t part_begin(const Layout& layout, int64_t head, bool causal, int64_t part, int64_t parts) {
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

// Into how many parts the key blocks of a head are cut, so that `heads` heads keep `threads` threads busy.
inline int64_t parts_of(int64_t heads, int64_t threads) {
  if (heads < threads) return (threads + heads - 1) / heads;
  return heads < 2 * threads && heads % threads ? 2 : 1;
}

// Scores [keys][lanes of queries] that do not count become -inf: keys past the sequence, padding, the causal future.
inline void hide(const Problem& p, float* scores, int64_t lanes, int64_t used, int64_t b, int64_t first_key,
                 int64_t keys, int64_t padded, int64_t first_query) {
  for (int64_t j = 0; j < padded; j++) {
    const bool whole = j >= keys || (p.key_padding && p.key_padding[b * p.seq_k + first_key + j]);
    const int64_t future = p.causal ? first_key + j - first_query : 0;  // queries before this one must not see it
    const int64_t end = whole ? used : std::min(used, future);
    for (int64_t i = 0; i < end; i++) scores[j * lanes + i] = -INF;
  }
}

// The gradient of 16 queries of head `bh`: the sum of `parts` partial ones, [seq_q / 16][width][16], `step` apart.
template <typename T>
void write_queries(const Problem& p, const View& dq, int64_t bh, int64_t piece, const float* sums, int64_t step,
                   int64_t parts, int64_t width, float* rows) {
  const int64_t start = piece * 16, count = std::min<int64_t>(16, p.seq_q - start);
  for (int64_t d = 0; d < width; d += L)
    for (int64_t i = 0; i < 16; i += L) {
      Vec tile[L];
#pragma GCC unroll 16
      for (int n = 0; n < L; n++) {
        const float* from = sums + (piece * width + d + n) * 16 + i;
        tile[n] = load(from);
        for (int64_t part = 1; part < parts; part++) tile[n] += load(from + part * step);
      }
      transpose(tile);
#pragma GCC unroll 16
      for (int n = 0; n < L; n++) store(rows + (i + n) * width + d, tile[n]);
    }
  copy_out(rows, width, count, p.size, float(p.scale), dq.at<T>(bh / p.heads, bh % p.heads, start), dq.row);
}

}  // namespace
