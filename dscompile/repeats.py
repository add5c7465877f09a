"""Find repeated blocks from the structure of a graph, never from module names.

Every node gets a colour: its operator, constants, and the shape of its value. A stack of equal layers is then a
periodic stretch of the colour sequence. The longest saving wins, the block boundary is put where the fewest bytes
cross, and the rest on either side is searched again (an encoder and a decoder are two stretches).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_PERIOD = 8
"""Blocks of fewer nodes than this are not worth a region of their own."""

_MAX_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Stretch:
    """``count`` equal blocks of ``period`` nodes, the first of them at ``start``."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """Position after the last block."""
        return self.start + self.period * self.count


def segments(colours: Sequence[int], crossing: Callable[[int], float]) -> list[tuple[int, int]]:
    """Cut ``range(len(colours))`` into consecutive ``(start, stop)`` pieces so that repeated blocks are pieces.

    Args:
        colours: one integer per node; equal integers mean nodes that may be equal.
        crossing: bytes of values that live across the boundary before a position; ``inf`` forbids a cut there.
    """
    array = np.asarray(colours, dtype=np.int64)
    return _segments(array, 0, len(array), crossing)


def _segments(colours: NDArray[np.int64], lo: int, hi: int, crossing: Callable[[int], float]) -> list[tuple[int, int]]:
    if lo >= hi:
        return []
    found = _best_stretch(colours, lo, hi, crossing)
    if found is None:
        return [(lo, hi)]
    blocks = [(found.start + k * found.period, found.start + (k + 1) * found.period) for k in range(found.count)]
    before = _segments(colours, lo, found.start, crossing)
    return before + blocks + _segments(colours, found.stop, hi, crossing)


def _best_stretch(colours: NDArray[np.int64], lo: int, hi: int, crossing: Callable[[int], float]) -> Stretch | None:
    best: Stretch | None = None
    saving = 0
    for period in _candidate_periods(colours[lo:hi]):
        first, length = _longest_run(colours[lo : hi - period] == colours[lo + period : hi])
        count = (length + period) // period
        if count < 2:
            continue
        placed = _place(lo + first, length + period, period, crossing)
        if placed is None:
            continue
        saved = (placed.count - 1) * period
        if saved > saving:
            best, saving = placed, saved
    return best


def _candidate_periods(colours: NDArray[np.int64]) -> list[int]:
    """Distances between neighbours of equal colour, the most promising first."""
    gaps: Counter[int] = Counter()
    last: dict[int, int] = {}
    for position, colour in enumerate(colours.tolist()):
        previous = last.get(colour)
        if previous is not None:
            gaps[position - previous] += 1
        last[colour] = position
    usable = [g for g in gaps if MIN_PERIOD <= g <= len(colours) // 2]
    # A layer's period is seen once per layer by each colour that occurs once in a layer: weigh by what it would cover.
    usable.sort(key=lambda g: (-gaps[g] * g, g))
    return usable[:_MAX_CANDIDATES]


def _longest_run(equal: NDArray[np.bool_]) -> tuple[int, int]:
    """Start and length of the longest run of True."""
    if not equal.any():
        return 0, 0
    padded = np.concatenate(([False], equal, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    return int(starts[longest]), int(stops[longest] - starts[longest])


def _place(start: int, length: int, period: int, crossing: Callable[[int], float]) -> Stretch | None:
    """Where blocks begin within a periodic stretch: fewest bytes across the cuts, then most blocks, then first."""
    most = length // period
    best: tuple[float, int, int] | None = None
    for offset in range(min(period, length - period * max(most - 1, 2) + 1)):
        count = (length - offset) // period
        if count < 2:
            break
        cuts = [start + offset + k * period for k in range(count + 1)]
        bytes_per_cut = sum(map(crossing, cuts)) / len(cuts)
        if bytes_per_cut == float("inf"):
            continue
        score = (bytes_per_cut, -count, offset)
        if best is None or score < best:
            best = score
    if best is None:
        return None
    _, negative, offset = best
    return Stretch(start + offset, period, -negative)
