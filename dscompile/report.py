"""What was compiled, for people: one line for each graph as it happens, and a report of the last compilation.

Every fallback is counted here, so that nothing degrades unseen.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

log = logging.getLogger("dscompile")


@dataclass
class GraphReport:
    """Figures of one compiled graph. Times are seconds; ``facts`` come from the program (regions, bytes).

    ``not_kept`` says why the next start must compile the program again, although the cache is on; "" if it need not.
    """

    graph: str
    kind: str
    passes: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gemm: str = ""
    verdict: str = ""
    fallbacks: list[str] = field(default_factory=list)
    cached: bool = False
    not_kept: str = ""
    summary: bool = True

    def line(self) -> str:
        """One line: what, how many regions, how it was checked, how long it took."""
        facts = self.facts
        parts = [f"{self.graph} {self.kind}: {facts.get('nodes', 0)} nodes"]
        compiled = f"{facts.get('compiled_regions', 0)} compiled"
        if facts.get("bytes"):
            compiled += f", {100 * facts['bytes_compiled'] / facts['bytes']:.1f} % of non-GEMM bytes"
        if facts.get("triton_regions"):
            compiled += f", {facts['triton_regions']} of them with our Triton kernels"
        parts.append(f"{facts.get('regions', 0)} regions ({compiled})")
        if self.verdict:
            parts.append(self.verdict)
        parts.append("from the cache" if self.cached else f"{sum(self.seconds.values()):.1f} s")
        if self.not_kept:
            parts.append(f"not kept in the cache: {self.not_kept}")
        if self.fallbacks:
            parts.append(f"{len(self.fallbacks)} FALLBACK(S): {self.fallbacks[0]}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """All figures as plain JSON-able values."""
        return asdict(self)


class Reports:
    """The most recent graph reports of this process, newest last. Bounded, so that recompiling cannot leak."""

    def __init__(self, keep: int = 64) -> None:
        self._reports: deque[GraphReport] = deque(maxlen=keep)

    def add(self, report: GraphReport) -> None:
        """Remember one report."""
        self._reports.append(report)

    def all(self) -> list[GraphReport]:
        """Every remembered report, oldest first."""
        return list(self._reports)

    def clear(self) -> None:
        """Forget everything (before a measurement)."""
        self._reports.clear()


REPORTS = Reports()
"""What this process compiled."""


def last_report() -> list[GraphReport]:
    """Reports of the graphs this process compiled or loaded, oldest first."""
    return REPORTS.all()


def announce(report: GraphReport) -> None:
    """Remember a report and log its one-line summary, visibly unless the user configured logging otherwise."""
    REPORTS.add(report)
    if not report.summary:
        return
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[dscompile] %(message)s"))
        log.addHandler(handler)
        if log.level == logging.NOTSET:
            log.setLevel(logging.INFO)
        log.propagate = False
    log.info("%s", report.line())
