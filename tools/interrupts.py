"""SIGINT and SIGTERM during a training run: finish the step, or break off a compilation, then save.

A signal must not tear an optimizer step, so it is only remembered, except inside ``at_once()``: there nothing is being
changed, and it raises.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A signal arrived inside ``at_once()``."""


class Interrupts:
    """Handles both signals while it is entered.

    A second signal raises ``KeyboardInterrupt`` wherever it arrives, unless ``patient``: a rank gets one from the
    terminal and one more from its launcher, which also ends it if it takes too long.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.caught: int | None = None
        """Number of the signal that arrived, if one did."""
        self._patient = patient
        self._raises = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise :class:`Interrupted` within this block, or before it if one has arrived."""
        self._raises = True
        try:
            if self.caught is not None:
                raise Interrupted
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            if not self._patient:
                raise KeyboardInterrupt
            return
        self.caught = number
        if self._raises:
            raise Interrupted
