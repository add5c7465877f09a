"""Regions: where a graph is cut, what goes in and out, what may be overwritten, and which regions are equal."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from dscompile.codegen.regions import Region, cut, region_module
from dscompile.config import Config
from dscompile.graph import GraphKind, InputKind, StepGraph
from dscompile.split import split
from dscompile.tools.gpt import GPT, GPTConfig
from dscompile.torch_compat import FakeTensorMode
from tests.build import Drops, Hand, Norm, Repeats, Tied, execute, random_inputs, trace

aten = torch.ops.aten
AUTO, WHOLE = Config(), Config(regions="whole")


def gpt(layers: int, *, dynamic: bool = False) -> StepGraph:
    ids = torch.randint(0, 32, (2, 8))
    return trace(GPT(GPTConfig(32, layers, 16, 2, 8)), ids, ids, dynamic=dynamic or None)


@functools.cache
def gpt_halves(layers: int, *, dynamic: bool = False) -> dict[GraphKind, StepGraph]:
    return halves_of(gpt(layers, dynamic=dynamic))


def halves_of(graph: StepGraph) -> dict[GraphKind, StepGraph]:
    halves = split(graph)
    return {GraphKind.FORWARD: halves.forward, GraphKind.BACKWARD: halves.backward}


def compiled(regions: list[Region]) -> list[Region]:
    return [r for r in regions if not r.inline]


def donated(region: Region) -> set[str]:
    return {region.inputs[i].name for i in region.donated}


# -- the cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt_halves(3),
        lambda: gpt_halves(3, dynamic=True),
        lambda: halves_of(trace(Drops(), torch.randn(4, 8))),
        lambda: halves_of(trace(Norm(), torch.randn(4, 8))),
        lambda: halves_of(trace(Tied(), torch.randint(0, 16, (2, 3)))),
        lambda: halves_of(trace(Repeats(), torch.randn(4, 8), dynamic=True)),
    ],
    ids=["gpt", "gpt dynamic", "drops", "norm", "tied", "repeats"],
)
@pytest.mark.parametrize("config", [AUTO, WHOLE], ids=["auto", "whole"])
def test_regions_hold_every_node_once_and_compute_the_graph(
    make: Callable[[], dict[GraphKind, StepGraph]], config: Config
) -> None:
    """Run region by region, each on nothing but its declared inputs: the halves give what the graph says."""
    for half in make().values():
        regions = cut(half, config)
        nodes = [n for r in regions for n in r.nodes]
        assert nodes == [n for n in half.nodes if n.op == "call_function"]
        inputs = random_inputs(half)
        expected = execute(half, inputs)
        env: dict[fx.Node, Any] = {p: inputs[p.name] for p in half.placeholders()}
        env |= {n: getattr(half.module, str(n.target)) for n in half.nodes if n.op == "get_attr"}
        torch.manual_seed(0)
        with torch.no_grad():
            for region in regions:
                results = fx.Interpreter(region_module(region)).run(*(env[n] for n in region.inputs))
                env.update(zip(region.outputs, results, strict=True))
        for value, want in zip(half.output_values(), expected.outputs, strict=True):
            have = env[value] if isinstance(value, fx.Node) else value
            assert torch.equal(have, want) if isinstance(want, Tensor) else have == want


def test_whole_is_one_region() -> None:
    assert [len(cut(half, WHOLE)) for half in gpt_halves(3).values()] == [1, 1]


def test_an_empty_graph_has_no_regions() -> None:
    h = Hand()
    assert cut(h.done([h.input("x", 4)]), AUTO) == []


def test_nothing_but_views_and_sizes_runs_inline() -> None:
    h = Hand()
    x = h.input("x", 4, 6)
    assert [r.inline for r in cut(h.done([h.call(aten.t.default, x)]), AUTO)] == [True]
    h = Hand()
    x = h.input("x", 4, 6)
    assert [r.inline for r in cut(h.done([h.call(aten.sin.default, h.call(aten.t.default, x))]), AUTO)] == [False]


def test_outputs_are_what_someone_else_reads() -> None:
    for region in cut(gpt_halves(3)[GraphKind.FORWARD], AUTO):
        inside = set(region.nodes)
        assert region.outputs == [n for n in region.nodes if set(n.users) - inside]
        reads = {o for n in region.nodes for o in n.all_input_nodes} - inside
        assert set(region.inputs) == reads
        assert len(set(region.inputs)) == len(region.inputs)


def test_no_tuple_crosses_a_boundary() -> None:
    """The results of an operator with several outputs are taken where it runs; region inputs are plain values."""
    for half in gpt_halves(3).values():
        for region in cut(half, AUTO):
            assert not [n for n in region.inputs if isinstance(n.meta["val"], (tuple, list))]
            items = [n for n in region.nodes if n.target is operator.getitem]
            assert all(n.args[0] in region.nodes for n in items)


# -- the figures of a deep model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [GraphKind.FORWARD, GraphKind.BACKWARD])
def test_depth_adds_regions_but_no_different_ones(half: GraphKind) -> None:
    kinds, counts = {}, {}
    for layers in (6, 24):
        regions = compiled(cut(gpt_halves(layers)[half], AUTO))
        kinds[layers], counts[layers] = len({r.key for r in regions}), len(regions)
        assert counts[layers] <= 4 * layers
    assert kinds[6] == kinds[24]
    assert counts[24] - counts[6] == 18  # one region a layer


@pytest.mark.parametrize("half", [GraphKind.FORWARD, GraphKind.BACKWARD])
def test_dynamic_shapes_share_code_too(half: GraphKind) -> None:
    regions = compiled(cut(gpt_halves(3, dynamic=True)[half], AUTO))
    assert Counter(r.key for r in regions).most_common()[0][1] >= 2


# -- keys --------------------------------------------------------------------------------------------------------------


def key_of(build: Callable[[Hand], list[Any]], config: Config = WHOLE, donatable: frozenset[str] = frozenset()) -> str:
    h = Hand()
    (region,) = cut(h.done(build(h)), config, donatable=donatable)
    return region.key


def sine(h: Hand, name: str = "x", *shape: int, **kwargs: Any) -> list[Any]:
    return [h.call(aten.mul.Tensor, h.call(aten.sin.default, h.input(name, *(shape or (4, 6)), **kwargs)), 2.0)]


def test_names_do_not_matter() -> None:
    assert key_of(lambda h: sine(h, "x")) == key_of(lambda h: sine(h, "another"))


def both(h: Hand) -> list[Any]:
    (y,) = sine(h)
    return [y, y.args[0]]


def strided(h: Hand) -> list[Any]:
    x = h.input("x", 6, 4)
    with h.mode:
        x.meta["val"] = torch.empty(6, 4).t()
    return [h.call(aten.mul.Tensor, h.call(aten.sin.default, x), 2.0)]


def shifted(h: Hand) -> list[Any]:
    x = h.input("x", 4, 6)
    with h.mode:
        x.meta["val"] = torch.empty(32)[8:].view(4, 6)
    return [h.call(aten.mul.Tensor, h.call(aten.sin.default, x), 2.0)]


@pytest.mark.parametrize(
    "other",
    [
        lambda h: sine(h, "x", 6, 4),
        lambda h: sine(h, dtype=torch.float64),
        lambda h: [h.call(aten.mul.Tensor, h.call(aten.cos.default, h.input("x", 4, 6)), 2.0)],
        lambda h: [h.call(aten.mul.Tensor, h.call(aten.sin.default, h.input("x", 4, 6)), 3.0)],
        lambda h: [h.call(aten.mul.Tensor, h.call(aten.sin.default, h.input("x", 4, 6)), 2)],
        both,
        strided,
        shifted,
    ],
    ids=["shape", "dtype", "operator", "constant", "constant's type", "outputs", "strides", "offset"],
)
def test_whatever_the_code_depends_on_is_in_the_key(other: Callable[[Hand], list[Any]]) -> None:
    assert key_of(other) != key_of(sine)


def test_donation_is_in_the_key() -> None:
    assert key_of(sine, donatable=frozenset({"x"})) != key_of(sine)


def test_which_input_is_read_where_is_in_the_key() -> None:
    def difference(swap: bool) -> Callable[[Hand], list[Any]]:
        def build(h: Hand) -> list[Any]:
            x, y = h.input("x", 4), h.input("y", 4)
            s = h.call(aten.add.Tensor, x, y)
            return [h.call(aten.sub.Tensor, s, y if swap else x)]

        return build

    assert key_of(difference(False)) != key_of(difference(True))


# -- donation ----------------------------------------------------------------------------------------------------------


def one(h: Hand, outputs: list[Any], *donatable: str, config: Config = WHOLE) -> Region:
    (region,) = cut(h.done(outputs), config, donatable=frozenset(donatable))
    return region


def test_only_inputs_that_the_caller_gives_away() -> None:
    h = Hand()
    x, y = h.input("x", 4), h.input("y", 4)
    assert donated(one(h, [h.call(aten.add.Tensor, x, y)], "y")) == {"y"}


def test_not_an_input_that_is_returned() -> None:
    h = Hand()
    x = h.input("x", 4)
    assert donated(one(h, [h.call(aten.sin.default, x), x], "x")) == set()


def test_not_an_input_with_a_view_that_is_returned() -> None:
    h = Hand()
    x = h.input("x", 4, 6)
    assert donated(one(h, [h.call(aten.sin.default, x), h.call(aten.t.default, x)], "x")) == set()


def test_not_two_inputs_in_one_storage() -> None:
    h = Hand()
    x, y = h.input("x", 4), h.input("y", 4)
    with h.mode:
        y.meta["val"] = x.meta["val"].view(4)
    assert donated(one(h, [h.call(aten.add.Tensor, x, y)], "x", "y")) == set()


def test_not_a_part_of_a_storage() -> None:
    h = Hand()
    x = h.input("x", 4)
    with h.mode:
        x.meta["val"] = torch.empty(8)[:4]
    assert donated(one(h, [h.call(aten.sin.default, x)], "x")) == set()


def test_not_an_expanded_tensor() -> None:
    h = Hand()
    x = h.input("x", 4, 4)
    with h.mode:
        x.meta["val"] = torch.empty(16).as_strided((4, 4), (0, 1))
    assert donated(one(h, [h.call(aten.sin.default, x)], "x")) == set()


def test_not_a_constant_of_the_graph() -> None:
    """The region receives it as an input, so that equal regions with other constants share code."""

    def shifted(x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])

    graph = trace(shifted, torch.randn(4))
    (x,) = graph.placeholders()
    (region,) = (r for r in cut(graph, WHOLE, donatable=frozenset({x.name})) if not r.inline)
    assert {n.op for n in region.inputs} == {"placeholder", "get_attr"}
    assert donated(region) == {x.name}


def stacked(count: int = 3, *, late_view: bool = False) -> tuple[Hand, list[Any]]:
    """``count`` equal blocks of ten nodes; with ``late_view`` the end reads the first's result through a view."""
    h = Hand()
    x, w = h.input("x", 8, 8), h.input("w", 8, 8)
    first: fx.Node | None = None
    for _ in range(count):
        for target in (aten.sin.default, aten.cos.default, aten.exp.default, aten.neg.default) * 2:
            x = h.call(target, x)
        x = h.call(aten.mul.Tensor, x, w)
        x = h.call(aten.tanh.default, x)
        first = first or x
    end = [x]
    if late_view:
        end.append(h.call(aten.sum.default, h.call(aten.t.default, first)))
    return h, end


