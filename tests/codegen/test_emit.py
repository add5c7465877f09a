"""The printed program is what runs: constants round-trip, values are freed at their last use, figures are right."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dscompile.codegen.emit import call_text, emit_aten, emit_program, label
from dscompile.codegen.lower import lower_regions
from dscompile.codegen.regions import cut, region_module
from dscompile.config import Config
from dscompile.errors import UnsupportedError, VerifyError
from dscompile.graph import GraphKind, StepGraph
from dscompile.program import Program, RegionCode, Step, check_lifetimes
from dscompile.runtime.execute import bind, define
from dscompile.split import split
from dscompile.tools.gpt import GPT, GPTConfig
from tests.build import Drops, Hand, Norm, execute, random_inputs, trace

aten = torch.ops.aten


def program_of(graph: StepGraph, *, regions: str = "aten") -> Program:
    pieces = cut(graph, Config(regions=regions))
    return emit_program(graph, pieces, lower_regions(pieces, Config(regions="aten")))


def printed(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a printed call really passes: its text executed with a function that returns its arguments."""
    text = call_text(fx.Graph().call_function(operator.add, args, kwargs))
    assert text.startswith("operator.add(")
    scope = {"torch": torch, "f": lambda *a, **k: (a, k)}
    result: tuple[tuple[Any, ...], dict[str, Any]] = eval(text.replace("operator.add", "f", 1), scope)
    return result


CONSTANTS: list[Any] = [
    0, -3, 2**70, True, False, None, 0.0, -0.0, 1e-45, 1.7976931348623157e308, 0.1, math.inf, -math.inf, math.nan,
    "mean", "it's", 1j, complex(0.0, -0.0), complex(math.nan, -math.inf), torch.float32, torch.bfloat16, torch.bool,
    torch.float8_e4m3fn, torch.strided, torch.sparse_coo, torch.channels_last, torch.preserve_format,
    torch.device("cpu"), torch.device("cuda", 1), torch.device("meta"), slice(None, 3), slice(0, None, 2), ..., [], (),
    (1,), [1, (2.5, None), [math.nan]], torch.Size([2, 3]),
]  # fmt: skip


@pytest.mark.parametrize("value", CONSTANTS, ids=repr)
def test_constants_round_trip_with_their_type(value: Any) -> None:
    (found,), _ = printed(value)
    assert type(found) is (tuple if isinstance(value, tuple) else type(value))
    assert repr(found) == repr(tuple(value) if isinstance(value, tuple) else value)  # repr: nan is nan, -0.0 is not 0.0
    _, named = printed(key=value)
    assert repr(named["key"]) == repr(found)


def test_what_only_looks_like_a_plain_constant_is_printed_as_one() -> None:
    numpy = pytest.importorskip("numpy")
    (found,), _ = printed(numpy.float64(0.5))
    assert found == 0.5
    assert type(found) is float


def test_what_cannot_be_printed_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="object"):
        call_text(fx.Graph().call_function(operator.add, (object(),)))
    with pytest.raises(UnsupportedError, match="cannot be printed as a call"):
        call_text(fx.Graph().call_function(lambda x: x, (1,)))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (aten.add.Tensor, "torch.ops.aten.add.Tensor(1)"),
        (aten.sin.default, "torch.ops.aten.sin.default(1)"),
        (operator.getitem, "operator.getitem(1)"),
        (math.floor, "math.floor(1)"),
        (torch.sym_max, "torch.sym_max(1)"),
        (max, "max(1)"),
    ],
)
def test_operators_are_named_as_python_finds_them(target: Any, text: str) -> None:
    assert call_text(fx.Graph().call_function(target, (1,))) == text


# -- whole programs ----------------------------------------------------------------------------------------------------


def odd_constants(x: Tensor) -> tuple[Tensor, ...]:
    cut = x[1:, ::2].clamp(min=-math.inf, max=0.7).to(torch.float64)
    filled = torch.full((3,), math.nan, dtype=torch.bfloat16)
    return cut * 1e-300, filled, torch.where(x > 0, math.inf, -0.0), x.sum(dtype=torch.float64)


