"""Ranks: ``python -m benchmarks.distributed`` sets our ZeRO stages against DDP, FSDP2 and DeepSpeed on this machine.

Every variant of every round is a fresh group of processes, with one thread a rank, gloo, and a network of its own; the
order turns from round to round. Ratios are ours over theirs, round by round, so below 1 is better.

DeepSpeed has an environment of its own, whose Python is given as ``--deepspeed-python``::

    python3 -m venv ds-venv && ds-venv/bin/pip install torch==2.13.0 numpy setuptools wheel
    DS_BUILD_OPS=0 ds-venv/bin/pip install --no-build-isolation deepspeed==0.19.8

Its first start compiles an extension, for minutes; without it, its rows are skipped and said to be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.distributed_tables import print_tables, ratios, summarise
from benchmarks.peers_distributed import VARIANTS, RankSpec
from benchmarks.ranks import RankFailedError, rank_environment, run_ranks
from benchmarks.results import save
from benchmarks.variants import SIZES
from benchmarks.wire import private_prefix


def turn(names: Sequence[str], index: int) -> list[str]:
    """The order of round ``index``: rotated by one each round, and backwards in every second one."""
    start = index % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if index % 2 else order


def measure(
    specs: dict[str, RankSpec], rounds: int, pythons: dict[str, str], prefix: list[str] | None, timeout: float
) -> tuple[dict[str, list[list[dict[str, Any]]]], dict[str, str]]:
    """Results by variant, round and rank; and why a variant gave none. One that fails once is not started again.

    Each variant keeps one compile cache through the rounds: empty in the first, filled in the others.
    """
    found: dict[str, list[list[dict[str, Any]]]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="dscompile-bench-") as caches:
        for index in range(rounds):
            for name in turn(list(specs), index):
                if name in failed:
                    continue
                cache = Path(caches) / name
                try:
                    ranks = run_ranks(specs[name], pythons[name], cache, prefix, timeout)
                except RankFailedError as error:
                    failed[name] = str(error)
                    found.pop(name, None)
                    print(f"round {index} {name}: FAILED\n{error}", file=sys.stderr, flush=True)
                    continue
                found.setdefault(name, []).append(ranks)
                walls = ", ".join(f"{wall:.3f}" for wall in ranks[0]["wall"])
                print(f"round {index} {name}: {ranks[0]['seconds']:.0f} s; steps {walls}", file=sys.stderr, flush=True)
    return {name: found[name] for name in specs if name in found}, failed


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file. Exits with 1 if a variant failed, after all that."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(SIZES), default="gpt-30m")
    parser.add_argument("--layers", type=int, help="override the model's depth")
    parser.add_argument("--batch", type=int, default=4, help="global batch, a multiple of the ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="the first is cold: compile caches are empty")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in a round")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them, the first included")
    parser.add_argument(
        "--gemm", choices=("user", "same"), default="user", help="same: peers run at precision 'medium'"
    )
    parser.add_argument("--options", type=json.loads, default={}, help="dscompile's options, as JSON")
    parser.add_argument("--zero", type=json.loads, default={}, help="zero settings of all of ours, as JSON")
    parser.add_argument("--deepspeed-python", metavar="PATH", help="the Python of an environment with DeepSpeed")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one variant of one round")
    given = parser.parse_args(arguments)
    names = given.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; choose from {', '.join(VARIANTS)}")
    if given.batch % given.ranks:
        parser.error(f"--batch {given.batch} is not a multiple of --ranks {given.ranks}")
    if given.deepspeed_python and not Path(given.deepspeed_python).is_file():
        parser.error(f"--deepspeed-python {given.deepspeed_python}: no such file")
    prefix = private_prefix()
    skipped = {
        name: "no --deepspeed-python"
        for name in names
        if VARIANTS[name].kind == "deepspeed" and not given.deepspeed_python
    }
    base = RankSpec(
        model=given.model,
        layers=given.layers,
        batch=given.batch,
        gemm=given.gemm,
        options=given.options,
        zero=given.zero,
        ranks=given.ranks,
        warm_up=given.warm_up,
        steps=given.steps,
        private_network=prefix is not None,
    )
    specs = {
        name: replace(base, variant=name, ranks=1 if VARIANTS[name].kind == "eager" else given.ranks)
        for name in names
        if name not in skipped
    }
    pythons = {n: given.deepspeed_python if VARIANTS[n].kind == "deepspeed" else sys.executable for n in specs}
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    print(
        f"{given.model}: {given.batch} x {base.config.context} tokens over {given.ranks} ranks, "
        f"{base.config.layers} layers, fp32, gemm={given.gemm}; "
        f"{given.rounds} rounds of {given.warm_up} + {given.steps} steps; 1 thread a rank, gloo on lo, "
        + ("private network" if prefix else "NO private network: bytes are not counted")
    )
    found, failed = measure(specs, given.rounds, pythons, prefix, given.timeout)
    summary = {name: summarise(specs[name], rounds) for name, rounds in found.items()}
    result: dict[str, Any] = {
        "machine": described,
        "rank_environment": rank_environment(given.ranks),
        "spec": asdict(base),
        "rounds": given.rounds,
        "order": [turn(list(specs), index) for index in range(given.rounds)],
        "summary": summary,
        "ours_over_theirs": ratios(summary),
        "skipped": skipped,
        "failed": failed,
        "samples": found,
        "load_after": machine.describe()["load_1_5_15_min"],
    }
    print_tables(result)
    path = save(f"distributed-{given.model}", result)
    print(f"\nload after: {result['load_after']}\nwritten: {path}")
    if failed:
        raise SystemExit(1)
    return path


if __name__ == "__main__":
    main()
