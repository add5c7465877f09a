"""Hash-consed terms: the value of every node as one shared object, so that "the same meaning" is ``is``.

A term is an operator applied to terms and typed constants, interned in the table of one proof. Evaluating a graph walks
*execution* order, numbers random draws, records effects in order, and gives every storage a version: reading a tensor
after its storage was written is another term than reading it before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dscompile.effects import (
    Root,
    Storages,
    constant,
    execution_order,
    is_effect,
    is_random,
    written,
)
from dscompile.graph import StepGraph
from dscompile.term_rules import Key, Term, TermTable
from dscompile.torch_compat import HigherOrderOperator, OpOverload

_PLAIN = (
    int,
    bool,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(Ellipsis),
)


class Evaluator:
    """Computes the terms of one graph, or of a forward graph and then its backward, in a shared :class:`TermTable`.

    Attributes:
        terms: the term of every node, when it was computed.
        draws: terms of the random operators in execution order.
        effects: terms of the effects in execution order.
    """

    def __init__(self, table: TermTable, stand_ins: Mapping[fx.Node, tuple[Key, Sequence[Any]]] | None = None) -> None:
        """Terms are interned in ``table``.

        A node of ``stand_ins`` takes the given term, if the first operands of that term are what its operands mean.
        """
        self.table = table
        self._stand_ins = stand_ins or {}
        self.terms: dict[fx.Node, Key] = {}
        self.draws: list[Term] = []
        self.effects: list[Term] = []
        self._writes: dict[Root, list[tuple[Term, Key]]] = {}
        self._born: dict[fx.Node, int] = {}
        self._storages: Storages | None = None

    def run(
        self,
        graph: StepGraph,
        inputs: Mapping[str, Key] | None = None,
        roots: Mapping[fx.Node, Root] | None = None,
    ) -> list[Key]:
        """Evaluate ``graph`` and return the terms of its outputs.

        Outputs of forward are read when forward ends, the others at the end. ``inputs`` gives placeholders (by name)
        the terms they stand for, ``roots`` the storages they live in; by default an input is its own name.
        """
        bound = inputs or {}
        self._storages = Storages(graph, dict(roots or {}))
        values = graph.output_values()
        forward, backward = execution_order(graph)
        for node in forward:
            self._evaluate(node, bound)
        split = graph.forward_outputs if backward and forward else len(values) if forward else 0
        outputs = [self.key(value, graph.output_node) for value in values[:split]]
        for node in backward:
            self._evaluate(node, bound)
        return outputs + [self.key(value, graph.output_node) for value in values[split:]]

    def root(self, node: fx.Node) -> Root:
        """The storage of a node of the graph that was evaluated last."""
        assert self._storages is not None
        return self._storages.root(node)

    # -- one node ------------------------------------------------------------------------------------------------------

    def _evaluate(self, node: fx.Node, bound: Mapping[str, Key]) -> None:
        op = node.op
        if op == "call_function":
            self.terms[node] = self._call(node)
            if node in self._stand_ins:
                self._stand_in(node)
        elif op == "placeholder":
            self.terms[node] = bound[node.name] if node.name in bound else self._input(node)
        elif op == "get_attr":
            self.terms[node] = self._constant(node)
        else:
            self.terms[node] = self.table.opaque(node)
        if self._writes:
            writes = self._writes.get(self.root(node))
            if writes:
                self._born[node] = len(writes)

    def _stand_in(self, node: fx.Node) -> None:
        term, operands = self._stand_ins[node]
        found = [self.key(operand, node) for operand in operands]
        if isinstance(term, Term) and all(map(same, term.op[1 : 1 + len(found)], found)):
            self.terms[node] = term

    def _input(self, node: fx.Node) -> Key:
        value = node.meta.get("val")
        if type(value) is torch.SymInt:
            return self.table.size(value)
        return self.table.intern(("in", node.name), node)

    def _constant(self, node: fx.Node) -> Term:
        value = constant(node)
        # A subgraph can be edited in place: its text is part of what it means.
        text = str(value.graph) if isinstance(value, fx.GraphModule) else ""
        return self.table.intern(("attr", self.table.identity(value), text), node)

    def _call(self, node: fx.Node) -> Key:
        target = node.target
        op = self.table.op(target)
        if op.symbolic:
            value = node.meta.get("val")
            if type(value) is torch.SymInt and (size := self.table.backed_size(value)) is not None:
                return size  # checked against the operands by the verifier's metadata rule
        args, kwargs = node.args, node.kwargs
        operands: list[Key] = [op]
        if self._writes:
            operands += [self.key(a, node) for a in args]
        else:  # the common case, written out: this is the inner loop of every proof
            terms = self.terms
            for a in args:
                if type(a) is fx.Node and (term := terms.get(a)) is not None:
                    operands.append(term)
                else:
                    operands.append((int, a) if type(a) is int else self.key(a, node))
        if op.plain:
            if kwargs:
                operands += self._named(node)
            if op.rule is not None:
                return self.table.ruled(op.rule, tuple(operands), len(args), node)
            if op.creates:
                return self._creation(node, operands)
            return self.table.intern(tuple(operands), node)
        if not isinstance(target, (OpOverload, HigherOrderOperator)):
            return self._unknown(node)
        return self._impure_call(node, (*operands, *self._named(node)))

    def _creation(self, node: fx.Node, operands: list[Key]) -> Term:
        """A tensor made from nothing: defaults of the process (dtype, device) are part of its meaning."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            operands += [self.table.shape(value), ("dtype", value.dtype), ("device", value.device)]
        return self.table.intern(tuple(operands), node)

    def _impure_call(self, node: fx.Node, key: tuple[Any, ...]) -> Key:
        if is_random(node):
            drawn = self.table.intern((*key, ("draw", len(self.draws))), node)
            self.draws.append(drawn)
            if not is_effect(node):
                return drawn
            key = (*key, drawn)
        if not is_effect(node):
            return self.table.intern(key, node)
        effect = self.table.intern(("effect", *key), node)
        self.effects.append(effect)
        operands = written(node)
        before = [self.terms[operand] if operand in self.terms else self.table.opaque(operand) for operand in operands]
        reads = [self.read(operand) for operand in operands]
        for operand, seen in zip(operands, reads, strict=True):
            self._writes.setdefault(self.root(operand), []).append((effect, seen))
        if len(operands) == 1 and self.root(node) == self.root(operands[0]):
            # The operand's own term, brought up to date through this write: what the operator returns.
            self.terms[node] = before[0]
            self._born[node] = self._born.get(operands[0], 0)
            return self.read(node)
        return self.table.intern(("result", effect), node)

    def _unknown(self, node: fx.Node) -> Term:
        """A Python function that nothing is known about: it may draw, write or print, and equals nothing."""
        term = self.table.opaque(node)
        self.effects.append(term)
        return term

    def _named(self, node: fx.Node) -> list[Key]:
        return [(name, self.key(value, node)) for name, value in sorted(node.kwargs.items())]

    # -- operands ------------------------------------------------------------------------------------------------------

    def read(self, node: fx.Node) -> Key:
        """The value that reading ``node`` *now* gives: its term and the writes to its storage since then."""
        term = self.terms.get(node)
        if term is None:
            return self.table.opaque(node)  # read before it exists: the verifier's order rule says so
        if not self._writes:
            return term
        for effect, seen in self._writes.get(self.root(node), ())[self._born.get(node, 0) :]:
            term = self._after(term, effect, seen)
        return term

    def _after(self, term: Key, effect: Term, seen: Key) -> Key:
        """``term`` after a write: what ``copy_`` put there if it overwrote just this, else "term, then effect"."""
        if effect.op[1].target is torch.ops.aten.copy_.default and term is seen and isinstance(term, Term):
            source = effect.op[3]
            if isinstance(source, Term) and self.table.same_type(source.value, term.value):
                return source
        value = term.value if isinstance(term, Term) else None
        return self.table.intern(("after", term, effect), effect.node, value)

    def key(self, value: Any, node: fx.Node) -> Key:
        """The term or typed constant of an argument: ``1``, ``1.0`` and ``True`` differ, as do 0.0 and -0.0."""
        kind = type(value)
        if kind is fx.Node:
            return self.read(value) if self._writes else self.terms.get(value) or self.read(value)
        if kind is float or kind is complex:
            return (kind, repr(value))
        if kind in _PLAIN:
            return (kind, value)
        if isinstance(value, fx.Node):
            return self.read(value)
        if isinstance(value, (list, tuple)):
            return tuple([self.key(v, node) for v in value])
        if isinstance(value, dict):
            return ("dict", *((k, self.key(v, node)) for k, v in sorted(value.items())))
        if isinstance(value, slice):
            return ("slice", self.key(value.start, node), self.key(value.stop, node), self.key(value.step, node))
        if isinstance(value, torch.SymInt):
            return self.table.size(value)
        if isinstance(value, (OpOverload, HigherOrderOperator)):  # what a higher-order operator calls
            return ("operator", self.table.op(value))
        return self.table.opaque(node)


def same(left: Key, right: Key) -> bool:
    """Whether two keys mean the same: one object for terms, equality for typed constants."""
    return left is right or (not isinstance(left, Term) and not isinstance(right, Term) and left == right)
