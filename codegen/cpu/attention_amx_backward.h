// Attention's backward on AMX tiles. Queries lie across the lanes, as in the forward (attention_amx.h).
//
// A pair is a key block and a tile of queries that see it. A task walks the pairs of a part of a head's key blocks, and
// adds to its own gradient of all queries, so nothing is atomic. While tiles compute the scores of one pair and their
// gradients, vectors turn those of the pair before into probabilities; while tiles multiply these, vectors pack what
// the next pairs need.
#pragma once
#include "attention_amx.h"

#ifdef HAVE_AMX
namespace {

constexpr int MOST_BLOCKS = 8;                 // of scores: 4 of keys, 2 of queries
constexpr int64_t COLUMNS_MOST = 16 << 20;  // bytes of a head's packed operands up to which both packings are kept

template <typename T>
struct AmxBackward {  // of one thread
  static constexpr int PLANES = PLANES_OF<T>, SLOTS = 3;
  const Problem& p;
  const View &grad, &q, &k, &v, &out, &dq, &dk, &dv;
  const float* lse;
  const Layout& layout;  // transposed: row = key block, columns = query blocks
  int64_t width, deep, chunk, keys_max;
  bool keeps_columns;  // queries and output gradients stay packed both ways, or one of them is packed for each pair
  // scratch, see carve()
  Tiles key[SLOTS], value[SLOTS], key_down[SLOTS];  // of the key blocks of three pairs
  Tiles query_columns[2], above_columns[2];  // of this pair and the next: queries and gradients, summed by query
  Tiles probability[2], score_grad[2], score_grad_down[2];
  float *scores[4], *grads[4];  // of blocks, [2][SIDE][16]: of two rows of two
  int row = 0;                  // the one in use
  float *key_grad[SLOTS], *value_grad[SLOTS];  // [width / 16][keys_max][16]
  float* piece;                        // 16 rows of `width`
  // of the head
  Tiles queries, grads_above;      // packed, to be summed along their elements
  Tiles queries_down, above_down;  // and by query, if they are kept so: [chunk][row tile]
  float *shift, *delta;            // see prepare
  float* sum;                      // gradient of the queries, [seq_q / 16][width][16]
  Seen seen;                       // queries that are packed
  Aside aside;
  Stream<PLANES> stream;

  struct Pair {
    int64_t begin, keys, padded, key_chunks;  // key block
    int64_t start, count, used, lanes;        // queries
    bool first, last;                         // of its key block
    int slot;                                 // of the buffers for key blocks
  };

  AmxBackward(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& out,
              const float* lse, const View& dq, const View& dk, const View& dv, const Layout& layout)
      : p(p), grad(grad), q(q), k(k), v(v), out(out), dq(dq), dk(dk), dv(dv), lse(lse), layout(layout),
        width(round_up(p.size, 16)), deep((p.size + 31) / 32), chunk(chunk_of(p)),
        keys_max(round_up(std::min(p.block, p.seq_k), 16)) {
    keeps_columns = 4 * 2 * (packed_words() + column_words()) <= COLUMNS_MOST;
  }

  int64_t query_tiles() const { return (p.seq_q + 15) / 16; }
  int64_t sum_floats() const { return query_tiles() * 16 * width; }
  int64_t packed_words() const { return query_tiles() * deep * PLANES * TILE_WORDS; }  // of queries, or gradients
  int64_t column_words() const { return (p.seq_q + chunk - 1) / chunk * (width / 16) * PLANES * TILE_WORDS; }
  int64_t head_floats() const {
    return 2 * packed_words() + (keeps_columns ? 2 * column_words() : 0) + 2 * query_tiles() * 16;
  }

  int64_t floats() const {
    const int64_t rows = keys_max / 16, lanes = TILE / chunk, key_chunks = (keys_max + chunk - 1) / chunk;
    const int64_t tiles = SLOTS * (2 * rows * deep + key_chunks * (width / 16)) + 4 * lanes * (width / 16) +
                          4 * rows * lanes + 2 * key_chunks * (TILE / 16);
    return tiles * PLANES * TILE_WORDS + 16 * SIDE * 16 + SLOTS * 2 * keys_max * width + 16 * width;
  }

