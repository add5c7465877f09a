"""LAMB's two sweeps over one tensor in C++, for fp32 on CPUs.

The first sweep updates the averages and sums the squares of parameter and direction; the second computes the direction
again and applies it: 24 and 16 bytes a parameter, against 28 of fused Adam's only sweep, where the second may find a
small tensor in the cache. Storing the direction would move as many bytes and need memory for it.

Sums are taken in pieces of :data:`PIECE` elements, and the pieces' in double precision in their order: the same bits
whatever the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

PIECE = 4096
"""Elements whose squares are summed in fp32."""

ALONE = 1 << 15
"""Tensors below this many elements are not worth a second thread."""

FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno")
"""Without either of them the compiler leaves the loops scalar: four times slower."""

SOURCE = f"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

constexpr int64_t PIECE = {PIECE};

extern "C" void moments(const float* __restrict__ p, const float* __restrict__ g, float* __restrict__ m,
                        float* __restrict__ v, int64_t n, float b1c, float b2, float b2c, float eps, float inside,
                        float decay, int threads, double* out) {{
  const int64_t pieces = (n + PIECE - 1) / PIECE;
  std::vector<float> sums(2 * pieces);
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++)
    for (int64_t piece = pieces * thread / threads; piece < pieces * (thread + 1) / threads; piece++) {{
      float w = 0, u = 0;
      #pragma omp simd reduction(+ : w, u)
      for (int64_t i = piece * PIECE; i < std::min(n, (piece + 1) * PIECE); i++) {{
        const float grad = g[i], weight = p[i];
        const float average = m[i] + b1c * (grad - m[i]);
        const float square = b2 * v[i] + b2c * grad * grad;
        m[i] = average;
        v[i] = square;
        const float direction = average / (std::sqrt(square + inside) + eps) + decay * weight;
        w += weight * weight;
        u += direction * direction;
      }}
      sums[2 * piece] = w;
      sums[2 * piece + 1] = u;
    }}
  out[0] = out[1] = 0;
  for (int64_t piece = 0; piece < pieces; piece++) {{
    out[0] += sums[2 * piece];
    out[1] += sums[2 * piece + 1];
  }}
}}

// Each thread takes its pieces from the last to the first: what the first sweep touched last is in its cache.
extern "C" void apply(float* __restrict__ p, const float* __restrict__ m, const float* __restrict__ v, int64_t n,
                      float eps, float inside, float decay, float scale, int threads) {{
  const int64_t pieces = (n + PIECE - 1) / PIECE;
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++)
    for (int64_t piece = pieces * (thread + 1) / threads - 1; piece >= pieces * thread / threads; piece--) {{
      #pragma omp simd
      for (int64_t i = piece * PIECE; i < std::min(n, (piece + 1) * PIECE); i++)
        p[i] -= scale * (m[i] / (std::sqrt(v[i] + inside) + eps) + decay * p[i]);
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyperparameters of one group: ``u = m / (sqrt(v + inside) + eps) + decay * x``."""

    beta1: float
    beta2: float
    eps: float
    inside: float
    decay: float


class LambKernel:
    """The compiled sweeps. All tensors are contiguous fp32 on the CPU, of one shape."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, real, count = ctypes.c_void_p, ctypes.c_float, ctypes.c_int64
        self._moments, self._apply = library.moments, library.apply
        self._moments.argtypes = [*[pointer] * 4, count, *[real] * 6, ctypes.c_int, pointer]
        self._apply.argtypes = [*[pointer] * 3, count, *[real] * 4, ctypes.c_int]
        self._moments.restype = self._apply.restype = None
        self._out = (ctypes.c_double * 2)()

    def moments(self, x: Tensor, grad: Tensor, m: Tensor, v: Tensor, hyper: Hyper) -> tuple[float, float]:
        """Update ``m`` and ``v``; returns the squared norms of ``x`` and of the direction."""
        h, n = hyper, x.numel()
        tensors = (x.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr())
        betas = (1 - h.beta1, h.beta2, 1 - h.beta2)
        self._moments(*tensors, n, *betas, h.eps, h.inside, h.decay, _threads(n), self._out)
        return self._out[0], self._out[1]

    def apply(self, x: Tensor, m: Tensor, v: Tensor, hyper: Hyper, scale: float) -> None:
        """``x -= scale * u``."""
        h, n = hyper, x.numel()
        self._apply(x.data_ptr(), m.data_ptr(), v.data_ptr(), n, h.eps, h.inside, h.decay, scale, _threads(n))


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= ALONE else 1


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
