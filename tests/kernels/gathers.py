"""Functions that read at places that data decide: ``function(x [A, 4, B], rows, cols)``, one kernel each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _negative(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The last row and column by negative numbers."""
    return x[rows - x.shape[0]] * 2


def _gather(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    return torch.gather(x + 1, 2, cols.long()[None, None].expand(x.shape[0], 4, -1))


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "embedding": lambda x, rows, cols: functional.embedding(rows, x[:, 1]) + 1,
    "embedding_views": lambda x, rows, cols: functional.embedding(rows, x.flatten(1)).unflatten(1, (2, -1)).mT * 2,
    "index_negative": _negative,
    "index_middle": lambda x, rows, cols: x.transpose(1, 2)[:, cols] + 1,
    "index_apart": lambda x, rows, cols: x[rows[:, None], :, cols[None]] * 2,
    "index_both": lambda x, rows, cols: x.transpose(1, 2)[rows[:, None], cols[None]] * 2,
    "gather": _gather,
    "gather_row": lambda x, rows, cols: (x[:, 0] - x[:, 0].amax(-1, keepdim=True)).gather(
        1, rows[: x.shape[0], None].clamp(max=x.shape[2] - 1)
    ),
    "cat": lambda x, rows, cols: torch.cat([functional.embedding(rows, x[:, 1]), functional.embedding(rows, x[:, 0])]),
}
