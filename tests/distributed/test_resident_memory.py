"""Backward must not take the resident parameters of stages 1 and 2, which it saves, for memory of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dscompile
from tests.distributed.contract import data, full, seeded
from tests.ranks import run_ranks


class Scales(nn.Module):
    """Parameters of the activations' shape, which a pointwise kernel of backward could overwrite in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 16)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * self.a).sin() * self.b).sin() * self.c


def changed(rank: int, world: int, stage: int) -> list[str]:
    """Names of the parameters that a forward and a backward pass changed."""
    model = dscompile.distribute(seeded(Scales), config={"zero": {"stage": stage}, "cache": False})
    before = {n: full(p.detach()).clone() for n, p in model.named_parameters()}
    compiled = torch.compile(model, backend="dscompile")
    compiled(data((8, 16), rank)).square().sum().backward()
    return [n for n, p in model.named_parameters() if not torch.equal(full(p.detach()), before[n])]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_without_an_optimizer_changes_no_parameter(stage: int) -> None:
    assert run_ranks(changed, 2, stage, timeout=120) == [[], []]
