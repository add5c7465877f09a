"""Ranks agree before ``train_batch`` runs micro-batches as one program: alike, with a reason, and never hanging."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dscompile
from dscompile.engine.engine import Engine
from dscompile.errors import RankError
from dscompile.graph import StepGraph
from dscompile.manager import PassContext
from dscompile.passes import PIPELINES
from dscompile.report import REPORTS
from tests.build import temporary_pass
from tests.distributed.contract import data, seeded
from tests.ranks import rank_outcomes, run_ranks

OPTIONS: dict[str, Any] = {"regions": "aten", "summary": False, "cache": False, "step_entry": True}
TIMEOUT = 6.0


class Heads(nn.Module):
    """Two outputs; a batch of three rows cannot be captured whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[0] == 3:
            torch._dynamo.graph_break()
        x = self.body(x).tanh()
        return self.left(x), self.right(x)


def left(outputs: Any, labels: Tensor) -> Tensor:
    return (outputs[0].square().mean(1) * labels).mean()


def right(outputs: Any, labels: Tensor) -> Tensor:
    return (outputs[1].square().mean(1) * labels).mean()


def both(outputs: Any, labels: Tensor) -> Tensor:
    return left(outputs, labels) + right(outputs, labels)


def engine_of(make: Callable[[], nn.Module] = Heads, **options: Any) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": 3},
        "dscompile": {**OPTIONS, "rank_timeout": TIMEOUT, **options},
    }
    return dscompile.initialize(model=seeded(make), config=config)[0]


def batches(rank: int, *rows: int) -> Any:
    return iter([(data((n, 6), 10 * i + rank), data((n,), 10 * i + rank)) for i, n in enumerate(rows)])


def counts(engine: Engine) -> tuple[str, int, int]:
    return engine.one_program.reason, engine.one_program.runs, engine.one_program.fallbacks


def reported() -> list[str]:
    return [reason for r in REPORTS.all() if r.graph == "train_batch" for reason in r.fallbacks]


# -- hooks on the engine ----------------------------------------------------------------------------------------------


def hooks_come_and_go(rank: int, world: int) -> None:
    engine, stream, seen = engine_of(), batches(rank, 2, 2, 2, 2), []
    engine.train_batch(stream, loss_fn=both)
    assert counts(engine) == ("", 1, 0)
    handle = engine.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        engine.train_batch(stream, loss_fn=both)
    assert (seen, counts(engine)) == ([1, 1], ("the engine has module hooks, which see its forward pass", 1, 2))
    assert reported() == [engine.one_program.reason]
    handle.remove()
    engine.train_batch(stream, loss_fn=both)
    assert (seen, counts(engine)) == ([1, 1], ("", 2, 2))


@pytest.mark.parametrize("world", [1, 2])
def test_hooks_on_the_engine_are_a_reported_fallback(world: int) -> None:
    run_ranks(hooks_come_and_go, world, timeout=200)


def hooks_on_one_rank(rank: int, world: int) -> tuple[str, int, int]:
    engine = engine_of()
    if rank == 1:
        engine.register_forward_pre_hook(lambda *_: None)
    engine.train_batch(batches(rank, 2), loss_fn=both)
    return counts(engine)


def test_hooks_on_one_rank_alone() -> None:
    expected = ("some ranks' engines have module hooks and others' have none", 0, 1)
    assert run_ranks(hooks_on_one_rank, 2, timeout=200) == [expected, expected]


def other_reasons(rank: int, world: int) -> None:
    for options, news in (({"step_entry": False}, []), ({}, ["wall_clock_breakdown times forward and backward apart"])):
        REPORTS.clear()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "wall_clock_breakdown": not options,
            "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
            "dscompile": {**OPTIONS, **options},
        }
        engine = dscompile.initialize(model=seeded(Heads), config=config)[0]
        for _ in range(2):
            engine.train_batch(batches(rank, 2), loss_fn=both)
        assert (counts(engine)[1:], reported()) == ((0, 2), news)
        assert engine.one_program.reason in (*news, "step_entry is off")


def test_other_reasons_are_counted_and_reported_unless_asked_for() -> None:
    run_ranks(other_reasons, 1, timeout=200)


# -- errors that are no refusals --------------------------------------------------------------------------------------


