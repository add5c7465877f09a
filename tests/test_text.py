"""The canonical text: exact round trips, error positions, shared storages, diffs, and damage that never crashes."""

from __future__ import annotations

import base64
import warnings
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from build import Drops, Hand, Norm, Tied, trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from dscompile.errors import TextError
from dscompile.graph import GraphKind, InputKind, Role, StepGraph, info
from dscompile.text import diff_text, digest, parse_graph, print_graph, side_table
from dscompile.text_symbols import Symbols, expr_of, expr_text, parse_expr
from dscompile.tools.gpt import GPT, GPTConfig
from dscompile.torch_compat import FakeTensor, storage_key

GRAPHS = Path(__file__).parent / "graphs"
aten = torch.ops.aten


def body(path: str) -> str:
    """A graph file without its comments: what the printer must give back."""
    lines = (GRAPHS / path).read_text().split("\n")
    return "\n".join(line for line in lines if not line.startswith("#"))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape)


MODELS: dict[str, Any] = {
    "gpt": lambda: trace(GPT(GPTConfig(16, 2, 32, 2, 16)), tokens(2, 12), tokens(2, 12)),
    "gpt-dynamic": lambda: trace(GPT(GPTConfig(16, 1, 32, 2, 16)), tokens(2, 12), tokens(2, 12), dynamic=True),
    "norm": lambda: trace(Norm(), torch.randn(6, 8)),
    "dropout-dynamic": lambda: trace(Drops(), torch.randn(6, 8), dynamic=True),
    "tied": lambda: trace(Tied(), tokens(3, 4)),
    "inference": lambda: trace(torch.no_grad()(nn.Linear(4, 4).forward), torch.randn(3, 4)),
}


@pytest.fixture(scope="module")
def traced() -> dict[str, StepGraph]:
    return {name: make() for name, make in MODELS.items()}


def storage_bytes(value: torch.Tensor) -> Any:
    return expr_of(value.untyped_storage().nbytes())


def leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("name", MODELS)
def test_traced_graphs_come_back_exactly(traced: dict[str, StepGraph], name: str) -> None:
    graph = traced[name]
    text = print_graph(graph)
    again = parse_graph(text)
    assert print_graph(again) == text
    assert digest(again) == digest(graph)
    assert (again.kind, again.inputs, again.outputs) == (graph.kind, graph.inputs, graph.outputs)
    assert (again.forward_outputs, again.unused) == (graph.forward_outputs, graph.unused)
    groups: dict[Any, Any] = {}
    for old, new in zip(graph.nodes, again.nodes, strict=True):
        assert (old.name, old.op, old.target) == (new.name, new.op, new.target)
        assert repr((old.args, old.kwargs)) == repr((new.args, new.kwargs))
        assert [type(a) for a in old.args] == [type(a) for a in new.args]
        assert info(old) == info(new)
        for a, b in zip(leaves(old.meta.get("val")), leaves(new.meta.get("val")), strict=True):
            assert type(a) is type(b)
            if isinstance(a, torch.Tensor):
                assert isinstance(b, FakeTensor)
                assert (a.dtype, a.device, str(a.shape)) == (b.dtype, b.device, str(b.shape))
                assert str((a.stride(), a.storage_offset())) == str((b.stride(), b.storage_offset()))
                assert groups.setdefault(storage_key(a), storage_key(b)) == storage_key(b)
                assert sympy.expand(storage_bytes(a) - storage_bytes(b)) == 0
    assert len(set(groups.values())) == len(groups)


