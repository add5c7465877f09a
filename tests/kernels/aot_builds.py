"""A process of its own: build kernels ahead of time, print one JSON object of figures and faults.

``python -m tests.kernels.aot_builds FOLDER CASE...``. A case is ``name/dtype/rows/cols@target`` for a kernel of the
library, ``attention/dtype/block/dim/c@target`` for the attention kernels (``c`` causal, ``p`` padded keys, ``t``
tf32, ``-`` none), ``evoformer/dtype/dim/mb@target`` for those of Evoformer attention (``m`` mask, ``b`` pair bias,
``t`` tf32); a ``!`` before it leaves the promise of alignment out. FOLDER holds the cache, so that builds are
kept between runs.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dscompile.codegen.triton_backend.aot import build
from dscompile.codegen.triton_backend.bars import judge
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.library import example, generate
from dscompile.codegen.triton_backend.targets import find_target
from dscompile.codegen.triton_backend.templates import evoformer
from dscompile.codegen.triton_backend.templates.attention import Attention, Sizes, attention_kernels

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def kernels(case: str) -> list[Kernel]:
    name, *rest = case.split("/")
    if name == "evoformer":
        return evoformer_kernels(*rest)
    if name != "attention":
        dtype, rows, cols = rest
        return list(generate(name, example(name, DTYPES[dtype], int(rows), int(cols))).kernels)
    dtype, block, dim, flags = rest
    listed = 8 * (4096 // int(block)) * 8
    precision = "tf32" if "t" in flags else "ieee"
    use = Attention(
        int(dim),
        int(block),
        DTYPES[dtype],
        int(dim) ** -0.5,
        (8 * int(dim),) * 4,
        "c" in flags,
        "p" in flags,
        precision=precision,
    )
    return list(attention_kernels(use, Sizes(2, 8, 4096, listed, 8)).values())


def evoformer_kernels(kind: str, dim_: str, flags: str) -> list[Kernel]:
    dtype, dim = DTYPES[kind], int(dim_)
    use = evoformer.Evoformer(
        dim,
        dtype,
        dim**-0.5,
        (4 * dim,) * 4,
        (dim,) * 4,
        dtype if "m" in flags else None,
        dtype if "b" in flags else None,
        mask_grad="m" in flags,
        precision="tf32" if "t" in flags else "ieee",
    )
    return list(evoformer.evoformer_kernels(use, evoformer.Sizes(1, 128, 256, 4)).values())


def run(case: str, folder: Path) -> dict[str, Any]:
    what, _, target = case.removeprefix("!").partition("@")
    out: dict[str, Any] = {}
    for kernel in kernels(what):
        built = build(kernel, find_target(target), aligned=not case.startswith("!"), folder=folder)
        judged = judge(built)
        out[kernel.name] = {
            "faults": judged.faults,
            "excused": judged.excused,
            **asdict(built.figures),
            "bytes": kernel.bytes,
        }
    return out


def main(folder: str, cases: list[str]) -> None:
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case] = run(case, Path(folder))
        except Exception:
            results[case] = traceback.format_exc(limit=-4)
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
