"""Pooling over windows as the language's own operators: shifted slices of a padded tensor, compared or added up.

Forward, every element of the result reads its window. Backward, every element of the input's gradient reads the
windows that hold it: nothing is added in memory, so the sums have one order. All of it is done in fp32 and rounded
once. Windows of more than :data:`WINDOW` elements, and sizes that are symbols, are left to PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dscompile.torch_compat import OpOverload

WINDOW = 25
"""Most elements of a window, as in TorchInductor: each is a load in the source."""


@dataclass(frozen=True)
class _Axis:
    """One dimension that is pooled: ``size`` elements become ``out``."""

    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    dilation: int = 1

    @property
    def readers(self) -> int:
        """In how many windows an element can be."""
        return -(-self.kernel // self.stride)

    def window(self, x: Tensor, dim: int, offset: int) -> Tensor:
        """Element number ``offset`` of every window, of a tensor padded by :meth:`pads`."""
        start = offset * self.dilation
        return x[(slice(None),) * dim + (slice(start, start + (self.out - 1) * self.stride + 1, self.stride),)]

    @property
    def pads(self) -> tuple[int, int]:
        """What is before and after the elements, so that every window is whole."""
        last = (self.out - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        return self.padding, last - self.size - self.padding

    def position(self, like: Tensor, offset: int) -> Tensor:
        """Where that element is, int64 ``[out]``."""
        return torch.arange(self.out, device=like.device) * self.stride + (offset * self.dilation - self.padding)

    def reader(self, x: Tensor, dim: int, number: int, fill: float) -> Tensor:
        """Of every element, the value of window ``number``, counted back from the last that begins at or before it."""
        turns = -(-(self.padding + self.size) // self.stride)
        pads = [0, 0] * (x.dim() - 1 - dim) + [number, turns - self.out - number]
        padded = functional.pad(x, pads, value=fill).unsqueeze(dim + 1)
        shape = list(padded.shape)
        shape[dim + 1] = self.stride
        spread = padded.expand(shape).flatten(dim, dim + 1)
        return spread.narrow(dim, self.padding, self.size)


def _axes(
    x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, dims: int
) -> list[_Axis] | None:
    """The pooled dimensions; None if the language does not have such a pooling."""
    sizes = list(x.shape[-dims:])
    if not all(isinstance(s, int) and s > 0 for s in sizes) or x.dtype not in _DTYPES:
        return None
    found = []
    given = (_each(kernel, dims), _each(stride or kernel, dims), _each(padding, dims), _each(dilation, dims))
    for size, k, s, p, d in zip(sizes, *given, strict=True):
        out = (size + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (out - 1) * s >= size + p:
            out -= 1  # a window must not begin in the padding behind
        found.append(_Axis(size, out, k, s, p, d))
    return found if math.prod(a.kernel for a in found) <= WINDOW else None


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _each(value: Any, dims: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _padded(x: Tensor, axes: Sequence[_Axis], fill: float) -> Tensor:
    pads = [n for axis in reversed(axes) for n in axis.pads]
    return functional.pad(x, pads, value=fill) if any(pads) else x


def _shaped(x: Tensor, rank: int, dim: int) -> Tensor:
    """A vector along ``dim`` of a tensor of ``rank``."""
    return x.view([-1 if k == dim else 1 for k in range(rank)])


def max_pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Any:
    """``max_pool2d_with_indices``: the maxima and where they are, the first of equal ones, and NaN before all."""
    axes = _axes(x, kernel, stride, padding, dilation, ceil_mode, 2)
    if axes is None:
        return NotImplemented
    first = x.dim() - 2
    padded = _padded(x, axes, -math.inf)
    best = place = None
    for offsets in itertools.product(*(range(a.kernel) for a in axes)):
        value = padded
        for k, (axis, offset) in enumerate(zip(axes, offsets, strict=True)):
            value = axis.window(value, first + k, offset)
        rows, cols = (axis.position(x, o) for axis, o in zip(axes, offsets, strict=True))
        here = rows[:, None] * axes[1].size + cols
        if best is None or place is None:
            up, left = (torch.where(p < 0, p % a.dilation, p) for a, p in zip(axes, (rows, cols), strict=True))
            best, place = value, (up[:, None] * axes[1].size + left).expand(value.shape)  # if all of it is -inf
            continue
        new = (value > best) | value.isnan()
        best, place = torch.where(new, value, best), torch.where(new, here, place)
    assert best is not None
    assert place is not None
    return best.clone(), place.clone()


def max_pool_backward(
    grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: Tensor
) -> Any:
    """``max_pool2d_with_indices_backward``: every element adds up the windows whose maximum it is."""
    axes = _axes(x, kernel, stride, padding, dilation, ceil_mode, 2)
    if axes is None or any(a.dilation != 1 for a in axes) or math.prod(a.readers for a in axes) > WINDOW:
        return NotImplemented
    first = x.dim() - 2
    rows, cols = (torch.arange(a.size, device=x.device) for a in axes)
    here = rows[:, None] * axes[1].size + cols
    total = None
    for numbers in itertools.product(*(range(a.readers) for a in axes)):
        value, index = grad.float(), indices
        for k, (axis, number) in enumerate(zip(axes, numbers, strict=True)):
            value = axis.reader(value, first + k, number, 0.0)
            index = axis.reader(index, first + k, number, -1)
        term = torch.where(index == here, value, 0.0)
        total = term if total is None else total + term
    assert total is not None
    return total.to(x.dtype)


def _counts(axes: Sequence[_Axis], like: Tensor, include_pad: bool, divisor: int | None) -> Tensor | float:
    """What each average is divided by: a number, or fp32 ``[out_height, out_width]``."""
    if divisor:
        return float(divisor)
    found = []
    for axis in axes:
        start = torch.arange(axis.out, device=like.device) * axis.stride - axis.padding
        stop = (start + axis.kernel).clamp(max=axis.size + (axis.padding if include_pad else 0))
        found.append(stop - (start if include_pad else start.clamp(min=0)))
    rows, cols = found
    whole = all(a.padding == 0 or include_pad for a in axes)
    ends = all((a.out - 1) * a.stride - a.padding + a.kernel <= a.size + a.padding for a in axes)
    if whole and ends:
        return float(math.prod(a.kernel for a in axes))
    return (rows[:, None] * cols).float()


def avg_pool(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    """``avg_pool2d``."""
    axes = _axes(x, kernel, stride, padding, 1, ceil_mode, 2)
    if axes is None:
        return NotImplemented
    first = x.dim() - 2
    padded = _padded(x.float(), axes, 0.0)
    total = None
    for offsets in itertools.product(*(range(a.kernel) for a in axes)):
        value = padded
        for k, (axis, offset) in enumerate(zip(axes, offsets, strict=True)):
            value = axis.window(value, first + k, offset)
        total = value if total is None else total + value
    assert total is not None
    return (total / _counts(axes, x, count_include_pad, divisor_override)).to(x.dtype).clone()


def avg_pool_backward(
    grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None,
) -> Any:  # fmt: skip
    """``avg_pool2d_backward``: every element adds up its share of the windows that hold it."""
    axes = _axes(x, kernel, stride, padding, 1, ceil_mode, 2)
    if axes is None or math.prod(a.readers for a in axes) > WINDOW:
        return NotImplemented
    first = x.dim() - 2
    shares = grad.float() / _counts(axes, x, count_include_pad, divisor_override)
    total = None
    for numbers in itertools.product(*(range(a.readers) for a in axes)):
        value, holds = shares, None
        for k, (axis, number) in enumerate(zip(axes, numbers, strict=True)):
            value = axis.reader(value, first + k, number, 0.0)
            if axis.kernel % axis.stride and number == axis.readers - 1:
                into = (torch.arange(axis.size, device=x.device) + axis.padding) % axis.stride + number * axis.stride
                here = _shaped(into < axis.kernel, x.dim(), first + k)
                holds = here if holds is None else holds & here
        term = value if holds is None else torch.where(holds, value, 0.0)
        total = term if total is None else total + term
    assert total is not None
    return total.to(x.dtype)


def adaptive_avg_pool(x: Tensor, output: Any) -> Any:
    """``_adaptive_avg_pool2d`` to sizes of which the input's are multiples."""
    sizes, wanted = list(x.shape[-2:]), _each(output, 2)
    if not all(isinstance(s, int) and s > 0 and o > 0 and s % o == 0 for s, o in zip(sizes, wanted, strict=True)):
        return NotImplemented
    kernel = [s // o for s, o in zip(sizes, wanted, strict=True)]
    return avg_pool(x, kernel, kernel)


def adaptive_avg_pool_backward(grad: Tensor, x: Tensor) -> Any:
    """Its gradient."""
    sizes, wanted = list(x.shape[-2:]), list(grad.shape[-2:])
    if not all(isinstance(s, int) and s > 0 and o > 0 and s % o == 0 for s, o in zip(sizes, wanted, strict=True)):
        return NotImplemented
    kernel = [s // o for s, o in zip(sizes, wanted, strict=True)]
    return avg_pool_backward(grad, x, kernel, kernel, 0, False, True, None)


def upsample_nearest_backward(
    grad: Tensor, output: Any, size: Sequence[Any], height_scale: float | None = None, width_scale: float | None = None
) -> Any:
    """``upsample_nearest2d_backward`` for whole factors: every element adds up the block that it became."""
    sizes, wanted = list(size[-2:]), list(grad.shape[-2:])
    whole = all(isinstance(s, int) and isinstance(w, int) and s > 0 and w % s == 0
                for s, w in zip(sizes, wanted, strict=True))  # fmt: skip
    if not whole or any(
        f not in (None, w / s) for f, w, s in zip((height_scale, width_scale), wanted, sizes, strict=True)
    ):
        return NotImplemented
    kernel = [w // s for w, s in zip(wanted, sizes, strict=True)]
    return avg_pool(grad, kernel, kernel, divisor_override=1)


def poolings() -> dict[OpOverload, Any]:
    """Operator -> how it is written out."""
    aten = torch.ops.aten
    return {
        aten.max_pool2d_with_indices.default: max_pool,
        aten.max_pool2d_with_indices_backward.default: max_pool_backward,
        aten.avg_pool2d.default: avg_pool,
        aten.avg_pool2d_backward.default: avg_pool_backward,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool_backward,
        aten.upsample_nearest2d_backward.default: upsample_nearest_backward,
    }
