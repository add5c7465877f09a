"""Where a parameter lives: which dimension is cut, which rows a rank holds, and the facts every pass may rely on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dscompile.pieces import part_of
from dscompile.shard_layout import REPLICATED, ShardLayout, Tile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dscompile.config import Config
    from dscompile.slots import Slot

_MARK = "dscompile_mark"


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is placed. Equal on every rank: sizes are of the whole parameter, never of a shard.

    Attributes:
        fqn: fully qualified name; of a tied parameter, the first.
        shape: shape of the full parameter.
        dim: the sharded dimension, or -1 for a replicated parameter.
        world: ranks in the group.
        group: logical group name (:mod:`dscompile.world`).
        stage: ZeRO stage, 0 to 3.
        dtype: what the model reads it as; None: as its master is.
        wire: in which dtype its gradient travels; None: as it comes.
        accumulate: dtype of its accumulated gradient; None: its master's.
        tile: the second cut, where ranks form a grid.
    """

    fqn: str
    shape: tuple[int, ...]
    dim: int
    world: int
    group: str
    stage: int
    dtype: torch.dtype | None = None
    wire: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    tile: Tile | None = None

    @property
    def layout(self) -> ShardLayout:
        """Which part each rank holds."""
        return ShardLayout(self.shape, self.dim, self.world, self.tile)

    @property
    def tile_argument(self) -> tuple[int, int, int] | None:
        """The ``tile`` of :func:`dscompile.ops.unshard`: dimension, its full size, parts."""
        return None if self.tile is None else (self.tile.dim, self.shape[self.tile.dim], self.tile.parts)

    @property
    def keeps_copy(self) -> bool:
        """Whether a copy in the compute dtype stays beside the master (stages 0 to 2)."""
        return self.dtype is not None and self.stage < 3

    @property
    def size(self) -> int:
        """Full size of the sharded dimension; 0 if replicated."""
        return 0 if self.dim == REPLICATED else self.shape[self.dim]

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's shard."""
        return self.layout.local_shape(rank)

    def shard_of(self, full: Tensor, rank: int) -> Tensor:
        """A rank's part of the full value, as a view."""
        return full if self.dim == REPLICATED else part_of(full, self.layout, rank)


def choose_layout(shape: tuple[int, ...], world: int, stage: int, columns: int = 1) -> ShardLayout:
    """How to cut: fewest ranks left empty, then least padding, then the lowest dimensions.

    At stages 1 and 2 the shard is a view into a resident full buffer, so dimension 0, whose rows are contiguous, wins
    unless it leaves ranks empty that another dimension would fill. Stage 0, scalars and empty tensors are replicated.
    ``columns`` above 1: ranks form a grid with so many columns, and there is a second cut.
    """
    if stage == 0 or not shape or 0 in shape:
        return ShardLayout(shape, REPLICATED, world)

    def cost(layout: ShardLayout) -> tuple[int, int]:
        return world - layout.filled, 0 if stage < 3 else layout.piece_numel

    dims = range(len(shape))
    if columns == 1:
        return min((ShardLayout(shape, dim, world) for dim in dims), key=cost)
    return min((ShardLayout(shape, dim, world, Tile(inner, columns)) for dim in dims for inner in dims), key=cost)


LARGE = 16
"""Elements per rank from which a weight is large: an empty rank then means work that others do for it."""


def choose_columns(shapes: Sequence[tuple[int, ...]], world: int, stage: int) -> int:
    """In how many columns to arrange the ranks, 1 for none: a grid only where one cut leaves ranks without their part
    of a large weight and two cuts leave fewer. Then fewest empty, least padding, most nearly square.
    """
    large = [shape for shape in shapes if math.prod(shape) >= LARGE * world and choose_layout(shape, 1, stage).dim >= 0]

    def cost(columns: int) -> tuple[int, int, int]:
        layouts = [choose_layout(shape, world, stage, columns) for shape in large]
        empty, padded = sum(world - layout.filled for layout in layouts), sum(layout.piece_numel for layout in layouts)
        return empty, padded, columns + world // columns

    alone, *_ = cost(1)
    if not alone:
        return 1
    best = min((n for n in range(2, world) if world % n == 0), key=cost, default=1)
    return best if cost(best)[0] < alone else 1


# -- what a tensor carries -------------------------------------------------------------------------------------------


@dataclass
class Mark:
    """What ``distribute`` attaches to a parameter, and to the local tensor that graphs read in its place.

    Only the description is pickled: buffers and slots are rebuilt where the model is loaded. ``resident`` is the full
    buffer that the shard is a view of, ``copy`` the full value in the compute dtype, made when a program first asks.
    """

    spec: ShardSpec
    config: Config
    resident: Tensor | None = None
    slot: weakref.ref[Slot] | None = None
    copy: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Mark, (self.spec, self.config)


def mark_of(tensor: Tensor) -> Mark | None:
    """The mark of a parameter, or of a graph input that stands for one."""
    mark = getattr(tensor, _MARK, None)
    return mark if isinstance(mark, Mark) else None


def set_mark(tensor: Tensor, mark: Mark) -> None:
    """Attach a mark; ``detach()``, ``state_dict()`` and ``deepcopy`` drop it, optimizer steps do not."""
    setattr(tensor, _MARK, mark)


def spec_of(tensor: Tensor) -> ShardSpec | None:
    """The placement of a parameter that ``distribute`` placed, or None.

    Takes the ``DTensor`` of ``model.parameters()`` as well as a compiled frame's example input: graphs read the plain
    local shard (:mod:`dscompile.slots`), which carries the same description.
    """
    mark = mark_of(tensor)
    return mark.spec if mark is not None else None


def resident_of(tensor: Tensor) -> Tensor | None:
    """The full buffer that a parameter's shard is a view of (stages 1 and 2), else None.

    After an optimizer step only this rank's rows are current; whoever reads the others gathers them first.
    """
    mark = mark_of(tensor)
    return mark.resident if mark is not None else None


def compute_copy(tensor: Tensor) -> Tensor | None:
    """The copy of a parameter in its compute dtype (stages 0 to 2), full shape; its values may be stale.

    Made on the first call. None for a tensor without a mark, or that keeps none.
    """
    mark = mark_of(tensor)
    if mark is None or not mark.spec.keeps_copy:
        return None
    if mark.copy is None or mark.copy.device != tensor.device:
        mark.copy = tensor.new_empty(mark.spec.shape, dtype=mark.spec.dtype)
    return mark.copy


def config_of(tensors: Iterable[Tensor]) -> Config | None:
    """The configuration that ``distribute`` was given for the first of ``tensors`` that it placed, or None."""
    return next((mark.config for t in tensors if (mark := mark_of(t)) is not None), None)
