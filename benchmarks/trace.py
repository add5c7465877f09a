"""What sharding adds to compilation: ``python -m benchmarks.trace`` times tracing and planning of a 292-parameter GPT.

CPU seconds of the first step of a model that is deep and otherwise tiny, less those of a later step, in fresh
processes: two that know nothing of each other without sharding, and two gloo ranks at each stage, in turn. No kernel is
compiled (``regions="aten"``), nothing is cached, and a small model is compiled first, so that imports do not count.
Other work on the machine only ever adds CPU seconds, by taking caches and clock: the ratio is that of the smallest of
all rounds, beside the range of the rounds' own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import dscompile
from benchmarks import machine
from benchmarks.results import save, table
from dscompile.tools.gpt import GPT, GPTConfig

OPTIONS: dict[str, Any] = {"regions": "aten", "cache": False, "summary": False}


def build(layers: int) -> GPT:
    """A GPT of 12 parameters a layer and 4 beside them: the head is tied."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=64, layers=layers, width=64, heads=2, context=16))
    model.head.weight = model.tokens.weight
    return model


def first_step(model: GPT, stage: int | None) -> dict[str, float]:
    """CPU seconds of compiling ``model``, by part; None: not sharded."""
    start = time.process_time()
    if stage is not None:
        dscompile.distribute(model, config={**OPTIONS, "zero": {"stage": stage}, "rank_timeout": 0.0})
    sharded = time.process_time() - start
    ids = torch.randint(64, (2, 16))
    run = torch.compile(model, backend="dscompile", options=OPTIONS, fullgraph=True)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        run(ids, ids).backward()
        seconds.append(time.process_time() - start)
    return {"distribute": sharded, "compile": seconds[0] - seconds[1], "step": seconds[1]}


def _worker(arguments: list[str]) -> None:
    stage, rank, store, layers = int(arguments[0]), int(arguments[1]), arguments[2], int(arguments[3])
    torch.set_num_threads(1)
    sharding = None if stage < 0 else stage
    if sharding is not None:
        dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    first_step(build(1), sharding)
    torch.compiler.reset()
    print(json.dumps(first_step(build(layers), sharding)))
    if sharding is not None:
        dist.destroy_process_group()


def measure(stage: int | None, layers: int) -> dict[str, float]:
    """One run in two fresh processes, so that both sides share the machine alike; the first one's figures."""
    ranks = 2
    with tempfile.TemporaryDirectory() as folder:
        given = [str(-1 if stage is None else stage), "", f"{folder}/store", str(layers)]
        processes = []
        for rank in range(ranks):
            given[1] = str(rank)
            command = [sys.executable, "-m", "benchmarks.trace", "--worker", *given]
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a worker of stage {stage} failed: {[p.returncode for p in processes]}")
    found: dict[str, float] = json.loads(outputs[0].strip().splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default="3", help="comma-separated ZeRO stages")
    given = parser.parse_args(arguments)
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    variants: dict[str, int | None] = {"not sharded": None}
    variants |= {f"stage {stage}": int(stage) for stage in given.stages.split(",")}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(given.rounds):
        for name, stage in variants.items():
            runs[name].append(measure(stage, given.layers))
    plain = [run["compile"] for run in runs["not sharded"]]
    rows = []
    for name, found in runs.items():
        ratios = [run["compile"] / base for run, base in zip(found, plain, strict=True)]
        least = min(run["compile"] for run in found)
        cells = [median(run[key] for run in found) for key in ("compile", "distribute", "step")]
        rows.append([name, least, *cells, f"{least / min(plain):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    parameters = len(list(build(given.layers).parameters()))
    header = ["variant", "trace + plan, CPU s: least", "median", "distribute", "a step", "ratio", "of the rounds"]
    print(table(f"A GPT of {parameters} parameters, {given.layers} layers", header, rows))
    path = save("trace", {"machine": described, "parameters": parameters, "runs": runs})
    print(f"\nwritten: {path}")
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _worker(sys.argv[2:])
    else:
        main()
