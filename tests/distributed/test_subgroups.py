"""ZeRO over one axis of a 2 x 2 mesh: gradients are means over that axis, and a rank that fails is named rightly."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import dscompile
from dscompile.errors import RankError
from tests.distributed.contract import assert_gradients, data, param, seeded
from tests.ranks import rank_outcomes, run_ranks


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def _train(rank: int, stage: int, timeout: float = 20.0) -> tuple[nn.Module, nn.Module, object]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "other"))
    config = {"zero": {"stage": stage}, "regions": "aten", "rank_timeout": timeout}
    model = dscompile.distribute(seeded(net), mesh, config)
    return model, seeded(net), torch.compile(model, backend="dscompile")


def _loss(run: object, seed: int) -> torch.Tensor:
    return run(data((4, 3), seed)).square().mean()  # type: ignore[operator]


def parity(rank: int, world: int) -> None:
    for stage in (1, 3):
        torch.compiler.reset()
        model, reference, run = _train(rank, stage)
        weight = param(model, "0.weight")
        assert weight.to_local().shape == ((3, 3), (2, 3))[rank // 2]  # rank = 2 * dp + other
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for step in range(2):
            other = rank % 2  # each column of the mesh trains on data of its own
            seeds = [10 * step + 2 * dp + 5 * other for dp in range(2)]
            _loss(run, seeds[rank // 2]).backward()
            (sum(_loss(reference, seed) for seed in seeds) / 2).backward()
            assert_gradients(model, reference)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def test_gradients_are_means_over_the_axis() -> None:
    run_ranks(parity, 4, timeout=240)


def _steps(run: object, rank: int, count: int) -> None:
    for step in range(count):
        _loss(run, rank + step).backward()
        time.sleep(0.05)


def one_raises(rank: int, world: int) -> None:
    _, _, run = _train(rank, 3, timeout=8.0)
    _loss(run, rank).backward()
    if rank == 3:
        raise RuntimeError("rank 3 gives up")
    if rank == 1:  # the ranks that share its group of the axis: 1 and 3
        with pytest.raises(RankError, match=r"rank 3\b.*"):
            _steps(run, rank, 1000)
    else:  # 0 and 2 meet neither
        _steps(run, rank, 10)


def test_a_failure_is_named_by_its_global_rank_and_ends_its_own_group() -> None:
    outcomes = rank_outcomes(one_raises, 4, timeout=240)
    assert "gives up" in outcomes[3].trace
    for outcome in outcomes[:3]:
        assert outcome.ok, f"rank {outcome.rank}: {outcome.trace}{outcome.stderr[-2000:]}"
        assert outcome.seconds < 120
