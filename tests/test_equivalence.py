"""The term proof: every rule executed on random numbers, look-alikes that must differ, writes, and the split."""

from __future__ import annotations

import operator
import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from dscompile.comm_terms import COMM_RULES
from dscompile.effects import is_random
from dscompile.equivalence import Verdict, prove, prove_split, snapshot
from dscompile.graph import GraphKind, GraphOutput, InputKind, StepGraph
from dscompile.split import split
from dscompile.term_rules import RULES
from dscompile.tools.gpt import GPT, GPTConfig
from tests.build import Drops, Hand, Noise, Norm, Ran, Repeats, Tied, assert_same_run, execute, random_inputs, trace

aten = torch.ops.aten

Write = Callable[[Hand, fx.Node], fx.Node]


def c(target: object, *args: object, **kwargs: object) -> Write:
    """A side of an equation: ``target(x, *args)``."""
    return lambda h, x: h.call(target, x, *args, **kwargs)


def then(*steps: Write) -> Write:
    def write(h: Hand, x: fx.Node) -> fx.Node:
        for step in steps:
            x = step(h, x)
        return x

    return write


def same(h: Hand, x: fx.Node) -> fx.Node:
    return x


def other(h: Hand) -> fx.Node:
    """A second operand of x's type, the same node each time."""
    return next(n for n in h.graph.nodes if n.name == "y")


def swap(target: object, *args: object, **kwargs: object) -> tuple[Write, Write]:
    return (
        lambda h, x: h.call(target, x, other(h), *args, **kwargs),
        lambda h, x: h.call(target, other(h), x, *args, **kwargs),
    )


BOOL, FLOAT, INT = torch.bool, torch.float32, torch.int64
FULL = {"dtype": torch.float32, "device": torch.device("cpu")}

EQUAL: list[tuple[object, torch.dtype, Write, Write]] = [
    (aten.alias.default, FLOAT, c(aten.alias.default), same),
    (aten.detach.default, FLOAT, c(aten.detach.default), same),
    (aten.lift_fresh.default, FLOAT, c(aten.lift_fresh.default), same),
    (aten.clone.default, FLOAT, c(aten.clone.default), same),
    (aten.contiguous.default, FLOAT, c(aten.contiguous.default), same),
    (aten._to_copy.default, FLOAT, c(aten._to_copy.default, dtype=FLOAT), same),
    (aten.expand.default, FLOAT, c(aten.expand.default, [4, 6]), same),
    (aten.view.default, FLOAT, c(aten.view.default, [4, 6]), same),
    (aten.view.default, FLOAT, c(aten.view.default, [-1, 3]), c(aten.view.default, [8, 3])),
    (
        aten.view.default,
        FLOAT,
        then(c(aten.view.default, [24]), c(aten.view.default, [2, 12])),
        c(aten.view.default, [2, 12]),
    ),
    (aten._unsafe_view.default, FLOAT, c(aten._unsafe_view.default, [3, 8]), c(aten.view.default, [3, 8])),
    (aten.reshape.default, FLOAT, c(aten.reshape.default, [3, 8]), c(aten.view.default, [3, 8])),
    (aten.permute.default, FLOAT, then(c(aten.permute.default, [1, 0]), c(aten.permute.default, [1, 0])), same),
    (aten.permute.default, FLOAT, c(aten.permute.default, [0, 1]), same),
    (aten.transpose.int, FLOAT, c(aten.transpose.int, -1, 0), c(aten.permute.default, [1, 0])),
    (aten.t.default, FLOAT, c(aten.t.default), c(aten.transpose.int, 0, 1)),
    (
        aten.permute.default,
        FLOAT,
        then(c(aten.view.default, [2, 3, 4]), c(aten.permute.default, [2, 0, 1]), c(aten.permute.default, [2, 1, 0])),
        then(c(aten.view.default, [2, 3, 4]), c(aten.permute.default, [1, 0, 2])),
    ),
    (aten.add.Tensor, FLOAT, *swap(aten.add.Tensor)),
    (aten.mul.Tensor, FLOAT, *swap(aten.mul.Tensor)),
    (aten.mul.Tensor, FLOAT, c(aten.mul.Tensor, 1), same),
    (aten.mul.Tensor, FLOAT, c(aten.mul.Tensor, 1.0), same),
    (aten.div.Tensor, FLOAT, c(aten.div.Tensor, 1.0), same),
    (aten.neg.default, FLOAT, then(c(aten.neg.default), c(aten.neg.default)), same),
    (aten.bitwise_and.Tensor, INT, *swap(aten.bitwise_and.Tensor)),
    (aten.bitwise_or.Tensor, INT, *swap(aten.bitwise_or.Tensor)),
    (aten.logical_and.default, BOOL, *swap(aten.logical_and.default)),
    (aten.logical_or.default, BOOL, *swap(aten.logical_or.default)),
    (aten.eq.Tensor, INT, *swap(aten.eq.Tensor)),
    (aten.ne.Tensor, INT, *swap(aten.ne.Tensor)),
    (
        aten.zeros.default,
        FLOAT,
        lambda h, x: h.call(aten.zeros.default, [3], **FULL),
        lambda h, x: h.call(aten.full.default, [3], 0.0, **FULL),
    ),
    (
        aten.ones.default,
        FLOAT,
        lambda h, x: h.call(aten.ones.default, [3], **FULL),
        lambda h, x: h.call(aten.full.default, [3], 1, **FULL),
    ),
    (
        aten.full.default,
        FLOAT,
        lambda h, x: h.call(aten.full.default, [3], True, **FULL),
        lambda h, x: h.call(aten.full.default, [3], 1, **FULL),
    ),
]

