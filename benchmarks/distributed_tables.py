"""What the samples of :mod:`benchmarks.distributed` say: medians over rounds, ratios round by round, tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure import paired_ratio, summary
from benchmarks.peers_distributed import VARIANTS, RankSpec
from benchmarks.results import MB, table

Rounds = Sequence[Sequence[Mapping[str, Any]]]
"""One result of :mod:`benchmarks.rank` for each round and rank."""

NOTES = (
    "State: every storage that Python reaches between steps, less what the arena leases. What lives in C++ is not "
    "seen: DDP's buckets, which are one copy of the gradients.",
    "Arena: what dscompile owns from step to step for values that live inside one; its peak includes all of it.",
    "Peak: the allocator's, of a whole step, above its start, on rank 0.",
    "Resident: high-water mark of the timed steps, less what was resident once all code was loaded; from rounds with a "
    "filled compile cache if there are any.",
)


def summarise(spec: RankSpec, rounds: Rounds) -> dict[str, Any]:
    """Figures of one variant: times and CPU seconds by round, the rest as medians over rounds. Bytes and seconds.

    A step takes as long as its slowest rank. Memory is that of the largest rank; CPU seconds are the mean over ranks.
    """
    wall = [statistics.median(map(max, *(rank["wall"] for rank in ranks), ranks[0]["wall"])) for ranks in rounds]
    cpu = [statistics.mean(statistics.median(rank["cpu"]) for rank in ranks) for ranks in rounds]
    warm = rounds[1:] or rounds
    losses = [statistics.mean(values) for values in zip(*(rank["losses"] for rank in rounds[0]), strict=True)]
    return {
        "wall": wall,
        "cpu": cpu,
        "seconds": {"wall": summary(wall), "cpu": summary(cpu)},
        "wire": _median(rounds, "wire") if spec.private_network else None,
        "state": _median(rounds, "held"),
        "ideal_state": spec.ideal_state,
        "arena": _median(rounds, "arena"),
        "peak": _median(rounds, "peak"),
        "resident": _median(warm, "resident_above_imports"),
        "first_step_cold": _first_step(rounds[:1]),
        "first_step_warm": _first_step(rounds[1:]) if rounds[1:] else None,
        "losses": losses[: spec.warm_up + spec.steps],
        "fallbacks": sorted({reason for ranks in rounds for rank in ranks for reason in rank["fallbacks"]}),
        "version": rounds[0][0]["version"],
    }


def _median(rounds: Rounds, key: str) -> float:
    return statistics.median(max(rank[key] for rank in ranks) for ranks in rounds)


def _first_step(rounds: Rounds) -> float:
    """Seconds from the start of the compiler to the end of the first step, imports included, without building."""
    return statistics.median(max(rank["compiler_start"] + rank["first_step"] for rank in ranks) for ranks in rounds)


def ratios(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every variant of ours against DDP and the peers of its stage."""
    rows = []
    for ours, a in found.items():
        for theirs, b in found.items():
            if VARIANTS[ours].kind != "ours" or VARIANTS[theirs].kind in ("ours", "eager"):
                continue
            if VARIANTS[theirs].kind != "ddp" and VARIANTS[theirs].stage != VARIANTS[ours].stage:
                continue
            row: dict[str, Any] = {"ours": ours, "theirs": theirs}
            row |= {unit: paired_ratio(a[unit], b[unit]) for unit in ("wall", "cpu")}
            for key in ("wire", "state", "peak", "resident"):
                row[key] = a[key] / b[key] if a[key] is not None and b[key] else None
            rows.append(row)
    return rows


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of any step."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def print_tables(result: Mapping[str, Any]) -> None:
    """Speed, memory, ratios, and what did not run."""
    found = result["summary"]
    if found:
        _print_speed(found)
        _print_memory(found)
        print("\n".join(["", *NOTES]))
    if result["ours_over_theirs"]:
        _print_ratios(result["ours_over_theirs"])
    for name, reason in result["skipped"].items():
        print(f"\nskipped: {name}: {reason}")
    for name, reason in result["failed"].items():
        print(f"\nDID NOT RUN: {name}: {reason.strip().splitlines()[-1]}")
    for name, one in found.items():
        if one["fallbacks"]:
            print(f"\n{name} fell back: {'; '.join(one['fallbacks'])}")


def _print_speed(found: Mapping[str, Mapping[str, Any]]) -> None:
    reference = found.get("eager", next(iter(found.values())))["losses"]
    rows = []
    for name, one in found.items():
        wall = one["seconds"]["wall"]
        rows.append(
            [
                name,
                f"{wall['median']:.3f} ({wall['min']:.3f}-{wall['max']:.3f})",
                one["seconds"]["cpu"]["median"],
                _mb(one["wire"]),
                f"{one['first_step_cold']:.1f}",
                "-" if one["first_step_warm"] is None else f"{one['first_step_warm']:.1f}",
                f"{one['losses'][-1]:.5f}",
                f"{loss_difference(one['losses'], reference):.1e}",
            ]
        )
    header = ["variant", "step s (rounds)", "CPU s/rank", "wire MB/rank", "first step cold s", "warm s", "loss", "diff"]
    print(table("One step, all of forward, backward and AdamW (medians)", header, rows))


def _print_memory(found: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        [
            name,
            _mb(o["state"]),
            f"{o['state'] / o['ideal_state']:.3f}",
            *(_mb(o[k]) for k in ("arena", "peak", "resident")),
        ]
        for name, o in found.items()
    ]
    header = ["variant", "state MB", "/ ideal of its stage", "arena MB", "in-step peak MB", "resident above imports MB"]
    print(table("Memory of the largest rank", header, rows))


def _print_ratios(found: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [
            f"{row['ours']} / {row['theirs']}",
            *(f"{row[unit]['median']:.3f} ({row[unit]['min']:.2f}-{row[unit]['max']:.2f})" for unit in ("wall", "cpu")),
            *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("wire", "state", "peak", "resident")),
        ]
        for row in found
    ]
    header = ["ours / theirs", "step (rounds)", "CPU (rounds)", "wire", "state", "peak", "resident"]
    print(table("Ratios", header, rows))


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value / MB:.1f}"
