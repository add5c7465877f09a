"""ZeRO as decisions on markers: what is gathered again, what stays, and when gradients are reduced.

A sharded model is traced with ``unshard(shard)`` where it reads a parameter and ``reduce_grad(gradient)`` where
autograd delivers one. The stages differ in what lies between forward and backward (Rajbhandari et al., ZeRO, 2020):

- stage 0 and 1 keep gradients whole until the end of backward, stage 2 and 3 reduce them as they are made;
- stage 1 and 2 (and 0, if it computes in another dtype than its masters') read a resident copy that is refreshed after
  each optimizer step, stage 3 gathers for forward, lets go,
  and gathers again for backward. Nothing derived only from gathered parameters is saved between them.

No pass here emits a collective: :mod:`dscompile.passes.bucket` does.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from dscompile.comm import REDUCE_GRAD, REFRESH, UNSHARD
from dscompile.graph import GraphKind, Phase, Role, StepGraph, annotate, info
from dscompile.manager import Numerics, PassContext, graph_pass
from dscompile.passes.markers import Marker, is_local, reduces, unshards
from dscompile.shard_layout import encode

aten = torch.ops.aten


@graph_pass("merge_ties", after={"canonicalise"}, numerics=Numerics.REASSOCIATES, optional=True)
def merge_ties(graph: StepGraph, ctx: PassContext) -> None:
    """Reduce a tied parameter's gradient once: ``reduce(a) + reduce(b)`` becomes ``reduce(a + b)``."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.add.Tensor, sort=True):
        parts = [a for a in node.args if isinstance(a, fx.Node) and a.target is REDUCE_GRAD and len(a.users) == 1]
        if len(parts) != 2 or node.kwargs or parts[0].args[1:] != parts[1].args[1:]:
            continue
        if not graph.edit("merge", node, why="one reduction for a tied parameter"):
            return
        left, right = parts
        total = graph.insert_call(node, aten.add.Tensor, (left.args[0], right.args[0]), like=node)
        merged = graph.insert_call(node, REDUCE_GRAD, (total, *left.args[1:]), like=left)
        graph.replace(node, merged)
        graph.erase(left)
        graph.erase(right)
        ctx.decide(merged, "merged", "the parameter is tied: its gradients are added before they are reduced")


@graph_pass("zero0", after={"canonicalise", "merge_ties"}, provides={"zero"})
def zero0(graph: StepGraph, ctx: PassContext) -> None:
    """Replicated parameters: gradients are averaged over ranks at the end of backward."""
    drop_identity_views(graph)
    read_resident(graph, ctx)
    reduce_at_end(graph, ctx)


@graph_pass("zero1", after={"canonicalise", "merge_ties"}, provides={"zero"})
def zero1(graph: StepGraph, ctx: PassContext) -> None:
    """Optimizer state sharded: resident parameters are refreshed, gradients stay whole until the end of backward."""
    drop_identity_views(graph)
    read_resident(graph, ctx)
    reduce_at_end(graph, ctx)


@graph_pass("zero2", after={"canonicalise", "merge_ties"}, provides={"zero"})
def zero2(graph: StepGraph, ctx: PassContext) -> None:
    """Gradients sharded too: each is reduced as soon as its block of backward is done."""
    drop_identity_views(graph)
    read_resident(graph, ctx)


@graph_pass("zero3", after={"canonicalise", "merge_ties"}, provides={"zero", "regathered"})
def zero3(graph: StepGraph, ctx: PassContext) -> None:
    """Parameters sharded too: gathered for forward, released, and gathered again for backward."""
    drop_identity_views(graph)
    regather(graph, ctx)


def drop_identity_views(graph: StepGraph) -> None:
    """Drop views that change nothing right after a reduction (DTensor's ``to_local`` leaves them), so that only the
    output reads a reduced gradient and the reduction may stand anywhere after its block.
    """
    for marker in reduces(graph):
        node = marker.node
        for user in list(node.users):
            identity = user.target is aten.view.default and len(node.users) == 1
            if identity and tuple(user.meta["val"].shape) == tuple(node.meta["val"].shape):
                if not graph.edit("identity view", user, why=f"same shape as %{node.name}"):
                    return
                graph.replace(user, node)


