"""Canonical form: no dead code, no operators that change nothing, every common subexpression once. Bitwise.

It runs before every planning pass, so that those meet one spelling of each computation. The limits are what keep it
safe: random draws, effects and anything near a write are left alone; nothing merges across phases; and two tensors that
the user can see never end up in one storage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dscompile.effects import Root, Storages, is_effect, is_pure_builtin, is_random, phase_of, written
from dscompile.graph import StepGraph, info
from dscompile.manager import PassContext, graph_pass
from dscompile.torch_compat import HigherOrderOperator, OpOverload
from dscompile.verify import signature

aten = torch.ops.aten

_VIEW_NO_OPS = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.expand.default,
    }
)
_COPY_NO_OPS = frozenset({aten.clone.default, aten._to_copy.default, aten.contiguous.default})


@graph_pass("canonicalise", provides={"canonical"})
def canonicalise(
    graph: StepGraph, ctx: PassContext, *, dead_code: bool = True, no_ops: bool = True, cse: bool = True
) -> None:
    """Remove dead code, operators that change nothing, and repeated subexpressions; each in linear time."""
    if no_ops:
        remove_no_ops(graph)
    if cse:
        merge_common(graph)
    if dead_code:
        remove_dead(graph)


def remove_dead(graph: StepGraph) -> None:
    """Erase nodes that nothing reads, last first, apart from inputs, effects and random draws."""
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_pure(node) and graph.edit("dead", node, why="nothing reads it"):
            graph.erase(node)


def remove_no_ops(graph: StepGraph) -> None:
    """Replace views, casts and copies that change neither type nor layout by their operand.

    A node that is itself an output stays: returning its operand would make two outputs, or an output and an input, one
    tensor. A copy also stays if its memory is visible to the user, or if anything writes to either side.
    """
    storages = Storages(graph)
    visible, mutated = _visible(graph, storages), _mutated(graph, storages)
    for node in list(graph.nodes):
        copies = node.target in _COPY_NO_OPS
        if not copies and node.target not in _VIEW_NO_OPS:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or graph.output_node in node.users:
            continue
        if signature(node.meta.get("val")) != signature(source.meta.get("val")):
            continue
        own, below = storages.root(node), storages.root(source)
        if own != below and (own in visible or {own, below} & mutated):
            continue
        if graph.edit("no-op", node, why=f"same type and layout as %{source.name}"):
            graph.replace(node, source)


def merge_common(graph: StepGraph) -> None:
    """Compute every subexpression once in each phase and role: one dictionary lookup a node."""
    storages = Storages(graph)
    visible, mutated = _visible(graph, storages), _mutated(graph, storages)
    output = graph.output_node
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_pure(node) or isinstance(node.target, HigherOrderOperator):
            continue
        if "unbacked_bindings" in node.meta:  # the node defines a symbol of the shape environment
            continue
        if mutated and any(storages.root(n) in mutated for n in (node, *node.all_input_nodes)):
            continue
        meaning = info(node)
        key = (node.target, phase_of(node), meaning.role, _typed(node.args), _typed(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is node or signature(kept.meta.get("val")) != signature(node.meta.get("val")):
            continue
        one, other = storages.root(kept), storages.root(node)
        if (one != other and one in visible and other in visible) or (output in kept.users and output in node.users):
            continue
        if graph.edit("cse", node, why=f"same as %{kept.name}"):
            if other in visible:
                visible.add(one)
            graph.replace(node, kept)


def _is_pure(node: fx.Node) -> bool:
    """Whether the node only computes: an operator with declared behaviour, no draw and no effect; or a constant."""
    if node.op != "call_function":
        return node.op == "get_attr"
    declared = isinstance(node.target, (OpOverload, HigherOrderOperator)) or is_pure_builtin(node.target)
    return declared and not is_effect(node) and not is_random(node)


def _visible(graph: StepGraph, storages: Storages) -> set[Root]:
    """Storages that the user can reach: those of inputs and outputs."""
    values = [*graph.placeholders(), *(v for v in graph.output_values() if isinstance(v, fx.Node))]
    return {storages.root(node) for node in values}


def _mutated(graph: StepGraph, storages: Storages) -> set[Root]:
    """Storages that something writes to."""
    return {storages.root(operand) for node in graph.nodes for operand in written(node)}


def _typed(value: Any) -> Any:
    """An argument as a dictionary key: constants with their type (``1``, ``1.0``, ``True`` differ), lists as tuples."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple([_typed(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _typed(v)) for k, v in sorted(value.items())])
    return (type(value), repr(value))
