"""Reading the markers of a sharded graph: which parameter, which layout, used where.

``unshard`` and ``reduce_grad`` are what a sharded model is traced with. The ZeRO passes decide on them as markers and
only :mod:`dscompile.passes.bucket` turns them into collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.blocks import blocks
from dscompile.comm import REDUCE_GRAD, UNSHARD, comm_role
from dscompile.graph import GraphKind, Phase, StepGraph, info
from dscompile.shard_layout import REPLICATED, ShardLayout, Tile


@dataclass(frozen=True, slots=True)
class Marker:
    """One marker node with its arguments read: ``operand`` is the shard of an ``unshard``, the gradient of a reduce.

    ``dtype`` is what it is cast to before it travels, ``out`` what the result is cast to; None: as it is.
    """

    node: fx.Node
    operand: fx.Node
    layout: ShardLayout
    group: str
    dtype: torch.dtype | None = None
    out: torch.dtype | None = None

    @property
    def fqn(self) -> str:
        """The parameter's name, for decisions and messages."""
        return self.operand.meta.get("fqn_of_param") or info(self.operand).fqn or self.operand.name

    @property
    def elements(self) -> int:
        """Elements of the full tensor."""
        return int(self.node.meta["val"].numel()) if self.node.target is UNSHARD else _numel(self.operand)


def _numel(node: fx.Node) -> int:
    return int(node.meta["val"].numel())


def unshards(graph: StepGraph) -> list[Marker]:
    """Every ``unshard`` marker, in program order."""
    return [_unshard(node) for node in graph.graph.find_nodes(op="call_function", target=UNSHARD, sort=True)]


def reduces(graph: StepGraph) -> list[Marker]:
    """Every ``reduce_grad`` marker, in program order."""
    return [_reduce(node) for node in graph.graph.find_nodes(op="call_function", target=REDUCE_GRAD, sort=True)]


def _unshard(node: fx.Node) -> Marker:
    shard, _, _, dim, _, world, group, *rest = node.args
    dtype, _, tile = (*rest, None, None, None)[:3]
    return _marker(node, shard, node, dim, world, group, dtype, None, tile)


def _reduce(node: fx.Node) -> Marker:
    grad, dim, _, world, group, *rest = node.args
    return _marker(node, grad, grad, dim, world, group, *rest)


def _marker(
    node: fx.Node,
    operand: Any,
    full: Any,
    dim: Any,
    world: Any,
    group: Any,
    dtype: Any = None,
    out: Any = None,
    tile: Any = None,
) -> Marker:
    assert isinstance(operand, fx.Node)
    shape = tuple(int(s) for s in full.meta["val"].shape)
    second = None if tile is None else Tile(tile[0], tile[2])
    return Marker(node, operand, ShardLayout(shape, dim, world, second), group, dtype, out)


def typed(dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """The last argument of a buffer operator: left out where nothing is cast."""
    return () if dtype is None else (dtype,)


def is_local(marker: Marker) -> bool:
    """Whether the marker moves nothing: a group of one, or the forward of a replicated parameter."""
    if marker.layout.world == 1:
        return True
    return marker.node.target is UNSHARD and marker.layout.dim == REPLICATED


class Sections:
    """The blocks of one phase of a graph: where communication may stand without cutting a region in two."""

    def __init__(self, graph: StepGraph, phase: Phase) -> None:
        backward = graph.kind is GraphKind.BACKWARD
        self.compute = [
            n
            for n in graph.nodes
            if n.op == "call_function"
            and comm_role(n) is None
            and (backward or graph.kind is not GraphKind.JOINT or info(n).phase is phase)
        ]
        self.spans: Sequence[tuple[int, int]] = blocks(self.compute)
        self._number = {self.compute[i]: k for k, (start, stop) in enumerate(self.spans) for i in range(start, stop)}

    def of(self, node: fx.Node) -> int | None:
        """The number of the block a compute node is in."""
        return self._number.get(node)

    def first_use(self, node: fx.Node) -> int | None:
        """The number of the first block that reads ``node``."""
        found = [k for user in node.users if (k := self._number.get(user)) is not None]
        return min(found, default=None)

    def start(self, number: int) -> fx.Node:
        """The first node of a block."""
        return self.compute[self.spans[number][0]]

    def after(self, number: int, graph: StepGraph) -> fx.Node:
        """The node before which "after block ``number``" is: the next block's first node, or the output."""
        return self.start(number + 1) if number + 1 < len(self.spans) else graph.output_node


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
