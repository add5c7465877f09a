"""Never hang: every rank tells the others where it is, and a rank that cannot go on ends the others with the reason.

Two daemon threads stand beside the main one. :mod:`dscompile.runtime.beat` talks to the c10d store, and may block when
the store's host is in trouble; :mod:`dscompile.runtime.judge` never touches the store, and decides.

A rank is ended when another one died, raised, said goodbye and is still needed, or runs a program with a different
signature at the same call number. First the connections between the ranks are cut (:mod:`dscompile.runtime.links`), so
that a blocked collective raises and :meth:`Watch.explain` names the reason. If the main thread is still in the same
call ``timeout / 3`` later, the process prints the reason and every thread's stack and exits with
:data:`dscompile.runtime.judge.EXIT_CODE`.

Liveness is heartbeats and the kernel's word, not progress: a rank may compile for as long as it likes. Limits:

- A process that exists but does not run Python for ``10 * timeout`` (stopped, or one C call that keeps the interpreter
  lock) counts as frozen. Where its address cannot be probed (a firewall), silence for ``0.45 * timeout`` is death.
- A rank between programs (compiling, saving) is not interrupted: it ends when it starts the next one. A collective of
  its own that it is blocked in there is cut too, and raises gloo's error: hand that to :meth:`Watch.explain`.
- Ranks that block each other *outside* programs (a barrier that only one of them calls) are alive and agree: no alarm.
- Two ranks whose programs differ, but whose first collectives fit each other, exchange wrong values for up to one beat.
- A rank that dies before it published its first record is only known by the collective that fails: kind ``unknown``.
- If the store is lost alone, ranks still see deaths, but neither different programs nor why a rank raised; a call
  without progress for ``0.45 * timeout`` is then ended.
- Connections are found in ``/proc`` and are TCP (gloo): elsewhere only the last resort remains.
- A process that ends without Python's exit handlers (``multiprocessing`` children) must call :meth:`Watch.stop`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch.distributed as dist

from dscompile.errors import RankError
from dscompile.runtime import findings
from dscompile.runtime.beat import Beat
from dscompile.runtime.board import Board, store_address
from dscompile.runtime.judge import Judge
from dscompile.runtime.links import listens_on
from dscompile.runtime.liveness import Limits, Peer
from dscompile.runtime.progress import Progress
from dscompile.runtime.pulse import Address, Pulse, local_address

log = logging.getLogger(__name__)


class Watch:
    """One rank's side of the watch over a process group. Make it with :meth:`start`."""

    def __init__(self, store: dist.Store, rank: int, ranks: Sequence[int], *, limits: Limits, name: str) -> None:
        world = len(ranks)
        self.rank, self.world, self.name, self.limits = rank, world, name, limits
        self._pid = os.getpid()
        self._store = store  # the server lives as long as its object, and may be needed after the process group's end
        self._stopped = world == 1
        address = store_address(store)
        self._serves_store = address is not None and listens_on(address[1])
        self._pulse = None if self._stopped else _pulse(address)
        self._me = Progress(rank, self._pulse.address if self._pulse is not None else None, self._wake)
        board = Board(store, rank, ranks, name)
        self._peers = {peer: Peer(peer) for peer in board.peers}
        port = address[1] if address is not None else None
        self._beat = Beat(board, self._me, self._peers, limits, store_port=port, changed=lambda: self._judge.wake())
        self._judge = Judge(self._me, self._peers, self._beat, self._pulse, limits)
        self._threads = [
            threading.Thread(target=self._beat.loop, name=f"dscompile watch {name} beat", daemon=True),
            threading.Thread(target=self._judge.loop, name=f"dscompile watch {name} judge", daemon=True),
        ]
        if not self._stopped:
            for thread in self._threads:
                thread.start()
            atexit.register(self._at_exit)

    @staticmethod
    def start(
        store: dist.Store,
        rank: int,
        world: int,
        *,
        timeout: float = 30.0,
        interval: float | None = None,
        name: str = "dp",
        ranks: Sequence[int] | None = None,
    ) -> Watch:
        """Begin to watch, or return the watch of this name that is already running in this process.

        Args:
            store: the process group's c10d store; every rank passes the same one.
            rank: this rank, by the number that messages name it by.
            world: how many there are; one alone is not watched.
            ranks: the numbers of all of them, in order; ``0`` to ``world - 1`` if it is the whole world.
            timeout: seconds within which a rank ends after another one broke.
            interval: seconds between beats; ``min(1, timeout / 20)`` by default.
            name: of the process group; each group has its own watch and counts its own calls. Every rank starts the
                watches of a name equally often.
        """
        return WATCHES.get(store, rank, range(world) if ranks is None else ranks, Limits.of(timeout, interval), name)

    def enter(self, signature: str, label: str) -> None:
        """A run of a program begins: the next call. ``signature`` as of :func:`dscompile.runtime.agree.signature`.

        A program without collectives (``""``) meets no other rank and is not counted. Raises :class:`RankError` if the
        ranks cannot go on.
        """
        me = self._me
        if me.finding is not None:
            raise findings.error_of(me.finding, self.rank, me.record().position())
        me.at = ""
        if signature:
            me.enter(signature, label)

    def at(self, label: str) -> None:
        """The last known place in the program, an FQN for instance."""
        self._me.at = label

    def leave(self) -> None:
        """The run of the program is over, well or not (call it in a ``finally``)."""
        self._me.inside = False

    @contextlib.contextmanager
    def call(self, signature: str, label: str) -> Iterator[None]:
        """Enter and leave; a connection error becomes the named one, any other error is told to the peers."""
        self.enter(signature, label)
        try:
            yield
        except BaseException as error:
            if is_connection_error(error):
                raise self.explain(error) from error
            self.failed(error)
            raise
        finally:
            self.leave()

    def failed(self, error: BaseException) -> None:
        """Tell the peers that this rank ends with ``error``. Returns when the store has it, or after two seconds."""
        if self._me.state != "run" or not self._alive():
            return
        self._me.failure = f"{type(error).__name__}: {error}"[:2000]
        if not isinstance(error, RankError):  # else the ranks know already
            self._me.found(findings.raised(self._me.record()))
        self._me.inside = False
        self._me.state = "failed"
        self._beat.wait_published(max(2.0, 2 * self.limits.interval))

    def explain(self, error: BaseException) -> RankError:
        """The named error behind a failed collective.

        Waits up to ``timeout / 3`` for the evidence, or ``2 / 3`` of it if a peer's process cannot be probed.
        """
        if isinstance(error, RankError):
            return error
        me, position = self._me, self._me.record().position()
        me.inside = False
        me.suspected = True
        share = 1 / 3 if all(peer.probed for peer in self._peers.values()) else 2 / 3
        end = time.monotonic() + share * self.limits.timeout
        while me.finding is None and time.monotonic() < end and self._alive():
            self._wake()
            time.sleep(min(0.05, self.limits.interval))
        if me.finding is not None:
            return findings.error_of(me.finding, self.rank, position)
        self.failed(error)
        seen = "".join(f"\n  {peer.last_seen()}" for peer in self._peers.values())
        return RankError(
            f"a collective failed on rank {self.rank}, and no rank said why: {error}\n"
            f"  rank {self.rank} (this one) was {position}{seen}\n"
            "  Look at the logs of the other ranks, and at the network between them."
        )

    def stop(self) -> None:
        """Say goodbye, so that nobody takes the end of this rank for its death, and end the threads.

        The rank that serves the store waits up to ``timeout / 3`` for the others to finish with it.
        """
        WATCHES.forget(self)
        if not self._alive():
            return
        me = self._me
        me.inside = False
        me.state = "bye" if me.state == "run" else me.state
        self._beat.wait_published(max(2.0, 2 * self.limits.interval))
        if self._serves_store:
            self._wait_for_others()
        self._stopped = True
        atexit.unregister(self._at_exit)
        self._beat.stop()
        self._judge.stop()
        for thread in self._threads:
            thread.join(2.0)  # a beat that is stuck in a dead store is left behind, as a daemon
        if self._pulse is not None:
            self._pulse.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.stop()

    def _wait_for_others(self) -> None:
        end = time.monotonic() + self.limits.last
        finding = self._me.finding
        absent = len(finding.ranks) if finding is not None and finding.kind in ("died", "frozen") else 0
        while self._beat.ended < self.world - absent and self._beat.lost is None and time.monotonic() < end:
            self._beat.wake()
            time.sleep(0.02)

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # what ended the interpreter, if an exception did
        if isinstance(error, BaseException):
            self.failed(error)
        self.stop()

    def _alive(self) -> bool:
        return not self._stopped and os.getpid() == self._pid  # threads do not survive a fork

    def _wake(self) -> None:
        self._beat.wake()
        self._judge.wake()


class Watches:
    """The watches of this process, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Watch] = {}

    def get(self, store: dist.Store, rank: int, ranks: Sequence[int], limits: Limits, name: str) -> Watch:
        """The running watch of this name, or a new one."""
        with self._lock:
            if name not in self._running:
                self._running[name] = Watch(store, rank, ranks, limits=limits, name=name)
            return self._running[name]

    def forget(self, watch: Watch) -> None:
        """The watch is being stopped: the next start makes a new one."""
        with self._lock:
            if self._running.get(watch.name) is watch:
                del self._running[watch.name]


WATCHES = Watches()
"""Threads are the process's resource, whichever program asks for them."""

_MARKS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")


def is_connection_error(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is of a collective that lost its peer, and not the program's own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (RankError, dist.DistError)):
            return True
        if isinstance(seen, RuntimeError) and any(mark in str(seen) for mark in _MARKS):
            return True
        seen = seen.__cause__
    return False


def _pulse(address: Address | None) -> Pulse | None:
    host = local_address(*address) if address is not None else "127.0.0.1"
    try:
        return Pulse(host)
    except OSError as error:
        log.warning("no address to be probed at (%s): the other ranks go by heartbeats alone", error)
        return None
