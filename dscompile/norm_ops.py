"""Gradients of LayerNorm and RMSNorm in one sweep: ``dscompile::layer_norm_backward`` and ``rms_norm_backward``, in C++
for fp32 on CPUs.

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
  const float *grad, *x, *mean, *rstd, *weight, *residual, *normal;
  float *dx, *sums;  // sums: weight's gradient, then bias's
  int64_t columns;
};

// CENTRED: LayerNorm, which subtracts the mean and has a bias. KEPT: `normal` is what weight's gradient multiplies by.
template <bool CENTRED, bool KEPT, int N>
void group(const Arrays& a, int64_t row, float* __restrict__ dgamma, float* __restrict__ dbeta) {
  const int64_t n = a.columns;
  const float* __restrict__ w = a.weight;
  const float *g[N], *x[N], *res[N], *kept[N];
  float *dx[N], scale[N], shift[N], along[N], level[N];
  for (int k = 0; k < N; k++) {
    const int64_t start = (row + k) * n;
    g[k] = a.grad + start;
    x[k] = a.x + start;
    kept[k] = KEPT ? a.normal + start : nullptr;
    res[k] = a.residual ? a.residual + start : nullptr;
    dx[k] = a.dx + start;
    scale[k] = a.rstd[row + k];
    shift[k] = CENTRED ? -a.mean[row + k] * scale[k] : 0;
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
    level[k] = CENTRED ? sum * by / n : 0;
  }
  #pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    float gamma = 0, beta = 0;
    #pragma GCC unroll 4
    for (int k = 0; k < N; k++) {
      const float grad = g[k][j], normal = x[k][j] * scale[k] + shift[k];
      gamma += grad * (KEPT ? kept[k][j] : normal);
      if (CENTRED) beta += grad;
      dx[k][j] = grad * w[j] * scale[k] - normal * along[k] - level[k];
    }
    dgamma[j] += gamma;
    if (CENTRED) dbeta[j] += beta;
  }
  if (a.residual)
    for (int k = 0; k < N; k++) {
      float* __restrict__ out = dx[k];
      const float* __restrict__ in = res[k];
      #pragma omp simd
      for (int64_t j = 0; j < n; j++) out[j] += in[j];
    }
}

template <bool CENTRED, bool KEPT>
void sweep(const Arrays& a, int64_t rows, int threads) {
  const int64_t columns = a.columns, width = (CENTRED ? 2 : 1) * columns;
  std::vector<float> totals(width * threads);
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    float* total = totals.data() + width * thread;
    std::vector<float> part(width);
    const int64_t end = rows * (thread + 1) / threads;
    for (int64_t row = rows * thread / threads; row < end;) {
      const int64_t stop = std::min(end, row + LONG);
      std::fill(part.begin(), part.end(), 0.f);
      float *gamma = part.data(), *beta = CENTRED ? gamma + columns : nullptr;
      for (; row + GROUP <= stop; row += GROUP) group<CENTRED, KEPT, GROUP>(a, row, gamma, beta);
      for (; row < stop; row++) group<CENTRED, KEPT, 1>(a, row, gamma, beta);
      for (int64_t j = 0; j < width; j++) total[j] += part[j];
    }
  }
  for (int64_t j = 0; j < width; j++) {
    float sum = 0;
    for (int thread = 0; thread < threads; thread++) sum += totals[width * thread + j];
    a.sums[j] = sum;
  }
}

// `mean` is null for RMSNorm, `residual` and `normal` where there are none.
extern "C" void norm_backward(const float* grad, const float* x, const float* mean, const float* rstd,
                              const float* weight, const float* residual, const float* normal, float* dx, float* sums,
                              int64_t rows, int64_t columns, int threads) {
  const Arrays a{grad, x, mean, rstd, weight, residual, normal, dx, sums, columns};
  if (mean) sweep<true, false>(a, rows, threads);
  else if (normal) sweep<false, true>(a, rows, threads);
  else sweep<false, false>(a, rows, threads);
}
"""

