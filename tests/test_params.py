"""What each graph input is to the user: names, ties, kinds; and the role and phase of every node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dscompile.effects import execution_order
from dscompile.graph import GraphInput, GraphKind, InputKind, Phase, Role, StepGraph, info
from dscompile.params import fqn_of
from dscompile.text import print_graph
from dscompile.text_parse import parse_graph
from tests.build import Drops, trace

aten = torch.ops.aten


class Everything(nn.Module):
    """One of each thing that has a name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3, bias=False)))
        self.listed = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.keyed = nn.ParameterDict({"plain": torch.randn(3), "it's": torch.randn(3)})
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Linear(5, 5)
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("dropped", torch.randn(3), persistent=False)
        self.constant = torch.randn(3)
        self.pair = [torch.randn(3), torch.randn(3)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) * self.listed[0] + self.listed[1] * self.keyed["plain"] + self.keyed["it's"]
        return x * self.frozen + self.kept * self.dropped + self.constant + self.pair[0] * self.pair[1]


def named(graph: StepGraph) -> dict[str, GraphInput]:
    """The inputs by FQN; every name once."""
    found = [i for i in graph.inputs if i.fqn]
    assert len({i.fqn for i in found}) == len(found), [i.fqn for i in found]
    return {i.fqn: i for i in found}


def test_parameters_and_buffers_have_the_models_own_names() -> None:
    model = Everything()
    graph = trace(model, torch.randn(2, 3))
    found = named(graph)
    used = {n: p for n, p in model.named_parameters() if not n.startswith("unused")}
    parameters = {n: i for n, i in found.items() if i.kind is InputKind.PARAMETER}
    assert parameters.keys() == used.keys()
    assert {n for n, i in parameters.items() if i.trainable} == {n for n, p in used.items() if p.requires_grad}
    assert {n for n, i in found.items() if i.kind is InputKind.BUFFER} == dict(model.named_buffers()).keys()
    assert {n for n, i in found.items() if i.kind is InputKind.INPUT} == {"x", "constant", "pair.0", "pair.1"}
    shapes = {i.name: tuple(n.meta["val"].shape) for i, n in zip(graph.inputs, graph.placeholders(), strict=True)}
    assert all(shapes[parameters[n].name] == tuple(p.shape) for n, p in used.items())


def test_gradients_are_of_the_trainable_parameters() -> None:
    model = Everything()
    graph = trace(model, torch.randn(2, 3))
    gradients = {o.of: v for o, v in zip(graph.outputs, graph.output_values(), strict=True) if o.kind == "gradient"}
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("unused")}
    assert gradients.keys() == wanted.keys()
    assert {n: v.meta["val"].shape for n, v in gradients.items()} == {n: p.shape for n, p in wanted.items()}


def test_odd_names_print_and_parse_back() -> None:
    graph = trace(Everything(), torch.randn(2, 3))
    assert parse_graph(print_graph(graph)).inputs == graph.inputs


class TwiceTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.c.weight = self.a.weight
        self.register_buffer("one", torch.randn(3))
        self.register_buffer("other", self.one)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))) * self.one + self.other


def test_tied_tensors_are_one_input_with_all_their_names() -> None:
    found = named(trace(TwiceTied(), torch.randn(2, 3)))
    assert {found["a.weight"].fqn, *found["a.weight"].aliases} == {"a.weight", "b.weight", "c.weight"}
    assert {found["one"].fqn, *found["one"].aliases} == {"one", "other"}
    assert found["a.bias"].aliases == ()


def a_global_model(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).sum()


def test_a_closure_over_one_model_gives_the_models_names() -> None:
    assert named(trace(a_global_model(nn.Sequential(nn.Linear(3, 3))), torch.randn(2, 3))).keys() == {
        "0.weight", "0.bias", "x",
    }  # fmt: skip


def test_a_closure_over_a_parameter_and_a_model() -> None:
    model, scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    found = named(trace(lambda x: model(x) * scale, torch.randn(2, 3)))
    assert found.keys() == {"weight", "bias", "scale", "x"}
    assert found["scale"].kind is InputKind.PARAMETER


def test_two_models_in_one_function_keep_apart() -> None:
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 3)
    found = named(trace(lambda x: critic(generator(x)), torch.randn(2, 3)))
    assert found.keys() == {"generator.weight", "generator.bias", "critic.weight", "critic.bias", "x"}


def test_models_in_a_dict_keep_apart() -> None:
    models = {"student": nn.Linear(3, 3), "teacher": nn.Linear(3, 3).requires_grad_(False)}

    def step(x: Tensor, models: dict[str, nn.Module]) -> Tensor:
        return (models["student"](x) - models["teacher"](x)).square().sum()

    found = named(trace(step, torch.randn(2, 3), models))
    assert {n for n, i in found.items() if i.trainable} == {"models.student.weight", "models.student.bias"}
    assert {"models.teacher.weight", "models.teacher.bias"} <= found.keys()


