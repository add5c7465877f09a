"""Gradients of LayerNorm and RMSNorm in one sweep: ``dscompile::layer_norm_backward`` and ``rms_norm_backward``, in C++
for matrices of 32 or 16 bits on CPUs. Statistics, sums and all arithmetic are fp32.

The gradient of the input needs two sums along each row, those of weight and bias sums down each column. Inductor makes
two kernels of them, the second of which reads input and gradient again, column by column: several times the time that
moving the bytes takes. Here a thread takes rows in groups of four: the rows' sums, then, from the cache, the input's
gradient and the group's part of both column sums, which stay in a buffer of the thread. What arrives at the same place
over the residual connection is added on the way out. Values of 16 bits are widened into a buffer of the thread, tile by
tile, and the input's gradient is rounded once, after that addition.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dscompile.cpp_numbers import CODES, NUMBERS
from dscompile.ops import LIBRARY

_LOG = logging.getLogger(__name__)

aten = torch.ops.aten

ALONE = 1 << 15
"""Inputs below this many elements are not worth a second thread."""

FLAGS = (
    *("-ftree-loop-vectorize", "-fno-math-errno", "-ffp-contract=fast"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)
"""The first two vectorise the loops; the third rounds a product and its sum once. With 16 bits the sweep is bound by
arithmetic: wide vectors are a fifth of its time.
"""

SOURCE = (
    NUMBERS
    + """
#include <algorithm>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

constexpr int GROUP = 4;      // rows whose columns are added up before the sums in memory are touched
constexpr int64_t LONG = 256; // rows after which a thread's sums go to its total: sums of sums round less
constexpr int64_t TILE = 256; // columns of a group's rows that are widened at once: they fit the first-level cache

enum { GRAD, X, RESIDUAL, NORMAL, DX, ARRAYS };

// Matrices of 32 or 16 bits, null where there are none; statistics, weight and sums are fp32.
struct Arrays {
  int64_t at[ARRAYS], type[ARRAYS];
  const float *mean, *rstd, *weight;
  float* sums;  // weight's gradient, then bias's
  int64_t columns;
};

template <class T>
void widen(const T* __restrict__ from, float* __restrict__ to, int64_t n) {
  #pragma omp simd
  for (int64_t j = 0; j < n; j++) to[j] = read(from[j]);
}

#ifdef __F16C__  // the compiler leaves these loops scalar: several times slower
template <>
void widen(const Fp16* __restrict__ from, float* __restrict__ to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + j))));
  for (; j < n; j++) to[j] = read(from[j]);
}
#endif

template <class T>
void narrow(const float* __restrict__ from, const T* __restrict__ added, T* __restrict__ to, int64_t n) {
  if (added) {
    #pragma omp simd
    for (int64_t j = 0; j < n; j++) write(to, j, from[j] + read(added[j]));
  } else {
    #pragma omp simd
    for (int64_t j = 0; j < n; j++) write(to, j, from[j]);
  }
}

#ifdef __F16C__
template <>
void narrow(const float* __restrict__ from, const Fp16* __restrict__ added, Fp16* __restrict__ to, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8) {
    __m256 x = _mm256_loadu_ps(from + j);
    if (added) x = _mm256_add_ps(x, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(added + j))));
    _mm_storeu_si128((__m128i*)(to + j), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  for (; j < n; j++) write(to, j, from[j] + (added ? read(added[j]) : 0.f));
}
#endif

// `n` elements of a matrix as fp32: where they lie, or in `buffer`.
inline const float* load(const Arrays& a, int array, int64_t start, int64_t n, float* buffer) {
  if (a.type[array] == 0) return (const float*)a.at[array] + start;
  if (a.type[array] == 1) widen((const Bf16*)a.at[array] + start, buffer, n);
  else widen((const Fp16*)a.at[array] + start, buffer, n);
  return buffer;
}

// Put `n` elements of the input's gradient, plus the residual's, where they belong.
inline void store(const Arrays& a, int64_t start, int64_t n, const float* from) {
  const int64_t added = a.at[RESIDUAL];
  if (a.type[DX] == 1) narrow(from, added ? (const Bf16*)added + start : nullptr, (Bf16*)a.at[DX] + start, n);
  else if (a.type[DX] == 2) narrow(from, added ? (const Fp16*)added + start : nullptr, (Fp16*)a.at[DX] + start, n);
  else if (added) {
    float* __restrict__ out = (float*)a.at[DX] + start;
    const float* __restrict__ in = (const float*)added + start;
    #pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] += in[j];
  }
}

// Fetches what the rows from element `start` on read and write: they come cold from memory.
inline void fetch(const Arrays& a, int64_t start, int64_t n) {
  for (int array = 0; array < ARRAYS; array++) {
    const int64_t width = a.type[array] ? 2 : 4;
    if (a.at[array])
      for (int64_t byte = 0; byte < n * width; byte += 64)
        __builtin_prefetch((const char*)a.at[array] + start * width + byte, 0, 2);
  }
}

