"""Block-sparse attention in plain PyTorch: key blocks are gathered, and query blocks of one width computed together.

Any device and dtype; computed in fp32 (fp64 for fp64). It is what runs where no compiled kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = 1 << 24
"""Most attention scores (64 MiB in fp32) that are computed at once, if one query block does not need more."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which keys each query sees: the last arguments of the operators of :mod:`dscompile.attention_ops`."""

    row_ptr: Tensor | None
    col_idx: Tensor | None
    t_row_ptr: Tensor | None
    t_col_idx: Tensor | None
    block: int
    causal: bool
    key_padding_mask: Tensor | None
    scale: float


def result_like(x: Tensor) -> Tensor:
    """Uninitialised memory of the shape ``[batch, heads, seq, head_dim]`` of ``x``, with heads inside the sequence."""
    batch, heads, seq, size = x.shape
    return x.new_empty(batch, seq, heads, size).transpose(1, 2)


def lse_like(q: Tensor) -> Tensor:
    """Uninitialised memory for ``lse``: ``[batch, heads, seq_q]``, fp32 or fp64; heads innermost, on GPUs queries."""
    batch, heads, seq, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.device.type == "cuda":
        return q.new_empty(batch, heads, seq, dtype=dtype)
    return q.new_empty(batch, seq, heads, dtype=dtype).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Bucket:
    """``n`` query blocks that see equally many (``c``) key blocks, ready to multiply.

    ``heads``, ``rows``: ``[n]``; ``cols``: ``[n, c]``; ``hidden``: bool, broadcasts to ``[batch, n, block, c*block]``.
    """

    heads: Tensor
    rows: Tensor
    cols: Tensor
    hidden: Tensor


def gathered_forward(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as :mod:`dscompile.attention_ops` defines them."""
    batch, heads, seq, _ = q.shape
    qs, ks, vs = (_in_blocks(x, blocks.block) for x in (q, k, v))
    out = torch.zeros_like(qs)
    lse = qs.new_full(qs.shape[:-1], -torch.inf)
    for bucket in _buckets(q, k, blocks):
        scores = _scores(qs, ks, bucket, blocks.scale)
        found = scores.logsumexp(-1)
        p = _probabilities(scores, found)
        out[:, bucket.heads, bucket.rows] = p @ _gather(vs, bucket)
        lse[:, bucket.heads, bucket.rows] = found
    return _from_blocks(out, q), lse_like(q).copy_(lse.reshape(batch, heads, -1)[:, :, :seq])


def gathered_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``; probabilities are recomputed from ``lse``."""
    qs, ks, vs, gs, os = (_in_blocks(x, blocks.block) for x in (q, k, v, grad_out, out))
    lses = _in_blocks(lse.unsqueeze(-1), blocks.block).squeeze(-1)
    delta = (gs * os).sum(-1)
    dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    for bucket in _buckets(q, k, blocks):
        where = (slice(None), bucket.heads, bucket.rows)
        p = _probabilities(_scores(qs, ks, bucket, blocks.scale), lses[where])
        dp = gs[where] @ _gather(vs, bucket).transpose(-1, -2)
        ds = p * (dp - delta[where].unsqueeze(-1)) * blocks.scale
        dq[where] = ds @ _gather(ks, bucket)
        _scatter(dv, p.transpose(-1, -2) @ gs[where], bucket)
        _scatter(dk, ds.transpose(-1, -2) @ qs[where], bucket)
    return _from_blocks(dq, q), _from_blocks(dk, k), _from_blocks(dv, v)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """``[batch, heads, seq, d]`` as ``[batch, heads, blocks, block, d]``, padded with zeros; in fp32 or fp64."""
    batch, heads, seq, size = x.shape
    rows = -(-seq // block)
    padded = x.new_zeros(
        (batch, heads, rows * block, size), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    )
    padded[:, :, :seq] = x
    return padded.view(batch, heads, rows, block, size)


def _from_blocks(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_in_blocks`, for a tensor like ``like``."""
    return result_like(like).copy_(x.flatten(2, 3)[:, :, : like.shape[2]])


def _buckets(q: Tensor, k: Tensor, blocks: Blocks) -> Iterator[_Bucket]:
    batch, heads, seq_q, _ = q.shape
    seq_k, block = k.shape[2], blocks.block
    rows, keys = -(-seq_q // block), -(-seq_k // block)
    device = q.device
    if blocks.row_ptr is None or blocks.col_idx is None:
        starts = torch.zeros(heads, rows, dtype=torch.int64, device=device)
        counts = torch.full_like(starts, keys)
        columns = torch.arange(keys, device=device)
    else:
        pointers = blocks.row_ptr.to(torch.int64).expand(heads, rows + 1)
        starts, counts = pointers[:, :-1], pointers.diff(dim=1)
        columns = blocks.col_idx.to(torch.int64)
    mask = torch.zeros(batch, keys * block, dtype=torch.bool, device=device)
    mask[:, seq_k:] = True
    if blocks.key_padding_mask is not None:
        mask[:, :seq_k] = blocks.key_padding_mask
    inside = torch.arange(block, device=device)
    for count in counts.unique().tolist():
        if not count:
            continue
        chosen = (counts == count).nonzero()
        for pairs in chosen.split(max(1, SCORES // (batch * block * block * count))):
            head, row = pairs.unbind(1)
            cols = columns[starts[head, row].unsqueeze(1) + torch.arange(count, device=device)]
            key = (cols.unsqueeze(-1) * block + inside).flatten(1)
            hidden = mask[:, key].unsqueeze(2)
            if blocks.causal:
                hidden = hidden | (key.unsqueeze(1) > (row.unsqueeze(1) * block + inside).unsqueeze(2))
            yield _Bucket(head, row, cols, hidden)


def _gather(x: Tensor, bucket: _Bucket) -> Tensor:
    """The key blocks of each query block: ``[batch, n, c * block, d]``."""
    return x[:, bucket.heads.unsqueeze(1), bucket.cols].flatten(2, 3)


def _scatter(x: Tensor, values: Tensor, bucket: _Bucket) -> None:
    """Add ``values`` (as from :func:`_gather`) where they were gathered from; several may meet."""
    batch, heads, rows, block, size = x.shape
    index = (bucket.heads.unsqueeze(1) * rows + bucket.cols).flatten()
    x.view(batch, heads * rows, block, size).index_add_(1, index, values.reshape(batch, -1, block, size))


def _scores(q: Tensor, k: Tensor, bucket: _Bucket, scale: float) -> Tensor:
    scores = q[:, bucket.heads, bucket.rows] @ _gather(k, bucket).transpose(-1, -2) * scale
    return scores.masked_fill_(bucket.hidden, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)``; rows that see nothing (lse -inf) are 0."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