DIFFERENT: list[tuple[str, Write, Write]] = [
    ("typed scalars", c(aten.mul.Tensor, 2), c(aten.mul.Tensor, 2.0)),
    ("a bool scalar", c(aten.add.Tensor, 1.0), c(aten.add.Tensor, True)),
    ("signs of zero", c(aten.mul.Tensor, 0.0), c(aten.mul.Tensor, -0.0)),
    ("adding zero", c(aten.add.Tensor, 0.0), same),
    ("alpha", *swap(aten.add.Tensor, alpha=2)),
    ("subtraction", *swap(aten.sub.Tensor)),
    ("a matrix product", lambda h, x: h.call(aten.mm.default, x, h.call(aten.t.default, other(h))),
     lambda h, x: h.call(aten.mm.default, other(h), h.call(aten.t.default, x))),
    ("a cast", then(c(aten._to_copy.default, dtype=torch.bfloat16), c(aten._to_copy.default, dtype=FLOAT)), same),
    ("a transposing copy", then(c(aten.t.default), c(aten.clone.default, memory_format=torch.contiguous_format)),
     c(aten.t.default)),
    ("other views", c(aten.view.default, [2, 12]), c(aten.view.default, [3, 8])),
    ("a view against a permutation", c(aten.view.default, [6, 4]), c(aten.t.default)),
    ("reassociation", lambda h, x: h.call(aten.add.Tensor, h.call(aten.add.Tensor, x, other(h)), 1.5),
     lambda h, x: h.call(aten.add.Tensor, x, h.call(aten.add.Tensor, other(h), 1.5))),
    ("another dtype", lambda h, x: h.call(aten.full.default, [2], 1, dtype=FLOAT),
     lambda h, x: h.call(aten.full.default, [2], 1, dtype=torch.float64)),
    ("another length", lambda h, x: h.call(aten.zeros.default, [2]), lambda h, x: h.call(aten.zeros.default, [3])),
    ("a large integer", lambda h, x: h.call(aten.full.default, [2], 2**24 + 1, **FULL),
     lambda h, x: h.call(aten.full.default, [2], float(2**24 + 1), **FULL)),
    ("another range", lambda h, x: h.call(aten.arange.default, 4), lambda h, x: h.call(aten.arange.default, 4.0)),
    ("the other output", lambda h, x: h.call(operator.getitem, h.call(aten.sort.default, x), 0),
     lambda h, x: h.call(operator.getitem, h.call(aten.sort.default, x), 1)),
]  # fmt: skip


def two_sides(left: Write, right: Write, dtype: torch.dtype = FLOAT) -> tuple[StepGraph, bool]:
    """A graph that returns both sides, and whether the proof holds them for one term."""
    h = Hand()
    x, _ = h.input("x", 4, 6, dtype=dtype), h.input("y", 4, 6, dtype=dtype)
    graph = h.done([left(h, x), right(h, x)])
    first, second = snapshot(graph).outputs
    return graph, first is second


