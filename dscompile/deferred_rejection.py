"""``nn.init.trunc_normal_`` in the memory of its tensor: the same numbers, drawn again a piece at a time.

PyTorch's rejection loop holds four tensors of its argument's size. The random numbers of a contiguous tensor are one
stream, though, and 16 numbers make 16 values, whatever the tensor's size: a tensor filled in pieces, each a multiple of
16 long but the last, has the values of one filled at once. So the loop can run with scratch of one piece.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dscompile.torch_compat import TRUNC_NORMAL

_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define(
    "truncated_normal_(Tensor(a!) self, float mean, float std, float lo, float hi, *, Generator? generator=None) "
    "-> Tensor(a!)",
    tags=(torch.Tag.nondeterministic_seeded,),
)

PIECE = 1 << 18
"""Elements drawn at a time; a multiple of 16."""


def truncated_normal_(
    tensor: Tensor,
    mean: float,
    std: float,
    lo: float,
    hi: float,
    *,
    generator: torch.Generator | None = None,
    piece: int = PIECE,
) -> Tensor:
    """Fill ``tensor`` (contiguous, at least 16 elements) as ``trunc_normal_`` does: normal values in ``[lo, hi]``.

    Source: the loop of ``torch.nn.init.trunc_normal_`` (torch 2.13) for bounds that keep most values.
    """
    flat = tensor.view(-1)
    flat.normal_(mean, std, generator=generator)
    while any(bool(_outside(part, lo, hi).any()) for part in _pieces(flat, piece)):
        for part in _pieces(flat, piece):
            fresh = torch.empty_like(part).normal_(mean, std, generator=generator)
            part.copy_(torch.where(_outside(part, lo, hi), fresh, part))
    return tensor


def _outside(values: Tensor, lo: float, hi: float) -> Tensor:
    return (values < lo) | (values > hi)


def _pieces(flat: Tensor, piece: int) -> list[Tensor]:
    """Pieces of a flat tensor, the last of at least 16 elements: fewer would be drawn in another way."""
    starts = list(range(0, flat.numel(), piece))
    if len(starts) > 1 and flat.numel() - starts[-1] < 16:
        del starts[-1]
    return [flat[start:stop] for start, stop in zip(starts, [*starts[1:], flat.numel()], strict=True)]


_LIBRARY.impl("truncated_normal_", truncated_normal_, "CompositeExplicitAutograd")
TRUNCATED = torch.ops.dscompile.truncated_normal_.default


def rejection_loop(tensor: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of :data:`TRUNCATED` if ``tensor`` is being filled by ``trunc_normal_``'s first draw, else None.

    The loop that follows then finds nothing to reject.
    """
    if not tensor.is_contiguous() or tensor.numel() < 16 or tensor.device.type != "cpu":
        return None
    frame: FrameType | None = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            return None
        if frame.f_code is TRUNC_NORMAL:
            found = frame.f_locals
            if found["tensor"] is not tensor or "result" in found:
                return None
            arguments = (tensor, found["mean"], found["std"], found["lo"], found["hi"])
            return arguments, {"generator": found["generator"]}
        frame = frame.f_back
    return None
