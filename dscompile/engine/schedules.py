"""Learning-rate schedules by the names of DeepSpeed's configuration, and PyTorch's own by theirs.

Written from what DeepSpeed's *code* computes (its documentation and papers differ in places), value for value:

- ``step()`` follows each optimizer step; iteration ``i`` is ``last_batch_iteration``, -1 before the first call. The
  optimizer's step number ``n`` (from 0) so runs at ``i = n - 1``.
- ``WarmupLR`` warms up along a *logarithm* unless ``warmup_type`` is ``"linear"``, over at least 2 steps; without
  ``warmup_max_lr`` it ends at the first parameter group's rate, for every group.
- ``OneCycle`` is a triangle and then a decay with the inverse of time: not PyTorch's ``OneCycleLR``. It sets ``beta2``
  to 0.99, and before the first ``step()`` ``beta1`` is the *smallest* momentum, though the cycle begins at the largest.

Two things differ on purpose: an unknown ``warmup_type`` is an error where DeepSpeed warns and takes the logarithm, and
``load_state_dict`` puts the rates of the loaded iteration into the optimizer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from dscompile.engine.arguments import accepted, build, check_keys, find_name
from dscompile.engine.schedule_base import Schedule, count, number
from dscompile.engine.schedule_cycles import LRRangeTest, OneCycle
from dscompile.errors import ConfigError, UnsupportedError, nearest

_LOG = logging.getLogger(__name__)


class _Warmup(Schedule):
    """The rising part that three schedules share."""

    def __init__(self, optimizer: Optimizer, steps: int, kind: str, last_batch_iteration: int) -> None:
        owner = type(self).__name__
        self.warmup_num_steps = max(2, count(owner, "warmup_num_steps", steps))
        if kind not in ("log", "linear"):
            raise ConfigError(
                f"{owner}: warmup_type must be 'log' or 'linear', got {kind!r}.{nearest(str(kind), ('log', 'linear'))}"
            )
        self.warmup_type = kind
        super().__init__(optimizer, last_batch_iteration)

    def _risen(self, iteration: int) -> float:
        """Share of the way up at an iteration of the warm-up."""
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(self.warmup_num_steps)
        return iteration / self.warmup_num_steps


class WarmupLR(_Warmup):
    """From ``warmup_min_lr`` to ``warmup_max_lr`` in ``warmup_num_steps``, then constant.

    ``min + (max - min) * g`` with ``g = log(i + 1) / log(W)`` or ``i / W``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        if warmup_max_lr is None:
            warmup_max_lr = float(optimizer.param_groups[0]["lr"])
        self.min_lrs = self._per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group(optimizer, "warmup_max_lr", warmup_max_lr)
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)

    def rates(self, iteration: int) -> list[float]:
        """The smallest rate at -1."""
        if iteration < 0:
            return list(self.min_lrs)
        share = self._risen(iteration) if iteration < self.warmup_num_steps else self._after(iteration)
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _after(self, iteration: int) -> float:
        return 1.0


class WarmupDecayLR(WarmupLR):
    """:class:`WarmupLR`, then in a straight line down to ``warmup_min_lr`` at ``total_num_steps``."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = count(type(self).__name__, "total_num_steps", total_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_short(self, self.total_num_steps)

    def _after(self, iteration: int) -> float:
        return max(0.0, (self.total_num_steps - iteration) / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(_Warmup):
    """Ratios of each group's own rate: up from ``warmup_min_ratio`` to 1, then along a cosine to ``cos_min_ratio``.

    After the warm-up of ``W`` steps the ratio is ``c + (1 - c) * (1 + cos(pi * p)) / 2`` with
    ``p = min(1, (i - W + 1) / (total_num_steps - W))``. Before the first :meth:`step` it is 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        owner = type(self).__name__
        self.total_num_steps = count(owner, "total_num_steps", total_num_steps)
        self.warmup_min_ratio = number(owner, "warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = number(owner, "cos_min_ratio", cos_min_ratio)
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_short(self, self.total_num_steps)

    def rates(self, iteration: int) -> list[float]:
        """Each group's own rate times the ratio."""
        ratio = self.ratio(iteration)
        return [rate * ratio for rate in self.org_lrs]

    def ratio(self, iteration: int) -> float:
        """The ratio to a group's own rate at an iteration."""
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._risen(iteration)
        left = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / left)
        return max(0.0, self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2)


SCHEDULES: Mapping[str, type[Schedule]] = {
    cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle)
}
"""DeepSpeed's schedules by name."""

_NOT_FROM_FILE: Mapping[str, str] = {
    "LambdaLR": "it needs a Python function",
    "MultiplicativeLR": "it needs a Python function",
    "SequentialLR": "it needs other schedules, as objects",
    "ChainedScheduler": "it needs other schedules, as objects",
    "ReduceLROnPlateau": "it needs a measured value at every step, which the engine does not have",
}
_OF_TORCH: Mapping[str, Any] = {
    name: getattr(torch.optim.lr_scheduler, name)
    for name in torch.optim.lr_scheduler.__all__
    if name not in ("LRScheduler", *_NOT_FROM_FILE)
}


def create_schedule(
    kind: str, optimizer: Optimizer, arguments: Mapping[str, Any] | None = None
) -> Schedule | torch.optim.lr_scheduler.LRScheduler:
    """Make the schedule that ``{"type": kind, "params": arguments}`` of a DeepSpeed configuration means.

    Args:
        kind: its name in any case: one of :data:`SCHEDULES`, or of ``torch.optim.lr_scheduler``.
        optimizer: whose rates it sets, from now on.
        arguments: the constructor's keyword arguments.

    Raises:
        ConfigError: an unknown name or key (with the nearest one), or a value out of range.
        UnsupportedError: one of PyTorch's that cannot be made from a file.
    """
    name, make, given = _read(kind, arguments)
    made: Schedule | torch.optim.lr_scheduler.LRScheduler
    made = build(f"scheduler {name}", lambda: make(optimizer, **given), given)
    return made


def check_schedule(kind: str, arguments: Mapping[str, Any] | None = None) -> None:
    """Raise what :func:`create_schedule` would about the name and the keys, before there is an optimizer."""
    _read(kind, arguments)


def _read(kind: str, arguments: Mapping[str, Any] | None) -> tuple[str, Any, dict[str, Any]]:
    """The name, class and constructor arguments that a configuration means; raises if it does not have them."""
    name = find_name("scheduler", kind, (*SCHEDULES, *_OF_TORCH, *_NOT_FROM_FILE))
    if name in _NOT_FROM_FILE:
        raise UnsupportedError(
            f"scheduler {name}: {_NOT_FROM_FILE[name]}; make it yourself and pass it as lr_scheduler=."
        )
    make = SCHEDULES.get(name) or _OF_TORCH[name]
    given = dict(arguments or {})
    check_keys(f"scheduler {name}", given, accepted(make))
    return name, make, given


def _warn_short(schedule: _Warmup, total: int) -> None:
    if total < schedule.warmup_num_steps:
        _LOG.warning(
            "%s: total_num_steps %d is less than warmup_num_steps %d: the rate never reaches its peak.",
            type(schedule).__name__,
            total,
            schedule.warmup_num_steps,
        )
