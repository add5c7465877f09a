"""Functions that move, pool and normalise images: ``function(x [N, 4, H, W])`` gives tensors, each in a few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten
Function = Callable[[Tensor], Any]


def _max(*how: Any) -> Function:
    """Maxima and where they are; and, of a gradient that the input makes, what each element gets."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        values, places = aten.max_pool2d_with_indices(x, *how)
        return values, places.float(), aten.max_pool2d_with_indices_backward(values + 1, x, *how, places)

    return function


def _max_of_edges(x: Tensor) -> tuple[Tensor, ...]:
    """Windows without a number, and with none that is finite."""
    x = torch.where(x > 1, torch.inf, torch.where(x < -1, torch.nan, -torch.inf))
    values, places = aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1], [1, 1], True)
    return values, places.float()


def _average(*how: Any) -> Function:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        found = aten.avg_pool2d(x, *how)
        return found, aten.avg_pool2d_backward(found * 2, x, *how)

    return function


def _up(mode: str) -> Function:
    return lambda x: functional.interpolate(x, scale_factor=2, mode=mode) + 1


def _norm(x: Tensor) -> tuple[Tensor, ...]:
    """A batch norm in training: result, statistics, new running ones, and the gradients."""
    wide = x if x.dtype is torch.float64 else x.float()
    weight, bias, mean, variance = wide[0, :, 0, 0], wide[-1, :, 0, -1], wide[0, :, -1, 0], wide[0, :, 0, 0].abs() + 1
    found = aten._native_batch_norm_legit_functional(wide, weight, bias, mean, variance, True, 0.1, 1e-3)
    back = aten.native_batch_norm_backward(
        wide.sin(), wide, weight, mean, variance, found[1], found[2], True, 1e-3, [True] * 3
    )
    return (found[0].to(x.dtype), *found[1:], back[0].to(x.dtype), *back[1:])


def _norm_still(x: Tensor) -> Tensor:
    """A batch norm in evaluation, with what follows it."""
    wide = x if x.dtype is torch.float64 else x.float()
    mean, variance = wide[0, :, -1, 0], wide[0, :, 0, 0].abs() + 1
    found = aten._native_batch_norm_legit_no_training(wide, mean, None, mean, variance, 0.1, 1e-3)[0]
    return found.relu().to(x.dtype)


def _whole(x: Tensor) -> tuple[Tensor, ...]:
    """Integer quotients and remainders of all signs, by a number and by a tensor."""
    n = (x * 4).to(torch.int64)
    by = torch.where(n == 0, 3, n.flip(-1))
    by = torch.where(by == 0, -2, by)
    modes = (None, "floor", "trunc")
    found = [torch.div(n, d, rounding_mode=m) for d in (3, -3, by) for m in modes[1:]]
    found += [torch.fmod(n, d) for d in (3, -3, by)] + [torch.remainder(n, d) for d in (3, -3, by)]
    return tuple(f.float() for f in found)


def _rounded(x: Tensor) -> tuple[Tensor, ...]:
    return (
        torch.div(x, 1.5, rounding_mode="trunc"), x.ceil(), x.trunc(), x.floor(), x.sign(),
        functional.hardtanh(x, -0.5, 1.0), functional.relu6(x), functional.leaky_relu(x, 0.1),
    )  # fmt: skip


def _scattered(x: Tensor) -> tuple[Tensor, ...]:
    """Slices of steps 2 and 3 put into a tensor, as the gradient of a strided slice is."""
    length = x.shape[-1]
    base = torch.zeros(*x.shape[:-1], 2 * length + 1, dtype=x.dtype)
    found = torch.slice_scatter(base, x, -1, 1, None, 2)
    return found, torch.slice_scatter(x.repeat(1, 1, 1, 3), x, -1, 0, -1, 3) if length > 1 else found


POOLS: dict[str, Function] = {
    "max_2": _max([2, 2], [2, 2], [0, 0], [1, 1], False),
    "max_3_2_1": _max([3, 3], [2, 2], [1, 1], [1, 1], False),
    "max_3_2_ceil": _max([3, 2], [2, 1], [1, 0], [1, 1], True),
    "max_edges": _max_of_edges,
    "max_dilated": lambda x: tuple(
        v.float() for v in aten.max_pool2d_with_indices(x, [2, 2], [1, 2], [1, 1], [2, 3], False)
    ),
    "average_2": _average([2, 2], [2, 2], [0, 0], False, True, None),
    "average_3_2_1": _average([3, 3], [2, 2], [1, 1], False, True, None),
    "average_3_2_ceil": _average([3, 3], [2, 2], [1, 1], True, True, None),
    "average_without_padding": _average([3, 3], [1, 2], [1, 1], True, False, None),
    "average_by_5": _average([3, 2], [1, 3], [1, 0], False, True, 5),
    "batch_norm": _norm,
    "batch_norm_still": _norm_still,
    "pad": lambda x: (functional.pad(x * 2, (1, 2, 0, 3), value=0.5), functional.pad(x, (-1, 1, 2, -1))),
    "pad_number": lambda x: functional.pad(x.sum().expand(x.shape), (1, 0, 2, 0)) * functional.pad(x, (1, 0, 2, 0)),
    "pad_rows": lambda x: functional.pad(x.sum(-1, keepdim=True).expand(x.shape), (1, 0, 2, 0)) + 1,
    "pad_view": lambda x: functional.pad(x.flatten(), (3, 5)).unflatten(0, (2, -1)).t().contiguous() + 1,
    "pad_twice": lambda x: functional.pad(x, (3, 0)).flatten(2)[..., 3:].reshape(-1) * 2,
    "reflect": lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect") * 2,
    "replicate": lambda x: functional.pad(x, (2, 1, 1, 3), mode="replicate") * 2,
    "flip": lambda x: (x.flip(1, -1) + x, x.flatten(1).flip(1).unflatten(1, (-1, 2)).sum(-1)),
    "roll": lambda x: (x.roll((1, -2), (2, 3)) + 1, x.roll(5) * 2),
    "repeat": lambda x: (x[:, 0].repeat(2, 1, 1, 3) + 1, x[0, 0, 0].repeat(3)),
    "index_select": lambda x: torch.index_select(x, 1, (x[0, :, 0, 0] > 0).long() * 3) + 1,
    "slice_scatter": _scattered,
    "quotients": _whole,
    "rounded": _rounded,
    "histogram": lambda x: (x.histc(5, -1.5, 1.0), (x * 4).to(torch.int64).float().histc(8, 0, 7)),
    "nearest": _up("nearest"),
    "nearest_backward": lambda x: aten.upsample_nearest2d_backward(
        x, list(x.shape[-2:]), [*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2]
    ),
}
"""Images have at least two rows and two columns, both even or not as the case says."""
