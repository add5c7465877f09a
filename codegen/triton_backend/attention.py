"""Launch the block-sparse attention kernels for the operators of :mod:`dscompile.attention_ops`.

One compiled kernel serves every batch, sequence length and layout: they are arguments. Nothing here
waits for the GPU, and nothing reads the layout's data on the host.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.attention_gathered import Blocks, lse_like, result_like
from dscompile.codegen.triton_backend.launch import Launcher
from dscompile.codegen.triton_backend.templates.attention import KERNELS, SHARED, Attention, attention_kernels

log = logging.getLogger("dscompile")

RESERVED = 4096
"""Bytes of shared memory that a kernel takes besides its tiles in flight."""


def no_triton_kernel(q: Tensor, k: Tensor, blocks: Blocks) -> str:
    """Why attention of these operands runs gathered, not in the Triton kernels, on a GPU; "" if it runs in them.

    No data is read: fake tensors do.
    """
    if importlib.util.find_spec("triton") is None:
        return "the extra 'triton' is not installed"
    if blocks.row_ptr is None or blocks.col_idx is None:
        return "the Triton kernels take a layout; this attention is dense"
    if k.shape[2] != q.shape[2]:
        return f"the Triton kernels take as many keys as queries, not {k.shape[2]} and {q.shape[2]}"
    return _use(q, blocks, ()).refusal()


@functools.cache
def warn_gathered(reason: str) -> None:
    """Say once a process, for each reason, that attention on a GPU runs gathered."""
    log.warning("block-sparse attention on a GPU runs as gathered attention, many times slower: %s", reason)


def triton_forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as :mod:`dscompile.attention_ops` defines them."""
    q, k, v = map(adjacent_rows, (q, k, v))
    out, lse = result_like(q), _statistic(q)
    run = _launchers(_use(q, blocks, (q, k, v)))["forward"]
    run(q, k, v, *_listing(blocks, transposed=False), out, lse, **_numbers(blocks, q=q, k=k, v=v))
    return out, _as_lse(lse, q)


def triton_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    grad_out, q, k, v = map(adjacent_rows, (grad_out, q, k, v))
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # as the forward made it: then nothing is copied
    lse, delta = lse.contiguous(), _statistic(q)
    dq, dk, dv = result_like(q), result_like(k), result_like(v)
    run = _launchers(_use(q, blocks, (q, k, v, grad_out)))
    numbers = _numbers(blocks, q=q, k=k, v=v, grad=grad_out)
    run["backward_q"](q, k, v, grad_out, out, lse, *_listing(blocks, transposed=False), dq, delta, **numbers)
    run["backward_kv"](q, k, v, grad_out, lse, delta, *_listing(blocks, transposed=True), dk, dv, **numbers)
    return dq, dk, dv


@functools.cache
def _launchers(use: Attention) -> dict[str, Launcher]:
    kernels = attention_kernels(use)
    return {what: Launcher(kernels[what]) for what in KERNELS}


def _use(q: Tensor, blocks: Blocks, operands: Sequence[Tensor]) -> Attention:
    """What is compiled in for ``operands``; without any, what decides whether there is a kernel."""
    rows = [x.stride(2) for x in operands] + [0] * (4 - len(operands))
    return Attention(
        q.shape[3],
        blocks.block,
        q.dtype,
        float(blocks.scale),
        (rows[0], rows[1], rows[2], rows[3]),
        causal=blocks.causal,
        padded=blocks.key_padding_mask is not None,
        ragged=bool(operands) and q.shape[2] % blocks.block != 0,
        precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        shared=shared_memory(q) if operands else SHARED,
    )


def shared_memory(q: Tensor) -> int:
    """Bytes of shared memory for tiles in flight: as many as the GPU at hand gives a program."""
    if not q.is_cuda:
        return SHARED
    properties: Any = torch.cuda.get_device_properties(q.device)
    most: int = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return min(SHARED, most - RESERVED)


def adjacent_rows(x: Tensor) -> Tensor:
    """``x`` with the elements of each row adjacent, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _statistic(q: Tensor) -> Tensor:
    """Memory for one fp32 value a query: ``[batch, heads, seq]``, contiguous."""
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _as_lse(lse: Tensor, q: Tensor) -> Tensor:
    """With the strides that the operator promises for the device."""
    promised = lse_like(q)
    return lse if promised.stride() == lse.stride() else promised.copy_(lse)


def _listing(blocks: Blocks, *, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Padding, offsets and indices; a kernel for no padding does not read the first."""
    found = (blocks.t_row_ptr, blocks.t_col_idx) if transposed else (blocks.row_ptr, blocks.col_idx)
    offsets, indices = found
    assert offsets is not None, "no_triton_kernel() said that there is a layout"
    assert indices is not None
    mask = blocks.key_padding_mask
    padding = (offsets if mask is None else mask.contiguous()).view(torch.uint8)
    return padding, offsets.contiguous(), indices.contiguous()


def _numbers(blocks: Blocks, **operands: Tensor) -> dict[str, int]:
    """Sizes and strides, as the kernels call them."""
    batch, heads, seq, _ = operands["q"].shape
    assert blocks.row_ptr is not None, "no_triton_kernel() said that there is a layout"
    found = {"batch": batch, "heads": heads, "seq": seq, "layout_heads": blocks.row_ptr.shape[0]}
    for name, x in operands.items():
        found |= dict(zip((f"{name}_batch", f"{name}_head"), x.stride(), strict=False))
    return found
