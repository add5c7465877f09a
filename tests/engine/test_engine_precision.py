"""bf16, fp16 and autocast through the engine: the loss scale, what is skipped, and who agrees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dscompile
from dscompile.errors import RunError
from tests.engine.runs import TIMEOUT, batches, by_hand, config, make_model, whole
from tests.ranks import run_ranks

FP16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}


@pytest.fixture(autouse=True)
def alone() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


def make(**more: Any) -> Any:
    model = make_model()
    return dscompile.initialize(model=model, model_parameters=model.parameters(), config=config(**more))


def loss_of(engine: Any, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return nn.functional.cross_entropy(engine(x).float(), y) * factor


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("half", [{"bf16": {"enabled": True}}, {"fp16": FP16}], ids=["bf16", "fp16"])
def test_half_precision_stays_near_fp32(half: dict[str, Any], stage: int) -> None:
    """The masters and the returned optimizer's parameters are fp32; outputs are in half precision."""
    engine, optimizer, *_ = make(**half, zero_optimization={"stage": stage}, gradient_clipping=0)
    losses = []
    for x, y in batches(4):
        losses.append(loss_of(engine, x, y).item())
        engine.backward(loss_of(engine, x, y))
        engine.step()
    dtype = torch.bfloat16 if "bf16" in half else torch.float16
    assert engine(batches(1)[0][0]).dtype is dtype
    assert {p.dtype for p in optimizer.param_groups[0]["params"]} == {torch.float32}
    assert engine.bfloat16_enabled() == ("bf16" in half)
    assert engine.fp16_enabled() == ("fp16" in half)
    assert engine.skipped_steps == 0
    expected, _ = by_hand(4, 1, 0)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != pytest.approx(expected, rel=1e-7)  # it did compute in half precision


def test_an_overflow_skips_the_step_and_the_schedule() -> None:
    """By hand: scale 256, an overflow halves it (hysteresis 1), and nothing else changes."""
    engine, optimizer, _, scheduler = make(
        fp16=FP16,
        zero_optimization={"stage": 2},
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 0.1, "warmup_num_steps": 9}},
    )
    (x, y), (x2, y2) = batches(2)
    engine.backward(loss_of(engine, x, y))
    engine.step()
    before, rate, state = whole(engine), engine.get_lr(), optimizer.state_dict()["state"][0]["step"].clone()
    engine.backward(loss_of(engine, x2, y2, factor=1e8))
    engine.step()
    assert (engine.global_steps, engine.skipped_steps, engine.was_step_applied()) == (2, 1, False)
    assert engine.cur_scale == 128.0
    assert all(torch.equal(a, b) for a, b in zip(before, whole(engine), strict=True))
    assert engine.get_lr() == rate
    assert torch.equal(optimizer.state_dict()["state"][0]["step"], state)
    engine.backward(loss_of(engine, x2, y2))
    engine.step()
    assert engine.was_step_applied()
    assert engine.get_lr() != rate
    assert scheduler is engine.lr_scheduler


def overflow_on_one(rank: int, world: int) -> tuple[int, float, bool]:
    engine, *_ = make(fp16=FP16, zero_optimization={"stage": 3})
    before = whole(engine)
    x, y = batches(1, rank, world)[0]
    engine.backward(loss_of(engine, x, y, factor=1e8 if rank == 1 else 1.0))
    engine.step()
    same = all(torch.equal(a, b) for a, b in zip(before, whole(engine), strict=True))
    return engine.skipped_steps, engine.cur_scale, same


def test_an_overflow_on_one_rank_skips_on_all() -> None:
    assert run_ranks(overflow_on_one, 2, timeout=TIMEOUT) == [(1, 128.0, True)] * 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_scaling_by_hand_is_the_same(accumulation: int) -> None:
    """``engine.scale(loss).backward()`` and ``engine.backward(loss)``."""
    results = []
    for style in ("engine", "scale"):
        engine, optimizer, *_ = make(fp16=FP16, gradient_accumulation_steps=accumulation)
        for x, y in batches(2 * accumulation):
            loss = loss_of(engine, x, y)
            if style == "engine":
                engine.backward(loss)
            else:
                engine.scale(loss).backward()
            engine.step()
        assert engine.global_steps == 2
        results.append(whole(engine))
        del optimizer
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # the division by 2 is at another place


def test_a_plain_backward_without_the_scale_is_an_error() -> None:
    engine, *_ = make(fp16=FP16)
    x, y = batches(1)[0]
    with pytest.raises(RunError, match="without the loss scale, which fp16 needs"):
        loss_of(engine, x, y).backward()


def test_a_static_scale_stays() -> None:
    engine, *_ = make(fp16={"enabled": True, "loss_scale": 64})
    assert (engine.loss_scale(), engine.cur_scale, engine.dynamic_loss_scale()) == (64.0, 64.0, False)
    x, y = batches(1)[0]
    engine.backward(loss_of(engine, x, y, factor=1e9))
    engine.step()
    assert (engine.skipped_steps, engine.cur_scale) == (1, 64.0)


def test_the_minimum_scale_is_an_error_under_zero() -> None:
    engine, *_ = make(fp16={**FP16, "initial_scale_power": 0}, zero_optimization={"stage": 1})
    x, y = batches(1)[0]
    engine.backward(loss_of(engine, x, y, factor=float("inf")))
    with pytest.raises(RunError, match="minimum loss scale"):
        engine.step()


def test_bf16_skips_what_is_not_finite_unless_told_not_to() -> None:
    x, y = batches(1)[0]
    for check in (True, False):
        engine, *_ = make(bf16={"enabled": True, "check_grad_overflow": check})
        engine.backward(loss_of(engine, x, y, factor=float("nan")))
        engine.step()
        assert engine.skipped_steps == check
        assert all(p.isfinite().all() for p in whole(engine)) == check


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_autocast_keeps_fp32_parameters(dtype: str) -> None:
    engine, *_ = make(
        torch_autocast={"enabled": True, "dtype": dtype}, fp16={"initial_scale_power": 6}, gradient_clipping=0
    )
    assert (engine.scaler is not None) == (dtype == "fp16")
    assert engine.cur_scale == (64.0 if dtype == "fp16" else 1.0)
    losses = []
    for x, y in batches(3):
        out = engine(x)
        assert out.dtype is (torch.bfloat16 if dtype == "bf16" else torch.float16)
        loss = nn.functional.cross_entropy(out.float(), y)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    assert losses == pytest.approx(by_hand(3, 1, 0)[0], rel=2e-2)
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
