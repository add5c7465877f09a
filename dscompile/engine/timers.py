"""Where a step's time goes, and how much is trained in it.

Phases are consecutive, never nested, so their sum and what lies between them (``other``: the user's code, the loader)
is the time of the step. On a GPU each boundary waits for the device: a breakdown costs overlap, so it is off unless
asked for, and then a phase is one call that returns a constant.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dscompile.errors import RunError

Clock = Callable[[], float]
_Mark = tuple[float, int, int]  # seconds, samples and tokens so far
_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Breakdown:
    """Seconds of some steps.

    Attributes:
        steps: how many.
        seconds: of each phase, summed over the steps.
        total: of the steps, from the end of the one before.
    """

    steps: int
    seconds: dict[str, float]
    total: float

    @property
    def other(self) -> float:
        """Seconds outside every phase."""
        return self.total - sum(self.seconds.values())

    def line(self) -> str:
        """Milliseconds a step: each phase, the rest, and the whole."""
        parts = {**self.seconds, "other": self.other, "total": self.total}
        return ", ".join(f"{name}={1000 * value / max(self.steps, 1):.2f} ms" for name, value in parts.items())


class Timers:
    """Times the phases of training steps.

    Args:
        enabled: off, nothing is timed and no device is waited for.
        device: where the work runs; a CUDA device is waited for at each boundary.
        clock: seconds from any origin.
    """

    def __init__(self, enabled: bool, device: torch.device | str = "cpu", *, clock: Clock = time.perf_counter) -> None:
        self.enabled = enabled
        self._device = torch.device(device)
        self._clock = clock
        self._phase: str | None = None
        self._began = 0.0
        self._since: float | None = None
        self._steps = 0
        self._seconds: dict[str, float] = {}
        self._total = 0.0

    def timed(self, phase: str) -> contextlib.AbstractContextManager[None]:
        """A block whose time belongs to ``phase``."""
        return self._block(phase) if self.enabled else _NOTHING

    @contextlib.contextmanager
    def _block(self, phase: str) -> Iterator[None]:
        self.start(phase)
        try:
            yield
        finally:
            self.stop(phase)

    def start(self, phase: str) -> None:
        """A phase begins. Raises :class:`RunError` inside another one."""
        if not self.enabled:
            return
        if self._phase is not None:
            raise RunError(f"timers: phase {phase!r} begins inside phase {self._phase!r}; phases do not nest.")
        self._phase, self._began = phase, self._now()
        if self._since is None:
            self._since = self._began

    def stop(self, phase: str) -> None:
        """The phase ends. Raises :class:`RunError` if it is not the one that began."""
        if not self.enabled:
            return
        if self._phase != phase:
            raise RunError(f"timers: phase {phase!r} ends, but the phase that began is {self._phase!r}.")
        self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - self._began
        self._phase = None

    def step_ended(self) -> None:
        """An optimizer step is over; the next one begins."""
        if not self.enabled:
            return
        now = self._now()
        self._steps += 1
        self._total += now - (self._since if self._since is not None else now)
        self._since = now

    def breakdown(self) -> Breakdown:
        """Of the steps since the last call. Empty if the timers are off."""
        found = Breakdown(self._steps, self._seconds, self._total)
        self._steps, self._seconds, self._total = 0, {}, 0.0
        return found

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


class Throughput:
    """Samples and tokens a second, of all ranks if their sums are given.

    Args:
        warmup: steps that do not count (they compile).
        window: steps of the recent rate.
        clock: seconds from any origin.
    """

    def __init__(self, warmup: int = 1, window: int = 50, *, clock: Clock = time.perf_counter) -> None:
        self.steps = 0
        self._warmup, self._clock = warmup, clock
        self._samples, self._tokens = 0, 0
        self._marks: deque[_Mark] = deque(maxlen=window + 1)
        self._first: _Mark | None = None

    def step_ended(self, samples: int, tokens: int = 0) -> None:
        """An optimizer step on so many samples, and tokens where that means something, is over."""
        self.steps += 1
        self._samples += samples
        self._tokens += tokens
        if self.steps < self._warmup:
            return
        mark = (self._clock(), self._samples, self._tokens)
        if self._first is None:
            self._first = mark
        self._marks.append(mark)

    def overall(self) -> tuple[float, float]:
        """(samples, tokens) a second since the warm-up; zeros before a counted step."""
        return self._rate(self._first)

    def recent(self) -> tuple[float, float]:
        """(samples, tokens) a second over the last ``window`` steps; zeros before a counted step."""
        return self._rate(self._marks[0] if self._marks else None)

    def _rate(self, first: _Mark | None) -> tuple[float, float]:
        if first is None or self._marks[-1][0] <= first[0]:
            return 0.0, 0.0
        seconds = self._marks[-1][0] - first[0]
        return (self._marks[-1][1] - first[1]) / seconds, (self._marks[-1][2] - first[2]) / seconds
