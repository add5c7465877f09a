"""A process of its own: the dropout kernels, forward and backward, for some seeds; prints figures of the masks."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import hashlib
from typing import Any

import torch

from dscompile.codegen.triton_backend.assemble import bind
from dscompile.codegen.triton_backend.launch import Launcher
from dscompile.codegen.triton_backend.library import generate
from tests.kernels.interpret import excess, main


def call(name: str, *arguments: torch.Tensor) -> Any:
    return bind(generate(name, arguments), Launcher)(list(arguments))


def run(seed: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x, bias, residual, grad = (
        torch.randn(s, generator=g).bfloat16() for s in ((64, 128), (128,), (64, 128), (64, 128))
    )
    key = torch.tensor(int(seed))
    (out,) = call("bias_dropout_residual", x, bias, residual, key)
    dx, dbias = call("bias_dropout_residual_backward", grad, key)
    kept = dx != 0  # no gradient is exactly 0
    wide = x.double() + bias.double()
    forward = torch.where(kept, wide / 0.9, 0.0) + residual.double()
    backward = torch.where(kept, grad.double() / 0.9, 0.0)
    return {
        "error": max(excess(out, forward), excess(dx, backward), excess(dbias, backward.sum(0))),
        "mask differs": int(
            ((out.double() - residual.double()).abs() < 1e-9).ne(~kept).logical_and(wide.abs() > 0.1).sum()
        ),
        "dropped": 1 - float(kept.float().mean()),
        "mask": hashlib.sha256(kept.numpy().tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    main(sys.argv[1:], run)
