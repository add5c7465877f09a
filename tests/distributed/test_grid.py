"""Four ranks in a grid of two by two: weights that one cut would not give to every rank are cut twice."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate, Shard

import dscompile
from dscompile.accumulate import reduce_pending
from dscompile.placement import spec_of
from dscompile.world import World
from tests.distributed import (
    test_contract_accumulation,
    test_contract_compiled,
    test_contract_matrix,
    test_contract_reach,
    test_contract_storage,
)
from tests.distributed.contract import (
    assert_gradients,
    assert_values,
    data,
    full,
    mean_loss,
    param,
    parity,
    run_checks,
    seeded,
)
from tests.distributed.test_contract_storage import load_everything, save_everything
from tests.ranks import run_ranks


class Net(nn.Module):
    """``[9, 9]`` in one cut of 4: 3 + 3 + 3 + 0. One weight of three dimensions, one vector, one scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(9, 9)
        self.cube = nn.Parameter(torch.randn(5, 3, 5))
        self.down = nn.Linear(9, 6, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.randn(9, 9))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).tanh()) * self.scale + self.cube.cos().mean()
        return out


def loss(model: nn.Module, rank: int) -> Tensor:
    total: Tensor = model(data((4, 9), rank)).square().mean()
    return total


def check_placements(rank: int, world: int) -> None:
    whole, row, column = seeded(Net).up.weight, rank // 2, rank % 2
    halves = slice(0, 5), slice(5, 9)
    rows = (slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 9))[rank]
    for stage in (1, 2, 3):
        model = dscompile.distribute(seeded(Net), config={"zero": {"stage": stage}})
        weight = param(model, "up.weight")
        assert tuple(weight.device_mesh.shape) == (2, 2)
        if stage == 3:  # pads least: 5 x 5
            assert weight.placements == (Shard(0), Shard(1))
            assert torch.equal(weight.to_local(), whole[halves[row], halves[column]])
        else:  # whole rows
            assert weight.placements == (Shard(0), Shard(0))
            assert torch.equal(weight.to_local(), whole[rows])
        assert param(model, "scale").placements == (Replicate(), Replicate())
        assert spec_of(param(model, "cube")).local_shape(rank) == tuple(param(model, "cube").to_local().shape)
        assert_values(model, seeded(Net))
    replicated = dscompile.distribute(seeded(Net), config={"zero": {"stage": 0}})
    assert param(replicated, "up.weight").device_mesh.ndim == 1


def check_parity(rank: int, world: int) -> None:
    for stage in (1, 2, 3):
        for compiled in (False, True):
            run = (lambda m: torch.compile(m, backend="dscompile", fullgraph=True)) if compiled else None
            model, reference = parity(Net, loss, rank, world, stage=stage, run=run)
            optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, reference)]
            call = run(model) if run else model
            for _ in range(2):
                norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, reference)]
                torch.testing.assert_close(full(norms[0]), norms[1])
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                assert_values(model, reference, atol=2e-6)
                loss(call, rank).backward()
                mean_loss(reference, loss, world).backward()
                assert_gradients(model, reference)


def check_accumulation(rank: int, world: int) -> None:
    """``no_sync``, and what only the first micro-batch used: :func:`reduce_pending` reduces it."""
    model, reference = dscompile.distribute(seeded(Net)), seeded(Net)
    with dscompile.no_sync(model):
        (loss(model, rank) + model.unused.square().sum() * (rank + 1)).backward()
    loss(model, rank).backward()
    reduce_pending(model)
    (2 * mean_loss(reference, loss, world) + reference.unused.square().sum() * (world + 1) / 2).backward()
    assert_gradients(model, reference)


