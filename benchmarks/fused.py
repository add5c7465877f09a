"""Fused regions on CPU: ``python -m benchmarks.fused`` sets eager, Inductor and dscompile against each other.

Each region runs forward and backward. Variants take turns; on a loaded machine the least CPU seconds are the figure to
compare. ``GB/s`` is the ideal traffic (every input read once, every result written once) over those seconds, to be set
against that of the copy in the first row; the error is that of the gradients against fp64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.measure import Sample, interleave, timed
from benchmarks.results import save, table
from benchmarks.variants import NAMES, compile_with

Region = Callable[..., Tensor]

REGIONS: dict[str, tuple[Region, str]] = {
    "copy": (lambda x: x * 1.0, "x"),
    "bias + GELU": (lambda x, b: F.gelu(x + b), "xc"),
    "bias + tanh-GELU": (lambda x, b: F.gelu(x + b, approximate="tanh"), "xc"),
    "bias + SiLU": (lambda x, b: F.silu(x + b), "xc"),
    "LayerNorm + residual": (lambda x, w, b: x + F.layer_norm(x, w.shape, w, b), "xcc"),
    "RMSNorm + residual": (lambda x, w: x + F.rms_norm(x, w.shape, w), "xc"),
    "softmax": (lambda x: torch.softmax(x, -1), "x"),
}
"""Each region with its inputs: ``x`` is the matrix ``[rows, columns]``, ``c`` a vector ``[columns]``."""


class _Module(torch.nn.Module):
    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.region(*inputs)


def measure(
    name: str, rows: int, columns: int, rounds: int, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, float]]:
    """Least CPU seconds, achieved GB/s and relative gradient error of each variant of one region."""
    region, kinds = REGIONS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, columns), "c": (columns,)}
    inputs = [torch.randn(shapes[kind], generator=generator).to(dtype).requires_grad_() for kind in kinds]
    grad = torch.randn(rows, columns, generator=generator).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(region(*exact), exact, grad.double())
    options: dict[str, Any] = {"summary": False}
    steps = {}
    for variant in NAMES:
        torch.compiler.reset()
        compiled = compile_with(variant, _Module(region), options)
        steps[variant] = lambda compiled=compiled: torch.autograd.grad(compiled(*inputs), inputs, grad)
        steps[variant]()

    def sample(variant: str) -> dict[str, Sample]:
        return {"step": timed(steps[variant])}

    samples = interleave({v: lambda _, v=v: sample(v) for v in steps}, rounds)  # type: ignore[misc]
    # forward reads x and writes y; backward reads x and grad and writes x's gradient
    ideal = 5 * inputs[0].nbytes
    found = {}
    for variant, parts in samples.items():
        seconds = min(s.cpu for s in parts["step"])
        errors = [float((g - w).norm() / w.norm()) for g, w in zip(steps[variant](), wanted, strict=True)]
        found[variant] = {"seconds": seconds, "gb_per_second": ideal / seconds / 1e9, "error": max(errors)}
    return found


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused", description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--regions", default=",".join(REGIONS), help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    given = parser.parse_args(arguments)
    dtype: torch.dtype = getattr(torch, given.dtype)
    if unknown := set(given.regions.split(",")) - set(REGIONS):
        parser.error(f"unknown regions {sorted(unknown)}; choose from {', '.join(REGIONS)}")
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    result = {name: measure(name, given.rows, given.columns, given.rounds, dtype) for name in given.regions.split(",")}
    rows = [
        [
            name,
            variant,
            f"{figures['seconds'] * 1e3:.2f}",
            f"{figures['gb_per_second']:.1f}",
            f"{found['dscompile']['seconds'] / figures['seconds']:.2f}",
            f"{figures['error']:.1e}",
        ]
        for name, found in result.items()
        for variant, figures in found.items()
    ]
    header = ["region", "variant", "CPU ms", "GB/s of ideal", "ours / it", "error"]
    print(table(f"Forward + backward, [{given.rows}, {given.columns}] {given.dtype}", header, rows))
    path = save(
        "fused", {"machine": described, "shape": [given.rows, given.columns], "dtype": given.dtype, "regions": result}
    )
    print(f"\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
