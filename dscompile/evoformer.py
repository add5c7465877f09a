"""Evoformer attention (OpenFold, AlphaFold): attention over 5-D tensors with two biases, both with gradients.

``softmax(scale * Q K^T + mask + pair bias) V`` for every row of a multiple sequence alignment, computed in pieces whose
scores fit a budget, forward and backward: the scores of the whole never exist. Plain PyTorch, any device; computed in
fp32 (fp64 for fp64). Arguments and shapes are DeepSpeed4Science's ``DS4Sci_EvoformerAttention``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import UnsupportedError

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
            64 MiB.

    Returns:
        Like ``q``. A residue that sees nothing (all scores ``-inf``) gets zeros, and gives no gradient.

    Raises:
        UnsupportedError: shapes or dtypes that do not fit.
    """
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


DS4Sci_EvoformerAttention = evoformer_attention
"""DeepSpeed4Science's name."""


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


# -- pieces ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of some sequences of one batch element."""

    batch: int
    sequences: slice
    rows: slice

    @property
    def where(self) -> tuple[int, slice, slice]:
        """Index of the rows in ``[batch, sequences, residues, ...]``."""
        return self.batch, self.sequences, self.rows


def _pieces(q: Tensor, budget: int, buffers: int) -> Iterator[_Piece]:
    """Pieces that hold at most ``budget`` numbers: ``buffers`` scores, and their operands in matrix layout."""
    batch, sequences, residues, heads, size = q.shape

    def cost(rows: int) -> int:
        """Numbers for one sequence: scores, the queries' side (copies and row sums), the keys' (k, v, gradients)."""
        return heads * (buffers * rows * residues + 6 * rows * (size + 1) + 2 * buffers * residues * size)

    rows = residues
    while rows > 1 and cost(rows) > budget:
        rows = -(-rows // 2)
    several = max(1, budget // cost(rows)) if rows == residues else 1
    for b in range(batch):
        for start in range(0, sequences, several):
            for row in range(0, residues, rows):
                yield _Piece(b, slice(start, min(start + several, sequences)), slice(row, min(row + rows, residues)))


def _matrices(x: Tensor, piece: _Piece, rows: slice) -> Tensor:
    """``[sequences * heads, rows, head_dim]`` in the dtype to compute in."""
    part = x[piece.batch, piece.sequences, rows].transpose(1, 2)
    return part.to(_wide(x)).reshape(-1, part.shape[2], part.shape[3])


def _scaled(q: Tensor, piece: _Piece, scale: float) -> Tensor:
    return _matrices(q, piece, piece.rows) * scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _back(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_matrices`: ``[sequences, rows, heads, head_dim]``."""
    return x.view(-1, heads, x.shape[1], x.shape[2]).transpose(1, 2)


def _scores(qs: Tensor, ks: Tensor, mask: Tensor | None, pair: Tensor | None, heads: int, piece: _Piece) -> Tensor:
    """``[sequences, heads, rows, residues]``, one new buffer."""
    scores = torch.bmm(qs, ks.transpose(1, 2)).view(-1, heads, qs.shape[1], ks.shape[1])
    if mask is not None:
        scores += mask[piece.batch, piece.sequences]
    if pair is not None:
        scores += pair[piece.batch, :, :, piece.rows]
    return scores


# -- kernels -----------------------------------------------------------------------------------------------------------


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None, scale: float, budget: int
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(q, k, v, mask, pair, scale, budget)
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, budget, buffers=1):
            _forward_piece(piece, q, k, v, mask, pair, scale, out, lse)
    return out, lse


# The two functions below are no loop bodies: names of a loop would keep one piece alive while the next is made.


def _forward_piece(
    piece: _Piece,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    pair: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    heads, every = q.shape[3], slice(None)
    scores = _scores(_scaled(q, piece, scale), _matrices(k, piece, every), mask, pair, heads, piece)
    most = scores.amax(-1, keepdim=True)
    most.masked_fill_(most == -torch.inf, 0.0)
    total = scores.sub_(most).exp_().sum(-1, keepdim=True)
    values = torch.bmm(scores.flatten(0, 1), _matrices(v, piece, every))
    values.div_(total.flatten(0, 1).masked_fill(total.flatten(0, 1) == 0, 1.0))
    out[piece.where] = _back(values, heads).to(q.dtype)
    lse[piece.batch, piece.sequences, :, piece.rows] = (total.log_() + most).squeeze(-1)


def _backward_kernel(
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
    biases = [b.shape if b is not None and wanted else (0,) for b, wanted in ((mask, mask_grad), (pair, pair_grad))]
    shapes = (q.shape, k.shape, v.shape, *biases)
    grads = [torch.zeros(shape, dtype=_wide(q), device=q.device) for shape in shapes]
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, budget, buffers=2):
            _backward_piece(piece, grad, q, k, v, mask, pair, out, lse, scale, grads)
    types = (q.dtype, k.dtype, v.dtype, *(_wide(q) if b is None else b.dtype for b in (mask, pair)))
    dq, dk, dv, dmask, dpair = (g.to(t) for g, t in zip(grads, types, strict=True))
    return dq, dk, dv, dmask, dpair


def _backward_piece(
    piece: _Piece,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    pair: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grads: list[Tensor],
) -> None:
    """Add one piece to the gradients of q, k, v, mask and pair; those that nobody wants are empty."""
    dq, dk, dv, dmask, dpair = grads
    heads, every = q.shape[3], slice(None)
    qs, ks, vs = _scaled(q, piece, scale), _matrices(k, piece, every), _matrices(v, piece, every)
    gs = _matrices(grad, piece, piece.rows)
    known = lse[piece.batch, piece.sequences, :, piece.rows].unsqueeze(-1)
    known = known.masked_fill(known == -torch.inf, 0.0)
    p = _scores(qs, ks, mask, pair, heads, piece).sub_(known).exp_()
    flat = p.flatten(0, 1)
    dv[piece.batch, piece.sequences] += _back(torch.bmm(flat.transpose(1, 2), gs), heads)
    delta = (gs * _matrices(out, piece, piece.rows)).sum(-1, keepdim=True)
    ds = torch.bmm(gs, vs.transpose(1, 2)).sub_(delta).mul_(flat)
    dq[piece.where] = _back(torch.bmm(ds, ks).mul_(scale), heads)
    dk[piece.batch, piece.sequences] += _back(torch.bmm(ds.transpose(1, 2), qs), heads)
    by_head = ds.view_as(p)
    if dmask.numel():
        dmask[piece.batch, piece.sequences] += by_head.sum((1, 2), keepdim=True)
    if dpair.numel():
        dpair[piece.batch, 0, :, piece.rows] += by_head.sum(0)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None, scale: float, budget: int
) -> tuple[Tensor, Tensor]:
    batch, sequences, residues, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, sequences, heads, residues), dtype=_wide(q))


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
    dmask = mask.new_empty(mask.shape) if mask is not None and mask_grad else q.new_empty(0, dtype=_wide(q))
    dpair = pair.new_empty(pair.shape) if pair is not None and pair_grad else q.new_empty(0, dtype=_wide(q))
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


_LIBRARY.impl("evoformer_attention", _forward_kernel, "CompositeExplicitAutograd")
_LIBRARY.impl("evoformer_attention_backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dscompile::evoformer_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("dscompile::evoformer_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("dscompile::evoformer_attention", _backward, setup_context=_setup, lib=_LIBRARY)