  void carve(float* base) {
    Carve c{base};
    const int64_t rows = keys_max / 16, lanes = TILE / chunk, key_chunks = (keys_max + chunk - 1) / chunk;
    const auto take = [&](int64_t outer, int64_t depth) {
      return tiles_of<PLANES>(c.take(outer * depth * PLANES * TILE_WORDS), depth);
    };
    for (int n = 0; n < 4; n++) scores[n] = c.take(2 * SIDE * 16), grads[n] = c.take(2 * SIDE * 16);
    for (int n = 0; n < 2; n++) {
      probability[n] = take(rows, lanes), score_grad[n] = take(rows, lanes);
      score_grad_down[n] = take(TILE / 16, key_chunks);
      query_columns[n] = take(width / 16, lanes), above_columns[n] = take(width / 16, lanes);
    }
    for (int n = 0; n < SLOTS; n++) {
      key[n] = take(rows, deep), value[n] = take(rows, deep), key_down[n] = take(width / 16, key_chunks);
      key_grad[n] = c.take(keys_max * width), value_grad[n] = c.take(keys_max * width);
    }
    piece = c.take(16 * width);
  }

  // A head's packed queries and gradients, see head_floats(), and the task's own gradient of the queries.
  void use_head(float* packed, bool is_packed, float* own) {
    Carve c{packed};
    queries = tiles_of<PLANES>(c.take(packed_words()), deep);
    grads_above = tiles_of<PLANES>(c.take(packed_words()), deep);
    if (keeps_columns) {
      const auto columns = [&] {
        return Tiles{reinterpret_cast<uint32_t*>(c.take(column_words())), PLANES * TILE_WORDS,
                     width / 16 * PLANES * TILE_WORDS, TILE_WORDS};
      };
      queries_down = columns(), above_down = columns();
    }
    shift = c.take(query_tiles() * 16), delta = c.take(query_tiles() * 16);
    sum = own;
    seen.reset((p.seq_q + chunk - 1) / chunk, is_packed);
  }

  template <bool TRANSPOSED>
  auto rows_of(const View& x, int64_t b, int64_t h, int64_t start, int64_t count, const Tiles& to, int64_t later) const {
    return PackRows<PLANES, TRANSPOSED, T>{x.at<T>(b, h, start), x.row, count, p.size, to, later * x.row};
  }
  template <bool TRANSPOSED>
  auto columns_of(const View& x, int64_t b, int64_t h, int64_t start, int64_t count, const Tiles& to) const {
    return PackColumns<PLANES, TRANSPOSED, T>{x.at<T>(b, h, start), x.row, count, p.size, chunk, to};
  }
  static Tiles from(Tiles x, int64_t row) {
    x.base = x.at(row / 16, 0);
    return x;
  }
  Tiles from_chunk(Tiles x, int64_t row) const {
    x.base = x.at(0, row / chunk);
    return x;
  }

  struct Prepare {  // 16 queries at each call
    const AmxBackward* of;
    int64_t b, h, start, count;
    void operator()() {
      const int64_t n = std::min<int64_t>(16, count);
      float *shift = of->shift + start, *delta = of->delta + start;
      prepare_rows<T>(of->p, of->grad, of->out, of->lse, b, h, start, n, shift, delta);
      for (int64_t i = n; i < 16; i++) shift[i] = INF, delta[i] = 0;
      start += 16, count -= 16;
    }
  };

  // What a pair needs that later ones may need again: of its key block, if it is its first, and of queries that were not
  // seen yet. `start` is a multiple of the chunk.
  struct Needs {
    PackRows<PLANES, false, T> key, value;
    PackColumns<PLANES, true, T> key_down;
    PackRows<PLANES, true, T> query, above;
    PackColumns<PLANES, false, T> query_down, above_down;
    Prepare rows;
  } needs;

  void need_keys(int64_t b, int64_t h, const Pair& x) {
    needs.key = rows_of<false>(k, b, h, x.begin, x.keys, key[x.slot], p.block);
    needs.value = rows_of<false>(v, b, h, x.begin, x.keys, value[x.slot], p.block);
    needs.key_down = columns_of<true>(k, b, h, x.begin, x.keys, key_down[x.slot]);
    aside.add(needs.key, needs.key.pieces());
    aside.add(needs.value, needs.value.pieces());
    aside.add(needs.key_down, needs.key_down.pieces());
  }
  void need_queries(int64_t b, int64_t h, int64_t start, int64_t count) {
    needs.query = rows_of<true>(q, b, h, start, count, from(queries, start), TILE);
    needs.above = rows_of<true>(grad, b, h, start, count, from(grads_above, start), TILE);
    needs.rows = {this, b, h, start, count};
    aside.add(needs.query, needs.query.pieces());
    aside.add(needs.above, needs.above.pieces());
    aside.add(needs.rows, (count + 15) / 16);
    if (!keeps_columns) return;
    needs.query_down = columns_of<false>(q, b, h, start, count, from_chunk(queries_down, start));
    needs.above_down = columns_of<false>(grad, b, h, start, count, from_chunk(above_down, start));
    aside.add(needs.query_down, needs.query_down.pieces());
    aside.add(needs.above_down, needs.above_down.pieces());
  }
  void need(int64_t b, int64_t h, const Pair& x) {
    if (x.first) need_keys(b, h, x);
    if (seen.fresh(x.start / chunk, x.lanes)) need_queries(b, h, x.start, x.count);
  }