def swapped(graph: StepGraph, ctx: PassContext) -> None:
    """Breaks the graph's meaning."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.tanh.default:
            node.target = torch.ops.aten.sin.default


def kept(graph: StepGraph, ctx: PassContext) -> None:
    """Changes nothing."""


def broken_pass(rank: int, world: int, culprit: int) -> None:
    with temporary_pass(swapped if rank == culprit else kept, "swaps"):
        engine = engine_of(pipeline=f"{PIPELINES['zero3']},swaps")
        engine.train_batch(batches(rank, 2), loss_fn=both)


@pytest.mark.parametrize("world", [1, 2])
def test_a_failed_proof_is_no_fallback(world: int) -> None:
    outcomes = rank_outcomes(broken_pass, world, world - 1, timeout=200)
    mine, *others = reversed(outcomes)
    assert "VerifyError" in mine.trace
    assert "'swaps'" in mine.trace
    for other in others:
        assert isinstance(other.error, RankError)
        assert "another rank failed to compile" in str(other.error)
    assert not any(o.timed_out for o in outcomes)


# -- ranks with different losses and shapes ---------------------------------------------------------------------------


def different_losses(rank: int, world: int, entry: bool) -> tuple[tuple[str, int, int], float]:
    engine, stream = engine_of(step_entry=entry), batches(rank, 2, 2)
    loss = [engine.train_batch(stream, loss_fn=(left, right)[rank]).item() for _ in range(2)][-1]
    return counts(engine), loss


def test_ranks_with_different_losses_run_as_frames() -> None:
    found = run_ranks(different_losses, 2, True, timeout=200)
    frames = run_ranks(different_losses, 2, False, timeout=200)
    for (reason, runs, fallbacks), loss in found:
        assert "different collectives" in reason
        assert (runs, fallbacks) == (0, 2)
        assert loss == pytest.approx(frames[0][1])


def a_loss_of_its_own(rank: int, world: int) -> float:
    engine, stream = engine_of(), batches(rank, 2, 2)
    engine.train_batch(stream, loss_fn=both)
    began = time.monotonic()

    def go_on() -> None:
        engine.train_batch(stream, loss_fn=(both, left)[rank])
        time.sleep(TIMEOUT)  # the collectives fitted each other by chance: the watch finds out
        engine.train_batch(batches(rank, 2), loss_fn=both)

    with pytest.raises(RankError) as caught:
        go_on()
    assert caught.value.kind == "differs"
    return time.monotonic() - began


def test_one_rank_takes_another_loss_later() -> None:
    assert max(run_ranks(a_loss_of_its_own, 2, timeout=200)) < 60


def a_shape_of_its_own(rank: int, world: int) -> None:
    engine, stream = engine_of(), batches(rank, 2, 2 + rank)
    engine.train_batch(stream, loss_fn=both)
    engine.train_batch(stream, loss_fn=both)


def test_one_rank_cannot_compile_a_later_shape() -> None:
    waiting, failed = rank_outcomes(a_shape_of_its_own, 2, timeout=200)
    assert "It was one program before" in str(failed.error)
    assert '"step_entry": false' in str(failed.error)
    assert isinstance(waiting.error, RankError)
    assert "It was one program before" in str(waiting.error)
    assert not waiting.timed_out


def a_later_shape(rank: int, world: int) -> tuple[str, int, int]:
    engine, stream = engine_of(), batches(rank, 2, 3, 2)
    for _ in range(3):
        engine.train_batch(stream, loss_fn=both)
    assert reported() == [engine.one_program.reason]
    return counts(engine)


def test_one_process_falls_back_at_a_later_shape() -> None:
    ((reason, runs, fallbacks),) = run_ranks(a_later_shape, 1, timeout=200)
    assert "cannot be one program" in reason
    assert (runs, fallbacks) == (1, 2)


def uneven_shapes(rank: int, world: int, entry: bool) -> tuple[list[float], int]:
    engine, stream = engine_of(step_entry=entry), batches(rank, 2, 4 + rank, 7 - rank, 2, 9)
    losses = [engine.train_batch(stream, loss_fn=both).item() for _ in range(5)]
    return losses, engine.one_program.runs


def test_shapes_may_change_on_each_rank() -> None:
    found, frames = (run_ranks(uneven_shapes, 2, entry, timeout=200) for entry in (True, False))
    assert [runs for _, runs in found] == [5, 5]
    assert found[0][0] == pytest.approx(frames[0][0], rel=1e-5)


class Counting(nn.Module):
    """Dynamo makes a program for each value of the counter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.count = nn.Linear(6, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.inner(x).square().mean() * self.count


def counting(rank: int, world: int, entry: bool) -> tuple[list[float], tuple[str, int, int]]:
    engine = engine_of(Counting, step_entry=entry)
    stream = iter([data((2, 6), rank) for _ in range(20)])
    losses = [engine.train_batch(stream).item() for _ in range(20)]
    assert engine.module.count == 20
    return losses, counts(engine)


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_give_up_together_where_every_step_needs_a_program(world: int) -> None:
    for losses, (reason, runs, fallbacks) in run_ranks(counting, world, True, timeout=200):
        assert "16 programs" in reason
        assert (runs, fallbacks) == (16, 4)
        assert losses == pytest.approx(run_ranks(counting, world, False, timeout=200)[0][0], rel=1e-5)