def regather(graph: StepGraph, ctx: PassContext) -> None:
    """Give backward its own gathers, and its own copies of what is derived from gathered parameters alone."""
    if graph.kind is not GraphKind.JOINT:
        return
    derived = _derived_from_parameters(graph)
    copies: dict[fx.Node, fx.Node] = {}
    late = [n for n in graph.nodes if n.op == "call_function" and info(n).phase is Phase.BACKWARD]
    for node in late:
        wanted = [operand for operand in node.all_input_nodes if operand in derived]
        for operand in wanted:
            if operand not in copies and not graph.edit(
                "regather", operand, why="read by backward; a gathered parameter is never saved"
            ):
                return
            copy = _copy_for_backward(graph, operand, node, copies)
            node.replace_input_with(operand, copy)
            graph.touched.add(node)
    gathers = [n for n in copies if n.target is UNSHARD]
    for node in gathers:
        ctx.decide(copies[node], "gathered again", "stage 3 keeps no gathered parameter between forward and backward")


def _derived_from_parameters(graph: StepGraph) -> set[fx.Node]:
    """Forward values that hold nothing but gathered parameters: the gathers, and casts, views and norms of them."""
    derived: set[fx.Node] = set()
    for marker in unshards(graph):
        if info(marker.node).phase is Phase.FORWARD and not is_local(marker):
            derived.add(marker.node)
    for node in graph.nodes:
        if node.op != "call_function" or node in derived or info(node).phase is not Phase.FORWARD:
            continue
        if info(node).role not in (Role.COMPUTE, Role.VIEW):
            continue
        operands = node.all_input_nodes
        if operands and all(operand in derived for operand in operands):
            derived.add(node)
    return derived


def _copy_for_backward(graph: StepGraph, node: fx.Node, before: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The backward copy of a derived node, made before its first reader there; operands first."""
    found = copies.get(node)
    if found is not None:
        return found

    def operand(value: fx.Node) -> fx.Node:
        is_shard = node.target is UNSHARD
        return value if is_shard else _copy_for_backward(graph, value, before, copies)

    args = fx.map_arg(node.args, operand)
    kwargs = fx.map_arg(node.kwargs, operand)
    copy = graph.insert_call(before, node.target, args, kwargs, like=node)
    annotate(copy, phase=Phase.BACKWARD)
    copies[node] = copy
    return copy


def read_resident(graph: StepGraph, ctx: PassContext) -> None:
    """Read parameters from their resident copies: an ``unshard`` becomes a refresh, which gathers only after a step.

    A parameter that is whole on every rank has a copy only if it is read in another dtype than its master's.
    """
    for marker in unshards(graph):
        if is_local(marker) and marker.dtype is None:
            continue
        if not graph.edit("resident", marker.node, why="stages 0 to 2 keep a resident copy"):
            return
        layouts = encode([marker.layout])
        world, group = marker.layout.world, marker.group
        dtype = () if marker.dtype is None else (None, marker.dtype)  # nothing is pending
        arguments = ([marker.operand], layouts, world, group, *dtype)
        fulls = graph.insert_call(marker.node, REFRESH, arguments, like=marker.node)
        graph.replace(marker.node, take(graph, fulls, 0, marker.node, before=marker.node))


def take(graph: StepGraph, values: fx.Node, index: int, like: fx.Node, *, before: fx.Node) -> fx.Node:
    """``values[index]`` as a node that stands for ``like``."""
    node = graph.insert_call(before, operator.getitem, (values, index), like=like)
    annotate(node, role=info(values).role, phase=info(like).phase)
    return node


def reduce_at_end(graph: StepGraph, ctx: PassContext) -> None:
    """Move reductions to the end of backward: gradients are whole until then."""
    for marker in reduces(graph):
        if is_local(marker) or _read_in_graph(marker, graph):
            continue
        if not graph.edit("reduce late", marker.node, why="gradients stay whole until backward is done"):
            return
        graph.output_node.prepend(marker.node)
        graph.touched.add(marker.node)


def _read_in_graph(marker: Marker, graph: StepGraph) -> bool:
    """Whether anything but the output reads a reduced gradient."""
    return any(user is not graph.output_node for user in marker.node.users)