LIBRARY.define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor rstd, Tensor weight, Tensor? normal, Tensor? residual) "
    "-> (Tensor, Tensor)"
)


class NormKernel:
    """The compiled sweep. All tensors are contiguous fp32 on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._call = library.norm_backward
        self._call.argtypes = [*[pointer] * 9, count, count, ctypes.c_int]
        self._call.restype = None

    def layer_norm(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input (plus ``residual``), weight and bias."""
        sums = x.new_empty((2, *weight.shape))
        dx = self._sweep([grad, x, mean, rstd, weight, residual, None], sums)
        return dx, sums[0], sums[1].clone()

    def rms_norm(
        self, grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, normal: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of input (plus ``residual``) and weight."""
        sums = x.new_empty(weight.shape)
        return self._sweep([grad, x, None, rstd, weight, residual, normal], sums), sums

    def _sweep(self, arrays: list[Tensor | None], sums: Tensor) -> Tensor:
        given = [None if t is None else t.contiguous() for t in arrays]  # kept alive while the kernel runs
        x, weight = given[1], given[4]
        assert x is not None
        assert weight is not None
        columns = weight.numel()
        threads = torch.get_num_threads() if x.numel() >= ALONE else 1
        dx = torch.empty_like(x)
        self._call(
            *(None if t is None else t.data_ptr() for t in given),
            *(dx.data_ptr(), sums.data_ptr(), x.numel() // columns if columns else 0, columns, threads),
        )
        return dx


@functools.cache
def norm_kernel() -> tuple[NormKernel | None, str]:
    """The kernel, built at the first call of a machine and kept in Inductor's cache; or None and why not."""
    try:
        from dscompile.inductor_compat import load_cpp_library  # loads Inductor, for seconds

        return NormKernel(load_cpp_library(SOURCE, FLAGS)), ""
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else repr(error)
        _LOG.warning("the gradients of norms are computed without their C++ kernel: %s", reason)
        return None, reason


def _kernel_for(*given: Tensor | None) -> NormKernel | None:
    return norm_kernel()[0] if all(t is None or t.dtype is torch.float32 for t in given) else None


def _layer_norm(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_layer_norm_backward`` for all three gradients, and ``residual`` added to the input's."""
    dx, dgamma, dbeta = aten.native_layer_norm_backward.default(
        *(grad, x, list(weight.shape), mean, rstd, weight, weight, [True, True, True])
    )
    return dx if residual is None else dx + residual, dgamma, dbeta


def _layer_norm_cpu(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel_for(grad, x, mean, rstd, weight, residual)
    return (kernel.layer_norm if kernel else _layer_norm)(grad, x, mean, rstd, weight, residual)


def _layer_norm_fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Any, Any, Any]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _rms_norm(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, normal: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight * x * rstd`` over the last dimension, ``rstd = rsqrt(mean(x**2) + eps)`` of ``[..., 1]``.

    ``normal`` is ``x * rstd`` where that was kept; ``residual`` is added to the input's gradient.
    """
    scaled, kept = grad * weight, x * rstd if normal is None else normal
    dx = rstd * (scaled - x * rstd * (scaled * x).mean(-1, keepdim=True) * rstd)
    return dx if residual is None else dx + residual, (grad * kept).flatten(0, -2).sum(0)


def _rms_norm_cpu(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, normal: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernel = _kernel_for(grad, x, rstd, weight, normal, residual)
    return (kernel.rms_norm if kernel else _rms_norm)(grad, x, rstd, weight, normal, residual)


def _rms_norm_fake(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, normal: Tensor | None, residual: Tensor | None
) -> tuple[Any, Any]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


for _name, _composed, _cpu, _fake in (
    ("layer_norm_backward", _layer_norm, _layer_norm_cpu, _layer_norm_fake),
    ("rms_norm_backward", _rms_norm, _rms_norm_cpu, _rms_norm_fake),
):
    LIBRARY.impl(_name, _composed, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"dscompile::{_name}", _fake, lib=LIBRARY)
