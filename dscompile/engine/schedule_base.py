"""What DeepSpeed's learning-rate schedules have in common: rates as a function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from dscompile.errors import ConfigError


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
            return [number(type(self).__name__, name, value)] * groups
        if len(value) != groups:
            raise ConfigError(f"{type(self).__name__}: {name} has {len(value)} values for {groups} parameter group(s).")
        return [number(type(self).__name__, name, one) for one in value]


def number(owner: str, name: str, value: Any) -> float:
    """A finite number of a configuration. Raises :class:`ConfigError` naming the schedule and the key."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{owner}: {name} must be a finite number, got {value!r}.")
    return float(value)


def count(owner: str, name: str, value: Any) -> int:
    """A positive whole number of a configuration. Raises :class:`ConfigError` naming the schedule and the key."""
    known = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not known or value != int(value) or value <= 0:
        raise ConfigError(f"{owner}: {name} must be a positive whole number, got {value!r}.")
    return int(value)
