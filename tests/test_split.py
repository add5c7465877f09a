"""The split: what is saved and why, what each half computes, and what must not be done twice or late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from dscompile.effects import is_random, shared_operand
from dscompile.equivalence import Verdict, prove_split, snapshot
from dscompile.graph import GraphKind, InputKind, Phase, Role, StepGraph, annotate, info
from dscompile.split import Split, saved_for_backward, split
from tests.build import Drops, Hand, Noise, Norm, Tied, execute, random_inputs, trace

aten = torch.ops.aten
ATEN = {"regions": "aten", "summary": False, "cache": False}


def saved_nodes(graph: StepGraph, halves: Split) -> list[fx.Node]:
    by_name = {n.name: n for n in graph.nodes}
    return [by_name[name] for name in halves.saved]


def calls(graph: StepGraph, target: Any) -> list[fx.Node]:
    return graph.graph.find_nodes(op="call_function", target=target)


class Wide(nn.Module):
    """Backward needs two transposes, a slice and a part of a list of views, all of them of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x @ self.weight)
        a, b = y.split(4, dim=1)
        return (a.t() @ b).sin().sum() + (y[1:] * y[:-1]).sum()


def test_a_view_is_never_saved_its_base_is_once() -> None:
    graph = trace(Wide(), torch.randn(4, 8))
    halves = split(graph)
    saved = saved_nodes(graph, halves)
    assert halves.chosen_by == "save all"
    assert [n for n in saved if shared_operand(n) is not None] == []
    assert sum(n.target is aten.sigmoid.default for n in saved) == 1
    assert any(info(n).role is Role.VIEW for n in halves.backward.nodes)  # taken again there


def test_everything_saved_is_read_and_everything_read_is_saved() -> None:
    for model, x in ((Drops(), torch.randn(4, 8)), (Norm(), torch.randn(4, 8)), (Wide(), torch.randn(4, 8))):
        graph = trace(model, x)
        halves = split(graph)
        assert len(set(halves.saved)) == len(halves.saved)
        assert all(p.users for p in halves.backward.placeholders() if p.name in halves.saved)
        user = graph.forward_outputs
        returned = {v.name for v in halves.forward.output_values()[user:] if isinstance(v, fx.Node)}
        assert set(halves.saved) <= returned
        assert [o.kind for o in halves.forward.outputs[user:]] == ["saved"] * (len(halves.forward.outputs) - user)


def test_no_forward_value_is_computed_again_unless_it_is_a_view() -> None:
    for model in (Drops(), Norm(), Wide()):
        graph = trace(model, torch.randn(4, 8))
        phases = {n.name: info(n).phase for n in graph.nodes}
        halves = split(graph)
        again = [n for n in halves.backward.nodes if n.op == "call_function" and phases.get(n.name) is Phase.FORWARD]
        assert all(shared_operand(n) is not None for n in again), again


def test_the_joint_graph_is_left_as_it_was() -> None:
    graph = trace(Norm(), torch.randn(4, 8))
    before = [(n.name, str(n.args), info(n)) for n in graph.nodes]
    split(graph)
    assert [(n.name, str(n.args), info(n)) for n in graph.nodes] == before


def test_inputs_and_outputs_keep_their_meaning() -> None:
    graph = trace(Tied(), torch.randint(0, 16, (2, 3)))
    halves = split(graph)
    assert (halves.forward.kind, halves.backward.kind) == (GraphKind.FORWARD, GraphKind.BACKWARD)
    assert halves.forward.inputs == tuple(i for i in graph.inputs if i.kind is not InputKind.TANGENT)
    known = {i.name: i for i in graph.inputs}
    for source in halves.backward.inputs:
        assert source == known[source.name] if source.name in known else source.kind is InputKind.SAVED
    assert halves.forward.outputs[: graph.forward_outputs] == graph.outputs[: graph.forward_outputs]
    assert halves.backward.outputs == graph.outputs[graph.forward_outputs :]
    assert {info(n).phase for n in halves.backward.nodes} == {Phase.BACKWARD}


def test_symbolic_sizes_are_saved_apart_from_tensors() -> None:
    graph = trace(Wide(), torch.randn(5, 8), dynamic=True)
    values, symbols = saved_for_backward(graph)
    assert symbols
    assert all(isinstance(n.meta["val"], torch.SymInt) for n in symbols)
    assert all(isinstance(n.meta["val"], Tensor) for n in values)
    position = {n: i for i, n in enumerate(graph.nodes)}
    assert values == sorted(values, key=position.__getitem__)
    kinds = [isinstance(p.meta["val"], torch.SymInt) for p in split(graph).backward.placeholders()]
    assert kinds == sorted(kinds, reverse=True)  # AOTAutograd's calling convention: sizes come first


def test_static_inputs_come_last_among_nothing_else_changes() -> None:
    """Telling which inputs are parameters may reorder what is saved, never what is computed."""
    graph = trace(Drops(), torch.randn(4, 8))
    plain = split(graph)
    static = split(graph, static_inputs=[i for i, s in enumerate(graph.inputs) if s.kind is InputKind.PARAMETER])
    assert set(static.saved) == set(plain.saved)
    assert static.backward.outputs == plain.backward.outputs


# -- draws and effects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Drops, Noise])
def test_a_forward_draw_is_drawn_once(model: type[nn.Module]) -> None:
    graph = trace(model(), torch.randn(4, 8))
    halves = split(graph)
    drawn = [n.name for n in graph.nodes if is_random(n)]
    assert drawn
    assert [n.name for n in halves.forward.nodes if is_random(n)] == drawn
    assert [n.name for n in halves.backward.nodes if is_random(n)] == []


