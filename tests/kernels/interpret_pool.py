"""A process of its own: moves, pools and batch norms in Triton's interpreter against PyTorch's own operators in fp64.

A case is ``name/dtype/N/H/W``; see ``pools``.
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
from tests.kernels.interpret import DTYPES, excess, main
from tests.kernels.pools import POOLS
from tests.kernels.scatters import SCATTERS


def run(case: str) -> dict[str, Any]:
    name, dtype, images, height, width = case.split("/")
    function = (POOLS | SCATTERS)[name]
    g = torch.Generator().manual_seed(int(width))
    x = torch.randn(int(images), 4, int(height), int(width), generator=g)
    x = ((x * 4).round() / 4).to(DTYPES[dtype])  # many equal values
    assembled = assemble(traced(function, x), "kernel")
    found, wanted = bind(assembled, Launcher)([x]), function(x.double())
    found, wanted = (list(v) if isinstance(v, (list, tuple)) else [v] for v in (found, wanted))
    return {
        "error": [excess(f, w) for f, w in zip(found, wanted, strict=True)],
        "shape": [f.shape for f in found] == [w.shape for w in wanted],
        "kernels": len(assembled.kernels),
        "left": [str(n.target) for n in assembled.fused.order if isinstance(n, fx.Node)],
    }


if __name__ == "__main__":
    main(sys.argv[1:], run)
