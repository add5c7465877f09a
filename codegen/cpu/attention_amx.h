// Attention's forward on AMX tiles (amx.h): bf16 operands as they are, fp16 and fp32 ones as sums of two and three bf16.
//
// Queries lie across the lanes. A pair is a query block and a tile of keys. While tiles multiply the keys of one pair
// with its queries and the probabilities of the pair before last with its values, vectors make probabilities of the
// scores of the pair in between, pack what the next ones need, and finish what is done (amx_product.h).
//
// A task is a head, whose keys and values the thread packs when they are first needed, so that those of a short sequence
// stay in its cache; or, where there are fewer heads than threads, a query block, and all threads pack some heads first.
#pragma once
#include <atomic>

#include "amx_product.h"
#include "amx_softmax.h"
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

// Which parts of a head's sequence a thread has packed already, by chunks.
class Seen {
  std::vector<uint8_t> chunks;

 public:
  void reset(int64_t count, bool all) { chunks.assign(count, all); }
  // Whether [start, start + count) chunks are to be packed now; then they are packed.
  bool fresh(int64_t start, int64_t count) {
    bool any = false;
    for (int64_t i = start; i < start + count; i++) any |= !chunks[i], chunks[i] = 1;
    return any;
  }
};

template <typename T>
struct AmxForward {  // of one thread
  static constexpr int PLANES = PLANES_OF<T>;
  const Problem& p;
  const View &q, &k, &v, &out;
  float* lse;
  const Layout& layout;
  int64_t width, deep, chunk, lanes;
  // scratch, see carve()
  Tiles queries, probabilities[2];
  float *scores[2], *result;
  struct Block {  // what is known of a query block, see Queries; sums are [lanes / 16][width][16]
    float *sums, *top, *total, *fade;
  } blocks[2];
  // what the pairs of a head are made of
  Tiles head_keys, head_values;  // [row tile][depth], and [chunk][row tile]
  Seen seen_keys, seen_values;
  Aside aside;
  Stream<PLANES> stream;

  struct Pair {
    int64_t b, h, begin, count, used;  // queries
    int64_t start, keys, padded, depth, diagonal;  // the last as in Softmax
    bool first, last;  // of its query block
    Block block;
    Tiles key, value;
  };

  AmxForward(const Problem& p, const View& q, const View& k, const View& v, const View& out, float* lse,
             const Layout& layout)
      : p(p), q(q), k(k), v(v), out(out), lse(lse), layout(layout), width(round_up(p.size, 16)),
        deep((p.size + 31) / 32), chunk(chunk_of(p)), lanes(round_up(std::min(p.block, p.seq_q), 16)) {}

  int64_t key_words() const { return (p.seq_k + 15) / 16 * deep * PLANES * TILE_WORDS; }
  int64_t value_words() const { return (p.seq_k + chunk - 1) / chunk * (width / 16) * PLANES * TILE_WORDS; }
  int64_t probability_words() const { return TILE / chunk * (lanes / 16) * PLANES * TILE_WORDS; }

  int64_t floats() const {
    return lanes * deep * 16 * PLANES + 2 * probability_words() + 2 * TILE * lanes + 16 * width +
           2 * (width * lanes + 3 * lanes);
  }

  void carve(float* base) {
    Carve c{base};
    queries = tiles_of<PLANES>(c.take(lanes * deep * 16 * PLANES), deep);
    for (Tiles& x : probabilities) x = tiles_of<PLANES>(c.take(probability_words()), TILE / chunk);
    for (float*& x : scores) x = c.take(TILE * lanes);
    result = c.take(16 * width);
    for (Block& x : blocks) {
      x.sums = c.take(width * lanes);
      x.top = c.take(lanes), x.total = c.take(lanes), x.fade = c.take(lanes);
    }
  }

  void use_head(float* packed, bool is_packed) {
    head_keys = tiles_of<PLANES>(packed, deep);
    head_values = Tiles{reinterpret_cast<uint32_t*>(packed + key_words()), PLANES * TILE_WORDS,
                        width / 16 * PLANES * TILE_WORDS, TILE_WORDS};
    seen_keys.reset((p.seq_k + chunk - 1) / chunk, is_packed);
    seen_values.reset((p.seq_k + chunk - 1) / chunk, is_packed);
  }

