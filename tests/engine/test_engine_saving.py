"""Checkpoints through the engine: everything goes on where it was; what would lose something is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import dscompile
from dscompile.errors import CheckpointError, ConfigError, RunError
from tests.engine.runs import TIMEOUT, batches, config, make_model, whole
from tests.ranks import run_ranks

MORE = {
    "fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 20}},
    "zero_optimization": {"stage": 2},
}


@pytest.fixture(autouse=True)
def alone() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


def dataset() -> TensorDataset:
    data = batches(6)
    return TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))


def make(**more: Any) -> Any:
    model = make_model()
    engine, *_ = dscompile.initialize(
        model=model, model_parameters=model.parameters(), training_data=dataset(), config=config(**{**MORE, **more})
    )
    return engine


def train(engine: Any, steps: int) -> list[float]:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.float(), labels)

    return [engine.train_batch(loss_fn=loss).item() for _ in range(steps)]


def test_a_loaded_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Parameters, optimizer, schedule, loss scale, counts and the place in the data."""
    first = make()
    train(first, 3)
    first.scaler.update(True)  # so that the scale is not the first one
    assert first.save_checkpoint(tmp_path, client_state={"note": [1, "two"]})
    expected = train(first, 4)
    second = make()
    path, client_state = second.load_checkpoint(tmp_path)
    assert Path(path) == tmp_path / "global_step3"
    assert client_state == {"note": [1, "two"]}
    assert (second.global_steps, second.micro_steps, second.cur_scale) == (3, 3, 128.0)
    assert train(second, 4) == expected
    assert second.get_lr() == first.get_lr()
    assert all(torch.equal(a, b) for a, b in zip(whole(first), whole(second), strict=True))


def save_on_two(rank: int, world: int, folder: str) -> list[float]:
    engine = make(zero_optimization={"stage": 3}, fp16={"enabled": False})
    train(engine, 2)
    engine.save_checkpoint(folder, tag="two")
    return [engine.eval_batch(iter(batches(1)), loss_fn=nn.functional.cross_entropy).item()]


def test_another_number_of_ranks_and_another_stage_load_it(tmp_path: Path) -> None:
    (expected,), _ = run_ranks(save_on_two, 2, str(tmp_path), timeout=TIMEOUT)
    engine = make(zero_optimization={"stage": 1}, fp16={"enabled": False}, train_micro_batch_size_per_gpu=4)
    engine.load_checkpoint(tmp_path, "two")
    value = engine.eval_batch(iter(batches(1)), loss_fn=nn.functional.cross_entropy).item()
    assert value == pytest.approx(expected, rel=1e-6)
    assert engine.global_steps == 2


def test_the_model_alone_can_be_loaded(tmp_path: Path) -> None:
    first = make()
    train(first, 2)
    first.save_checkpoint(tmp_path)
    second = make()
    second.load_checkpoint(tmp_path, load_module_only=True)
    assert all(torch.equal(a, b) for a, b in zip(whole(first), whole(second), strict=True))
    assert (second.global_steps, second.optimizer.state_dict()["state"]) == (0, {})


def test_nothing_to_load_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make()
    assert engine.load_checkpoint(tmp_path / "absent") == (None, {})
    assert "holds no checkpoint: nothing was loaded" in caplog.text
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(tmp_path, "absent")


def test_an_open_window_is_not_saved(tmp_path: Path) -> None:
    engine = make(gradient_accumulation_steps=2)
    x, y = batches(1)[0]
    engine.backward(nn.functional.cross_entropy(engine(x).float(), y))
    engine.step()
    with pytest.raises(RunError, match="after 1 of 2 micro-batches"):
        engine.save_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="save_latest=False"):
        engine.save_checkpoint(tmp_path, save_latest=False)
    assert list(tmp_path.iterdir()) == []


def other_tags(rank: int, world: int, folder: str, mode: str) -> str:
    engine = make(checkpoint={"tag_validation": mode})
    try:
        engine.save_checkpoint(folder, tag=f"tag{rank}")
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_ranks_with_different_tags(tmp_path: Path) -> None:
    first, second = run_ranks(other_tags, 2, str(tmp_path), "Fail", timeout=TIMEOUT)
    assert first == second
    assert "rank 0 saves under the tag 'tag0' and rank 1 under 'tag1'" in first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("allowed", [True, False])
def test_the_model_in_half_precision_is_one_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, allowed: bool
) -> None:
    stage = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": allowed}
    engine = make(zero_optimization=stage)
    assert engine.save_16bit_model(tmp_path / "new", "model.bin") == allowed
    if not allowed:
        assert "not saved" in caplog.text
        return
    loaded = torch.load(tmp_path / "new" / "model.bin", weights_only=True)
    expected = {name: value.half() for name, value in make_model().state_dict().items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