// CENTRED: LayerNorm, which subtracts the mean and has a bias. KEPT: weight's gradient multiplies by NORMAL.
template <bool CENTRED, bool KEPT, int N>
void group(const Arrays& a, int64_t row, int64_t tile, float* __restrict__ dgamma, float* __restrict__ dbeta,
           float (*buffers)[ARRAYS][TILE]) {
  const int64_t n = a.columns;
  const float* __restrict__ w = a.weight;
  float scale[N], mean[N], along[N], level[N];
  for (int k = 0; k < N; k++) {
    scale[k] = a.rstd[row + k];
    mean[k] = CENTRED ? a.mean[row + k] : 0;
    const float by = scale[k], middle = mean[k];
    float product = 0, sum = 0;
    for (int64_t from = 0; from < n; from += tile) {
      const int64_t start = (row + k) * n + from, length = std::min(tile, n - from);
      fetch(a, start + N * n, length);
      const float* g = load(a, GRAD, start, length, buffers[k][GRAD]);
      const float* x = load(a, X, start, length, buffers[k][X]);
      const float* weight = w + from;
      float one = 0, two = 0;
      #pragma omp simd reduction(+ : one, two)
      for (int64_t j = 0; j < length; j++) {
        const float scaled = g[j] * weight[j];
        one += scaled * (x[j] - middle);
        two += scaled;
      }
      product += one;
      sum += two;
    }
    along[k] = product * by * by / n;
    level[k] = CENTRED ? sum * by / n : 0;
  }
  for (int64_t from = 0; from < n; from += tile) {
    const int64_t length = std::min(tile, n - from);
    const float *g[N], *x[N], *kept[N];
    float* dx[N];
    for (int k = 0; k < N; k++) {
      const int64_t start = (row + k) * n + from;
      g[k] = load(a, GRAD, start, length, buffers[k][GRAD]);
      x[k] = load(a, X, start, length, buffers[k][X]);
      kept[k] = KEPT ? load(a, NORMAL, start, length, buffers[k][NORMAL]) : nullptr;
      dx[k] = a.type[DX] ? buffers[k][DX] : (float*)a.at[DX] + start;
    }
    #pragma omp simd
    for (int64_t j = 0; j < length; j++) {
      float gamma = 0, beta = 0;
      #pragma GCC unroll 4
      for (int k = 0; k < N; k++) {
        const float grad = g[k][j], normal = (x[k][j] - mean[k]) * scale[k];
        gamma += grad * (KEPT ? kept[k][j] : normal);
        if (CENTRED) beta += grad;
        dx[k][j] = grad * w[from + j] * scale[k] - normal * along[k] - level[k];
      }
      dgamma[from + j] += gamma;
      if (CENTRED) dbeta[from + j] += beta;
    }
    for (int k = 0; k < N; k++) store(a, (row + k) * n + from, length, dx[k]);
  }
}

template <bool CENTRED, bool KEPT>
void sweep(const Arrays& a, int64_t rows, int threads) {
  const int64_t columns = a.columns, width = (CENTRED ? 2 : 1) * columns;
  const bool wide = !(a.type[GRAD] || a.type[X] || a.type[NORMAL] || a.type[DX]);
  const int64_t tile = wide ? columns : TILE;
  std::vector<float> totals(width * threads);
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    float* total = totals.data() + width * thread;
    std::vector<float> part(width);
    float buffers[GROUP][ARRAYS][TILE];
    const int64_t end = rows * (thread + 1) / threads;
    for (int64_t row = rows * thread / threads; row < end;) {
      const int64_t stop = std::min(end, row + LONG);
      std::fill(part.begin(), part.end(), 0.f);
      float *gamma = part.data(), *beta = CENTRED ? gamma + columns : nullptr;
      for (; row + GROUP <= stop; row += GROUP) group<CENTRED, KEPT, GROUP>(a, row, tile, gamma, beta, buffers);
      for (; row < stop; row++) group<CENTRED, KEPT, 1>(a, row, tile, gamma, beta, buffers);
      for (int64_t j = 0; j < width; j++) total[j] += part[j];
    }
  }
  for (int64_t j = 0; j < width; j++) {
    float sum = 0;
    for (int thread = 0; thread < threads; thread++) sum += totals[width * thread + j];
    a.sums[j] = sum;
  }
}

// `mean` is null for RMSNorm.
extern "C" void norm_backward(const Arrays* a, int64_t rows, int threads) {
  if (a->mean) sweep<true, false>(*a, rows, threads);
  else if (a->at[NORMAL]) sweep<false, true>(*a, rows, threads);
  else sweep<false, false>(*a, rows, threads);
}
"""
)

LIBRARY.define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor rstd, Tensor weight, Tensor? normal, Tensor? residual, "
    "*, ScalarType? dtype=None) -> (Tensor, Tensor)"
)


class _Arrays(ctypes.Structure):
    """``Arrays`` of the C++ source: gradient, input, residual, normal, input's gradient; then what is fp32."""

    _fields_ = (
        ("at", ctypes.c_int64 * 5),
        ("type", ctypes.c_int64 * 5),
        *((name, ctypes.c_void_p) for name in ("mean", "rstd", "weight", "sums")),
        ("columns", ctypes.c_int64),
    )


