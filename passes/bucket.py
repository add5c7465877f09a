"""Bucket: markers become collectives over flat buffers, at the boundaries of blocks.

Gathers of one block (and of one dtype and group) share a buffer and one ``all_gather``; gradients of one block of
backward share a buffer and one reduction. Payload is in the order of the graph's parameters, so that no schedule
changes a sum whose order depends on the place in a buffer. Buckets begin and end with the repeated blocks that regions
are cut at, so no collective splits a compiled region, and hold at most the given number of elements (DeepSpeed's
``allgather_bucket_size`` and ``reduce_bucket_size`` count elements too).

On gloo, whose reduce-scatter is an all-reduce in disguise, a reduction is one all-to-all and a sum in the order of
ranks: ``(N - 1) / N`` of the bytes instead of twice that, and the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dscompile.comm import REDUCE_GRAD, REFRESH, ROLES, START_REFRESH, WAIT, Group, c10d, ours
from dscompile.graph import Phase, StepGraph, annotate, info
from dscompile.manager import PassContext, graph_pass
from dscompile.passes.markers import Marker, Sections, is_local, reduces, typed, unshards
from dscompile.passes.zero import take
from dscompile.shard_layout import REPLICATED, decode, encode, stays_local


@graph_pass("bucket", after={"zero0", "zero1", "zero2", "zero3", "selective_unshard"}, provides={"collectives"})
def bucket(
    graph: StepGraph, ctx: PassContext, *, gather: int = 8_000_000, reduce: int = 8_000_000, alone: int = 500_000
) -> None:
    """Lower every marker: one flat buffer and one collective for the gathers or gradients of a block.

    Args:
        graph: with markers.
        ctx: knows the groups' backends.
        gather: most elements gathered by one collective.
        reduce: most elements reduced by one collective.
        alone: a tensor of at least this many elements whose pieces lie one behind the other (cut along dimension 0,
            without padding) has a collective of its own: then nothing is copied in or out.
    """
    forward, backward = Sections(graph, Phase.FORWARD), Sections(graph, Phase.BACKWARD)
    _gather_phase(graph, ctx, forward, Phase.FORWARD, gather, alone)
    _gather_phase(graph, ctx, backward, Phase.BACKWARD, gather, alone)
    _refresh_all(graph, ctx, forward, gather)
    _reduce_backward(graph, ctx, backward, reduce, alone)


Wanted = dict[tuple[int, tuple[object, ...]], list[Marker]]
"""Markers by the block where their communication stands, and by what the members of a bucket have in common."""


def _buckets(wanted: Wanted, cap: int) -> Iterator[tuple[int, list[Marker]]]:
    """The block and the members of each bucket: consecutive markers of at most ``cap`` elements together."""
    for (block, _), markers in wanted.items():
        total = 0
        members: list[Marker] = []
        for marker in markers:
            if members and total + marker.elements > cap:
                yield block, members
                members, total = [], 0
            members.append(marker)
            total += marker.elements
        yield block, members


# -- gathers ---------------------------------------------------------------------------------------------------------


def _gather_phase(graph: StepGraph, ctx: PassContext, sections: Sections, phase: Phase, cap: int, alone: int) -> None:
    wanted: Wanted = {}
    for marker in unshards(graph):
        if info(marker.node).phase is not phase or is_local(marker):
            continue
        first = sections.first_use(marker.node)
        if first is None:
            continue  # nothing but an output reads it: the marker's own kernel gathers
        if marker.operand.op != "placeholder":
            _lower_gather(graph, ctx, [marker], marker.node)
            continue
        wanted.setdefault((first, _kind(marker, alone)), []).append(marker)
    places = {node: place for place, node in enumerate(graph.placeholders())}
    for block, members in _buckets(wanted, cap):
        _lower_gather(graph, ctx, sorted(members, key=lambda m: places[m.operand]), sections.start(block))


def _kind(marker: Marker, alone: int) -> tuple[object, ...]:
    """What members of a bucket have in common; a tensor that travels alone has its own name in it."""
    value, layout = marker.operand.meta["val"], marker.layout
    name = marker.node.name if marker.elements >= alone and layout.is_consecutive else ""
    dtypes = value.dtype, marker.dtype, marker.out
    return *dtypes, value.device, layout.world, marker.group, layout.dim == REPLICATED, name


def _lower_gather(graph: StepGraph, ctx: PassContext, members: list[Marker], before: fx.Node) -> None:
    first = members[0]
    if not graph.edit("bucket gather", first.node, why=f"{len(members)} parameters, one collective"):
        return
    world, layouts = first.layout.world, encode([m.layout for m in members])
    packed = ([m.operand for m in members], layouts, world, *typed(first.dtype))
    flat = _insert(graph, before, ours.pack_shards.default, packed, first)
    launch = _insert(graph, before, c10d.all_gather_into_tensor.default, (flat, world, first.group), first)
    ready = _insert(graph, before, WAIT, (launch,), first)
    fulls = _insert(graph, before, ours.unpack_params.default, (ready, layouts, world), first)
    for index, marker in enumerate(members):
        graph.replace(marker.node, take(graph, fulls, index, marker.node, before=before))
    elements = sum(m.elements for m in members)
    names = [m.fqn for m in members]
    ctx.decide(launch, "one gather", "the parameters of one block", elements=elements, parameters=names)


def _insert(graph: StepGraph, before: fx.Node, target: object, args: tuple[object, ...], like: Marker) -> fx.Node:
    node = graph.insert_call(before, target, args, like=like.node)
    annotate(node, role=ROLES[target], phase=info(like.node).phase)
    return node


def _refresh_all(graph: StepGraph, ctx: PassContext, sections: Sections, cap: int) -> None:
    """Merge the refreshes of resident parameters, in program order, into as few collectives as ``cap`` allows.

    A bucket is started and awaited before the block that reads its first parameter.
    """
    groups: dict[tuple[object, ...], list[list[fx.Node]]] = {}
    sizes: dict[int, int] = {}
    for node in graph.graph.find_nodes(op="call_function", target=REFRESH, sort=True):
        shards, layouts, world, group, *rest = node.args
        value = shards[0].meta["val"]
        elements = sum(full.numel() for full in node.meta["val"])
        key = value.dtype, *rest[1:], value.device, world, group, stays_local(layouts, world)
        open_ = groups.setdefault((*key, info(node).phase), [])
        if not open_ or sizes[id(open_[-1])] + elements > cap:
            open_.append([])
            sizes[id(open_[-1])] = 0
        open_[-1].append(node)
        sizes[id(open_[-1])] += elements
    for group in (g for lists in groups.values() for g in lists):
        _merge_refreshes(graph, ctx, sections, group)


def _merge_refreshes(graph: StepGraph, ctx: PassContext, sections: Sections, nodes: list[fx.Node]) -> None:
    first = nodes[0]
    if not graph.edit("bucket refresh", first, why=f"{len(nodes)} resident parameters, one collective"):
        return
    _, _, world, group, *rest = first.args
    dtype = rest[1:]
    shards = [s for n in nodes for s in n.args[0]]  # type: ignore[union-attr]
    layouts = [number for n in nodes for number in n.args[1]]  # type: ignore[union-attr]
    before = _refresh_place(sections, nodes)
    if stays_local(layouts, world):  # type: ignore[arg-type]
        merged = graph.insert_call(before, REFRESH, (shards, layouts, world, group, None, *dtype), like=first)
        pending = merged
    else:
        pending = graph.insert_call(before, START_REFRESH, (shards, layouts, world, group, *dtype), like=first)
        merged = graph.insert_call(before, REFRESH, (shards, layouts, world, group, pending, *dtype), like=first)
    index = 0
    for node in nodes:
        count = len(decode(node.args[1], world))  # type: ignore[arg-type]
        for user in list(node.users):
            position = user.args[1]
            assert isinstance(position, int)
            new = take(graph, merged, index + position, user, before=before)
            graph.replace(user, new)
        index += count
    for node in nodes:
        graph.erase(node)
    ctx.decide(pending, "one refresh", "resident parameters are gathered together after a step", parameters=index)


def _refresh_place(sections: Sections, nodes: list[fx.Node]) -> fx.Node:
    """Before the block that reads a bucket's first parameter, where no compiled region is cut in two."""
    reads = [sections.first_use(user) for node in nodes for user in node.users]
    blocks = [block for block in reads if block is not None]
    if not blocks or any(shard.op != "placeholder" for node in nodes for shard in node.all_input_nodes):
        return nodes[0]
    return sections.start(min(blocks))


