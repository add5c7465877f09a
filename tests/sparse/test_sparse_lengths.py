"""Sequences whose length is symbolic: their layout is made when the graph runs."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dscompile.report import REPORTS
from tests.build import trace
from tests.sparse.test_sparse_pass import (
    BIGBIRD,
    EACH_HEAD,
    LOCAL,
    Attention,
    compiled,
    gpt,
    ids,
    masked_by_hand,
    plan,
    sdpa,
    step,
    tail,
)


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("section", [BIGBIRD, EACH_HEAD], ids=["bigbird", "a layout a head"])
def test_one_graph_serves_every_length(section: dict[str, Any]) -> None:
    model = gpt()
    run = compiled(model, section, dynamic=True)
    for seq in (128, 107, 64, 49):
        found = step(run, model, ids(seq))
        with masked_by_hand(section):
            compare(found, step(model, model, ids(seq)))
    assert [(r.verdict, r.fallbacks) for r in REPORTS.all()] == [("approximate", [])] * 2, "forward and backward, once"


@pytest.mark.parametrize("batch", [1, 3])
def test_a_mask_of_padding(batch: int) -> None:
    """One for each sequence, or one for all."""
    model = Attention(sdpa)
    run = compiled(model, LOCAL, dynamic=True)
    for seq in (64, 75):
        args = (torch.randn(3, seq, 16), ~tail(batch, seq, 9)[:, None, None])
        found = step(run, model, args)
        with masked_by_hand(LOCAL):
            compare(found, step(model, model, args))
    assert REPORTS.all()[0].fallbacks == []


def lower(at: Tensor) -> Tensor:
    return at[None, :] <= at[:, None]


def upper(at: Tensor) -> Tensor:
    return ~(at[None, None, None, :] > at[:, None])


def swapped(at: Tensor) -> Tensor:
    return at.view(1, 1, -1, 1) >= at.view(1, 1, 1, -1)


def moved(at: Tensor) -> Tensor:
    return (at + 3)[None, :] <= (at + 3)[:, None]


def anticausal(at: Tensor) -> Tensor:
    return at[None, :] >= at[:, None]


def shifted(at: Tensor) -> Tensor:
    return at[None, :] <= (at + 1)[:, None]


def strict(at: Tensor) -> Tensor:
    return at[None, :] < at[:, None]


def every_other(at: Tensor) -> Tensor:
    return 2 * at[None, :] <= at[:, None]


@pytest.mark.parametrize("rule", [lower, upper, swapped, moved], ids=lambda rule: rule.__name__)
def test_a_causal_mask_made_of_positions(rule: Callable[[Tensor], Tensor]) -> None:
    model = Attention(lambda q, k, v, kept: sdpa(q, k, v, rule(torch.arange(q.shape[2])) & kept))
    run = compiled(model, LOCAL, dynamic=True)
    for seq in (64, 75):
        args = (torch.randn(3, seq, 16), ~tail(3, seq, 9)[:, None, None])
        found = step(run, model, args)
        with masked_by_hand(LOCAL):
            compare(found, step(model, model, args))
    assert REPORTS.all()[0].fallbacks == []


@pytest.mark.parametrize("rule", [anticausal, shifted, strict, every_other], ids=lambda rule: rule.__name__)
def test_other_orders_are_refused(rule: Callable[[Tensor], Tensor]) -> None:
    model = Attention(lambda q, k, v: sdpa(q, k, v, rule(torch.arange(q.shape[2]))))
    _, decisions = plan(trace(model, torch.randn(2, 64, 16), dynamic=True), LOCAL)
    assert [d.choice for d in decisions] == ["refused"]


def test_a_length_too_short_for_the_section_is_attended_to_densely_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = gpt()
    run = compiled(model, {**BIGBIRD, "seed": 7}, dynamic=True)
    step(run, model, ids(64))
    with caplog.at_level(logging.WARNING, "dscompile"):
        found = step(run, model, ids(30))
    compare(found, step(model, model, ids(30)))
    messages = [r.getMessage() for r in caplog.records if "stays dense" in r.getMessage()]
    assert messages == [
        "sparse_attention: attention to 32 tokens stays dense: num_sliding_window_blocks is 3, but a sequence of 32 "
        "tokens has 2 blocks."
    ]


def test_equal_attention_shares_one_index() -> None:
    graph = trace(gpt(), *ids(), dynamic=True)
    _, decisions = plan(graph, BIGBIRD)
    assert [d.choice for d in decisions] == ["sparse", "sparse"]
    assert "made for each length when the graph runs" in decisions[0].reason
    assert sum("section_index" in str(n.target) for n in graph.nodes) == 1


def test_attention_written_out_needs_a_known_length() -> None:
    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    graph = trace(Attention(written_out), torch.randn(2, 64, 16), dynamic=True)
    _, decisions = plan(graph, LOCAL)
    assert [d.choice for d in decisions] == ["refused"]
    assert "compile with dynamic=False" in decisions[0].reason


def test_a_program_from_the_cache_finds_its_operators() -> None:
    """A start that loads every program runs no pass."""
    code = "import torch, dscompile.program; torch.ops.dscompile.section_index.default"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
