"""LAMB's two sweeps over each tensor in C++, for fp32 on CPUs.

The first sweep updates the averages and sums the squares of parameter and direction; the second computes the direction
again and applies it: 24 and 16 bytes a parameter, against 28 of fused Adam's only sweep. Storing all of the direction
would move as many bytes and need memory for it. What keeps the time near that of moving the bytes:

- the second sweep goes backwards, so it starts with what the first touched last and left in the core's cache. Of that
  part the direction is kept, too; the gradient, which is read once, is fetched past that cache;
- both sweeps fetch ahead: the processor's own prefetchers stop at every page, for each of four streams;
- one parallel region takes all tensors, with one barrier a large tensor, and one for many small ones together.

Sums are taken in pieces of :data:`PIECE` elements, and the pieces' in double precision in their order: the same bits
whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

PIECE = 4096
"""Elements whose squares are summed in fp32."""

TOGETHER = 1 << 17
"""Elements of small tensors that share a barrier: what one core's cache keeps between the sweeps."""

ALONE = 1 << 15
"""Below this many elements in all tensors a second thread is not worth waking."""

KEPT = 40
"""Pieces of a thread's share of a tensor whose direction it keeps for the second sweep: 640 KiB; measured best of 24 to
56 with a second-level cache of 2 MiB."""

AHEAD = 512
"""Elements by which memory is fetched ahead; measured best of 128 to 4096."""

FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")
"""Without either of them the compiler leaves the loops scalar: four times slower."""

CONSTANTS = f"""
#include <cstdint>
constexpr int64_t PIECE = {PIECE}, TOGETHER = {TOGETHER}, KEPT = {KEPT}, AHEAD = {AHEAD}, LINE = 16;
"""

