"""How many products of digits a call site's operands need, learnt from what the integer kernel refused before.

The kernel (``gemm_int8.h``) predicts its error and names rows and columns that are too unequal for six products of
digits, or for eight. Few of them are computed again on the tiles of bf16; where they are many, the next level computes
the whole product. A site of which that is known (the gradient of logits: rows with one spike) starts at the level that
served it, and tries one lower now and then.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch

from dscompile.torch_compat import no_autocast, no_modes

PRODUCTS = (6, 8)
"""Products of digits at each level; after the last, the tiles of bf16."""

MARGIN = 1.6
"""The error predicted of a row or column may be this many times PyTorch's: what is measured stays below twice."""

SHORTEST = 256
"""Shorter sums are left to bf16: PyTorch's error is small there, and a few elements decide it."""

SMALLEST_SIDE = 32
"""Results with fewer rows or columns are left to bf16: norms of few elements say little."""

MOST_AGAIN = 0.25
"""Rows and columns that are computed again, as a share of all; with more, the whole product is."""

ANY_AGAIN, AGAIN, REFUSED = 0.16, 1.5, 1.3
"""What computing some again costs, in calls: for a start, for all rows or columns, and for a call that was in vain."""

NEXT = 0.26
"""What the next level costs more (measured: six to eight products, and eight to bf16)."""

RECENT = 16
"""Calls over which the cost is averaged."""

FIRST_WAIT = 32
"""Calls of a refused site before it tries a lower level again; doubled at every refusal of such a trial."""

LONGEST_WAIT = 4096

EXPECTED = 0.31
LARGEST = 8.0
"""fp32's error is at most these, times the root of the sum's length and alone, in units of 2^-24 (MKL: 0.3, 7)."""


@dataclass
class Site:
    """One call site.

    Attributes:
        shape: of its products, for people.
        level: an index into :data:`PRODUCTS`, or past it: where calls start.
        wait: calls until a lower level is tried.
        patience: what ``wait`` starts from.
        calls: how many were computed at each level.
        again: the sum of the shares of rows and columns that were computed again, at each level.
        refused: how many calls had too many of them, at each level.
        cost: what computing again cost on average at this level, in calls.
        seen: how many calls it was averaged over.
    """

    shape: str = ""
    level: int = 0
    wait: int = 0
    patience: int = FIRST_WAIT
    calls: list[int] = field(default_factory=lambda: [0] * len(PRODUCTS))
    again: list[float] = field(default_factory=lambda: [0.0] * len(PRODUCTS))
    refused: list[int] = field(default_factory=lambda: [0] * len(PRODUCTS))

    cost: float = 0.0
    seen: int = 0

    def begin(self) -> int:
        """The level at which this call starts."""
        if not self.level:
            return 0
        self.wait -= 1
        return self.level - 1 if self.wait <= 0 else self.level

    def passed(self, level: int, share: float) -> None:
        """``level`` computed the product, but for a share of rows and columns."""
        self.calls[level] += 1
        self.again[level] += share
        self._learn(level, ANY_AGAIN + AGAIN * share if share else 0.0)

    def refuse(self, level: int) -> None:
        """``level`` did not."""
        self.refused[level] += 1
        self._learn(level, REFUSED)

    def _learn(self, level: int, cost: float) -> None:
        if level < self.level:  # a trial: one call decides, and a failure makes the next one rarer
            if cost > NEXT:
                self.patience = min(2 * self.patience, LONGEST_WAIT)
                self.wait = self.patience
            else:
                self._start(level)
                self.patience = FIRST_WAIT
            return
        if level > self.level:  # this call only
            return
        self.seen += 1
        self.cost += (cost - self.cost) / min(self.seen, RECENT)
        if self.cost > NEXT and (self.seen >= RECENT // 2 or cost == REFUSED):
            self._start(level + 1)

    def _start(self, level: int) -> None:
        self.level, self.cost, self.seen, self.wait = level, 0.0, 0, self.patience

    def __str__(self) -> str:
        """As ``[1024, 512] @ [512, 64]: 8 products of digits (6: 9 calls, 2.1 % computed again, 1 refused)``."""
        now = f"{PRODUCTS[self.level]} products of digits" if self.level < len(PRODUCTS) else "tiles of bf16"
        parts = [
            f"{products}: {calls} calls, {again / max(calls, 1):.1%} computed again, {refused} refused"
            for products, calls, again, refused in zip(PRODUCTS, self.calls, self.again, self.refused, strict=True)
            if calls or refused
        ]
        return f"{self.shape}: {now} ({'; '.join(parts)})"


def limit(k: int) -> float:
    """The largest error, over the norm of a row or column of the result, that may be predicted of sums of ``k``."""
    return MARGIN * min(pytorch_error(1 << (k.bit_length() - 1)), LARGEST * 2**-24, EXPECTED * math.sqrt(k) * 2**-24)


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
