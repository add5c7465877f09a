"""The thread that talks to the store: publishes this rank's record, reads the others', compares, spreads the alarm."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from dscompile.runtime import findings
from dscompile.runtime.board import Board
from dscompile.runtime.links import Link, links
from dscompile.runtime.liveness import Limits, Peer
from dscompile.runtime.progress import Progress

LINKS_EVERY = 10
"""Beats between looks at this process's connections: new process groups make new ones."""

log = logging.getLogger(__name__)


class Beat:
    """One exchange every ``limits.interval`` seconds, or when woken. Ends for good when the store is lost."""

    def __init__(
        self,
        board: Board,
        me: Progress,
        peers: dict[int, Peer],
        limits: Limits,
        *,
        store_port: int | None,
        changed: Callable[[], None],
    ) -> None:
        """``changed`` is called when the judge should look: a rank was heard for the first time, the store is lost."""
        self.lost: BaseException | None = None
        self.lost_at = 0.0
        self.read_began = 0.0
        """When the newest complete read of the others' records began (``time.monotonic``)."""
        self.ended = 0
        """How many ranks said that they are done, as far as this one has; it asks only when it is done itself."""
        self._board, self._me, self._peers, self._limits = board, me, peers, limits
        self._skip = () if store_port is None else (store_port,)
        self._changed = changed
        self._count = 0
        self._links: set[Link] = set()
        self._links_version = 0
        self._done = False
        self._stop = False
        self._wake = threading.Event()
        self._beaten = threading.Condition()

    def wake(self) -> None:
        """Beat now."""
        self._wake.set()

    def stop(self) -> None:
        """End the loop."""
        self._stop = True
        self._wake.set()

    def wait_published(self, seconds: float) -> None:
        """Wait until a beat that began after this moment is complete, the store is lost, or the time is up."""
        end = time.monotonic() + seconds
        with self._beaten:
            target = self._count + 2  # the beat under way may have made its record already
            while self._count < target and self.lost is None and (left := end - time.monotonic()) > 0:
                self._wake.set()
                self._beaten.wait(min(left, 0.05))

    def loop(self) -> None:
        """The thread's function."""
        while not self._stop:
            self._wake.clear()
            try:
                self._exchange()
            except Exception as error:  # a DistStoreError, DistNetworkError or RuntimeError, by the kind of store
                with self._beaten:
                    self.lost, self.lost_at = error, time.monotonic()
                    self._beaten.notify_all()
                self._changed()
                if self._me.state == "run":
                    log.warning("rank %d: %s", self._me.rank, findings.store_lost(error).text)
                return
            with self._beaten:
                self._count += 1
                self._beaten.notify_all()
            met = all(peer.record is not None for peer in self._peers.values())
            self._wake.wait(self._limits.interval if met else self._limits.interval / 10)

    def _exchange(self) -> None:
        """Connections, listings, this rank's record; the others' records; the alarm."""
        me = self._me
        if self._count % LINKS_EVERY == 0 or me.finding is not None or me.state != "run":
            self._publish_links()
        record = me.record(self._count, self._links_version)
        for signature in me.unlisted():  # before the record that names them
            if texts := getattr(signature, "texts", ()):
                self._board.list_texts(signature, texts)
        self._board.publish(record)
        now = time.monotonic()
        elapsed = min(now - self.read_began, 2 * self._limits.interval) if self.read_began else 0.0
        for rank, theirs in self._board.read().items():
            peer = self._peers[rank]
            if peer.links_version != theirs.links:
                peer.links, peer.links_version = self._board.links(rank), theirs.links
            if peer.heard(theirs, elapsed):
                self._changed()
            common = me.common(theirs.recent)
            if me.finding is None and common and common[-1][0].chain != common[-1][1].chain:
                me.found(findings.differs(record, theirs, common, self._board))
        self.read_began = now
        first = self._board.alarm(me.finding)
        if first is not None:
            me.found(first, replace=True)  # the first finding of any rank is nearest to the cause
        if record.state != "run":
            if not self._done:
                self._done = True
                self._board.end()
            self.ended = self._board.ended()

    def _publish_links(self) -> None:
        mine = links(self._skip)
        if mine != self._links:
            self._board.publish_links(mine)
            self._links = mine
            self._links_version += 1
