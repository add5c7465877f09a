"""Never hang: every rank tells the others where it is, and a rank that cannot go on ends the others with the reason.

Two daemon threads beside the main one. The *beat* thread talks to the c10d store, and may block when the store's host
is in trouble: it publishes this rank's record, reads the others' and the shared alarm. The *judge* thread never touches
the store: it decides who is gone, and ends a main thread that stays blocked.

A rank is ended when another one died, raised, said goodbye and is still needed, or runs a program with a different
signature at the same call number. First the connections between the ranks are cut (:mod:`dscompile.runtime.links`), so
that a blocked collective raises and :meth:`Watch.explain` names the reason. If the main thread is still in the same call
``timeout / 3`` later, the process prints the reason and every thread's stack and exits with :data:`EXIT_CODE`.

Liveness is heartbeats and the kernel's word, not progress: a rank may compile for as long as it likes. Limits, on purpose:

- A process that exists but does not run Python for ``10 * timeout`` (stopped, or one C call that keeps the interpreter
  lock) counts as frozen. Where its address cannot be probed (firewall), that limit is ``timeout / 2``.
- Ranks that block each other *outside* programs (a barrier only one of them calls) are alive and agree: no alarm.
- Two ranks whose programs differ but whose first collectives fit each other exchange wrong values for up to one beat.
- If the store dies alone, ranks can still see deaths, but not why a rank raised, nor different programs: then a call
  without progress for ``timeout / 2`` is ended.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import hashlib
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

import torch.distributed as dist

from dscompile.errors import RankError
from dscompile.runtime.agree import compare
from dscompile.runtime.board import Board, Call, Finding, Record, State, store_address
from dscompile.runtime.links import cut, links, listens_on, reverse
from dscompile.runtime.liveness import Limits, Peer
from dscompile.runtime.pulse import Pulse, local_address

log = logging.getLogger(__name__)

EXIT_CODE = 70
"""Of a process whose main thread could not be unblocked (``EX_SOFTWARE`` of sysexits.h)."""

HISTORY = 4096
"""Calls that a rank can be behind another and still be compared with it."""

RECENT = 16
"""Calls in a published record."""


class Watch:
    """One rank's side of the watch over a process group. Make it with :meth:`start`."""

    def __init__(self, store: dist.Store, rank: int, world: int, *, limits: Limits, name: str) -> None:
        self.rank, self.world, self.name, self.limits = rank, world, name, limits
        self._pid = os.getpid()
        self._store = store  # the server lives as long as its object, and may be needed after the process group's end
        # Written by the main thread, without a lock (each is one reference):
        self._pending: deque[tuple[str, str]] = deque()
        self._started = 0
        self._inside = False
        self._at = ""
        self._state: State = "run"
        self._failure = ""
        self._suspected = False
        # Shared, under the lock:
        self._lock = threading.RLock()
        self._history: deque[Call] = deque(maxlen=HISTORY)
        self._unlisted: list[str] = []
        self._listed: set[str] = set()
        self._progress = time.monotonic()
        self._finding: Finding | None = None
        self._found_at = 0.0
        self._found_in = 0
        # Beat thread's, read by the others:
        self._lost: BaseException | None = None
        self._lost_at = 0.0
        self._beat = 0
        self._read_began = 0.0
        self._ended = 0
        self._stop = threading.Event()
        self._wake_beat = threading.Event()
        self._wake_judge = threading.Event()
        self._beaten = threading.Condition()
        address = store_address(store)
        self._store_port = address[1] if address else None
        self._serves_store = address is not None and listens_on(address[1])
        self._board = Board(store, rank, world, name)
        self._peers = {peer: Peer(peer) for peer in self._board.peers}
        self._pulse = _pulse(address)
        self._threads = [
            threading.Thread(target=target, name=f"dscompile watch {name} {role}", daemon=True)
            for role, target in (("beat", self._beat_loop), ("judge", self._judge_loop))
        ]
        if world > 1:
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
    ) -> Watch:
        """Begin to watch, or return the watch of this name that is already running in this process.

        Args:
            store: the process group's c10d store; every rank passes the same.
            rank, world: this rank and how many there are.
            timeout: seconds within which a rank ends after another one broke.
            interval: seconds between beats; at most 1 by default.
            name: of the process group; each group has its own watch and counts its own calls.
        """
        return WATCHES.get(store, rank, world, Limits.of(timeout, interval), name)

    # -- the main thread ---------------------------------------------------------------------------------------------

    def enter(self, signature: str, label: str) -> None:
        """A run of a program begins: the next call. ``signature`` as of :func:`dscompile.runtime.agree.signature`.

        A program without collectives (``""``) meets no other rank and is not counted. Raises :class:`RankError` if the
        ranks cannot go on.
        """
        if self._finding is not None:
            raise self._error(self._finding)
        self._at = ""
        if signature:
            self._pending.append((signature, label))
            self._started += 1
            self._inside = True

    def at(self, label: str) -> None:
        """The last known place in the program, an FQN for instance."""
        self._at = label

    def leave(self) -> None:
        """The run of the program is over, well or not."""
        self._inside = False

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
        """Tell the peers that this rank ends with ``error``. Returns when the store has it, or after two beats."""
        if self._state == "run" and self._alive():
            place = self._record().position()
            self._inside = False
            self._state, self._failure = "failed", f"{type(error).__name__}: {error}"[:2000]
            if not isinstance(error, RankError):  # else the ranks know already
                self._found(Finding("raised", (self.rank,), f"rank {self.rank} raised {self._failure}\n  it was {place}"))
            self._published(max(2.0, 2 * self.limits.interval))

    def explain(self, error: BaseException) -> RankError:
        """The named error behind a failed collective.

        Waits up to ``timeout / 3`` for the evidence (``2 / 3`` where the peers' processes cannot be probed).
        """
        if isinstance(error, RankError):
            return error
        place = self._record().position()
        self._inside = False
        self._suspected = True
        share = 1 / 3 if all(peer.probed for peer in self._peers.values()) else 2 / 3
        end = time.monotonic() + share * self.limits.timeout
        while self._finding is None and time.monotonic() < end and not self._stop.is_set():
            self._wake_beat.set()
            self._wake_judge.set()
            time.sleep(min(0.05, self.limits.interval))
        if self._finding is not None:
            return self._error(self._finding, place)
        self.failed(error)
        where = "".join(f"\n  {self._seen(peer)}" for peer in self._peers.values())
        return RankError(
            f"a collective failed on rank {self.rank}, and no rank said why: {error}\n"
            f"  rank {self.rank} (this one) was {place}{where}\n"
            "  All processes exist, so look at the network between them and at the logs of the other ranks.",
            kind="unknown",
            ranks=(self.rank,),
        )

    def stop(self) -> None:
        """Say goodbye, so that nobody takes the end of this rank for its death, and end the threads.

        The rank that serves the store waits up to ``timeout / 3`` for the others to finish with it.
        """
        WATCHES.forget(self)
        if not self._alive():
            return
        atexit.unregister(self._at_exit)
        self._inside = False
        self._state = "bye" if self._state == "run" else self._state
        self._published(max(2.0, 2 * self.limits.interval))
        end = time.monotonic() + self.limits.last
        gone = len(self._finding.ranks) if self._finding is not None and self._finding.kind in ("died", "frozen") else 0
        while self._serves_store and self._ended < self.world - gone and self._lost is None and time.monotonic() < end:
            self._wake_beat.set()
            time.sleep(0.02)
        self._stop.set()
        self._wake_beat.set()
        self._wake_judge.set()
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

    def _at_exit(self) -> None:
        error = getattr(sys, "last_value", None)  # what ended the interpreter, if an exception did
        if isinstance(error, BaseException):
            self.failed(error)
        self.stop()

    def _alive(self) -> bool:
        return self.world > 1 and not self._stop.is_set() and os.getpid() == self._pid  # a fork leaves threads behind

    def _published(self, seconds: float) -> None:
        """Wait until a beat that began after this moment is complete, the store is lost, or the time is up."""
        end = time.monotonic() + seconds
        with self._beaten:
            target = self._beat + 2  # the beat under way may have made its record already
            while self._beat < target and self._lost is None and (left := end - time.monotonic()) > 0:
                self._wake_beat.set()
                self._beaten.wait(min(left, 0.05))

    # -- records and findings ----------------------------------------------------------------------------------------

    def _fold(self) -> None:
        """Move the main thread's calls into the history, hashing each onto the ones before it."""
        with self._lock:
            while self._pending:
                signature, label = self._pending.popleft()
                before = self._history[-1] if self._history else Call(0, "", "", "")
                chain = hashlib.blake2b(f"{before.chain}/{signature}".encode(), digest_size=8).hexdigest()
                self._history.append(Call(before.number + 1, str(signature), label, chain))
                self._progress = time.monotonic()
                if signature not in self._listed:
                    self._listed.add(signature)
                    self._unlisted.append(signature)

    def _record(self) -> Record:
        with self._lock:
            self._fold()
            length = len(self._history)
            recent = tuple(self._history[i] for i in range(max(0, length - RECENT), length))
            return Record(
                rank=self.rank,
                beat=self._beat,
                state=self._state,
                inside=self._inside,
                at=self._at,
                recent=recent,
                error=self._failure,
                process=f"process {self._pid} on {socket.gethostname()}",
                pulse=self._pulse.address if self._pulse is not None else None,
            )

    def _found(self, finding: Finding) -> None:
        """Keep the first finding, and have it published."""
        with self._lock:
            if self._finding is not None:
                return
            self._finding = finding
            self._found_at = time.monotonic()
            self._found_in = self._started
        self._wake_beat.set()
        self._wake_judge.set()

    def _error(self, finding: Finding, place: str | None = None) -> RankError:
        hint = _HINTS[finding.kind].format(ranks=" and ".join(f"rank {r}" for r in finding.ranks))
        place = self._record().position() if place is None else place
        return RankError(
            f"{finding.text}\n  rank {self.rank} (this one) is {place}\n  {hint}",
            kind=finding.kind,
            ranks=finding.ranks,
        )

    def _seen(self, peer: Peer) -> str:
        if peer.record is None:
            return f"rank {peer.rank} has published nothing yet"
        return f"rank {peer.rank} was last seen {peer.record.position()}"

    # -- the beat thread ---------------------------------------------------------------------------------------------

    def _beat_loop(self) -> None:
        done = False
        while not self._stop.is_set():
            self._wake_beat.clear()
            try:
                self._exchange()
                if not done and self._state != "run":
                    done = True
                    self._board.end()
                if done and self._serves_store:
                    self._ended = self._board.ended()
            except Exception as error:  # whatever the store raises: DistStoreError, DistNetworkError, RuntimeError
                with self._beaten:
                    self._lost, self._lost_at = error, time.monotonic()
                    self._beaten.notify_all()
                self._wake_judge.set()
                if self._state == "run":
                    log.warning("rank %d lost the store that the ranks watch each other through: %s", self.rank, error)
                return
            with self._beaten:
                self._beat += 1
                self._beaten.notify_all()
            self._wake_beat.wait(self.limits.interval)

    def _exchange(self) -> None:
        """One beat: listings, this rank's record, the others' records, the alarm; after a finding, the connections."""
        record = self._record()
        with self._lock:
            new, self._unlisted = self._unlisted, []
        for signature in new:  # before the record that names them
            if texts := getattr(signature, "texts", ()):
                self._board.list_texts(signature, texts)
        self._board.publish(record)
        now = time.monotonic()
        for rank, theirs in self._board.read().items():
            elapsed = min(now - self._read_began, 2 * self.limits.interval) if self._read_began else 0.0
            self._peers[rank].heard(theirs, elapsed)
            if self._finding is None and (finding := self._differs(record, theirs)):
                self._found(finding)
        self._read_began = now
        first = self._board.alarm(self._finding)
        if first is not None:
            with self._lock:
                if self._finding is not None:
                    self._finding = first  # the first finding of any rank is nearest to the cause
            self._found(first)
            skip = () if self._store_port is None else (self._store_port,)
            mine = links(skip)
            cut(mine & {reverse(link) for link in self._board.exchange_links(mine)})

    def _differs(self, mine: Record, theirs: Record) -> Finding | None:
        """Compare the newest call that both have made, and find the first one that differs."""
        with self._lock:
            own = {call.number: call for call in _between(self._history, theirs.recent)}
        common = [(own[call.number], call) for call in theirs.recent if call.number in own]
        if not common or common[-1][0].chain == common[-1][1].chain:
            return None
        a, b = next(((a, b) for a, b in common if a.signature != b.signature), common[0])
        names = (f"rank {mine.rank}", f"rank {theirs.rank}")
        lines = [f"{names[0]} and {names[1]} run different programs at call {a.number}:"]
        lines += [f"  {name} runs {c.label!r} (signature {c.signature})" for name, c in zip(names, (a, b), strict=True)]
        if a.signature == b.signature:
            lines[0] = f"{names[0]} and {names[1]} have run different programs before call {a.number}:"
        else:
            listings = self._board.texts(a.signature), self._board.texts(b.signature)
            if listings[0] is not None and listings[1] is not None:
                lines += [f"  {line}" for line in compare(listings[0], listings[1], names=names).splitlines()]
        lines += [f"  {name} is {record.position()}" for name, record in zip(names, (mine, theirs), strict=True)]
        return Finding("differs", (mine.rank, theirs.rank), "\n".join(lines))

    # -- the judge thread --------------------------------------------------------------------------------------------

    def _judge_loop(self) -> None:
        while not self._stop.is_set():
            self._wake_judge.clear()
            self._fold()
            if self._pulse is not None:
                self._pulse.serve()
            if self._finding is None:
                finding = self._inspect(time.monotonic())
                if finding is not None:
                    self._found(finding)
            elif self._blocked() and time.monotonic() - self._found_at > self.limits.last:
                self._end_process(self._finding)
            self._wake_judge.wait(self.limits.interval)
        for peer in self._peers.values():
            peer.close()

    def _inspect(self, now: float) -> Finding | None:
        suspected = self._suspected or self._lost is not None
        if self._state != "run":
            return None
        for peer in self._peers.values():
            record = peer.record
            if record is None:
                continue
            if record.state == "bye":
                if self._suspected or (self._inside and self._started > record.calls):
                    return Finding(
                        "left",
                        (peer.rank,),
                        f"rank {peer.rank} has left after call {record.calls}; it ended without an error",
                    )
                continue
            if record.state == "failed":  # it has set the alarm; without a store its last record is all there is
                if self._lost is not None:
                    return Finding("raised", (peer.rank,), f"rank {peer.rank} raised {record.error}\n  {self._seen(peer)}")
                continue
            verdict = peer.judge(now, self.limits, suspected=suspected)
            if verdict == "frozen" or (verdict == "gone" and self._certain(peer, now)):
                return self._gone(peer, record, verdict)
        stuck = self._inside and now - max(self._progress, self._lost_at) > self.limits.silence
        if self._lost is not None and stuck:
            return Finding("store", (), f"the store that the ranks watch each other through is lost: {self._lost}")
        return None

    def _certain(self, peer: Peer, now: float) -> bool:
        """Whether a rank whose process is gone did not just end well.

        With the store: its record was read again since. Without: this rank stays blocked beside it.
        """
        assert peer.gone_at is not None
        if self._lost is None:
            self._wake_beat.set()
            return self._read_began > peer.gone_at
        return self._suspected or (self._inside and now - max(peer.gone_at, self._progress) > self.limits.settle)

    def _gone(self, peer: Peer, record: Record, verdict: str) -> Finding:
        if verdict == "frozen":
            what = f"rank {peer.rank} is frozen: {record.process} exists but has not run for {peer.silent:.0f} s"
        elif peer.probed:
            what = f"rank {peer.rank} has died: {record.process} is gone"
        else:
            what = f"rank {peer.rank} has died or cannot be reached: {record.process} was silent for {peer.silent:.0f} s"
        if self._lost is not None:
            what += f", and so is the store ({str(self._lost).splitlines()[0]})"
        kind = "frozen" if verdict == "frozen" else "died"
        return Finding(kind, (peer.rank,), f"{what}\n  {self._seen(peer)}")

    def _blocked(self) -> bool:
        return self._inside and self._started == self._found_in

    def _end_process(self, finding: Finding) -> None:
        """The last resort: the main thread is in C++ and cannot be made to raise."""
        message = f"{self._error(finding)}\n  The main thread did not come back from its collective; exit {EXIT_CODE}.\n"
        with contextlib.suppress(Exception):
            sys.stderr.write(f"dscompile: RankError: {message}")
            faulthandler.dump_traceback(all_threads=True)
            sys.stderr.flush()
        os._exit(EXIT_CODE)


