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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from dscompile.engine.arguments import accepted, build, check_keys, find_name
from dscompile.errors import ConfigError, UnsupportedError, nearest

_LOG = logging.getLogger(__name__)

CYCLED_BETA2 = 0.99
"""The second beta while ``OneCycle`` moves the first."""


class SchedulerLike(Protocol):
    """What the engine needs of a schedule, DeepSpeed's or PyTorch's."""

    def step(self) -> None:
        """Advance by one optimizer step."""

    def get_last_lr(self) -> list[float]:
        """The rates in use, one a parameter group."""

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""


class Schedule:
    """Rates as a function of the iteration, one a parameter group. Subclasses define :meth:`rates`.

    Attributes:
        optimizer: whose groups are set.
        last_batch_iteration: the iteration of the rates in use; -1 before the first :meth:`step`.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr = [float(group["lr"]) for group in optimizer.param_groups]
        if last_batch_iteration == -1:
            self._use()

    def rates(self, iteration: int) -> list[float]:
        """The rate of each parameter group at an iteration, -1 included."""
        raise NotImplementedError

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Go to the next iteration, or to a given one, and set the optimizer's rates."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._use()

    def get_lr(self) -> list[float]:
        """The rates of the iteration at hand."""
        return self.rates(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """The rates in use."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """The iteration; everything else comes from the configuration."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to a saved iteration and set the optimizer's rates.

        Raises:
            ConfigError: the state is not one of these schedules'.
        """
        if not isinstance(state_dict.get("last_batch_iteration"), int):
            raise ConfigError(
                f"{type(self).__name__}: the saved state has no last_batch_iteration; it has {sorted(state_dict)}."
            )
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        self._use()

    def _use(self) -> None:
        self._last_lr = self.rates(self.last_batch_iteration)
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # a captured or compiled step reads the tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _per_group(self, optimizer: Optimizer, name: str, value: float | Sequence[float]) -> list[float]:
        """One value for each parameter group. Raises :class:`ConfigError` for a list of another length."""
        groups = len(optimizer.param_groups)
        if not isinstance(value, (list, tuple)):
            return [_number(type(self).__name__, name, value)] * groups
        if len(value) != groups:
            raise ConfigError(f"{type(self).__name__}: {name} has {len(value)} values for {groups} parameter group(s).")
        return [_number(type(self).__name__, name, one) for one in value]


class _Warmup(Schedule):
    """The rising part that three schedules share."""

    def __init__(self, optimizer: Optimizer, steps: int, kind: str, last_batch_iteration: int) -> None:
        owner = type(self).__name__
        self.warmup_num_steps = max(2, _count(owner, "warmup_num_steps", steps))
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
        self.total_num_steps = _count(type(self).__name__, "total_num_steps", total_num_steps)
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
        self.total_num_steps = _count(owner, "total_num_steps", total_num_steps)
        self.warmup_min_ratio = _number(owner, "warmup_min_ratio", warmup_min_ratio)
        self.cos_min_ratio = _number(owner, "cos_min_ratio", cos_min_ratio)
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


class LRRangeTest(Schedule):
    """``min * (1 + rate * x)`` with ``x = (i + 1) / step_size``, rounded down with ``staircase``.

    Source: Smith, A disciplined approach to neural network hyper-parameters (2018), section 4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        owner = type(self).__name__
        self.min_lr = self._per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _count(owner, "lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = _number(owner, "lr_range_test_step_rate", lr_range_test_step_rate)
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def rates(self, iteration: int) -> list[float]:
        """The smallest rate at -1."""
        steps = (iteration + 1) / self.step_size
        factor = 1 + self.step_rate * (math.floor(steps) if self.staircase else steps)
        return [low * factor for low in self.min_lr]


class OneCycle(Schedule):
    """One triangle of the rate, the momentum mirrored, then a decay with the inverse of time.

    Up in a straight line over ``cycle_first_step_size``, down over ``cycle_second_step_size`` (by default as long), in
    stairs if their counts are not 0. Afterwards, with ``k`` counted from 1 and ``x = k / decay_step_size``, the rate is
    ``min / (1 + decay_lr_rate * x)`` and the momentum ``max * (1 + decay_mom_rate * x)``; constant where
    ``decay_step_size`` or the respective rate is 0.

    An optimizer without ``betas`` has its momentum left alone, with a warning; see ``cycle_momentum``.

    Source: Smith, A disciplined approach to neural network hyper-parameters (2018), section 4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: float,
        cycle_max_lr: float,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        owner = type(self).__name__
        self.min_lr = _number(owner, "cycle_min_lr", cycle_min_lr)
        self.max_lr = _number(owner, "cycle_max_lr", cycle_max_lr)
        self.decay_lr_rate = _number(owner, "decay_lr_rate", decay_lr_rate)
        self.first = _count(owner, "cycle_first_step_size", cycle_first_step_size)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.second = _count(owner, "cycle_second_step_size", second)
        self.stairs = (
            cycle_first_stair_count,
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count,
        )
        self.decay_step_size = _number(owner, "decay_step_size", decay_step_size)
        self.min_mom = _number(owner, "cycle_min_mom", cycle_min_mom)
        self.max_mom = _number(owner, "cycle_max_mom", cycle_max_mom)
        self.decay_mom_rate = _number(owner, "decay_mom_rate", decay_mom_rate)
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.defaults
        if cycle_momentum and not self.cycle_momentum:
            _LOG.warning(
                "OneCycle: %s has no betas, so its momentum is not cycled; set cycle_momentum to false to say so.",
                type(optimizer).__name__,
            )
        super().__init__(optimizer, last_batch_iteration)

    @property
    def total(self) -> int:
        """Iterations of the triangle."""
        return self.first + self.second

    def height(self, iteration: int) -> float:
        """How far up the triangle an iteration is, 0 to 1."""
        position = (iteration + 1) % self.total
        rising = position <= self.first
        stairs = self.stairs[0 if rising else 1]
        whole = self.first if rising else self.second
        done = position if rising else self.total - position
        if stairs > 0:  # from whole steps: a rounded share could land just under a stair
            return math.floor(done * stairs / whole) / stairs
        return done / whole

    def rates(self, iteration: int) -> list[float]:
        """Equal for every group."""
        if iteration < self.total:
            rate = self.min_lr + (self.max_lr - self.min_lr) * self.height(iteration)
        else:
            rate = self.min_lr / (1 + self._decay(self.decay_lr_rate, iteration))
        return [rate] * len(self.optimizer.param_groups)

    def momentum(self, iteration: int) -> float:
        """The first beta at an iteration."""
        if iteration < 0:
            return self.min_mom
        if iteration < self.total:
            return self.max_mom - (self.max_mom - self.min_mom) * self.height(iteration)
        return self.max_mom * (1 + self._decay(self.decay_mom_rate, iteration))

    def _decay(self, rate: float, iteration: int) -> float:
        return rate * (iteration - self.total + 1) / self.decay_step_size if self.decay_step_size else 0.0

    def _use(self) -> None:
        super()._use()
        if self.cycle_momentum:
            for group in self.optimizer.param_groups:
                group["betas"] = (self.momentum(self.last_batch_iteration), CYCLED_BETA2)


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
    name = find_name("scheduler", kind, (*SCHEDULES, *_OF_TORCH, *_NOT_FROM_FILE))
    if name in _NOT_FROM_FILE:
        raise UnsupportedError(
            f"scheduler {name}: {_NOT_FROM_FILE[name]}; make it yourself and pass it as lr_scheduler=."
        )
    make = SCHEDULES.get(name) or _OF_TORCH[name]
    given = dict(arguments or {})
    check_keys(f"scheduler {name}", given, accepted(make))
    made: Schedule | torch.optim.lr_scheduler.LRScheduler
    made = build(f"scheduler {name}", lambda: make(optimizer, **given), given)
    return made


def _number(owner: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{owner}: {name} must be a finite number, got {value!r}.")
    return float(value)


def _count(owner: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value <= 0:
        raise ConfigError(f"{owner}: {name} must be a positive whole number, got {value!r}.")
    return int(value)


def _warn_short(schedule: _Warmup, total: int) -> None:
    if total < schedule.warmup_num_steps:
        _LOG.warning(
            "%s: total_num_steps %d is less than warmup_num_steps %d: the rate never reaches its peak.",
            type(schedule).__name__,
            total,
            schedule.warmup_num_steps,
        )
