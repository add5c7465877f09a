"""Functions with several sums of one table, or running sums: ``function(x [A, 4, B], rows, cols)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _batch_norm(training: bool) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Gradients of input, weight and bias; channels are the second dimension. Any mean and scale will do."""

    def function(x: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
        wide = _wide(x)
        weight, mean, spread = _wide(x[0, :, 0]), _wide(x[-1, :, -1]), _wide(x[0, :, 0]).abs() + 0.5
        found = torch.ops.aten.native_batch_norm_backward(
            (wide * 1.5).sin(), wide, weight, mean, spread, mean, spread, training, 1e-5, [True] * 3
        )
        return tuple(f.to(x.dtype) for f in found)

    return function


def _column_sums(x: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
    """Of three rows one program sees everything; the first result is the rows themselves."""
    first = _wide(x)[:3, 0]
    return torch.softmax(first, -1).to(x.dtype), first.sum(0).to(x.dtype), (first * first).sum(0)


def _both_sums(x: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, ...]:
    """A running sum in a kernel that adds up columns as well."""
    running = _wide(x)[:, 0].cumsum(-1)
    return running.to(x.dtype), running.abs().sum(0).to(x.dtype)


SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]]] = {
    "batch_norm": _batch_norm(training=False),
    "batch_norm_training": _batch_norm(training=True),
    "column_sums": _column_sums,
    "cumsum": lambda x, rows, cols: x.cumsum(-1),
    "cumsum_between": lambda x, rows, cols: torch.softmax((_wide(x) / 64).cumsum(-1), -1),
    "cumsum_constant": lambda x, rows, cols: torch.ones_like(x).cumsum(-1) * x,
    "cumsum_mask": lambda x, rows, cols: ((x > 0).cumsum(-1) - 1).masked_fill(x <= 0, 1).to(x.dtype),
    "cumsum_repeated": lambda x, rows, cols: x[..., :1].expand_as(x).cumsum(-1),
    "cumsum_view": lambda x, rows, cols: x.transpose(1, 2).cumsum(-1),
    "cumsum_with_columns": _both_sums,
}