class NormKernel:
    """The compiled sweep. All tensors are on the CPU, of 32 or 16 bits; ``residual`` has that of the result."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call = library.norm_backward
        self._call.argtypes = [ctypes.POINTER(_Arrays), ctypes.c_int64, ctypes.c_int]
        self._call.restype = None

    def layer_norm(
        self, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of input (plus ``residual``), weight and bias."""
        sums = weight.new_empty((2, *weight.shape), dtype=torch.float32)
        dx = self._sweep([grad, x, residual, None], mean, rstd, weight, sums, x.dtype)
        return dx, sums[0].to(weight.dtype), sums[1].to(weight.dtype, copy=True)

    def rms_norm(
        self,
        grad: Tensor,
        x: Tensor,
        rstd: Tensor,
        weight: Tensor,
        normal: Tensor | None,
        residual: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of input (plus ``residual``), in ``dtype``, and, in fp32, weight."""
        sums = weight.new_empty(weight.shape, dtype=torch.float32)
        return self._sweep([grad, x, residual, normal], None, rstd, weight, sums, dtype), sums

    def _sweep(
        self,
        matrices: list[Tensor | None],
        mean: Tensor | None,
        rstd: Tensor,
        weight: Tensor,
        sums: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        # kept alive while the kernel runs
        given = [None if t is None else t.contiguous() for t in matrices]
        small = [None if t is None else t.float().contiguous() for t in (mean, rstd, weight)]
        x = given[1]
        assert x is not None
        dx = torch.empty_like(x, dtype=dtype)
        given.append(dx)
        arrays = _Arrays(
            (ctypes.c_int64 * 5)(*(0 if t is None else t.data_ptr() for t in given)),
            (ctypes.c_int64 * 5)(*(0 if t is None else CODES[t.dtype] for t in given)),
            *(None if t is None else t.data_ptr() for t in small),
            *(sums.data_ptr(), weight.numel()),
        )
        columns = weight.numel()
        threads = torch.get_num_threads() if x.numel() >= ALONE else 1
        self._call(ctypes.byref(arrays), x.numel() // columns if columns else 0, threads)
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


def takes(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the kernel takes tensors of these dtypes."""
    return all(dtype in CODES for dtype in dtypes)


def _kernel_for(dtype: torch.dtype, residual: Tensor | None, *others: Tensor | None) -> NormKernel | None:
    """The kernel, if it takes the tensors and returns a gradient of ``dtype``."""
    alike = residual is None or residual.dtype is dtype
    return norm_kernel()[0] if alike and takes([dtype, *(t.dtype for t in others if t is not None)]) else None


def _wide(*given: Tensor | None) -> list[Any]:
    """16-bit tensors as fp32."""
    return [t if t is None or t.dtype.itemsize > 2 else t.float() for t in given]


def _layer_norm(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``native_layer_norm_backward`` for all three gradients, and ``residual`` added to the input's."""
    out = x.dtype, weight.dtype
    grad, x, mean, rstd, weight, residual = _wide(grad, x, mean, rstd, weight, residual)
    dx, dgamma, dbeta = aten.native_layer_norm_backward.default(
        *(grad, x, list(weight.shape), mean, rstd, weight, weight, [True, True, True])
    )
    return (dx if residual is None else dx + residual).to(out[0]), dgamma.to(out[1]), dbeta.to(out[1])


def _layer_norm_cpu(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel_for(x.dtype, residual, grad, mean, rstd, weight)
    return (kernel.layer_norm if kernel else _layer_norm)(grad, x, mean, rstd, weight, residual)


def _layer_norm_fake(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Any, Any, Any]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _rms_norm(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    normal: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight * x * rstd`` over the last dimension, ``rstd = rsqrt(mean(x**2) + eps)`` of ``[..., 1]``.

    ``normal`` is ``x * rstd`` where that was kept; ``residual`` is added to the input's gradient, which is returned in
    ``dtype`` (None: that of ``x``). The weight's is of 32 bits or more.
    """
    dtype = dtype or x.dtype
    grad, x, rstd, weight, normal, residual = _wide(grad, x, rstd, weight, normal, residual)
    scaled, kept = grad * weight, x * rstd if normal is None else normal
    dx = rstd * (scaled - x * rstd * (scaled * x).mean(-1, keepdim=True) * rstd)
    return (dx if residual is None else dx + residual).to(dtype), (grad * kept).flatten(0, -2).sum(0)


def _rms_norm_cpu(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    normal: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = dtype or x.dtype
    kernel = _kernel_for(dtype, residual, grad, x, rstd, weight, normal)
    return (kernel.rms_norm if kernel else _rms_norm)(grad, x, rstd, weight, normal, residual, dtype)


def _rms_norm_fake(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    normal: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format, dtype=dtype)
    return dx, weight.new_empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))


for _name, _composed, _cpu, _fake in (
    ("layer_norm_backward", _layer_norm, _layer_norm_cpu, _layer_norm_fake),
    ("rms_norm_backward", _rms_norm, _rms_norm_cpu, _rms_norm_fake),
):
    LIBRARY.impl(_name, _composed, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"dscompile::{_name}", _fake, lib=LIBRARY)