@pytest.mark.parametrize("regions", ["aten", "auto"])
def test_the_printed_source_executes_to_the_same_numbers(regions: str) -> None:
    for model in (Drops(), Norm(), odd_constants):
        graph = trace(model, torch.randn(4, 8))
        halves = split(graph) if graph.kind is GraphKind.JOINT else None
        for half in (halves.forward, halves.backward) if halves else (graph,):
            program = program_of(half, regions=regions)
            source = program.source()
            assert ast.unparse(ast.parse(source))
            inputs = random_inputs(half)
            expected = execute(half, inputs)
            torch.manual_seed(0)
            with torch.no_grad():
                found = bind(program)([inputs[p.name].clone() for p in half.placeholders()])
            for have, want in zip(found, expected.outputs, strict=True):
                assert (have is None) == (want is None)
                if want is not None:
                    torch.testing.assert_close(have, want, rtol=0, atol=0, equal_nan=True)


def last_reads(source: str) -> dict[str, tuple[int, int | None]]:
    """By name: the line that reads it last, and the line that deletes it, read back from the printed text."""
    (function,) = ast.parse(source).body
    reads: dict[str, int] = {}
    deletes: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            reads[node.id] = max(reads.get(node.id, 0), node.lineno)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                assert isinstance(target, ast.Name)
                assert target.id not in deletes
                deletes[target.id] = node.lineno
    assigned = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {name: (reads.get(name, 0), deletes.get(name)) for name in assigned}


@pytest.mark.parametrize("model", [Drops, Norm])
def test_every_name_is_deleted_right_after_its_last_read(model: type[nn.Module]) -> None:
    halves = split(trace(model(), torch.randn(4, 8)))
    for half in (halves.forward, halves.backward):
        program = program_of(half, regions="auto")
        sources = [program.source(), *(c.source for c in program.codes.values())]
        for source in sources:
            body = source.splitlines()
            returned = body[-1]
            for name, (read, deleted) in last_reads(source).items():
                if name == "args":
                    continue
                if read == len(body):
                    assert deleted is None, source
                    assert name in returned
                else:
                    assert deleted == max(read, 1) + 1 or (read == 0 and deleted), f"{name}\n{source}"


def test_a_dying_argument_is_deleted_before_the_region_runs() -> None:
    h = Hand()
    x, y = h.input("x", 4), h.input("y", 4)
    graph = h.done([h.call(aten.mul.Tensor, x, y), y])
    source = program_of(graph).source()
    lines = [line.strip() for line in source.splitlines()]
    assert lines[lines.index("del x") - 1] == "args = [x, y]"
    assert lines[lines.index("del x") + 1].endswith("region_0(args)")
    assert "del y" not in source


def test_unused_inputs_are_dropped_first() -> None:
    h = Hand()
    x, _ = h.input("x", 4), h.input("nobody", 4)
    lines = program_of(h.done([h.call(aten.sin.default, x)])).source().splitlines()
    assert lines[3].strip() == "del nobody"


def test_equal_regions_are_one_function() -> None:
    h = Hand()
    x = h.input("x", 8)
    for _ in range(3):
        for target in (aten.sin.default, aten.cos.default, aten.exp.default, aten.neg.default) * 2:
            x = h.call(target, x)
        x = h.call(aten.tanh.default, x)
    found = program_of(h.done([x]), regions="auto")
    assert [s.call for s in found.steps] == ["region_0", "region_1", "region_1"]  # the first may not overwrite x
    assert len(found.codes) == 2


def test_a_region_source_frees_too_and_has_no_hidden_names() -> None:
    graph = trace(Norm(), torch.randn(4, 8))
    (region,) = cut(split(graph).forward, Config(regions="whole"))
    source = emit_aten(region_module(region))
    assert source.startswith("def run(args):\n")
    names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    defined = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert names - defined <= {"torch", "operator", "math", "args"}


def test_labels_name_module_and_line() -> None:
    h = Hand()
    y = h.call(aten.sin.default, h.input("x", 4))
    assert label(y).startswith("model at ")
    assert "build.py:" in label(y)
    y.meta.pop("nn_module_stack")
    y.meta.pop("stack_trace")
    assert label(y) == ""


# -- higher-order operators --------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A branch in a branch, with constants of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return torch.cond(x.mean() > 0, lambda x: x * math.inf, lambda x: x - 1.5, (x,))

        return torch.cond(x.sum() > 0, inner, lambda x: x.cos() * 2, (self.linear(x).clamp(-1, 1),))


