"""What a checkpoint holds: names, bytes, and every kind of state."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import dscompile
from dscompile.engine.checkpoint import load_checkpoint, save_checkpoint
from dscompile.engine.checkpoint_files import DirectoryReader, DirectoryWriter
from dscompile.engine.checkpoint_format import decode, encode
from dscompile.errors import CheckpointError
from tests.engine.checkpoint_runs import Net, Run, make_optimizer
from tests.ranks import run_ranks

KINDS = (
    "AdamW",
    "Adam",
    "SGD",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "ASGD",
)  # Rprop cannot run on DTensors (torch 2.13: it indexes with a mask)
NAMES = {
    "embedding.weight", "up.weight", "up.bias", "down.weight", "down.bias", "frozen.weight", "frozen.bias",
    "unused.weight", "unused.bias", "scale", "seen",
}  # fmt: skip


def keys(folder: Path) -> dict[str, Any]:
    _, body = (folder / "checkpoint.json").read_bytes().split(b"\n", 1)
    return json.loads(body)["tensors"]


def test_names_are_plain_and_each_tensor_is_stored_once(tmp_path: Path) -> None:
    run = Run(None)
    run.train(1)
    run.save(tmp_path)
    names = [k for k in keys(tmp_path / "step_1") if "//" not in k]
    assert sorted(names) == sorted(NAMES)
    trained = NAMES - {"frozen.weight", "frozen.bias", "unused.weight", "unused.bias", "seen"}
    states = {k for k in keys(tmp_path / "step_1") if k.startswith("optimizer//")}
    assert states == {f"optimizer//{n}//{k}" for n in trained for k in ("step", "exp_avg", "exp_avg_sq")}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(nn.Linear(2, 3), backend="eager")
        self.module = nn.Linear(3, 2)  # a user's own name


def wrapped(rank: int, world: int, folder: str) -> list[str]:
    model = torch.compile(nn.parallel.DistributedDataParallel(Nested()), backend="eager")
    save_checkpoint(folder, "a", model=model)
    return sorted(keys(Path(folder, "a")))


def test_wrappers_leave_no_prefix(tmp_path: Path) -> None:
    assert run_ranks(wrapped, 2, str(tmp_path))[0] == ["inner.bias", "inner.weight", "module.bias", "module.weight"]
    target = Nested()
    load_checkpoint(tmp_path, model=target)  # and an unwrapped one takes it


def adam_bytes(rank: int, world: int, folder: str) -> int:
    model = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 301))
    dscompile.distribute(model, config={"zero": {"stage": rank * 0 + 2}})
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    save_checkpoint(folder, "a", model=model, optimizer=optimizer)
    return sum(p.numel() for p in model.parameters())


def test_stores_twelve_bytes_a_parameter(tmp_path: Path) -> None:
    count = run_ranks(adam_bytes, 2, str(tmp_path))[0]
    data = [p.stat().st_size for p in tmp_path.glob("a/*.bin")]
    assert len(data) == 2
    assert 12 * count <= sum(data) <= 12 * count + 4 * 4  # four step counts
    assert max(data) - min(data) < 12 * count * 0.01, "each rank writes its part"
    everything = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert everything < 12 * count + 40_000  # two ranks' random states


def optimizers(rank: int, world: int, folder: str, stage: int) -> dict[str, list[float]]:
    """Losses after a load that differ from those of going on, by optimizer; "" if none."""
    wrong = {}
    for kind in KINDS:
        run = Run(stage, kind)
        run.train(3)
        run.save(folder, kind)
        expected = run.train(3)
        other = Run(stage, kind, seed=1)
        other.load(folder, kind)
        found = other.train(3)
        if found != expected:
            wrong[kind] = [*expected, *found]
    return wrong


@pytest.mark.parametrize("stage", [1, 3])
def test_every_elementwise_optimizer_goes_on_bit_for_bit(tmp_path: Path, stage: int) -> None:
    assert run_ranks(optimizers, 2, str(tmp_path), stage, timeout=120) == [{}, {}]


def test_amsgrad_and_tensor_options_go_on(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        rate = torch.tensor(0.01 * (seed + 1))
        return model, torch.optim.AdamW(model.parameters(), lr=rate, amsgrad=True, betas=(0.8, 0.9), foreach=False)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(3):
            loss = model(torch.ones(2, 4)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    model, optimizer = made(0)
    go(model, optimizer)
    save_checkpoint(tmp_path, "a", model=model, optimizer=optimizer)
    expected = go(model, optimizer)
    model, optimizer = made(1)
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert go(model, optimizer) == expected


def test_groups_are_matched_by_name_not_by_order(tmp_path: Path) -> None:
    run = Run(None)
    run.train(2)
    run.save(tmp_path)
    expected = run.train(3)
    other = Run(None, seed=3)
    groups = [{**g, "params": list(reversed(g["params"]))} for g in reversed(other.optimizer.param_groups)]
    half = groups[1].pop("params")
    groups[1:] = [{**groups[1], "params": half[:1]}, {**groups[1], "params": half[1:], "weight_decay": 9.0}]
    other.optimizer = torch.optim.AdamW(groups)
    load_checkpoint(tmp_path, model=other.model, optimizer=other.optimizer)
    assert [g["weight_decay"] for g in other.optimizer.param_groups] == [0.0, 0.1, 0.1]
    other.step = 2
    other.schedule = torch.optim.lr_scheduler.LambdaLR(other.optimizer, lambda _: 1.0)
    for group, rate in zip(other.optimizer.param_groups, (3e-3, 1e-2, 1e-2), strict=True):
        assert group["lr"] == rate
        group["lr"] = rate
    losses = other.train(1)
    assert losses == pytest.approx(expected[:1], rel=1e-6)


def test_joining_groups_with_different_options_is_refused(tmp_path: Path) -> None:
    run = Run(None)
    run.train(1)
    run.save(tmp_path)
    one = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
    with pytest.raises(CheckpointError, match="group 0 joins groups 0, 1 of the saved one"):
        load_checkpoint(tmp_path, model=run.model, optimizer=one)
    other = make_optimizer("SGD", run.model)
    with pytest.raises(CheckpointError, match="saved with AdamW, not SGD"):
        load_checkpoint(tmp_path, model=run.model, optimizer=other)


STATE = {
    "none": None,
    "numbers": [1, -(2**70), 0.1, math.inf, True],
    "tuple": (1, (2.5, "x")),
    "bytes": b"\x00\xff",
    "$odd": {1: "a", (2, 3): "b", "$tensor": 4},
    "counter": Counter({3: 1, 8: 2}),
    "tensor": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "nested": {"scale": torch.tensor(65536.0), "empty": torch.empty(0, 3), "flags": torch.tensor([True, False])},
    "a.b": torch.tensor(1),
    "a": {"b": torch.tensor(2)},
    "numpy": numpy.float64(0.25),
}


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, "a", model=model, state=STATE)
    found = load_checkpoint(tmp_path, model=model).state
    assert list(found) == list(STATE)
    for key, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value)
        elif key in ("nested", "a"):
            assert all(torch.equal(found[key][k], v) and found[key][k].dtype == v.dtype for k, v in value.items())
        else:
            assert found[key] == value
            assert type(found[key]) is (float if key == "numpy" else type(value))
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan, "x", {}))), {}))


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float32, lambda: 0, numpy.zeros(2), {torch.tensor(1): 2}])
def test_state_of_other_kinds_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state//a\.0"):
        save_checkpoint(tmp_path, "a", model=nn.Linear(1, 1), state={"a": [value]})
    assert not list(tmp_path.iterdir())


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(())), float(torch.randn(()))]


def rng(rank: int, world: int, folder: str, save: bool) -> tuple[list[float], list[float], bool]:
    model = nn.Linear(2, 2)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(11 * rank + 5)
    torch.randn(3)  # an odd number: a normal value is kept for the next call
    if save:
        save_checkpoint(folder, "a", model=model)
        return draws(), draws(), True
    exact = load_checkpoint(folder, model=model).exact_rng
    return draws(), draws(), exact


def test_random_state_is_each_ranks_own(tmp_path: Path) -> None:
    saved = run_ranks(rng, 2, str(tmp_path), True)
    assert saved[0] != saved[1]
    assert run_ranks(rng, 2, str(tmp_path), False) == saved
    derived = run_ranks(rng, 3, str(tmp_path), False)
    assert derived == run_ranks(rng, 3, str(tmp_path), False)
    assert len({d[0][0] for d in derived} | {s[0][0] for s in saved}) == 5
    assert not any(d[2] for d in derived)


def test_a_tie_that_the_model_no_longer_has_is_found_under_its_other_name(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            shared = nn.Parameter(torch.randn(3))
            for name in names:
                self.register_parameter(name, shared)

    first = Pair("ab")
    save_checkpoint(tmp_path, "a", model=first)
    for names in ("ba", "b", "a", "ab"):
        other = Pair(names)
        load_checkpoint(tmp_path, model=other)
        assert torch.equal(next(other.parameters()), first.a)


def test_not_strict_loads_what_is_common_and_says_what_was_not(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_checkpoint(tmp_path, "a", model=model)
    other = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    loaded = load_checkpoint(tmp_path, model=other, strict=False)
    assert loaded.missing == ("2.weight", "2.bias")
    assert loaded.unused == ("1.weight", "1.bias")
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(CheckpointError, match=r"0\.weight is \[3, 2\] here and \[2, 2\] there"):
        load_checkpoint(tmp_path, model=nn.Sequential(nn.Linear(2, 3)), strict=False)


def test_saving_leaves_the_model_picklable(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, "a", model=model, asynchronous=True).wait()
    assert torch.equal(pickle.loads(pickle.dumps(model)).weight, model.weight)


def through_dcp(rank: int, world: int, folder: str) -> bool:
    torch.manual_seed(0)
    model = Net()
    expected = model.up.weight.detach().clone()
    dscompile.distribute(model, config={"zero": {"stage": 3}})
    weight = dict(model.named_parameters())["up.weight"]
    if rank == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    dcp.save({"up.weight": weight.detach()}, storage_writer=DirectoryWriter(folder))
    back = torch.zeros_like(expected)
    dcp.load({"up.weight": back}, storage_reader=DirectoryReader(folder))
    return torch.equal(back, expected)


def test_files_fit_pytorchs_own_save_and_load(tmp_path: Path) -> None:
    assert run_ranks(through_dcp, 2, str(tmp_path / "a")) == [True, True]


def test_a_save_in_the_middle_of_an_accumulation_window_is_refused(tmp_path: Path) -> None:
    assert all("middle of an accumulation window" in text for text in run_ranks(mid_window, 2, str(tmp_path)))
    assert not list(tmp_path.iterdir())


def mid_window(rank: int, world: int, folder: str) -> str:
    model = dscompile.distribute(nn.Linear(2, 2), config={"zero": {"stage": 1}})
    with dscompile.no_sync(model):
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(CheckpointError) as found:
        save_checkpoint(folder, "a", model=model)
    return str(found.value)
