"""One process: ``python -m benchmarks.single`` sets dscompile against eager and Inductor.

Steps are interleaved in one process; memory and compilation are measured in fresh ones. Ratios are ours over theirs,
so below 1 is better; the range beside a ratio is that of single rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.measure import Sample, interleave, paired_ratio, summary, timed
from benchmarks.results import MB, save, table
from benchmarks.variants import NAMES, SIZES, Spec, Trainer
from benchmarks.worker import in_fresh_process

OURS = "dscompile"
WARM_UP = 3


def step_times(specs: dict[str, Spec], rounds: int) -> dict[str, Any]:
    """Time ``rounds`` whole steps of each variant, and compare their losses to the first variant's."""
    trainers = {name: Trainer(spec) for name, spec in specs.items()}
    losses: dict[str, list[float]] = {name: [] for name in specs}

    def step(name: str, index: int) -> Mapping[str, Sample]:
        trainer = trainers[name]
        ids = trainer.batch(index)
        losses_of_step: list[torch.Tensor] = []
        first = timed(lambda: losses_of_step.append(trainer.forward_backward(ids)))
        second = timed(trainer.update)
        losses[name].append(losses_of_step[0].item())
        whole = Sample(first.wall + second.wall, first.cpu + second.cpu)
        return {"step": whole, "forward+backward": first, "optimizer": second}

    calls: dict[str, Callable[[int], Mapping[str, Sample]]] = {
        name: lambda index, name=name: step(name, index)  # type: ignore[misc]
        for name in specs
    }
    interleave(calls, WARM_UP)
    samples = interleave({n: lambda i, c=c: c(i + WARM_UP) for n, c in calls.items()}, rounds)  # type: ignore[misc]
    reference = losses[next(iter(losses))]
    result: dict[str, Any] = {}
    for name, parts in samples.items():
        values = {(part, unit): [getattr(s, unit) for s in parts[part]] for part in parts for unit in ("wall", "cpu")}
        result[name] = {
            "seconds": {f"{part} {unit}": summary(v) for (part, unit), v in values.items()},
            "loss_first": losses[name][0],
            "loss_last": losses[name][-1],
            "loss_max_difference": max(abs(a - b) for a, b in zip(losses[name], reference, strict=True)),
            "ours_over_this": {
                f"{part} {unit}": paired_ratio([getattr(s, unit) for s in samples[OURS][part]], v)
                for (part, unit), v in values.items()
                if OURS in samples
            },
        }
    return result


def compile_times(specs: dict[str, Spec]) -> list[dict[str, Any]]:
    """First-step seconds with an empty and with a filled cache, in fresh processes, in both orders of the variants."""
    names = [name for name in specs if name != "eager"]
    rows = []
    for order in (names, names[::-1]):
        for name in order:
            with tempfile.TemporaryDirectory(prefix="dscompile-bench-") as cache:
                for state in ("cold", "warm"):
                    found = in_fresh_process("compile", specs[name], Path(cache))
                    rows.append({"order": " > ".join(order), "variant": name, "cache": state, **found})
    return rows


def print_steps(result: dict[str, Any]) -> None:
    """One row a variant."""
    rows = []
    for name, found in result.items():
        seconds, ratio = found["seconds"], found["ours_over_this"].get("step wall")
        cpu_ratio = found["ours_over_this"].get("step cpu")
        rows.append(
            [
                name,
                *(
                    f"{seconds[f'{part} wall']['median'] * 1e3:.1f}"
                    for part in ("step", "forward+backward", "optimizer")
                ),
                f"{seconds['step cpu']['median']:.3f}",
                f"{ratio['median']:.3f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-",
                f"{cpu_ratio['median']:.3f}" if cpu_ratio else "-",
                f"{found['loss_last']:.5f}",
                f"{found['loss_max_difference']:.1e}",
            ]
        )
    header = [
        "variant",
        "step ms",
        "fwd+bwd ms",
        "AdamW ms",
        "CPU s",
        "ours / it, wall",
        "CPU",
        "last loss",
        "loss diff",
    ]
    print(table("Steps (medians)", header, rows))


def print_memory(result: dict[str, Any]) -> None:
    """One row a variant, in MB (1e6 bytes)."""
    keys = ("allocation_peak", "arena", "held_between_steps", "total", "resident_peak")
    rows = [
        [
            name,
            *(f"{found[key] / MB:.1f}" for key in keys),
            f"{found['difference']:.1%}: {'agree' if found['agree'] else 'DO NOT AGREE within 10 %'}",
        ]
        for name, found in result.items()
    ]
    header = ["variant", "allocations MB", "arena MB", "held MB", "total MB", "resident MB", "the two peaks"]
    print(table("In-step peak of forward + backward, above parameters and optimizer state", header, rows))


def print_shares(result: dict[str, Any]) -> None:
    """One row a variant, in per cent of its own forward + backward; then what of our program is compiled."""
    kinds = ("gemm", "attention", "other_aten", "rest")
    rows = [[name, *(f"{found['time'][kind]:.1%}" for kind in kinds)] for name, found in result.items()]
    header = ["variant", "matrix products", "attention", "other PyTorch kernels", "generated kernels and host"]
    print(table("Where forward + backward goes (one profiled step)", header, rows))
    if ours := result.get(OURS):
        print(
            f"\n{ours['bytes_compiled']:.1%} of the bytes that nodes other than matrix products write are written in "
            f"compiled regions; {ours['aten_regions']} of {ours['regions']} regions run with PyTorch's kernels"
        )


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.single", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="gpt-30m")
    parser.add_argument("--layers", type=int, help="override the model's depth")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, on all variants")
    parser.add_argument(
        "--gemm", choices=("user", "same"), default="user", help="same: peers run at precision 'medium'"
    )
    parser.add_argument("--variants", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--options", type=json.loads, default={}, help="dscompile's options, as JSON")
    parser.add_argument("--parts", default="steps,memory,shares,compile", help="comma-separated")
    given = parser.parse_args(arguments)
    names = given.variants.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"unknown variants {sorted(unknown)}; choose from {', '.join(NAMES)}")
    base = Spec("eager", given.model, given.layers, given.batch, given.dtype, given.gemm, given.options)
    specs = {name: replace(base, variant=name) for name in names}
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    print(
        f"{given.model}: {given.batch} x {base.config.context} tokens, {base.config.layers} layers, {given.dtype}, "
        f"gemm={given.gemm}, {given.rounds} rounds"
    )
    result: dict[str, Any] = {"machine": described, "spec": asdict(base), "rounds": given.rounds}
    parts = given.parts.split(",")
    if "steps" in parts:
        result["steps"] = step_times(specs, given.rounds)
        print_steps(result["steps"])
    if "memory" in parts:
        result["memory"] = {name: in_fresh_process("memory", spec) for name, spec in specs.items()}
        print_memory(result["memory"])
    if "shares" in parts:
        result["shares"] = {name: in_fresh_process("shares", spec) for name, spec in specs.items()}
        print_shares(result["shares"])
    if "compile" in parts:
        result["compile"] = compile_times(specs)
        rows = [[r["variant"], r["cache"], r["wall"], r["cpu"], r["order"]] for r in result["compile"]]
        print(table("First step, fresh process", ["variant", "cache", "wall s", "CPU s", "order"], rows))
    result["load_after"] = machine.describe()["load_1_5_15_min"]
    path = save(f"single-{given.model}", result)
    print(f"\nload after: {result['load_after']}\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
