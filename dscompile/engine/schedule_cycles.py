"""Schedules that move the rate to find its range, or in one cycle: ``LRRangeTest`` and ``OneCycle``.

Source: Smith, A disciplined approach to neural network hyper-parameters (2018), section 4.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch.optim import Optimizer

from dscompile.engine.schedule_base import Schedule, count, number

_LOG = logging.getLogger(__name__)

CYCLED_BETA2 = 0.99
"""The second beta while ``OneCycle`` moves the first."""


class LRRangeTest(Schedule):
    """``min * (1 + rate * x)`` with ``x = (i + 1) / step_size``, rounded down with ``staircase``."""

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
        self.step_size = count(owner, "lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = number(owner, "lr_range_test_step_rate", lr_range_test_step_rate)
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
        self.min_lr = number(owner, "cycle_min_lr", cycle_min_lr)
        self.max_lr = number(owner, "cycle_max_lr", cycle_max_lr)
        self.decay_lr_rate = number(owner, "decay_lr_rate", decay_lr_rate)
        self.first = count(owner, "cycle_first_step_size", cycle_first_step_size)
        second = cycle_first_step_size if cycle_second_step_size is None else cycle_second_step_size
        self.second = count(owner, "cycle_second_step_size", second)
        self.stairs = (
            cycle_first_stair_count,
            cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count,
        )
        self.decay_step_size = number(owner, "decay_step_size", decay_step_size)
        self.min_mom = number(owner, "cycle_min_mom", cycle_min_mom)
        self.max_mom = number(owner, "cycle_max_mom", cycle_max_mom)
        self.decay_mom_rate = number(owner, "decay_mom_rate", decay_mom_rate)
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
