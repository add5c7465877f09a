"""Timing: variants take turns in one process, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One timed call. ``cpu`` counts all threads of the process; both are seconds."""

    wall: float
    cpu: float


def timed(call: Callable[[], object]) -> Sample:
    """Run ``call`` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    calls: Mapping[str, Callable[[int], Mapping[str, Sample]]], rounds: int
) -> dict[str, dict[str, list[Sample]]]:
    """Run every call once a round, in an order that rotates; collect the samples it returns by part.

    The garbage collector runs between calls, not in them.
    """
    names = list(calls)
    found: dict[str, dict[str, list[Sample]]] = {name: {} for name in names}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            turn = index % len(names)
            for name in [*names[turn:], *names[:turn]]:
                for part, sample in calls[name](index).items():
                    found[name].setdefault(part, []).append(sample)
                gc.collect()
    finally:
        gc.enable()
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median, extremes and count."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def paired_ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio of the medians, and the median and extremes of the ratios round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"of_medians": statistics.median(ours) / statistics.median(theirs), **summary(ratios)}
