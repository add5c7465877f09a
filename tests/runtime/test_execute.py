"""Executing a program: boxed arguments, frees at the last use, donated inputs, and the user's modes around it."""

from __future__ import annotations

import gc
import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dscompile
from dscompile.codegen.emit import emit_program
from dscompile.codegen.lower import lower_regions
from dscompile.codegen.regions import cut
from dscompile.config import Config
from dscompile.graph import StepGraph
from dscompile.program import Program
from dscompile.runtime.execute import bind, define
from tests.build import Drops, Hand, Norm, execute, random_inputs, trace

aten = torch.ops.aten
ATEN = {"regions": "aten", "summary": False, "cache": False}


def program_of(graph: StepGraph, config: Config | None = None, donatable: frozenset[str] = frozenset()) -> Program:
    config = config or Config(regions="aten")
    regions = cut(graph, config, donatable=donatable)
    return emit_program(graph, regions, lower_regions(regions, config))


@pytest.mark.parametrize("model", [Drops, Norm])
def test_a_program_computes_what_its_graph_says(model: type[nn.Module]) -> None:
    with torch.no_grad():
        graph = trace(model(), torch.randn(4, 8))
    inputs = random_inputs(graph)
    expected = execute(graph, inputs)
    args = [inputs[p.name].clone() for p in graph.placeholders()]
    torch.manual_seed(0)
    with torch.no_grad():
        found = bind(program_of(graph))(args)
    assert args == []
    for have, want in zip(found, expected.outputs, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)
    assert torch.rand(()).item() == expected.next_draw


def chain() -> StepGraph:
    """X -> a -> b -> c; only c is returned, y is read late, unused never."""
    h = Hand()
    x, y, _ = h.input("x", 64), h.input("y", 64), h.input("unused", 64)
    a = h.call(aten.sin.default, x)
    b = h.call(aten.cos.default, a)
    return h.done([h.call(aten.mul.Tensor, b, y)])


def alive_at_each_call(program: Program) -> list[list[str]]:
    """Run node by node; names of the values that are still alive when each operator is *entered*."""
    watched: dict[str, weakref.ref[Tensor]] = {}
    seen: list[list[str]] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(sorted(n for n, r in watched.items() if r() is not None))
            result = func(*args, **(kwargs or {}))
            watched[f"{func._schema.name.split('::')[1]}"] = weakref.ref(result)
            return result

    args = [torch.ones(64) for _ in program.inputs]
    watched.update({n: weakref.ref(a) for n, a in zip(program.inputs, args, strict=True)})
    run = bind(program)
    gc.disable()  # what is freed is freed by reference counts, at once
    try:
        with Spy():
            result = run(args)
    finally:
        gc.enable()
    seen.append(sorted(n for n, r in watched.items() if r() is not None))
    assert len(result) == len(program.outputs)
    return seen


def test_every_value_is_freed_at_its_last_use() -> None:
    """Node by node, as inside a region that runs with PyTorch's own kernels."""
    assert alive_at_each_call(program_of(chain())) == [
        ["x", "y"],  # sin runs: unused is gone already
        ["sin", "y"],  # cos runs: x was freed after sin
        ["cos", "y"],
        ["mul"],
    ]


def test_the_caller_keeps_nothing_alive_during_a_region() -> None:
    """A region's dying inputs are referenced by its argument list alone: it can free or overwrite them."""
    h = Hand()
    x, y = h.input("x", 64), h.input("y", 64)
    graph = h.done([h.call(aten.mul.Tensor, h.call(aten.sin.default, x), y), h.call(aten.neg.default, y)])
    program = program_of(graph)
    (name,) = program.calls
    counts: list[int] = []

    def region(args: list[Any]) -> Any:
        references = [weakref.ref(a) for a in args]
        args.clear()
        counts.append(sum(r() is not None for r in references))
        return torch.zeros(64), torch.zeros(64)

    define(program.source(), program.name, {name: region})([torch.ones(64), torch.ones(64)])
    assert counts == [0]


def test_an_input_that_is_returned_is_the_very_tensor() -> None:
    program = Program("forward", ("x",), [], ("x",), {}, {})
    x = torch.ones(3)
    assert bind(program)([x])[0] is x


