"""The rules of :mod:`dscompile.verify`, one function each. A new rule is a function and an entry in :data:`RULES`.

:func:`structure` says that the graph is a graph at all, and runs first; the others compare it with the traced graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from dscompile.comm import comm_role
from dscompile.effects import is_effect, is_random, phase_of, traits
from dscompile.graph import EXPLICIT, INFO, GraphKind, InputKind, NodeInfo, Phase, Role, fake_value
from dscompile.torch_compat import HigherOrderOperator, OpOverload, without_guards
from dscompile.verify import Check, signature
from dscompile.verify_comm import in_flight, waits

Rule = Callable[[Check], None]


# -- structure ---------------------------------------------------------------------------------------------------------


def structure(check: Check) -> None:
    """Check ``order`` (operands before users, unique names, ``output`` last) and ``dead`` (no erased operand)."""
    nodes = list(check.graph.nodes)
    alive = set(nodes)
    seen: set[fx.Node] = set()
    names: dict[str, fx.Node] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand in seen:
                continue
            if operand in alive:
                check.report("order", f"%{node.name} reads %{operand.name} before it is defined.", node, operand)
            else:
                check.report("dead", f"%{node.name} reads %{operand.name}, which was erased.", node, operand)
        seen.add(node)
        if (twin := names.setdefault(node.name, node)) is not node:
            check.report("order", f"two nodes are called {node.name!r}.", twin, node)
    if not nodes or nodes[-1].op != "output":
        check.report("order", "the graph does not end with its output.", *nodes[-1:])


# -- against the traced graph ------------------------------------------------------------------------------------------


def phase(check: Check) -> None:
    """A forward node reads no backward node and no tangent; forward outputs and forward writes are forward nodes."""
    if check.graph.kind is not GraphKind.JOINT:
        return
    tangents = {i.name for i in check.graph.inputs if i.kind is InputKind.TANGENT}

    def late(node: fx.Node) -> bool:
        return node.name in tangents or phase_of(node) is Phase.BACKWARD

    for node in _changed_and_users(check):
        if node.op == "output" or late(node):
            continue
        for operand in filter(late, node.all_input_nodes):
            check.report("phase", f"forward node %{node.name} reads backward node %{operand.name}.", node, operand)
    for i, value in enumerate(check.facts.outputs[: check.graph.forward_outputs]):
        if isinstance(value, fx.Node) and late(value):
            check.report("phase", f"forward output {i} is the backward node %{value.name}.", value)


def inputs(check: Check) -> None:
    """Placeholders keep number, order, names, types and meaning."""
    if check.graph.inputs != check.base.inputs:
        pairs = zip(check.facts.placeholders, check.graph.inputs, check.base.inputs, strict=False)
        odd = [node for node, a, b in pairs if a != b]
        check.report("inputs", "the table of inputs (kinds, FQNs, ties) changed.", *odd)
    now = check.facts.placeholders
    if [n.name for n in now] != [name for name, _, _ in check.base.placeholders]:
        odd = [n for n, (name, _, _) in zip(now, check.base.placeholders, strict=False) if n.name != name]
        text = f"inputs were {_names(check)}, are {', '.join(n.name for n in now)}."
        check.report("inputs", text, *(odd or now)[:2])
        return
    for node, (name, before, meaning) in zip(now, check.base.placeholders, strict=True):
        if signature(node.meta.get("val")) != before:
            text = f"input {name} was {_spell(before)}, is {_spell(signature(node.meta.get('val')))}."
            check.report("inputs", text, node)
        found = node.meta.get(INFO)
        if meaning is not None and (not isinstance(found, NodeInfo) or found.fqn != meaning.fqn):
            check.report("info", f"input {name} was {meaning.fqn or 'unnamed'!r}; its FQN changed.", node)


def _names(check: Check) -> str:
    return ", ".join(name for name, _, _ in check.base.placeholders)


def _spell(what: Any) -> str:
    """A signature in words: ``float32[4, 8] strides [8, 1] cpu``."""
    if isinstance(what, tuple) and len(what) == 5 and isinstance(what[0], torch.dtype):
        dtype, shape, strides, device, layout = what
        form = f"strides {list(strides)}" if strides is not None else str(layout)
        return f"{str(dtype).removeprefix('torch.')}{list(shape)} {form} {device}"
    if isinstance(what, tuple) and what and isinstance(what[0], tuple):
        return "(" + ", ".join(map(_spell, what)) + ")"
    return str(what)


def outputs(check: Check) -> None:
    """Outputs keep number, kinds, dtypes, shapes and strides; None stays None."""
    node = check.graph.output_node
    before, now = check.base.facts.signatures, check.facts.signatures
    if len(before) != len(now):
        old, new = check.base.facts.outputs, check.facts.outputs
        odd = next((a for a, b in zip_longest(old, new) if a is not b and isinstance(a, fx.Node)), node)
        check.report("outputs", f"{len(before)} outputs became {len(now)}.", odd)
        return
    if check.graph.outputs != check.base.outputs or check.graph.forward_outputs != check.base.forward_outputs:
        check.report("outputs", "the table of outputs (kinds, gradients' parameters, forward count) changed.", node)
    for i, (a, b) in enumerate(zip(before, now, strict=True)):
        if type(a) is not type(b) or a != b:
            found = (check.facts.outputs[i], check.base.facts.outputs[i], node)
            at = next(n for n in found if isinstance(n, fx.Node))
            check.report("outputs", f"output {i} was {_spell(a)}, is {_spell(b)}.", at)


def output_alias(check: Check) -> None:
    """Which outputs share storage, with each other or with an input, is what the user sees: it stays as traced."""
    base, facts = check.base.facts, check.facts
    if len(base.outputs) != len(facts.outputs):
        return
    for what, before, now in (
        ("shares storage with", base.sharing, facts.sharing),
        ("is the same tensor as", base.sameness, facts.sameness),
    ):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            value = facts.outputs[i]
            if a != b and isinstance(value, fx.Node):
                check.report(
                    "output_alias",
                    f"output {i} {what} {_partner(check, i, b)}; before: {_partner(check, i, a)}.",
                    *dict.fromkeys(n for n in (value, base.outputs[i]) if isinstance(n, fx.Node)),
                )
                return


def _partner(check: Check, output: int, group: int | None) -> str:
    inputs_ = len(check.base.placeholders)
    if group is None:
        return "nothing"
    if group < inputs_:
        return f"input {check.base.placeholders[group][0]}"
    return "nothing earlier" if group - inputs_ == output else f"output {group - inputs_}"


def metadata(check: Check) -> None:
    """The fake value of every changed node and of its direct users is what the operator gives for its operands."""
    todo = _changed_and_users(check)
    known: dict[Any, Any] = {}  # repeated layers make the same calls
    with without_guards(check.graph.graph):
        for node in todo:
            if node.op == "call_function" and not _not_recomputable(node):
                _recompute(check, node, known)


def _changed_and_users(check: Check) -> list[fx.Node]:
    found = dict.fromkeys(check.changed)
    for node in check.changed:
        found.update(dict.fromkeys(node.users))
    return list(found)


def _not_recomputable(node: fx.Node) -> bool:
    """Higher-order operators need their tracing context; resizing in place would change the operand's fake value.

    A node that defines a size from data (``nonzero``, ``masked_select``) would define another one when run again.
    """
    if isinstance(node.target, HigherOrderOperator) or "unbacked_bindings" in node.meta:
        return True
    return isinstance(node.target, OpOverload) and traits(node.target).reshapes


def _recompute(check: Check, node: fx.Node, known: dict[Any, Any]) -> None:
    if any(operand.op == "get_attr" and "val" not in operand.meta for operand in node.all_input_nodes):
        return
    missing = next((n for n in node.all_input_nodes if "val" not in n.meta), None)
    if missing is not None or "val" not in node.meta:
        check.report("metadata", f"%{(missing or node).name} has no fake value.", missing or node)
        return
    # The key of a bucket's item would spell the whole bucket, for each of its items.
    key = None if node.target is operator.getitem else _call_key((node.target, node.args, node.kwargs))
    expected = known.get(key)
    if expected is None:
        try:
            expected = signature(fake_value(node))
        except Exception as error:  # whatever a fake kernel raises is the finding
            lines = str(error).strip().splitlines()
            what = lines[0] if lines else repr(error)
            check.report("metadata", f"%{node.name} does not accept its operands: {what}", node)
            return
        if key is not None:
            known[key] = expected
    found = signature(node.meta["val"])
    if expected != found:
        text = f"%{node.name} is recorded as {_spell(found)}, but computes {_spell(expected)}."
        check.report("metadata", text, node)


def _call_key(value: Any) -> Any:
    """A hashable stand-in for a call or an argument: equal keys give values with equal signatures."""
    if isinstance(value, fx.Node):
        return ("%", signature(value.meta["val"]))
    if isinstance(value, (list, tuple)):
        return (len(value), *map(_call_key, value))
    if isinstance(value, dict):
        return tuple((name, _call_key(part)) for name, part in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", *map(_call_key, (value.start, value.stop, value.step)))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return signature(value)
    return (type(value), value)


def effects(check: Check) -> None:
    """Effects keep number and order, and no read of a written storage moves across a write."""
    _same_sequence(check, "effects", "effect", check.base.facts.effects, check.facts.effects)
    for key, before in check.base.facts.reads.items():
        now = check.facts.reads.get(key, before)
        if now != before:
            reader, root = key
            maker = root if isinstance(root, fx.Node) else root[0]
            text = f"%{reader.name} read %{maker.name} after {before} writes to it, now after {now}."
            check.report("effects", text, reader, maker)


def random(check: Check) -> None:
    """Random draws keep number and order."""
    _same_sequence(check, "random", "random draw", check.base.facts.draws, check.facts.draws)


def _same_sequence(check: Check, rule: str, what: str, before: list[fx.Node], now: list[fx.Node]) -> None:
    for i in range(max(len(before), len(now))):
        a = before[i] if i < len(before) else None
        b = now[i] if i < len(now) else None
        if a is b:
            continue
        if a is None or b is None:
            gone = f"{what} {i} was {'added' if a is None else 'removed'}"
            check.report(rule, f"{gone}: {len(before)} became {len(now)}.", *(n for n in (a, b) if n is not None))
            return
        moved = a in now or b in before
        if moved or a.target is not b.target:
            check.report(rule, f"{what} {i} was %{a.name}, is %{b.name}: order or operator changed.", a, b)
            return


def info(check: Check) -> None:
    """Every node says what it is for, and says it right where the graph can tell."""
    for node in check.changed:
        found = node.meta.get(INFO)
        if not isinstance(found, NodeInfo):
            check.report("info", f"%{node.name} has no NodeInfo.", node)
            continue
        allowed = _roles(node)
        if found.role not in allowed:
            names = " or ".join(sorted(allowed))
            check.report("info", f"%{node.name} has role {found.role.value!r}, must be {names}.", node)


def _roles(node: fx.Node) -> frozenset[Role]:
    if node.op == "placeholder":
        return frozenset({Role.INPUT, Role.SYMBOL})
    if node.op == "output":
        return frozenset({Role.OUTPUT})
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return frozenset({Role.SYMBOL})
    if (communication := comm_role(node)) is not None:
        return frozenset({communication})
    if is_effect(node):
        return frozenset({Role.EFFECT})
    if is_random(node):
        return frozenset({Role.RANDOM})
    return frozenset(Role) - {Role.INPUT, Role.OUTPUT, Role.EFFECT, Role.RANDOM} - EXPLICIT


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.__name__: rule
        for rule in (phase, inputs, outputs, output_alias, effects, random, waits, in_flight, info, metadata)
    }
)
"""Every rule by name, in the order they run and report."""
