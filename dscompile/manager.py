"""The pass manager: a registry, pipeline strings, contracts, and one loop that verifies, times and records.

A pass edits a :class:`~dscompile.graph.StepGraph` in place and returns nothing. The manager, not the pass, finds out
what changed, checks it, and keeps every decision with its reason.
"""

from __future__ import annotations

import ast
import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import fx

from dscompile.comm import Group
from dscompile.config import Config
from dscompile.equivalence import Snapshot, StandIn, Verdict, prove, prove_apart, snapshot, terms_of
from dscompile.errors import PipelineError, VerifyError, nearest
from dscompile.graph import StepGraph
from dscompile.term_rules import Key
from dscompile.verify import Baseline, baseline, verify


class Numerics(StrEnum):
    """How far a pass may change numbers: ``BITWISE`` must be proved, the others are checked numerically."""

    BITWISE = "bitwise"
    REASSOCIATES = "reassociates"
    APPROXIMATE = "approximate"


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice a pass made, and why: ``facts`` are the numbers the reason rests on.

    A ``fallback`` is less than the user asked for: reports count it.
    """

    pass_name: str
    node: str
    choice: str
    reason: str
    facts: dict[str, Any]
    fallback: bool = False


@dataclass
class PassContext:
    """What a pass may read (configuration, process groups) and where it leaves its decisions.

    ``reference`` is what the graph meant after the last pass that may change numbers; later passes are proved equal
    to it.
    """

    config: Config
    decisions: list[Decision] = field(default_factory=list)
    current_pass: str = ""
    groups: Mapping[str, Group] = field(default_factory=dict)
    reference: Snapshot | None = None
    changes: list[StandIn] = field(default_factory=list)

    def group(self, name: str, size: int) -> Group:
        """The process group of that name; for a graph read from text, a gloo group seen from rank 0."""
        return self.groups.get(name) or Group(name, size)

    def decide(self, node: fx.Node | str, choice: str, reason: str, *, fallback: bool = False, **facts: Any) -> None:
        """Record a choice about ``node`` with its reason; a ``fallback`` is less than the user asked for."""
        name = node if isinstance(node, str) else node.name
        self.decisions.append(Decision(self.current_pass, name, choice, reason, facts, fallback))

    def replaces(self, new: fx.Node, old: fx.Node, *operands: int | fx.Node | None) -> None:
        """Declare that ``new`` means something else than ``old``, in its place, on the same operands.

        For passes that change the meaning on purpose: all else is then proved unchanged, and ``operands`` (positions
        in ``new.args``, nodes further up, or None) to be the first operands of ``old``'s call.
        """
        self.changes.append(StandIn(new, old, operands))


PassFunction = Callable[..., None]


@dataclass(frozen=True, slots=True)
class PassSpec:
    """A registered pass: its function, options (keyword-only parameters with defaults) and contract."""

    name: str
    function: PassFunction
    after: frozenset[str]
    requires: frozenset[str]
    provides: frozenset[str]
    numerics: Numerics
    optional: bool
    options: dict[str, Any]
    doc: str


@dataclass(frozen=True, slots=True)
class PassCall:
    """One element of a pipeline: a pass and the options spelt for it."""

    spec: PassSpec
    options: dict[str, Any]

    def __str__(self) -> str:
        if not self.options:
            return self.spec.name
        return f"{self.spec.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


@dataclass
class PassRecord:
    """What happened when a pass ran. Times are in seconds.

    ``apart_from`` counts the changes of meaning that the pass declared, apart from which its result was proved.
    """

    name: str
    call: str
    seconds: float
    check_seconds: float
    nodes_before: int
    nodes_after: int
    edits: int
    verdict: str
    numerics: str
    decisions: list[Decision]
    apart_from: int = 0


REGISTRY: dict[str, PassSpec] = {}
"""Every registered pass by name: the one module-level table that is filled after import."""


def graph_pass(
    name: str,
    *,
    after: Iterable[str] = (),
    requires: Iterable[str] = (),
    provides: Iterable[str] = (),
    numerics: Numerics = Numerics.BITWISE,
    optional: bool = False,
) -> Callable[[PassFunction], PassFunction]:
    """Register ``fn(graph, ctx, *, option=default, ...) -> None`` as a pass.

    Args:
        name: how pipeline strings spell it.
        after: passes that must come earlier *if they are in the pipeline at all*.
        requires: properties that an earlier pass must have provided.
        provides: properties that hold after this pass.
        numerics: the class of numeric change it may make.
        optional: it may be left out without making the program wrong.
    """

    def register(function: PassFunction) -> PassFunction:
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        if any(default is inspect.Parameter.empty for default in options.values()):
            raise TypeError(f"pass {name!r}: every option needs a default")
        REGISTRY[name] = PassSpec(
            name,
            function,
            frozenset(after),
            frozenset(requires),
            frozenset(provides),
            numerics,
            optional,
            options,
            inspect.getdoc(function) or "",
        )
        return function

    return register


_SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_pipeline(text: str) -> tuple[PassCall, ...]:
    """Parse ``"a,b(cap=64M),c(window=2)"`` (or a named pipeline of :mod:`dscompile.passes`) and enforce its contracts.

    Raises:
        PipelineError: an unknown pass or option, a wrong type, bad syntax, or an order that breaks a contract.
    """
    from dscompile import passes

    calls = tuple(_parse_call(part) for part in _split_top_level(passes.PIPELINES.get(text, text)))
    check_contracts(calls)
    return calls


def check_contracts(calls: tuple[PassCall, ...]) -> None:
    """Raise :class:`PipelineError` if a pass comes before one it must follow, or lacks a property it requires."""
    names = [call.spec.name for call in calls]
    provided: set[str] = set()
    for position, call in enumerate(calls):
        spec = call.spec
        late = sorted(spec.after & set(names[position + 1 :]))
        if late:
            raise PipelineError(f"pipeline: pass {spec.name!r} must come after {', '.join(map(repr, late))}.")
        missing = sorted(spec.requires - provided)
        if missing:
            givers = sorted(s.name for s in REGISTRY.values() if s.provides & set(missing))
            hint = f" Put one of {', '.join(givers)} before it." if givers else ""
            raise PipelineError(f"pipeline: pass {spec.name!r} requires {', '.join(map(repr, missing))}.{hint}")
        provided |= spec.provides


def run_pipeline(
    graph: StepGraph,
    calls: tuple[PassCall, ...],
    ctx: PassContext,
    *,
    reference: Snapshot | None = None,
    stop_after: str | None = None,
    on_pass: Callable[[PassRecord, StepGraph], None] | None = None,
) -> list[PassRecord]:
    """Run passes in order; after each, verify the graph and prove that it means what the traced graph meant.

    Args:
        graph: edited in place.
        calls: the pipeline, from :func:`parse_pipeline`.
        ctx: configuration, and where decisions are kept.
        reference: what the graph must mean (the graph as it is now, unless given).
        stop_after: name of the last pass to run.
        on_pass: called with the record and the graph after each pass.

    Raises:
        VerifyError: the first rule that a pass broke, naming rule, pass, nodes, FQN and user source line.
    """
    graph.limit = ctx.config.limit
    when = ctx.config.verify
    rules: Baseline | None = None
    setup = time.perf_counter()
    if when != "off":
        rules, reference = baseline(graph), reference or snapshot(graph)
    setup = time.perf_counter() - setup
    records: list[PassRecord] = []
    for position, call in enumerate(calls):
        spec = call.spec
        graph.current_pass = ctx.current_pass = spec.name
        graph.touched.clear()
        ctx.changes.clear()
        inexact = spec.numerics is not Numerics.BITWISE
        terms = terms_of(reference, graph) if inexact and rules is not None and reference is not None else {}
        before, edits, decided = len(graph.graph.nodes), len(graph.edits), len(ctx.decisions)
        start = time.perf_counter()
        spec.function(graph, ctx, **{**spec.options, **call.options})
        seconds = time.perf_counter() - start
        last = position == len(calls) - 1 or spec.name == stop_after
        verdict = Verdict.UNCHECKED
        start = time.perf_counter()
        # A pass that changes numbers sets what the later ones are proved equal to, whenever they are checked.
        due = when == "each" or last or inexact
        if rules is not None and reference is not None and due:
            verdict = check(graph, spec, rules, reference)
            if verdict is not Verdict.PROVED and inexact:
                if ctx.changes:
                    check_apart(graph, spec, reference, terms, ctx.changes)
                reference = snapshot(graph)
        record = PassRecord(
            name=spec.name,
            call=str(call),
            seconds=seconds,
            check_seconds=time.perf_counter() - start + (setup if position == 0 else 0.0),
            nodes_before=before,
            nodes_after=len(graph.graph.nodes),
            edits=len(graph.edits) - edits,
            verdict=verdict.value,
            numerics=spec.numerics.value,
            decisions=ctx.decisions[decided:],
            apart_from=len(ctx.changes) if verdict not in (Verdict.PROVED, Verdict.UNCHECKED) else 0,
        )
        records.append(record)
        if on_pass is not None:
            on_pass(record, graph)
        if spec.name == stop_after:
            break
    ctx.reference = reference
    return records


def check(graph: StepGraph, spec: PassSpec, rules: Baseline, reference: Snapshot) -> Verdict:
    """Verify one pass's result and prove its meaning; a bitwise pass that is not proved is an error."""
    broken = verify(graph, rules, pass_name=spec.name)
    if broken:
        raise VerifyError("\n".join(str(violation) for violation in broken))
    proof = prove(reference, graph)
    if proof.verdict is not Verdict.PROVED and spec.numerics is Numerics.BITWISE:
        raise VerifyError(proof.explain(spec.name))
    return proof.verdict