def test_a_donated_input_is_overwritten_and_others_are_not() -> None:
    """Inductor may write a result into a donated input's memory; never into one that is read again."""
    h = Hand()
    x, y = h.input("x", 64, 64), h.input("y", 64, 64)
    a = h.call(aten.sin.default, x)
    graph = h.done([h.call(aten.mul.Tensor, h.call(aten.cos.default, a), y)])
    config = Config(summary=False)
    kept, x_value, y_value = {}, torch.rand(64, 64), torch.rand(64, 64)
    for donatable in (frozenset[str](), frozenset({"x"})):
        program = program_of(graph, config, donatable)
        assert program.facts["donated_inputs"] == len(donatable)
        (code,) = program.codes.values()
        assert code.kind == "inductor"
        x_copy, y_copy = x_value.clone(), y_value.clone()
        (found,) = bind(program)([x_copy, y_copy])
        torch.testing.assert_close(found, x_value.sin().cos() * y_value)
        assert torch.equal(y_copy, y_value)
        kept[bool(donatable)] = found.untyped_storage().data_ptr() == x_copy.untyped_storage().data_ptr()
        assert kept[bool(donatable)] or torch.equal(x_copy, x_value)
    assert kept == {False: False, True: True}


def test_donation_can_be_switched_off() -> None:
    program = program_of(chain(), Config(regions="aten", donate=False), frozenset({"x", "y"}))
    assert program.facts["donated_inputs"] == 0


def test_a_traceback_shows_the_generated_line() -> None:
    run = define("def broken(args):\n    x, = args\n    return (x @ x,)\n", "broken", {})
    with pytest.raises(RuntimeError) as caught:
        run([torch.ones(2, 3)])
    shown = "".join(traceback.format_exception(caught.value))
    assert "<dscompile broken" in shown
    assert "return (x @ x,)" in shown


# -- modes -------------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))


@pytest.mark.parametrize("regions", ["aten", "auto"])
def test_a_program_ignores_the_autocast_around_its_call(regions: str) -> None:
    """The graph holds the casts of the trace; a second cast at run time would change the numbers."""
    model, x = mlp(), torch.randn(16, 8)
    step = dscompile.compile_step(
        model, lambda m, x: m(x).square().mean(), x, config={"regions": regions, "summary": False, "cache": False}
    )
    outside = step(x)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = step(x)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside, outside)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("regions", ["aten", "auto"])
def test_backward_inside_autocast_is_that_of_the_traced_precision(regions: str) -> None:
    torch.compiler.reset()
    model, x = mlp(), torch.randn(16, 8)
    compiled = torch.compile(model, backend="dscompile", options=ATEN | {"regions": regions})
    gradients = []
    for inside in (False, True):
        model.zero_grad()
        loss = compiled(x).square().mean()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("regions", ["aten", "auto"])
def test_each_precision_gets_its_own_program(regions: str) -> None:
    torch.compiler.reset()
    model, x = mlp(), torch.randn(16, 8)
    compiled = torch.compile(model, backend="dscompile", options=ATEN | {"regions": regions})
    for inside in (False, True, False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            found, expected = compiled(x), model(x)
        assert found.dtype is expected.dtype is (torch.bfloat16 if inside else torch.float32)
        torch.testing.assert_close(found, expected, rtol=2e-2 if inside else 1e-5, atol=1e-2 if inside else 1e-6)


@pytest.mark.parametrize("regions", ["aten", "auto"])
def test_grad_modes(regions: str) -> None:
    """Nothing inside a program records a graph of its own, and the user's mode is as it was."""
    torch.compiler.reset()
    model, x = mlp(), torch.randn(16, 8)
    compiled = torch.compile(model, backend="dscompile", options=ATEN | {"regions": regions})
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with mode():
            before = torch.is_grad_enabled()
            found = compiled(x)
            assert torch.is_grad_enabled() is before
            assert found.requires_grad is before
            assert found.is_inference() is (mode is torch.inference_mode)
            torch.testing.assert_close(found, model(x))
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None


def test_a_frozen_model_called_with_gradients_enabled_records_nothing() -> None:
    torch.compiler.reset()
    model = mlp().requires_grad_(False)
    compiled = torch.compile(model, backend="dscompile", options=ATEN)
    found = compiled(torch.randn(2, 8))
    assert not found.requires_grad
    assert found.grad_fn is None
