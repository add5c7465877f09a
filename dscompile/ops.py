"""The logical operators of sharded parameters: what a graph says before a pass decides how bytes move.

``unshard`` turns this rank's shard of a parameter into the full value, ``reduce_grad`` turns a full gradient into the
mean over ranks of this rank's shard; each is the other's derivative (of the mean of the ranks' losses).
A backend that knows them lowers them to bucketed, overlapped collectives; under any other backend, and in eager mode,
the kernels below run the collectives in place, so a sharded model is right everywhere.

Layout, as ``torch.chunk``: along ``dim`` of full size ``n``, rank ``r`` of ``w`` holds rows ``[min(r*c, n),
min((r+1)*c, n))`` with ``c = ceil(n / w)``; trailing ranks may hold none. ``dim == -1`` means replicated. ``group`` is
a *logical* name (:mod:`dscompile.world`), equal on every rank, so graphs and cache keys are too. A ``tile`` of three
integers is a second cut (:class:`dscompile.shard_layout.Tile`): its dimension, that dimension's size (full for
``unshard``, local for ``reduce_grad``), and in how many parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.collectives import COLLECTIVES
from dscompile.pieces import corner, cut, fill, put_piece
from dscompile.quick_fake import quick_empty
from dscompile.shard_layout import REPLICATED as REPLICATED
from dscompile.shard_layout import ShardLayout, Tile, chunk_rows, local_rows
from dscompile.torch_compat import FakeTensorMode, group_backend, process_group

LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
LIBRARY.define(
    "unshard(Tensor shard, Tensor? leaf, Tensor? accumulated, int dim, SymInt size, int world, str group, "
    "ScalarType? dtype=None, ScalarType? wire=None, int[]? tile=None) -> Tensor"
)
LIBRARY.define(
    "reduce_grad(Tensor grad, int dim, SymInt local, int world, str group, "
    "ScalarType? wire=None, ScalarType? out=None, int[]? tile=None) -> Tensor"
)

_c10d = COLLECTIVES


def unshard(
    shard: Tensor,
    dim: int,
    size: int,
    world: int,
    group: str,
    leaf: Tensor | None = None,
    accumulated: Tensor | None = None,
    dtype: torch.dtype | None = None,
    wire: torch.dtype | None = None,
    tile: Sequence[int] | None = None,
) -> Tensor:
    """The full value of a sharded parameter, contiguous and in fresh memory.

    Args:
        shard: this rank's rows, ``[..., local, ...]``; may be empty.
        dim: the sharded dimension, or ``REPLICATED`` (a copy of ``shard``).
        size: full size of ``dim``.
        world: ranks in the group.
        group: logical group name.
        leaf: a tensor of the full shape that takes the *unreduced* gradient instead (``no_sync``); never read.
        accumulated: unreduced gradient of earlier micro-batches, full shape, that joins this one's reduction. However
            often a parameter is used in one backward pass, it joins once.
        dtype: the shard is cast to it before it is gathered, so it is the value's and the wire's; None: as it is.
        wire: in which dtype the gradient travels. It arrives in the shard's.
        tile: the second cut.
    """
    constants = dim, size, world, group, dtype, wire, tile
    out: Tensor = torch.ops.dscompile.unshard.default(shard, leaf, accumulated, *constants)
    return out


def reduce_grad(
    grad: Tensor,
    dim: int,
    local: int,
    world: int,
    group: str,
    wire: torch.dtype | None = None,
    out: torch.dtype | None = None,
    tile: Sequence[int] | None = None,
) -> Tensor:
    """Mean over the group's ranks of ``grad`` (full shape), of which this rank keeps its ``local`` rows along ``dim``.

    On gloo the sum runs in rank order whatever the layout, so it is reproducible to the last bit, equal on every rank,
    and the same at every ZeRO stage; elsewhere the order is the library's own. Addends and mean are of dtype ``wire``
    (``grad``'s if None), 16-bit ones added in fp32; the result is of dtype ``out`` (``wire`` if None). A group of one
    sends nothing, so it rounds nothing to ``wire``.
    """
    mean: Tensor = torch.ops.dscompile.reduce_grad.default(grad, dim, local, world, group, wire, out, tile)
    return mean


# -- whose reduction an accumulated gradient joins -------------------------------------------------------------------

_TAKE = "dscompile_take"


def on_take(accumulated: Tensor, callback: Callable[[], object]) -> None:
    """Call ``callback`` when a reader that was given ``accumulated`` begins (:mod:`dscompile.slots`)."""
    setattr(accumulated, _TAKE, callback)


def is_offered(tensor: Tensor) -> bool:
    """Whether :func:`on_take` was called on this very tensor."""
    return hasattr(tensor, _TAKE)


def take(accumulated: Tensor | None) -> None:
    """A reader begins that will add ``accumulated`` to its gradient before reducing it. Later readers must not."""
    callback = getattr(accumulated, _TAKE, None)
    if callback is not None:
        callback()


# -- kernels ---------------------------------------------------------------------------------------------------------


def _unshard_kernel(
    shard: Tensor,
    leaf: Tensor | None,
    accumulated: Tensor | None,
    dim: int,
    size: int,
    world: int,
    group: str,
    dtype: torch.dtype | None = None,
    wire: torch.dtype | None = None,
    tile: Sequence[int] | None = None,
) -> Tensor:
    take(accumulated)
    if world == 1 or dim == REPLICATED:
        return _copied(shard, dtype)
    shard = shard if dtype is None else shard.to(dtype)
    if tile is not None:
        return _gather_tiles(shard, _tiled(_resized(shard, dim, size, tile), dim, world, tile), group)
    return _gather(shard, dim, size, world, group)


def _resized(source: Tensor, dim: int, size: int, tile: Sequence[int] | None) -> list[int]:
    """The shape of ``source`` with another size of each dimension that is cut."""
    shape = list(source.shape)
    if dim != REPLICATED:
        shape[dim] = size
    if tile is not None:
        shape[tile[0]] = tile[1]
    return shape


def _tiled(shape: Sequence[int], dim: int, world: int, tile: Sequence[int]) -> ShardLayout:
    return ShardLayout(tuple(shape), dim, world, Tile(tile[0], tile[2]))


def _gather_tiles(shard: Tensor, layout: ShardLayout, group: str) -> Tensor:
    piece = shard.new_empty(layout.piece)
    put_piece(piece, shard)
    world = layout.world
    gathered: Tensor = _c10d.wait_tensor(_c10d.all_gather_into_tensor(piece.view(1, -1), world, group))
    full = shard.new_empty(layout.shape)
    fill(full, gathered.view(world, -1), layout)
    return full


def _copied(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Fresh contiguous memory, in another dtype if one is given."""
    return value.to(dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)


def _gather(shard: Tensor, dim: int, size: int, world: int, group: str) -> Tensor:
    chunk = chunk_rows(size, world)
    missing = chunk - shard.shape[dim]
    if missing:
        padding = list(shard.shape)
        padding[dim] = missing
        shard = torch.cat([shard, shard.new_zeros(padding)], dim)
    shard = shard.contiguous()
    gathered: Tensor = _c10d.wait_tensor(_c10d.all_gather_into_tensor(shard.view(1, -1), world, group))
    if dim == 0:
        return gathered.view(world * chunk, *shard.shape[1:]).narrow(0, 0, size)
    parts = gathered.view(world, *shard.shape)
    return torch.cat([parts[r].narrow(dim, 0, local_rows(size, world, r)) for r in range(world)], dim)


def _reduce_kernel(
    grad: Tensor,
    dim: int,
    local: int,
    world: int,
    group: str,
    wire: torch.dtype | None = None,
    out: torch.dtype | None = None,
    tile: Sequence[int] | None = None,
) -> Tensor:
    if world == 1:
        return _copied(grad, out or wire)
    grad = grad if wire is None else grad.to(wire)
    if tile is None:
        mean = _mean(grad, dim, local, world, group)
    else:
        shape = tuple(_resized(grad, dim, local, tile))
        mean = _mean_of_tiles(grad, _tiled(grad.shape, dim, world, tile), shape, group)
    return mean if out is None else mean.to(out)


def _mean(grad: Tensor, dim: int, local: int, world: int, group: str) -> Tensor:
    ordered = group_backend(group, grad.device) == "gloo"
    if dim == REPLICATED:
        return _all_reduce_in_order(grad, world, group) if ordered else _all_reduce(grad, world, group)
    if ordered:
        return _sum_in_order(grad, dim, local, world, group)
    return _reduce_scatter(grad, dim, local, world, group)


def _mean_of_tiles(grad: Tensor, layout: ShardLayout, local: tuple[int, ...], group: str) -> Tensor:
    """The mean of this rank's pieces, whose shape without padding is ``local``."""
    world, width = layout.world, layout.piece_numel
    pieces = grad.new_empty(world, width)
    cut(grad, pieces, layout)
    if group_backend(group, grad.device) == "gloo":
        sizes = [width] * world
        got: Tensor = _c10d.wait_tensor(_c10d.all_to_all_single(pieces.view(-1), sizes, sizes, group))
        mean = mean_of_parts(got.view(world, width))
    else:
        total: Tensor = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(pieces, "sum", world, group))
        mean = total.mul(1 / world)
    return corner(mean.view(layout.piece), local).contiguous()


