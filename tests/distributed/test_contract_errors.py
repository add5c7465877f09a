"""Input that distribute() must refuse: one error, the same on every rank, and the model is left as it was."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import dscompile
from dscompile.errors import ConfigError, ShardingError, UnsupportedError
from dscompile.placement import spec_of
from dscompile.world import World, default_mesh
from tests.distributed.contract import param, run_checks, seeded
from tests.ranks import run_ranks


def linear() -> nn.Module:
    return seeded(lambda: nn.Linear(4, 4))


def untouched(model: nn.Module) -> bool:
    return not any(isinstance(p, DTensor) for p in model.parameters()) and type(model) is nn.Linear


def check_mesh_without_the_axis(rank: int, world: int) -> None:
    model = linear()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
    with pytest.raises(ConfigError, match="no axis 'dp'; its axes are data"):
        dscompile.distribute(model, mesh)
    with pytest.raises(ConfigError, match=r"no axis names; pass mesh_dim_names"):
        dscompile.distribute(model, init_device_mesh("cpu", (world,)))
    assert untouched(model)
    dscompile.distribute(model, mesh, axis="data")
    assert spec_of(param(model, "weight")).group == "data"


def check_world_size(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match=rf"asks for 7 ranks, but {world} were launched"):
        default_mesh(expected=7)


def check_options(rank: int, world: int) -> None:
    model = linear()
    for config, message in (
        ({"zero": {"stag": 1}}, r"'zero.stag'. Did you mean 'zero.stage'"),
        ({"zero": {"stage": 4}}, "0, 1, 2 or 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            dscompile.distribute(model, config=config)
    assert untouched(model)
    dscompile.distribute(model, config={"zero": {"stage": 1}})
    with pytest.raises(ConfigError, match="before, with other options"):
        dscompile.distribute(model, config={"zero": {"stage": 3}})
    with pytest.raises(ConfigError, match="either a model or model_fn"):
        dscompile.distribute()


def check_what_would_be_lost(rank: int, world: int) -> None:
    model = linear()
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ShardingError, match=r"weight has a gradient.*zero_grad"):
        dscompile.distribute(model)
    model.zero_grad()
    handle = model.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ShardingError, match=r"weight has gradient hooks.*after distribute"):
        dscompile.distribute(model)
    handle.remove()
    assert untouched(model)
    dscompile.distribute(model)


def check_what_cannot_be_sharded(rank: int, world: int) -> None:
    with pytest.raises(UnsupportedError, match="weight has no shape yet"):
        dscompile.distribute(nn.LazyLinear(3))
    with pytest.raises(UnsupportedError, match="max_norm"):
        dscompile.distribute(nn.Embedding(3, 4, max_norm=1.0))
    model = linear()
    model.copies = [model.weight]
    with pytest.raises(UnsupportedError, match=r"Linear\.copies keeps a second reference to parameter weight"):
        dscompile.distribute(model)
    assert untouched(model)


def check_tie_after_distribute(rank: int, world: int) -> None:
    model = dscompile.distribute(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="cannot assign"):
        model[1].weight = model[0].weight
    model[1].weight = param(model, "0.weight")  # the DTensor itself is how to tie
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
    model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model[0].weight, model[1].weight)


def check_two_axis_mesh_shards_over_one(rank: int, world: int) -> None:
    mesh: DeviceMesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("tp", "dp"))
    model = dscompile.distribute(linear(), mesh)
    name = spec_of(param(model, "weight")).group
    assert name.startswith("dp@")
    assert World.of(mesh).sizes == (1, world)
    assert torch.equal(model.weight, linear().weight)
    model(torch.full((1, 4), float(rank))).sum().backward()
    assert param(model, "weight").grad.full_tensor()[0, 0] == (world - 1) / 2


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=120)


@pytest.mark.parametrize("row", ROWS)
def test_errors(row: str) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(2)) if found[row]]
    assert not failed, "\n".join(failed)


def test_without_a_process_group() -> None:
    with pytest.raises(ConfigError, match="launch with torchrun"):
        dscompile.distribute(linear())
