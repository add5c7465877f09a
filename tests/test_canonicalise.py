"""canonicalise: what it removes, what it must leave alone, and that executed numbers agree with every PROVED."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from dscompile.config import Config
from dscompile.equivalence import Verdict
from dscompile.graph import InputKind, Phase, StepGraph, info
from dscompile.manager import PassContext, PassRecord, parse_pipeline, run_pipeline
from dscompile.tools.gpt import GPT, GPTConfig
from tests.build import Drops, Hand, Noise, Norm, Repeats, Tied, assert_same_run, execute, random_inputs, trace

aten = torch.ops.aten


def run(graph: StepGraph, text: str = "canonicalise", limit: int | None = None) -> PassRecord:
    return run_pipeline(graph, parse_pipeline(text), PassContext(Config(limit=limit)))[0]


def targets(graph: StepGraph) -> list[object]:
    return [n.target for n in graph.nodes if n.op == "call_function"]


# -- every PROVED beside executed numbers ------------------------------------------------------------------------------


class Messy(nn.Module):
    """Repeats, no-ops and dead code around dropout, a norm, a mutated buffer and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drops = Norm(), Drops(0.3)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.drops.first.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.inner(x.clone().view_as(x)).detach().clone() + self.tied(x).sigmoid()
        b = self.tied(x).sigmoid() * 1.0
        x.exp().log()
        return self.drops(a), b.expand(b.shape), (a * b + torch.full_like(a, 2.0)).t().contiguous()


def gpt(layers: int) -> GPT:
    return GPT(GPTConfig(32, layers, 16, 2, 8))


def ids() -> Tensor:
    return torch.randint(0, 32, (2, 8))


