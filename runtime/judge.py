"""The thread that decides who is gone, and ends a main thread that stays blocked. It never touches the store."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time

from dscompile.runtime import findings
from dscompile.runtime.beat import Beat
from dscompile.runtime.board import Finding
from dscompile.runtime.links import cut, reverse
from dscompile.runtime.liveness import Limits, Peer
from dscompile.runtime.progress import Progress
from dscompile.runtime.pulse import Pulse

EXIT_CODE = 70
"""Of a process whose main thread could not be unblocked (``EX_SOFTWARE`` of sysexits.h)."""


class Judge:
    """One look every ``limits.interval`` seconds, or when woken."""

    def __init__(self, me: Progress, peers: dict[int, Peer], beat: Beat, pulse: Pulse | None, limits: Limits) -> None:
        self._me, self._peers, self._beat, self._pulse, self._limits = me, peers, beat, pulse, limits
        self._stop = False
        self._wake = threading.Event()

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def stop(self) -> None:
        """End the loop."""
        self._stop = True
        self._wake.set()

    def loop(self) -> None:
        """The thread's function."""
        while not self._stop:
            self._wake.clear()
            self._me.fold()
            if self._pulse is not None:
                self._pulse.serve()
            finding = self._me.finding
            if finding is None:
                found = self._inspect(time.monotonic()) if self._me.state == "run" else None
                if found is not None:
                    self._me.found(found)
            else:
                cut({reverse(link) for peer in self._peers.values() for link in peer.links})
                if self._me.blocked() and time.monotonic() - self._me.found_at > self._limits.last:
                    self._end_process(finding)
            self._wake.wait(self._limits.interval)
        for peer in self._peers.values():
            peer.close()

    def _inspect(self, now: float) -> Finding | None:
        me, lost = self._me, self._beat.lost
        for peer in self._peers.values():
            record = peer.record
            if record is None:
                continue
            if record.state == "bye":
                if me.suspected or (me.inside and me.started > record.calls):
                    return findings.left(record)
            elif record.state == "failed":  # its alarm is in the store; without one, its last record is all there is
                if lost is not None:
                    return findings.raised(record)
            else:
                verdict = peer.judge(now, self._limits, suspected=me.suspected or lost is not None)
                if verdict == "frozen":
                    return findings.frozen(peer, record)
                if verdict == "gone" and self._certain(peer, now):
                    return findings.gone(peer, record, lost)
        stuck = me.inside and now - max(me.moved_at, self._beat.lost_at) > self._limits.silence
        return findings.store_lost(lost) if lost is not None and stuck else None

    def _certain(self, peer: Peer, now: float) -> bool:
        """Whether a rank whose process is gone did not just end well.

        With the store: its record was read again since. Without: this rank stays blocked beside it.
        """
        assert peer.gone_at is not None
        if self._beat.lost is None:
            self._beat.wake()
            return self._beat.read_began > peer.gone_at
        return self._me.suspected or (
            self._me.inside and now - max(peer.gone_at, self._me.moved_at) > self._limits.settle
        )

    def _end_process(self, finding: Finding) -> None:
        """The last resort: the main thread is in C++ and cannot be made to raise."""
        error = findings.error_of(finding, self._me.rank, self._me.record().position())
        with contextlib.suppress(Exception):
            sys.stderr.write(
                f"dscompile: RankError: {error}\n"
                f"  The main thread did not come back from its collective in {self._limits.last:.0f} s, "
                f"so this process ends (exit code {EXIT_CODE}).\n"
            )
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)
