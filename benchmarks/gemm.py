"""fp32 matrix products of a GPT step: PyTorch's (MKL), ours on AMX tiles (bf16, int8), and PyTorch's at 'medium'.

``python -m benchmarks.gemm``: CPU seconds, the least of interleaved rounds, and largest errors against fp64. 'medium'
may round to bf16 on CPUs that have such units: its error says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.results import save, table
from dscompile.codegen.cpu.builder import gemm_kernel
from dscompile.codegen.cpu.gemm_sites import Site
from dscompile.tools.gpt import SIZES


def operands(form: str, rows: int, inside: int, outside: int) -> tuple[Tensor, Tensor]:
    """The operands of a linear layer's forward, input gradient (``dgrad``) or weight gradient (``wgrad``)."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*size, generator=generator) for size in ((rows, inside), (outside, inside), (rows, outside))
    )
    return {"forward": (x, weight.t()), "dgrad": (grad, weight), "wgrad": (grad.t(), x)}[form]


def measure(a: Tensor, b: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds (least of ``rounds``) and largest error of each way to multiply."""
    kernel = gemm_kernel().kernel
    assert kernel is not None
    site = Site() if kernel.integers else None  # without tiles of integers: bf16 once more
    out = torch.empty(a.shape[0], b.shape[1])
    exact = a.double() @ b.double()

    def medium() -> None:
        torch.set_float32_matmul_precision("medium")
        torch.mm(a, b, out=out)
        torch.set_float32_matmul_precision("highest")

    ways: dict[str, Callable[[], Any]] = {
        "mkl": lambda: torch.mm(a, b, out=out),
        "amx": lambda: kernel.product(a, b, None, out),
        "amx_int8": lambda: kernel.product(a, b, None, out, site=site),
        "medium": medium,
    }
    found = {name: {"cpu": float("inf"), "error": 0.0} for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.process_time()
            call()
            found[name]["cpu"] = min(found[name]["cpu"], time.process_time() - start)
            found[name]["error"] = float((out - exact).abs().max())
    return found


def main(arguments: list[str] | None = None) -> Path:
    """Run, print and save; return the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="gpt-30m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args(arguments)
    if reason := gemm_kernel().reason:
        parser.error(f"there is no kernel to measure: {reason}")
    described = machine.describe()
    print("\n".join(machine.lines(described)))
    size = SIZES[given.model]
    rows, width = given.batch * size.context, size.width
    layers = ((width, width), (width, 3 * width), (width, 4 * width), (4 * width, width), (width, size.vocab))
    results = []
    for inside, outside in layers:
        for form in ("forward", "dgrad", "wgrad"):
            found = measure(*operands(form, rows, inside, outside), given.rounds)
            results.append({"rows": rows, "inside": inside, "outside": outside, "form": form, "ways": found})
    lines = []
    for row in results:
        ways = row["ways"]
        theirs, others = ways["mkl"], [name for name in ways if name != "mkl"]
        place = f"{row['rows']} x {row['inside']} x {row['outside']} {row['form']}"
        lines.append(
            [
                place,
                *(ways[n]["cpu"] * 1e3 for n in ways),
                *(theirs["cpu"] / ways[n]["cpu"] for n in ("amx", "amx_int8")),
                *(ways[n]["error"] / theirs["error"] for n in others),
            ]
        )
    names = ("bf16", "int8", "medium")
    header = ["product", "MKL ms", *(f"{n} ms" for n in names), "MKL / bf16", "MKL / int8"]
    header += [f"error {n} / MKL" for n in names]
    print(table(f"fp32 products of {given.model}, {torch.get_num_threads()} threads, CPU time", header, lines))
    load = machine.describe()["load_1_5_15_min"]
    path = save(f"gemm-{given.model}", {"machine": described, "results": results, "load_after": load})
    print(f"\nload after: {load}\nwritten: {path}")
    return path


if __name__ == "__main__":
    main()