GRAPHS: dict[str, Callable[[], StepGraph]] = {
    "gpt": lambda: trace(gpt(2), ids(), ids()),
    "gpt dynamic": lambda: trace(gpt(1), ids(), ids(), dynamic=True),
    "gpt inference": lambda: trace(gpt(1).requires_grad_(False), ids()),
    "norm": lambda: trace(Norm(), torch.randn(4, 8)),
    "norm with writes": lambda: trace(Norm(), torch.randn(4, 8), keep_mutations=True),
    "norm dynamic with writes": lambda: trace(Norm(), torch.randn(4, 8), dynamic=True, keep_mutations=True),
    "noise": lambda: trace(Noise(), torch.randn(4, 8)),
    "dropout": lambda: trace(Drops(), torch.randn(4, 8)),
    "dropout 0": lambda: trace(Drops(0.0), torch.randn(4, 8)),
    "tied": lambda: trace(Tied(), torch.randint(0, 16, (2, 3))),
    "repeats": lambda: trace(Repeats(), torch.randn(4, 8)),
    "repeats dynamic": lambda: trace(Repeats(), torch.randn(4, 8), dynamic=True),
    "messy": lambda: trace(Messy(), torch.randn(4, 8)),
    "messy with writes": lambda: trace(Messy(), torch.randn(4, 8), keep_mutations=True),
    "messy dynamic": lambda: trace(Messy(), torch.randn(4, 8), dynamic=True),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_proved_and_executed_agree_bit_for_bit(name: str) -> None:
    graph = GRAPHS[name]()
    inputs = [random_inputs(graph, seed) for seed in (0, 1)]
    before = [execute(graph, values, seed=7) for values in inputs]
    record = run(graph)
    assert record.verdict == Verdict.PROVED
    for values, expected in zip(inputs, before, strict=True):
        assert_same_run(expected, execute(graph, values, seed=7))


@pytest.mark.parametrize("name", ["repeats", "messy", "messy with writes"])
def test_every_prefix_of_its_edits_is_right(name: str) -> None:
    """The limit stops it after any edit, and each such graph is proved and computes the same."""
    full = GRAPHS[name]()
    total = run(full).edits
    assert total > 5
    for limit in range(0, total + 1, 3):
        graph = GRAPHS[name]()
        inputs = random_inputs(graph)
        before = execute(graph, inputs)
        record = run(graph, limit=limit)
        assert (record.edits, record.verdict) == (min(limit, total), Verdict.PROVED)
        assert_same_run(before, execute(graph, inputs))


def test_it_is_idempotent() -> None:
    graph = GRAPHS["messy"]()
    run(graph)
    assert run(graph).edits == 0


# -- what it removes ---------------------------------------------------------------------------------------------------


def test_repeats_are_computed_once() -> None:
    graph = GRAPHS["repeats"]()
    assert targets(graph).count(aten.exp.default) == 3
    run(graph)
    assert targets(graph).count(aten.exp.default) == 1
    assert not {aten.sin.default, aten.cos.default, aten.detach.default} & set(targets(graph))


def test_each_part_can_be_left_out() -> None:
    kinds = {
        "canonicalise": {"no-op", "cse", "dead"},
        "canonicalise(cse=False)": {"no-op", "dead"},
        "canonicalise(no_ops=False)": {"cse", "dead"},
        "canonicalise(dead_code=False)": {"no-op", "cse"},
    }
    for text, expected in kinds.items():
        h = Hand()
        x = h.input("x", 4)
        a, b = (h.call(aten.sin.default, h.call(aten.alias.default, x)) for _ in range(2))
        h.call(aten.cos.default, a)
        graph = h.done([h.call(aten.add.Tensor, a, b)])
        run(graph, text)
        assert {e.kind for e in graph.edits} == expected


def test_every_edit_is_numbered_and_says_why() -> None:
    graph = GRAPHS["repeats"]()
    run(graph)
    assert [e.index for e in graph.edits] == list(range(1, len(graph.edits) + 1))
    assert all(e.why and e.pass_name == "canonicalise" for e in graph.edits)


# -- what it must leave alone ------------------------------------------------------------------------------------------


def kept(h: Hand, outputs: list[fx.Node], target: object, count: int, **options: int) -> None:
    """After canonicalise (verified and proved) the graph still has ``count`` calls of ``target``."""
    graph = h.done(outputs, **options)
    run(graph)
    assert targets(graph).count(target) == count


def test_two_equal_outputs_stay_two_tensors() -> None:
    h = Hand()
    x = h.input("x", 4)
    kept(h, [h.call(aten.sin.default, x), h.call(aten.sin.default, x)], aten.sin.default, 2)


def test_views_of_equal_values_in_two_outputs_stay_apart() -> None:
    h = Hand()
    x = h.input("x", 4)
    views = [h.call(aten.view.default, h.call(aten.sin.default, x), [2, 2]) for _ in range(2)]
    kept(h, views, aten.sin.default, 2)


def test_one_visible_and_one_inner_merge() -> None:
    h = Hand()
    x = h.input("x", 4)
    kept(h, [h.call(aten.sin.default, x), h.call(aten.neg.default, h.call(aten.sin.default, x))], aten.sin.default, 1)


def test_a_third_equal_value_does_not_join_two_outputs() -> None:
    """The inner value merges into one output; the second output must not follow it there."""
    h = Hand()
    x = h.input("x", 4)
    inner = h.call(aten.neg.default, h.call(aten.sin.default, x))
    kept(h, [inner, h.call(aten.sin.default, x), h.call(aten.sin.default, x)], aten.sin.default, 2)


def test_an_output_that_copies_an_input_stays_a_copy() -> None:
    h = Hand()
    kept(h, [h.call(aten.clone.default, h.input("x", 4))], aten.clone.default, 1)


def test_an_output_that_is_another_ones_view_stays_its_own_tensor() -> None:
    h = Hand()
    y = h.call(aten.sin.default, h.input("x", 4))
    kept(h, [y, h.call(aten.detach.default, y)], aten.detach.default, 1)


def test_random_draws_stay_even_if_unused_or_equal() -> None:
    h = Hand()
    x = h.input("x", 4)
    a, b = (h.call(aten.bernoulli.p, x, 0.5) for _ in range(2))
    h.call(aten.bernoulli.p, x, 0.5)
    kept(h, [h.call(aten.add.Tensor, a, b)], aten.bernoulli.p, 3)


def test_reads_around_a_write_stay() -> None:
    h = Hand()
    p, x = h.input("p", 4), h.input("x", 4)
    a = h.call(aten.sin.default, p)
    h.call(aten.copy_.default, p, x)
    b = h.call(aten.sin.default, p)
    kept(h, [h.call(aten.add.Tensor, a, b)], aten.sin.default, 2)


def test_a_copy_taken_before_a_write_stays() -> None:
    h = Hand()
    p, x = h.input("p", 4), h.input("x", 4)
    copy = h.call(aten.clone.default, p)
    h.call(aten.copy_.default, p, x)
    kept(h, [h.call(aten.sin.default, copy)], aten.clone.default, 1)


def test_a_copy_that_is_written_stays() -> None:
    h = Hand()
    copy = h.call(aten.clone.default, h.input("p", 4))
    h.call(aten.add_.Tensor, copy, 1.0)
    kept(h, [h.call(aten.sin.default, copy)], aten.clone.default, 1)


def test_effects_without_readers_stay() -> None:
    h = Hand()
    x = h.input("x", 4)
    h.call(aten._assert_async.msg, h.call(aten.any.default, x), "some value must not be zero")
    kept(h, [h.call(aten.sin.default, x)], aten._assert_async.msg, 1)


def test_a_copy_into_another_layout_stays() -> None:
    h = Hand()
    t = h.call(aten.t.default, h.input("x", 4, 6))
    clone = h.call(aten.clone.default, t, memory_format=torch.contiguous_format)
    kept(h, [h.call(aten.sin.default, clone)], aten.clone.default, 1)


def test_constants_of_other_types_are_other_values() -> None:
    h = Hand()
    x = h.input("x", 4, dtype=torch.int64)
    parts = [h.call(aten.mul.Tensor, x, c) for c in (2, 2.0, True)] + [h.call(aten.mul.Tensor, x, 2)]
    kept(h, [h.call(aten.neg.default, p) for p in parts], aten.mul.Tensor, 3)


def test_forward_and_backward_never_share_a_computation() -> None:
    h = Hand()
    x, tangent = h.input("x", 4), h.input("tangent", 4, kind=InputKind.TANGENT)
    y = h.call(aten.sin.default, x)
    again = h.call(aten.sin.default, x)
    again.meta["partitioner_tag"] = "is_backward"
    grad = h.call(aten.mul.Tensor, tangent, again)
    graph = h.done([h.call(aten.exp.default, y), grad], forward_outputs=1)
    assert info(again).phase is Phase.BACKWARD
    run(graph)
    assert targets(graph).count(aten.sin.default) == 2
