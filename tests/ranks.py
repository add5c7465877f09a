"""Run a test function on N gloo ranks, each its own process: results in rank order, failures with their traceback.

Children are forked from a server that has imported torch and dscompile and warmed them up (:mod:`tests.rank_warm`), so
a rank starts, and compiles, in well under a second. Every child runs one OpenMP thread, has the caller's environment
and an initialised gloo process group, and is killed when the time is up. (What a module reads from the environment at
import, it read at the server's start.)
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

StoreHost = Literal["parent", "rank0"]


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    ``value`` is what the function returned; ``error`` the exception (None if it could not be pickled) and ``trace`` its
    text; ``exitcode`` is negative for a signal; ``stderr`` everything the process wrote there; ``seconds`` from the
    start of the ranks to its end; ``timed_out`` whether it had to be killed.
    """

    rank: int
    value: Any
    error: BaseException | None
    trace: str
    exitcode: int | None
    stderr: str
    seconds: float
    timed_out: bool

    @property
    def ok(self) -> bool:
        return not self.trace and self.exitcode == 0


class RankFailureError(AssertionError):
    """A rank raised, died or had to be killed; the message holds its traceback and the end of its stderr."""


def run_ranks(
    fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60, store: StoreHost = "parent"
) -> list[Any]:
    """Results of ``fn(rank, world, *args)`` on ``world`` gloo ranks, in rank order.

    Args:
        fn: a module-level function (it is pickled by name).
        world: number of processes.
        args: anything that pickles.
        timeout: seconds until the ranks that still run are killed (their Python stacks are shown) and the call fails.
        store: who serves the c10d store.

    Raises:
        RankFailureError: from the first rank's own exception. Once a rank fails the others get five seconds.
    """
    outcomes = rank_outcomes(fn, world, *args, timeout=timeout, grace=5, store=store)
    bad = [o for o in outcomes if not o.ok]
    if bad:
        first = min(bad, key=lambda o: (o.timed_out, o.seconds))
        raise RankFailureError("\n".join(_describe(o) for o in bad)) from first.error
    return [o.value for o in outcomes]


def rank_outcomes(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 60,
    grace: float | None = None,
    store: StoreHost = "parent",
) -> list[Outcome]:
    """As :func:`run_ranks`, but failures are part of the result. ``grace``: seconds the others get after the first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_warm", __name__])
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if store == "parent" else None
    port = server.port if server is not None else _free_port()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        pipes, children = [], []
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            settings = (rank, world, port, server is None and rank == 0, timeout, f"{folder}/{rank}.err", writer)
            with _environment(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"):
                environ = dict(os.environ)  # the server keeps the environment of its own start
                child = context.Process(target=_child, args=(fn, args, environ, *settings), name=f"rank {rank}")
                child.start()
            writer.close()
            pipes.append(reader)
            children.append(child)
        replies, seconds, killed = _collect(children, pipes, began, timeout, grace)
        return [
            Outcome(
                rank,
                *_decode(replies[rank]),
                child.exitcode,
                _read(Path(folder, f"{rank}.err")),
                seconds[rank],
                rank in killed,
            )
            for rank, child in enumerate(children)
        ]


def _collect(
    children: list[Any], pipes: list[Connection], began: float, timeout: float, grace: float | None
) -> tuple[list[bytes | None], list[float], set[int]]:
    replies: list[bytes | None] = [None] * len(children)
    seconds = [0.0] * len(children)
    killed: set[int] = set()
    end = began + timeout
    running = set(range(len(children)))
    while running:
        left = end - time.monotonic()
        watched: list[Any] = [children[r].sentinel for r in running] + [pipes[r] for r in running if replies[r] is None]
        if left <= 0 or not wait(watched, left):
            killed |= running
            for rank in running:
                children[rank].kill()
                children[rank].join()
        for rank in sorted(running):
            if replies[rank] is None and pipes[rank].poll():
                try:
                    replies[rank] = pipes[rank].recv_bytes()
                except EOFError:
                    replies[rank] = b""
            if not children[rank].is_alive():
                children[rank].join()
                seconds[rank] = time.monotonic() - began
                running.discard(rank)
                failed = children[rank].exitcode != 0 or _decode(replies[rank])[2]
                if failed and grace is not None:
                    end = min(end, time.monotonic() + grace)
    return replies, seconds, killed


def _child(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    environ: dict[str, str],
    rank: int,
    world: int,
    port: int,
    host: bool,
    timeout: float,
    stderr: str,
    writer: Connection,
) -> None:
    with open(stderr, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  (lives as long as the process)
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(max(timeout - 1, timeout / 2), file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    try:
        store = dist.TCPStore("127.0.0.1", port, world, is_master=host, timeout=limit, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        reply = (fn(rank, world, *args), None, "")
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        reply = (None, error, traceback.format_exc())
    try:
        data = pickle.dumps(reply)  # not Connection.send: it would share tensors through files of this process
        pickle.loads(data)
    except Exception:
        data = pickle.dumps((None, None, reply[2] or f"the result does not pickle: {type(reply[0]).__name__}"))
    writer.send_bytes(data)
    writer.close()
    faulthandler.cancel_dump_traceback_later()


def _decode(data: bytes | None) -> tuple[Any, BaseException | None, str]:
    value, error, trace = pickle.loads(data) if data else (None, None, "")
    return value, error, trace


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _describe(outcome: Outcome) -> str:
    how = "had to be killed" if outcome.timed_out else f"exit code {outcome.exitcode}"
    return f"rank {outcome.rank} ({how}, {outcome.seconds:.1f} s)\n{outcome.trace}{outcome.stderr[-4000:]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _environment:  # noqa: N801  (reads as a statement)
    """Set environment variables for a moment."""

    def __init__(self, **values: str) -> None:
        self._values = values

    def __enter__(self) -> None:
        self._before = {key: os.environ.get(key) for key in self._values}
        os.environ.update(self._values)

    def __exit__(self, *_: object) -> None:
        for key, value in self._before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
