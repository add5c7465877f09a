// Products of packed matrices on AMX tiles, with vector work done between them.
//
// A tile product takes 16 cycles of its unit and one slot to issue, so vectors can work meanwhile, if both lie in the
// processor's window of instructions: the work comes in small pieces between groups of four products. Two things hold
// the unit up. The processor renames few tiles, so it looks only a few tile instructions ahead: what a group needs is
// loaded before the vector work that precedes it, and sums are stored between the first products of the next block.
// And stores to lines that are not in the first cache fill the store buffer: what is written should be read soon, and
// then be written again.
#pragma once
#include <algorithm>
#include <vector>

#include "amx.h"

#ifdef HAVE_AMX
namespace {

// Work that is done in pieces between tile products, in the order in which it was added. A job is an object that is
// called once for each piece; it must live until it is done.
class Aside {
  static constexpr int MOST = 64;  // jobs that wait at once
  static constexpr int64_t ONE = 1 << 16;
  struct Job {
    void (*piece)(void*);
    void* self;
    int64_t left;
  };
  Job jobs[MOST];
  int64_t added_jobs = 0, job = 0, limit = 0, step = 0, due = 0;

  void one() {
    Job& now = jobs[job % MOST];
    now.piece(now.self);
    if (--now.left == 0) job++;
  }

 public:
  template <typename F>
  void add(F& work, int64_t count) {
    if (count > 0) jobs[added_jobs++ % MOST] = {[](void* self) { (*static_cast<F*>(self))(); }, &work, count};
  }
  int64_t added() const { return added_jobs; }
  // The first `count` jobs may be done now, and are spread over so many groups of products.
  void release(int64_t count, int64_t groups) {
    limit = count;
    int64_t pieces = 0;
    for (int64_t n = job; n < limit; n++) pieces += jobs[n % MOST].left;
    step = (pieces * ONE + groups - 1) / groups;
    due = 0;
  }
  void some() {
    for (due += step; due >= ONE && job < limit; due -= ONE) one();
  }
  void finish_jobs(int64_t count) {
    while (job < count) one();
  }
  void finish() { finish_jobs(added_jobs); }
};

template <int PLANES>
constexpr int PRODUCTS = PLANES == 3 ? 6 : PLANES == 2 ? 3 : 1;  // of planes that are computed

// C of m x n tiles (1 or 2 each) (+)= A B over `depth` tiles; C's rows are 16 floats apart, its tiles `down` and `across`.
struct Block {
  const uint32_t *a, *b;
  int64_t a_outer, a_depth, b_outer, b_depth, depth;
  int m, n;
  float* c;
  int64_t down, across;
  bool add;
  // About the work aside: jobs that must be done before A and B are read; and, if `over` is not 0, those that may be
  // done once the block before is stored, over so many groups of products.
  int64_t required = 0, released = 0, over = 0;
};

// Runs blocks one after the other.
template <int PLANES>
class Stream {
  std::vector<Block> blocks;
  Block last{};                                // what is still in tiles
  const Block* before = nullptr;               // that, if any

  static void barrier() { asm volatile("" ::: "memory"); }  // the compiler does not know what memory tiles read and write

  template <int T>
  static float* place(const Block& x) {
    return x.c + (T / 2) * x.down + (T % 2) * x.across;
  }
  // Store what is in tile T, of the block before.
  template <int T>
  void put() const {
    if (!before || T / 2 >= before->m || T % 2 >= before->n) return;
    if constexpr (T == 0) _tile_stored(0, place<0>(*before), 64);  // the number of a tile is part of an instruction's name
    if constexpr (T == 1) _tile_stored(1, place<1>(*before), 64);
    if constexpr (T == 2) _tile_stored(2, place<2>(*before), 64);
    if constexpr (T == 3) _tile_stored(3, place<3>(*before), 64);
  }
  // What tile T starts from.
  template <int T>
  static void take(const Block& x) {
    if constexpr (T == 0) {
      if (x.add) _tile_loadd(0, place<0>(x), 64); else _tile_zero(0);
    } else if constexpr (T == 1) {
      if (x.add) _tile_loadd(1, place<1>(x), 64); else _tile_zero(1);
    } else if constexpr (T == 2) {
      if (x.add) _tile_loadd(2, place<2>(x), 64); else _tile_zero(2);
    } else {
      if (x.add) _tile_loadd(3, place<3>(x), 64); else _tile_zero(3);
    }
  }

