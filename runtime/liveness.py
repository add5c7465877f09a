"""What one rank knows of another, and whether the other still lives.

Silence is not death: a rank that compiles or sorts for minutes beats late. The order of evidence is: its own goodbye or
failure; its process is gone (:mod:`dscompile.runtime.pulse`); only where that cannot be asked, silence.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from dscompile.runtime.board import Record
from dscompile.runtime.links import Link
from dscompile.runtime.pulse import Probe, is_loopback, network_stack

Verdict = Literal["alive", "gone", "frozen"]


@dataclass(frozen=True, slots=True)
class Limits:
    """All in seconds, from one ``timeout``: the time within which a rank ends after another one broke.

    ``interval`` between beats; ``quiet``: silence after which the process is probed; ``silence``: after which a rank
    that cannot be probed counts as gone; ``frozen``: after which one that exists but never beats does; ``probe``: to
    connect; ``settle``: how long a rank stays blocked beside one that is gone before it is ended (gloo should raise by
    itself); ``last``: how long the main thread may stay blocked after a finding before the process is ended.
    """

    timeout: float
    interval: float
    quiet: float
    silence: float
    frozen: float
    probe: float
    settle: float
    last: float

    @staticmethod
    def of(timeout: float, interval: float | None = None) -> Limits:
        """The limits that keep ``silence + last`` and every other path below ``timeout``."""
        beat = min(1.0, timeout / 20) if interval is None else interval
        return Limits(
            timeout=timeout,
            interval=beat,
            quiet=max(timeout / 6, 3 * beat),
            silence=0.45 * timeout,
            frozen=10 * timeout,
            probe=min(2.0, timeout / 15),
            settle=timeout / 10,
            last=timeout / 3,
        )


class Peer:
    """Another rank: its newest record, how long it has been silent, and a probe of its process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.record: Record | None = None
        self.silent = 0.0
        self.gone_at: float | None = None
        self.probed: bool | None = None
        """Whether its process can be probed (None: not tried yet). Only then a refusal means death."""
        self.links: set[Link] = set()
        """Its connections, in version ``links_version``."""
        self.links_version = 0
        self._probe: Probe | None = None
        self._fresh_at = 0.0

    def heard(self, record: Record, seconds: float) -> bool:
        """Take a record that was read ``seconds`` after the last one; True if it is the first.

        Silence counts the time in which *we* looked, so that our own pauses do not make others look dead.
        """
        first = self.record is None
        fresh = self.record is None or record.beat != self.record.beat
        self.silent = 0.0 if fresh else self.silent + seconds
        self._fresh_at = time.monotonic() if fresh else self._fresh_at
        self.record = record
        return first

    def last_seen(self) -> str:
        """Its position at its last beat, for people."""
        if self.record is None:
            return f"rank {self.rank} has published nothing yet"
        age = time.monotonic() - self._fresh_at
        return f"rank {self.rank}, at its last beat {age:.1f} s ago, was {self.record.position()}"

    def judge(self, now: float, limits: Limits, *, suspected: bool) -> Verdict:
        """Whether it lives. ``suspected``: a collective failed or the store is gone, so ask without waiting."""
        record = self.record
        if record is None or record.state == "bye":
            return "alive"
        if self.probed is None:
            self.probed = self._reachable(record, limits)
        if not suspected and self.silent < limits.quiet:
            self.close()
            self.gone_at = None
            return "alive"
        gone = not self._ask(record, limits) if self.probed else self.silent >= limits.silence
        if not gone:
            self.gone_at = None
            return "frozen" if self.silent >= limits.frozen else "alive"
        self.gone_at = now if self.gone_at is None else self.gone_at
        return "gone"

    def close(self) -> None:
        """Drop the probe's connection."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _reachable(self, record: Record, limits: Limits) -> bool:
        if record.pulse is None:
            return False
        if record.stack and record.stack == network_stack():
            return True
        return not is_loopback(record.pulse[0]) and self._ask(record, limits)

    def _ask(self, record: Record, limits: Limits) -> bool:
        assert record.pulse is not None
        if self._probe is None:
            self._probe = Probe(record.pulse, limits.probe)
        return self._probe.alive()
