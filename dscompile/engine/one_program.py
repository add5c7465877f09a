"""``train_batch`` through the step entry: each micro-batch's forward and backward pass as one program.

Where a model cannot be one program, it runs as frames, on every rank alike: before a program runs for the first time,
all ranks compile theirs and agree that all could. A rank never falls back alone, since the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dscompile.config import Config
from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.outputs import call_with, loss_in
from dscompile.errors import RunError, UnsupportedError
from dscompile.report import GraphReport, announce
from dscompile.step_frame import StepFrame

LossFunction = Callable[[Any, Any], Tensor]


def _loss(model: nn.Module, loss_fn: LossFunction | None, batch: Any) -> Tensor:
    """The loss of one micro-batch, as :meth:`WholeSteps.train_batch` says."""
    if loss_fn is None:
        return loss_in(call_with(model, batch))
    inputs, labels = batch
    return loss_in(loss_fn(model(inputs), labels))


def why_not(config: EngineConfig) -> str:
    """Why an engine's micro-batches run as frames whatever the model; ``""`` if they need not."""
    if not config.compiler.step_entry:
        return "step_entry is off"
    if config.autocast is not None:
        return "autocast covers the model and not the loss"
    if config.logging.breakdown:
        return "wall_clock_breakdown times forward and backward apart"
    return ""


class OneProgram:
    """The programs of an engine's micro-batches, and why there are none, if so.

    Attributes:
        reason: why micro-batches run as frames; ``""`` while they run as one program.
        runs: micro-batches that ran as one program.
    """

    def __init__(self, model: nn.Module, config: Config, world: int, device: torch.device, reason: str) -> None:
        self.reason, self.runs = reason, 0
        self._world, self._device, self._config = world, device, config
        self._frame = StepFrame(model, _loss, config)
        self._agreed: set[Any] = set()

    def run(self, loss_fn: LossFunction | None, batch: Any, *, local: bool, scale: float, share: int) -> Tensor | None:
        """Forward and backward of one micro-batch.

        Args:
            loss_fn: of the model's outputs and the labels, or None where the model returns its loss.
            batch: one micro-batch.
            local: whether gradients are accumulated without reducing them. The caller opens ``no_sync``.
            scale: what gradients are multiplied by.
            share: what they are divided by.

        Returns:
            the loss, detached; None if nothing ran, because the micro-batch must run as frames.

        Raises:
            RunError: this rank's later micro-batch cannot be one program, when the other ranks' may be.
        """
        if self.reason:
            return None
        kind = getattr(loss_fn, "__code__", type(loss_fn)), local
        if kind not in self._agreed and not self._agree(loss_fn, batch):
            return None
        self._agreed.add(kind)
        try:
            loss = self._frame(loss_fn, batch, scale=scale, share=share)
        except UnsupportedError as error:
            if self._world > 1:
                raise RunError(
                    f"train_batch: {error} It was one program before, and other ranks may still run theirs, so this "
                    'rank cannot run it otherwise alone. Set "step_entry": false in the section "dscompile".'
                ) from error
            self._fall_back(str(error))
            return None
        self.runs += 1
        return loss

    def _agree(self, loss_fn: LossFunction | None, batch: Any) -> bool:
        """Compile, and find out whether every rank could: a collective."""
        reason = ""
        try:
            self._frame.compile(loss_fn, batch)
        except UnsupportedError as error:
            reason = str(error)
        able = torch.tensor(0 if reason else 1, device=self._device)
        if self._world > 1:
            dist.all_reduce(able, op=dist.ReduceOp.MIN)
        if not able.item():
            self._fall_back(reason or "another rank's step cannot be one program (its own report says why)")
        return not self.reason

    def _fall_back(self, reason: str) -> None:
        self.reason = reason
        summary = self._config.summary
        announce(GraphReport("train_batch", "runs as frames", fallbacks=[reason], summary=summary))
