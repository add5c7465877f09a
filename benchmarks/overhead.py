"""Host overhead: ``python -m benchmarks.overhead`` times a model so small that only the code around the kernels counts.

Two linear layers of width 64 on 8 rows: some microseconds of arithmetic. One thread, as threads would only add noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.measure import Sample, interleave, paired_ratio, summary, timed
from benchmarks.results import save, table
from benchmarks.variants import NAMES, compile_with


def mlp() -> nn.Module:
    """Two layers, 64 wide."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=500, help="forward + backward calls in one timed block")
    parser.add_argument("--options", type=json.loads, default={}, help="dscompile's options, as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    x = torch.randn(8, 64)

    def blocks(name: str) -> Any:
        model = mlp()
        run = compile_with(name, model, given.options)

        def block() -> None:
            for _ in range(given.calls):
                run(x).sum().backward()
                model.zero_grad(set_to_none=True)

        def call(_: int) -> dict[str, Sample]:
            sample = timed(block)
            return {"call": Sample(sample.wall / given.calls, sample.cpu / given.calls)}

        return call

    calls = {name: blocks(name) for name in NAMES}
    interleave(calls, 2)
    samples = interleave(calls, given.rounds)
    wall = {name: [s.wall for s in parts["call"]] for name, parts in samples.items()}
    described = machine.describe()
    result = {
        "machine": described,
        "calls": given.calls,
        "seconds": {name: summary(values) for name, values in wall.items()},
        "ours_over_this": {name: paired_ratio(wall["dscompile"], values) for name, values in wall.items()},
    }
    print("\n".join(machine.lines(described)))
    rows = []
    for name, values in wall.items():
        ratio = paired_ratio(wall["dscompile"], values)
        rows.append(
            [
                name,
                f"{summary(values)['median'] * 1e6:.1f}",
                f"{min(values) * 1e6:.1f}",
                f"{ratio['median']:.3f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
            ]
        )
    print(
        table("Forward + backward of a 2-layer, 64-wide MLP", ["variant", "us (median)", "us (min)", "ours / it"], rows)
    )
    path = save("overhead", result)
    print(f"\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
