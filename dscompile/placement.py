"""Where a parameter lives: which dimension is cut, which rows a rank holds, and the facts every pass may rely on."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dscompile.shard_layout import REPLICATED, chunk_rows, rank_rows

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

    @property
    def keeps_copy(self) -> bool:
        """Whether a copy in the compute dtype stays beside the master (stages 0 to 2)."""
        return self.dtype is not None and self.stage < 3

    @property
    def size(self) -> int:
        """Full size of the sharded dimension; 0 if replicated."""
        return 0 if self.dim == REPLICATED else self.shape[self.dim]

    def rows(self, rank: int) -> tuple[int, int]:
        """First row and number of rows along ``dim`` that a rank holds."""
        first, stop = rank_rows(self.size, self.world, rank)
        return first, stop - first

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of a rank's shard."""
        if self.dim == REPLICATED:
            return self.shape
        return (*self.shape[: self.dim], self.rows(rank)[1], *self.shape[self.dim + 1 :])

    def shard_of(self, full: Tensor, rank: int) -> Tensor:
        """A rank's rows of the full value, as a view."""
        return full if self.dim == REPLICATED else full.narrow(self.dim, *self.rows(rank))


def choose_dim(shape: tuple[int, ...], world: int, stage: int) -> int:
    """The dimension to cut: fewest ranks left empty, then least padding, then the lowest.

    At stages 1 and 2 the shard is a view into a resident full buffer, so dimension 0, whose rows are contiguous, wins
    unless it leaves ranks empty that another dimension would fill. Stage 0, scalars and empty tensors are replicated.
    """
    if stage == 0 or not shape or 0 in shape:
        return REPLICATED

    def cost(dim: int) -> tuple[int, int, int]:
        chunk = chunk_rows(shape[dim], world)
        padding = (chunk * world - shape[dim]) / shape[dim]
        return world - -(-shape[dim] // chunk), 0 if stage < 3 else padding, dim  # type: ignore[return-value]

    return min(range(len(shape)), key=cost)


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