SOURCE = (
    CONSTANTS
    + """
#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>

struct Row { float* x; const float* g; float *m, *v; int64_t n, whole; };
struct Hyper { float b1c, b2, b2c, eps, inside, decay; };

inline float direction(float x, float m, float v, const Hyper& h) {
  return m / (std::sqrt(v + h.inside) + h.eps) + h.decay * x;
}

template <int N, bool KEEP>
inline void moments(const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ m,
                    float* __restrict__ v, float* __restrict__ w, float* __restrict__ u,
                    float* __restrict__ kept, const Hyper h) {
  #pragma omp simd
  for (int k = 0; k < N; k++) {
    const float grad = g[k], weight = x[k];
    const float average = m[k] + h.b1c * (grad - m[k]);
    const float square = h.b2 * v[k] + h.b2c * grad * grad;
    m[k] = average;
    v[k] = square;
    const float along = direction(weight, average, square, h);
    if (KEEP) kept[k] = along;
    w[k] += weight * weight;
    u[k] += along * along;
  }
}

// The first sweep over one piece; `sums` receives both sums of squares, `kept` the direction.
template <bool KEEP>
void moments_of(const Row& r, int64_t from, int64_t to, const Hyper& h, float* sums, float* kept) {
  float w[LINE] = {}, u[LINE] = {};
  int64_t i = from;
  for (; i + LINE <= to; i += LINE) {
    __builtin_prefetch(r.g + i + AHEAD, 0, 0);
    __builtin_prefetch(r.x + i + AHEAD);
    __builtin_prefetch(r.m + i + AHEAD);
    __builtin_prefetch(r.v + i + AHEAD);
    moments<LINE, KEEP>(r.x + i, r.g + i, r.m + i, r.v + i, w, u, kept, h);
    if (KEEP) kept += LINE;
  }
  for (int k = 0; i < to; i++, k++)
    moments<1, KEEP>(r.x + i, r.g + i, r.m + i, r.v + i, w + k, u + k, KEEP ? kept + k : nullptr, h);
  sums[0] = sums[1] = 0;
  for (int k = 0; k < LINE; k++) sums[0] += w[k], sums[1] += u[k];
}

template <int N>
inline void apply(float* __restrict__ x, const float* __restrict__ m, const float* __restrict__ v, const Hyper h,
                  float scale) {
  #pragma omp simd
  for (int k = 0; k < N; k++) x[k] -= scale * direction(x[k], m[k], v[k], h);
}

// The second sweep over one piece, from its end.
void apply_to(const Row& r, int64_t from, int64_t to, const Hyper& h, float scale) {
  int64_t i = to;
  for (; (i - from) % LINE; i--) apply<1>(r.x + i - 1, r.m + i - 1, r.v + i - 1, h, scale);
  for (i -= LINE; i >= from; i -= LINE) {
    __builtin_prefetch(r.x + i - AHEAD);
    __builtin_prefetch(r.m + i - AHEAD);
    __builtin_prefetch(r.v + i - AHEAD);
    apply<LINE>(r.x + i, r.m + i, r.v + i, h, scale);
  }
}

inline void apply_kept(float* __restrict__ x, const float* __restrict__ direction, int64_t n, float scale) {
  #pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] -= scale * direction[i];
}

// All rows' pieces, numbered through.
struct Pieces {
  const Row* rows;
  std::vector<int64_t> begins;  // the number of each row's first piece

  Pieces(const Row* rows, int64_t count) : rows(rows), begins(count + 1, 0) {
    for (int64_t t = 0; t < count; t++) begins[t + 1] = begins[t] + (rows[t].n + PIECE - 1) / PIECE;
  }
  int64_t row(int64_t piece) const {
    return std::upper_bound(begins.begin(), begins.end(), piece) - begins.begin() - 1;
  }
  template <class Do>
  void at(int64_t piece, int64_t t, Do&& run) const {
    const int64_t from = (piece - begins[t]) * PIECE;
    run(rows[t], from, std::min(rows[t].n, from + PIECE));
  }
};

// How far a row moves along its direction, by its sums of squares.
struct Ratio {
  double least, most;
  double operator()(double size, const double* sums) const {
    if (!(sums[0] > 0 && sums[1] > 0)) return size;
    return size * std::min(std::max(std::sqrt(sums[0] / sums[1]), least), most);
  }
};

// Rows in groups: large ones alone. Whole rows are finished, of others `out` has this part's sums of squares.
extern "C" void lamb(const Row* rows, const double* sizes, int64_t count, float b1c, float b2, float b2c, float eps,
                     float inside, float decay, double least, double most, int threads, double* out) {
  const Hyper hyper{b1c, b2, b2c, eps, inside, decay};
  const Ratio ratio{least, most};
  const Pieces pieces(rows, count);
  std::vector<float> sums(2 * pieces.begins[count]);
  std::vector<int64_t> groups{0};
  for (int64_t t = 0, together = 0; t < count; t++) {
    if (together && together + rows[t].n > TOGETHER) groups.push_back(t), together = 0;
    together += rows[t].n;
  }
  groups.push_back(count);
  #pragma omp parallel num_threads(threads)
  {
    std::vector<double> total;
    std::vector<float> kept(std::min(KEPT, pieces.begins[count]) * PIECE);
    // OpenMP may give fewer threads than asked for
    const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (size_t group = 0; group + 1 < groups.size(); group++) {
      const int64_t head = groups[group], tail = groups[group + 1];
      const int64_t begin = pieces.begins[head], length = pieces.begins[tail] - begin;
      const int64_t first = begin + length * thread / all, stop = begin + length * (thread + 1) / all;
      auto store = [&](int64_t piece) { return stop - piece > KEPT ? nullptr : &kept[(stop - piece - 1) * PIECE]; };
      for (int64_t piece = first, t = pieces.row(first); piece < stop; piece++) {
        while (piece >= pieces.begins[t + 1]) t++;
        pieces.at(piece, t, [&](const Row& r, int64_t from, int64_t to) {
          float* part = &sums[2 * piece];
          if (float* direction = store(piece)) moments_of<true>(r, from, to, hyper, part, direction);
          else moments_of<false>(r, from, to, hyper, part, nullptr);
        });
      }
      #pragma omp barrier
      total.assign(2 * (tail - head), 0);
      for (int64_t t = head; t < tail; t++)
        for (int64_t piece = pieces.begins[t]; piece < pieces.begins[t + 1]; piece++)
          for (int part = 0; part < 2; part++) total[2 * (t - head) + part] += sums[2 * piece + part];
      if (!thread) std::copy(total.begin(), total.end(), out + 2 * head);
      for (int64_t piece = stop - 1, t = pieces.row(piece); piece >= first; piece--) {
        while (piece < pieces.begins[t]) t--;
        if (!rows[t].whole) continue;
        const float scale = float(ratio(sizes[t], &total[2 * (t - head)]));
        pieces.at(piece, t, [&](const Row& r, int64_t from, int64_t to) {
          if (const float* direction = store(piece)) apply_kept(r.x + from, direction, to - from, scale);
          else apply_to(r, from, to, hyper, scale);
        });
      }
    }
  }
}

// The second sweep over rows whose sums of squares are in `sums`.
extern "C" void finish(const Row* rows, const double* sizes, int64_t count, float eps, float inside, float decay,
                       double least, double most, int threads, const double* sums) {
  const Hyper hyper{0, 0, 0, eps, inside, decay};
  const Ratio ratio{least, most};
  const Pieces pieces(rows, count);
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = pieces.begins[count] - 1; piece >= 0; piece--) {
    const int64_t t = pieces.row(piece);
    pieces.at(piece, t, [&](const Row& r, int64_t from, int64_t to) {
      apply_to(r, from, to, hyper, float(ratio(sizes[t], sums + 2 * t)));
    });
  }
}
"""
)


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyperparameters of one group: ``u = m / (sqrt(v + inside) + eps) + decay * x``; the ratio's bounds."""

    beta1: float
    beta2: float
    eps: float
    inside: float
    decay: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter's step.

    Attributes:
        tensors: parameter, gradient and the two averages: contiguous fp32 on the CPU, of one shape.
        size: how far it moves at a trust ratio of 1.
        whole: whether the tensors are all of the parameter, so that its norms are known after one sweep.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    size: float
    whole: bool


