"""Evoformer attention (OpenFold, AlphaFold): attention over 5-D tensors with two biases, both with gradients.

``softmax(scale * Q K^T + mask + pair bias) V`` for every row of a multiple sequence alignment, forward and backward;
the scores of the whole never exist. On GPUs Triton kernels run it; on CPUs, and where no kernel does, plain PyTorch, in
pieces whose scores fit a budget. Arguments and shapes are DeepSpeed4Science's ``DS4Sci_EvoformerAttention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import UnsupportedError
from dscompile.evoformer_pieces import pieces_backward, pieces_forward, result_dtype

SCORES = 1 << 24
"""Numbers that a piece may hold by default: 64 MiB in fp32."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define(
    "evoformer_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? pair, float scale, int budget) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "evoformer_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? pair, Tensor out, "
    "Tensor lse, float scale, int budget, bool mask_grad, bool pair_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def evoformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    biases: Sequence[Tensor | None] = (),
    *,
    scale: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Attention along the residues of each sequence.

    Args:
        q: queries ``[batch, sequences, residues, heads, head_dim]``, fp32, bf16, fp16 or fp64.
        k: keys, like ``q``.
        v: values, like ``q``.
        biases: up to two tensors (or None) that are added to the scores: the mask
            ``[batch, sequences, 1, 1, residues]`` and the pair bias ``[batch, 1, heads, residues, residues]``.
        scale: factor of ``q k^T``; ``head_dim ** -0.5`` by default.
        chunk: temporary memory, as the number of residues whose scores may exist at once over all sequences:
            ``chunk / residues`` of the scores of the whole (one residue of one sequence is the least). By default
            64 MiB. The Triton kernels hold no scores and need no chunk.

    Returns:
        Like ``q``. A residue that sees nothing (all scores ``-inf``) gets zeros, and gives no gradient.

    Raises:
        UnsupportedError: shapes or dtypes that do not fit.
    """
    if not isinstance(biases, (list, tuple)):
        raise UnsupportedError(
            f"evoformer attention: biases is a {type(biases).__name__}; expected a list: [mask, pair bias]."
        )
    if len(biases) > 2:
        raise UnsupportedError(f"evoformer attention: {len(biases)} biases; expected [mask, pair bias].")
    mask, pair = (*biases, None, None)[:2]
    _check(q, k, v, mask, pair)
    batch, sequences, residues, heads, size = q.shape
    budget = SCORES if chunk is None else max(1, chunk) * batch * sequences * heads * residues
    out: Tensor = torch.ops.dscompile.evoformer_attention.default(
        q, k, v, mask, pair, size**-0.5 if scale is None else float(scale), budget
    )[0]
    return out


def DS4Sci_EvoformerAttention(  # noqa: N802
    Q: Tensor,  # noqa: N803
    K: Tensor,  # noqa: N803
    V: Tensor,  # noqa: N803
    biases: Sequence[Tensor | None],
) -> Tensor:
    """:func:`evoformer_attention` with DeepSpeed4Science's name and arguments.

    Args:
        Q: queries ``[batch, sequences, residues, heads, head_dim]``.
        K: keys, like ``Q``.
        V: values, like ``Q``.
        biases: up to two: ``[batch, sequences, 1, 1, residues]`` and ``[batch, 1, heads, residues, residues]``; each
            may be None.

    Returns:
        Like ``Q``.
    """
    return evoformer_attention(Q, K, V, biases)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None) -> None:
    if q.dim() != 5 or k.shape != q.shape or v.shape != q.shape:
        raise UnsupportedError(
            f"evoformer attention: q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; expected one "
            "shape [batch, sequences, residues, heads, head_dim]."
        )
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise UnsupportedError(
            f"evoformer attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one float dtype."
        )
    batch, sequences, residues, heads, _ = q.shape
    for name, bias, shape in (
        ("the mask", mask, (batch, sequences, 1, 1, residues)),
        ("the pair bias", pair, (batch, 1, heads, residues, residues)),
    ):
        if bias is not None and (bias.shape != shape or not bias.dtype.is_floating_point):
            raise UnsupportedError(
                f"evoformer attention: {name} is {bias.dtype} {list(bias.shape)}; expected a float {list(shape)}."
            )


# -- kernels -----------------------------------------------------------------------------------------------------------


def no_evoformer_kernel(q: Tensor, mask: Tensor | None, pair: Tensor | None) -> str:
    """Why attention of these operands runs in pieces on a GPU; "" if the Triton kernels run it."""
    from dscompile.codegen.triton_backend.evoformer import no_triton_kernel

    return no_triton_kernel(q, mask, pair)


def _forward_gpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None, scale: float, budget: int
) -> tuple[Tensor, Tensor]:
    from dscompile.codegen.triton_backend import evoformer

    if reason := no_evoformer_kernel(q, mask, pair):
        evoformer.warn_pieces(reason)
        return pieces_forward(q, k, v, mask, pair, scale, budget)
    return evoformer.triton_forward(q, k, v, mask, pair, scale)


def _backward_gpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    pair: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    budget: int,
    mask_grad: bool,
    pair_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from dscompile.codegen.triton_backend import evoformer

    if reason := no_evoformer_kernel(q, mask, pair):
        evoformer.warn_pieces(reason)
        return pieces_backward(grad, q, k, v, mask, pair, out, lse, scale, budget, mask_grad, pair_grad)
    return evoformer.triton_backward(grad, q, k, v, mask, pair, out, lse, scale, mask_grad, pair_grad)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None, scale: float, budget: int
) -> tuple[Tensor, Tensor]:
    batch, sequences, residues, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, sequences, heads, residues), dtype=result_dtype(q))


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    pair: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    budget: int,
    mask_grad: bool,
    pair_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dmask = mask.new_empty(mask.shape) if mask is not None and mask_grad else q.new_empty(0, dtype=result_dtype(q))
    dpair = pair.new_empty(pair.shape) if pair is not None and pair_grad else q.new_empty(0, dtype=result_dtype(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask, dpair


# -- derivatives -------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, pair, ctx.scale, ctx.budget = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, mask, pair, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[3:5]
    dq, dk, dv, dmask, dpair = torch.ops.dscompile.evoformer_attention_backward.default(
        grad, *ctx.saved_tensors, ctx.scale, ctx.budget, *wanted
    )
    return dq, dk, dv, dmask if wanted[0] else None, dpair if wanted[1] else None, None, None


_LIBRARY.impl("evoformer_attention", pieces_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("evoformer_attention_backward", pieces_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("evoformer_attention", _forward_gpu, "CUDA")
_LIBRARY.impl("evoformer_attention_backward", _backward_gpu, "CUDA")
torch.library.register_fake("dscompile::evoformer_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("dscompile::evoformer_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("dscompile::evoformer_attention", _backward, setup_context=_setup, lib=_LIBRARY)