def check_second_derivative(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Net)), seeded(Net)

    def penalty(m: nn.Module, value: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(value, param(m, "cube"), create_graph=True)
        return full(grad).square().sum() if isinstance(grad, DTensor) else grad.square().sum()

    penalty(model, loss(model, rank)).backward()
    penalty(reference, mean_loss(reference, loss, world)).backward()
    torch.testing.assert_close(full(param(model, "cube").grad), reference.cube.grad)


def check_adapter_and_copies(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net))
    model.up.register_parameter("extra", nn.Parameter(torch.ones(9, 9)))
    dscompile.distribute(model)
    assert param(model, "up.extra").device_mesh is param(model, "up.weight").device_mesh
    model.down.register_parameter("extra", nn.Parameter(torch.ones(9, 9)))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    dscompile.distribute(model, mesh)  # the model's first mesh, named again
    assert param(model, "down.extra").device_mesh is param(model, "up.weight").device_mesh
    other = copy.deepcopy(model)
    assert torch.equal(other.up.weight, model.up.weight)
    with dscompile.gathered(model.up, write=True):
        model.up.weight.fill_(2.0)
    assert torch.equal(full(param(model, "up.weight")), torch.full((9, 9), 2.0))
    assert not torch.equal(other.up.weight, model.up.weight)


def check_state_dicts(rank: int, world: int) -> None:
    model, other = (dscompile.distribute(seeded(Net, s)) for s in (0, 3))
    other.load_state_dict(model.state_dict())
    assert_values(other, seeded(Net))
    other.load_state_dict(seeded(Net, 5).state_dict())
    assert_values(other, seeded(Net, 5))


def check_world_has_one_axis(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net))
    found = World.of(param(model, "up.weight").device_mesh)
    assert (found.axes, found.sizes, found.groups) == (("dp",), (4,), ("dp",))


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


def assert_passed(results: list[dict[str, str]]) -> None:
    failed = [f"rank {r}: {name}\n{text}" for r, found in enumerate(results) for name, text in found.items() if text]
    assert not failed, "\n".join(failed)


def test_grid() -> None:
    assert_passed(run_ranks(run_checks, 4, __name__, ROWS, timeout=240))


# -- other world sizes -------------------------------------------------------------------------------------------------


def trained(rank: int, world: int, folder: str, save: bool) -> list[Tensor]:
    """Two AdamW steps; saved after the first, or the second, from what was saved. All ranks have one batch."""
    model = dscompile.distribute(seeded(Net, 0 if save else 7))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if save:
        (loss(model, 0) + model.unused.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    if save:
        dcp.save(state, checkpoint_id=folder)
    else:
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    (loss(model, 0) + model.unused.square().sum()).backward()
    optimizer.step()
    return [full(p).detach() for p in model.parameters()]


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_checkpoint_at_another_world_size(before: int, after: int) -> None:
    folder = tempfile.mkdtemp()
    wanted = run_ranks(trained, before, folder, True, timeout=120)[0]
    found = run_ranks(trained, after, folder, False, timeout=120)[0]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def load_file(rank: int, world: int, path: str) -> None:
    from dscompile.engine.export import load_weights

    model = dscompile.distribute(seeded(Net, 9))
    load_weights(model, path)
    assert_values(model, seeded(Net))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_of_one_file(kind: str, tmp_path: Path) -> None:
    path, state = tmp_path / f"weights.{kind}", seeded(Net).state_dict()
    if kind == "pt":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    run_ranks(load_file, 4, str(path), timeout=120)


def test_pickled_into_fresh_processes(tmp_path: Path) -> None:
    run_ranks(save_everything, 4, str(tmp_path), timeout=120)
    run_ranks(load_everything, 4, str(tmp_path), timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [test_contract_matrix, test_contract_storage, test_contract_compiled, test_contract_reach],
    ids=lambda m: m.__name__.rpartition("_")[2],
)
def test_contract_on_four_ranks(module: object) -> None:
    rows = list(module.ROWS)  # type: ignore[attr-defined]
    assert_passed(run_ranks(run_checks, 4, module.__name__, rows, timeout=500))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_accumulation_contract_on_four_ranks() -> None:
    rows = list(test_contract_accumulation.EAGER)
    assert_passed(run_ranks(run_checks, 4, test_contract_accumulation.__name__, rows, timeout=500))
