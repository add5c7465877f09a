"""Optimizers on the shards of two ranks are those of one process with both ranks' rows."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dscompile
from dscompile.engine.optimizers import WHOLE_ONLY, create_optimizer
from dscompile.errors import UnsupportedError
from tests.ranks import run_ranks

STEPS, ROWS = 5, 6
KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 1e-2},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1},
    "Adam": {"lr": 1e-3, "weight_decay": 0.1, "adam_w_mode": False},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "Adamax": {"lr": 1e-3},
    "Adadelta": {"lr": 1e-1},
    "ASGD": {"lr": 1e-2},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "Lamb": {"lr": 1e-2, "weight_decay": 0.1},
    "LAMB": {"lr": 1e-2, "weight_decay": 0.1, "compiled": True},
}


class Net(nn.Module):
    """Uneven sizes, a bias shorter than the ranks, a scalar, and no gradient that is zero but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(torch.tanh(self.first(x))) * self.scale - x.sum(1, keepdim=True)).square().mean()


def rows(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The second group has hyperparameters of its own."""
    named = dict(model.named_parameters())
    return [
        {"params": [p for n, p in named.items() if not n.endswith("bias")]},
        {"params": [p for n, p in named.items() if n.endswith("bias")], "lr": 2e-3, "weight_decay": 0.0},
    ]


def trained(model: nn.Module, kind: str, rank: int, world: int) -> tuple[dict[str, torch.Tensor], int]:
    """Final parameters, whole, and how many all-reduces the optimizer called."""
    opt = create_optimizer(kind, groups(model), KINDS[kind])
    share = ROWS // world
    calls = 0
    for step in range(STEPS):
        model(rows(step)[rank * share : (rank + 1) * share]).backward()
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as counted:
            opt.step()
        calls += counted.call_count
        opt.zero_grad()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in whole.items()}, calls


def on_ranks(rank: int, world: int, stage: int) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    found = {}
    for kind in KINDS:
        torch.manual_seed(0)
        model = dscompile.distribute(Net(), config={"zero": {"stage": stage}})
        found[kind] = trained(model, kind, rank, world)
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sharded_equals_one_process(stage: int) -> None:
    found = run_ranks(on_ranks, 2, stage, timeout=120)
    for kind in KINDS:
        torch.manual_seed(0)
        expected, _ = trained(Net(), kind, 0, 1)
        torch.manual_seed(0)
        start = dict(Net().named_parameters())
        for parameters, calls in (one[kind] for one in found):
            assert calls == (STEPS if kind.title() == "Lamb" and stage > 0 else 0), kind
            for name, value in expected.items():
                assert not torch.equal(value, start[name]), (kind, name)
                torch.testing.assert_close(
                    parameters[name], value, rtol=0, atol=1e-6, msg=lambda m, k=kind, n=name: f"{k} {n}: {m}"
                )


def refusals(rank: int, world: int, stage: int) -> dict[str, str]:
    model = dscompile.distribute(nn.Linear(4, 4, bias=False), config={"zero": {"stage": stage}})
    found = {}
    for cls in WHOLE_ONLY:
        try:
            create_optimizer(cls.__name__, model.parameters(), {})
            found[cls.__name__] = ""
        except UnsupportedError as error:
            found[cls.__name__] = str(error)
    return found


def test_what_needs_whole_parameters_is_refused_on_shards_on_every_rank() -> None:
    for found in run_ranks(refusals, 2, 3):
        for cls, reason in WHOLE_ONLY.items():
            said = found[cls.__name__]
            assert "weight is sharded at stage 3" in said
            assert reason in said
    for found in run_ranks(refusals, 2, 0):
        assert set(found.values()) == {""}


def implementations(rank: int, world: int) -> dict[str, tuple[Any, Any]]:
    model = dscompile.distribute(nn.Linear(4, 4), config={"zero": {"stage": 3}})
    made = {kind: create_optimizer(kind, model.parameters(), KINDS[kind]).param_groups[0] for kind in KINDS}
    return {kind: (group.get("fused"), group.get("foreach")) for kind, group in made.items()}


def test_shards_are_swept_and_not_looped_over() -> None:
    (found,) = run_ranks(implementations, 1)
    own = {kind: found.pop(kind) for kind in ("Lion", "Lamb", "LAMB")}
    assert set(own.values()) == {(None, None)}
    assert {kind for kind, (fused, _) in found.items() if fused} == {"Adam", "AdamW"}
    assert all(fused or foreach for fused, foreach in found.values())
