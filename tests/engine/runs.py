"""Small runs for the engine's tests: one model, one stream of data, and the same training written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CLASSES, MICRO = 6, 3, 2
LR = 0.05
TIMEOUT = 300  # seconds for two ranks on a loaded machine


def make_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batches(count: int, rank: int = 0, world: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of one rank: consecutive ranks' rows of the same stream."""
    generator = torch.Generator().manual_seed(11)
    result = []
    for _ in range(count):
        x = torch.randn(MICRO * 2, WIDTH, generator=generator)
        y = torch.randint(CLASSES, (MICRO * 2,), generator=generator)
        rows = MICRO * 2 // world
        result.append((x[rank * rows : (rank + 1) * rows], y[rank * rows : (rank + 1) * rows]))
    return result


def config(**more: Any) -> dict[str, Any]:
    """Small and quick: PyTorch's own kernels, nothing on disk."""
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "optimizer": {"type": "Adam", "params": {"lr": LR}},
        "dscompile": {"regions": "aten", "cache": False},
        **more,
    }


def by_hand(steps: int, accumulation: int, clip: float, *, total: bool = False) -> tuple[list[float], list[Tensor]]:
    """Losses of each micro-batch and final parameters of one process on the whole batch, in plain PyTorch.

    ``total``: gradients of two ranks' summed losses.
    """
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for index, (x, y) in enumerate(batches(steps * accumulation)):
        loss = nn.functional.cross_entropy(model(x), y)
        (loss * (2 if total else 1) / accumulation).backward()
        losses.append(loss.item())
        if (index + 1) % accumulation == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses, [p.detach().clone() for p in model.parameters()]


def whole(engine: Any) -> list[Tensor]:
    """The model's parameters, gathered."""
    return [p.full_tensor().detach() for p in engine.module.parameters()]
