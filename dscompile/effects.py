"""What running a node does beside computing its value: random draws, effects, writes, and which storage it touches.

Everything is read from operator schemas and from the graph, never from the fake values of earlier nodes: once a pass
has replaced an operand, the fake storage of its users is stale. The verifier, the equivalence proof and the passes
share these answers, so they cannot disagree.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.comm import REFRESH, ROLES, WAIT
from dscompile.graph import INFO, GraphKind, NodeInfo, Phase, StepGraph, fake_value
from dscompile.torch_compat import HigherOrderOperator, OpOverload, storage_key

aten = torch.ops.aten

Root = fx.Node | tuple[fx.Node, Any]
"""Identity of a storage: the node that made it, with the output number for an operator of several outputs."""

_SHARES_UNANNOTATED = frozenset({aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_chunk.default, WAIT})
"""Operators whose schema says "fresh" although the result shares its operand's storage."""

_MAY_SHARE = frozenset(
    getattr(getattr(aten, name), overload)
    for name, overload in (
        ("reshape", "default"),
        ("contiguous", "default"),
        ("to", "dtype"),
        ("to", "device"),
        ("to", "dtype_layout"),
        ("to", "other"),
        ("flatten", "using_ints"),
    )
)
"""Operators that return a view or a copy, depending on their operand's layout."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What an operator's schema promises. Numbers are argument positions in schema order.

    ``shares``: the argument whose storage the (first) result shares; ``lists``: the result is a list of such views;
    ``writes``: arguments that are mutated; ``reshapes``: it changes the metadata of an argument in place.
    """

    names: tuple[str, ...]
    shares: int | None
    lists: bool
    writes: tuple[int, ...]
    seeded: bool
    impure: bool
    reshapes: bool


@functools.cache
def traits(target: OpOverload) -> Traits:
    """The traits of an ATen (or custom) operator overload."""
    schema = target._schema
    arguments, returns = schema.arguments, schema.returns
    shares: int | None = 0 if target in _SHARES_UNANNOTATED else None
    alias = returns[0].alias_info if len(returns) == 1 else None
    if alias is not None:
        sets = [a.alias_info.before_set if a.alias_info is not None else set() for a in arguments]
        shares = next((i for i, names in enumerate(sets) if names & alias.before_set), shares)
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    return Traits(
        names=tuple(a.name for a in arguments),
        shares=shares,
        lists=bool(returns) and str(returns[0].type).startswith("List"),
        writes=tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write),
        seeded=seeded,
        impure=_impure(target),
        reshapes=torch.Tag.inplace_view in target.tags,
    )


def _impure(target: OpOverload) -> bool:
    """Whether FX would refuse to remove an unused call of ``target`` for a reason other than randomness."""
    if target in ROLES:  # PyTorch calls a wait impure; whoever reads the value reads the wait's result
        return False
    probe = fx.Graph().call_function(target)
    return probe.is_impure(impure_random=False)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Argument ``position``/``name`` of a call, wherever it was spelt; ``default`` if it was not."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def is_random(node: fx.Node) -> bool:
    """Whether running the node advances a random number generator.

    Attention with ``dropout_p == 0`` and anything told ``train=False`` draws nothing. ``native_dropout`` with
    ``p == 0`` while training *does* draw (a Bernoulli mask of ones), and so counts.
    """
    if isinstance(node.target, HigherOrderOperator):
        return any(is_random(inner) for inner in _inner_nodes(node))
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    found = traits(node.target)
    if not found.seeded:
        return False
    for position, name in enumerate(found.names):
        value = argument(node, position, name, _ABSENT)
        if value is _ABSENT:
            value = node.target._schema.arguments[position].default_value
        if (name == "dropout_p" and type(value) in (int, float) and value == 0) or (
            name in ("train", "training") and value is False
        ):
            return False
    return True


def dropout_scale(rate: object, train: object, dtype: torch.dtype) -> float | None:
    """What ``native_dropout`` multiplies the values of ``dtype`` that it keeps by, on CPUs, where that scales the mask
    in that dtype; None where it keeps none or all, or that is unknown.
    """
    if train is not True or not isinstance(rate, float) or not 0 < rate < 1:
        return None
    scale = 1 / (1 - rate)
    return scale if dtype.itemsize > 2 else float(torch.tensor(scale, dtype=dtype))


_ABSENT = object()


def is_effect(node: fx.Node) -> bool:
    """Whether the node must run even if nothing reads it: it writes to memory, asserts, or prints."""
    if node.op != "call_function":
        return node.op in ("call_module", "call_method")
    if isinstance(node.target, OpOverload):
        found = traits(node.target)
        return bool(found.writes) or found.impure
    if isinstance(node.target, HigherOrderOperator):
        return node.is_impure(impure_random=False) or any(is_effect(inner) for inner in _inner_nodes(node))
    return node.is_impure(impure_random=False)


