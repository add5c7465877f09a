"""Ranks find their whole steps in the compile cache, also where only some do; other placements are compiled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dscompile
from dscompile.report import REPORTS
from tests.distributed.contract import data, seeded
from tests.ranks import run_ranks

OPTIONS: dict[str, Any] = {"regions": "aten", "summary": False, "step_entry": True}
ROWS = (2, 4, 5, 3)
"""Of the batches: the second shape makes the program one for any."""


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def train(rank: int, stage: int, micro: int = 1, **options: Any) -> tuple[list[bool], list[float], list[str]]:
    """As a new process would: whether each program came from the cache, the losses, and every fallback."""
    torch.compiler.reset()
    REPORTS.clear()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "dscompile": {**OPTIONS, **options},
    }
    engine, *_ = dscompile.initialize(model=seeded(model), config=config)
    rows = [n for n in ROWS for _ in range(micro)]
    stream = iter([(data((n, 6), 10 * i + rank), data((n,), 10 * i + rank, high=3)) for i, n in enumerate(rows)])
    losses = [engine.train_batch(stream, loss_fn=nn.functional.cross_entropy).item() for _ in ROWS]
    assert (engine.one_program.reason, engine.one_program.runs) == ("", len(rows))
    engine.destroy()
    found = [r for r in REPORTS.all() if r.kind == "joint"]
    assert all(r.not_kept == "" for r in found)
    return [r.cached for r in found], losses, [reason for r in found for reason in r.fallbacks]


def starts(rank: int, world: int, folder: str) -> None:
    for stage, micro in ((3, 2), (0, 1)):
        cold, losses, _ = train(rank, stage, micro)
        assert len(cold) == 2 * micro  # two shapes; with accumulation two variants of each
        assert not any(cold)
        warm, again, fallbacks = train(rank, stage, micro)
        assert (warm, again, fallbacks) == ([True] * len(cold), losses, [])
    if rank == 1:  # as if its machine had lost the cache
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/other"
    alone, again, _ = train(rank, 0)
    assert (alone, again) == ([rank == 0] * 2, losses)
    assert train(rank, 0)[0] == [True] * 2


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def test_ranks_find_their_programs_also_if_only_some_do(tmp_path: Path) -> None:
    run_ranks(starts, 2, str(tmp_path), timeout=300)


def one(rank: int, world: int) -> list[bool]:
    return train(rank, 3)[0]


def test_another_number_of_ranks_is_another_program() -> None:
    assert run_ranks(one, 2, timeout=200) == [[False, False]] * 2
    assert run_ranks(one, 1, timeout=200) == [[False, False]]
    assert run_ranks(one, 2, timeout=200) == [[True, True]] * 2
