"""Block-sparse attention as a user writes it without a kernel: SDPA on gathered key blocks.

Query blocks that see equally many key blocks are one call of PyTorch's CPU flash attention, so nothing is padded; the
backward calls its backward operator on the gathered blocks, and adds up what several query blocks give one key block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

Buckets = list[tuple[Tensor, Tensor]]
"""Rows ``[n]`` that see ``c`` columns each, and those columns ``[n, c]``."""


def buckets(layout: Tensor) -> Buckets:
    """Group the rows of a layout ``[rows, columns]`` by how many columns they see."""
    counts = layout.sum(1)
    found = []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        found.append((rows, layout[rows].nonzero()[:, 1].view(-1, count)))
    return found


class GatheredSdpa(torch.autograd.Function):
    """``apply(q, k, v, buckets, block)`` with ``[1, heads, seq, size]`` tensors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, found: Buckets, block: int) -> Tensor:
        qs, ks, vs = (_blocks(x, block) for x in (q, k, v))
        out = torch.empty_like(qs)
        kept: list[Tensor] = []
        for rows, columns in found:
            part, lse = FORWARD(qs[rows], _gather(ks, columns), _gather(vs, columns), 0.0, False)
            out[rows] = part
            kept.append(lse)
        ctx.save_for_backward(qs, ks, vs, out, *kept)
        ctx.found, ctx.block = found, block
        return _sequence(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        qs, ks, vs, out, *kept = ctx.saved_tensors
        grads = _blocks(grad, ctx.block)
        dq = torch.empty_like(qs)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32) for x in (ks, vs))
        for (rows, columns), lse in zip(ctx.found, kept, strict=True):
            part = BACKWARD(
                *(grads[rows], qs[rows], _gather(ks, columns), _gather(vs, columns), out[rows], lse, 0.0, False)
            )
            dq[rows] = part[0]
            for total, piece in zip((dk, dv), part[1:], strict=True):
                heads, size = piece.shape[1], piece.shape[3]
                pieces = piece.view(len(rows), heads, columns.shape[1], ctx.block, size).transpose(1, 2).flatten(0, 1)
                total.index_add_(0, columns.flatten(), pieces.float())
        return _sequence(dq), _sequence(dk).to(grad.dtype), _sequence(dv).to(grad.dtype), None, None


def _blocks(x: Tensor, block: int) -> Tensor:
    """``[1, heads, seq, size]`` as contiguous ``[blocks, heads, block, size]``."""
    _, heads, seq, size = x.shape
    return x.view(heads, seq // block, block, size).transpose(0, 1).contiguous()


def _sequence(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """The key blocks of each row: ``[n, heads, c * block, size]``."""
    return x[columns].transpose(1, 2).flatten(2, 3)
