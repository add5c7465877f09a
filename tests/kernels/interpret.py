"""A process of its own: run kernels in Triton's interpreter, compare with fp64, print one JSON object.

``python -m tests.kernels.interpret CASE...``, a case is ``name/dtype/rows/cols``. The variable TRITON_INTERPRET counts
when Triton is imported, and the shim changes the interpreter: neither belongs in the process that runs pytest.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dscompile.codegen.triton_backend.assemble import bind
from dscompile.codegen.triton_backend.launch import Launcher
from dscompile.codegen.triton_backend.library import generate
from tests.kernels import interpreter_shim, references

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.bool: 0.0}


def excess(found: torch.Tensor, wanted: torch.Tensor, terms: float = 0.0) -> float:
    """The largest error, in units of what rounding allows: one unit in the last place, and fp32's own noise.

    ``terms``: the size of what the result is a difference of, where that is larger than any result.
    """
    if not found.dtype.is_floating_point:
        return 0.0 if torch.equal(found, wanted) else float("inf")
    if not found.numel():
        return 0.0
    same = (found.double() == wanted) | (found.isnan() & wanted.isnan())
    scale = wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else torch.tensor(1.0)
    allowed = ULP[found.dtype] * wanted.abs() + 3e-6 * max(float(scale), terms) + 1e-12
    error = torch.where(same, 0.0, (found.double() - wanted).abs() / allowed)
    return float(torch.nan_to_num(error, nan=float("inf")).max())


def run(case: str) -> list[float]:
    """For every result, how far it is off."""
    name, dtype, rows, cols = case.split("/")
    arguments, wanted = references.case(name, DTYPES[dtype], int(rows), int(cols))
    assembled = generate(name, tuple(arguments))
    found = bind(assembled, Launcher)(list(arguments))
    terms = references.terms(name, arguments)
    return [excess(*pair) for pair in itertools.zip_longest(found, wanted, terms, fillvalue=0.0)]


def main(cases: Sequence[str], runner: Any = run) -> None:
    interpreter_shim.install()
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case] = runner(case)
        except Exception:
            results[case] = traceback.format_exc(limit=-4)
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
