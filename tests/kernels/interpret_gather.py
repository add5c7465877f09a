"""A process of its own: gathers, running sums and joined sums in Triton's interpreter against fp64.

A case is ``name/dtype/A/B``; see ``gathers`` and ``sums``.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import torch
from torch import fx

from dscompile.codegen.tile.trace import traced
from dscompile.codegen.triton_backend.assemble import assemble, bind
from dscompile.codegen.triton_backend.launch import Launcher
from tests.kernels.gathers import CASES
from tests.kernels.interpret import DTYPES, excess, main
from tests.kernels.sums import SUMS


def run(case: str) -> dict[str, Any]:
    name, dtype, first, last = case.split("/")
    function = (CASES | SUMS)[name]
    g = torch.Generator().manual_seed(int(last))
    x = torch.randn(int(first), 4, int(last), generator=g).to(DTYPES[dtype])
    rows = torch.randint(int(first), (max(int(first), 6),), generator=g)
    cols = torch.randint(int(last), (5,), generator=g, dtype=torch.int32)
    rows[0], cols[0] = int(first) - 1, int(last) - 1
    assembled = assemble(traced(function, x, rows, cols), "kernel")
    found = bind(assembled, Launcher)([x, rows, cols])
    wanted = function(x.double(), rows, cols)
    found, wanted = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (found, wanted))
    return {
        "error": max(excess(f, w) for f, w in zip(found, wanted, strict=True)),
        "shape": [f.shape for f in found] == [w.shape for w in wanted],
        "kernels": len(assembled.kernels),
        "left": [str(n.target) for n in assembled.fused.order if isinstance(n, fx.Node)],
    }


if __name__ == "__main__":
    main(sys.argv[1:], run)
