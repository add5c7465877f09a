"""Between backward and the optimizer's update: unscale, check, clip, skip. Hooked to the optimizer's own ``step()``.

So ``engine.step()`` and a plain ``optimizer.step()`` do the same. A step whose gradients overflowed is skipped by
removing the gradients: PyTorch's optimizers pass over parameters without one, so neither parameters nor states change.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.host_adam import HostStep
from dscompile.engine.window import Window
from dscompile.errors import ShardingError
from dscompile.precision import GradientReport, LossScaler, finish_gradients

_LOG = logging.getLogger(__name__)


class Finisher:
    """Finishes the gradients of a model before each step of its optimizer.

    Attributes:
        report: of the last step's gradients; None before the first.
        steps: optimizer steps so far, skipped ones included.
        skipped: steps whose gradients were not finite on some rank, so that nothing was updated.
        by_engine: whether ``engine.step()`` is running, which has checked the accumulation window.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        scaler: LossScaler | None,
        window: Window,
        ranks: int,
    ) -> None:
        self._model, self._config, self._scaler, self._window = model, config, scaler, window
        self._sum_over = ranks if config.gradient_sum else 1
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )
        self.report: GradientReport | None = None
        self.steps = 0
        self.skipped = 0
        self.by_engine = False
        self._skip = False

    @property
    def applied(self) -> bool:
        """Whether the last step updated the parameters."""
        return not self._skip

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self.by_engine:
            self._window.check_complete()
        if self._config.all_used:
            self._check_used()
        scale = (self._scaler.scale if self._scaler is not None else 1.0) * self._window.divisor / self._sum_over
        clip = self._config.gradient_clipping
        folded = isinstance(optimizer, HostStep)
        self.report = finish_gradients(self._model.parameters(), scale=scale, max_norm=clip, in_place=not folded)
        if isinstance(optimizer, HostStep):
            optimizer.gradient_factor = self.report.factor
        self._skip = self.report.overflow and self._config.skip_overflow
        if self._scaler is not None:
            self._skip = self._scaler.update(self.report.overflow)
        if self._skip:
            for parameter in self._model.parameters():
                parameter.grad = None
        elif self.report.overflow:
            norm = "infinite" if math.isinf(self.report.norm) else "not a number"
            _LOG.warning("step %d: the gradients' norm is %s; fp32 steps are not skipped", self.steps + 1, norm)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        self.skipped += self._skip
        self._window.reset()

    def _check_used(self) -> None:
        unused = [n for n, p in self._model.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise ShardingError(
                f"parameter {unused[0]}{more}: got no gradient, and zero_optimization.ignore_unused_parameters is "
                "false. Use it in the loss, freeze it, or set the key to true."
            )
