"""Phases add up to the step; off, nothing is timed; rates are what was trained by the time it took."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from dscompile.engine.timers import Throughput, Timers
from dscompile.errors import RunError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_and_the_rest_are_the_step() -> None:
    clock = Clock()
    timers = Timers(True, clock=clock)
    for _ in range(2):
        for phase, seconds in (("forward", 3.0), ("backward", 5.0), ("forward", 1.0), ("step", 2.0)):
            with timers.timed(phase):
                clock.now += seconds
        clock.now += 0.5
        timers.step_ended()
    found = timers.breakdown()
    assert (found.steps, found.seconds, found.total) == (2, {"forward": 8.0, "backward": 10.0, "step": 4.0}, 23.0)
    assert found.other == 1.0
    assert found.line() == (
        "forward=4000.00 ms, backward=5000.00 ms, step=2000.00 ms, other=500.00 ms, total=11500.00 ms"
    )
    assert timers.breakdown().steps == 0


def test_time_between_steps_counts() -> None:
    clock = Clock()
    timers = Timers(True, clock=clock)
    with timers.timed("step"):
        clock.now += 1
    timers.step_ended()
    timers.breakdown()
    clock.now += 4  # a slow loader
    with timers.timed("step"):
        clock.now += 1
    timers.step_ended()
    found = timers.breakdown()
    assert (found.total, found.other) == (5.0, 4.0)


def test_parts_of_a_real_step_sum_to_it() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(256, 256)
    clock = time.process_time  # what other processes do does not count
    timers = Timers(True, clock=clock)
    began = clock()
    for _ in range(10):
        with timers.timed("forward"):
            loss = model(x).square().mean()
        with timers.timed("backward"):
            loss.backward()
        with timers.timed("step"):
            optimizer.step()
            optimizer.zero_grad()
        timers.step_ended()
    whole = clock() - began
    found = timers.breakdown()
    assert sum(found.seconds.values()) == pytest.approx(found.total, rel=0.05)
    assert found.total == pytest.approx(whole, rel=0.05)


def test_off_nothing_is_timed() -> None:
    def never() -> float:
        raise AssertionError("the clock was read")

    timers = Timers(False, clock=never)
    with timers.timed("forward"):
        pass
    timers.start("backward")
    timers.stop("backward")
    timers.step_ended()
    assert timers.breakdown().seconds == {}
    assert timers.timed("forward") is timers.timed("step")  # one constant for all


def test_phases_do_not_nest() -> None:
    timers = Timers(True)
    with timers.timed("forward"), pytest.raises(RunError, match="'step' begins inside phase 'forward'"):
        timers.start("step")
    timers.start("forward")
    with pytest.raises(RunError, match="'backward' ends, but the phase that began is 'forward'"):
        timers.stop("backward")


def test_rates_leave_the_warmup_out() -> None:
    clock = Clock()
    rates = Throughput(warmup=2, window=2, clock=clock)
    assert rates.overall() == (0.0, 0.0)
    for seconds in (60.0, 1.0, 1.0, 1.0, 4.0):
        clock.now += seconds
        rates.step_ended(samples=8, tokens=80)
    assert rates.overall() == (24 / 6, 240 / 6)
    assert rates.recent() == (16 / 5, 160 / 5)
