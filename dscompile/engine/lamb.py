"""LAMB for large batches, on whole parameters and on shards.

Source: You et al., Large Batch Optimization for Deep Learning (2020), algorithm 2. Where the paper and DeepSpeed's
kernel differ, DeepSpeed's arithmetic is followed: the averages' bias is corrected in the step size
``lr * sqrt(1 - beta2^t) / (1 - beta1^t)``, not in the direction, so that it stays outside the trust ratio; and the
ratio is clamped to ``[min_coeff, max_coeff]``, and 1 where either norm is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dscompile.collectives import LOG
from dscompile.engine.lamb_kernel import Hyper, LambKernel, Row, fits, lamb_kernel
from dscompile.engine.local_parts import local_parts
from dscompile.errors import ConfigError, UnsupportedError

aten = torch.ops.aten

WORTH = 1 << 20
"""Elements on CPUs from which the C++ kernel is worth the seconds that it takes to build."""


@dataclass(slots=True)
class _Item:
    """One parameter in one step: local tensors, and over which process groups its squared norms add up."""

    param: Tensor
    value: Tensor
    grad: Tensor
    average: Tensor
    square: Tensor
    size: float
    ranks: tuple[dist.ProcessGroup, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a step reads and writes."""
        return self.value, self.grad, self.average, self.square

    @property
    def row(self) -> Row:
        """The same for the kernel."""
        return Row(self.tensors, self.size, not self.ranks)


class Lamb(Optimizer):
    """Adam's direction, scaled for each tensor by the ratio of its norm to the direction's.

    For each tensor ``x`` with gradient ``g``: ``m = beta1 * m + (1 - beta1) * g``,
    ``v = beta2 * v + (1 - beta2) * g * g``, ``u = m / (sqrt(v) + eps) + weight_decay * x`` and
    ``x -= size * clamp(|x| / |u|, min_coeff, max_coeff) * u``.

    The norms of a sharded parameter are those of the whole one: the squares of all parameters are summed over ranks by
    one all-reduce a step (one for each process group that shards any). Every rank must step.

    Args:
        params: parameters or groups; plain tensors or DTensors. Averages have their dtype and placement.
        lr: learning rate.
        bias_correction: correct the averages' bias in the step size.
        betas: decay of the averages.
        eps: added to the root of the second average, or inside it with ``eps_inside_sqrt``.
        eps_inside_sqrt: where ``eps`` stands.
        weight_decay: decoupled from the averages, inside the direction.
        max_coeff: largest trust ratio.
        min_coeff: smallest trust ratio.
        compiled: use the C++ kernel for contiguous fp32 tensors on CPUs; None: if there are :data:`WORTH` elements.

    Raises:
        ConfigError: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        compiled: bool | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ConfigError(
                f"Lamb: lr {lr}, eps {eps} and weight_decay {weight_decay}: none of them may be negative."
            )
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"Lamb: betas must be two numbers in [0, 1), got {tuple(betas)}.")
        if not 0 <= min_coeff <= max_coeff:
            raise ConfigError(f"Lamb: min_coeff {min_coeff} must lie in [0, max_coeff], and max_coeff is {max_coeff}.")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": tuple(betas),
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "compiled": compiled,
        }
        super().__init__(params, defaults)
        if compiled is None:
            # Of whole parameters: what several ranks hold, they must compute alike.
            elements = sum(p.numel() for group in self.param_groups for p in group["params"] if p.device.type == "cpu")
            compiled = elements >= WORTH
        for group in self.param_groups:
            group["compiled"] = compiled if group["compiled"] is None else group["compiled"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss.

        Raises:
            UnsupportedError: a sparse gradient, or a gradient that is not placed as its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [_Work(g, items) for g in self.param_groups if (items := self._items(g))]
        for one in work:
            one.begin()
        _add_ranks(work)
        for one in work:
            one.end()
        return loss

    def _items(self, group: dict[str, Any]) -> list[_Item]:
        items = []
        beta1, beta2 = group["betas"]
        for param in cast(list[Tensor], group["params"]):
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["step"] += 1
            size, step = float(group["lr"]), float(state["step"])
            if group["bias_correction"]:
                size *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
            tensors = (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
            value, grad, average, square = local_parts("Lamb", tensors)
            items.append(_Item(param, value, grad, average, square, size, _shard_groups(param)))
        return items


def _shard_groups(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which a parameter is cut."""
    if not isinstance(param, DTensor):
        return ()
    if any(placement.is_partial() for placement in param.placements):
        raise UnsupportedError(f"Lamb: a parameter of shape {tuple(param.shape)} is an unreduced sum over ranks.")
    return tuple(
        param.device_mesh.get_group(dim) for dim, placement in enumerate(param.placements) if placement.is_shard()
    )


