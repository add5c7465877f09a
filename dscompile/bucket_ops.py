"""Operators around a collective: shards and gradients in and out of one flat buffer.

A planned graph gathers a bucket of parameters as ``pack_shards -> all_gather_into_tensor -> wait_tensor ->
unpack_params`` and reduces a bucket of gradients as ``pack_grads -> all_to_all_single -> wait_tensor -> sum_ranks ->
unpack_shards``. The collectives are PyTorch's functional ones; what is here only copies, on any device.

``layouts`` is :func:`~dscompile.shard_layout.encode` of the bucket's tensors, in the order of their payload.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.collectives import COLLECTIVES
from dscompile.ops import mean_of_parts
from dscompile.pieces import corner, cut, fill, put_piece
from dscompile.placement import compute_copy, resident_of
from dscompile.quick_fake import Rule, empties_like_first
from dscompile.resident import is_fresh, set_fresh
from dscompile.shard_layout import REPLICATED, ShardLayout, decode, stays_local
from dscompile.torch_compat import FakeTensorMode

_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], quick: Rule | None = None) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dscompile::{name}", fake, lib=_LIBRARY)
    if quick is not None:
        torch.library.register_torch_dispatch(f"dscompile::{name}", FakeTensorMode, quick, lib=_LIBRARY)


New = Callable[[Tensor, Sequence[int]], Tensor]
"""``new(like, shape)`` gives uninitialised memory of the dtype and device of ``like``: where buffers come from."""


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """PyTorch's own allocator."""
    return like.new_empty(shape)


def total(layouts: Sequence[ShardLayout]) -> int:
    """Elements of one rank's part of a flat buffer."""
    return sum(layout.piece_numel for layout in layouts)


def _offsets(layouts: Sequence[ShardLayout]) -> list[tuple[ShardLayout, int, int]]:
    """Each layout with where its piece begins and ends in one rank's part of a flat buffer."""
    found, start = [], 0
    for layout in layouts:
        found.append((layout, start, start + layout.piece_numel))
        start += layout.piece_numel
    return found


# -- gathers ---------------------------------------------------------------------------------------------------------


def pack_shards(
    shards: Sequence[Tensor],
    layouts: Sequence[int],
    world: int,
    dtype: torch.dtype | None = None,
    new: New = new_empty,
) -> Tensor:
    """Copy this rank's shards, padded, into one flat buffer: ``[sum of piece_numel]``, of ``dtype`` or the shards'."""
    found = decode(layouts, world)
    flat = new(_like(shards[0], dtype), (total(found),))
    for shard, (layout, start, stop) in zip(shards, _offsets(found), strict=True):
        piece = flat[start:stop].view(layout.piece)
        put_piece(piece, shard.reshape(layout.grid) if layout.dim == REPLICATED else shard)
    return flat


def _pack_shards_fake(
    shards: Sequence[Tensor], layouts: Sequence[int], world: int, dtype: torch.dtype | None = None
) -> Tensor:
    return shards[0].new_empty(total(decode(layouts, world)), dtype=dtype)


