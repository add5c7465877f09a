"""The verifier: after every pass, a table of named rules, one small function each (:mod:`dscompile.verify_rules`).

The rules look at what terms cannot see: order, phases, aliasing, metadata, the annotations, and the number and order of
effects and draws. What a pass touched is found by comparing every node with a fingerprint, so an edit that bypassed
:meth:`StepGraph.edit` is checked like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dscompile.effects import Root, Storages, execution_order, is_effect, is_random, not_plain, written
from dscompile.graph import INFO, GraphInput, GraphOutput, NodeInfo, StepGraph
from dscompile.source import describe
from dscompile.torch_compat import symbolic_expression

Fingerprint = tuple[Any, tuple[Any, ...], dict[str, Any], Any, Any]
"""Target, args, kwargs, fake value and meaning of a node. FX replaces these objects on every change: identity tells."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: which, by which pass, at which nodes (with their FQNs and user source lines), and how."""

    rule: str
    pass_name: str
    nodes: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        """The whole message, one node a line."""
        lines = [f"verify: rule {self.rule!r} broken by pass {self.pass_name!r}: {self.message}", *self.nodes]
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Facts:
    """What the rules compare: one linear walk over a graph.

    Attributes:
        order: nodes in execution order.
        outputs: flattened outputs.
        signatures: type, shape, strides and device of every output.
        sharing: for each output, the number of the storage group it belongs to; inputs come first in the numbering.
        sameness: like ``sharing``, for being the very same node.
        effects: effect nodes in execution order; draws: random nodes likewise.
        reads: (reader, storage) -> how many writes to that storage came before, for storages that are written at all.
    """

    order: list[fx.Node]
    placeholders: list[fx.Node]
    outputs: list[Any]
    signatures: list[Any]
    sharing: list[int | None]
    sameness: list[int | None]
    effects: list[fx.Node]
    draws: list[fx.Node]
    reads: dict[tuple[fx.Node, Root], int]
    storages: Storages


@dataclass
class Baseline:
    """The traced graph's facts, and the fingerprints of its nodes as of the last pass that was found right."""

    inputs: tuple[GraphInput, ...]
    outputs: tuple[GraphOutput, ...]
    forward_outputs: int
    placeholders: list[tuple[str, Any, NodeInfo | None]]
    facts: Facts
    prints: dict[fx.Node, Fingerprint]


@dataclass
class Check:
    """One verification: the graph, its facts, the baseline, and what changed since the last pass."""

    graph: StepGraph
    base: Baseline
    facts: Facts
    changed: list[fx.Node]
    pass_name: str
    found: list[Violation] = field(default_factory=list)

    def report(self, rule: str, message: str, *nodes: fx.Node) -> None:
        """Record a violation at ``nodes``."""
        self.found.append(Violation(rule, self.pass_name, tuple(describe(n) for n in nodes), message))


def baseline(graph: StepGraph) -> Baseline:
    """Record what must not change, before the first pass."""
    facts = gather(graph)
    return Baseline(
        inputs=graph.inputs,
        outputs=graph.outputs,
        forward_outputs=graph.forward_outputs,
        placeholders=[(n.name, signature(n.meta.get("val")), n.meta.get(INFO)) for n in facts.placeholders],
        facts=facts,
        prints=fingerprints(graph),
    )


def verify(graph: StepGraph, rules: Baseline, pass_name: str) -> list[Violation]:
    """Check every rule after ``pass_name`` ran. The empty list: all hold, and the next pass starts from here."""
    from dscompile.verify_rules import RULES, structure

    prints = fingerprints(graph)
    changed = [n for n, print_ in prints.items() if _differs(print_, rules.prints.get(n)) or n in graph.touched]
    broken = Check(graph, rules, rules.facts, changed, pass_name)
    structure(broken)
    if broken.found:  # the other rules walk the graph and need a well-formed one
        return broken.found
    check = Check(graph, rules, gather(graph), changed, pass_name)
    for rule in RULES.values():
        rule(check)
    if not check.found:
        rules.prints = prints
    return check.found


def fingerprints(graph: StepGraph) -> dict[fx.Node, Fingerprint]:
    """One fingerprint a node, cheap enough to take after every pass (five references)."""
    return {n: (n.target, n.args, n.kwargs, (m := n.meta).get("val"), m.get(INFO)) for n in graph.nodes}


def _differs(now: Fingerprint, before: Fingerprint | None) -> bool:
    return (
        before is None
        or now[0] is not before[0]
        or now[1] is not before[1]
        or now[2] is not before[2]
        or now[3] is not before[3]
        or now[4] is not before[4]
    )


def gather(graph: StepGraph) -> Facts:
    """Collect the facts of a well-formed graph."""
    storages = Storages(graph)
    forward, backward = execution_order(graph)
    order = forward + backward
    special = not_plain(order)
    effects = [n for n in special if is_effect(n)]
    outputs = graph.output_values()
    placeholders = graph.placeholders()
    return Facts(
        order=order,
        placeholders=placeholders,
        outputs=outputs,
        signatures=[signature(v.meta.get("val")) if isinstance(v, fx.Node) else v for v in outputs],
        sharing=_groups(placeholders, outputs, storages.root),
        sameness=_groups(placeholders, outputs, lambda node: node),
        effects=effects,
        draws=[n for n in special if is_random(n)],
        reads=_versioned_reads(order, effects, storages),
        storages=storages,
    )


def _groups(placeholders: list[fx.Node], outputs: list[Any], key: Any) -> list[int | None]:
    """For each output, the position of the first input or output with an equal key; None for constants and numbers."""
    first: dict[Any, int] = {}
    for i, node in enumerate(placeholders):
        first.setdefault(key(node), i)
    groups: list[int | None] = []
    for i, value in enumerate(outputs):
        tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
        groups.append(first.setdefault(key(value), len(placeholders) + i) if tensor else None)
    return groups


def _versioned_reads(
    order: list[fx.Node], effects: list[fx.Node], storages: Storages
) -> dict[tuple[fx.Node, Root], int]:
    """How many writes each reader of a mutated storage comes after."""
    targets = {effect: [storages.root(n) for n in written(effect)] for effect in effects}
    versions = {root: 0 for roots in targets.values() for root in roots}
    if not versions:
        return {}
    reads: dict[tuple[fx.Node, Root], int] = {}
    for node in order:
        for operand in node.all_input_nodes:
            root = storages.root(operand)
            if root in versions:
                reads[(node, root)] = versions[root]
        for root in targets.get(node, ()):
            versions[root] += 1
    return reads


def signature(value: Any) -> Any:
    """Type, shape, strides, device and layout of a fake value, comparable with ``==``; symbols by their expression."""
    if isinstance(value, torch.Tensor):
        strided = value.layout is torch.strided
        return (
            value.dtype,
            tuple([_size(s) for s in value.shape]),
            tuple([_size(s) for s in value.stride()]) if strided else None,
            value.device,
            value.layout,
        )
    if isinstance(value, (list, tuple)):
        return tuple(signature(v) for v in value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), symbolic_expression(value))
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return (type(value), repr(value))
    return type(value)


def _size(size: Any) -> Any:
    return size if type(size) is int else symbolic_expression(size)
