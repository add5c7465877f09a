"""StepGraph: one training step as an FX graph, with what every input, node and output *means*.

The graph itself is a plain :class:`torch.fx.Graph` of functional aten operators. We write one key of ``node.meta``
(:data:`INFO`), and every change goes through :meth:`StepGraph.edit`, which numbers it: the number is what ``--limit``
and a bisection count.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import fx

INFO = "dscompile"
"""The only key of ``node.meta`` that dscompile writes; its value is a :class:`NodeInfo`."""


_ORIGIN = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", INFO)
"""What an inserted node takes over from the node it is made like: where it comes from and what it is for."""


class Phase(StrEnum):
    """When a node runs. ``FORWARD`` runs before the loss is known, ``BACKWARD`` after."""

    FORWARD = "f"
    BACKWARD = "b"


class Role(StrEnum):
    """What a node is for. The last five are communication: each runs by itself, between compiled regions."""

    INPUT = "input"
    COMPUTE = "compute"
    VIEW = "view"
    RANDOM = "random"
    EFFECT = "effect"
    SYMBOL = "symbol"
    OUTPUT = "output"
    GATHER = "gather"
    REDUCE = "reduce"
    WAIT = "wait"
    PACK = "pack"
    UNPACK = "unpack"


EXPLICIT = frozenset({Role.GATHER, Role.REDUCE, Role.WAIT, Role.PACK, Role.UNPACK})
"""Roles of communication nodes."""


class InputKind(StrEnum):
    """What a graph input is to the user. A ``TOKEN`` carries no data: AOTAutograd threads it through effects."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    TANGENT = "tangent"
    SYMBOL = "symbol"
    SAVED = "saved"
    TOKEN = "token"
    OPAQUE = "opaque"


class GraphKind(StrEnum):
    """Which program a graph is."""

    JOINT = "joint"
    FORWARD = "forward"
    BACKWARD = "backward"
    INFERENCE = "inference"


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """What one node means. ``fqn`` is the module that the user's code ran in, or the parameter an input is."""

    role: Role = Role.COMPUTE
    phase: Phase = Phase.FORWARD
    fqn: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class GraphInput:
    """One placeholder: node name, kind, fully qualified name, the other names of a tied tensor, trainability."""

    name: str
    kind: InputKind
    fqn: str = ""
    aliases: tuple[str, ...] = ()
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class GraphOutput:
    """One output: ``kind`` is ``output``, ``mutation``, ``gradient``, ``saved`` or ``none``.

    ``of`` names the input that a gradient or a mutation belongs to, or the value that is saved.
    """

    kind: str
    of: str = ""


@dataclass(frozen=True, slots=True)
class Edit:
    """One numbered change: ``index`` counts from 1 over the life of the graph."""

    index: int
    pass_name: str
    kind: str
    node: str
    why: str


