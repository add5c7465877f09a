"""Optimizer steps: ``python -m benchmarks.optimizers`` times ours against PyTorch's AdamW on a GPT's parameters.

``adamw`` is ``torch.optim.AdamW(fused=True)``; ``lamb`` our LAMB with its C++ kernel, ``lamb_foreach`` without it, both
with a weight decay. ``host`` is our AdamW of 16-bit training given fp32 gradients, ``host_bf16`` given bf16 ones, as
that training gives it. Fused AdamW moves 28 bytes a parameter (reads x, g, m, v; writes x, m, v). LAMB cannot apply a
direction before it has the norm of all of it: 24 and then 16 bytes, 1.43 times as many, but for what stays in a core's
cache between the two sweeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.measure import Sample, interleave, paired_ratio, summary, timed
from benchmarks.results import save, table
from dscompile.engine.host_adam import HostAdamW
from dscompile.engine.lamb import Lamb
from dscompile.engine.optimizers import create_optimizer

NAMES = ("adamw", "host", "host_bf16", "lamb", "lamb_foreach")


def shapes(millions: float, width: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a GPT of about so many million parameters."""
    block = [
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
        *((width,), (width,), (width,), (width,)),
    ]
    size = sum(torch.Size(shape).numel() for shape in block)
    return [shape for _ in range(max(1, round(millions * 1e6 / size))) for shape in block]


def optimizer(name: str, sizes: list[tuple[int, ...]]) -> torch.optim.Optimizer:
    """A fresh optimizer with parameters and gradients of its own."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).mul_(0.02)) for size in sizes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    if name.startswith("host"):
        for param in params if name == "host_bf16" else ():
            grad, param.grad = param.grad, None
            param.grad_dtype = torch.bfloat16
            param.grad = grad.bfloat16()
        return HostAdamW(params, lr=1e-4, weight_decay=0.01)
    if name == "adamw":
        return create_optimizer("AdamW", params, {"lr": 1e-4, "weight_decay": 0.01})
    return Lamb(params, lr=1e-4, weight_decay=0.01, compiled=name == "lamb")


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("--millions", type=float, default=50.0, help="parameters")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    sizes = shapes(given.millions, given.width)
    total = sum(torch.Size(size).numel() for size in sizes)
    made = {name: optimizer(name, sizes) for name in NAMES}
    for one in made.values():
        one.step()  # makes the state, and builds the kernel

    def call(one: torch.optim.Optimizer) -> Callable[[int], Mapping[str, Sample]]:
        return lambda index: {"step": timed(one.step)}

    found = {n: parts["step"] for n, parts in interleave({n: call(o) for n, o in made.items()}, given.rounds).items()}
    wall = {name: [sample.wall for sample in samples] for name, samples in found.items()}
    cpu = {name: [sample.cpu for sample in samples] for name, samples in found.items()}
    rows = [
        [
            name,
            1e3 * summary(wall[name])["median"],
            1e3 * summary(wall[name])["min"],
            1e3 * summary(cpu[name])["median"],
            paired_ratio(wall[name], wall["adamw"])["median"],
            paired_ratio(cpu[name], cpu["adamw"])["median"],
        ]
        for name in NAMES
    ]
    header = ["optimizer", "median ms", "min ms", "CPU ms", "/ AdamW, wall", "CPU"]
    print(table(f"One step on {total / 1e6:.1f}M fp32 parameters in {len(sizes)} tensors", header, rows))
    results = {name: {"wall": wall[name], "cpu": cpu[name]} for name in NAMES}
    path = save("optimizers", {"machine": described, "parameters": total, "tensors": len(sizes), "results": results})
    print(f"\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
