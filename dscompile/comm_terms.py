"""What communication means in the proof: a lowered gather *is* the marker it came from, and a lowered reduction too.

Pieces of a bucket get their meaning only when they are whole again: packing, a collective and a wait build a term that
stands for the flat buffer, and unpacking it gives ``unshard`` and ``reduce_grad`` terms, one for each tensor. A wrong
order, offset, group, world or a missing wait leaves a term that no marker has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dscompile.comm import REDUCE_GRAD, REFRESH, START_REFRESH, UNSHARD, WAIT, c10d, ours
from dscompile.shard_layout import REPLICATED, ShardLayout, decode

if TYPE_CHECKING:
    from dscompile.term_rules import Key, Rule, TermTable


class Several(tuple[Any, ...]):
    """The results of an operator that returns a list, one term each."""

    __slots__ = ()


def _head(value: Key) -> Any:
    """What a term is built by; None for anything else."""
    op = getattr(value, "op", None)
    return op[0] if op else None


def _numbers(key: Key) -> list[int] | None:
    """A list-of-integers argument as integers."""
    return [k[1] for k in key] if isinstance(key, tuple) and all(k[0] is int for k in key) else None


def _layouts(key: Key, world: Key) -> list[ShardLayout] | None:
    numbers = _numbers(key)
    return None if numbers is None else decode(numbers, world[1])


Cut = tuple[int, int, int, tuple[int, ...] | None]
"""``dim, size, world, tile`` as the markers say it: of the whole for ``unshard``, of the part for ``reduce_grad``."""


def _full_term(table: TermTable, shard: Key, cut: Cut, group: Key, dtype: Any, node: fx.Node, value: Any) -> Key:
    """A full parameter, read as ``dtype`` (None: as it is). A cast before the gather is one after it."""
    if dtype is None and _head(shard) == "cast":
        shard, dtype = shard.op[1], shard.op[2]
    if cut[0] == REPLICATED:
        return shard if dtype is None else table.intern(("cast", shard, dtype), node, value)
    return table.intern(("unshard", shard, cut, group, dtype), node, value)


def cast_term(table: TermTable, source: Key, dtype: torch.dtype, node: fx.Node) -> Key:
    """``source`` in another dtype, and in the same layout."""
    if _head(source) == "unshard" and source.op[4] is None:
        return table.intern((*source.op[:4], dtype), node)
    return table.intern(("cast", source, dtype), node)


def _gathered_term(
    table: TermTable, shard: Key, layout: ShardLayout, group: Key, dtype: Any, node: fx.Node, value: Any
) -> Key:
    return _full_term(table, shard, _cut(layout, layout.shape), group, dtype, node, value)


def _cut(layout: ShardLayout, shape: tuple[int, ...]) -> Cut:
    """A layout as the markers say it, with the sizes of ``shape``."""
    size = 0 if layout.dim == REPLICATED else shape[layout.dim]
    tile = None if layout.tile is None else (layout.tile.dim, shape[layout.tile.dim], layout.tile.parts)
    return layout.dim, size, layout.world, tile


def _tile(args: tuple[Key, ...], position: int) -> tuple[int, ...] | None:
    """An optional ``tile`` argument."""
    numbers = _numbers(args[position]) if len(args) > position and args[position] != (type(None), None) else None
    return None if numbers is None else tuple(numbers)


def _reduced_term(
    table: TermTable, grad: Key, cut: Cut, group: Key, dtypes: tuple[Any, Any], node: fx.Node, value: Any
) -> Key:
    return table.intern(("reduce_grad", grad, cut, group, *dtypes), node, value)


def _typed(args: tuple[Key, ...], position: int) -> Any:
    """An optional dtype argument: a ``torch.dtype`` or None."""
    return args[position][1] if len(args) > position else None


def _unshard(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """``unshard``: who takes the gradient (a leaf, an accumulator), and how it travels, does not change the value."""
    shard, _, _, dim, size, world, group, *_ = args
    return _full_term(table, shard, (dim[1], size[1], world[1], _tile(args, 9)), group, _typed(args, 7), node, None)


def _reduce_grad(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    grad, dim, local, world, group, *_ = args
    rows = 0 if dim[1] == REPLICATED else local[1]
    cut = dim[1], rows, world[1], _tile(args, 7)
    return table.intern(("reduce_grad", grad, cut, group, _typed(args, 5), _typed(args, 6)), node)


def _pack_shards(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    return table.intern(("pack_shards", args[0], args[1], args[2], _typed(args, 3)), node)


def _pack_grads(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    return table.intern(("pack_grads", args[0], args[1], args[2], _typed(args, 3)), node)


def _all_gather(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """Every rank's buffer, rank-major; of reduced chunks it is the whole reduced buffer."""
    source, world, group = args
    if _head(source) == "pack_shards" and source.op[3] == world:
        return table.intern(("pending", table.intern(("gathered", source, world, group), node)), node)
    if _head(source) == "reduced" and source.op[2] == world and source.op[3] == group:
        return table.intern(("pending", table.intern(("reduced whole", source), node)), node)
    return None


