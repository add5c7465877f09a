"""Each value of DeepSpeed's schedules by its formula, written here a second time."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

from dscompile.engine.schedules import SCHEDULES, create_schedule
from dscompile.errors import ConfigError, UnsupportedError


def optimizer(*rates: float, cls: Any = torch.optim.AdamW, **more: Any) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates or (0.5,)]
    return cls(groups, **more)


def trace(kind: str, steps: int, arguments: dict[str, Any], opt: torch.optim.Optimizer | None = None) -> list[float]:
    """The rate that optimizer step 0, 1, ... runs with."""
    opt = opt or optimizer()
    schedule = create_schedule(kind, opt, arguments)
    found = []
    for _ in range(steps):
        found.append(opt.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [group["lr"] for group in opt.param_groups]
        schedule.step()
    return found


def test_warmup_is_logarithmic_by_default() -> None:
    low, high, warm = 0.1, 0.9, 8
    found = trace("WarmupLR", 14, {"warmup_min_lr": low, "warmup_max_lr": high, "warmup_num_steps": warm})
    expected = [low]  # step 0 runs before the schedule's first call
    for i in range(13):
        expected.append(low + (high - low) * (math.log(i + 1) / math.log(warm) if i < warm else 1.0))
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[1] == low  # log(1) = 0
    assert found[8] == pytest.approx(high)  # i = 7: log(8) / log(8)


def test_linear_warmup() -> None:
    found = trace(
        "WarmupLR", 8, {"warmup_max_lr": 1.0, "warmup_num_steps": 4, "warmup_type": "linear", "warmup_min_lr": 0}
    )
    assert found == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_warmup_ends_at_the_first_groups_rate_unless_told() -> None:
    opt = optimizer(0.4, 0.2)
    schedule = create_schedule("WarmupLR", opt, {"warmup_num_steps": 2})
    for _ in range(5):
        schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [0.4, 0.4]  # as DeepSpeed's code does


def test_warmup_lasts_at_least_two_steps() -> None:
    found = trace("WarmupLR", 4, {"warmup_max_lr": 1.0, "warmup_num_steps": 1})
    assert found == pytest.approx([0, 0, 1, 1])  # log(2) / log(2) at i = 1, where one step would divide by log(1)


def test_warmup_decay() -> None:
    total, warm = 12, 4
    found = trace("WarmupDecayLR", 16, {"total_num_steps": total, "warmup_num_steps": warm, "warmup_type": "linear"})
    expected = [0.0, 0, 0.00025, 0.0005, 0.00075]
    expected += [0.001 * (total - i) / (total - warm) for i in range(4, 12)]  # the default peak is 0.001
    assert found == pytest.approx([*expected, 0, 0, 0], abs=1e-15)


def test_warmup_cosine_scales_each_groups_own_rate() -> None:
    total, warm, start, end = 20, 4, 0.1, 0.05
    arguments = {
        "total_num_steps": total,
        "warmup_num_steps": warm,
        "warmup_min_ratio": start,
        "cos_min_ratio": end,
    }
    opt = optimizer(2.0, 1.0)
    found = trace("WarmupCosineLR", 30, arguments, opt)
    expected = [0.0]
    for i in range(29):
        if i < warm:
            ratio = start + (1 - start) * math.log(i + 1) / math.log(warm)
        else:
            p = min(1.0, (i - warm + 1) / (total - warm))
            ratio = end + (1 - end) * (1 + math.cos(math.pi * p)) / 2
        expected.append(2.0 * ratio)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[-1] == pytest.approx(0.1)  # stays down, does not come up again
    assert opt.param_groups[1]["lr"] == pytest.approx(opt.param_groups[0]["lr"] / 2)


@pytest.mark.parametrize("staircase", [False, True])
def test_range_test(staircase: bool) -> None:
    arguments = {
        "lr_range_test_min_lr": 0.01,
        "lr_range_test_step_size": 4,
        "lr_range_test_step_rate": 3.0,
        "lr_range_test_staircase": staircase,
    }
    found = trace("LRRangeTest", 13, arguments)
    steps = [n // 4 if staircase else n / 4 for n in range(13)]
    assert found == pytest.approx([0.01 * (1 + 3.0 * x) for x in steps])


def one_cycle(**more: Any) -> dict[str, Any]:
    return {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, **more}


def momenta(steps: int, arguments: dict[str, Any]) -> list[tuple[float, float]]:
    opt = optimizer()
    schedule = create_schedule("OneCycle", opt, arguments)
    found = []
    for _ in range(steps):
        found.append(opt.param_groups[0]["betas"])
        schedule.step()
    return found


def test_one_cycle_is_a_triangle_then_an_inverse_decay() -> None:
    arguments = one_cycle(cycle_second_step_size=8, decay_step_size=2, decay_lr_rate=0.5)
    found = trace("OneCycle", 17, arguments)
    rising = [0.1 + 0.4 * n / 4 for n in range(5)]
    falling = [0.5 - 0.4 * n / 8 for n in range(1, 9)]
    decay = [0.1 / (1 + 0.5 * k / 2) for k in range(1, 5)]
    assert found == pytest.approx([*rising, *falling, *decay])


def test_one_cycle_is_not_torchs() -> None:
    opt = optimizer()
    theirs = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=8)
    values = []
    for _ in range(8):
        values.append(opt.param_groups[0]["lr"])
        opt.step()
        theirs.step() if len(values) < 8 else None
    assert trace("OneCycle", 8, one_cycle()) != pytest.approx(values, rel=0.05)


def test_one_cycle_mirrors_momentum_and_forces_the_second_beta() -> None:
    found = momenta(11, one_cycle(decay_step_size=2, decay_mom_rate=0.1))
    first = [0.8]  # before the first step(): the smallest, as DeepSpeed's code has it
    first += [0.9 - 0.1 * n / 4 for n in range(1, 5)] + [0.8 + 0.1 * n / 4 for n in range(1, 5)]
    first += [0.9 * (1 + 0.1 * k / 2) for k in range(1, 3)]
    assert [b for b, _ in found] == pytest.approx(first)
    assert {b for _, b in found} == {0.99}


def test_one_cycle_without_decay_stays_at_its_ends() -> None:
    assert trace("OneCycle", 12, one_cycle(decay_lr_rate=0.5))[9:] == pytest.approx([0.1] * 3)
    assert [b for b, _ in momenta(12, one_cycle(decay_mom_rate=0.5))][9:] == pytest.approx([0.9] * 3)


def test_one_cycle_stairs() -> None:
    found = trace("OneCycle", 9, one_cycle(cycle_first_stair_count=2))
    assert found == pytest.approx([0.1, 0.1, 0.3, 0.3, 0.5, 0.3, 0.3, 0.1, 0.1])


def test_one_cycle_leaves_momentum_alone() -> None:
    opt = optimizer()
    create_schedule("OneCycle", opt, one_cycle(cycle_momentum=False)).step()
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)


def test_one_cycle_says_that_an_optimizer_has_no_betas(caplog: pytest.LogCaptureFixture) -> None:
    opt = optimizer(cls=torch.optim.SGD, momentum=0.9)
    with caplog.at_level(logging.WARNING):
        create_schedule("OneCycle", opt, one_cycle()).step()
    assert "SGD has no betas" in caplog.text
    assert "betas" not in opt.param_groups[0]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_num_steps": 4},
    "WarmupDecayLR": {"warmup_num_steps": 4, "total_num_steps": 12},
    "WarmupCosineLR": {"warmup_num_steps": 4, "total_num_steps": 12},
    "LRRangeTest": {"lr_range_test_step_size": 3},
    "OneCycle": one_cycle(),
}


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_a_loaded_state_goes_on_with_the_same_values(kind: str) -> None:
    whole = trace(kind, 12, ARGUMENTS[kind], optimizer(0.5, 0.25))
    one = create_schedule(kind, optimizer(0.5, 0.25), ARGUMENTS[kind])
    for _ in range(5):
        one.step()
    state = one.state_dict()
    opt = optimizer(0.5, 0.25)
    other = create_schedule(kind, opt, ARGUMENTS[kind])
    other.load_state_dict(state)
    rest = []
    for _ in range(7):
        rest.append(opt.param_groups[0]["lr"])
        other.step()
    assert rest == whole[5:]


def test_values_for_each_group_and_their_number() -> None:
    opt = optimizer(0.5, 0.5)
    schedule = create_schedule("WarmupLR", opt, {"warmup_max_lr": [1.0, 2.0], "warmup_num_steps": 2})
    for _ in range(4):
        schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [1.0, 2.0]
    with pytest.raises(ConfigError, match=r"warmup_max_lr has 3 values for 2 parameter group"):
        create_schedule("WarmupLR", opt, {"warmup_max_lr": [1.0, 2.0, 3.0]})


def test_a_tensor_rate_is_written_in_place() -> None:
    opt = optimizer(cls=torch.optim.AdamW, lr=0.5)
    rate = opt.param_groups[0]["lr"] = torch.tensor(0.5)
    schedule = create_schedule("WarmupLR", opt, {"warmup_num_steps": 4, "warmup_type": "linear"})
    for _ in range(3):
        schedule.step()
    assert opt.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.25)


def test_torchs_schedules_by_name() -> None:
    assert trace("StepLR", 5, {"step_size": 2, "gamma": 0.1}) == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "said"),
    [
        ("WarmupLr2", {}, ConfigError, "Did you mean 'WarmupLR'"),
        (3, {}, ConfigError, "must be a string"),
        ("WarmupLR", {"warmup_steps": 3}, ConfigError, "'warmup_steps'. Did you mean 'warmup_num_steps'"),
        ("WarmupLR", {"optimizer": 3}, ConfigError, "unknown parameter 'optimizer'"),
        ("WarmupLR", {"warmup_num_steps": 0}, ConfigError, "warmup_num_steps must be a positive whole number, got 0"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, ConfigError, "2.5"),
        ("WarmupLR", {"warmup_num_steps": math.inf}, ConfigError, "a positive whole number, got inf"),
        ("OneCycle", one_cycle(cycle_first_stair_count="2"), ConfigError, "scheduler OneCycle"),
        ("WarmupLR", {"warmup_type": "lin"}, ConfigError, "Did you mean 'linear'"),
        ("WarmupLR", {"warmup_max_lr": "auto"}, ConfigError, "warmup_max_lr must be a finite number, got 'auto'"),
        ("WarmupDecayLR", {}, ConfigError, "total_num_steps"),
        ("OneCycle", {"cycle_min_lr": 0.1}, ConfigError, "cycle_max_lr"),
        ("LambdaLR", {}, UnsupportedError, "it needs a Python function"),
        ("ReduceLROnPlateau", {}, UnsupportedError, "measured value"),
        ("StepLR", {"step_sizes": 3}, ConfigError, "Did you mean 'step_size'"),
    ],
)
def test_what_a_file_can_say_wrong(kind: Any, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        create_schedule(kind, optimizer(), arguments)
    assert said in str(caught.value)


def test_a_foreign_state_is_refused() -> None:
    schedule = create_schedule("WarmupLR", optimizer(), {})
    with pytest.raises(ConfigError, match="no last_batch_iteration"):
        schedule.load_state_dict({"step": 3})
