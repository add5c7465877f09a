"""What checking costs: ``python -m benchmarks.checks`` times verifier, proof and text on a deep model's joint graph.

The graph is traced with fake tensors, never run. Times are CPU milliseconds, so that other work on the machine does not
count. Then, for small models, the share of checking in a cold first step, each in a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.results import save, table
from benchmarks.variants import Spec
from benchmarks.worker import in_fresh_process
from dscompile.config import Config
from dscompile.equivalence import prove, snapshot
from dscompile.graph import StepGraph
from dscompile.manager import PassContext, parse_pipeline, run_pipeline
from dscompile.step import trace_step
from dscompile.text import print_graph
from dscompile.text_parse import parse_graph
from dscompile.tools.gpt import GPT, GPTConfig
from dscompile.verify import baseline, verify


def deep_graph(layers: int) -> StepGraph:
    """The joint graph, as traced, of one step of a GPT that is deep and otherwise tiny."""
    torch.manual_seed(0)
    size = GPTConfig(vocab=64, layers=layers, width=32, heads=2, context=16)
    ids = torch.randint(size.vocab, (2, size.context))

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = model(inputs, targets)
        return value

    return trace_step(GPT(size), loss, ids, ids)


def check_times(graph: StepGraph, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of everything that is done once, and of what is done after each pass.

    The pass is the default pipeline's: what it changed is checked anew in every round.
    """
    once = {"baseline": _cpu_ms(lambda: baseline(graph), rounds), "snapshot": _cpu_ms(lambda: snapshot(graph), rounds)}
    rules, reference = baseline(graph), snapshot(graph)
    before = dict(rules.prints)
    nodes = len(graph.graph.nodes)
    run_pipeline(graph, parse_pipeline("default"), PassContext(Config(verify="off")))
    touched = set(graph.touched)

    def changed() -> None:
        rules.prints, graph.touched = dict(before), set(touched)
        assert not verify(graph, rules, "canonicalise")

    def unchanged() -> None:
        assert not verify(graph, rules, "nothing")

    text = print_graph(graph)
    return {
        "nodes": [nodes, len(graph.graph.nodes)],
        "once": once,
        "each_pass": {
            "verify": _cpu_ms(changed, rounds),
            "verify, nothing changed": _cpu_ms(unchanged, rounds),
            "proof": _cpu_ms(lambda: prove(reference, graph), rounds),
        },
        "text": {
            "print": _cpu_ms(lambda: print_graph(graph), rounds),
            "parse": _cpu_ms(lambda: parse_graph(text), rounds),
        },
    }


def shares(models: list[str]) -> list[dict[str, Any]]:
    """Seconds of checking and of the whole cold first step, one fresh process a model."""
    found = []
    for model in models:
        result = in_fresh_process("compile", Spec(variant="dscompile", model=model))
        check = result["stages"]["check"]
        found.append({"model": model, "check": check, "first_step": result["wall"], "share": check / result["wall"]})
    return found


def _cpu_ms(call: Callable[[], object], rounds: int) -> float:
    """Median CPU milliseconds of a call, the garbage collector's work included."""
    times = []
    for _ in range(rounds):
        gc.collect()
        start = time.process_time()
        call()
        times.append((time.process_time() - start) * 1e3)
    return median(times)


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default="gpt-500k,gpt-1m", help="comma-separated; empty: skip the cold first steps")
    given = parser.parse_args(arguments)
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    times = check_times(deep_graph(given.layers), given.rounds)
    rows = [[part, name, ms] for part in ("once", "each_pass", "text") for name, ms in times[part].items()]
    both = times["each_pass"]["verify"] + times["each_pass"]["proof"]
    rows.append(["each_pass", "verify + proof", both])
    before, after = times["nodes"]
    print(table(f"{given.layers} layers, {before} nodes as traced, {after} after", ["when", "what", "CPU ms"], rows))
    cold = shares([name for name in given.models.split(",") if name])
    if cold:
        cells = [[row["model"], row["check"], row["first_step"], f"{row['share']:.1%}"] for row in cold]
        print(table("Checking in a cold first step", ["model", "check s", "first step s", "share"], cells))
    path = save("checks", {"machine": described, "layers": given.layers, "times": times, "cold": cold})
    print(f"\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
