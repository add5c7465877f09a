"""Adam's sweep over many tensors in C++, for fp32 parameters on CPUs with gradients of 32 or 16 bits.

One sweep reads the gradient as it is, multiplies it by a factor (loss scale and clipping), updates averages and
parameter, and writes the parameter's 16-bit copy where there is one: 28 bytes a parameter with an fp32 gradient, as
PyTorch's fused kernel; 26 with one of 16 bits; 2 more for the copy. The arithmetic is fp32 and PyTorch's
(``aten/src/ATen/native/cpu/FusedAdamKernel.cpp``), but for the bias correction of the second average, which multiplies
by the reciprocal. The work is cut by elements, not by tensors, so small tensors share threads; each element is computed
alone, so the number of threads changes no bit.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.cpp_numbers import CODES, NUMBERS

_LOG = logging.getLogger(__name__)

ALONE = 1 << 15
"""Below this many elements in all tensors a second thread is not worth waking."""

FLAGS = ("-ftree-loop-vectorize", "-fno-math-errno", "-fno-unsafe-math-optimizations")
"""The first two vectorise the loops; the last keeps exact division and square root."""

SOURCE = (
    NUMBERS
    + """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct None {};
static inline void write(None*, int64_t, float) {}

struct Hyper { float b1c, b2, b2c, eps, decay, factor; };

template <bool DECOUPLED, class Grad, class Copy>
static void sweep(float* __restrict__ x, const Grad* __restrict__ g, float* __restrict__ m, float* __restrict__ v,
                  Copy* __restrict__ copy, int64_t first, int64_t stop, const Hyper h, float size, float root,
                  float keep) {
  #pragma omp simd
  for (int64_t i = first; i < stop; i++) {
    float grad = read(g[i]) * h.factor, weight = x[i];
    if (DECOUPLED) weight *= keep; else grad += h.decay * weight;
    const float average = m[i] + h.b1c * (grad - m[i]);
    const float square = h.b2 * v[i] + h.b2c * grad * grad;
    weight -= size * average / (std::sqrt(square) * root + h.eps);
    m[i] = average;
    v[i] = square;
    x[i] = weight;
    write(copy, i, weight);
  }
}

struct Row { int64_t x, g, m, v, copy, n, grad_type, copy_type; };
struct Rates { double size, root, keep; };

template <bool DECOUPLED, class Grad>
static void with_copy(const Row& r, int64_t first, int64_t stop, const Hyper& h, const Rates& s) {
  auto run = [&](auto* copy) {
    sweep<DECOUPLED>((float*)r.x, (const Grad*)r.g, (float*)r.m, (float*)r.v, copy, first, stop, h, float(s.size),
                     float(s.root), float(s.keep));
  };
  if (!r.copy) run((None*)nullptr);
  else if (r.copy_type == 1) run((Bf16*)r.copy);
  else run((Fp16*)r.copy);
}

template <bool DECOUPLED>
static void with_grad(const Row& r, int64_t first, int64_t stop, const Hyper& h, const Rates& s) {
  if (r.grad_type == 0) with_copy<DECOUPLED, float>(r, first, stop, h, s);
  else if (r.grad_type == 1) with_copy<DECOUPLED, Bf16>(r, first, stop, h, s);
  else with_copy<DECOUPLED, Fp16>(r, first, stop, h, s);
}

extern "C" void adam(const Row* rows, const Rates* rates, int64_t count, float b1c, float b2, float b2c, float eps,
                     float decay, float factor, int decoupled, int threads) {
  const Hyper hyper{b1c, b2, b2c, eps, decay, factor};
  std::vector<int64_t> begins(count + 1, 0);
  for (int64_t t = 0; t < count; t++) begins[t + 1] = begins[t] + rows[t].n;
  const int64_t total = begins[count], line = 32;  // threads do not share a cache line of a large tensor
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; thread++) {
    const int64_t from = total * thread / threads / line * line;
    const int64_t to = thread + 1 == threads ? total : total * (thread + 1) / threads / line * line;
    int64_t t = std::upper_bound(begins.begin(), begins.end(), from) - begins.begin() - 1;
    for (; t < count && begins[t] < to; t++) {
      const int64_t first = std::max(from, begins[t]) - begins[t], stop = std::min(to, begins[t + 1]) - begins[t];
      if (stop <= first) continue;
      if (decoupled) with_grad<true>(rows[t], first, stop, hyper, rates[t]);
      else with_grad<false>(rows[t], first, stop, hyper, rates[t]);
    }
  }
}
"""
)


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyperparameters of one group. ``decay`` is added to the gradient, unless it is ``decoupled``."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    decoupled: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter's step.

    Attributes:
        tensors: parameter, gradient and the two averages: contiguous, of one shape, fp32 but for the gradient.
        copy: its copy of 16 bits, contiguous, or None.
        size: learning rate over the first average's bias correction.
        root: reciprocal root of the second average's bias correction.
        keep: what decoupled decay multiplies the parameter by.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    copy: Tensor | None
    size: float
    root: float
    keep: float


class AdamKernel:
    """The compiled sweep."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, real = ctypes.c_void_p, ctypes.c_float
        self._adam = library.adam
        self._adam.argtypes = [pointer, pointer, ctypes.c_int64, *[real] * 6, ctypes.c_int, ctypes.c_int]
        self._adam.restype = None

    def step(self, rows: Sequence[Row], hyper: Hyper, factor: float) -> None:
        """Update all rows, with gradients multiplied by ``factor``."""
        places, rates, total = array("q"), array("d"), 0
        for row in rows:
            x, grad, m, v = row.tensors
            copy = row.copy
            target = (0, 0) if copy is None else (copy.data_ptr(), CODES[copy.dtype])
            n = x.numel()
            total += n
            places.extend(
                (x.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr(), target[0], n, CODES[grad.dtype], target[1])
            )
            rates.extend((row.size, row.root, row.keep))
        threads = torch.get_num_threads() if total >= ALONE else 1
        h = hyper
        reals = (1 - h.beta1, h.beta2, 1 - h.beta2, h.eps, h.decay, factor)
        addresses = places.buffer_info()[0], rates.buffer_info()[0]
        self._adam(*addresses, len(rows), *reals, int(h.decoupled), threads)


def fits(row: Row) -> bool:
    """Whether the kernel can take these tensors."""
    x, grad, m, v = row.tensors
    shape = x.shape
    return (
        all(t.dtype == torch.float32 for t in (x, m, v))
        and grad.dtype in CODES
        and all(t.device.type == "cpu" and t.shape == shape and t.is_contiguous() for t in row.tensors)
    )


@functools.cache
def adam_kernel() -> AdamKernel | None:
    """The kernel, built at the first call of a machine and kept in Inductor's cache; None, with a warning, if that
    fails.
    """
    try:
        from dscompile.inductor_compat import load_cpp_library  # loads Inductor, for seconds

        return AdamKernel(load_cpp_library(SOURCE, FLAGS))
    except Exception as error:
        reason = str(error).strip().splitlines()
        _LOG.warning(
            "Adam keeps 32-bit gradients and is PyTorch's, without its C++ kernel: %s",
            reason[0] if reason else repr(error),
        )
        return None
