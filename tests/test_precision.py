"""Loss scales follow DeepSpeed's two rules; one sweep unscales, measures, checks and clips gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dscompile.errors import ConfigError, RunError, UnsupportedError
from dscompile.precision import LossScaler, finish_gradients


def steps(text: str) -> list[bool]:
    """``O`` is an overflow, ``C`` a clean step."""
    return [letter == "O" for letter in text]


def trace(scaler: LossScaler, overflows: list[bool]) -> list[float]:
    scales = []
    for overflow in overflows:
        assert scaler.update(overflow) is overflow
        scales.append(scaler.scale)
    return scales


@pytest.mark.parametrize(
    ("rule", "options", "letters", "expected"),
    [
        # Stage 0: hysteresis is ignored, each overflow halves, the minimum holds.
        ("fused", {"hysteresis": 3}, steps("OCCCOOOO"), [4, 4, 4, 8, 4, 2, 1, 1]),
        # From the start: the first clean step is number 0, so the scale doubles at numbers 2 and 4.
        ("fused", {}, steps("CCCCC"), [8, 8, 16, 16, 32]),
        # ZeRO: the first overflow only skips; growth restores the allowance, a clean step does not.
        ("zero", {}, steps("OOCCCOCO"), [8, 4, 4, 4, 8, 8, 8, 4]),
        ("zero", {"consecutive_hysteresis": True}, steps("OOCCCOCO"), [8, 4, 4, 4, 8, 8, 8, 8]),
        ("zero", {"hysteresis": 1}, steps("OOCCC"), [4, 2, 2, 2, 4]),
        ("zero", {"hysteresis": 3}, steps("OOOO"), [8, 8, 4, 2]),
        # An overflow that only skips starts the window again, too.
        ("zero", {"hysteresis": 2}, steps("CCOCCC"), [8, 8, 8, 8, 8, 16]),
    ],
)
def test_traces(rule: Any, options: dict[str, Any], letters: list[bool], expected: list[float]) -> None:
    scaler = LossScaler(rule, initial_scale_power=3, loss_scale_window=2, **options)
    assert trace(scaler, letters) == expected


def test_an_overflow_at_the_minimum_is_an_error_under_zero() -> None:
    scaler = LossScaler.for_stage(2, initial_scale_power=1, hysteresis=1)
    assert trace(scaler, steps("O")) == [1]
    with pytest.raises(RunError, match=r"minimum loss scale of 1 .*learning rate"):
        scaler.update(True)


def test_an_overflow_at_the_minimum_is_logged_at_stage_0(caplog: pytest.LogCaptureFixture) -> None:
    scaler = LossScaler.for_stage(0, initial_scale_power=0)
    assert trace(scaler, steps("O")) == [1]
    assert "every such step is skipped" in caplog.text


def test_the_defaults_are_deepspeeds() -> None:
    scaler = LossScaler()
    assert scaler.scale == 65536
    assert trace(scaler, steps("OO")) == [65536, 32768]


def test_a_static_scale_stays_and_still_skips() -> None:
    assert trace(LossScaler(loss_scale=128.0), steps("OOC")) == [128.0] * 3


def test_a_scaler_goes_on_where_it_was_saved() -> None:
    given = steps("OCOCCCOO")
    whole = LossScaler("zero", initial_scale_power=5, loss_scale_window=2)
    expected = trace(whole, given)
    for cut in range(len(given)):
        first = LossScaler("zero", initial_scale_power=5, loss_scale_window=2)
        start = trace(first, given[:cut])
        second = LossScaler("zero", initial_scale_power=5, loss_scale_window=2)
        second.load_state_dict(first.state_dict())
        assert start + trace(second, given[cut:]) == expected


@pytest.mark.parametrize("state", [{}, {**LossScaler().state_dict(), "scale": float("nan")}])
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="loss scaler state"):
        LossScaler().load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_scale": -1.0},
        {"loss_scale": float("inf")},
        {"loss_scale_window": 0},
        {"hysteresis": 0},
        {"min_loss_scale": 0.0},
        {"rule": "other"},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options)).replace("rule", "loss scale rule")):
        LossScaler(**options)


# -- gradients -------------------------------------------------------------------------------------------------------


def given(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameters.append(nn.Parameter(torch.zeros(3) if gradient is None else torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    return parameters


def test_norm_and_clip_are_those_of_torch() -> None:
    values = [torch.randn(7, 5), torch.randn(3), torch.randn(())]
    ours, theirs = given(*[64 * v for v in values]), given(*[v.clone() for v in values])
    expected = float(nn.utils.clip_grad_norm_(theirs, 0.5))
    report = finish_gradients(ours, scale=64.0, max_norm=0.5)
    assert report.norm == pytest.approx(expected, rel=1e-6)
    assert not report.overflow
    assert report.clip_coefficient == pytest.approx(0.5 / (expected + 1e-6), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_norm_below_the_limit_clips_nothing() -> None:
    value = torch.tensor([3.0, 4.0])
    (parameter,) = given(value.clone())
    report = finish_gradients([parameter, parameter], max_norm=6.0)  # given twice, counted once
    assert (report.norm, report.clip_coefficient) == (5.0, 1.0)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, value)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_an_overflow_leaves_gradients_alone(bad: float) -> None:
    parameters = given(torch.ones(3), torch.tensor([1.0, bad]), None)
    report = finish_gradients(parameters, scale=8.0, max_norm=1.0)
    assert report.overflow
    assert report.clip_coefficient == 1.0
    assert parameters[0].grad is not None
    assert torch.equal(parameters[0].grad, torch.ones(3))


def test_the_square_of_a_large_gradient_is_no_overflow() -> None:
    report = finish_gradients(given(torch.full((4,), 1e30)))
    assert not report.overflow
    assert report.norm == pytest.approx(2e30, rel=1e-6)


def test_no_gradients_at_all() -> None:
    report = finish_gradients(given(None, None), max_norm=1.0)
    assert (report.norm, report.overflow, report.clip_coefficient) == (0.0, False, 1.0)


def test_half_precision_gradients_are_measured_in_full() -> None:
    report = finish_gradients(given(torch.full((100,), 60000.0, dtype=torch.float16)))
    assert not report.overflow
    assert report.norm == pytest.approx(10 * 60000, rel=1e-3)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="scale"):
        finish_gradients([], scale=0.0)
    with pytest.raises(ConfigError, match="max_norm"):
        finish_gradients([], max_norm=-1.0)
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        finish_gradients(sparse.parameters())
