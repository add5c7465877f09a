"""How many products of digits a call site's operands need, learnt from what the integer kernel refused before.

The kernel (``gemm_int8.h``) predicts its error and refuses operands whose rows or columns are too unequal for six
products of digits, or for eight; the tiles of bf16 then compute the product. A site that was refused (the gradient of
logits: rows with one spike) starts where it last succeeded, and tries one level lower now and then.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from dscompile.torch_compat import no_autocast, no_modes

PRODUCTS = (6, 8)
"""Products of digits at each level; after the last, the tiles of bf16."""

MARGIN = 1.6
"""The error predicted of a row or column may be this many times PyTorch's: what is measured stays below twice."""

FIRST_WAIT = 32
"""Calls of a refused site before it tries a lower level again; doubled at every refusal of such a trial."""

LONGEST_WAIT = 4096

EXPECTED = 0.31
LARGEST = 8.0
"""fp32's error is at most these, times the root of the sum's length and alone, in units of 2^-24 (MKL: 0.3, 7)."""


@dataclass
class Site:
    """One call site: its level (an index into :data:`PRODUCTS`, or past it), and what was refused at each level."""

    shape: str = ""
    level: int = 0
    wait: int = 0
    patience: int = FIRST_WAIT
    refused: list[int] = field(default_factory=lambda: [0] * len(PRODUCTS))

    def begin(self) -> int:
        """The level at which this call starts."""
        if not self.level:
            return 0
        self.wait -= 1
        return self.level - 1 if self.wait <= 0 else self.level

    def passed(self, level: int) -> None:
        """``level`` computed the product."""
        if level < self.level:
            self.level, self.wait, self.patience = level, FIRST_WAIT, FIRST_WAIT

    def refuse(self, level: int) -> None:
        """``level`` did not."""
        self.refused[level] += 1
        if level < self.level:  # a trial
            self.patience = min(2 * self.patience, LONGEST_WAIT)
        self.level, self.wait = level + 1, self.patience

    def __str__(self) -> str:
        """As ``[1024, 512] @ [512, 64]: 8 products of digits (refused: 3 x 6)``."""
        now = f"{PRODUCTS[self.level]} products of digits" if self.level < len(PRODUCTS) else "tiles of bf16"
        refused = ", ".join(f"{n} x {products}" for n, products in zip(self.refused, PRODUCTS, strict=True) if n)
        return f"{self.shape}: {now}{f' (refused: {refused})' if refused else ''}"


def limit(k: int) -> float:
    """The largest error, over the norm of a row or column of the result, that may be predicted of sums of ``k``.

    What joining rounds (2^-24) is not predicted, and left room for.
    """
    allowed = MARGIN * min(pytorch_error(1 << (k.bit_length() - 1)), LARGEST * 2**-24, EXPECTED * k**0.5 * 2**-24)
    return max(allowed**2 - 2.0**-48, 0.0) ** 0.5


@functools.cache
def pytorch_error(k: int) -> float:
    """The norm of the error of PyTorch's fp32 product over that of the result, for normal operands and sums of ``k``.

    Measured here, against fp64. It does not shrink with ``k``: a shorter sum's stands for a longer one's.
    """
    generator = torch.Generator().manual_seed(0)
    sides = 128 if k <= 8192 else 32
    with no_modes(), torch.no_grad(), no_autocast():
        a, b = torch.randn(sides, k, generator=generator), torch.randn(k, sides, generator=generator)
        exact = a.double() @ b.double()
        return float((a @ b - exact).norm() / exact.norm())
