"""Where this rank is: written by the main thread in nanoseconds, read by the watching threads; and its finding."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from dscompile.runtime.board import Call, Finding, Record, State
from dscompile.runtime.pulse import Address, network_stack

HISTORY = 4096
"""Calls that a rank can be behind another and still be compared with it."""

RECENT = 16
"""Calls in a published record."""


class Progress:
    """The plain attributes are the main thread's: it writes each in one step, so that no call takes a lock."""

    def __init__(self, rank: int, pulse: Address | None, wake: Callable[[], None]) -> None:
        self.rank = rank
        self.started = 0
        self.inside = False
        self.at = ""
        self.state: State = "run"
        self.failure = ""
        self.suspected = False
        """A collective failed on this rank: some other must be the cause."""
        self.finding: Finding | None = None
        self.found_at = 0.0
        self.found_in = 0
        self.moved_at = time.monotonic()
        """When the judge last saw a new call."""
        self._pulse = pulse
        self._wake = wake
        self._stack = network_stack()
        self._process = f"process {os.getpid()} on {socket.gethostname()}"
        self._pending: deque[tuple[str, str]] = deque()
        self._lock = threading.RLock()
        self._history: deque[Call] = deque(maxlen=HISTORY)
        self._known: set[str] = set()
        self._unlisted: list[str] = []

    def enter(self, signature: str, label: str) -> None:
        """The main thread begins a call."""
        self._pending.append((signature, label))
        self.started += 1
        self.inside = True

    def fold(self) -> None:
        """Move the main thread's calls into the history, hashing each onto the ones before it."""
        with self._lock:
            while self._pending:
                signature, label = self._pending.popleft()
                before = self._history[-1] if self._history else Call(0, "", "", "")
                chain = hashlib.blake2b(f"{before.chain}/{signature}".encode(), digest_size=8).hexdigest()
                self._history.append(Call(before.number + 1, str(signature), label, chain))
                self.moved_at = time.monotonic()
                if signature not in self._known:
                    self._known.add(signature)
                    self._unlisted.append(signature)

    def record(self, beat: int = 0, links: int = 0) -> Record:
        """What to publish now."""
        with self._lock:
            state, inside = self.state, self.inside  # before the calls: a goodbye must not come with too few of them
            self.fold()
            length = len(self._history)
            return Record(
                rank=self.rank,
                beat=beat,
                state=state,
                inside=inside,
                at=self.at,
                recent=tuple(self._history[i] for i in range(max(0, length - RECENT), length)),
                error=self.failure,
                process=self._process,
                stack=self._stack,
                links=links,
                pulse=self._pulse,
            )

    def unlisted(self) -> list[str]:
        """The signatures seen since the last time."""
        with self._lock:
            new, self._unlisted = self._unlisted, []
            return new

    def common(self, theirs: tuple[Call, ...]) -> list[tuple[Call, Call]]:
        """Pairs (this rank's call, ``theirs``) of equal number, as far as the history reaches."""
        with self._lock:
            first = self._history[0].number if self._history else 0
            reached = [c for c in theirs if 0 <= c.number - first < len(self._history)]
            return [(self._history[call.number - first], call) for call in reached]

    def found(self, finding: Finding, *, replace: bool = False) -> None:
        """Keep the first finding, and have it published. ``replace``: another rank was first."""
        with self._lock:
            if self.finding is not None:
                self.finding = finding if replace else self.finding
                return
            self.found_at = time.monotonic()
            self.found_in = self.started
            self.finding = finding
        self._wake()

    def blocked(self) -> bool:
        """Whether the main thread is still in the call it was in when the finding was made."""
        return self.inside and self.started == self.found_in
