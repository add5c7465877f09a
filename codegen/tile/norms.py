"""Sums, means and variances over dimensions between or around which others are kept, in steps that kernels have.

Of a batch norm's ``[N, C, H, W]``, all elements of a channel are one row where a program can hold them
(:func:`dscompile.codegen.tile.reductions.held_around`): statistics and what follows from them are then one kernel,
which reads every element once. Else each image's channel is a row, and the few results of each channel are combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dscompile.codegen.tile.reductions import held_around

UNROLLED = 16
"""Most elements of a dimension between others that are added one by one."""


def sum_between(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """A sum over dimensions between which, or around which, others are kept, in steps that kernels have.

    A short dimension is added up element by element; of leading and trailing ones (a batch norm's) the trailing ones go
    first. In fp32, rounded once.
    """
    result = dtype or x.dtype
    dims = sorted(d % x.dim() for d in dim or ()) if x.dim() else []
    if not (result.is_floating_point and x.dtype in (torch.float32, torch.float16, torch.bfloat16)):
        return NotImplemented
    wide = [d for d in dims if x.shape[d] != 1]
    kept = [d for d in range(x.dim()) if d not in dims and x.shape[d] != 1]
    if not wide or not kept or max(wide) < min(kept) or min(wide) > max(kept) or held_around(x.shape, dims):
        return NotImplemented
    inner = [d for d in wide if d > max(kept)]
    if inner and all(d < min(kept) for d in wide if d not in inner):
        outer = [d for d in wide if d not in inner]
        found = _over_outer(x.sum(inner, keepdim=True, dtype=torch.float32), outer)
    elif len(wide) == 1 and _short(x, wide[0]):
        found = _added_up(x, wide[0])
    else:
        return NotImplemented
    return (found if keepdim else found.squeeze(dims)).to(result)


def var_mean(
    x: torch.Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean in two steps that a kernel makes in one: about the mean, in fp32.

    Around kept dimensions that no program holds, the means and squares of equal parts are combined (Chan, Golub and
    LeVeque, 1979), so that every element is read once.
    """
    dims = list(range(x.dim())) if dim is None else sorted(d % x.dim() for d in dim)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = 1
    for d in dims:
        count *= x.shape[d]
    mean, squares = _combined(wide, dims) or _centred(wide, dims)
    variance = squares / (count - (1 if correction is None else correction))
    if not keepdim:
        mean, variance = mean.squeeze(dims), variance.squeeze(dims)
    return variance.to(x.dtype), mean.to(x.dtype)


def _centred(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and sum of squares about it; dimensions stay."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return mean, (centred * centred).sum(dims, keepdim=True)


def _combined(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same by way of each part's own, where kept dimensions stand between reduced ones; else None."""
    kept = [d for d in range(x.dim()) if d not in dims and x.shape[d] != 1]
    inner = [d for d in dims if kept and d > max(kept) and x.shape[d] != 1]
    outer = [d for d in dims if kept and d < min(kept) and x.shape[d] != 1]
    if not inner or not outer or held_around(x.shape, dims) or x.dtype is not torch.float32:
        return None
    parts, each = 1, 1
    for d in outer:
        parts *= x.shape[d]
    for d in inner:
        each *= x.shape[d]
    means, squares = _centred(x, inner)
    mean = _over_outer(means, outer) / parts
    apart = means - mean
    return mean, _over_outer(squares, outer) + _over_outer(apart * apart, outer) * each


def _over_outer(x: torch.Tensor, outer: list[int]) -> torch.Tensor:
    """A sum over leading dimensions, which stay."""
    return _added_up(x, outer[0]) if len(outer) == 1 and _short(x, outer[0]) else x.sum(outer, keepdim=True)


def _short(x: torch.Tensor, dim: int) -> bool:
    return isinstance(x.shape[dim], int) and x.shape[dim] <= UNROLLED


def _added_up(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a short dimension, which is kept, as additions: a kernel of its readers takes them in."""
    parts = [part.float() for part in torch.split(x, 1, dim)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