@pytest.mark.parametrize(("target", "dtype", "left", "right"), EQUAL, ids=[f"{i}-{r[0]}" for i, r in enumerate(EQUAL)])
def test_rule_holds_on_random_numbers(target: object, dtype: torch.dtype, left: Write, right: Write) -> None:
    graph, proved = two_sides(left, right, dtype)
    assert proved
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, 3.4e38])
    for seed in range(5):
        inputs = random_inputs(graph, seed)
        if dtype is FLOAT:
            inputs["x"][0], inputs["y"][1] = special, special.flip(0)
        a, b = execute(graph, inputs).outputs
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        nan = a.isnan() & b.isnan()
        assert torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0))
        if dtype is FLOAT:
            assert torch.equal(a.signbit() | nan, b.signbit() | nan)


def test_every_rule_has_a_numeric_test() -> None:
    assert {target for target, *_ in EQUAL} == set(RULES) - set(
        COMM_RULES
    )  # those: tests/distributed/test_comm_terms.py


@pytest.mark.parametrize(("name", "left", "right"), DIFFERENT, ids=[d[0] for d in DIFFERENT])
def test_look_alikes_differ(name: str, left: Write, right: Write) -> None:
    assert not two_sides(left, right)[1]


def test_nan_constants_are_one_constant() -> None:
    assert two_sides(c(aten.mul.Tensor, float("nan")), c(aten.mul.Tensor, float("nan")))[1]


# -- random draws ------------------------------------------------------------------------------------------------------


def test_draws_are_numbered() -> None:
    assert not two_sides(c(aten.bernoulli.p, 0.5), c(aten.bernoulli.p, 0.5))[1]


@pytest.mark.parametrize(("p", "train", "draws"), [(0.5, True, True), (0.0, True, True), (0.5, False, False)])
def test_is_random_says_whether_dropout_draws(p: float, train: bool, draws: bool) -> None:
    h = Hand()
    node = h.call(aten.native_dropout.default, h.input("x", 4), p, train)
    graph = h.done([node])
    assert is_random(node) is draws
    inputs = random_inputs(graph)
    torch.manual_seed(0)
    untouched = torch.rand(()).item()
    assert (execute(graph, inputs).next_draw != untouched) is draws


def test_attention_without_dropout_is_not_random() -> None:
    h = Hand()
    q = h.input("q", 1, 2, 4, 8)
    attend = aten._scaled_dot_product_flash_attention_for_cpu.default
    first, second = h.call(attend, q, q, q, 0.0), h.call(attend, q, q, q)
    assert not is_random(first)
    assert not is_random(second)
    assert snapshot(h.done([h.call(aten.alias.default, h.call(operator.getitem, first, 0))])).draws == ()


# -- unknown operators -------------------------------------------------------------------------------------------------


def mystery(x: Tensor) -> Tensor:
    return x + 1


def test_an_unknown_function_is_never_proved() -> None:
    h = Hand()
    x = h.input("x", 4)
    graph = h.done([h.call(mystery, x), h.call(aten.sin.default, x)])
    before = snapshot(graph)
    proof = prove(before, graph)
    assert proof.verdict is Verdict.UNKNOWN
    assert "mystery" in proof.explain("nobody")
    graph.output_node.args = ((graph.output_values()[0], x),)
    assert prove(before, graph).verdict is Verdict.DIFFERENT


# -- writes ------------------------------------------------------------------------------------------------------------


def test_a_read_after_copy_is_the_source() -> None:
    h = Hand()
    p, x = h.input("p", 4), h.input("x", 4)
    h.call(aten.copy_.default, p, x)
    first, second = snapshot(h.done([h.call(aten.sin.default, p), h.call(aten.sin.default, x)])).outputs
    assert first is second


def test_a_view_sees_the_write_to_its_base() -> None:
    h = Hand()
    p = h.input("p", 4)
    view = h.call(aten.slice.Tensor, p, 0, 0, 2)
    early = h.call(aten.sin.default, view)
    h.call(aten.add_.Tensor, p, 1.0)
    late = h.call(aten.sin.default, view)
    graph = h.done([early, late])
    first, second = snapshot(graph).outputs
    assert first is not second
    a, b = execute(graph, random_inputs(graph)).outputs
    assert not torch.equal(a, b)