# -- reductions ------------------------------------------------------------------------------------------------------


def _reduce_backward(graph: StepGraph, ctx: PassContext, sections: Sections, cap: int, alone: int) -> None:
    wanted: Wanted = {}
    late = _marked_late(graph, sections)
    for marker in reduces(graph):
        if is_local(marker):
            continue
        made = len(sections.spans) - 1 if marker.node in late else sections.of(marker.operand)
        if made is None or any(user is not graph.output_node for user in marker.node.users):
            _lower_reduce(graph, ctx, [marker], marker.node)
            continue
        wanted.setdefault((made, _kind(marker, alone)), []).append(marker)
    # Gradients are given out in the order of the parameters.
    places = {output: place for place, output in enumerate(graph.output_values()) if isinstance(output, fx.Node)}
    for block, members in _buckets(wanted, cap):
        _lower_reduce(graph, ctx, sorted(members, key=lambda m: places[m.node]), sections.after(block, graph))


def _marked_late(graph: StepGraph, sections: Sections) -> set[fx.Node]:
    """Markers that stand after the last compute node: a pass moved them there, so they are reduced there."""
    if not sections.compute:
        return set()
    last = sections.compute[-1]
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node is last:
            break
        if node.target is REDUCE_GRAD:
            found.add(node)
    return found