  struct CopyOut {  // the gradients of a finished key block, 16 rows at each call
    const AmxBackward& of;
    const Pair& x;
    int64_t b, h, i = 0;
    void copy(const float* from, const View& to, float scale) const {
      for (int64_t r = i; r < std::min(x.keys, i + 16); r++) {
        T* row = to.at<T>(b, h, x.begin + r);
        const float* strip = from + r * 16;
        int64_t c = 0;
        for (; c + 16 <= of.p.size; c += 16, strip += of.keys_max * 16) store(row + c, load(strip) * scale);
        for (int64_t n = 0; c + n < of.p.size; n++) row[c + n] = narrow(strip[n] * scale, T{});
      }
    }
    void operator()() {
      copy(of.key_grad[x.slot], of.dk, float(of.p.scale));
      copy(of.value_grad[x.slot], of.dv, 1.0f);
      i += 16;
    }
  };

  struct Walk {  // the pairs of some key blocks of a head
    int64_t b, h, row, end;
    std::vector<std::pair<int64_t, int64_t>> list;  // of a key block: first query, queries
    size_t at = 0;
    int slot = 0;
  } walk;

  bool next(Pair& x) {
    while (walk.at == walk.list.size()) {
      if (walk.row == walk.end) return false;
      const int64_t begin = walk.row * p.block;
      walk.list.clear(), walk.at = 0;
      tiles(layout.row(walk.h, walk.row), p.block, p.seq_q, [&](int64_t start, int64_t count) {
        if (!p.causal || start + count > begin) walk.list.push_back({start, count});
      });
      walk.row++;
      if (walk.list.empty())
        nothing(begin);
      else
        walk.slot = (walk.slot + 1) % SLOTS;
    }
    const int64_t begin = (walk.row - 1) * p.block, keys = std::min(p.block, p.seq_k - begin);
    const auto [start, count] = walk.list[walk.at];
    x = {begin, keys, round_up(keys, 16), (keys + chunk - 1) / chunk, start, count, round_up(count, 16),
         (count + chunk - 1) / chunk, walk.at == 0, walk.at + 1 == walk.list.size(), walk.slot};
    walk.at++;
    return true;
  }

  // Gradients 0 for a key block that nothing sees.
  void nothing(int64_t begin) const {
    for (int64_t i = begin; i < std::min(p.seq_k, begin + p.block); i++)
      for (const View* to : {&dk, &dv})
        std::memset(static_cast<void*>(to->template at<T>(walk.b, walk.h, i)), 0, sizeof(T) * p.size);
  }

  // A pair on its way: what it reads by query, and its work aside.
  struct Stage {
    Pair pair;
    Tiles query, above;
    PackColumns<PLANES, false, T> pack_query, pack_above;
    SoftmaxBackward<PLANES> softmax[MOST_BLOCKS];
    int64_t ready[MOST_BLOCKS];  // jobs that make the probabilities of a row of blocks
  } stages[2];

  int64_t down(const Pair& x) const { return (x.padded / 16 + 1) / 2; }  // rows of blocks of scores

  // The first block of row `i` of a pair that is not all hidden; 0 where a row, or none, is.
  int64_t first_seen(const Pair& x, int64_t i) const {
    const auto hidden = [&](int64_t row) { return std::max<int64_t>(0, (x.begin + row * SIDE - x.start) / SIDE); };
    return p.causal && hidden(down(x) - 1) * SIDE < x.used ? hidden(i) : 0;
  }