class DrawsInBackward(torch.autograd.Function):
    """Stochastic rounding of a gradient: backward has a draw of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + torch.rand_like(gradient)


def test_a_backward_draw_is_drawn_in_backward() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return DrawsInBackward.apply(x * w) + torch.rand_like(x)

    graph = trace(model, torch.randn(4), nn.Parameter(torch.randn(4)))
    halves = split(graph)
    assert [sum(map(is_random, half.nodes)) for half in (halves.forward, halves.backward)] == [1, 1]


def test_a_forward_write_is_not_repeated_in_backward() -> None:
    graph = trace(Norm(), torch.randn(4, 8), keep_mutations=True)
    halves = split(graph)
    assert len(calls(halves.forward, aten.copy_.default)) == len(calls(graph, aten.copy_.default)) > 0
    assert calls(halves.backward, aten.copy_.default) == []


# -- order in backward -------------------------------------------------------------------------------------------------


class LateUse(nn.Module):
    """Backward needs the derivative of the first layer last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(self.first(x))
        for layer in self.rest:
            x = torch.nn.functional.silu(layer(x))
        return x


def test_what_needs_no_gradient_is_computed_just_before_its_first_use() -> None:
    halves = split(trace(LateUse(), torch.randn(4, 8)))
    nodes = [n for n in halves.backward.nodes if n.op == "call_function"]
    position = {n: i for i, n in enumerate(nodes)}
    late = {p for p in halves.backward.placeholders() if p.name.startswith("tangents")}
    for node in nodes:
        if any(o in late for o in node.all_input_nodes):
            late.add(node)
    for node in nodes:
        if node in late or not node.users:
            continue
        user = min((u for u in node.users if u in position), key=position.__getitem__)
        between = nodes[position[node] + 1 : position[user]]
        assert all(n not in late for n in between), f"{node} waits for {user} during {between}"


class ConstantGradient(torch.autograd.Function):
    """A gradient that no tangent enters, read from a buffer before backward overwrites it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: Tensor) -> Tensor:
        ctx.save_for_backward(counter)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (counter,) = ctx.saved_tensors
        found = torch.sin(counter)
        counter.add_(1)
        return found, None


class WritesInBackward(torch.autograd.Function):
    """Counts in a buffer during backward, after reading it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counter: Tensor) -> Tensor:
        ctx.save_for_backward(counter)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (counter,) = ctx.saved_tensors
        scale = torch.sin(counter)  # needs no tangent
        counter.add_(1)
        return gradient * scale * torch.cos(counter), None


@pytest.mark.parametrize("function", [WritesInBackward, ConstantGradient])
def test_a_write_of_backward_stays_there_and_no_read_sinks_below_it(function: Any) -> None:
    def model(x: Tensor, w: Tensor, counter: Tensor) -> Tensor:
        return function.apply(x + w, counter)

    def run(compiled: bool) -> list[Tensor]:
        w, counter = nn.Parameter(torch.arange(4.0)), torch.ones(4)
        step = torch.compile(model, backend="dscompile", options=ATEN) if compiled else model
        for _ in range(2):
            step(torch.ones(4), w, counter).sum().backward()
        return [w.grad, counter]

    graph = trace(model, torch.randn(4), nn.Parameter(torch.randn(4)), torch.zeros(4))
    reference = snapshot(graph)
    halves = split(graph)
    proof = prove_split(reference, halves.forward, halves.backward, halves.saved)
    assert proof.verdict is Verdict.PROVED, proof.explain("split")
    assert (len(calls(halves.forward, aten.copy_.default)), len(calls(halves.backward, aten.copy_.default))) == (0, 1)
    torch.compiler.reset()
    for have, want in zip(run(compiled=True), run(compiled=False), strict=True):
        assert torch.equal(have, want)


def test_a_value_that_backward_recomputes_is_read_before_backward_overwrites_it() -> None:
    """As a recomputing pass would leave it: ``sin(p)`` is a backward node whose first user comes after the write."""
    h = Hand()
    p, x, tangent = h.input("p", 4), h.input("x", 4), h.input("tangents_1", 4, kind=InputKind.TANGENT)
    y = h.call(aten.mul.Tensor, x, 2.0)
    wave = h.call(aten.sin.default, h.call(aten.view.default, p, [4]))
    write = h.call(aten.copy_.default, p, tangent)
    graph = h.done([y, h.call(aten.mul.Tensor, tangent, wave)], forward_outputs=1)
    annotate(wave, phase=Phase.BACKWARD)
    annotate(wave.args[0], phase=Phase.BACKWARD)
    write.meta["partitioner_tag"] = "must_be_in_backward"
    reference = snapshot(graph)
    halves = split(graph)
    assert halves.saved == ("p",)
    proof = prove_split(reference, halves.forward, halves.backward, halves.saved)
    assert proof.verdict is Verdict.PROVED, proof.explain("split")


# -- handed to PyTorch's own partitioner -------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)).sin(), x, use_reentrant=False)
        return x


def test_user_checkpointing_keeps_its_rules_and_says_who_chose() -> None:
    graph = trace(Checkpointed(), torch.randn(4, 8))
    inputs = random_inputs(graph)
    expected = execute(graph, inputs)
    halves = split(graph)
    assert "checkpoint" in halves.chosen_by
    assert calls(halves.backward, aten.tanh.default)  # computed again, not saved
    forward = execute(halves.forward, {i.name: inputs[i.name] for i in halves.forward.inputs})
    user = graph.forward_outputs
    made = {n.name: v for n, v in zip(halves.forward.output_values()[user:], forward.outputs[user:], strict=True)}
    backward = execute(halves.backward, {i.name: (inputs | made)[i.name] for i in halves.backward.inputs})
    for have, want in zip(forward.outputs[:user] + backward.outputs, expected.outputs, strict=True):
        assert torch.equal(have, want) if isinstance(want, Tensor) else have is want