@pytest.mark.parametrize("options", [{"regions": "aten"}, {"sanitize": True}], ids=str)
def test_the_branches_of_a_higher_order_operator_print_as_functions(options: dict[str, Any]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Branches()
    compiled = torch.compile(model, backend="dscompile", options=options | {"summary": False, "cache": False})
    for x in (torch.rand(4, 8), -torch.rand(4, 8)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), equal_nan=True)
        gradients = [torch.autograd.grad(m(x.clone()).sum(), list(model.parameters())) for m in (compiled, model)]
        for have, want in zip(*gradients, strict=True):
            torch.testing.assert_close(have, want, equal_nan=True)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_compiled_computations_alone() -> None:
    """Products, views and inline nodes do not count; what runs with aten kernels counts as not compiled."""
    h = Hand()
    x = h.input("x", 8, 8)
    product = h.call(aten.mm.default, x, x)
    wave = h.call(aten.sin.default, product)
    pair = h.call(aten.sort.default, wave)
    values, order = h.call(operator.getitem, pair, 0), h.call(operator.getitem, pair, 1)
    graph = h.done([h.call(aten.t.default, values), order])
    expected = 8 * 8 * (4 + 4 + 8)  # sin, sorted values, and int64 positions
    for kind, inside in (("aten", 0), ("inductor", expected)):
        regions = cut(graph, Config(regions="whole"))
        codes = {r.key: RegionCode(r.key, kind, "") for r in regions}
        facts = emit_program(graph, regions, codes).facts
        assert (facts["bytes"], facts["bytes_compiled"]) == (expected, inside)


def test_a_gpts_bytes_are_all_in_regions() -> None:
    """If Inductor takes every region (``test_lower`` sees to that), at least 95 % of the bytes are compiled."""
    ids = torch.randint(0, 32, (2, 8))
    halves = split(trace(GPT(GPTConfig(32, 3, 16, 2, 8)), ids, ids))
    for half in (halves.forward, halves.backward):
        regions = cut(half, Config())
        codes = {r.key: RegionCode(r.key, "inductor", "") for r in regions if not r.inline}
        facts = emit_program(half, regions, codes).facts
        assert facts["bytes_compiled"] >= 0.95 * facts["bytes"] > 0
        assert facts["regions"] <= 4 * 3


# -- the last check ----------------------------------------------------------------------------------------------------


def program(*steps: Step, inputs: tuple[str, ...] = ("x",), outputs: tuple[str, ...] = ("y",)) -> Program:
    return Program("forward", inputs, list(steps), outputs, {}, {})


def step(writes: str, reads: str, frees: str = "") -> Step:
    return Step("", "call", tuple(reads.split()), tuple(writes.split()), tuple(frees.split()))


def test_a_right_program_passes() -> None:
    check_lifetimes(program(step("a", "x", "x"), step("y", "a", "a")))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (program(step("a", "x", "x"), step("y", "x a", "a")), "reads 'x' after it was freed"),
        (program(step("y", "a x", "x")), "reads 'a' before it is written"),
        (program(step("a", "x"), step("y", "a", "a")), "never frees 'x'"),
        (program(step("a", "x", "x"), step("y", "a", "a x")), "frees 'x', which is not alive"),
        (program(step("a", "x", "x"), step("a", "a", "")), "writes 'a' a second time"),
        (program(step("a", "x", "x a")), "returns 'y', which is not alive"),
        (program(step("y", "x", "x y")), "returns 'y', which is not alive"),
    ],
)
def test_a_wrong_lifetime_is_found(broken: Program, says: str) -> None:
    with pytest.raises(VerifyError) as caught:
        check_lifetimes(broken)
    assert says in str(caught.value)
    assert "'forward'" in str(caught.value)


def test_every_emitted_program_passes_the_last_check() -> None:
    for model in (Drops(), Norm()):
        halves = split(trace(model, torch.randn(4, 8), dynamic=True))
        for half in (halves.forward, halves.backward):
            check_lifetimes(program_of(half, regions="auto"))


def test_define_gives_the_function_its_names() -> None:
    assert define("def f(args):\n    return (k + math.pi,)\n", "f", {"k": 1})([]) == (1 + math.pi,)
