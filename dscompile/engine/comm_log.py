"""The communication log: which collectives ran, with how many bytes, how long, and how fast that was.

It hears of every collective of compiled programs, of eager reads and reductions of sharded parameters, and of LAMB's
norms (:mod:`dscompile.collectives`). PyTorch's own, called by a user or by DTensor, are not in it.

Sizes are payloads as in :class:`dscompile.collectives.Collective`. The bandwidths are those of nccl-tests: the
algorithm's is payload / time, the bus's that times ``(n - 1) / n`` for a gather, scatter or exchange among ``n`` ranks
and ``2 (n - 1) / n`` for an all-reduce, which makes it comparable with a link's. (DeepSpeed prints twice the
algorithm's bandwidth for an all-reduce.) Latency counts from the launch: that of an overlapped collective includes the
computation it hides behind, so its bandwidth is a lower bound; ``waited`` is what the rank stood still for.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from dscompile.collectives import LOG, Collective
from dscompile.engine.arguments import check_keys
from dscompile.errors import ConfigError

_LOG = logging.getLogger(__name__)

GIGA = 1e9
"""Bandwidths are in 1e9 bits a second, as DeepSpeed's."""

RECENT = 1000
"""Latencies kept of each operator and size, for the mean."""


@dataclass(frozen=True)
class Row:
    """All collectives of one operator, payload and number of ranks; with ``debug``, of one ``place`` too.

    ``latency`` and ``waited`` are seconds in total; the average is ``mean_latency``.
    """

    op: str
    bytes: int
    world: int
    count: int
    latency: float
    waited: float
    mean_latency: float
    place: str = ""

    @property
    def algorithm_bandwidth(self) -> float:
        """Gbit/s: payload by the mean latency."""
        return 8 * self.bytes / self.mean_latency / GIGA if self.mean_latency else 0.0

    @property
    def bus_bandwidth(self) -> float:
        """Gbit/s, comparable with a link's."""
        return self.algorithm_bandwidth * bus_factor(self.op, self.world)

    @property
    def moved(self) -> int:
        """Bytes that this rank transmitted in all of them."""
        return self.count * Collective(self.op, self.bytes, self.world, 0, 0, "").moved


def bus_factor(op: str, world: int) -> float:
    """What the algorithm's bandwidth is multiplied by to get the bus's."""
    return (2 if op == "all_reduce" else 1) * (world - 1) / world


@dataclass
class _Times:
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    count: int = 0
    latency: float = 0.0
    waited: float = 0.0


class CommLog:
    """Collects the process's collectives while it is started.

    Args:
        ops: names of the operators to keep (``all_gather`` means ``all_gather_into_tensor`` too); None keeps all.
        verbose: also log each one as it ends.
        debug: tell the places (modules, nodes) that waited apart.
    """

    def __init__(self, ops: Iterable[str] | None = None, *, verbose: bool = False, debug: bool = False) -> None:
        self._ops = None if ops is None else tuple(ops)
        self._verbose, self._debug = verbose, debug
        self._times: dict[tuple[str, str, int, int], _Times] = {}

    @classmethod
    def from_config(cls, section: Mapping[str, Any] | None) -> CommLog | None:
        """The log that a ``comms_logger`` section asks for; None if it is not enabled.

        Raises:
            ConfigError: an unknown key.
        """
        if section is None:
            return None
        check_keys("comms_logger", section, ("enabled", "verbose", "prof_all", "prof_ops", "debug"))
        if not section.get("enabled", False):
            return None
        ops = None if section.get("prof_all", True) else section.get("prof_ops", ())
        if isinstance(ops, str):
            raise ConfigError(f"comms_logger: prof_ops must be a list of operator names, got {ops!r}.")
        return cls(ops, verbose=bool(section.get("verbose", False)), debug=bool(section.get("debug", False)))

    def start(self) -> CommLog:
        """Listen from now on."""
        LOG.start(self.add)
        return self

    def stop(self) -> None:
        """Listen no more; what was collected stays."""
        LOG.stop(self.add)

    def __enter__(self) -> CommLog:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, event: Collective) -> None:
        """Take note of one collective."""
        if self._ops is not None and not any(event.op == op or event.op.startswith(f"{op}_") for op in self._ops):
            return
        key = (event.op, event.place if self._debug else "", event.bytes, event.world)
        times = self._times.setdefault(key, _Times())
        times.recent.append(event.latency)
        times.count += 1
        times.latency += event.latency
        times.waited += event.waited
        if self._verbose:
            row = Row(event.op, event.bytes, event.world, 1, event.latency, event.waited, event.latency)
            _LOG.info(
                "%s%s: %s, %.3f ms (waited %.3f), %.3f Gbit/s, bus %.3f",
                event.op,
                f" at {event.place}" if event.place else "",
                readable(event.bytes),
                1e3 * event.latency,
                1e3 * event.waited,
                row.algorithm_bandwidth,
                row.bus_bandwidth,
            )

    def reset(self) -> None:
        """Forget what was collected."""
        self._times.clear()

    def rows(self) -> list[Row]:
        """What was collected, by operator and size.

        Means are those of the last :data:`RECENT`, without their slowest and fastest tenth.
        """
        return [
            Row(op, size, world, t.count, t.latency, t.waited, trimmed_mean(list(t.recent)), place)
            for (op, place, size, world), t in sorted(self._times.items())
        ]

    def moved_bytes(self) -> int:
        """Bytes that this rank transmitted, by the ring algorithms' cost."""
        return sum(row.moved for row in self.rows())

    def summary(self) -> str:
        """A table for people; empty if nothing was collected."""
        rows = self.rows()
        if not rows:
            return ""
        table = [("collective", "size", "ranks", "count", "total ms", "mean ms", "waited ms", "Gbit/s", "bus Gbit/s")]
        table += [
            (
                f"{row.op} | {row.place}" if row.place else row.op,
                readable(row.bytes),
                str(row.world),
                str(row.count),
                f"{1e3 * row.latency:.2f}",
                f"{1e3 * row.mean_latency:.3f}",
                f"{1e3 * row.waited:.2f}",
                f"{row.algorithm_bandwidth:.3f}",
                f"{row.bus_bandwidth:.3f}",
            )
            for row in rows
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in table
        ]
        return "\n".join([*lines, f"transmitted by this rank: {readable(self.moved_bytes())}"])

    def log_summary(self) -> str:
        """Log the table, and return it."""
        text = self.summary()
        _LOG.info("communication:\n%s", text or "no collectives")
        return text


def trimmed_mean(values: list[float], share: float = 0.1) -> float:
    """The mean without the smallest and the largest ``share`` of the values."""
    cut = int(len(values) * share)
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def readable(size: int) -> str:
    """Bytes with a binary unit."""
    value, units = float(size), ("B", "KiB", "MiB", "GiB", "TiB")
    index = 0
    while value >= 1024 and index < len(units) - 1:
        value /= 1024
        index += 1
    return f"{value:.0f} {units[index]}" if index == 0 else f"{value:.2f} {units[index]}"
