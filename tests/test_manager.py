"""The manager: pipeline strings and their errors, contracts, limit, decisions, records, when checks run."""

from __future__ import annotations

import pytest
import torch

from dscompile.config import Config
from dscompile.equivalence import Verdict
from dscompile.errors import PipelineError, VerifyError
from dscompile.graph import StepGraph
from dscompile.manager import REGISTRY, Numerics, PassContext, graph_pass, parse_pipeline, run_pipeline
from dscompile.passes import PIPELINES
from tests.build import Hand, run_pass, temporary_pass

aten = torch.ops.aten


def nothing(
    graph: StepGraph, ctx: PassContext, *, cap: int = 1, name: str = "", deep: bool = False, any: object = None
) -> None:
    """Changes nothing."""


def small() -> StepGraph:
    h = Hand()
    x = h.input("x", 4)
    return h.done([h.call(aten.add.Tensor, h.call(aten.sin.default, x), h.call(aten.sin.default, x))])


def break_it(graph: StepGraph, ctx: PassContext) -> None:
    graph.output_values()[0].target = aten.sub.Tensor


def run(text: str, config: Config | None = None, **options: object) -> tuple[StepGraph, PassContext, list]:
    graph, ctx = small(), PassContext(config or Config())
    return graph, ctx, run_pipeline(graph, parse_pipeline(text), ctx, **options)


# -- pipeline strings --------------------------------------------------------------------------------------------------


def test_options_and_sizes_are_parsed() -> None:
    with temporary_pass(nothing, "first"):
        (call,) = parse_pipeline("first(cap=64M, name='a,b', deep=True, any=(1, 2))")
        assert call.options == {"cap": 64 << 20, "name": "a,b", "deep": True, "any": (1, 2)}
        assert parse_pipeline(str(call)) == (call,)


def test_bare_words_are_strings() -> None:
    with temporary_pass(nothing, "first"):
        assert parse_pipeline("first(name=left)")[0].options == {"name": "left"}


def test_named_pipelines_and_the_empty_one() -> None:
    assert parse_pipeline("none") == ()
    assert [c.spec.name for c in parse_pipeline("default")] == PIPELINES["default"].split(",")
    assert all(isinstance(parse_pipeline(text), tuple) for text in PIPELINES.values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("canonicalize", ["no pass named 'canonicalize'", "'canonicalise'"]),
        ("canonicalise(dead=True)", ["no option 'dead'", "'dead_code'", "no_ops"]),
        ("canonicalise(cse=1)", ["'cse'", "takes bool", "'1'"]),
        ("canonicalise(cse)", ["no option 'cse'"]),
        ("canonicalise)", ["cannot read"]),
        ("canonicalise(cse=True", ["cannot read"]),
        ("9lives", ["cannot read '9lives'"]),
    ],
)
def test_errors_say_what_and_what_instead(text: str, words: list[str]) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    for word in words:
        assert word in str(caught.value)


# -- contracts ---------------------------------------------------------------------------------------------------------


def test_order_and_requirements_are_enforced() -> None:
    with (
        temporary_pass(nothing, "first", provides={"ready"}),
        temporary_pass(nothing, "second", after={"first"}),
        temporary_pass(nothing, "third", requires={"ready"}),
    ):
        parse_pipeline("first,second,third")
        parse_pipeline("second")  # `after` binds only passes that are there
        with pytest.raises(PipelineError, match="'second' must come after 'first'"):
            parse_pipeline("second,first")
        with pytest.raises(PipelineError, match=r"requires 'ready'\. Put one of first before it"):
            parse_pipeline("third,first")


def test_the_default_pipeline_keeps_its_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary_pass(nothing, "needy", requires={"what nobody gives"}):
        monkeypatch.setitem(PIPELINES, "default", "needy")
        with pytest.raises(PipelineError, match="'needy' requires 'what nobody gives'"):
            parse_pipeline("default")


def test_every_option_needs_a_default() -> None:
    def bad(graph: StepGraph, ctx: PassContext, *, window: int) -> None: ...

    with pytest.raises(TypeError, match="every option needs a default"):
        graph_pass("bad")(bad)
    assert "bad" not in REGISTRY