  auto pack_keys(int64_t b, int64_t h, int64_t start, int64_t keys, int64_t later) const {
    Tiles to = head_keys;
    to.base = to.at(start / 16, 0);
    return PackRows<PLANES, false, T>{k.at<T>(b, h, start), k.row, keys, p.size, to, later * k.row};
  }
  auto pack_values(int64_t b, int64_t h, int64_t start, int64_t keys, int64_t later) const {
    Tiles to = head_values;
    to.base = to.at(0, start / chunk);
    return PackColumns<PLANES, true, T>{v.at<T>(b, h, start), v.row, keys, p.size, chunk, to, later * v.row};
  }

  // Output 0 for a query block that sees nothing.
  void nothing(int64_t b, int64_t h, int64_t begin, int64_t count) const {
    for (int64_t i = begin; i < begin + count; i++) {
      std::memset(static_cast<void*>(out.at<T>(b, h, i)), 0, sizeof(T) * p.size);
      lse[(b * p.seq_q + i) * p.heads + h] = -INF;
    }
  }

  struct Finish {  // 16 queries at each call
    AmxForward& of;
    const Pair& x;
    int64_t i = 0;
    void operator()() {
      const Queries some{x.block.sums + i * of.width, x.block.top + i, x.block.total + i, x.block.fade + i, 16, 16};
      finish<T>(of.p, of.out, of.lse, x.b, x.h, x.begin + i, std::min<int64_t>(16, x.count - i), some, of.result,
                of.width);
      i += 16;
    }
  };

  struct Walk {  // the pairs of some query blocks of a head, one after the other
    int64_t b, h, row, end;
    std::vector<std::pair<int64_t, int64_t>> list;  // of a query block: first key, keys
    size_t at = 0;
    int which = 0;
  } walk;

  bool next(Pair& x) {
    while (walk.at == walk.list.size()) {
      if (walk.row == walk.end) return false;
      const int64_t begin = walk.row * p.block, count = std::min(p.block, p.seq_q - begin);
      walk.list.clear(), walk.at = 0;
      tiles(layout.row(walk.h, walk.row), p.block, p.seq_k, [&](int64_t start, int64_t keys) {
        if (!p.causal || start < begin + count) walk.list.push_back({start, keys});
      });
      walk.row++;
      if (walk.list.empty())
        nothing(walk.b, walk.h, begin, count);
      else
        walk.which = 1 - walk.which;
    }
    const int64_t begin = (walk.row - 1) * p.block, count = std::min(p.block, p.seq_q - begin);
    const auto [start, keys] = walk.list[walk.at];
    x = {walk.b, walk.h, begin, count, round_up(count, 16), start, keys, round_up(keys, 16), (keys + chunk - 1) / chunk, 0,
         walk.at == 0, walk.at + 1 == walk.list.size(), blocks[walk.which], head_keys, head_values};
    x.diagonal = p.causal && begin >= start ? begin - start : x.padded;
    x.key.base = head_keys.at(start / 16, 0);
    x.value.base = head_values.at(0, start / chunk);
    walk.at++;
    return true;
  }

  auto pack_queries(const Pair& x) const {
    return PackRows<PLANES, true, T>{q.at<T>(x.b, x.h, x.begin), q.row, x.count, p.size, queries, p.block * q.row};
  }
  // Keys that the 32 queries from `i` on may see.
  static int64_t seen(const Pair& x, int64_t i) { return std::min(x.padded, x.diagonal + i + 32); }
  static Tiles from(Tiles x, int64_t row) {
    x.base = x.at(row / 16, 0);
    return x;
  }
  void scores_of(const Pair& x, float* to, int64_t required) {
    for (int64_t i = 0; i < x.used; i += 32)
      stream.push_all((seen(x, i) + 15) / 16, std::min<int64_t>(2, (x.used - i) / 16), deep, x.key, from(queries, i),
                      to + i * TILE, 16 * 16, 16 * TILE, false, required);
  }
  void add_values(const Pair& x, const Tiles& with, int64_t required) {
    for (int64_t i = 0; i < x.used; i += 32)
      stream.push_all(width / 16, std::min<int64_t>(2, (x.used - i) / 16), (seen(x, i) + chunk - 1) / chunk, x.value,
                      from(with, i), x.block.sums + i * width, 16 * 16, 16 * width, !x.first, required);
  }