@pytest.mark.parametrize("name", ["values.txt", "views.txt", "repeats.txt", "views.expected.txt"])
def test_graph_files_are_canonical(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a SymInt that is an argument
        assert print_graph(parse_graph((GRAPHS / name).read_text())) == body(name)


def test_values_keep_their_types() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = {n.name: n for n in parse_graph((GRAPHS / "values.txt").read_text()).nodes}
    assert [type(nodes[n].args[1]) for n in ("full_1", "full_2", "full_3")] == [bool, int, float]
    assert str(nodes["full_4"].args) == "((1,), -0.0)"
    assert nodes["full_6"].args[1] == complex(1.0, float("-inf"))
    assert nodes["full"].kwargs["dtype"] is torch.bfloat16
    assert nodes["clone"].kwargs["memory_format"] is torch.contiguous_format
    assert nodes["div"].kwargs["rounding_mode"] == 'floor "q" é'
    assert nodes["getitem"].args[1] == slice(None, 1, -1)
    assert nodes["scale"].target == "scale_value"
    assert isinstance(nodes["n"].meta["val"], torch.SymInt)
    assert nodes["n"].meta["val"].node.hint == 6
    assert (
        nodes["svd"].meta["val"][1][0].untyped_storage()._cdata == nodes["svd"].meta["val"][0].untyped_storage()._cdata
    )


def test_a_parsed_graph_can_be_edited() -> None:
    """Restored values are one fake mode's, symbols have hints: passes compute new nodes on them."""
    graph = parse_graph((GRAPHS / "repeats.txt").read_text())
    x = graph.graph.find_nodes(op="placeholder")[1]
    new = graph.insert_call(graph.output_node, aten.add.Tensor, (x, x), like=x)
    assert str(new.meta["val"].shape) == "torch.Size([s58, 8])"
    assert bool(new.meta["val"].shape[0] > 3)


def test_parsing_merges_no_symbols() -> None:
    """Two sizes with one hint stay two symbols, although building the tensor asks whether they are equal."""
    text = """dscompile graph v1 inference forward_outputs=1
symbol s0 = 6 in [2, inf] positive
symbol s1 = 6 in [2, inf] positive
in %x : f32[s0, s0]{s1, 1}@cpu | input x
%t = aten.t.default(%x) : f32[s0, s0]{1, s1}@cpu ~%x | f view
out [%t] | output
"""
    assert print_graph(parse_graph(text)) == text


def hand_graph() -> tuple[Hand, Any]:
    h = Hand()
    return h, h.input("x", 4)


def test_constants_inline_large_and_missing() -> None:
    h, x = hand_graph()
    graph = h.done([h.call(aten.sin.default, x)])
    small = torch.tensor([[1.5, float("nan")], [float("-inf"), -0.0]], dtype=torch.bfloat16)
    graph.module.register_buffer("small", small)
    graph.module.register_buffer("large", torch.randn(40))
    for name in ("small", "large"):
        with graph.graph.inserting_before(graph.output_node):
            graph.graph.get_attr(name)
    text = print_graph(graph)
    assert "= [1.5, !nan, !-inf, -0.0]" in text
    table = side_table(graph)
    again = parse_graph(text, constants=table["constants"])
    assert print_graph(again) == text
    assert torch.equal(again.module.large, graph.module.large)
    with pytest.raises(TextError, match=r"side table"):
        parse_graph(text)
    key = next(iter(table["constants"]))
    with pytest.raises(TextError, match=r"damaged"):
        parse_graph(text, constants={key: base64.b64encode(bytes(160)).decode()})


def test_higher_order_operators_print_but_do_not_parse() -> None:
    h, x = hand_graph()
    y = h.graph.call_function(torch.ops.higher_order.cond, (x, None, None, ()))
    z = h.graph.call_function(len, (y,))
    text = print_graph(h.done([z]))
    assert "= higher_order.cond(%x, None, None, ())" in text
    with pytest.raises(TextError, match=r"holds 2 value\(s\) that text cannot rebuild"):
        parse_graph(text)


def test_side_table_has_source_bytes_and_descriptors(traced: dict[str, StepGraph]) -> None:
    nodes = side_table(traced["norm"])["nodes"]
    assert nodes["primals_1"]["bytes"] == 32
    assert nodes["primals_1"]["desc"] == "PlainAOTInput(idx=0)"
    assert any("build.py" in entry.get("source", "") for entry in nodes.values())
    assert any("*s" in str(e.get("bytes")) for e in side_table(traced["dropout-dynamic"])["nodes"].values())


HEAD = """dscompile graph v1 inference forward_outputs=1
symbol s0 = 6 in [2, inf] positive
in %x : f32[8, 4]{4, 1}@cpu | parameter w trainable
"""
GOOD = "%y = aten.add.Tensor(%x, 1) : f32[8, 4]{4, 1}@cpu | f compute\nout [%y] | output\n"
FAULTS = {
    "unknown operator": (
        "%y = aten.ad.Tensor(%x, 1) : ? | f compute",
        4,
        6,
        "operator 'aten.ad'. Did you mean",
    ),
    "unknown overload": ("%y = aten.add.Tenso(%x, 1) : ? | f compute", 4, 6, "overload 'Tenso'. Did you mean 'Tensor'"),
    "undefined node": (
        "%y = aten.add.Tensor(%xx, 1) : ? | f compute",
        4,
        22,
        "above this line. Did you mean 'x'",
    ),
    "duplicate": ("%x = aten.add.Tensor(%x, 1) : ? | f compute", 4, 1, "%x is defined twice"),
    "dtype": ("%y = aten.relu.default(%x) : f33[8]{1}@cpu | f compute", 4, 30, "unknown dtype 'f33'. Did you mean"),
    "too many": ("%y = aten.relu.default(%x, 1) : ? | f compute", 4, 28, "too many arguments"),
    "missing": ("%y = aten.add.Tensor(%x) : ? | f compute", 4, 24, "missing argument 'other'"),
    "keyword": (
        "%y = aten.add.Tensor(%x, 1, alpa=2) : ? | f compute",
        4,
        29,
        "'alpa'. Did you mean 'alpha'",
    ),
    "twice": ("%y = aten.add.Tensor(%x, 1, other=2) : ? | f compute", 4, 29, "'other' is given twice"),
    "strides": ("%y = aten.relu.default(%x) : f32[8]{1, 1}@cpu | f compute", 4, 30, "1 sizes but 2 strides"),
    "negative": ("%y = aten.relu.default(%x) : f32[-8]{1}@cpu | f compute", 4, 30, "no such tensor can exist"),
    "device": ("%y = aten.relu.default(%x) : f32[8]{1}@gpu | f compute", 4, 30, "no such tensor can exist"),
    "symbol": ("%y = aten.relu.default(%x) : f32[8, s9]{1, 1}@cpu | f compute", 4, 37, "undefined symbol 's9'"),
    "alias": ("%y = aten.relu.default(%x) : f32[8]{1}@cpu ~%z | f compute", 4, 45, "%z is not defined above"),
    "storage": (
        "%y = aten.relu.default(%x) : f32[99]{1}@cpu ~%x | f compute",
        4,
        30,
        "into a storage of 128",
    ),
    "role": ("%y = aten.relu.default(%x) : ? | f comput", 4, 36, "unknown role 'comput'. Did you mean 'compute'"),
    "phase": ("%y = aten.relu.default(%x) : ? | g compute", 4, 34, "unknown phase 'g'"),
    "garbage": ("%y = aten.relu.default(%x) : ? | f compute )", 4, 44, "expected a name"),
    "bare name": ("%y = aten.relu.default(x) : ? | f compute", 4, 24, "a node is written %x"),
    "keyword name": ("%def = aten.relu.default(%x) : ? | f compute", 4, 1, "cannot name a node"),
    "nonsense": ("hello", 4, 1, "expected '%name = ...'"),
    "symbol twice": ("symbol s0 in [2, inf]", 4, 8, "defined twice"),
    "hint": ("symbol s1 = 1 in [2, inf]", 4, 13, "hint 1 lies outside"),
    "deep": (f"%y = aten.cat.default({'[' * 70}", 4, 83, "nested too deeply"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_placed_exactly(name: str) -> None:
    line, number, column, message = FAULTS[name]
    with pytest.raises(TextError) as caught:
        parse_graph(HEAD + line + "\nout [%x] | output\n", path="a.txt")
    assert message in str(caught.value)
    assert (caught.value.line, caught.value.column) == (number, column)
    assert str(caught.value).startswith(f"a.txt:{number}:{column}: ")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (HEAD + GOOD.replace("out [%y] | output\n", ""), 5, "without an 'out' line"),
        (HEAD + GOOD + "%z = aten.relu.default(%x) : ? | f compute\n", 6, "text after the 'out' line"),
        (HEAD + GOOD.replace("| output", "| output, output"), 5, "1 output values, but 2 are described"),
        ("", 2, "expected the header"),
        ("dscompile graph v2 joint forward_outputs=1\n", 1, "expected the header"),
        ("dscompile graph v1 joit forward_outputs=1\n", 1, "Did you mean 'joint'"),
        (HEAD.replace("=1", "=3") + GOOD, 1, "forward_outputs=3, but the graph has 1 outputs"),
        (HEAD.replace("parameter", "paramter") + GOOD, 3, "Did you mean 'parameter'"),
    ],
)
def test_whole_file_faults(text: str, line: int, message: str) -> None:
    with pytest.raises(TextError) as caught:
        parse_graph(text)
    assert message in str(caught.value)
    assert caught.value.line == line


def test_comments_and_kinds() -> None:
    graph = parse_graph("# a comment\n\n" + HEAD + "# another\n" + GOOD)
    assert graph.kind is GraphKind.INFERENCE
    assert graph.inputs[0].kind is InputKind.PARAMETER
    assert graph.inputs[0].trainable
    assert [info(n).role for n in graph.nodes] == [Role.INPUT, Role.COMPUTE, Role.OUTPUT]


@pytest.mark.parametrize(
    "text", ["2*s0", "-3 + s0**2", "FloorDiv(1 + s0, 2)", "Max(4, s0)", "(1 + s0)*2", "Mod(s0, 3)", "(-1)*s0", "0.5*s0"]
)
def test_expressions_come_back(text: str) -> None:
    symbols = Symbols()
    symbols.define("symbol s0 = 6 in [2, inf] positive")
    expr = parse_expr(text, symbols.known)
    canonical = expr_text(expr)
    assert expr_text(parse_expr(canonical, symbols.known)) == canonical
    assert canonical == text


def test_diff_matches_nodes_by_name() -> None:
    before = "out [%c] | output\n%a = f()\n%b = g()\n%c = h(%a)\n%d = k()\n"
    after = "out [%c] | output\n%b = g()\n%a = f()\n%c = h(%b)\n%e = k()\n"
    text = diff_text(before, after, context=0)
    assert "- %c = h(%a)\n+ %c = h(%b)" in text
    assert "- %d = k()" in text
    assert "+ %e = k()" in text
    assert text.count("\n> ") == 1
    assert text.endswith("# 1 added, 1 removed, 1 changed, 1 moved\n")
    assert diff_text(before, before) == ""
    assert diff_text(before, "# note\n" + before) == ""


SEEDS = [body("values.txt"), body("views.txt"), body("repeats.txt")]
SPICE = [
    *'%[](){}!@~&+:|,. \n"\\-09',
    "1e999",
    "٣",
    "s0",
    "%x",
    "None",
    "(= ",
    " ; ",
    "FloorDiv(",
    "**",
    "\r",
    "\u2028",
]


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A valid text with up to four characters or lines deleted, inserted, replaced or swapped."""
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(text) - 1)))
        match draw(st.sampled_from(["delete", "insert", "replace", "drop line", "swap lines"])):
            case "delete":
                text = text[:at] + text[at + draw(st.integers(1, 3)) :]
            case "insert":
                text = text[:at] + draw(st.sampled_from(SPICE)) + text[at:]
            case "replace":
                text = text[:at] + draw(st.sampled_from(SPICE)) + text[at + 1 :]
            case kind:
                lines = text.split("\n")
                i, j = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
                if kind == "drop line":
                    del lines[i]
                else:
                    lines[i], lines[j] = lines[j], lines[i]
                text = "\n".join(lines)
    return text


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(damaged())
def test_damage_is_an_error_or_another_graph(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = parse_graph(text)
        except TextError as error:
            position = (error.line, error.column)
        else:
            position = None
            printed = print_graph(graph)
            assert print_graph(parse_graph(printed)) == printed
    assert position is None or (1 <= position[0] <= text.count("\n") + 2 and position[1] >= 1)
