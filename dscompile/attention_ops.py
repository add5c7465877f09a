"""Block-sparse attention as operators: ``dscompile::block_sparse_attention`` and its backward.

``q``, ``k``, ``v`` are ``[batch, heads, seq, head_dim]`` of one floating dtype, in any layout; keys may be longer or
shorter than queries, and may have fewer heads, each read by as many consecutive heads of queries (grouped-query
attention). The layout says which blocks of ``block`` queries see which blocks of ``block`` keys, as CSR with
absolute offsets: query block ``r`` of head ``h`` sees key blocks ``col_idx[row_ptr[h, r] : row_ptr[h, r + 1]]``, in
ascending order. ``row_ptr`` is int32 ``[heads, ceil(seq_q / block) + 1]``, or ``[1, ...]`` for a layout that all heads
share; ``col_idx`` is int32 ``[nnz]``. ``t_row_ptr`` and ``t_col_idx`` are the same for the transposed layout (which
query blocks a key block is seen by) and serve the backward. All four None means dense attention.

``causal`` hides keys after the query (counted from the first of each); ``key_padding_mask`` is bool
``[batch, seq_k]``, True where a key is *padding* and hidden, as in ``torch.nn.MultiheadAttention``.

The result is ``(out, lse)``: ``out`` like ``q`` but lying ``[batch, seq, heads, head_dim]`` in memory (as PyTorch's
own CPU attention returns it), and ``lse`` ``[batch, heads, seq_q]`` (lying ``[batch, seq_q, heads]``, on GPUs as its
shape says), the natural logarithm of the softmax's denominator, in fp32 (fp64 for fp64). A query that sees no key has
output 0, lse -inf, and gradient 0. ``lse`` has no derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dscompile.attention_gathered import Blocks, gathered_backward, gathered_forward, lse_like, result_like
from dscompile.errors import UnsupportedError

if TYPE_CHECKING:
    from dscompile.codegen.cpu.kernels import AttentionKernels

BLOCKS = range(16, 129, 16)
"""Block sizes that the operators take: multiples of 16 up to 128."""

HEAD_STEP = 8
"""Head sizes are multiples of this."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that the operators take."""