def check_apart(
    graph: StepGraph, spec: PassSpec, reference: Snapshot, terms: Mapping[fx.Node, Key], changes: Sequence[StandIn]
) -> None:
    """Prove that a pass changed nothing beyond what it declared; anything else is an error."""
    proof = prove_apart(reference, graph, terms, changes)
    if proof.verdict is not Verdict.PROVED:
        raise VerifyError(f"beyond the {len(changes)} changes it declared, {proof.explain(spec.name)}")


def _split_top_level(text: str) -> list[str]:
    """Split at the commas that stand in no bracket and in no quoted string."""
    parts, depth, quote, current = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0 and not quote:
            parts.append(current)
            current = ""
        else:
            current += char
    return [part.strip() for part in [*parts, current] if part.strip()]


def _parse_call(text: str) -> PassCall:
    match = re.fullmatch(r"([A-Za-z_][\w]*)\s*(?:\((.*)\))?", text, re.DOTALL)
    if match is None:
        raise PipelineError(f"pipeline: cannot read {text!r}; expected 'name' or 'name(option=value, ...)'.")
    name, arguments = match.group(1), match.group(2) or ""
    spec = REGISTRY.get(name)
    if spec is None:
        raise PipelineError(f"pipeline: no pass named {name!r}.{nearest(name, REGISTRY)}")
    options: dict[str, Any] = {}
    for part in _split_top_level(arguments):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in spec.options:
            raise PipelineError(
                f"pipeline: pass {name!r} has no option {key!r}.{nearest(key, spec.options)} "
                f"It takes: {', '.join(spec.options) or 'none'}."
            )
        options[key] = _parse_value(name, key, value, spec.options[key])
    return PassCall(spec, options)


def _parse_value(name: str, key: str, text: str, default: Any) -> Any:
    size = re.fullmatch(r"(\d+)([KMG])", text)
    try:
        value = int(size.group(1)) * _SUFFIX[size.group(2)] if size else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if default is not None and type(value) is not type(default):
        raise PipelineError(f"pipeline: option {key!r} of pass {name!r} takes {type(default).__name__}, got {text!r}.")
    return value