def _inner_nodes(node: fx.Node) -> Iterable[fx.Node]:
    """Nodes of the subgraphs that a higher-order operator is called with."""
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and isinstance(module := constant(operand), fx.GraphModule):
            yield from module.graph.nodes


def constant(node: fx.Node) -> Any:
    """The object behind a ``get_attr`` node."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node mutates. A higher-order operator with effects is taken to write all its tensors."""
    if isinstance(node.target, HigherOrderOperator):
        if not is_effect(node):
            return []
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    found = traits(node.target)
    operands: list[fx.Node] = []
    for position in found.writes:
        value = argument(node, position, found.names[position])
        operands += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)]
    return operands


_BUILTIN_MODULES = frozenset({"_operator", "operator", "math", "builtins"})


def is_pure_builtin(target: Any) -> bool:
    """Python's own arithmetic and ``getitem``, and PyTorch's symbolic versions of it (``torch.sym_max``)."""
    module = getattr(target, "__module__", None)
    if module in _BUILTIN_MODULES:
        return True
    return module == "torch" and str(getattr(target, "__name__", "")).startswith("sym_")


def not_plain(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes whose operator may draw, write or have an effect: a quick sieve before the questions above."""
    known: dict[int, bool] = {}  # by identity: hashing an operator overload is a Python call
    result = []
    for node in nodes:
        if node.op != "call_function":
            if node.op in ("call_module", "call_method"):
                result.append(node)
            continue
        target = node.target
        special = known.get(id(target))
        if special is None:
            special = known[id(target)] = not is_plain(target)
        if special:
            result.append(node)
    return result


def is_plain(target: Any) -> bool:
    """Whether calling ``target`` never draws, writes or has an effect, whatever its arguments."""
    if isinstance(target, OpOverload):
        found = traits(target)
        return not (found.seeded or found.impure or found.writes)
    return is_pure_builtin(target)


# -- order -------------------------------------------------------------------------------------------------------------


def phase_of(node: fx.Node) -> Phase:
    """When a node really runs: a write that AOTAutograd put at the end of the joint graph still belongs to forward."""
    meta = node.meta
    if meta.get("partitioner_tag") == "must_be_in_forward":
        return Phase.FORWARD
    found = meta.get(INFO)
    return found.phase if isinstance(found, NodeInfo) else Phase.FORWARD


def execution_order(graph: StepGraph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes before ``output`` in the order they run: (forward, backward). Only a joint graph has both."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    if graph.kind is not GraphKind.JOINT:
        return (nodes, []) if graph.kind is not GraphKind.BACKWARD else ([], nodes)
    forward: list[fx.Node] = []
    backward: list[fx.Node] = []
    for node in nodes:
        (backward if phase_of(node) is Phase.BACKWARD else forward).append(node)
    return forward, backward


# -- storages ----------------------------------------------------------------------------------------------------------


class Storages:
    """Answers "which storage does this node's value live in?" for one graph, from its structure.

    Placeholders are told apart by the storage of their fake tensors (two inputs may alias); every other node either
    shares an operand's storage, by its operator's schema, or owns a fresh one.
    """

    def __init__(self, graph: StepGraph, bound: dict[fx.Node, Root] | None = None) -> None:
        """``bound`` gives placeholders the roots they have in another graph (a backward's saved values)."""
        self._roots: dict[fx.Node, Root] = {}
        first: dict[int, fx.Node] = {}
        for node in graph.placeholders():
            key = storage_key(node.meta.get("val"))
            self._roots[node] = node if key is None else first.setdefault(key, node)
        self._roots.update(bound or {})

    def root(self, node: fx.Node) -> Root:
        """The storage that ``node``'s value lives in."""
        chain: list[fx.Node] = []
        current = node
        while (found := self._roots.get(current)) is None:
            chain.append(current)
            below = shared_operand(current)
            if below is None:
                found = _own_root(current)
                break
            current = below
        for passed in chain:
            self._roots[passed] = found
        return found


def _own_root(node: fx.Node) -> Root:
    if _is_getitem(node) and isinstance(node.args[0], fx.Node):
        return (node.args[0], node.args[1])  # two getitems of one output are one tensor
    return node


def _is_getitem(node: fx.Node) -> bool:
    return node.target is operator.getitem


def shared_operand(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the node's value shares, or None if the value has memory of its own."""
    if node.op != "call_function":
        return None
    if _is_getitem(node):
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(source.target, OpOverload):
            return None
        if source.target is REFRESH:  # the resident copy that the shard is a view into
            return source.args[0][node.args[1]]  # type: ignore[index,return-value]
        return shared_operand(source) if traits(source.target).lists else None
    if not isinstance(node.target, OpOverload):
        return None
    found = traits(node.target)
    if found.shares is None:
        return None
    operand = argument(node, found.shares, found.names[found.shares])
    if not isinstance(operand, fx.Node):
        return None
    if node.target in _MAY_SHARE and storage_key(fake_value(node)) != storage_key(operand.meta.get("val")):
        return None
    return operand
