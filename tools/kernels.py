"""``dscompile kernels``: every kernel that the Triton backend generates, and what it became for each GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from dscompile.artifact import write_whole
from dscompile.codegen.triton_backend.aot import Build, build
from dscompile.codegen.triton_backend.bars import judge
from dscompile.codegen.triton_backend.cache import triton_version
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.library import entries, example, generate
from dscompile.codegen.triton_backend.targets import find_target
from dscompile.codegen.triton_backend.templates import evoformer
from dscompile.codegen.triton_backend.templates.attention import Attention, Sizes, attention_kernels
from dscompile.errors import UnsupportedError, nearest

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ATTENTION = "attention"
EVOFORMER = "evoformer"


def kernels(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these (default: all).")] = None,
    target: Annotated[list[str] | None, typer.Option(help="GPU to build for; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, f16 or f32.")] = "bf16",
    rows: Annotated[int, typer.Option(min=1, help="Rows (tokens).")] = 8192,
    cols: Annotated[int, typer.Option(min=1, help="Length of a row.")] = 1024,
    source: Annotated[Path | None, typer.Option(help="Write every kernel's source into this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List generated kernels: registers, shared memory, spills, access widths, matrix instructions, bytes and ideal.

    Kernels are built ahead of time; no GPU is needed, and no time is measured. Exit status 1: a kernel misses a bar.
    """
    targets = [find_target(name) for name in target or ["sm_90"]]
    triton_version()
    chosen = _chosen(list(names or []), _dtype(dtype), rows, cols)
    for _, kernel in chosen if source is not None else ():
        write_whole(Path(str(source)) / f"{kernel.name}.py", kernel.source, hint="Choose another directory.")
    entries_ = [_entry(name, build(kernel, t)) for name, kernel in chosen for t in targets]
    if as_json:
        Console(soft_wrap=True).out(json.dumps(entries_, indent=1), highlight=False)
    else:
        _show(entries_)
    if any(e["faults"] for e in entries_):
        raise typer.Exit(1)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UnsupportedError(f"no kernels are generated for dtype {name!r}; choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _chosen(names: list[str], dtype: torch.dtype, rows: int, cols: int) -> list[tuple[str, Kernel]]:
    known = [*entries(), ATTENTION, EVOFORMER]
    for name in names:
        if name not in known:
            raise UnsupportedError(f"no kernel {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    found: list[tuple[str, Kernel]] = []
    for name in names or known:
        if name == ATTENTION:
            use = Attention(dim=64, block=64, dtype=dtype, scale=0.125, rows=(8 * 64,) * 4)
            sizes = Sizes(batch=2, heads=8, seq=4096, listed=8 * 64 * 8, layout_heads=8)
            found += [(name, k) for k in attention_kernels(use, sizes).values()]
        elif name == EVOFORMER:
            width = evoformer.Evoformer(32, dtype, 32**-0.5, (4 * 32,) * 4, (32,) * 4, dtype, dtype, mask_grad=True)
            alignment = evoformer.Sizes(batch=1, sequences=128, seq=256, heads=4)
            found += [(name, k) for k in evoformer.evoformer_kernels(width, alignment).values()]
        else:
            found += [(name, k) for k in generate(name, example(name, dtype, rows, cols)).kernels]
    return found


def _entry(name: str, built: Build) -> dict[str, Any]:
    kernel, judged = built.kernel, judge(built)
    return {
        "of": name,
        "kernel": kernel.name,
        "target": built.target.name,
        **asdict(built.figures),
        "bytes": kernel.bytes,
        "ideal": kernel.ideal,
        "faults": list(judged.faults),
        "excused": list(judged.excused),
    }


def _show(found: list[dict[str, Any]]) -> None:
    """One line a build, in 100 columns; the bars that one misses, or is not asked, follow the table, in words."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for name in ("regs", "shared", "spills", "wide", "narrow"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("matrix", no_wrap=True)
    for name in ("MB", "ideal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bars", no_wrap=True)
    for e in found:
        wide, narrow = (e[f"{w}_loads"] + e[f"{w}_stores"] for w in ("wide", "narrow"))
        matrix = " ".join(f"{n} {k}" for k, n in e["matrix"].items()) or "-"
        cells = [e["registers"], e["shared"], e["spills"], wide, narrow, matrix, f"{e['bytes'] / 1e6:.1f}"]
        ratio = f"{e['bytes'] / max(e['ideal'], 1):.2f}"
        missed, spared = (" ".join(dict.fromkeys(b.partition(":")[0] for b in e[k])) for k in ("faults", "excused"))
        bars = f"{missed or 'ok'} {'-' * bool(spared)}{spared}".rstrip()
        table.add_row(e["kernel"], e["target"], *map(str, cells), ratio, bars)
    console = Console()
    console.print(table)
    console.print(
        "wide: global loads and stores of 128 bits a thread; narrow: others. MB: moved, re-reads included; "
        "ideal: as a multiple of every input and output once."
    )
    for e in found:
        for fault in e["faults"]:
            console.print(f"{e['kernel']} on {e['target']} misses {fault}")
    for text, where in _excused(found).items():
        console.print(f"-{text}: {', '.join(where)}")


def _excused(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Bars that are not asked, with the reason: of which targets' kernels."""
    out: dict[str, dict[str, None]] = {}
    for e in found:
        for text in e["excused"]:
            bar, reason = text.partition(":")[0], text.rpartition(" (")[2].removesuffix(")")
            out.setdefault(f"{bar} {reason}", {})[f"{e['kernel']} on {e['target']}"] = None
    return {text: list(where) for text, where in out.items()}
