"""One model's saves: the handle of each, and the one that is under way in the background."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dscompile.engine.checkpoint_plan import Plan
from dscompile.engine.checkpoint_stage import HostBuffer
from dscompile.engine.checkpoint_state import unwrap
from dscompile.errors import CheckpointError

_LOG = logging.getLogger(__name__)
_KEY = "_dscompile_saver"
_EXIT_SECONDS = 30.0  # what a program waits for ranks that died


class SaveHandle:
    """One save. A synchronous one is complete; an asynchronous one goes on in a thread of its own.

    Attributes:
        path: where the checkpoint is, or will be.
        blocked_seconds: how long training waited for it so far: in the call, and before an optimizer step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocked_seconds = 0.0
        self._staged, self._done = threading.Event(), threading.Event()
        self._error: CheckpointError | None = None
        self._raised = False

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed, once it has ended."""
        return self._error

    def set_staged(self) -> None:
        """All values are copied (or will never be): training may change them."""
        self._staged.set()

    def end(self, error: CheckpointError | None = None) -> None:
        """The save has ended, well or with an error."""
        self._error = self._error or error
        self._staged.set()
        self._done.set()

    def staged(self) -> bool:
        """Whether values may change."""
        return self._staged.is_set()

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait_staged(self) -> None:
        """Wait until values may change: the checkpoint holds those of the moment of the call."""
        start = time.perf_counter()
        self._staged.wait()
        self.blocked_seconds += time.perf_counter() - start

    def wait_ended(self, timeout: float | None = None) -> bool:
        """Wait for the end, well or not; whether it came within ``timeout`` seconds."""
        return self._done.wait(timeout)

    def wait(self, timeout: float | None = None) -> Path:
        """Wait for the end; ``timeout`` in seconds.

        Raises:
            CheckpointError: the save failed (the checkpoint before it is intact), or the time is up.
        """
        if not self._done.wait(timeout):
            raise CheckpointError(f"{self.path}: not saved yet after {timeout:g} s.")
        if self._error is not None:
            self._raised = True
            raise self._error
        return self.path

    def untold(self) -> CheckpointError | None:
        """Why it failed, if :meth:`wait` has not raised it."""
        return None if self._raised else self._error


class Saver:
    """What one model's saves share: host buffer, plan, and the one under way. Not copied or pickled with the model."""

    def __init__(self) -> None:
        self.buffer = HostBuffer()
        self.plan: Plan | None = None
        self._pending: SaveHandle | None = None
        self._undo: list[Callable[[], Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Saver, ()

    def settle(self) -> None:
        """Wait for the save under way, if any. Raises its error."""
        handle, self._pending = self._pending, None
        if handle is None:
            return
        start = time.perf_counter()
        handle.wait_ended()
        waited = time.perf_counter() - start
        if waited > 0.1:
            _LOG.warning("waited %.1f s for the asynchronous save of %s to end", waited, handle.path)
        for undo in self._undo:
            undo()
        self._undo = []
        if handle.error is not None:
            raise handle.error

    def begin(self, handle: SaveHandle, run: Callable[[], None]) -> None:
        """Run a save in a thread. Optimizer steps wait until it has copied, the interpreter's exit until it ends."""
        self._pending = handle
        hook = register_optimizer_step_pre_hook(lambda *_: None if handle.staged() else handle.wait_staged())

        def at_exit() -> None:
            if not handle.wait_ended(_EXIT_SECONDS):
                _LOG.error("%s: not complete %g s after the end of the program", handle.path, _EXIT_SECONDS)
            elif (error := handle.untold()) is not None:
                _LOG.error("%s", error)

        atexit.register(at_exit)
        self._undo = [hook.remove, lambda: atexit.unregister(at_exit)]
        threading.Thread(target=run, name="dscompile save", daemon=True).start()


def saver_of(model: nn.Module) -> Saver:
    """The saver of a model, made at its first save."""
    return cast(Saver, unwrap(model).__dict__.setdefault(_KEY, Saver()))
