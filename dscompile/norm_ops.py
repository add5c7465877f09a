"""LayerNorm's gradients in one sweep: ``dscompile::layer_norm_backward``, in C++ for fp32 on CPUs.

The gradient of the input needs two sums along each row, those of weight and bias sums down each column. Inductor makes
two kernels of them, the second of which reads input and gradient again, column by column: several times the time that
moving the bytes takes. Here a thread takes rows in groups of four: the rows' sums, then, from the cache, the input's
gradient and the group's part of both column sums, which stay in a buffer of the thread. What arrives at the same place
over the residual connection is added on the way out.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch import Tensor

from dscompile.ops import LIBRARY

_LOG = logging.getLogger(__name__)

aten = torch.ops.aten

ALONE = 1 << 15
"""Inputs below this many elements are not worth a second thread."""

FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")
"""Without either of them the compiler leaves the loops scalar."""

SOURCE = """
#include <algorithm>
#include <cstdint>
#include <vector>

constexpr int GROUP = 4;      // rows whose columns are added up before the sums in memory are touched
constexpr int64_t LONG = 256; // rows after which a thread's sums go to its total: sums of sums round less

struct Arrays {
  const float *grad, *x, *mean, *rstd, *weight, *residual;
  float *dx, *sums;  // sums: weight's gradient, then bias's
  int64_t columns;
};

template <int N>
void group(const Arrays& a, int64_t row, float* __restrict__ dgamma, float* __restrict__ dbeta) {
  const int64_t n = a.columns;
  const float* __restrict__ w = a.weight;
  const float *g[N], *x[N], *res[N];
  float *dx[N], scale[N], shift[N], along[N], level[N];
  for (int k = 0; k < N; k++) {
    const int64_t start = (row + k) * n;
    g[k] = a.grad + start;
    x[k] = a.x + start;
    res[k] = a.residual ? a.residual + start : nullptr;
    dx[k] = a.dx + start;
    scale[k] = a.rstd[row + k];
    shift[k] = -a.mean[row + k] * scale[k];
    float product = 0, sum = 0;
    const float *gk = g[k], *xk = x[k];
    const float by = scale[k], plus = shift[k];
    #pragma omp simd reduction(+ : product, sum)
    for (int64_t j = 0; j < n; j++) {
      const float scaled = gk[j] * w[j];
      product += scaled * (xk[j] * by + plus);
      sum += scaled;
    }
    along[k] = product * by / n;
    level[k] = sum * by / n;
  }
  #pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    float gamma = 0, beta = 0;
    #pragma GCC unroll 4
    for (int k = 0; k < N; k++) {
      const float grad = g[k][j], normal = x[k][j] * scale[k] + shift[k];
      gamma += grad * normal;
      beta += grad;
      dx[k][j] = grad * w[j] * scale[k] - normal * along[k] - level[k];
    }
    dgamma[j] += gamma;
    dbeta[j] += beta;
  }
  if (a.residual)
    for (int k = 0; k < N; k++) {
      float* __restrict__ out = dx[k];
      const float* __restrict__ in = res[k];
      #pragma omp simd
      for (int64_t j = 0; j < n; j++) out[j] += in[j];
    }
}

extern "C" void layer_norm_backward(const float* grad, const float* x, const float* mean, const float* rstd,
                                    const float* weight, const float* residual, float* dx, float* sums, int64_t rows,
                                    int64_t columns, int threads) {
  const Arrays a{grad, x, mean, rstd, weight, residual, dx, sums, columns};
  std::vector<float> totals(2 * columns * threads);
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    float* total = totals.data() + 2 * columns * thread;
    std::vector<float> part(2 * columns);
    const int64_t end = rows * (thread + 1) / threads;
    for (int64_t row = rows * thread / threads; row < end;) {
      const int64_t stop = std::min(end, row + LONG);
      std::fill(part.begin(), part.end(), 0.f);
      for (; row + GROUP <= stop; row += GROUP) group<GROUP>(a, row, part.data(), part.data() + columns);
      for (; row < stop; row++) group<1>(a, row, part.data(), part.data() + columns);
      for (int64_t j = 0; j < 2 * columns; j++) total[j] += part[j];
    }
  }
  for (int64_t j = 0; j < 2 * columns; j++) {
    float sum = 0;
    for (int thread = 0; thread < threads; thread++) sum += totals[2 * columns * thread + j];
    sums[j] = sum;
  }
}
"""

LIBRARY.define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor)"
)


class NormKernel:
    """The compiled sweep. All tensors are contiguous fp32 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._call = library.layer_norm_backward
        self._call.argtypes = [*[pointer] * 8, count, count, ctypes.c_int]
        self._call.restype = None

    def __call__(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input (plus ``residual``), weight and bias."""
        columns = weight.numel()
        tensors = [t.contiguous() for t in (grad, x, mean, rstd, weight)]
        added = None if residual is None else residual.contiguous()
        dx, sums = torch.empty_like(tensors[1]), x.new_empty((2, *weight.shape))
        threads = torch.get_num_threads() if x.numel() >= ALONE else 1
        addresses = [t.data_ptr() for t in tensors]
        self._call(
            *(*addresses, None if added is None else added.data_ptr(), dx.data_ptr(), sums.data_ptr()),
            *(x.numel() // columns if columns else 0, columns, threads),
        )
        return dx, sums[0], sums[1].clone()


@functools.cache
def norm_kernel() -> tuple[NormKernel | None, str]:
    """The kernel, built at the first call of a machine and kept in Inductor's cache; or None and why not."""
    try:
        from dscompile.inductor_compat import load_cpp_library  # loads Inductor, for seconds

        return NormKernel(load_cpp_library(SOURCE, FLAGS)), ""
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else repr(error)
        _LOG.warning("LayerNorm's gradient runs without its C++ kernel: %s", reason)
        return None, reason


def _backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_layer_norm_backward`` for all three gradients, and ``residual`` added to the input's."""
    dx, dgamma, dbeta = aten.native_layer_norm_backward.default(
        *(grad, x, list(weight.shape), mean, rstd, weight, weight, [True, True, True])
    )
    return dx if residual is None else dx + residual, dgamma, dbeta


def _backward_cpu(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    given = [t for t in (grad, x, mean, rstd, weight, residual) if t is not None]
    kernel = norm_kernel()[0] if all(t.dtype is torch.float32 for t in given) else None
    return (kernel or _backward)(grad, x, mean, rstd, weight, residual)


def _fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Any, Any, Any]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


LIBRARY.impl("layer_norm_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("layer_norm_backward", _backward_cpu, "CPU")
torch.library.register_fake("dscompile::layer_norm_backward", _fake, lib=LIBRARY)
