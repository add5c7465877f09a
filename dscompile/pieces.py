"""Moving a tensor's pieces in and out of one buffer with a row for each rank, as its layout says."""

from __future__ import annotations

from torch import Tensor

from dscompile.shard_layout import ShardLayout


def part_of(grid: Tensor, layout: ShardLayout, rank: int) -> Tensor:
    """A rank's piece of the whole tensor (shape ``layout.grid``), as a view without padding."""
    for dim, (first, stop) in enumerate(layout.box(rank)):
        if stop - first != grid.shape[dim]:
            grid = grid.narrow(dim, first, stop - first)
    return grid


def corner(piece: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What is not padding of a padded piece, as a view."""
    for dim, size in enumerate(shape):
        if size != piece.shape[dim]:
            piece = piece.narrow(dim, 0, size)
    return piece


def put_piece(piece: Tensor, part: Tensor) -> None:
    """Fill a padded piece from a rank's part; the rest becomes zero."""
    if part.shape != piece.shape:
        piece.zero_()
    corner(piece, tuple(part.shape)).copy_(part)


def fill(full: Tensor, pieces: Tensor, layout: ShardLayout) -> None:
    """Write all ranks' padded pieces, ``[world, piece_numel]``, into the whole tensor, which is contiguous."""
    grid = full.view(layout.grid)
    if layout.is_even:
        parts = _by_rank(grid, layout)
        parts.copy_(pieces.view(parts.shape))
        return
    pieces = pieces.view(layout.world, *layout.piece)
    for rank in range(layout.world):
        part = part_of(grid, layout, rank)
        if part.numel():
            part.copy_(corner(pieces[rank], tuple(part.shape)))


def cut(full: Tensor, pieces: Tensor, layout: ShardLayout) -> None:
    """Write the whole tensor into all ranks' padded pieces, ``[world, piece_numel]``."""
    grid = full.reshape(layout.grid)
    if layout.is_even:
        parts = _by_rank(grid, layout)
        pieces.view(parts.shape).copy_(parts)
        return
    pieces = pieces.view(layout.world, *layout.piece)
    pieces.zero_()
    for rank in range(layout.world):
        part = part_of(grid, layout, rank)
        if part.numel():
            corner(pieces[rank], tuple(part.shape)).copy_(part)


def _by_rank(grid: Tensor, layout: ShardLayout) -> Tensor:
    """The whole tensor with a leading dimension for each cut, then the dimensions of a piece; no piece is padded."""
    for number, (dim, parts) in enumerate(layout.cuts):
        at = dim + number  # the cuts before this one stand in front
        grid = grid.unflatten(at, (parts, -1)).movedim(at, number)
    return grid