def test_what_passes_between_regions_is_donated_at_its_last_use() -> None:
    h, end = stacked()
    regions = cut(h.done(end), AUTO)
    assert [donated(r) for r in regions] == [set(), {"tanh_default"}, {"tanh_default_1"}]
    assert len({r.key for r in regions}) == 2  # the first may not overwrite the user's x


def test_a_later_read_through_a_view_keeps_the_base() -> None:
    h, end = stacked(late_view=True)
    regions = cut(h.done(end), AUTO)
    reader = next(i for i, r in enumerate(regions) if any("sum" in n.name for n in r.nodes))
    assert all("tanh_default" not in donated(r) for r in regions[:reader])


def test_donation_off() -> None:
    h, end = stacked()
    assert not any(r.donated for r in cut(h.done(end), Config(donate=False), donatable=frozenset({"x"})))


# -- symbols and modules -----------------------------------------------------------------------------------------------


def test_a_region_receives_the_sizes_that_it_mentions() -> None:
    graph = trace(Repeats(), torch.randn(5, 8), dynamic=True)
    halves = split(graph)
    for half in (halves.forward, halves.backward):
        for region in cut(half, AUTO):
            known = {str(n.meta["val"]) for n in region.inputs if isinstance(n.meta["val"], torch.SymInt)}
            mentioned = {
                str(s) for n in [*region.nodes, *region.inputs] if isinstance(v := n.meta["val"], Tensor)
                for size in v.shape if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols
            }  # fmt: skip
            assert mentioned <= known


def test_symbolic_inputs_are_not_donated() -> None:
    """A buffer of unknown size cannot be reused at compile time."""
    halves = split(trace(Drops(), torch.randn(4, 8), dynamic=True))
    names = frozenset(i.name for i in halves.backward.inputs if i.kind is InputKind.SAVED)
    for region in cut(halves.backward, AUTO, donatable=names):
        for index in region.donated:
            assert all(isinstance(s, int) for s in region.inputs[index].meta["val"].shape)


def test_a_region_module_says_what_is_donated_and_which_strides_matter() -> None:
    h = Hand()
    x, y = h.input("x", 4, 6), h.input("y", 4, 6)
    s = h.call(aten.add.Tensor, x, y)
    region = one(h, [s, h.call(aten.clone.default, h.call(aten.t.default, s))], "y")
    module = region_module(region)
    assert [p.name for p in module.graph.find_nodes(op="placeholder")] == ["i0", "d1"]
    strides = module.graph.output_node().meta["original_output_strides"]
    assert strides == [tuple(n.meta["val"].stride()) for n in region.outputs]
    assert all(isinstance(p.meta["val"].fake_mode, FakeTensorMode) for p in module.graph.find_nodes(op="placeholder"))
