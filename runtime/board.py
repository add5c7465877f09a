"""What ranks tell each other through the c10d store: records, one shared alarm, the listings behind signatures.

Keys, under ``dscompile/watch/NAME/START/``: ``rank/R`` the newest record of rank R (JSON), ``alarm`` the first finding
of any rank (JSON; written once), ``text/S`` the lines behind signature S, ``links/R`` the connections of rank R,
``ended`` how many ranks said goodbye or failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch.distributed import Store

from dscompile.runtime.links import Link
from dscompile.runtime.pulse import Address

State = Literal["run", "bye", "failed"]
READ_ALL = 16
"""Up to this many ranks each reads every record; above, its neighbours' and rank 0's (equality is transitive)."""


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a program: its number (from 1), signature, label, and the hash of all signatures up to this one."""

    number: int
    signature: str
    label: str
    chain: str


@dataclass(frozen=True, slots=True)
class Record:
    """What one rank publishes.

    ``recent`` are its last calls, oldest first; ``inside`` whether the last one still runs; ``at`` its last known
    place; ``error`` why it failed; ``process`` its process for people; ``stack`` and ``pulse`` where it can be probed;
    ``links`` the version of its published connections.
    """

    rank: int
    beat: int = 0
    state: State = "run"
    inside: bool = False
    at: str = ""
    recent: tuple[Call, ...] = ()
    error: str = ""
    process: str = ""
    stack: str = ""
    links: int = 0
    pulse: Address | None = None

    @property
    def calls(self) -> int:
        """How many programs it has started."""
        return self.recent[-1].number if self.recent else 0

    def position(self) -> str:
        """``call 12 (step 3 backward) at blocks.0.attn.weight``, for people."""
        if not self.recent:
            return f"before its first program{f', at {self.at}' if self.at else ''}"
        place = f" at {self.at}" if self.at else ""
        when = "in" if self.inside else "after"
        return f"{when} call {self.calls} ({self.recent[-1].label}){place}"

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: bytes | str) -> Record:
        """From JSON."""
        raw = json.loads(text)
        pulse = raw["pulse"]
        return replace(
            Record(**raw),
            recent=tuple(Call(**call) for call in raw["recent"]),
            pulse=None if pulse is None else (str(pulse[0]), int(pulse[1])),
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """Why the ranks cannot go on. ``kind`` and ``ranks`` as in :class:`dscompile.errors.RankError`."""

    kind: str
    ranks: tuple[int, ...]
    text: str

    @staticmethod
    def load(text: bytes | str) -> Finding:
        """From JSON."""
        raw = json.loads(text)
        return Finding(raw["kind"], tuple(raw["ranks"]), raw["text"])


class Board:
    """A connection of our own to the store. Every method may block, or raise what the store raises when it is gone."""

    def __init__(self, store: Store, rank: int, ranks: Sequence[int], name: str) -> None:
        # A client serves one request at a time, and the main thread may wait in one. (PyTorch's stub lacks `clone`.)
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        start = self._store.add(f"dscompile/watch/{name}/starts/{rank}", 1)
        self._prefix = f"dscompile/watch/{name}/{start}/"
        world, here = len(ranks), ranks.index(rank)
        near = ranks if world <= READ_ALL else {ranks[here - 1], ranks[(here + 1) % world], ranks[0]}
        self.peers = tuple(sorted(set(near) - {rank}))
        self._known: set[int] = set()
        self._listed: set[str] = set()

    def publish(self, record: Record) -> None:
        """Replace this rank's record."""
        self._store.set(f"{self._prefix}rank/{self._rank}", record.dump())

    def read(self) -> dict[int, Record]:
        """The newest records of the peers that have published one."""
        for peer in self.peers:
            if peer not in self._known and self._has(f"rank/{peer}"):
                self._known.add(peer)
        return {peer: Record.load(self._get(f"rank/{peer}")) for peer in sorted(self._known)}

    def alarm(self, finding: Finding | None) -> Finding | None:
        """The first finding of any rank, after offering ``finding`` as such."""
        if finding is not None:
            return Finding.load(self._store.compare_set(f"{self._prefix}alarm", "", json.dumps(asdict(finding))))
        return Finding.load(self._get("alarm")) if self._has("alarm") else None

    def list_texts(self, signature: str, texts: Iterable[str]) -> None:
        """Publish the lines behind a signature, once."""
        if signature not in self._listed:
            self._listed.add(signature)
            self._store.set(f"{self._prefix}text/{signature}", json.dumps(list(texts)))

    def texts(self, signature: str) -> tuple[str, ...] | None:
        """The lines behind a signature, or None if no rank has published them."""
        key = f"text/{signature}"
        return tuple(json.loads(self._get(key))) if self._has(key) else None

    def publish_links(self, mine: set[Link]) -> None:
        """Replace this rank's connections; before the record that names their version."""
        self._store.set(f"{self._prefix}links/{self._rank}", json.dumps(sorted(mine)))

    def links(self, peer: int) -> set[Link]:
        """The connections of a rank whose record names a version."""
        return {(str(a), int(b), str(c), int(d)) for a, b, c, d in json.loads(self._get(f"links/{peer}"))}

    def end(self) -> None:
        """Count this rank among those that are done."""
        self._store.add(f"{self._prefix}ended", 1)

    def ended(self) -> int:
        """How many ranks are done."""
        return int(self._store.add(f"{self._prefix}ended", 0))

    def _has(self, key: str) -> bool:
        return bool(self._store.check([self._prefix + key]))

    def _get(self, key: str) -> Any:
        return self._store.get(self._prefix + key)


def store_address(store: Store) -> Address | None:
    """(host, port) that a TCP store is served at; None for other kinds."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    return (str(host), int(port)) if host is not None and port is not None else None