@dataclass
class StepGraph:
    """A joint, forward, backward or inference graph, its inputs and outputs, and the log of its edits.

    Attributes:
        graph: the FX graph; ``placeholder`` order is ``inputs`` order, flattened output order is ``outputs`` order.
        module: owner of the graph's ``get_attr`` constants.
        kind: which program this is.
        forward_outputs: how many leading outputs belong to forward (joint graphs; else all of them).
        unused: parameters and buffers of the model that the graph never reads, by FQN (step entry only).
    """

    module: fx.GraphModule
    kind: GraphKind
    inputs: tuple[GraphInput, ...]
    outputs: tuple[GraphOutput, ...]
    forward_outputs: int
    unused: tuple[str, ...] = ()
    edits: list[Edit] = field(default_factory=list)
    limit: int | None = None
    touched: set[fx.Node] = field(default_factory=set)
    current_pass: str = ""

    @property
    def graph(self) -> fx.Graph:
        """The FX graph itself."""
        return self.module.graph

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """Every node, in program order."""
        return iter(self.module.graph.nodes)

    @property
    def output_node(self) -> fx.Node:
        """The single ``output`` node."""
        return self.graph.output_node()

    def output_values(self) -> list[Any]:
        """The flattened outputs: nodes, constants or None, in order."""
        values = self.output_node.args[0]
        return list(values) if isinstance(values, (list, tuple)) else [values]

    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return self.graph.find_nodes(op="placeholder")

    def input_of(self, node: fx.Node) -> GraphInput | None:
        """What a placeholder is, or None for any other node."""
        return next((i for i in self.inputs if i.name == node.name), None) if node.op == "placeholder" else None

    # -- numbered edits -----------------------------------------------------------------------------------------------

    def edit(self, kind: str, node: fx.Node, why: str) -> bool:
        """Number one edit and say whether to make it: False once ``limit`` edits were made.

        A pass writes ``if graph.edit("cse", node, why="same as %x"): graph.replace(node, x)``.
        """
        if self.limit is not None and len(self.edits) >= self.limit:
            return False
        self.edits.append(Edit(len(self.edits) + 1, self.current_pass, kind, node.name, why))
        return True

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Redirect every use of ``node`` to ``new`` and erase ``node``."""
        for user in node.users:
            self.touched.add(user)
        node.replace_all_uses_with(new, propagate_meta=False)
        self.erase(node)
        self.refresh_views(new)

    def refresh_views(self, base: fx.Node) -> None:
        """Views that now read another base get fake values in its storage: text and plans read sharing from there."""
        from dscompile.effects import shared_operand

        stack = [base]
        while stack:
            current = stack.pop()
            for user in current.users:
                if user.op == "call_function" and shared_operand(user) is current:
                    user.meta["val"] = fake_value(user)
                    stack.append(user)

    def refresh_readers(self, base: fx.Node) -> None:
        """``base`` lies otherwise in memory than before: what reads it gets new fake values, as far as they change."""
        stack = [base]
        while stack:
            current = stack.pop()
            for user in current.users:
                if user.op == "call_function" and _layouts(value := fake_value(user)) != _layouts(user.meta["val"]):
                    user.meta["val"] = value
                    self.touched.add(user)
                    self.refresh_views(user)
                    stack.append(user)

    def erase(self, node: fx.Node) -> None:
        """Remove a node that nothing uses."""
        self.touched.discard(node)
        self.graph.erase_node(node)

    def insert_call(
        self,
        before: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        like: fx.Node,
    ) -> fx.Node:
        """Insert a call before ``before``; meaning and user source come from ``like``, ``meta["val"]`` is computed."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs or {})
        node.meta = {k: v for k, v in like.meta.items() if k in _ORIGIN}
        node.meta["val"] = fake_value(node)
        self.touched.add(node)
        return node


def info(node: fx.Node) -> NodeInfo:
    """The meaning of a node (a default one if no pass annotated it)."""
    found = node.meta.get(INFO)
    return found if isinstance(found, NodeInfo) else NodeInfo()


def annotate(node: fx.Node, **changes: Any) -> NodeInfo:
    """Change fields of a node's meaning; returns the new :class:`NodeInfo`."""
    node.meta[INFO] = new = replace(info(node), **changes)
    return new


def _layouts(value: Any) -> list[str]:
    """Shape and strides of each tensor in a node's value, as text: comparing symbolic sizes may add a guard."""
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return [f"{list(x.shape)} {x.stride()}" for x in tensors if isinstance(x, torch.Tensor)]


def fake_value(node: fx.Node) -> Any:
    """Recompute ``meta["val"]`` from the operands' fake values, without touching data.

    Raises whatever the operator's fake kernel raises for operands it does not accept.
    """
    from dscompile.torch_compat import fake_like, fake_mode_of

    mode = fake_mode_of(node.graph)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        return fake_like(mode, node.args[0].meta["val"][node.args[1]])  # a bucket has many results
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: fake_like(mode, n.meta["val"]))
    with mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]
