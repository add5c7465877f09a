"""Start the ranks of a training run on this machine: torchrun's agent, with its reports in our words.

Under ``torchrun`` itself (many machines) nothing of this runs: its workers come here as ranks already.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dscompile.errors import RankError

SHUTDOWN_SECONDS = 30
"""What a rank gets to end after a signal or another rank's failure; then it is killed. So long a signal waits at most
for ranks that still start."""

_HELD_BACK = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_BEGUN = "begun_"


def launch(ranks: int, work: Callable[..., int], *arguments: Any) -> int:
    """Run ``work(*arguments)`` in ``ranks`` new processes and return the exit status.

    ``work`` is a module-level function that reports its own errors and returns an exit status. A rank that fails ends
    the others: with SIGTERM, and with SIGKILL after :data:`SHUTDOWN_SECONDS`. A signal to this process reaches every
    rank; the status is then 128 + its number. No rank outlives this process.

    Raises:
        RankError: a rank ended by a signal, which it could not report itself.
    """
    with (
        tempfile.TemporaryDirectory(prefix="dscompile_") as logs,
        _as_found(),
        _threads(ranks),
        _Signals(Path(logs), ranks) as signals,
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            shutdown_timeout=SHUTDOWN_SECONDS,
            signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours
        )
        try:
            elastic_launch(config, _rank)(signals.begun, work, arguments)
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
            if failure.exitcode > 0:
                return int(failure.exitcode)
            name = signal.Signals(-failure.exitcode).name
            raise RankError(
                f"rank {rank} (process {failure.pid}) was ended by {name}, so the others were ended too. "
                "'dscompile train --resume' goes on from the last checkpoint.",
                kind="died",
                ranks=(rank,),
            ) from None
    return 0


def _rank(begun: Path, work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    """One rank's process. Leaves by its exit status, which the agent compares with 0."""
    for number in _HELD_BACK:  # until the run has handlers of its own
        signal.signal(number, _leave)
    (begun / f"{_BEGUN}{os.getpid()}").touch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks the host name up, which may not resolve
    try:
        status = work(*arguments)
    except Exception:
        traceback.print_exc()
        status = 1
    _ignore_signals()
    if status > 128:
        _end(status)
    if status != 0:
        sys.exit(status)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    _ignore_signals()
    _end(128 + number)


def _end(status: int) -> NoReturn:
    """Exit after a signal, which may have broken off a collective: PyTorch would warn of it as it is unloaded."""
    atexit._run_exitfuncs()  # goodbyes, unfinished saves
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, RuntimeError, ValueError):  # closed, or the signal came while it was written
            stream.flush()
    os._exit(status)


def _ignore_signals() -> None:
    """One from the terminal is followed by the launcher's, which would break off what Python does at exit."""
    for number in _HELD_BACK:
        signal.signal(number, lambda *_: None)  # SIG_IGN would let Python complain of one that is under way


class _Signals:
    """SIGINT and SIGTERM wait until every rank runs :func:`_rank`.

    A new process could only print a traceback: of the import that a signal of its own breaks off, or of what it cannot
    read because this process, broken off while it starts the ranks, has not written it or has removed it.
    """

    def __init__(self, begun: Path, ranks: int) -> None:
        self.begun = begun
        """Where each rank leaves a file as it begins."""
        self._ranks = ranks
        self._waits: int | None = None
        self._until = math.inf
        self._done = threading.Event()
        # Takes the signals that the others block, for Python to handle in the main thread.
        self._thread = threading.Thread(target=self._send_again, name="dscompile signals", daemon=True)
        self._mask: set[int] = set()

    def __enter__(self) -> _Signals:
        for number in _HELD_BACK:
            signal.signal(number, self._handle)
        resource_tracker.ensure_running()  # it would unblock them
        self._thread.start()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)  # a process inherits it
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        self._done.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._until == math.inf:
            self._until = time.monotonic() + SHUTDOWN_SECONDS
        if self._over():
            raise SignalException(f"signal {number}", sigval=signal.Signals(number))
        self._waits = number

    def _over(self) -> bool:
        begun = len(list(self.begun.glob(f"{_BEGUN}*")))
        return begun == self._ranks or time.monotonic() > self._until

    def _send_again(self) -> None:
        while not self._done.wait(0.05):
            if self._waits is not None and self._over():
                number, self._waits = self._waits, None
                os.kill(os.getpid(), number)


@contextmanager
def _as_found() -> Iterator[None]:
    """Keep the agent's log lines off the screen, and put back the signal handlers that it replaces for good."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _threads(ranks: int) -> Iterator[None]:
    """Share the processors among the ranks, unless the user chose a number of threads."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // ranks))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
