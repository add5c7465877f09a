"""A process of its own, like ``interpret``: the attention kernels against masked dense attention in fp64.

``python -m tests.kernels.interpret_attention CASE...``, a case is ``dtype/block/seq/dim/masks``, masks of ``c``ausal,
``p``added, or ``-``.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from dscompile.codegen.tile.trace import traced
from dscompile.codegen.triton_backend.assemble import assemble, bind
from dscompile.codegen.triton_backend.launch import Launcher
from dscompile.codegen.triton_backend.templates.attention import (
    Attention,
    attention_kernels,
    delta,
    offsets_and_indices,
)  # fmt: skip
from tests.kernels.interpret import DTYPES, main

BATCH, HEADS = 2, 2


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    score = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    score = score.masked_fill(~allowed, -torch.inf)
    return torch.nan_to_num(torch.softmax(score, -1)) @ v


def run(case: str) -> list[float]:
    """Errors of out, dq, dk, dv over the largest value of each."""
    kind, block_, seq_, dim_, masks = case.split("/")
    dtype, block, seq, dim = DTYPES[kind], int(block_), int(seq_), int(dim_)
    g = torch.Generator().manual_seed(seq + dim)
    q, k, v, grad = (torch.randn(BATCH, HEADS, seq, dim, generator=g).to(dtype) for _ in range(4))
    blocks = -(-seq // block)
    layout = (torch.rand(HEADS, blocks, blocks, generator=g) < 0.5).to(torch.int64)
    layout[:, torch.arange(blocks), torch.arange(blocks)] = 1
    layout[0, -1] = 0  # a row of blocks that sees nothing
    allowed = (
        layout.repeat_interleave(block, 1)
        .repeat_interleave(block, 2)[:, :seq, :seq]
        .bool()[None]
        .expand(BATCH, -1, -1, -1)
    )
    keep = torch.ones(BATCH, seq, dtype=torch.int8)
    if "p" in masks:
        keep[1, -seq // 3 :] = 0
        allowed = allowed & (keep[:, None, None, :] != 0)
    if "c" in masks:
        allowed = allowed & torch.ones(seq, seq).tril().bool()
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = dense(*wide, allowed)
    wanted = [expected.detach(), *torch.autograd.grad(expected, wide, grad.double())]

    use = Attention(BATCH, HEADS, seq, dim, block, int(layout.sum()), dtype, "c" in masks, "p" in masks)
    kernels = attention_kernels(use)
    rows, cols = offsets_and_indices(layout), offsets_and_indices(layout.transpose(1, 2))
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:-1], torch.nan)
    Launcher(kernels["forward"])(q, k, v, keep, *rows, out, lse)
    (d,) = bind(assemble(traced(delta, grad, out), "attention_delta"), Launcher)([grad, out])
    dq, dk, dv = (torch.full_like(q, torch.nan) for _ in range(3))
    Launcher(kernels["backward_q"])(q, k, v, grad, lse, d, keep, *rows, dq)
    Launcher(kernels["backward_kv"])(q, k, v, grad, lse, d, keep, *cols, dk, dv)
    errors = [(f.double() - w).abs().max() / w.abs().max() for f, w in zip([out, dq, dk, dv], wanted, strict=True)]
    return [float(torch.nan_to_num(e, nan=torch.inf)) for e in errors]


if __name__ == "__main__":
    main(sys.argv[1:], run)