def _like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a new buffer takes its dtype and device from."""
    return tensor if dtype in (None, tensor.dtype) else tensor.new_empty(0, dtype=dtype)


def unpack_params(
    gathered: Tensor,
    layouts: Sequence[int],
    world: int,
    dtype: torch.dtype | None = None,
    new: New = new_empty,
) -> list[Tensor]:
    """The full tensors of a gathered flat buffer ``[world * sum of piece_numel]``, each in memory of its own.

    They are of ``dtype``, or of the buffer's.
    """
    found = decode(layouts, world)
    ranks = gathered.view(world, -1)
    like = _like(gathered, dtype)
    fulls = []
    for layout, start, stop in _offsets(found):
        fulls.append(new(like, layout.shape))
        fill(fulls[-1], ranks[:, start:stop], layout)
    return fulls


def _unpack_params_fake(
    gathered: Tensor, layouts: Sequence[int], world: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    return [gathered.new_empty(shape, dtype=dtype) for shape in _full_shapes(layouts, world)]


def _full_shapes(layouts: Sequence[int], world: int) -> list[tuple[int, ...]]:
    return [layout.shape for layout in decode(layouts, world)]


# -- reductions ------------------------------------------------------------------------------------------------------


def pack_grads(
    grads: Sequence[Tensor],
    layouts: Sequence[int],
    world: int,
    dtype: torch.dtype | None = None,
    new: New = new_empty,
) -> Tensor:
    """Copy full gradients into one flat buffer, rank-major and padded: ``[world * sum of piece_numel]``.

    It is of ``dtype``, or of the gradients'.
    """
    found = decode(layouts, world)
    flat = new(_like(grads[0], dtype), (world * total(found),))
    ranks = flat.view(world, -1)
    for grad, (layout, start, stop) in zip(grads, _offsets(found), strict=True):
        cut(grad, ranks[:, start:stop], layout)
    return flat


def _pack_grads_fake(
    grads: Sequence[Tensor], layouts: Sequence[int], world: int, dtype: torch.dtype | None = None
) -> Tensor:
    return grads[0].new_empty(world * total(decode(layouts, world)), dtype=dtype)


def sum_ranks(exchanged: Tensor, world: int, new: New = new_empty) -> Tensor:
    """The mean over ranks of a buffer that holds one part from each rank, ``[world * n] -> [n]``.

    Parts are added in the order of ranks and the sum is multiplied by ``1 / world``: every rank, and every run, gets
    the same bits (:func:`dscompile.ops.mean_of_parts`).
    """
    parts = exchanged.view(world, -1)
    return mean_of_parts(parts, out=new(exchanged, (parts.shape[1],)))


def _sum_ranks_fake(exchanged: Tensor, world: int) -> Tensor:
    return exchanged.new_empty(exchanged.shape[0] // world)


def unpack_shards(
    flat: Tensor, layouts: Sequence[int], world: int, rank: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Take this rank's pieces of a reduced flat buffer ``[sum of piece_numel]`` without padding, as fresh tensors.

    They are of ``dtype``, or of the buffer's.
    """
    shards = []
    for layout, start, stop in _offsets(decode(layouts, world)):
        piece = corner(flat[start:stop].view(layout.piece), layout.piece_shape(rank))
        shards.append(piece.to(dtype or flat.dtype, copy=True, memory_format=torch.contiguous_format))
    return shards