def _sum_in_order(grad: Tensor, dim: int, local: int, world: int, group: str) -> Tensor:
    """Reduce-scatter as one all-to-all and a sum by rank: gloo's own is an all-reduce, twice the bytes."""
    size = grad.shape[dim]
    rows = [local_rows(size, world, r) for r in range(world)]
    width = grad.numel() // size if size else 0
    pieces = [grad.contiguous()] if dim == 0 else grad.split(rows, dim)
    flat = pieces[0].view(-1) if dim == 0 else torch.cat([piece.reshape(-1) for piece in pieces])
    send, receive = [n * width for n in rows], [local * width] * world
    got: Tensor = _c10d.wait_tensor(_c10d.all_to_all_single(flat, receive, send, group))
    shape = list(grad.shape)
    shape[dim] = local
    return mean_of_parts(got.view(world, *shape))


def mean_of_parts(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """Mean over the first dimension, added in its order; 16-bit addends in fp32, of which the mean is rounded once.

    ``out``: where it goes, of the dtype of ``parts``.
    """
    if parts.dtype.itemsize < 4:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        total *= 1 / len(parts)
        return total.to(parts.dtype) if out is None else out.copy_(total)
    total = torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        total += part
    return total.mul_(1 / len(parts))


def _all_reduce_in_order(grad: Tensor, world: int, group: str) -> Tensor:
    flat = grad.reshape(-1)
    rank = process_group(group).rank()
    part = _sum_in_order(flat, 0, local_rows(flat.numel(), world, rank), world, group)
    return _gather(part, 0, flat.numel(), world, group).view(grad.shape)


def _all_reduce(grad: Tensor, world: int, group: str) -> Tensor:
    total: Tensor = _c10d.wait_tensor(_c10d.all_reduce(grad.contiguous(), "sum", group))
    return total.mul_(1 / world)


def _reduce_scatter(grad: Tensor, dim: int, local: int, world: int, group: str) -> Tensor:
    size, chunk = grad.shape[dim], chunk_rows(grad.shape[dim], world)
    shape = list(grad.shape)
    if world * chunk != size:
        shape[dim] = world * chunk - size
        grad = torch.cat([grad, grad.new_zeros(shape)], dim)
    shape[dim] = chunk
    flat = grad.contiguous().view(world, -1) if dim == 0 else torch.stack(grad.split(chunk, dim)).view(world, -1)
    part: Tensor = _c10d.wait_tensor(_c10d.reduce_scatter_tensor(flat, "sum", world, group))
    return part.view(shape).narrow(dim, 0, local).mul(1 / world)


LIBRARY.impl("unshard", _unshard_kernel, "CompositeExplicitAutograd")
LIBRARY.impl("reduce_grad", _reduce_kernel, "CompositeExplicitAutograd")


# -- shapes ----------------------------------------------------------------------------------------------------------


def _unshard_fake(
    shard: Tensor,
    leaf: Tensor | None,
    accumulated: Tensor | None,
    dim: int,
    size: int,
    world: int,
    group: str,
    dtype: torch.dtype | None = None,
    wire: torch.dtype | None = None,
    tile: Sequence[int] | None = None,
) -> Tensor:
    return shard.new_empty(_resized(shard, dim, size, tile), dtype=dtype)


def _reduce_fake(
    grad: Tensor,
    dim: int,
    local: int,
    world: int,
    group: str,
    wire: torch.dtype | None = None,
    out: torch.dtype | None = None,
    tile: Sequence[int] | None = None,
) -> Tensor:
    return grad.new_empty(_resized(grad, dim, local, tile), dtype=out or wire)


torch.library.register_fake("dscompile::unshard", _unshard_fake, lib=LIBRARY)
torch.library.register_fake("dscompile::reduce_grad", _reduce_fake, lib=LIBRARY)


def _shape_quickly(mode: FakeTensorMode, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The fake result of a marker, without the general path, which caches only ``aten`` operators.

    A model has one marker for each parameter, and each is traced four times: this halves what sharding adds to it.
    """
    source = args[0]
    reads = func is torch.ops.dscompile.unshard.default
    dim, size = (args[3], args[4]) if reads else (args[1], args[2])
    dtypes = args[7:8] if reads else args[6:4:-1]  # the first that is given counts
    last = 9 if reads else 7
    shape = _resized(source, dim, size, args[last] if len(args) > last else None)
    dtype = next((d for d in dtypes if d is not None), None)
    found = None if kwargs else quick_empty(mode, source, shape, dtype)
    return mode.__torch_dispatch__(func, types, args, kwargs) if found is None else found


for _name in ("unshard", "reduce_grad"):
    torch.library.register_torch_dispatch(f"dscompile::{_name}", FakeTensorMode, _shape_quickly, lib=LIBRARY)


# -- derivatives -----------------------------------------------------------------------------------------------------


def _unshard_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    shard, leaf, accumulated, ctx.dim, _, ctx.world, ctx.group, dtype, ctx.wire, tile = inputs
    ctx.typed = dtype is not None or ctx.wire is not None
    ctx.dtype = shard.dtype if leaf is None else leaf.dtype
    ctx.local = 0 if ctx.dim == REPLICATED else shard.shape[ctx.dim]
    ctx.tile = None if tile is None else [tile[0], shard.shape[tile[0]], tile[2]]
    ctx.to_leaf = leaf is not None
    # No saved tensor: a checkpointed block reads again in backward, when another reader may have the accumulator, and
    # checkpointing compares the tensors that the two runs save.
    ctx.accumulated = accumulated


def _unshard_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    nothing = (None,) * 7
    if ctx.to_leaf:
        return None, grad.to(ctx.dtype), None, *nothing
    accumulated = ctx.accumulated
    # A tied parameter has several unshard nodes, and autograd sums their gradients: the accumulated one must join only
    # one of them. The mark lives on the tensor, so it holds for one backward pass in eager mode (the accumulator is
    # dropped at its end) and for one trace of the joint graph, where these are fake tensors.
    if accumulated is not None and not getattr(accumulated, _JOINED, False):
        setattr(accumulated, _JOINED, True)
        grad = grad + accumulated
    out = ctx.dtype if ctx.typed else None
    local = reduce_grad(grad, ctx.dim, ctx.local, ctx.world, ctx.group, ctx.wire, out, ctx.tile)
    return local, None, None, *nothing


_JOINED = "dscompile_joined"


def _reduce_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, ctx.dim, _, ctx.world, ctx.group, _, _, tile = inputs
    ctx.dtype = grad.dtype
    ctx.size = 0 if ctx.dim == REPLICATED else grad.shape[ctx.dim]
    ctx.tile = None if tile is None else [tile[0], grad.shape[tile[0]], tile[2]]


def _reduce_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # No 1/world: a rank's own value has gradients of that rank's loss, a shard those of the mean loss (so unshard
    # averages), and the mean over ranks here divides by as many as that average will.
    full = unshard(grad, ctx.dim, ctx.size, ctx.world, ctx.group, tile=ctx.tile)
    return full.to(ctx.dtype), *(None,) * 7


torch.library.register_autograd("dscompile::unshard", _unshard_backward, setup_context=_unshard_setup, lib=LIBRARY)
torch.library.register_autograd("dscompile::reduce_grad", _reduce_backward, setup_context=_reduce_setup, lib=LIBRARY)