class Listed(nn.Module):
    """Modules in a plain list are no submodules, but have parameters all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)]
        self.head = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0](x)))


def test_modules_that_hang_on_self_by_other_ways() -> None:
    found = named(trace(Listed(), torch.randn(2, 3)))
    assert found.keys() == {"layers.0.weight", "layers.1.weight", "head.weight", "x"}


def test_a_compiled_submodule_names_its_parameters_from_where_it_starts() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert {"0.weight", "0.bias"} <= named(trace(model, torch.randn(2, 3))).keys()
    assert {"weight", "bias"} <= named(trace(model[0], torch.randn(2, 3))).keys()


def test_a_submodule_that_was_compiled_before_keeps_its_names() -> None:
    outer = nn.Sequential()
    outer.add_module("inner", torch.compile(nn.Linear(3, 3), backend="eager"))
    assert named(trace(outer, torch.randn(2, 3))).keys() >= {"inner.weight", "inner.bias"}


@pytest.mark.parametrize(
    ("source", "fqn"),
    [
        ("L['self']._modules['a']._modules['0']._parameters['w']", "a.0.w"),
        ("G['model']._modules['a']._buffers['b']", "a.b"),
        ("L['self']._parameters[\"it's\"]", "it's"),
        ("L['x']", "x"),
        ("L['xs'][1]", "xs.1"),
        ("L['batch']['ids']", "batch.ids"),
        ("L['self'].scale", "scale"),
        ("L['fn'].__closure__[0].cell_contents._modules['a']._parameters['w']", "a.w"),
        ("L['self']._modules['a']._orig_mod._parameters['w']", "a.w"),
        ("L['self']._modules['_orig_mod']._parameters['w']", "_orig_mod.w"),  # the user's own key
        ("something_else", "something_else"),
        ("", ""),
    ],
)
def test_sources(source: str, fqn: str) -> None:
    assert fqn_of(source) == fqn


# -- roles and phases --------------------------------------------------------------------------------------------------


def nodes(graph: StepGraph, target: Any) -> list[Any]:
    return graph.graph.find_nodes(op="call_function", target=target)


def test_roles() -> None:
    graph = trace(Drops(), torch.randn(4, 8), dynamic=True)
    roles = {n: info(n).role for n in graph.nodes}
    assert {roles[n] for n in graph.placeholders()} <= {Role.INPUT, Role.SYMBOL}
    assert {roles[n] for n in nodes(graph, aten.native_dropout.default)} == {Role.RANDOM}
    assert {roles[n] for n in nodes(graph, aten.t.default)} == {Role.VIEW}
    assert {roles[n] for n in nodes(graph, aten.addmm.default)} == {Role.COMPUTE}
    assert roles[graph.output_node] is Role.OUTPUT
    sizes = [n for n in graph.nodes if isinstance(n.meta.get("val"), torch.SymInt) and n.op == "call_function"]
    assert all(roles[n] is Role.SYMBOL for n in sizes)


def test_an_effect_is_an_effect() -> None:
    def writes(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    graph = trace(writes, torch.randn(4), keep_mutations=True)
    assert [info(n).role for n in nodes(graph, aten.copy_.default)] == [Role.EFFECT]


def test_phases_follow_the_tangents() -> None:
    """Forward outputs need only forward nodes; whatever reads a tangent is backward."""
    graph = trace(Everything(), torch.randn(2, 3))
    tangents = {n for n in graph.placeholders() if n.name.startswith("tangents")}
    late = set(tangents)
    for node in graph.nodes:
        if any(operand in late for operand in node.all_input_nodes):
            late.add(node)
    assert all(info(n).phase is Phase.BACKWARD for n in late)
    needed = [v for v in graph.output_values()[: graph.forward_outputs] if v is not None]
    for node in needed:
        needed += [o for o in node.all_input_nodes if o not in needed]
    assert all(info(n).phase is Phase.FORWARD for n in needed)
    forward, backward = execution_order(graph)
    assert set(forward) & late == set()
    assert tangents <= set(backward)


def test_modules_of_nodes_backward_ones_too() -> None:
    graph = trace(Everything(), torch.randn(2, 3))
    forward, backward = execution_order(graph)
    assert "body.2.0" in {info(n).fqn for n in forward if n.op == "call_function"}
    assert "body.2.0" in {info(n).fqn for n in backward if n.op == "call_function"}


def modules(graph: StepGraph) -> set[str]:
    return {info(n).fqn for n in graph.nodes if n.op == "call_function"} - {""}


def test_modules_of_a_closure_are_named_like_its_parameters() -> None:
    first, second = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    assert modules(trace(lambda x: first(x).sum(), x)) == {"0"}
    assert modules(trace(lambda x: second(first(x)).sum(), x)) == {"first.0", "second.0"}


class OddKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"it's": nn.Linear(3, 3), "a b": nn.Linear(3, 3)})
        self.plain = [nn.Linear(3, 3)]
        self.sub_modules = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.sub_modules[0](self.plain[0](self.layers["a b"](self.layers["it's"](x))))


def test_modules_with_odd_keys() -> None:
    assert modules(trace(OddKeys(), torch.randn(2, 3))) == {
        "layers.it's", "layers.a b", "plain.0", "sub_modules.0",
    }  # fmt: skip


def test_without_gradients_it_is_an_inference_graph() -> None:
    with torch.no_grad():
        graph = trace(Everything(), torch.randn(2, 3))
    assert graph.kind is GraphKind.INFERENCE
    assert {info(n).phase for n in graph.nodes} == {Phase.FORWARD}
    assert "body.0.weight" in named(graph)
