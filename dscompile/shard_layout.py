"""How a parameter lies in pieces over the ranks of a group, and how pieces lie in a flat buffer.

One description serves operators, passes and the proof. The layout is that of ``torch.chunk`` (and so of DTensor's
``Shard``): rank ``r`` holds rows ``[r * chunk, min((r + 1) * chunk, size))`` along ``dim``, with
``chunk = ceil(size / world)``; late ranks may hold fewer rows or none. In a flat buffer every rank's piece takes
``chunk`` rows, padded with zeros, so that all pieces are of one length. A replicated parameter (``dim == -1``) is
reduced in pieces too: its elements count as one dimension.

Where one cut would leave ranks of a large world empty, the ranks form a grid and a tensor is cut twice (:class:`Tile`):
DTensor's two ``Shard`` placements on a mesh of two axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

REPLICATED = -1
"""The ``dim`` of a parameter that every rank holds whole."""


def chunk_rows(size: int, world: int) -> int:
    """Rows of a full chunk: ``ceil(size / world)``, what rank 0 holds and, padded, every rank sends."""
    return -(-size // world)


def rank_rows(size: int, world: int, rank: int) -> tuple[int, int]:
    """First row that ``rank`` holds of ``size``, and the row after its last; equal for a rank past the end."""
    chunk = chunk_rows(size, world)
    return min(rank * chunk, size), min((rank + 1) * chunk, size)


def filled(size: int, world: int) -> int:
    """How many of ``world`` ranks get any of ``size`` rows."""
    return -(-size // chunk_rows(size, world)) if size else 0


def local_rows(size: int, world: int, rank: int) -> int:
    """How many rows ``rank`` holds of ``size``."""
    first, stop = rank_rows(size, world, rank)
    return stop - first


class Tile(NamedTuple):
    """A second cut: ranks form a grid of ``world / parts`` rows by ``parts`` columns, numbered row by row.

    What a row of the grid holds is cut along ``dim`` into ``parts`` pieces, again as ``torch.chunk`` cuts.
    """

    dim: int
    parts: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A tensor of ``shape`` cut along ``dim`` into ``world`` pieces; with a ``tile``, into fewer, and these again."""

    shape: tuple[int, ...]
    dim: int
    world: int
    tile: Tile | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape that is cut: ``shape``, or one dimension of all elements if replicated."""
        return (math.prod(self.shape),) if self.dim == REPLICATED else self.shape

    @property
    def axis(self) -> int:
        """The dimension of ``grid`` that is cut."""
        return 0 if self.dim == REPLICATED else self.dim

    @property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """The cuts in their order: (dimension of ``grid``, number of pieces)."""
        if self.tile is None:
            return ((self.axis, self.world),)
        return (self.axis, self.world // self.tile.parts), (self.tile.dim, self.tile.parts)

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of a padded piece."""
        shape = list(self.grid)
        for dim, parts in self.cuts:
            shape[dim] = chunk_rows(shape[dim], parts)
        return tuple(shape)

    @property
    def piece_numel(self) -> int:
        """Elements of a padded piece."""
        return math.prod(self.piece)

    @property
    def is_even(self) -> bool:
        """Whether all pieces are of one shape, so that none is padded."""
        return self.piece_numel * self.world == math.prod(self.grid)

    @property
    def is_consecutive(self) -> bool:
        """Whether the pieces, without padding, lie one behind the other in the tensor itself."""
        return self.is_even and all(dim == 0 for dim, _ in self.cuts)

    @property
    def filled(self) -> int:
        """How many ranks hold any element."""
        (dim, parts), *second = self.cuts
        size = self.grid[dim]
        rows = filled(size, parts)
        if not second:
            return rows
        inner, columns = second[0]
        if inner != dim:
            return rows * filled(self.grid[inner], columns)
        chunk = chunk_rows(size, parts)
        return (rows - 1) * filled(chunk, columns) + filled(size - (rows - 1) * chunk, columns) if rows else 0

    def box(self, rank: int) -> list[tuple[int, int]]:
        """The part of ``grid`` that is a rank's piece: first index, and the one after the last, of each dimension."""
        ranges = [(0, size) for size in self.grid]
        numbers = (rank,) if self.tile is None else divmod(rank, self.tile.parts)
        for (dim, parts), number in zip(self.cuts, numbers, strict=True):
            start, stop = ranges[dim]
            first, last = rank_rows(stop - start, parts, number)
            ranges[dim] = start + first, start + last
        return ranges

    def piece_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of a rank's piece without padding; of a replicated parameter, of what it reduces."""
        return tuple(stop - first for first, stop in self.box(rank))

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of what a rank holds."""
        return self.shape if self.dim == REPLICATED else self.piece_shape(rank)


def encode(layouts: Sequence[ShardLayout]) -> list[int]:
    """Layouts as a flat list of integers: an operator's argument.

    ``dim, rank of the shape, shape...`` each; a second cut stands in front of these: ``TILED, dimension, parts``.
    """
    return [
        number
        for layout in layouts
        for number in (
            *((_TILED, *layout.tile) if layout.tile is not None else ()),
            *(layout.dim, len(layout.shape), *layout.shape),
        )
    ]


_TILED = -2


def decode(numbers: Sequence[int], world: int) -> list[ShardLayout]:
    """The inverse of :func:`encode`."""
    layouts, position = [], 0
    while position < len(numbers):
        tile = None
        if numbers[position] == _TILED:
            tile = Tile(*numbers[position + 1 : position + 3])
            position += 3
        dim, length = numbers[position : position + 2]
        layouts.append(ShardLayout(tuple(numbers[position + 2 : position + 2 + length]), dim, world, tile))
        position += 2 + length
    return layouts


def stays_local(numbers: Sequence[int], world: int) -> bool:
    """Whether no rank needs another's part of these encoded layouts: all replicated, or a group of one."""
    return world == 1 or all(layout.dim == REPLICATED for layout in decode(numbers, world))
