"""A small GPT learns through the rewrite pass what dense attention learns, if the layout holds what the task needs.

The first block of a sequence repeats one token, the header; half of the later tokens ask for it, the others for
themselves. A fifth of the labels is random, so both models end near the entropy of that noise, and their losses can be
compared. A BigBird layout lets every block see the first; a sliding window does not, and must fail.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from dscompile.report import REPORTS
from dscompile.tools.gpt import GPT, GPTConfig

KINDS = 8
NOISE = 0.2
FLOOR = -sum(p * math.log(p) for p in [1 - NOISE + NOISE / KINDS, *[NOISE / KINDS] * (KINDS - 1)])
"""Cross-entropy of the best possible model: 0.805 nats."""


def batch(generator: torch.Generator, rows: int, seq: int, block: int) -> tuple[Tensor, Tensor]:
    header = torch.randint(0, KINDS, (rows, 1), generator=generator)
    tokens = torch.randint(0, KINDS, (rows, seq), generator=generator)
    target = torch.where(tokens < KINDS // 2, header, tokens)
    noisy = torch.rand(rows, seq, generator=generator) < NOISE
    target = torch.where(noisy, torch.randint(0, KINDS, (rows, seq), generator=generator), target)
    tokens[:, :block] = header + KINDS
    target[:, :block] = -100
    return tokens, target


def train(section: dict[str, Any] | None, seq: int, block: int, steps: int, **options: Any) -> float:
    """Mean loss of the last tenth of the steps, each on new data."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab=2 * KINDS, layers=1, width=32, heads=2, context=seq))
    chosen = {"cache": False, "summary": False, **options, **({"sparse_attention": section} if section else {})}
    torch.compiler.reset()
    REPORTS.clear()
    run = torch.compile(model, backend="dscompile", fullgraph=True, options=chosen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = run(*batch(generator, 4, seq, block))
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert not [reason for report in REPORTS.all() for reason in report.fallbacks]
    return statistics.mean(losses[-max(1, steps // 10) :])


def check(seq: int, block: int, steps: int, **options: Any) -> None:
    bigbird = {"mode": "bigbird", "block": block, "num_random_blocks": 1}
    dense = train(None, seq, block, steps, **options)
    sparse = train(bigbird, seq, block, steps, **options)
    window = train({"mode": "local_sliding_window", "block": block}, seq, block, steps, **options)
    print(f"{seq} tokens: dense {dense:.4f}, bigbird {sparse:.4f}, window {window:.4f}, floor {FLOOR:.4f}")
    assert dense < 1.1 * FLOOR, "the task was not learnt at all"
    assert abs(sparse - dense) <= 0.03 * dense
    assert window > 1.5 * dense


def test_256_tokens() -> None:
    check(256, 16, 100, regions="aten")


@pytest.mark.slow
def test_2048_tokens() -> None:
    check(2048, 64, 200)