def test_a_write_that_keeps_the_value_is_still_an_effect() -> None:
    h = Hand()
    p = h.input("p", 4)
    write = h.call(aten.copy_.default, p, p)
    graph = h.done([h.call(aten.sin.default, p)])
    before = snapshot(graph)
    graph.erase(write)
    assert prove(before, graph).verdict is Verdict.DIFFERENT


def test_two_writes_are_ordered() -> None:
    def build(first: float, second: float) -> StepGraph:
        h = Hand()
        p = h.input("p", 4)
        h.call(aten.add_.Tensor, p, first)
        h.call(aten.mul_.Tensor, p, second)
        return h.done([h.call(aten.sin.default, p)])

    reference = snapshot(build(1.0, 2.0))
    assert prove(reference, build(1.0, 2.0)).verdict is Verdict.PROVED
    assert prove(reference, build(2.0, 1.0)).verdict is Verdict.DIFFERENT


# -- the split ---------------------------------------------------------------------------------------------------------

MODELS: list[Callable[[], StepGraph]] = [
    lambda: trace(Drops(), torch.randn(4, 8)),
    lambda: trace(Noise(), torch.randn(4, 8)),
    lambda: trace(Norm(), torch.randn(4, 8)),
    lambda: trace(Norm(), torch.randn(4, 8), keep_mutations=True),
    lambda: trace(Tied(), torch.randint(0, 16, (2, 3))),
    lambda: trace(Repeats(), torch.randn(4, 8), dynamic=True),
    lambda: trace(
        GPT(GPTConfig(32, 2, 16, 2, 8)), torch.randint(0, 32, (2, 8)), torch.randint(0, 32, (2, 8)), dynamic=True
    ),
]


@pytest.mark.parametrize("make", MODELS)
def test_split_is_proved_and_executes_as_the_joint_graph(make: Callable[[], StepGraph]) -> None:
    graph = make()
    reference = snapshot(graph)
    inputs = random_inputs(graph)
    joint = execute(graph, inputs)
    halves = split(graph)
    proof = prove_split(reference, halves.forward, halves.backward, halves.saved)
    assert proof.verdict is Verdict.PROVED, proof.explain("split")
    forward = execute(halves.forward, {i.name: inputs[i.name] for i in halves.forward.inputs})
    user = graph.forward_outputs
    kept = zip(halves.forward.output_values()[user:], forward.outputs[user:], strict=True)
    known = inputs | {node.name: value for node, value in kept}
    backward = execute(halves.backward, {i.name: known[i.name] for i in halves.backward.inputs}, seed=None)
    written = {name: forward.inputs.get(name, inputs[name]) for name in inputs}
    assert_same_run(joint, Ran(forward.outputs[:user] + backward.outputs, written, backward.next_draw))


@pytest.mark.parametrize("make", MODELS[:5])
def test_a_wrong_split_is_not(make: Callable[[], StepGraph]) -> None:
    """A node of backward reads the wrong value; a saved value is not returned by forward."""
    graph = make()
    reference = snapshot(graph)
    halves = split(graph)
    used = [n for n in halves.backward.graph.nodes if n.op == "call_function" and len(n.all_input_nodes) >= 2]
    node = next(n for n in used if n.target in (aten.mm.default, aten.mul.Tensor))
    node.args = (node.args[0], node.args[0])
    assert prove_split(reference, halves.forward, halves.backward, halves.saved).verdict is Verdict.DIFFERENT
    lost = [*halves.saved, "nobody"]
    proof = prove_split(reference, halves.forward, halves.backward, lost)
    assert proof.verdict is Verdict.DIFFERENT
    assert "nobody" in proof.explain("split")


def test_swapped_saved_values_are_seen() -> None:
    graph = trace(Drops(), torch.randn(4, 8))
    reference = snapshot(graph)
    halves = split(graph)
    masks = [p for p in halves.backward.placeholders() if p.meta["val"].dtype is torch.bool]
    first, second = masks
    users = [(u, first, second) for u in first.users] + [(u, second, first) for u in second.users]
    for user, old, new in users:
        user.replace_input_with(old, new)
    proof = prove_split(reference, halves.forward, halves.backward, halves.saved)
    assert proof.verdict is Verdict.DIFFERENT
    assert "native_dropout" in proof.explain("split")


