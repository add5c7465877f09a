"""Training of the main job's model in 16 bits ends where training in fp32 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dscompile
from dscompile.engine.host_adam import HostAdamW, HostStep, keep_reduced_gradients
from dscompile.precision import LossScaler, finish_gradients
from dscompile.tools.data import Batches, load_corpus
from dscompile.tools.gpt import GPT, SIZES, GPTConfig
from dscompile.tools.train import LR_TIMES_WIDTH
from dscompile.tools.training import CLIP, learning_rate, parameter_groups
from tests.ranks import run_ranks

TEXT = Path(__file__).parents[2] / "docs"
SMALL = GPTConfig(vocab=256, layers=1, width=32, heads=2, context=16)


Case = tuple[str, int, type[torch.optim.AdamW]]
"""Compute dtype, ZeRO stage, optimizer; the engine itself makes ``HostAdamW`` of larger models only."""

TORCHS, OURS = torch.optim.AdamW, HostAdamW


def losses(
    rank: int,
    world: int,
    name: str,
    stage: int,
    adam: type[torch.optim.AdamW],
    steps: int,
    config: GPTConfig,
    ids: Any,
    batch: int,
    regions: str,
) -> tuple[list[float], int]:
    """The loss of every step over all ranks, and how many steps an overflow skipped."""
    torch.manual_seed(0)
    options = {"zero": {"stage": stage}, "precision": {"param_dtype": name}, "cache": False, "summary": False}
    model = dscompile.distribute(GPT(config), config=options)
    run = torch.compile(model, backend="dscompile", options={"regions": regions})
    fused = {} if adam is OURS else {"fused": True}
    optimizer = adam(parameter_groups(model), lr=1.0, betas=(0.9, 0.95), **fused)
    if isinstance(optimizer, HostStep):
        keep_reduced_gradients(optimizer, accumulation=1)
    scaler = LossScaler.for_stage(stage, loss_scale=0.0 if name == "fp16" else 1.0)
    batches = Batches(ids, batch=batch, context=config.context, seed=0)
    found, skipped = [], 0
    for step in range(steps):
        inputs, targets = (part.chunk(world)[rank] for part in batches(step))
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(step, steps, LR_TIMES_WIDTH / config.width)
        loss = run(inputs, targets)
        (loss * scaler.scale).backward()
        folded = isinstance(optimizer, HostStep)
        report = finish_gradients(model.parameters(), scale=scaler.scale, max_norm=CLIP, in_place=not folded)
        if isinstance(optimizer, HostStep):
            optimizer.gradient_factor = report.factor
            kept = {p.grad.dtype for p in model.parameters() if p.grad is not None}
            assert kept == {torch.bfloat16 if name == "bf16" else torch.float16}  # else it is not what is tried here
        if scaler.update(report.overflow):
            skipped += 1
        else:
            optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        found.append(float(total) / world)
    return found, skipped


def end(values: list[float], last: int) -> float:
    return sum(values[-last:]) / last


def several(rank: int, world: int, cases: list[Case], *args: Any) -> list[tuple[list[float], int]]:
    return [losses(rank, world, *case, *args) for case in cases]


def test_a_short_run_ends_within_one_per_cent() -> None:
    ids = load_corpus(TEXT, SMALL.vocab).train
    cases = [("fp32", 3, TORCHS), ("bf16", 3, TORCHS), ("fp16", 1, OURS)]
    whole, brain, half = run_ranks(several, 2, cases, 30, SMALL, ids, 8, "aten", timeout=300)[0]
    assert end(whole[0], 5) < 0.95 * whole[0][0]  # it learns
    for found, _ in (brain, half):
        assert end(found, 5) == pytest.approx(end(whole[0], 5), rel=0.01)
    assert half[1] <= 3  # the scale finds its place


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_200_steps_end_within_one_per_cent(stage: int) -> None:
    config = SIZES["gpt-500k"]
    ids = load_corpus(None, config.vocab).train
    cases = [("fp32", stage, TORCHS), *((name, stage, adam) for name in ("bf16", "fp16") for adam in (TORCHS, OURS))]
    whole, *halves = run_ranks(several, 2, cases, 200, config, ids, 8, "auto", timeout=1800)[0]
    assert end(whole[0], 10) < 0.8 * whole[0][0]
    for case, (found, skipped) in zip(cases[1:], halves, strict=True):
        assert end(found, 10) == pytest.approx(end(whole[0], 10), rel=0.01), case
        assert skipped <= 10, case
