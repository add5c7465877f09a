"""What an engine says about its run: progress lines, times of its phases, the monitors' values, the collectives."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile.engine.comm_log import CommLog
from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.monitor import Monitor
from dscompile.engine.timers import Throughput, Timers

if TYPE_CHECKING:
    from dscompile.engine.engine import Engine

_LOG = logging.getLogger(__name__)


class Progress:
    """Counts and reports the steps. Lines and metrics come from rank 0; every rank makes one.

    Attributes:
        timers: of the phases ``forward``, ``backward`` and ``step``.
        comm_log: of the collectives, if it is on.
    """

    def __init__(self, config: EngineConfig, rank: int, world: int, device: torch.device) -> None:
        self._logging, self._first, self._world = config.logging, rank == 0, world
        self._monitored = bool(config.monitors)  # on every rank alike: the mean loss is a collective
        self.timers = Timers(config.logging.breakdown, device)
        self.comm_log = CommLog.from_config(config.comms)
        self._monitor = Monitor.from_config(config.monitors, rank=rank)
        self._throughput = Throughput()
        self._losses: list[Tensor] = []
        if self.comm_log is not None:
            self.comm_log.start()

    def timed(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """A block whose time belongs to ``phase``."""
        return self.timers.timed(phase)

    def loss(self, loss: Tensor) -> None:
        """Take note of a micro-batch's loss, if somebody wants it."""
        if self._monitored:
            self._losses.append(loss.detach().float().reshape(()))

    def step(self, engine: Engine) -> None:
        """An optimizer step has ended."""
        self.timers.step_ended()
        self._throughput.step_ended(engine.batch.train)
        if self._monitored:
            self._report(engine)
        every = self._logging.every
        if every is not None and engine.global_steps % every == 0:
            breakdown = self.timers.breakdown()
            if self.timers.enabled:
                times = {f"Train/Samples/elapsed_time_ms_{p}": 1000 * s / every for p, s in breakdown.seconds.items()}
                self._monitor.write(engine.global_samples, times)
            if self._first:
                _LOG.info(self._line(engine) + (f", {breakdown.line()}" if self.timers.enabled else ""))

    def _report(self, engine: Engine) -> None:
        """DeepSpeed's metrics, under its names, by the number of samples."""
        values: dict[str, float | Tensor] = {"Train/Samples/lr": engine.get_lr()[0]}
        if self._losses:
            mean = torch.stack(self._losses).mean()
            if self._world > 1:
                dist.all_reduce(mean)
            values["Train/Samples/train_loss"] = mean / self._world
            self._losses.clear()
        if engine.scaler is not None:
            values["Train/Samples/loss_scale"] = engine.scaler.scale
        self._monitor.write(engine.global_samples, values)

    def _line(self, engine: Engine) -> str:
        parts = [
            f"step={engine.global_steps}",
            f"skipped={engine.skipped_steps}",
            f"lr={engine.get_lr()}",
            f"mom={engine.get_mom()}",
        ]
        if self._logging.throughput and (rate := self._throughput.recent()[0]):
            parts.append(f"samples/s={rate:.3g}")
        if self._logging.memory:
            unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
            parts.append(f"peak={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20):.0f} MiB")
        return ", ".join(parts)

    def close(self) -> None:
        """Write what is left, and stop listening to collectives."""
        self._monitor.close()
        if self.comm_log is not None:
            self.comm_log.stop()