# -- running -----------------------------------------------------------------------------------------------------------


def test_limit_counts_edits_over_the_whole_run() -> None:
    graph, _, records = run("canonicalise", Config(limit=0))
    assert records[0].edits == 0
    assert [n.target for n in graph.nodes].count(aten.sin.default) == 2
    graph, _, records = run("canonicalise,canonicalise", Config(limit=1))
    assert [r.edits for r in records] == [1, 0]


def test_decisions_belong_to_their_pass() -> None:
    def decides(graph: StepGraph, ctx: PassContext) -> None:
        ctx.decide(graph.output_values()[0], "keep", "it is an output", bytes=16)

    with temporary_pass(decides, "decides"):
        _, ctx, records = run("canonicalise,decides,canonicalise")
    assert [len(r.decisions) for r in records] == [0, 1, 0]
    (decision,) = ctx.decisions
    assert (decision.pass_name, decision.choice, decision.facts) == ("decides", "keep", {"bytes": 16})
    assert decision.node == "add_tensor"


def test_stop_after_and_on_pass() -> None:
    seen: list[str] = []
    with temporary_pass(nothing, "first"), temporary_pass(nothing, "second"):
        _, _, records = run("first,second,first", stop_after="second", on_pass=lambda r, g: seen.append(r.name))
    assert [r.name for r in records] == seen == ["first", "second"]


def test_records_tell_what_happened() -> None:
    _, _, (record,) = run("canonicalise(no_ops=False)")
    assert record.call == "canonicalise(no_ops=False)"
    assert (record.nodes_before, record.nodes_after, record.edits) == (5, 4, 1)
    assert (record.verdict, record.numerics) == (Verdict.PROVED, Numerics.BITWISE)


def test_options_reach_the_pass() -> None:
    got: list[int] = []

    def takes(graph: StepGraph, ctx: PassContext, *, window: int = 2, cap: int = 3) -> None:
        got.extend([window, cap])

    with temporary_pass(takes, "takes"):
        run("takes(window=5)")
    assert got == [5, 3]


# -- when checks run ---------------------------------------------------------------------------------------------------


def test_each_names_the_pass_that_broke_the_graph() -> None:
    with (
        temporary_pass(break_it, "breaks"),
        temporary_pass(nothing, "later"),
        pytest.raises(VerifyError, match="'breaks'"),
    ):
        run("breaks,later")


def test_end_checks_once_and_still_finds_it() -> None:
    with temporary_pass(break_it, "breaks"), temporary_pass(nothing, "later"):
        with pytest.raises(VerifyError, match="'later'"):
            run("breaks,later", Config(verify="end"))
        _, _, records = run("later,later", Config(verify="end"))
    assert [r.verdict for r in records] == [Verdict.UNCHECKED, Verdict.PROVED]


def test_end_checks_at_stop_after() -> None:
    with (
        temporary_pass(break_it, "breaks"),
        temporary_pass(nothing, "later"),
        pytest.raises(VerifyError, match="'breaks'"),
    ):
        run("breaks,later", Config(verify="end"), stop_after="breaks")


def test_off_checks_nothing() -> None:
    with temporary_pass(break_it, "breaks"):
        _, _, records = run("breaks", Config(verify="off"))
    assert records[0].verdict == Verdict.UNCHECKED


def test_a_pass_that_may_change_numbers_is_not_held_to_terms() -> None:
    def reassociates(graph: StepGraph) -> None:
        graph.output_values()[0].target = aten.sub.Tensor

    (record,) = run_pass(small(), reassociates, numerics=Numerics.REASSOCIATES)
    assert record.verdict == Verdict.DIFFERENT
    with pytest.raises(VerifyError):
        run_pass(small(), reassociates)


def test_rules_hold_for_every_numerics_class() -> None:
    def drops_output(graph: StepGraph) -> None:
        graph.output_node.args = ((),)

    with pytest.raises(VerifyError, match="rule 'outputs'"):
        run_pass(small(), drops_output, numerics=Numerics.APPROXIMATE)


def test_a_name_that_is_registered_is_restored() -> None:
    before = dict(REGISTRY)
    with temporary_pass(nothing, "first"):
        assert "first" in REGISTRY
    assert before == REGISTRY