class Watches:
    """The watches of this process, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Watch] = {}

    def get(self, store: dist.Store, rank: int, world: int, limits: Limits, name: str) -> Watch:
        """The running watch of this name, or a new one."""
        with self._lock:
            watch = self._running.get(name)
            if watch is None:
                watch = self._running[name] = Watch(store, rank, world, limits=limits, name=name)
            return watch

    def forget(self, watch: Watch) -> None:
        """The watch is being stopped: the next start makes a new one."""
        with self._lock:
            if self._running.get(watch.name) is watch:
                del self._running[watch.name]


WATCHES = Watches()
"""Threads are the process's resource, whichever program asks for them."""


def is_connection_error(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is a collective's that lost its peer rather than the program's own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (RankError, dist.DistError)):
            return True
        if isinstance(seen, RuntimeError) and any(mark in str(seen) for mark in _MARKS):
            return True
        seen = seen.__cause__
    return False


def _between(history: deque[Call], calls: tuple[Call, ...]) -> Iterator[Call]:
    """The entries of a history (consecutive numbers) with the numbers of ``calls``."""
    if history:
        first = history[0].number
        for call in calls:
            if 0 <= call.number - first < len(history):
                yield history[call.number - first]


def _pulse(address: tuple[str, int] | None) -> Pulse | None:
    host = local_address(*address) if address is not None else "127.0.0.1"
    try:
        return Pulse(host)
    except OSError as error:
        log.warning("no address to be probed at (%s): the other ranks go by heartbeats alone", error)
        return None


_MARKS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")

_HINTS = {
    "died": "Look at the log of {ranks}, and on its machine for the out-of-memory killer (dmesg).",
    "raised": "Its own log has the traceback; the other ranks only ended with it.",
    "differs": "Every rank must run the same sequence of programs: look for a branch, a shape or a data length that "
    "depends on the rank.",
    "left": "Every rank must run the same number of steps: look at the lengths of the data on {ranks} and this one.",
    "frozen": "Look whether {ranks} is stopped (SIGSTOP, a debugger) or sits in one long C call.",
    "store": "The process that served it (rank 0, or torchrun's agent) has probably ended: look at its log.",
}
