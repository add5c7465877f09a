"""Evoformer attention in plain PyTorch: in pieces whose scores fit a budget, forward and backward.

Any device and dtype; computed in fp32 (fp64 for fp64). It is what runs on CPUs, and on GPUs where no Triton kernel can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def result_dtype(x: Tensor) -> torch.dtype:
    """What statistics and sums of ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    return part.to(result_dtype(x)).reshape(-1, part.shape[2], part.shape[3])


def _scaled(q: Tensor, piece: _Piece, scale: float) -> Tensor:
    return _matrices(q, piece, piece.rows) * scale


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


def pieces_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None, scale: float, budget: int
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as :mod:`dscompile.evoformer` defines them."""
    batch, sequences, residues, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, sequences, heads, residues), dtype=result_dtype(q))
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, budget, buffers=1):
            _forward_piece(piece, q, k, v, mask, pair, scale, out, lse)
    return out, lse


# The functions of one piece are no loop bodies: names of a loop would keep one piece alive while the next is made.


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


def pieces_backward(
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
    """Gradients of q, k, v, mask and pair; those that nobody wants are empty."""
    biases = [b.shape if b is not None and wanted else (0,) for b, wanted in ((mask, mask_grad), (pair, pair_grad))]
    shapes = (q.shape, k.shape, v.shape, *biases)
    grads = [torch.zeros(shape, dtype=result_dtype(q), device=q.device) for shape in shapes]
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, budget, buffers=2):
            _backward_piece(piece, grad, q, k, v, mask, pair, out, lse, scale, grads)
    types = (q.dtype, k.dtype, v.dtype, *(result_dtype(q) if b is None else b.dtype for b in (mask, pair)))
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
