"""What users of other checkpoints met, by thread: each must not happen here."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import dscompile
from dscompile.engine import checkpoint_stage
from dscompile.engine.checkpoint import load_checkpoint, save_checkpoint
from dscompile.engine.checkpoint_files import DirectoryReader
from tests.engine.checkpoint_runs import Run
from tests.ranks import run_ranks

# -- resuming with another number of GPUs ------------------------------------------------------------------------------


def save_all(rank: int, world: int, folder: str, stages: list[int]) -> dict[int, list[float]]:
    losses = {}
    for stage in stages:
        run = Run(stage)
        run.train(3)
        run.save(folder, f"{world}_{stage}")
        losses[stage] = run.train(3)
    return losses


def load_all(rank: int, world: int, folder: str, tags: list[str], stages: list[int]) -> dict[tuple[str, int], Any]:
    losses = {}
    for tag in tags:
        for stage in stages:
            run = Run(stage, seed=9)
            run.load(folder, tag)
            losses[tag, stage] = run.train(3)
    return losses


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 4)])
def test_stages_and_ranks_in_deepspeeds_own_matrix(tmp_path: Path, saved: int, loaded: int) -> None:
    """DeepSpeed#2898, #3810, #5405, #6441, Megatron-DeepSpeed#439, ms-swift#3989: "DP world size of 8, current is 16".

    DeepSpeed#7200: stage 0 as well. DeepSpeed#6691: the loss goes on, and does not begin again. DeepSpeed#5822: without
    a converter.
    """
    stages = [0, 1, 3]
    expected = run_ranks(save_all, saved, str(tmp_path), stages, timeout=120)[0]
    tags = [f"{saved}_{stage}" for stage in stages]
    found = run_ranks(load_all, loaded, str(tmp_path), tags, stages, timeout=120)[0]
    assert len(found) == 9
    for (tag, _), losses in found.items():
        assert losses == pytest.approx(expected[int(tag[-1])], rel=1e-6)


def elements_while_loading(rank: int, world: int, folder: str) -> tuple[int, int]:
    """Most bytes of any one tensor made, and bytes kept, while loading."""
    model = dscompile.distribute(nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]), config={"zero": {"stage": 3}})
    optimizer = torch.optim.AdamW(model.parameters())
    made = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "empty" in str(func):
                made.append((out.to_local() if isinstance(out, DTensor) else out).nbytes)
            return out

    if not Path(folder, "latest").exists():
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        save_checkpoint(folder, "a", model=model, optimizer=optimizer)
    with Watch():
        load_checkpoint(folder, model=model, optimizer=optimizer)
    return max(made), sum(made)


def test_no_rank_loads_the_optimizer_state_of_all(tmp_path: Path) -> None:
    """DeepSpeed#1111: every process loaded all ranks' optimizer states, and ran out of memory on more GPUs."""
    whole = 12 * 8 * (64 * 64 + 64)
    for largest, total in run_ranks(elements_while_loading, 4, str(tmp_path)):
        assert largest <= 64 * 64 * 4 // 4
        assert total < 0.6 * whole  # what is kept (a quarter) and what is read for it (another)


def module_only(rank: int, world: int, folder: str) -> tuple[list[float], list[float]]:
    run = Run(2, dtype="bf16")
    run.train(4)
    run.save(folder)
    other = Run(2, dtype="bf16", seed=5)
    before = [dict(g) for g in other.optimizer.param_groups]
    other.load(folder, load_optimizer=False)
    assert not other.optimizer.state
    assert [g["lr"] for g in before] == [g["lr"] for g in other.optimizer.param_groups]
    return run.train(1), other.train(1)


def test_a_fresh_optimizer_starts_from_the_loaded_masters(tmp_path: Path) -> None:
    """DeepSpeed PR#4141, PR#762: fp32 masters stayed random when only the module was loaded."""
    first, second = run_ranks(module_only, 2, str(tmp_path))[0]
    assert first == second


# -- names -------------------------------------------------------------------------------------------------------------


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


WRAPPINGS: dict[str, Any] = {
    "none": lambda m: m,
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "checkpoint(compile)": lambda m: checkpoint_wrapper(compiled(m)),
    "compile(checkpoint)": lambda m: compiled(checkpoint_wrapper(m)),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_at_any_depth_leave_no_trace(tmp_path: Path, wrapping: str) -> None:
    """torchtitan#2622, pytorch#101107, pytorch#119980, Lightning#20233: ``_orig_mod`` in the keys of a checkpoint."""

    def model(wrap: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        made = nn.Sequential(wrap(nn.Linear(3, 3)), nn.Sequential(wrap(nn.Linear(3, 3))))
        optimizer = torch.optim.AdamW(made.parameters())
        made(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return wrap(made), optimizer

    saved, optimizer = model(WRAPPINGS[wrapping])
    path = save_checkpoint(tmp_path, "a", model=saved, optimizer=optimizer).path
    names = {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}
    found = set(DirectoryReader(path).contents.tensors.state_dict_metadata)
    assert found == names | {f"optimizer//{n}//{k}" for n in names for k in ("step", "exp_avg", "exp_avg_sq")}
    for other in WRAPPINGS.values():
        target, optimizer = model(other)
        load_checkpoint(tmp_path, model=target, optimizer=optimizer)
        pairs = zip(target.parameters(), saved.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# -- asynchronous saves ------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in the background take 50 ms each."""
    copy = checkpoint_stage._copy

    def slowly(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        copy(*args, **kwargs)

    monkeypatch.setattr(checkpoint_stage, "_copy", slowly)


@pytest.mark.usefixtures("slow")
def test_an_update_right_after_an_asynchronous_save_is_not_in_it(tmp_path: Path) -> None:
    """pytorch#144657, Lightning#20953: a checkpoint with one layer of step 1 and another of step 2."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    expected = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    save_checkpoint(tmp_path, "a", model=model, asynchronous=True)
    optimizer.step()
    load_checkpoint(tmp_path, model=model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


@pytest.mark.usefixtures("slow")
def test_a_load_right_after_an_asynchronous_save_waits_for_it(tmp_path: Path) -> None:
    """torchtitan#930: loading at once failed, as nothing was there yet."""
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, "a", model=model, state={"n": 1}, asynchronous=True)
    assert load_checkpoint(tmp_path, model=model).state == {"n": 1}


@pytest.mark.usefixtures("slow")
def test_latest_moves_when_everything_is_on_the_disk(tmp_path: Path) -> None:
    """KempnerForge#102: ``latest`` named a checkpoint that was still being written. Lightning#688: not atomic."""
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, "a", model=model, state={"n": 1})
    handle = save_checkpoint(tmp_path, "b", model=model, state={"n": 2}, asynchronous=True)
    assert (tmp_path / "latest").read_text().strip() == "a"
    assert not (tmp_path / "b").exists()
    assert load_checkpoint(tmp_path, model=nn.Linear(2, 2)).state == {"n": 1}
    handle.wait()
    assert (tmp_path / "latest").read_text().strip() == "b"