class _Work:
    """One group's items in one step, and what is known of them between its two sweeps."""

    def __init__(self, group: dict[str, Any], items: list[_Item]) -> None:
        self._group = group
        self._kernel = lamb_kernel() if group["compiled"] else None
        # By the whole parameters' sizes: ranks hold different parts, and must agree on the order.
        falling = sorted(items, key=lambda item: -item.param.numel())
        self._fast = [i for i in falling if fits(*i.tensors)] if self._kernel is not None else []
        chosen = set(map(id, self._fast))
        self._slow = [i for i in items if id(i) not in chosen]
        self.items = self._fast + self._slow
        """The items, in the order of ``squares``."""
        self.squares: Tensor
        """``[2, len(items)]`` fp32: squared norms of parameters and directions."""
        inside = bool(group["eps_inside_sqrt"])
        eps = float(group["eps"])
        beta1, beta2 = group["betas"]
        outside = 0.0 if inside else eps
        bounds = (float(group["min_coeff"]), float(group["max_coeff"]))
        self._hyper = Hyper(beta1, beta2, outside, eps - outside, group["weight_decay"], *bounds)
        self._directions: list[Tensor] = []

    def begin(self) -> None:
        """Update the averages and sum this rank's squares; whole parameters that the kernel takes are finished."""
        parts = []
        if self._fast:
            pairs = cast(LambKernel, self._kernel).step([i.row for i in self._fast], self._hyper)
            parts.append(torch.tensor(pairs, dtype=torch.float32).T)
        if self._slow:
            self._directions = _directions(self._group, self._slow)
            values = [*(i.value for i in self._slow), *self._directions]
            norms = torch.stack([norm.float() for norm in aten._foreach_norm.Scalar(values, 2)])
            parts.append(norms.square_().view(2, len(self._slow)))
        self.squares = torch.cat([part.to(parts[-1].device) for part in parts], 1)

    def end(self) -> None:
        """Apply the directions; ``squares`` are those of whole parameters now."""
        sharded = [n for n, item in enumerate(self._fast) if item.ranks]
        if sharded:
            rows = [self._fast[n].row for n in sharded]
            cast(LambKernel, self._kernel).finish(rows, self._hyper, self.squares[:, sharded].T.tolist())
        if self._slow:
            _apply(self._group, self._slow, self._directions, self.squares[:, len(self._fast) :])
        self._directions = []
        for item in self.items:  # written through local tensors, which no version counter of a DTensor sees
            torch.autograd.graph.increment_version(item.param)


def _directions(group: dict[str, Any], items: list[_Item]) -> list[Tensor]:
    """Update the averages; returns each parameter's direction, of its local shape."""
    beta1, beta2 = group["betas"]
    grads, averages = [i.grad for i in items], [i.average for i in items]
    squares = [i.square for i in items]
    aten._foreach_lerp_.Scalar(averages, grads, 1 - beta1)
    aten._foreach_mul_.Scalar(squares, beta2)
    aten._foreach_addcmul_.Scalar(squares, grads, grads, 1 - beta2)
    if group["eps_inside_sqrt"]:
        roots = aten._foreach_add.Scalar(squares, group["eps"])
        aten._foreach_sqrt_(roots)
    else:
        roots = aten._foreach_sqrt(squares)
        aten._foreach_add_.Scalar(roots, group["eps"])
    directions: list[Tensor] = aten._foreach_div.List(averages, roots)
    if group["weight_decay"]:
        aten._foreach_add_.List(directions, [i.value for i in items], alpha=group["weight_decay"])
    return directions


def _add_ranks(work: list[_Work]) -> None:
    """Sum the squares of sharded parameters over the ranks that hold their parts."""
    items = [item for one in work for item in one.items]
    if not any(item.ranks for item in items):
        return
    squares = torch.cat([one.squares for one in work], 1)
    for ranks in dict.fromkeys(ranks for item in items for ranks in item.ranks):
        cut = torch.tensor([n for n, item in enumerate(items) if ranks in item.ranks], device=squares.device)
        total = squares[:, cut].contiguous()
        with LOG.timing("all_reduce", total, ranks.size(), "Lamb"):
            dist.all_reduce(total, group=ranks)
        squares[:, cut] = total
    for one, part in zip(work, squares.split([len(one.items) for one in work], 1), strict=True):
        one.squares = part


def _apply(group: dict[str, Any], items: list[_Item], directions: list[Tensor], squares: Tensor) -> None:
    """``x -= size * ratio * u`` for the items of one group; ``squares`` is ``[2, len(items)]``."""
    weight, direction = squares.sqrt()
    ratio = (weight / direction).clamp_(group["min_coeff"], group["max_coeff"])
    ratio = torch.where((weight > 0) & (direction > 0), ratio, 1.0)
    sizes = torch.tensor([-item.size for item in items], device=ratio.device)
    scales = (ratio * sizes).unbind()
    for item, update, scale in zip(items, directions, scales, strict=True):
        item.value.addcmul_(update, scale.to(update.dtype))