def _unpack_shards_fake(
    flat: Tensor, layouts: Sequence[int], world: int, rank: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    return [flat.new_empty(shape, dtype=dtype) for shape in _local_shapes(layouts, world, rank)]


def _local_shapes(layouts: Sequence[int], world: int, rank: int) -> list[tuple[int, ...]]:
    return [layout.local_shape(rank) for layout in decode(layouts, world)]


# -- resident parameters ---------------------------------------------------------------------------------------------


def start_refresh(
    shards: Sequence[Tensor],
    layouts: Sequence[int],
    world: int,
    group: str,
    dtype: torch.dtype | None = None,
    new: New = new_empty,
) -> Tensor:
    """Launch the gather that :func:`refresh` will wait for, ``[world * sum of piece_numel]``; empty if none is needed.

    It is, if a shard was written since its resident copy was gathered. Whether ranks agree that a bucket is stale is
    the optimizer's doing: all of them step.
    """
    if all_fresh(shards, dtype):
        return shards[0].new_empty(0, dtype=dtype)
    flat = pack_shards(shards, layouts, world, dtype, new)
    launched: Tensor = COLLECTIVES.all_gather_into_tensor(flat, world, group)
    return launched


def _buffer(shard: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Where a parameter's full value stays: the buffer that the shard is a view of, or the copy in another dtype."""
    return resident_of(shard) if dtype is None else compute_copy(shard)


def all_fresh(shards: Sequence[Tensor], dtype: torch.dtype | None = None) -> bool:
    """Whether nothing was written to any shard since its resident copy was gathered."""
    return all(_buffer(shard, dtype) is not None and is_fresh(shard) for shard in shards)


def refresh(
    shards: Sequence[Tensor],
    layouts: Sequence[int],
    world: int,
    group: str,
    pending: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The full parameters whose rows the shards are, other ranks' rows gathered if the shards were written since.

    A shard of ZeRO stage 1 or 2 is a view into a resident buffer of the full shape. The results share its memory: they
    hold until the next refresh. A shard without such a buffer (its parameter was replaced) gives a fresh full tensor.

    Args:
        shards: this rank's shards.
        layouts: theirs.
        world: ranks in the group.
        group: its logical name.
        pending: what :func:`start_refresh` of the same arguments returned; without it the gather runs here.
        dtype: the buffer is the parameter's copy in this dtype, which is the wire's too. Parameters that every rank
            holds whole are only cast; they are never in a bucket with others.
    """
    if stays_local(layouts, world):
        return _cast_residents(shards, layouts, world, dtype)
    if pending is None:
        pending = start_refresh(shards, layouts, world, group, dtype)
    if not pending.numel():
        return [full for shard in shards if (full := _buffer(shard, dtype)) is not None]
    return fill_residents(shards, layouts, world, COLLECTIVES.wait_tensor(pending), dtype)


def _cast_residents(
    shards: Sequence[Tensor], layouts: Sequence[int], world: int, dtype: torch.dtype | None
) -> list[Tensor]:
    fresh = all_fresh(shards, dtype)
    fulls = [_held(shard, layout, dtype) for shard, layout in zip(shards, decode(layouts, world), strict=True)]
    for shard, full in zip(shards, fulls, strict=True):
        if not fresh:
            full.copy_(shard)
    return fulls


def _held(shard: Tensor, layout: ShardLayout, dtype: torch.dtype | None) -> Tensor:
    """The buffer behind a shard, about to be filled; without one, fresh memory."""
    full = _buffer(shard, dtype)
    if full is None:
        return shard.new_empty(layout.shape, dtype=dtype)
    set_fresh(shard)
    return full


def fill_residents(
    shards: Sequence[Tensor],
    layouts: Sequence[int],
    world: int,
    gathered: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Copy a gathered flat buffer into the resident buffers behind the shards; these, and that they are fresh."""
    ranks = gathered.view(world, -1)
    results = []
    for shard, (layout, start, stop) in zip(shards, _offsets(decode(layouts, world)), strict=True):
        results.append(_held(shard, layout, dtype))
        fill(results[-1], ranks[:, start:stop], layout)
    return results


def _start_refresh_fake(
    shards: Sequence[Tensor], layouts: Sequence[int], world: int, group: str, dtype: torch.dtype | None = None
) -> Tensor:
    return shards[0].new_empty(world * total(decode(layouts, world)), dtype=dtype)


def _refresh_fake(
    shards: Sequence[Tensor],
    layouts: Sequence[int],
    world: int,
    group: str,
    pending: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    found = decode(layouts, world)
    return [shard.new_empty(layout.shape, dtype=dtype) for shard, layout in zip(shards, found, strict=True)]


_TYPED = "int[] layouts, int world, ScalarType? dtype=None"
_GROUPED = "int[] layouts, int world, str group"
_define(
    f"start_refresh(Tensor[] shards, {_GROUPED}, ScalarType? dtype=None) -> Tensor",
    start_refresh,
    _start_refresh_fake,
)
_define(
    f"refresh(Tensor(a)[] shards, {_GROUPED}, Tensor? pending=None, ScalarType? dtype=None) -> Tensor(a)[]",
    refresh,
    _refresh_fake,
)
_define(f"pack_shards(Tensor[] shards, {_TYPED}) -> Tensor", pack_shards, _pack_shards_fake)
_define(
    f"unpack_params(Tensor gathered, {_TYPED}) -> Tensor[]",
    unpack_params,
    _unpack_params_fake,
    empties_like_first(_full_shapes, dtype_at=3),
)
_define(f"pack_grads(Tensor[] grads, {_TYPED}) -> Tensor", pack_grads, _pack_grads_fake)
_define("sum_ranks(Tensor exchanged, int world) -> Tensor", sum_ranks, _sum_ranks_fake)
_define(
    "unpack_shards(Tensor flat, int[] layouts, int world, int rank, ScalarType? dtype=None) -> Tensor[]",
    unpack_shards,
    _unpack_shards_fake,
    empties_like_first(_local_shapes, dtype_at=4),
)
