"""Sharded training ends with a named error when a rank goes, raises or diverges: the watch, seen from a program."""

from __future__ import annotations

import os
import random
import re
import signal
import threading

import pytest
import torch
from torch import nn

import dscompile
from dscompile.errors import RankError, ShardingError
from tests.ranks import rank_outcomes

WIDTH = 16


class Net(nn.Module):
    """Three equal blocks, so that a kill falls into different collectives."""

    def __init__(self, blocks: int = 3, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)) for _ in range(blocks)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in reversed(self.blocks) if self.reverse else self.blocks:
            x = block(x)
        return x.square().mean()


def train(rank: int, blocks: int, after: float | None, raise_at: int | None, *, reverse: bool = False) -> None:
    torch.manual_seed(0)
    model = dscompile.distribute(Net(blocks, reverse), config={"zero": {"stage": 3}, "rank_timeout": 6.0})
    options = {"regions": "aten", "summary": False, "cache": False}
    step = torch.compile(model, backend="dscompile", options=options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for index in range(100_000):
        step(torch.ones(2, WIDTH)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if index == raise_at:
            raise ValueError("a batch that cannot be read")
        if index == 2 and after is not None:
            threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()


def killed(rank: int, world: int, victim: int, after: float) -> None:
    train(rank, 3, after if rank == victim else None, None)


def raises(rank: int, world: int) -> None:
    train(rank, 3, None, 4 if rank == 1 else None)


def diverges(rank: int, world: int) -> None:
    train(rank, 3, None, None, reverse=rank == 1)


def different_models(rank: int, world: int) -> None:
    train(rank, 3 - rank, None, None)


def check_killed(victim: int, after: float) -> None:
    outcomes = rank_outcomes(killed, 2, victim, after, timeout=90)
    survivor = outcomes[1 - victim]
    assert outcomes[victim].exitcode == -signal.SIGKILL
    assert not survivor.timed_out
    assert isinstance(survivor.error, RankError), survivor
    assert (survivor.error.kind, survivor.error.ranks) == ("died", (victim,))
    assert f"rank {victim}" in str(survivor.error)
    assert re.search(r"in call \d+ \(graph\d+ (forward|backward)\)", str(survivor.error))


def test_kill_9_in_training_ends_the_other_rank_by_name() -> None:
    check_killed(1, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_kill_9_at_ten_random_points_of_training(seed: int) -> None:
    draw = random.Random(seed)
    check_killed(draw.randrange(2), draw.uniform(0.0, 0.5))


def test_a_rank_that_raises_ends_the_other_with_its_error() -> None:
    survivor, raiser = rank_outcomes(raises, 2, timeout=90)
    assert isinstance(raiser.error, ValueError)
    assert isinstance(survivor.error, RankError), survivor
    assert survivor.error.kind in ("raised", "left", "died")  # a multiprocessing child runs no exit handlers
    assert "rank 1" in str(survivor.error)


def test_ranks_with_different_programs_are_told_where_they_differ() -> None:
    outcomes = rank_outcomes(diverges, 2, timeout=90)
    assert not any(outcome.timed_out for outcome in outcomes)
    named = [o.error for o in outcomes if isinstance(o.error, RankError)]
    assert named, outcomes
    assert any(error.kind == "differs" for error in named)


def test_ranks_with_different_models_are_refused_by_name() -> None:
    for outcome in rank_outcomes(different_models, 2, timeout=90):
        assert isinstance(outcome.error, ShardingError), outcome
        assert "blocks.2.0.weight" in str(outcome.error)