def _wait(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """Nothing else ends ``pending``: a value read without its wait equals nothing."""
    return args[0].op[1] if _head(args[0]) == "pending" else None


def _all_to_all(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    source, to, of, group = args
    sizes_out, sizes_in = _numbers(to), _numbers(of)
    if _head(source) != "pack_grads" or sizes_out is None or sizes_out != sizes_in or len(set(sizes_in)) != 1:
        return None
    world, total = source.op[3], node.args[0].meta["val"].numel()  # type: ignore[union-attr]
    if len(sizes_in) != world[1] or sum(sizes_in) != total:
        return None
    return table.intern(("pending", table.intern(("exchanged", source, world, group), node)), node)


def _sum_ranks(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    exchanged, world = args
    if _head(exchanged) != "exchanged" or exchanged.op[2] != world:
        return None
    return table.intern(("reduced", exchanged.op[1], world, exchanged.op[3]), node)


def _reduce_scatter(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    source, kind, world, group = args
    if _head(source) != "pack_grads" or kind != (str, "avg") or source.op[3] != world:
        return None
    return table.intern(("pending", table.intern(("reduced", source, world, group), node)), node)


def _unpack_params(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """The gathered tensors; of a whole reduced buffer, the reduced gradients of replicated parameters."""
    whole, numbers, world, *_ = args
    layouts = _layouts(numbers, world)
    if layouts is None:
        return None
    values, out = node.meta["val"], _typed(args, 3)
    if _head(whole) == "gathered" and whole.op[1].op[2] == numbers and whole.op[2] == world and out is None:
        return _gathered(table, whole.op[1].op[1], layouts, whole.op[3], whole.op[1].op[4], node)
    if _head(whole) == "reduced whole":
        packed, group = whole.op[1].op[1], whole.op[1].op[3]
        if packed.op[2] != numbers or any(layout.dim != REPLICATED for layout in layouts):
            return None
        grads = zip(packed.op[1], layouts, values, strict=True)
        dtypes = packed.op[4], out
        cut = REPLICATED, 0, world[1], None
        return Several(_reduced_term(table, grad, cut, group, dtypes, node, v) for grad, _, v in grads)
    return None


def _gathered(table: TermTable, shards: Key, layouts: list[ShardLayout], group: Key, dtype: Any, node: fx.Node) -> Key:
    parts = zip(shards, layouts, node.meta["val"], strict=True)
    return Several(_gathered_term(table, shard, layout, group, dtype, node, value) for shard, layout, value in parts)


def _start_refresh(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    return table.intern(("refreshing", *args[:4], _typed(args, 4)), node)


def _refresh(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    """Resident copies, brought up to date, are what a gather would give: here, or by the very one that was started."""
    shards, numbers, world, group = args[:4]
    pending = args[4] if len(args) > 4 and args[4] != (type(None), None) else None
    if pending is not None and _head(pending) != "refreshing":
        return None
    if pending is not None and pending.op[1:] != (shards, numbers, world, group, _typed(args, 5)):
        return None
    layouts = _layouts(numbers, world)
    return None if layouts is None else _gathered(table, shards, layouts, group, _typed(args, 5), node)


def _unpack_shards(table: TermTable, args: tuple[Key, ...], kwargs: Mapping[str, Key], node: fx.Node) -> Key | None:
    reduced, numbers, world, rank, *_ = args
    layouts = _layouts(numbers, world)
    if layouts is None or _head(reduced) != "reduced" or reduced.op[1].op[2] != numbers or reduced.op[2] != world:
        return None
    terms = []
    for grad, layout, value in zip(reduced.op[1].op[1], layouts, node.meta["val"], strict=True):
        dtypes = reduced.op[1].op[4], _typed(args, 4)
        cut = _cut(layout, layout.local_shape(rank[1]))
        terms.append(_reduced_term(table, grad, cut, reduced.op[3], dtypes, node, value))
    return Several(terms)


COMM_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        UNSHARD: _unshard,
        REDUCE_GRAD: _reduce_grad,
        WAIT: _wait,
        c10d.all_gather_into_tensor.default: _all_gather,
        c10d.all_to_all_single.default: _all_to_all,
        c10d.reduce_scatter_tensor.default: _reduce_scatter,
        REFRESH: _refresh,
        START_REFRESH: _start_refresh,
        ours.pack_shards.default: _pack_shards,
        ours.pack_grads.default: _pack_grads,
        ours.sum_ranks.default: _sum_ranks,
        ours.unpack_params.default: _unpack_params,
        ours.unpack_shards.default: _unpack_shards,
    }
)
"""Rules of the communication operators, part of :data:`dscompile.term_rules.RULES`."""