def test_a_backward_that_reads_an_overwritten_input_is_seen() -> None:
    """Forward overwrites a buffer that backward then reads, instead of saving what it computed from it."""

    def halves(stale: bool) -> tuple[StepGraph, StepGraph, list[str]]:
        h = Hand()
        p, x = h.input("p", 4), h.input("x", 4)
        s = h.call(aten.sin.default, p)
        y = h.call(aten.mul.Tensor, s, x)
        h.call(aten.mul_.Tensor, p, 2.0)
        kept = p if stale else s
        forward = replace(h.done([y, kept]), kind=GraphKind.FORWARD)
        b = Hand()
        saved, tangent = b.input(kept.name, 4, kind=InputKind.SAVED), b.input("tangent", 4, kind=InputKind.TANGENT)
        factor = b.call(aten.sin.default, saved) if stale else saved
        backward = replace(b.done([b.call(aten.mul.Tensor, tangent, factor)]), kind=GraphKind.BACKWARD)
        return forward, backward, [kept.name]

    h = Hand()
    p, x, tangent = h.input("p", 4), h.input("x", 4), h.input("tangent", 4, kind=InputKind.TANGENT)
    s = h.call(aten.sin.default, p)
    y = h.call(aten.mul.Tensor, s, x)
    g = h.call(aten.mul.Tensor, tangent, s)
    h.call(aten.mul_.Tensor, p, 2.0)
    reference = snapshot(h.done([y, g], forward_outputs=1))
    assert prove_split(reference, *halves(stale=False)).verdict is Verdict.PROVED
    assert prove_split(reference, *halves(stale=True)).verdict is Verdict.DIFFERENT


# -- symbols and cost --------------------------------------------------------------------------------------------------


def test_a_size_is_its_expression() -> None:
    """``n * 2`` and ``n + n`` are one term; ``n * 3`` is another."""

    def model(x: Tensor, w: Tensor) -> Tensor:
        return (x * w).new_zeros(x.shape[0] * 2) + w.sum()

    graph = trace(model, torch.randn(5, 3), nn.Parameter(torch.ones(3)), dynamic=True)
    before = snapshot(graph)
    double = next(n for n in graph.nodes if n.target is operator.mul)
    (size,) = double.all_input_nodes
    with graph.graph.inserting_before(double):
        added, tripled = (graph.graph.call_function(f, (size, b)) for f, b in ((operator.add, size), (operator.mul, 3)))
    added.meta["val"], tripled.meta["val"] = size.meta["val"] + size.meta["val"], size.meta["val"] * 3
    double.replace_all_uses_with(added)
    assert prove(before, graph).verdict is Verdict.PROVED
    added.replace_all_uses_with(tripled)
    assert prove(before, graph).verdict is Verdict.DIFFERENT


def test_graph_kinds_are_read_from_the_reference() -> None:
    h = Hand()
    graph = h.done([h.call(aten.sin.default, h.input("x", 4))])
    graph.outputs = (GraphOutput("gradient", "layer.weight"),)
    before = snapshot(graph)
    node = graph.output_values()[0]
    node.target = aten.cos.default
    message = prove(before, graph).explain("some_pass")
    assert "gradient of layer.weight" in message
    assert "some_pass" in message
    assert "aten.sin.default" in message
    assert "aten.cos.default" in message


def test_cost_is_linear() -> None:
    """A chain of 4,000 nodes costs at most about eight times one of 1,000 (a quadratic walk: sixteen)."""

    def seconds(length: int) -> float:
        h = Hand()
        x = node = h.input("x", 4)
        rng = random.Random(0)
        for _ in range(length):
            with h.graph.inserting_after():
                new = h.graph.call_function(rng.choice([aten.sin.default, aten.add.Tensor]), (node, x))
            if new.target is aten.sin.default:
                new.args = (node,)
            new.meta["val"] = x.meta["val"]
            node = new
        graph = h.done([node])
        before = snapshot(graph)
        times = []
        for _ in range(5):
            start = time.process_time()
            assert prove(before, graph).verdict is Verdict.PROVED
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(4000) < 8 * seconds(1000) + 0.01