  template <int M, int N>
  static void left(const uint32_t* x, int64_t outer, int plane) {
    _tile_loadd(4, x + plane * TILE_WORDS, 64);
    if constexpr (M == 2) _tile_loadd(5, x + plane * TILE_WORDS + outer, 64);
  }
  template <int M, int N>
  static void right(const uint32_t* y, int64_t outer, int plane) {
    _tile_loadd(6, y + plane * TILE_WORDS, 64);
    if constexpr (N == 2) _tile_loadd(7, y + plane * TILE_WORDS + outer, 64);
  }
  template <int M, int N>
  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
  }
  // The first products of a block, while the sums of the one before leave their tiles.
  template <int M, int N>
  void multiply_first(const Block& x) {
    put<0>(), take<0>(x);
    _tile_dpbf16ps(0, 4, 6);
    put<1>();
    if constexpr (N == 2) {
      take<1>(x);
      _tile_dpbf16ps(1, 4, 7);
    }
    put<2>();
    if constexpr (M == 2) {
      take<2>(x);
      _tile_dpbf16ps(2, 5, 6);
    }
    put<3>();
    if constexpr (M == 2 && N == 2) {
      take<3>(x);
      _tile_dpbf16ps(3, 5, 7);
    }
    barrier();
  }
  static void load_first(const Block& x) {
    if (x.m == 2) left<2, 2>(x.a, x.a_outer, PLANES - 1); else left<1, 1>(x.a, x.a_outer, PLANES - 1);
    if (x.n == 2) right<2, 2>(x.b, x.b_outer, 0); else right<1, 1>(x.b, x.b_outer, 0);
  }

  template <int M, int N>
  void run(const Block& block, const Block* next, Aside& aside) {
    const uint32_t *x = block.a, *y = block.b;
    for (int64_t k = 0; k < block.depth; k++, x += block.a_depth, y += block.b_depth) {
      if (k == 0) {
        multiply_first<M, N>(block);
        if (block.over) aside.release(block.released, block.over);
      } else {
        multiply<M, N>();
      }
      if constexpr (PLANES == 3) {  // small products first; each step loads one new operand
        left<M, N>(x, block.a_outer, 1), aside.some(), multiply<M, N>();
        right<M, N>(y, block.b_outer, 1), aside.some(), multiply<M, N>();
        left<M, N>(x, block.a_outer, 0), aside.some(), multiply<M, N>();
        right<M, N>(y, block.b_outer, 2), aside.some(), multiply<M, N>();
        right<M, N>(y, block.b_outer, 0), aside.some(), multiply<M, N>();
      } else if constexpr (PLANES == 2) {
        left<M, N>(x, block.a_outer, 0), aside.some(), multiply<M, N>();
        right<M, N>(y, block.b_outer, 1), aside.some(), multiply<M, N>();
      }
      if (k + 1 < block.depth) {
        left<M, N>(x + block.a_depth, block.a_outer, PLANES - 1);
        right<M, N>(y + block.b_depth, block.b_outer, 0);
        aside.some();
      }
    }
    if (next) {
      aside.finish_jobs(next->required);
      barrier();
      load_first(*next);
    }
    aside.some();
    barrier();
    last = block, before = &last;
  }

 public:
  void push(const Block& x) { blocks.push_back(x); }

  // C of m x n tiles (+)= A B, by pairs of rows and columns; `required` of each.
  void push_all(int64_t m, int64_t n, int64_t depth, const Tiles& a, const Tiles& b, float* c, int64_t down,
                int64_t across, bool add, int64_t required) {
    for (int64_t i = 0; i < m; i += 2)
      for (int64_t j = 0; j < n; j += 2)
        push({a.at(i, 0), b.at(j, 0), a.outer, a.depth, b.outer, b.depth, depth, int(std::min<int64_t>(2, m - i)),
              int(std::min<int64_t>(2, n - j)), c + i * down + j * across, down, across, add, required});
  }
  size_t pushed() const { return blocks.size(); }
  // From block `from` on, `released` jobs may be done, over the groups of products from there to the last pushed block.
  // (and `more`).
  void release(size_t from, int64_t released, int64_t more = 0) {
    blocks[from].released = released, blocks[from].over = groups(from) + more;
  }
  // Groups of products from block `from` on.
  int64_t groups(size_t from) const {
    int64_t sum = 0;
    for (size_t i = from; i < blocks.size(); i++) sum += blocks[i].depth * PRODUCTS<PLANES>;
    return std::max<int64_t>(1, sum);
  }

  void run(Aside& aside) {
    if (!blocks.empty()) {
      if (blocks[0].required) finish();  // jobs may read what is still in tiles
      aside.finish_jobs(blocks[0].required);
      barrier();
      load_first(blocks[0]);
    }
    for (size_t i = 0; i < blocks.size(); i++) {
      const Block *x = &blocks[i], *next = i + 1 < blocks.size() ? x + 1 : nullptr;
      if (x->m == 2 && x->n == 2)
        run<2, 2>(*x, next, aside);
      else if (x->m == 2)
        run<2, 1>(*x, next, aside);
      else if (x->n == 2)
        run<1, 2>(*x, next, aside);
      else
        run<1, 1>(*x, next, aside);
    }
    blocks.clear();
  }
  // Store what the last block left.
  void finish() {
    put<0>(), put<1>(), put<2>(), put<3>();
    barrier();
    before = nullptr;
  }
};

}  // namespace
#endif
