"""Gradients against masked dense attention for every layout, dtype, block, ragged length and several head sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

import dscompile
from tests.sparse.layouts import HEADS, LAYOUTS
from tests.sparse.test_block_sparse import by_hand

TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1.5e-2, torch.float16: 1e-3, torch.float64: 1e-12}
"""Largest difference over the largest value: a few roundings of results, and in 16 bits of probabilities."""
SIZES = (8, 24, 64, 128)
BLOCKS = 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_masked_dense_attention(name: str, dtype: torch.dtype) -> None:
    sizes = itertools.cycle(SIZES)
    wrong = []
    for block in range(16, 129, 16):
        config = LAYOUTS[name]()
        config.block = block
        layout = config.make_layout(BLOCKS * block)
        for short, (causal, padded) in itertools.product((0, 1, block - 1), ((False, True), (True, False))):
            seq, size = BLOCKS * block - short, next(sizes)
            generator = torch.Generator().manual_seed(seq)
            q, k, v, grad = (torch.randn(2, HEADS, seq, size, generator=generator).to(dtype) for _ in range(4))
            padding = torch.rand(2, seq, generator=generator) < 0.2 if padded else None
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = dscompile.sparse_attention(*leaves, layout, block, causal=causal, key_padding_mask=padding)
            found = [out, *torch.autograd.grad(out, leaves, grad)]
            exact = [x.detach().double().requires_grad_() for x in leaves]
            wanted = by_hand(exact[0], exact[1], exact[2], layout, block, causal, padding)
            expected = [wanted, *torch.autograd.grad(wanted, exact, grad.double())]
            for which, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
                error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
                if not error < TOLERANCE[dtype]:
                    wrong.append((which, block, seq, size, causal, padded, error))
    assert not wrong
