"""How a parameter lies in pieces over the ranks of a group, and how pieces lie in a flat buffer.

One description serves operators, passes and the proof. The layout is that of ``torch.chunk`` (and so of DTensor's
``Shard``): rank ``r`` holds rows ``[r * chunk, min((r + 1) * chunk, size))`` along ``dim``, with
``chunk = ceil(size / world)``; late ranks may hold fewer rows or none. In a flat buffer every rank's piece takes
``chunk`` rows, padded with zeros, so that all pieces are of one length. A replicated parameter (``dim == -1``) is
reduced in pieces too: its elements count as one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

REPLICATED = -1
"""The ``dim`` of a parameter that every rank holds whole."""


def chunk_rows(size: int, world: int) -> int:
    """Rows of a full chunk: ``ceil(size / world)``, what rank 0 holds and, padded, every rank sends."""
    return -(-size // world)


def rank_rows(size: int, world: int, rank: int) -> tuple[int, int]:
    """First row that ``rank`` holds of ``size``, and the row after its last; equal for a rank past the end."""
    chunk = chunk_rows(size, world)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def local_rows(size: int, world: int, rank: int) -> int:
    """How many rows ``rank`` holds of ``size``."""
    first, stop = rank_rows(size, world, rank)
    return stop - first


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A tensor of ``shape`` cut along ``dim`` into ``world`` pieces."""

    shape: tuple[int, ...]
    dim: int
    world: int

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape that is cut: ``shape``, or one dimension of all elements if replicated."""
        return (math.prod(self.shape),) if self.dim == REPLICATED else self.shape

    @property
    def axis(self) -> int:
        """The dimension of ``grid`` that is cut."""
        return 0 if self.dim == REPLICATED else self.dim

    @property
    def chunk(self) -> int:
        """Rows of a padded piece."""
        return chunk_rows(self.grid[self.axis], self.world)

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of a padded piece."""
        return (*self.grid[: self.axis], self.chunk, *self.grid[self.axis + 1 :])

    @property
    def piece_numel(self) -> int:
        """Elements of a padded piece."""
        return math.prod(self.piece)

    @property
    def is_consecutive(self) -> bool:
        """Whether the pieces, without padding, lie one behind the other in the tensor itself."""
        return self.axis == 0 and self.grid[0] == self.world * self.chunk

    def rows(self, rank: int) -> tuple[int, int]:
        """First row of a rank's piece and the row after its last."""
        return rank_rows(self.grid[self.axis], self.world, rank)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of what a rank holds."""
        if self.dim == REPLICATED:
            return self.shape
        first, stop = self.rows(rank)
        return (*self.shape[: self.dim], stop - first, *self.shape[self.dim + 1 :])


def encode(layouts: Sequence[ShardLayout]) -> list[int]:
    """Layouts as a flat list of integers (``dim, rank of the shape, shape...`` each): an operator's argument."""
    return [number for layout in layouts for number in (layout.dim, len(layout.shape), *layout.shape)]


def decode(numbers: Sequence[int], world: int) -> list[ShardLayout]:
    """The inverse of :func:`encode`."""
    layouts, position = [], 0
    while position < len(numbers):
        dim, length = numbers[position : position + 2]
        layouts.append(ShardLayout(tuple(numbers[position + 2 : position + 2 + length]), dim, world))
        position += 2 + length
    return layouts


def stays_local(numbers: Sequence[int], world: int) -> bool:
    """Whether no rank needs another's part of these encoded layouts: all replicated, or a group of one."""
    return world == 1 or all(layout.dim == REPLICATED for layout in decode(numbers, world))
