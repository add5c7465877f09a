"""Functions that store at places that data decide: ``function(x [N, 4, H, W])`` gives tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.pools import Function

aten = torch.ops.aten


def _rows(x: Tensor, many: int) -> Tensor:
    """Numbers of rows that data decide, int64 ``[N]``: most of them several times."""
    return (x[:, 0, 0, 0] * 4).to(torch.int64).abs() % many


def _places(x: Tensor, many: int) -> Tensor:
    return (x * 4).to(torch.int64).abs() % many


def _embedding(x: Tensor) -> Tensor:
    """The gradient of an embedding of 5 rows, with what makes the gradient and what reads the sums."""
    ids = _places(x[:, :, :, 0], 5).flatten(1)
    return aten.embedding_dense_backward((x * 2).flatten(1, 2), ids, 5, -1, False) * 3


def _norm_embedding(x: Tensor) -> Tensor:
    """Rows are normalised and added up by one kernel."""
    return aten.embedding_dense_backward(torch.softmax(x[:, 0, 0], -1), _rows(x, 3), 3, 1, False)


def _zeros(x: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=x.dtype)


def _unique(x: Tensor) -> Tensor:
    """Places each once, of both signs."""
    base = torch.full((2 * x.shape[0], *x.shape[1:]), 7.0, dtype=x.dtype)
    order = torch.arange(x.shape[0]) * 2 - _rows(x, 2) * 2 * x.shape[0]
    return aten.index_put(base, [order], x + 1)


def _apart(x: Tensor) -> Tensor:
    """Indices of the first and the last dimension: what they choose comes first."""
    indices = [_rows(x, 3)[:, None], None, None, _places(x[0, 0, 0], 5)]
    return aten.index_put(_zeros(x, 3, *x.shape[1:3], 5), indices, x.permute(0, 3, 1, 2), True)


def _scatter(x: Tensor) -> Tensor:
    """Every place once."""
    width = x.shape[3]
    places = torch.arange(width).flip(0).expand(x.shape) * 2 + _places(x, 2)
    return torch.scatter(_zeros(x, *x.shape[:3], 2 * width), 3, places, x + 1)


SCATTERS: dict[str, Function] = {
    "embedding": _embedding,
    "embedding_of_a_norm": _norm_embedding,
    "index_add": lambda x: (x + 1).index_add(1, _rows(x, 4), x[:, :1].expand(-1, x.shape[0], -1, -1) * 2),
    "index_put_negative": lambda x: aten.index_put(_zeros(x, 6, *x.shape[1:]), [_rows(x, 6) - 6], x.sin(), True),
    "index_put_middle": lambda x: aten.index_put(
        _zeros(x, *x.shape[:2], 9, x.shape[3]), [None, None, _places(x[0, 0, :, 0], 9)], x, True
    ).exp(),
    "index_put_apart": _apart,
    "index_put_one_value": lambda x: aten.index_put(_zeros(x, 3), [_places(x, 3)], x.new_ones(()), True),
    "one_place": lambda x: aten.index_put(_zeros(x, 3), [torch.ones_like(x, dtype=torch.int64)], x * x, True),
    "counts": lambda x: aten.index_put(
        torch.zeros(4, dtype=torch.int64), [_places(x, 4)], torch.ones((), dtype=torch.int64), True
    ).float(),
    "unique": _unique,
    "scatter_add": lambda x: torch.scatter_add(x, 3, _places(x[..., :1], x.shape[3]), x * 2),
    "scatter_add_few": lambda x: torch.scatter_add(_zeros(x, *x.shape[:2], 9, x.shape[3]), 2, _places(x[:, :3], 9), x),
    "scatter": _scatter,
    "scatter_value": lambda x: torch.scatter(
        torch.ones(x.shape, dtype=torch.bool), 3, _places(x, x.shape[3]), False
    ).to(x.dtype),
}