  // The products of row `i` of blocks of a pair: scores and gradients of probabilities, to be softmax's.
  void push_scores(int64_t b, Stage& stage, int64_t i) {
    const Pair& x = stage.pair;
    const int now = &stage - stages;
    row = 1 - row;
    const int64_t lanes = x.used / 16, across = (lanes + 1) / 2;
    for (int64_t j = first_seen(x, i); j < across; j++) {
      const int slot = row * 2 + j, m = std::min<int64_t>(2, x.padded / 16 - 2 * i), n = std::min<int64_t>(2, lanes - 2 * j);
      const auto push = [&](const Tiles& left, const Tiles& right, float* to) {
        stream.push({left.at(2 * i, 0), right.at(x.start / 16 + 2 * j, 0), left.outer, left.depth, right.outer, right.depth,
                     deep, m, n, to, 16 * 16, SIDE * 16, false});
      };
      push(key[x.slot], queries, scores[slot]);
      push(value[x.slot], grads_above, grads[slot]);
      const auto part = [](Tiles to, int64_t outer, int64_t depth) {
        to.base = to.at(outer, depth);
        return to;
      };
      SoftmaxBackward<PLANES>& softmax = stage.softmax[i * 2 + j];
      softmax = {&p, b, x.begin + i * SIDE, std::min(SIDE, x.keys - i * SIDE), x.start + j * SIDE, scores[slot],
                 grads[slot], shift + x.start + j * SIDE, delta + x.start + j * SIDE, std::min(SIDE, x.used - j * SIDE),
                 std::min(SIDE, x.padded - i * SIDE), chunk, part(probability[now], 2 * i, j * SIDE / chunk),
                 part(score_grad[now], 2 * i, j * SIDE / chunk), part(score_grad_down[now], 2 * j, i * SIDE / chunk)};
      aside.add(softmax, softmax.pieces());
    }
    stage.ready[i] = aside.added();
  }

  // The products of probabilities and gradients of scores of row `i` of blocks; after the last the queries' gradient.
  void push_gradients(const Stage& stage, int64_t i) {
    const Pair& x = stage.pair;
    const int now = &stage - stages;
    const int64_t skipped = first_seen(x, i) * SIDE / chunk;
    const auto push = [&](Tiles a, Tiles b, float* c) {
      a.base = a.at(2 * i, skipped), b.base = b.at(0, skipped);
      stream.push_all(std::min<int64_t>(2, x.padded / 16 - 2 * i), width / 16, x.lanes - skipped, a, b,
                      c + i * SIDE * 16, 16 * 16, keys_max * 16, !x.first, stage.ready[i]);
    };
    push(probability[now], stage.above, value_grad[x.slot]);
    push(score_grad[now], stage.query, key_grad[x.slot]);
    if (i + 1 < down(x)) return;
    for (int64_t j = 0; j * SIDE < x.used; j++) {
      int64_t rows = 0;  // of blocks that these queries see
      while (rows < down(x) && first_seen(x, rows) <= j) rows++;
      if (rows)
        stream.push_all(width / 16, std::min<int64_t>(2, x.used / 16 - 2 * j), std::min(x.key_chunks, rows * SIDE / chunk),
                        key_down[x.slot], from(score_grad_down[now], j * SIDE), sum + (x.start + j * SIDE) * width,
                        16 * 16, 16 * width, true, stage.ready[i]);
    }
  }

  // Key blocks [row, end) of a head.
  void run(int64_t b, int64_t h, int64_t row, int64_t end) {
    std::memset(sum, 0, sizeof(float) * sum_floats());
    walk.b = b, walk.h = h, walk.row = row, walk.end = end, walk.at = 0;
    walk.list.clear();
    Pair x, after;
    if (!next(x)) return;
    need(b, h, x);
    aside.finish();
    Stage* before = nullptr;
    for (bool more = true; more; x = after) {
      Stage& stage = stages[before == stages];
      more = next(after);
      pair(b, h, x, stage, before, more ? &after : nullptr);
      before = &stage;
    }
    push_gradients(*before, down(before->pair) - 1);
    stream.run(aside);
    stream.finish();
    for (CopyOut last{*this, before->pair, b, h}; last.i < before->pair.keys;) last();
  }

