"""What LAMB is for: eight times the batch at eight times the rate learns as much from equal samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dscompile.engine.lamb import Lamb

SAMPLES, HELD_OUT, EPOCHS, NOISE = 12800, 2000, 4, 0.3


def task() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs and targets of a random network with noise: to train on, and held out."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        for param in teacher.parameters():
            param.mul_(2)
        x = torch.randn(SAMPLES + HELD_OUT, 16)
        y = teacher(x) + NOISE * torch.randn(len(x), 1)
    return x[:SAMPLES], y[:SAMPLES], x[SAMPLES:], y[SAMPLES:]


def held_out_loss(batch: int, lr: float) -> float:
    """After the same samples in batches of any size: a warm-up over a tenth of the steps, then down to 0."""
    x, y, x_held, y_held = task()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = Lamb(model.parameters(), lr=lr)
    steps = EPOCHS * SAMPLES // batch
    for step in range(steps):
        warmup = steps // 10
        share = min((step + 1) / warmup, 1) * (1 - max(0, step - warmup) / (steps - warmup + 1))
        optimizer.param_groups[0]["lr"] = lr * share
        rows = torch.arange(step * batch, (step + 1) * batch) % SAMPLES
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return float((model(x_held) - y_held).square().mean())


@pytest.mark.slow
def test_eight_times_the_batch_and_the_rate() -> None:
    small = held_out_loss(32, 3e-3)
    assert small < 0.15  # of which NOISE ** 2 = 0.09 cannot be learnt
    assert held_out_loss(256, 8 * 3e-3) <= 1.05 * small
    assert held_out_loss(256, 3e-3) > 2 * small  # without the higher rate it would not
