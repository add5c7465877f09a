"""A process of its own, like ``interpret``: ``dscompile.sparse_attention`` on the Triton kernels, against masked dense
attention in fp64.

``python -m tests.kernels.interpret_attention CASE...``, a case is ``layout/dtype/block/seq/dim/flags``: a layout of
:data:`LAYOUTS` or ``random``; flags of ``c``ausal, ``p``added keys, ``s``cale, ``t``: operands that are slices of one
tensor, ``h``: one layout for all heads, or ``-``. The operator's implementation for GPUs takes the place of that for
CPUs: what runs is what runs on a GPU, but for the interpreter behind the launch.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

import dscompile
from dscompile import attention_ops
from dscompile.codegen.triton_backend import attention
from tests.kernels.interpret import DTYPES, main
from tests.sparse.layouts import LAYOUTS

BATCH, HEADS = 2, 2


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    score = (q @ k.transpose(-1, -2)) * scale
    score = score.masked_fill(~allowed, -torch.inf)
    return torch.nan_to_num(torch.softmax(score, -1)) @ v


def layout_of(name: str, block: int, blocks: int, g: torch.Generator) -> Tensor:
    if name != "random":
        return LAYOUTS[name]().make_layout(16 * blocks)
    layout = (torch.rand(HEADS, blocks, blocks, generator=g) < 0.5).to(torch.int64)
    layout[:, torch.arange(blocks), torch.arange(blocks)] = 1
    layout[0, -1] = 0  # a row of blocks that sees nothing
    layout[1, :, 0] = 0  # a column that nothing sees
    return layout


def operands(seq: int, dim: int, dtype: torch.dtype, sliced: bool, g: torch.Generator) -> list[Tensor]:
    """q, k, v and the gradient; sliced: as chunks of one product, which lie ``[batch, seq, heads, dim]``."""
    if not sliced:
        return [torch.randn(BATCH, HEADS, seq, dim, generator=g).to(dtype) for _ in range(4)]
    wide = torch.randn(BATCH, seq, 4 * HEADS * dim, generator=g).to(dtype)
    return [x.unflatten(-1, (HEADS, dim)).transpose(1, 2) for x in wide.chunk(4, -1)]


def run(case: str) -> list[float]:
    """Errors of out, dq, dk, dv over the largest value of each."""
    name, kind, block_, seq_, dim_, flags = case.split("/")
    dtype, block, seq, dim = DTYPES[kind], int(block_), int(seq_), int(dim_)
    g = torch.Generator().manual_seed(seq + dim)
    q, k, v, grad = operands(seq, dim, dtype, "t" in flags, g)
    layout = layout_of(name, block, -(-seq // block), g)
    layout = layout[:1] if "h" in flags else layout
    allowed = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :seq, :seq].bool()
    allowed = allowed[None].expand(BATCH, HEADS, seq, seq)
    padding = None
    if "p" in flags:
        padding = torch.zeros(BATCH, seq, dtype=torch.bool)
        padding[1, -seq // 3 :] = True
        allowed = allowed & ~padding[:, None, None, :]
    if "c" in flags:
        allowed = allowed & torch.ones(seq, seq).tril().bool()
    scale = 0.3 if "s" in flags else dim**-0.5
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    expected = dense(*wide, allowed, scale)
    wanted = [expected.detach(), *torch.autograd.grad(expected, wide, grad.double())]

    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = dscompile.sparse_attention(
        *leaves, layout, block, causal="c" in flags, key_padding_mask=padding, scale=0.3 if "s" in flags else None
    )
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    compiled = attention._launchers.cache_info().misses
    assert compiled, "the kernels ran"
    errors = [(f.double() - w).abs().max() / w.abs().max() for f, w in zip(found, wanted, strict=True)]
    return [float(torch.nan_to_num(e, nan=torch.inf)) for e in errors]


def gpu_for_cpu() -> torch.library.Library:
    """The operator's implementation for GPUs, in the place of that for CPUs; for as long as the result lives."""
    library = torch.library.Library("dscompile", "IMPL")
    library.impl("block_sparse_attention", attention_ops._forward_gpu, "CPU", allow_override=True)
    library.impl("block_sparse_attention_backward", attention_ops._backward_gpu, "CPU", allow_override=True)
    return library


if __name__ == "__main__":
    held = gpu_for_cpu()
    main(sys.argv[1:], run)
