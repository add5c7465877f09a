"""What an engine says about its run: progress lines, times of its phases, and the monitors' values."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dscompile.engine.ds_config import EngineConfig

if TYPE_CHECKING:
    from dscompile.engine.engine import Engine

_LOG = logging.getLogger(__name__)


class Progress:
    """Counts and reports one rank's steps. Lines come from rank 0."""

    def __init__(self, config: EngineConfig, rank: int, samples: int) -> None:
        self._logging, self._first, self._samples = config.logging, rank == 0, samples
        self._loss: Tensor | None = None
        self._seconds: dict[str, float] = {}
        self._since, self._steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time inside to a phase's, if phases are reported."""
        if not self._logging.breakdown:
            yield
            return
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def loss(self, loss: Tensor) -> None:
        """Take note of a micro-batch's loss."""
        self._loss = loss.detach()

    def step(self, engine: Engine) -> None:
        """An optimizer step has ended."""
        self._steps += 1
        every = self._logging.every
        if every is None or engine.global_steps % every or not self._first:
            return
        elapsed = time.perf_counter() - self._since
        parts = [
            f"step={engine.global_steps}",
            f"skipped={engine.skipped_steps}",
            f"lr={engine.get_lr()}",
            f"mom={engine.get_mom()}",
        ]
        if self._logging.throughput:
            parts.append(f"samples/s={self._steps * self._samples / elapsed:.3g}")
        if self._logging.memory:
            unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
            parts.append(f"peak={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20):.0f} MiB")
        if self._logging.breakdown:
            parts += [f"{phase}={1000 * s / self._steps:.2f} ms" for phase, s in self._seconds.items()]
        _LOG.info(", ".join(parts))
        self._seconds.clear()
        self._since, self._steps = time.perf_counter(), 0

    def close(self) -> None:
        """Write what is left."""