  // Runs what is left of the pair `before` and all but the last products of gradients of pair x.
  void pair(int64_t b, int64_t h, const Pair& x, Stage& stage, const Stage* before, const Pair* after) {
    const int now = &stage - stages;
    stage.pair = x;
    if (keeps_columns) {
      stage.query = from_chunk(queries_down, x.start), stage.above = from_chunk(above_down, x.start);
    } else {
      stage.query = query_columns[now], stage.above = above_columns[now];
      stage.pack_query = columns_of<false>(q, b, h, x.start, x.count, stage.query);
      stage.pack_above = columns_of<false>(grad, b, h, x.start, x.count, stage.above);
      aside.add(stage.pack_query, stage.pack_query.pieces());
      aside.add(stage.pack_above, stage.pack_above.pieces());
    }
    if (after) need(b, h, *after);
    const bool done = before && before->pair.last;  // a key block's gradients
    CopyOut copy_before{*this, done ? before->pair : x, b, h};
    int64_t early = 0;  // jobs that end with this pair
    for (int64_t i = 0; i < down(x); i++) {
      const size_t begin = stream.pushed();
      early = aside.added();
      push_scores(b, stage, i);
      if (i == 1 && done) stream.release(begin, early);
      const size_t then = stream.pushed();
      const int64_t groups = stream.groups(begin);
      if (i)
        push_gradients(stage, i - 1);
      else if (before)
        push_gradients(*before, down(before->pair) - 1);
      if (stream.pushed() > then) stream.release(then, stage.ready[i], groups);
      if (i == 0 && done) aside.add(copy_before, before->pair.padded / 16);
    }
    stream.run(aside);
    if (done && down(x) == 1) {
      stream.finish();
      early = aside.added();
    }
    aside.finish_jobs(early);
  }
};

template <typename T>
int backward_amx(const Problem& p, const View& grad, const View& q, const View& k, const View& v, const View& out,
                 const float* lse, const View& dq, const View& dk, const View& dv) {
  const int64_t heads = p.batch * p.heads, blocks = (p.seq_k + p.block - 1) / p.block;
  const Layout layout{p.t_row_ptr, p.t_col_idx, p.layout_heads, blocks, (p.seq_q + p.block - 1) / p.block};
  const AmxBackward<T> any(p, grad, q, k, v, out, lse, dq, dk, dv, layout);
  const int64_t head = round_up(any.head_floats(), 16), own = round_up(any.floats(), 1024) + 16;
  const int64_t sum = any.sum_floats(), width = any.width, pieces = any.query_tiles();
  constexpr int64_t step = TILE;  // queries that a thread packs at once
  int64_t group = heads_at_once(p, head * 4);
  if (group < heads && group > p.threads) group -= group % p.threads;
  const int64_t parts = std::min(blocks, parts_of(group, p.threads)), threads = std::min(p.threads, group * parts);
  const bool alone = parts == 1;  // a head a thread
  const int64_t sums = alone ? threads : group * parts;
  KeptMemory memory(threads * own + sum * sums + head * (alone ? threads : group));
  if (!memory.base()) return 1;
  float *const all_sums = memory.base() + threads * own, *const packed = all_sums + sum * sums;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num();
    AmxBackward<T> task(p, grad, q, k, v, out, lse, dq, dk, dv, layout);
    task.carve(memory.base() + thread * own);
    TileConfig config;
    if (alone) {
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < heads; i++) {
        task.use_head(packed + thread * head, false, all_sums + thread * sum);
        task.run(i / p.heads, i % p.heads, 0, blocks);
        for (int64_t piece = 0; piece < pieces; piece++)
          write_queries<T>(p, dq, i, piece, task.sum, sum, 1, width, task.piece);
      }
    } else {
      for (int64_t first = 0; first < heads; first += group) {
        const int64_t here = std::min(group, heads - first);
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < here; i++)
          for (int64_t part = 0; part < (p.seq_q + step - 1) / step; part++) {
            task.use_head(packed + i * head, true, nullptr);
            const int64_t bh = first + i, start = part * step;
            task.need_queries(bh / p.heads, bh % p.heads, start, std::min(step, p.seq_q - start));
            task.aside.finish();
          }
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < here * parts; t++) {
          const int64_t i = t / parts, part = t % parts, bh = first + i, h = bh % p.heads;
          task.use_head(packed + i * head, true, all_sums + t * sum);
          task.run(bh / p.heads, h, part_begin(layout, h, p.causal, part, parts),
                   part_begin(layout, h, p.causal, part + 1, parts));
        }
#pragma omp for schedule(static) collapse(2)
        for (int64_t i = 0; i < here; i++)
          for (int64_t piece = 0; piece < pieces; piece++)
            write_queries<T>(p, dq, first + i, piece, all_sums + sum * i * parts, sum, parts, width, task.piece);
      }
    }
  }
  return 0;
}

}  // namespace
#endif
