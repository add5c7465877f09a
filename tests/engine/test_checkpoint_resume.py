"""Saved at one number of ranks and stage, gone on with at another: the same losses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import dscompile
from dscompile.engine import checkpoint_plan, checkpoint_stage
from dscompile.engine.checkpoint import load_checkpoint, save_checkpoint
from dscompile.engine.checkpoint_files import DirectoryReader
from tests.engine.checkpoint_runs import Net, Run
from tests.ranks import run_ranks

BEFORE, AFTER = 5, 10


def save_and_go_on(rank: int, world: int, stage: int, folder: str, kind: str) -> list[float]:
    run = Run(stage, kind)
    run.train(BEFORE)
    run.save(folder)
    return run.train(AFTER)


def go_on(rank: int, world: int, stage: int, folder: str, kind: str) -> list[float]:
    run = Run(stage, kind, seed=77 + rank)
    run.train(1)  # state of its own, all of which must go
    run.load(folder)
    return run.train(AFTER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    folder = str(tmp_path_factory.mktemp("run"))
    losses = run_ranks(save_and_go_on, 2, 3, folder, "AdamW")
    assert losses[0] == losses[1]
    return folder, losses[0]


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (0, 1), (3, 4), (2, 3), (3, 2)])
def test_goes_on_at_another_world_and_stage(saved: tuple[str, list[float]], stage: int, world: int) -> None:
    folder, expected = saved
    losses = run_ranks(go_on, world, stage, folder, "AdamW")[0]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len({round(x, 3) for x in expected}) > 5, "the losses must move for this to mean anything"


def test_a_plain_model_goes_on_without_a_process_group(saved: tuple[str, list[float]]) -> None:
    folder, expected = saved
    run = Run(None, seed=5)
    run.load(folder)
    assert run.train(AFTER) == pytest.approx(expected, rel=1e-6)


def compiled(rank: int, world: int, folder: str) -> tuple[list[float], list[float], int, int]:
    run = Run(3, compiled=True)
    run.train(3)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    first = run.save(folder, asynchronous=True)
    run.train(1)
    second = run.save(folder, asynchronous=True)
    expected = run.train(3)
    first.wait()
    second.wait()
    run.load(folder)
    return expected, run.train(3), before, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_run_saves_in_the_background_and_loads_without_compiling_again(tmp_path: Path) -> None:
    expected, found, before, after = run_ranks(compiled, 2, str(tmp_path), timeout=240)[0]
    assert found == expected
    assert before == after > 0


def test_a_compiled_run_goes_on_at_another_stage(saved: tuple[str, list[float]]) -> None:
    folder, expected = saved
    assert run_ranks(go_on_compiled, 2, 1, folder, timeout=240)[0] == pytest.approx(expected, rel=1e-6)


def go_on_compiled(rank: int, world: int, stage: int, folder: str) -> list[float]:
    run = Run(stage, compiled=True, seed=9)
    run.load(folder)
    return run.train(AFTER)


def on_a_grid(rank: int, world: int, folder: str, stage: int) -> bool:
    """Two axes: sharded over one, equal over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    expected = [p.detach().clone() for p in Net().parameters()]
    torch.manual_seed(0)
    model = dscompile.distribute(Net(), mesh, config={"zero": {"stage": stage}})
    save_checkpoint(folder, "a", model=model)
    other = dscompile.distribute(Net(), mesh, config={"zero": {"stage": 3 - stage % 3}})
    load_checkpoint(folder, model=other)
    return all(torch.equal(p.full_tensor(), e) for p, e in zip(other.parameters(), expected, strict=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_mesh_of_two_axes(tmp_path: Path, stage: int) -> None:
    assert run_ranks(on_a_grid, 4, str(tmp_path), stage) == [True] * 4
    model = Net()
    load_checkpoint(tmp_path, model=model)
    data = sum(p.stat().st_size for p in tmp_path.glob("a/*.bin"))
    assert data == 4 * sum(p.numel() for p in model.parameters()) + 8, "each value once, and the buffer"


def in_sixteen_bits(rank: int, world: int, folder: str) -> tuple[list[float], dict[int, list[float]], set[torch.dtype]]:
    run = Run(3, dtype="bf16")
    run.train(BEFORE)
    run.save(folder)
    expected, found = run.train(AFTER), {}
    for stage in range(4):
        other = Run(stage, dtype="bf16", seed=7)
        other.train(1)  # the copies it computes with are made
        other.load(folder)
        found[stage] = other.train(AFTER)
    return expected, found, {v.dtype for v in other.values().values()}


def test_masters_are_saved_and_the_copies_computed_with_are_made_again(tmp_path: Path) -> None:
    expected, found, dtypes = run_ranks(in_sixteen_bits, 2, str(tmp_path))[0]
    assert found == dict.fromkeys(range(4), expected)
    assert dtypes == {torch.float32, torch.int64}
    assert run_ranks(in_full, 2, str(tmp_path))[0] != expected
    plain = Run(None, seed=3)
    plain.load(tmp_path)  # and an fp32 model takes them


def in_full(rank: int, world: int, folder: str) -> list[float]:
    run = Run(3)
    run.load(folder)
    return run.train(AFTER)


def in_pieces(rank: int, world: int, stage: int, folder: str, size: int) -> list[float]:
    checkpoint_plan.PIECE_BYTES = size
    run = Run(stage)
    run.train(BEFORE)
    run.save(folder, asynchronous=stage == 1).wait()
    return run.train(AFTER)


@pytest.mark.parametrize(("stage", "size"), [(3, 100), (1, 1), (0, 64)])
def test_large_shards_are_written_in_pieces(tmp_path: Path, stage: int, size: int) -> None:
    expected = run_ranks(in_pieces, 2, stage, str(tmp_path), size)[0]
    contents = DirectoryReader(tmp_path / f"step_{BEFORE}").contents
    for key in contents.tensors.state_dict_metadata:
        found = contents.tensor(key)
        row = found.properties.dtype.itemsize * (found.size[1:].numel() if found.size else 1)
        assert all(contents.place(key, chunk).nbytes <= max(size, row) for chunk in found.chunks)
    assert len(contents.tensor("up.weight").chunks) > 4
    sizes = [size for _, size in contents.files]
    assert abs(sizes[0] - sizes[1]) < 0.3 * sum(sizes), "replicated tensors are shared out"
    for there in (3, 0):
        assert run_ranks(go_on, 3, there, str(tmp_path), "AdamW")[0] == pytest.approx(expected, rel=1e-6)


def beside_training(rank: int, world: int, folder: str, compiled: bool) -> list[str]:
    """Saves that copy while stages 0 to 3 train on: the values of their moment, or what went wrong."""
    copy, wrong = checkpoint_stage._copy, []
    checkpoint_stage._copy = lambda *a, **k: (time.sleep(0.002), copy(*a, **k))  # type: ignore[assignment]
    for stage, dtype in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")):
        run = Run(stage, compiled=compiled, dtype=dtype)
        run.train(2)
        expected = run.values()
        handle = run.save(folder, f"{stage}", asynchronous=True)
        run.train(2)
        handle.wait()
        run.load(folder)
        found = run.values()
        wrong += [f"stage {stage}: {k}" for k, v in expected.items() if not torch.equal(v, found[k])]
    return wrong


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_stage_trains_on_while_a_save_copies(tmp_path: Path, compiled: bool) -> None:
    assert run_ranks(beside_training, 2, str(tmp_path), compiled, timeout=300) == [[], []]