def _lower_reduce(graph: StepGraph, ctx: PassContext, members: list[Marker], before: fx.Node) -> None:
    first = members[0]
    if not graph.edit("bucket reduce", first.node, why=f"{len(members)} gradients, one collective"):
        return
    group = ctx.group(first.group, first.layout.world)
    world, layouts = group.size, encode([m.layout for m in members])
    packed = ([m.operand for m in members], layouts, world, *typed(first.dtype))
    flat = _insert(graph, before, ours.pack_grads.default, packed, first)
    reduced = _launch_reduce(graph, before, flat, group, first)
    if first.layout.dim == REPLICATED:  # every rank needs the whole: gather what was reduced in pieces
        launch = _insert(graph, before, c10d.all_gather_into_tensor.default, (reduced, world, group.name), first)
        whole = _insert(graph, before, WAIT, (launch,), first)
        grads = _insert(graph, before, ours.unpack_params.default, (whole, layouts, world, *typed(first.out)), first)
    else:
        arguments = (reduced, layouts, world, group.rank, *typed(first.out))
        grads = _insert(graph, before, ours.unpack_shards.default, arguments, first)
    for index, marker in enumerate(members):
        graph.replace(marker.node, take(graph, grads, index, marker.node, before=before))
    elements = sum(m.elements for m in members)
    ctx.decide(reduced, "one reduction", "the gradients of one block", elements=elements)


def _launch_reduce(graph: StepGraph, before: fx.Node, flat: fx.Node, group: Group, like: Marker) -> fx.Node:
    """A mean over ranks of a rank-major flat buffer, this rank's part of it."""
    world = group.size
    if group.backend == "gloo":
        part = flat.meta["val"].numel() // world
        sizes = [part] * world
        launch = _insert(graph, before, c10d.all_to_all_single.default, (flat, sizes, sizes, group.name), like)
        ready = _insert(graph, before, WAIT, (launch,), like)
        return _insert(graph, before, ours.sum_ranks.default, (ready, world), like)
    launch = _insert(graph, before, c10d.reduce_scatter_tensor.default, (flat, "avg", world, group.name), like)
    return _insert(graph, before, WAIT, (launch,), like)