class LambKernel:
    """The compiled sweeps."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        real, double = ctypes.c_float, ctypes.c_double
        self._lamb, self._finish = library.lamb, library.finish
        self._lamb.argtypes = [pointer, pointer, count, *[real] * 6, double, double, whole, pointer]
        self._finish.argtypes = [pointer, pointer, count, *[real] * 3, double, double, whole, pointer]
        self._lamb.restype = self._finish.restype = None

    def step(self, rows: Sequence[Row], hyper: Hyper) -> list[tuple[float, float]]:
        """Update the averages of all rows, and the parameters of whole ones. Neighbours of a like size go fastest.

        Returns:
            Squared norms of each row's parameter, as it was, and direction.
        """
        h, places, sizes, out = hyper, _places(rows), _sizes(rows), array("d", bytes(16 * len(rows)))
        betas = (1 - h.beta1, h.beta2, 1 - h.beta2)
        arrays = (_address(places), _address(sizes), len(rows))
        self._lamb(*arrays, *betas, h.eps, h.inside, h.decay, h.least, h.most, _threads(rows), _address(out))
        return list(zip(out[::2], out[1::2], strict=True))

    def finish(self, rows: Sequence[Row], hyper: Hyper, squares: Sequence[tuple[float, float]]) -> None:
        """Update the parameters of rows whose averages are up to date; ``squares`` are the whole parameters'."""
        h, places, sizes = hyper, _places(rows), _sizes(rows)
        sums = array("d", [value for pair in squares for value in pair])
        arrays = (_address(places), _address(sizes), len(rows))
        self._finish(*arrays, h.eps, h.inside, h.decay, h.least, h.most, _threads(rows), _address(sums))


def _places(rows: Sequence[Row]) -> array[int]:
    places = array("q")
    for row in rows:
        places.extend((*(t.data_ptr() for t in row.tensors), row.tensors[0].numel(), int(row.whole)))
    return places


def _sizes(rows: Sequence[Row]) -> array[float]:
    return array("d", [row.size for row in rows])


def _address(values: array[Any]) -> int:
    return values.buffer_info()[0]


def _threads(rows: Sequence[Row]) -> int:
    return torch.get_num_threads() if sum(row.tensors[0].numel() for row in rows) >= ALONE else 1


def fits(*tensors: Tensor) -> bool:
    """Whether the kernel can take these tensors."""
    first = tensors[0]
    return all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.shape == first.shape and t.is_contiguous()
        for t in tensors
    )


@functools.cache
def lamb_kernel() -> LambKernel | None:
    """The kernel, built at the first call of a machine and kept in Inductor's cache; None, with a warning, if that
    fails.
    """
    try:
        from dscompile.inductor_compat import load_cpp_library  # loads Inductor, for seconds

        return LambKernel(load_cpp_library(SOURCE, FLAGS))
    except Exception as error:
        reason = str(error).strip().splitlines()
        _LOG.warning("LAMB runs several times slower, without its C++ kernel: %s", reason[0] if reason else repr(error))
        return None
