"""Automatic garbage collection, off while an engine lives (DeepSpeed's ``disable_python_gc``)."""

from __future__ import annotations

import gc
import weakref


class GcFreeze:
    """Collects once, then turns automatic collection off until ``owner`` is gone or :meth:`restore` is called."""

    def __init__(self, owner: object) -> None:
        gc.collect()
        was_on = gc.isenabled()
        gc.disable()
        self._restore = weakref.finalize(owner, gc.enable if was_on else gc.disable)

    def restore(self) -> None:
        """Put the process's setting back."""
        self._restore()

    @staticmethod
    def collect() -> int:
        """Collect now; returns the number of unreachable objects."""
        return gc.collect()