COMPILED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the C++ kernels take; others run gathered."""

_LAYOUT = (
    "Tensor? row_ptr, Tensor? col_idx, Tensor? t_row_ptr, Tensor? t_col_idx, int block, bool causal, "
    "Tensor? key_padding_mask, float scale"
)
_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define(
    f"block_sparse_attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "block_sparse_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> None:
    """Refuse what the operators cannot compute.

    Raises:
        UnsupportedError: a dtype, head size or block size that no kernel takes, or shapes that do not fit.
    """
    where = "block-sparse attention"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise UnsupportedError(
            f"{where}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must have one dtype of "
            f"{', '.join(str(d) for d in DTYPES)}. Cast them."
        )
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UnsupportedError(
            f"{where}: q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; expected "
            "[batch, heads, seq, head_dim] with equal batch and head_dim, and k like v."
        )
    if q.shape[1] != k.shape[1] and (not k.shape[1] or q.shape[1] % k.shape[1]):
        raise UnsupportedError(
            f"{where}: {k.shape[1]} heads of k and v do not divide {q.shape[1]} heads of q: each is read by as many."
        )
    if not q.shape[3] or q.shape[3] % HEAD_STEP:
        raise UnsupportedError(f"{where}: head size {q.shape[3]} is not a multiple of {HEAD_STEP}; pad it.")
    if blocks.block not in BLOCKS:
        raise UnsupportedError(f"{where}: block {blocks.block} is not one of {', '.join(map(str, BLOCKS))}.")
    if not blocks.scale > 0:
        raise UnsupportedError(f"{where}: scale {blocks.scale} is not positive; scale q instead.")
    mask = blocks.key_padding_mask
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != (k.shape[0], k.shape[2])):
        raise UnsupportedError(
            f"{where}: key_padding_mask is {mask.dtype} {list(mask.shape)}; expected torch.bool "
            f"{[k.shape[0], k.shape[2]]}, True where a key is padding."
        )
    for name, pointers, columns, seq in (
        ("", blocks.row_ptr, blocks.col_idx, q.shape[2]),
        ("t_", blocks.t_row_ptr, blocks.t_col_idx, k.shape[2]),
    ):
        if (pointers is None) != (columns is None):
            raise UnsupportedError(f"{where}: {name}row_ptr and {name}col_idx must be given together.")
        if pointers is None or columns is None:
            continue
        rows = -(-seq // blocks.block)
        if pointers.dtype != torch.int32 or columns.dtype != torch.int32:
            raise UnsupportedError(f"{where}: {name}row_ptr and {name}col_idx must be int32.")
        if pointers.dim() != 2 or pointers.shape[0] not in (1, q.shape[1]) or pointers.shape[1] != rows + 1:
            raise UnsupportedError(
                f"{where}: {name}row_ptr has shape {list(pointers.shape)}; sequence {seq} in blocks of {blocks.block} "
                f"needs [{q.shape[1]} or 1, {rows + 1}]."
            )


def check_transposed(blocks: Blocks) -> None:
    """Refuse a backward without a transposed layout that fits the layout.

    Raises:
        UnsupportedError: it is missing, or has other heads or another number of blocks.
    """
    for name, one, other in (
        ("row_ptr", blocks.row_ptr, blocks.t_row_ptr),
        ("col_idx", blocks.col_idx, blocks.t_col_idx),
    ):
        if one is None and other is None:
            continue
        if one is None or other is None or one.shape[0] != other.shape[0]:
            raise UnsupportedError(
                f"block-sparse attention: the backward needs {name} and t_{name} of one layout; their first dimensions "
                f"are {None if one is None else one.shape[0]} and {None if other is None else other.shape[0]}."
            )


# -- kernels ---------------------------------------------------------------------------------------------------------


def _forward_anywhere(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    return gathered_forward(q, *_wide(q, k, v), _checked(q, k, v, layout))


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    blocks = _checked(q, k, v, layout)
    kernels = _compiled(q.dtype)
    return (gathered_forward if kernels is None else kernels.forward)(q, *_wide(q, k, v), blocks)


def _forward_gpu(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    from dscompile.codegen.triton_backend import attention

    blocks = _checked(q, k, v, layout)
    if reason := no_gpu_kernel(q, k, blocks):
        attention.warn_gathered(reason)
    return (gathered_forward if reason else attention.triton_forward)(q, *_wide(q, k, v), blocks)


def _backward_anywhere(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _checked_backward(q, k, v, layout)
    return _narrow(k, *gathered_backward(grad_out, q, *_wide(q, k, v), out, lse, blocks))


def _backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _checked_backward(q, k, v, layout)
    kernels = _compiled(q.dtype)
    backward = gathered_backward if kernels is None else kernels.backward
    return _narrow(k, *backward(grad_out, q, *_wide(q, k, v), out, lse, blocks))


def _backward_gpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from dscompile.codegen.triton_backend import attention

    blocks = _checked_backward(q, k, v, layout)
    if reason := no_gpu_kernel(q, k, blocks):
        attention.warn_gathered(reason)
    backward = gathered_backward if reason else attention.triton_backward
    return _narrow(k, *backward(grad_out, q, *_wide(q, k, v), out, lse, blocks))


def _checked(q: Tensor, k: Tensor, v: Tensor, layout: tuple[Any, ...]) -> Blocks:
    blocks = Blocks(*layout)
    check_attention(q, k, v, blocks)
    return blocks


def _checked_backward(q: Tensor, k: Tensor, v: Tensor, layout: tuple[Any, ...]) -> Blocks:
    blocks = _checked(q, k, v, layout)
    check_transposed(blocks)
    return blocks


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with each head as often as queries read it (a copy), as the kernels take them."""
    if k.shape[1] == q.shape[1]:
        return k, v
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def _narrow(k: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what :func:`_wide` was given, from those of what it made: summed over each group."""
    if dk.shape[1] == k.shape[1]:
        return dq, dk, dv
    groups = dk.shape[1] // k.shape[1]
    dk, dv = (result_like(k).copy_(x.unflatten(1, (-1, groups)).sum(2)) for x in (dk, dv))
    return dq, dk, dv


def no_gpu_kernel(q: Tensor, k: Tensor, blocks: Blocks) -> str:
    """Why attention of these operands runs gathered on a GPU; "" if the Triton kernels run it."""
    from dscompile.codegen.triton_backend.attention import no_triton_kernel

    return no_triton_kernel(q, k, blocks)


def _compiled(dtype: torch.dtype) -> AttentionKernels | None:
    """The C++ kernels, if they take ``dtype`` and can be built; :func:`no_kernel` says why not."""
    if no_kernel(dtype):
        return None
    from dscompile.codegen.cpu.builder import attention_kernels

    return attention_kernels().kernels


def no_kernel(dtype: torch.dtype) -> str:
    """Why attention of ``dtype`` runs gathered, not compiled, on CPU; "" if it is compiled."""
    if dtype not in COMPILED:
        return f"the C++ kernel takes {', '.join(str(d) for d in COMPILED)}, not {dtype}"
    from dscompile.codegen.cpu.builder import attention_kernels

    build = attention_kernels()
    return build.reason if build.kernels is None else build.kernels.lacks(dtype)


_LIBRARY.impl("block_sparse_attention", _forward_anywhere, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_attention_backward", _backward_anywhere, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_attention", _forward_cpu, "CPU")
_LIBRARY.impl("block_sparse_attention_backward", _backward_cpu, "CPU")
_LIBRARY.impl("block_sparse_attention", _forward_gpu, "CUDA")
_LIBRARY.impl("block_sparse_attention_backward", _backward_gpu, "CUDA")


# -- shapes ----------------------------------------------------------------------------------------------------------


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *layout: Any) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, Blocks(*layout))
    return result_like(q), lse_like(q)


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return result_like(q), result_like(k), result_like(v)


torch.library.register_fake("dscompile::block_sparse_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("dscompile::block_sparse_attention_backward", _backward_fake, lib=_LIBRARY)


# -- derivatives -----------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, row_ptr, col_idx, t_row_ptr, t_col_idx, ctx.block, ctx.causal, mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, row_ptr, col_idx, t_row_ptr, t_col_idx, mask)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, row_ptr, col_idx, t_row_ptr, t_col_idx, mask = ctx.saved_tensors
    grads = torch.ops.dscompile.block_sparse_attention_backward.default(
        *(grad_out, q, k, v, out, lse, row_ptr, col_idx, t_row_ptr, t_col_idx),
        *(ctx.block, ctx.causal, mask, ctx.scale),
    )
    return (*grads, *((None,) * 8))


torch.library.register_autograd("dscompile::block_sparse_attention", _backward, setup_context=_setup, lib=_LIBRARY)
