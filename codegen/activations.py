"""Decompositions of tanh, tanh-GELU and the gradients of both GELUs for CPU that vectorise well.

Inductor's C++ calls Sleef's ``tanh``, which takes 5 to 10 times as long as ``exp``: a region with a tanh-GELU computes
where it should wait for memory. The exact GELU's gradient takes two ``exp``. The forms here need one, and a division.
GELU and its gradients err no more than PyTorch's kernels do; ``tanh`` stays within 1.4 ulp in fp32 (Sleef: 1.0,
PyTorch's eager kernel: 0.6). ``tests/codegen/test_activations.py`` measures them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_SCALE = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715

_SMALL = 0.625
"""Below this ``tanh`` is a polynomial: ``1 - 2 / (exp(2 x) + 1)`` would cancel."""

_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
"""``(tanh(x) - x) / x**3`` in ``x**2``, highest power first, on ``|x| < 0.625``: Cephes, ``tanhf.c`` (S. Moshier)."""


_TAIL_STEP = 0.3275911 / math.sqrt(2.0)
_TAIL = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""``erfc`` as a polynomial in ``1 / (1 + 0.3275911 z)``, times ``exp(-z**2)``: Abramowitz and Stegun, 7.1.26, which is
also what PyTorch's vectorised ``erf`` computes."""


def taken(value: Tensor) -> bool:
    """Whether the polynomials here serve a value: on CPU, of at most 32 bits (they have fp32's accuracy)."""
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.bfloat16, torch.float16)


def tanh(self: Tensor) -> Any:  # a Tensor, or NotImplemented
    """``tanh`` of any shape within 2 ulp in fp32; 16-bit types are computed in fp32 and rounded once."""
    if not taken(self):
        return NotImplemented
    x = self.float()
    size, square = x.abs(), x * x
    series = _TANH[0] * square + _TANH[1]
    for coefficient in _TANH[2:]:
        series = series * square + coefficient
    small = series * square * x + x
    large = 1.0 - 2.0 / (torch.exp(2.0 * size) + 1.0)
    return torch.copysign(torch.where(size < _SMALL, small.abs(), large), x).to(self.dtype)


def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU of any shape; the tanh form is ``x * sigmoid(2 u)`` with ``u = sqrt(2 / pi) * (x + 0.044715 x**3)``.

    ``(1 + tanh(u)) / 2`` is ``sigmoid(2 u)``; in this form nothing cancels where ``u`` is negative, so small values are
    more accurate than PyTorch's. The exact GELU is Inductor's: PyTorch's vectorised ``erf`` has one ``exp`` as well.
    Inductor has no lowering of either form to leave it to: every type and device is served.
    """
    x = _wide(self)
    if approximate != "tanh":
        return (x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))).to(self.dtype)
    twice = (2.0 * _SCALE) * x * (1.0 + _CUBIC * x * x)
    return (x / (1.0 + torch.exp(-twice))).to(self.dtype)


def gelu_backward(grad_output: Tensor, self: Tensor, *, approximate: str = "none") -> Tensor:
    """Gradient of GELU; for tanh-GELU ``g * (s + x * s * (1 - s) * 2 u')`` with ``s = sigmoid(2 u)``.

    With ``t = exp(-2 |u|)`` both ``s`` and ``s * (1 - s) = t / (1 + t)**2`` come without cancellation or overflow.
    """
    x, grad = _wide(self), _wide(grad_output)
    if approximate != "tanh":
        return (grad * _exact_slope(x, short=taken(self))).to(self.dtype)
    square = x * x
    twice = (2.0 * _SCALE) * x * (1.0 + _CUBIC * square)
    slope = (2.0 * _SCALE) * (1.0 + (3.0 * _CUBIC) * square)
    decay = torch.exp(-twice.abs())
    share = 1.0 / (1.0 + decay)
    sigmoid = torch.where(twice < 0, decay, 1.0) * share
    return (grad * (sigmoid + x * (decay * share * share) * slope)).to(self.dtype)


def _exact_slope(x: Tensor, *, short: bool) -> Tensor:
    """``P(x) + x * p(x)`` of the normal distribution ``P`` and its density ``p``; ``short``: with one ``exp``."""
    bell = torch.exp(-0.5 * x * x)
    if short:
        step = 1.0 / (1.0 + _TAIL_STEP * x.abs())
        series = _TAIL[0] * step + _TAIL[1]
        for coefficient in _TAIL[2:]:
            series = series * step + coefficient
        tail = (0.5 * series) * step * bell
        cumulative = torch.where(x < 0, tail, 1.0 - tail)
    else:
        cumulative = 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
    return cumulative + x * bell * (1.0 / math.sqrt(2.0 * math.pi))


def _wide(value: Tensor) -> Tensor:
    """16-bit types are computed in fp32."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
