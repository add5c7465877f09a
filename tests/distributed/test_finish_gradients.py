"""Ranks agree on norm, clip and skip: shards add up, replicated parameters count once, one rank's overflow is all's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dscompile
from dscompile.precision import GradientReport, LossScaler, finish_gradients
from dscompile.torch_compat import local_of
from tests.distributed.contract import data, full, seeded
from tests.ranks import run_ranks


class Net(nn.Module):
    """An uneven matrix, a row smaller than the world, a scalar (replicated), and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.single = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.scale * self.single).square().sum() + self.frozen.sum()


def clipped(rank: int, world: int, stage: int, scale: float) -> tuple[GradientReport, dict[str, torch.Tensor]]:
    model = dscompile.distribute(seeded(Net), config={"zero": {"stage": stage}})
    (model(data((4, 5), rank)) * scale).backward()
    report = finish_gradients(model.parameters(), scale=scale, max_norm=1.0)
    return report, {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_norm_is_that_of_one_process(stage: int, world: int) -> None:
    reference = seeded(Net)
    (sum(reference(data((4, 5), r)) for r in range(world)) / world).backward()
    expected = float(nn.utils.clip_grad_norm_(reference.parameters(), 1.0))
    assert expected > 1
    for report, gradients in run_ranks(clipped, world, stage, 32.0):
        assert report.norm == pytest.approx(expected, rel=1e-5)
        assert not report.overflow
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        assert float(norm) == pytest.approx(1.0, abs=1e-6)
        for name, parameter in reference.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)


def overflowing(rank: int, world: int, stage: int, name: str) -> tuple[bool, bool, float, dict[str, torch.Tensor]]:
    model = dscompile.distribute(seeded(Net), config={"zero": {"stage": stage}})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    before = {n: full(p.detach()).clone() for n, p in model.named_parameters()}
    model(data((4, 5), rank)).backward()
    gradient = dict(model.named_parameters())[name].grad
    local = local_of(gradient)
    if rank == world - 1 and local.numel():
        local.view(-1)[-1] = torch.inf
    scaler = LossScaler.for_stage(stage, hysteresis=1)
    report = finish_gradients(model.parameters(), scale=1.0, max_norm=1.0)
    skip = scaler.update(report.overflow)
    if not skip:
        optimizer.step()
    after = {n: full(p.detach()).clone() for n, p in model.named_parameters()}
    return report.overflow, skip, scaler.scale, {n: after[n] - v for n, v in before.items()}


@pytest.mark.parametrize(("stage", "name"), [(0, "scale"), (1, "layer.weight"), (3, "layer.bias"), (3, "scale")])
def test_an_overflow_on_one_rank_skips_on_all(stage: int, name: str) -> None:
    for overflow, skip, scale, change in run_ranks(overflowing, 2, stage, name):
        assert overflow
        assert skip
        assert scale == 32768
        assert all(float(d.abs().sum()) == 0 for d in change.values())
