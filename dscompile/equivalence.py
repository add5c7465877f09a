"""The per-pass proof: after a pass, every output still means what it meant in the traced graph.

Terms (:mod:`dscompile.terms`) are interned in one table that belongs to the :class:`Snapshot` of the traced graph; two
graphs mean the same if their outputs are the same objects, and draws and effects are the same lists. The proof sees
values. It does not see lifetimes, strides of outputs or aliasing: those are rules of :mod:`dscompile.verify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from torch import fx

from dscompile.effects import Root
from dscompile.graph import GraphOutput, StepGraph
from dscompile.source import describe
from dscompile.term_rules import Key, Term, TermTable
from dscompile.terms import Evaluator, same


class Verdict(StrEnum):
    """``UNKNOWN``: something without a known meaning differs; ``UNCHECKED``: nobody asked."""

    PROVED = "proved"
    DIFFERENT = "different"
    UNKNOWN = "unknown"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Snapshot:
    """What a graph means: the terms of its outputs, its draws and its effects, and the table they are interned in."""

    table: TermTable
    outputs: tuple[Key, ...]
    draws: tuple[Term, ...]
    effects: tuple[Term, ...]
    kinds: tuple[GraphOutput, ...]
    forward_outputs: int


@dataclass(frozen=True, slots=True)
class StandIn:
    """A declared change of meaning: ``new`` stands where ``old`` stood, on the same operands.

    ``operands`` are what corresponds to the first operands of ``old``: positions in ``new.args``, nodes further
    up, or None for an operand that ``old`` was not given.
    """

    new: fx.Node
    old: fx.Node
    operands: tuple[int | fx.Node | None, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One output, draw or effect whose term is not the expected one; a side is None if it has none."""

    where: str
    expected: Key | None
    found: Key | None

    @property
    def verdict(self) -> Verdict:
        """Unknown if either side contains something that equals nothing."""
        sides = (self.expected, self.found)
        return Verdict.UNKNOWN if any(isinstance(s, Term) and s.unknown for s in sides) else Verdict.DIFFERENT


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of comparing a graph with a snapshot."""

    verdict: Verdict
    differences: tuple[Difference, ...] = field(default=())

    def explain(self, pass_name: str) -> str:
        """A message: the rule, the pass, the output, and the two nodes (FQN, user source line) that first differ."""
        if not self.differences:
            return f"equivalence: {pass_name}: {self.verdict.value}."
        # A value that changed says more than the effect list that changed with it.
        first = next((d for d in self.differences if d.verdict is self.verdict), self.differences[0])
        kind = "cannot be proved" if self.verdict is Verdict.UNKNOWN else "changed"
        more = f" ({len(self.differences) - 1} more differ)" if len(self.differences) > 1 else ""
        lines = [f"equivalence: pass {pass_name!r}: the meaning of {first.where} {kind}{more}."]
        lines += _first_difference(first.expected, first.found)
        return "\n  ".join(lines)


def snapshot(graph: StepGraph) -> Snapshot:
    """Take the meaning of ``graph`` (in one linear walk) to compare later graphs with."""
    table = TermTable()
    evaluator = Evaluator(table)
    outputs = tuple(evaluator.run(graph))
    return Snapshot(
        table, outputs, tuple(evaluator.draws), tuple(evaluator.effects), graph.outputs, graph.forward_outputs
    )


def prove(reference: Snapshot, graph: StepGraph) -> Proof:
    """Compare what ``graph`` means with ``reference``: all outputs, the draws and the effects, each in order."""
    evaluator = Evaluator(reference.table)
    outputs = evaluator.run(graph)
    return _compare(reference, outputs, evaluator)


def terms_of(reference: Snapshot, graph: StepGraph) -> dict[fx.Node, Key]:
    """The term of every node, in the table of ``reference``."""
    evaluator = Evaluator(reference.table)
    evaluator.run(graph)
    return evaluator.terms


def prove_apart(
    reference: Snapshot, graph: StepGraph, before: Mapping[fx.Node, Key], changes: Sequence[StandIn]
) -> Proof:
    """Prove that ``graph`` means ``reference`` apart from declared changes.

    Each new node is read as the old one, provided that its operands mean what the old one's meant. What the new
    nodes compute is not looked at: that is the change.

    Args:
        reference: what the graph meant before.
        graph: the graph after the pass.
        before: :func:`terms_of` the graph before the pass.
        changes: what the pass declared.
    """
    evaluator = Evaluator(
        reference.table,
        {c.new: (before[c.old], [c.new.args[o] if isinstance(o, int) else o for o in c.operands]) for c in changes},
    )
    outputs = evaluator.run(graph)
    return _compare(reference, outputs, evaluator)


def prove_split(reference: Snapshot, forward: StepGraph, backward: StepGraph, saved: Sequence[str]) -> Proof:
    """Prove that running ``forward`` and then ``backward`` means the joint graph of ``reference``.

    Values are wired by name: a backward placeholder receives the forward output of that name.

    Args:
        reference: snapshot of the joint graph.
        forward: returns the joint graph's forward outputs, then the saved values (tensors and symbolic sizes).
        backward: takes saved values and tangents, in any order; returns the joint graph's remaining outputs.
        saved: names of the saved values; forward must return each after its own outputs.
    """
    evaluator = Evaluator(reference.table)
    outputs = evaluator.run(forward)
    user = reference.forward_outputs
    made = {
        n.name: (n, t) for n, t in zip(forward.output_values()[user:], outputs[user:], strict=True) if n is not None
    }
    missing = [name for name in saved if name not in made]
    if missing or len(outputs) < user:
        return Proof(
            Verdict.DIFFERENT, (Difference(f"forward, which lacks {', '.join(missing) or 'outputs'}", None, None),)
        )
    values = {name: made[name][1] for name in saved}
    # An input that is passed again without being saved has seen forward's writes too.
    again = {n.name: n for n in forward.placeholders() if n.name not in values}
    roots: dict[fx.Node, Root] = {}
    for node in backward.placeholders():
        source = made[node.name][0] if node.name in values else again.get(node.name)
        if source is not None:
            roots[node] = evaluator.root(source)
            values.setdefault(node.name, evaluator.read(source))
    return _compare(reference, outputs[:user] + evaluator.run(backward, values, roots), evaluator)


def _compare(reference: Snapshot, outputs: Sequence[Key], evaluator: Evaluator) -> Proof:
    labels = [f"output {i} ({k.kind}{f' of {k.of}' if k.of else ''})" for i, k in enumerate(reference.kinds)]
    differences = _pairs(labels, "output", reference.outputs, outputs)
    differences += _pairs([], "random draw", reference.draws, evaluator.draws)
    differences += _pairs([], "effect", reference.effects, evaluator.effects)
    if not differences:
        return Proof(Verdict.PROVED)
    verdicts = {d.verdict for d in differences}
    return Proof(Verdict.DIFFERENT if Verdict.DIFFERENT in verdicts else Verdict.UNKNOWN, tuple(differences))


def _pairs(labels: Sequence[str], what: str, expected: Sequence[Key], found: Sequence[Key]) -> list[Difference]:
    result = []
    for i in range(max(len(expected), len(found))):
        left = expected[i] if i < len(expected) else None
        right = found[i] if i < len(found) else None
        if left is None or right is None or not same(left, right):
            result.append(Difference(labels[i] if i < len(labels) else f"{what} {i}", left, right))
    return result


# -- messages ----------------------------------------------------------------------------------------------------------


def _first_difference(expected: Key | None, found: Key | None) -> list[str]:
    """Walk two terms down to the first place where they differ and describe both sides."""
    above_left, above_right = expected, found
    while isinstance(expected, Term) and isinstance(found, Term):
        above_left, above_right = expected, found
        step = _differing_parts(expected.op, found.op)
        if step is None:
            break
        expected, found = step
    if isinstance(expected, Term) and isinstance(found, Term):
        return [f"expected {_node(expected)}", f"found    {_node(found)}"]
    return [
        f"expected {_text(expected)} in {_node(above_left)}",
        f"found    {_text(found)} in {_node(above_right)}",
    ]


def _differing_parts(left: tuple[object, ...], right: tuple[object, ...]) -> tuple[Key, Key] | None:
    """The one pair of operands in which two keys of one operator differ; None if they differ in more than that.

    Operands of a commutative operator are sorted, so what both sides have anywhere does not count.
    """
    if len(left) != len(right) or left[0] != right[0]:
        return None
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not b and (isinstance(a, Term) or a != b)]
    if len(pairs) > 1:
        only_left = [a for a, _ in pairs if all(a is not b for _, b in pairs)]
        only_right = [b for _, b in pairs if all(b is not a for a, _ in pairs)]
        pairs = list(zip(only_left, only_right, strict=False))
    if len(pairs) != 1:
        return None
    a, b = pairs[0]
    if isinstance(a, tuple) and isinstance(b, tuple) and any(isinstance(x, Term) for x in a):
        return _differing_parts(a, b)
    return (a, b) if isinstance(a, (Term, tuple)) and isinstance(b, (Term, tuple)) else None


def _node(term: Key | None) -> str:
    if isinstance(term, Term) and term.node is not None:
        return describe(term.node)
    return _text(term)


def _text(term: Key | None) -> str:
    if term is None:
        return "nothing"
    if isinstance(term, Term):
        return describe(term.node) if term.node is not None else " ".join(map(str, term.op))
    if len(term) == 2 and isinstance(term[0], type):
        return f"{term[1]} ({term[0].__name__})"
    return "(" + ", ".join(_text(t) if isinstance(t, (Term, tuple)) else str(t) for t in term) + ")"