  // Query blocks [row, end) of a head.
  void run(int64_t b, int64_t h, int64_t row, int64_t end) {
    walk.b = b, walk.h = h, walk.row = row, walk.end = end, walk.at = 0;
    walk.list.clear();
    Pair before{}, x, after;
    if (!next(x)) return;
    all(pack_queries(x));
    if (seen_keys.fresh(x.start / chunk, x.depth)) all(pack_keys(b, h, x.start, x.keys, TILE));
    scores_of(x, scores[0], 0);
    stream.run(aside), stream.finish();
    bool started = false, more = true;
    for (int now = 0; more; now = 1 - now) {
      more = next(after);
      hide_packed(p, scores[now], TILE, x.used, b, x.start, x.keys, x.padded, x.begin);
      auto pack_q = pack_queries(more ? after : x);
      auto pack_k = pack_keys(b, h, more ? after.start : 0, more ? after.keys : 0, TILE);
      auto pack_v = pack_values(b, h, x.start, x.keys, TILE);
      Softmax<PLANES> softmax{scores[now], TILE, x.used, x.padded, chunk, x.diagonal, float(p.scale) * LOG2E, x.block.top,
                              x.block.total, x.block.fade, probabilities[now], x.first};
      Finish finish_before{*this, before};
      if (more && after.first) aside.add(pack_q, pack_q.pieces());
      if (more && seen_keys.fresh(after.start / chunk, after.depth)) aside.add(pack_k, pack_k.pieces());
      const int64_t urgent = aside.added();
      aside.add(softmax, softmax.pieces());
      if (seen_values.fresh(x.start / chunk, x.depth)) aside.add(pack_v, pack_v.pieces());
      const int64_t early = aside.added();
      if (started && before.last) aside.add(finish_before, before.used / 16);
      if (started) add_values(before, probabilities[1 - now], 0);
      const size_t middle = stream.pushed();
      if (more) scores_of(after, scores[1 - now], urgent);
      if (stream.pushed()) {
        if (started) {
          stream.release(0, early);
          if (more && before.last) stream.release(middle, aside.added());
        } else {
          stream.release(0, aside.added());
        }
      }
      stream.run(aside), stream.finish();
      aside.finish();
      if (softmax.moved)
        for (int64_t i = 0; i < x.used * width; i += 16)
          store(x.block.sums + i, load(x.block.sums + i) * load(x.block.fade + i / (16 * width) * 16));
      before = x, started = true, x = after;
      if (!more) add_values(before, probabilities[now], 0);
    }
    stream.run(aside), stream.finish();
    for (Finish last{*this, before}; last.i < before.used;) last();
  }
};

template <typename T>
int forward_amx(const Problem& p, const View& q, const View& k, const View& v, const View& out, float* lse) {
  const int64_t rows = (p.seq_q + p.block - 1) / p.block, columns = (p.seq_k + p.block - 1) / p.block;
  const Layout layout{p.row_ptr, p.col_idx, p.layout_heads, rows, columns};
  const AmxForward<T> any(p, q, k, v, out, lse, layout);
  const int64_t words = any.key_words() + any.value_words(), own = round_up(any.floats(), 1024) + 16;
  const int64_t heads = p.batch * p.heads, group = heads_at_once(p, words * 4);
  const bool alone = group >= p.threads && (heads % p.threads == 0 || heads >= 4 * p.threads);  // a head a thread
  const int64_t threads = std::min(p.threads, alone ? heads : heads * rows);
  KeptMemory memory(words * (alone ? threads : group) + threads * own);
  if (!memory.base()) return 1;
  float* const packed = memory.base() + threads * own;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num();
    AmxForward<T> task(p, q, k, v, out, lse, layout);
    task.carve(memory.base() + thread * own);
    TileConfig config;
    if (alone) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < heads; i++) {
        task.use_head(packed + thread * words, false);
        task.run(i / p.heads, i % p.heads, 0, rows);
      }
    } else {
      for (int64_t first = 0; first < heads; first += group) {
        const int64_t here = std::min(group, heads - first);
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < here; i++)
          for (int64_t r = 0; r < columns; r++) {
            const int64_t b = (first + i) / p.heads, h = (first + i) % p.heads, start = r * p.block;
            const int64_t count = std::min(p.block, p.seq_k - start);
            task.use_head(packed + i * words, true);
            all(task.pack_keys(b, h, start, count, 0));
            all(task.pack_values(b, h, start, count, 0));
          }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < here * rows; t++) {
          const int64_t i = t / rows, row = rows - 1 - t % rows;  // the longest rows of a causal layout first
          task.use_head(packed + i * words, true);
          task.run((first + i) / p.heads, (first + i) % p.heads, row, row + 1);
        }
      }
    }
  }
  return 0;
}

}  // namespace
#endif
