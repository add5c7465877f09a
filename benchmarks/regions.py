"""Depth: ``python -m benchmarks.regions`` counts regions as the model gets deeper, and times compilation.

Equal regions are compiled once, so the number compiled, and with it the time, should not grow with depth. Every
figure is of a fresh process with empty caches; the order of the two compilers alternates from depth to depth.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.results import save, table
from benchmarks.variants import SIZES, Spec
from benchmarks.worker import in_fresh_process


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regions", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="gpt-30m")
    parser.add_argument("--layers", default="6,12,24", help="comma-separated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--options", type=json.loads, default={}, help="dscompile's options, as JSON")
    given = parser.parse_args(arguments)
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    found: list[dict[str, Any]] = []
    for index, layers in enumerate(map(int, given.layers.split(","))):
        spec = Spec(model=given.model, layers=layers, batch=given.batch, options=given.options)
        names = ["dscompile", "inductor"]
        results = {
            n: in_fresh_process("compile", replace(spec, variant=n)) for n in (names[::-1] if index % 2 else names)
        }
        found.append({"layers": layers, "order": list(results), "spec": asdict(spec), **results})
    rows = []
    for row in found:
        ours, theirs = row["dscompile"], row["inductor"]
        rows.append(
            [
                row["layers"],
                ours["regions"],
                ours["compiled_regions"],
                ours["wall"],
                theirs["wall"],
                ours["wall"] / theirs["wall"],
                ours["cpu"] / theirs["cpu"],
                len(ours["fallbacks"]),
            ]
        )
    header = ["layers", "regions", "compiled", "ours s", "Inductor s", "ours / it, wall", "CPU", "fallbacks"]
    print(table("First step, empty caches", header, rows))
    path = save(f"regions-{given.model}", {"machine": described, "depths": found})
    print(f"\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
