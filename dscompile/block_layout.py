"""A sparsity layout as the attention operators read it: compressed rows, and compressed columns for the backward.

:class:`BlockLayout` is built once and used often. A plain layout tensor is converted again by each call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dscompile.attention_ops import BLOCKS
from dscompile.errors import ConfigError

_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define(
    "layout_index(Tensor layout, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which blocks of keys each block of queries sees, compiled for ``dscompile.sparse_attention``.

    Attributes:
        row_ptr, col_idx, t_row_ptr, t_col_idx: int32, as :mod:`dscompile.attention_ops` defines them. Heads that all
            share one pattern have one row of pointers.
        heads: heads of the layout it was made from; 1 fits any number.
        blocks: blocks of the sequence.
        block: tokens of a block's side.
        causal: blocks above the diagonal were dropped, so it serves causal attention only.
        kept: blocks that are computed, over all of the layout's heads.
    """

    row_ptr: Tensor
    col_idx: Tensor
    t_row_ptr: Tensor
    t_col_idx: Tensor
    heads: int
    blocks: int
    block: int
    causal: bool
    kept: int

    @classmethod
    def of(cls, layout: Tensor, block: int, *, causal: bool = False) -> BlockLayout:
        """Compile a layout.

        Args:
            layout: ``[heads, blocks, blocks]`` or, for all heads alike, ``[blocks, blocks]``; bool, or integers that
                are 0 or 1. Row: block of queries, column: block of keys.
            block: tokens of a block's side: a multiple of 16 up to 128.
            causal: for causal attention: blocks above the diagonal are left out.

        Raises:
            ConfigError: a shape, dtype, value or block that cannot be used.
        """
        layout = checked_layout(layout, block)
        _check_values(layout)
        index = _index(layout.bool(), causal)
        heads, blocks, _ = layout.shape
        kept = index[1].numel() * (heads // index[0].shape[0])
        return cls(*index, heads, blocks, block, causal, kept)

    @property
    def density(self) -> float:
        """Computed blocks over all blocks (those above the diagonal included)."""
        return self.kept / (self.heads * self.blocks**2)

    @property
    def device(self) -> torch.device:
        """Where the index lies."""
        return self.row_ptr.device

    def to(self, device: torch.device | str) -> BlockLayout:
        """The layout on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("row_ptr", "col_idx", "t_row_ptr", "t_col_idx")}
        return replace(self, **moved)


def checked_layout(layout: Tensor, block: int) -> Tensor:
    """``layout`` as ``[heads, blocks, blocks]``, after the checks that need no data.

    Raises:
        ConfigError: a shape, dtype or block that cannot be used.
    """
    if not isinstance(layout, Tensor):
        raise ConfigError(
            f"sparse attention: the layout is a {type(layout).__name__}; expected a tensor of zeros and ones: of "
            "a sparsity configuration, what its make_layout(seq_len) returns."
        )
    if layout.dim() == 2:
        layout = layout.unsqueeze(0)
    if layout.dim() != 3 or layout.shape[1] != layout.shape[2] or 0 in layout.shape:
        raise ConfigError(
            f"sparse attention: the layout has shape {list(layout.shape)}; expected [heads, blocks, blocks] with as "
            "many blocks of queries as of keys, one row and column for each block of the sequence."
        )
    if layout.dtype.is_floating_point or layout.dtype.is_complex:
        raise ConfigError(f"sparse attention: the layout is {layout.dtype}; expected bool, or integers 0 and 1.")
    if not isinstance(block, int) or block not in BLOCKS:
        raise ConfigError(f"sparse attention: block {block!r} is not one of {', '.join(map(str, BLOCKS))}.")
    return layout


def _check_values(layout: Tensor) -> None:
    if not ((layout == 0) | (layout == 1)).all():
        raise ConfigError("sparse attention: the layout holds values other than 0 and 1.")


def traced_index(layout: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The index of a checked layout inside a traced graph, where the number of kept blocks is not known.

    Column indices are as long as if every block were kept; what lies past the last pointer is never read.
    """
    found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.dscompile.layout_index.default(layout, causal)
    return found


def _index(layout: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if causal:
        layout = layout.tril()
    if (layout == layout[:1]).all():
        layout = layout[:1]
    return (*_compressed(layout), *_compressed(layout.transpose(1, 2)))


def _compressed(layout: Tensor) -> tuple[Tensor, Tensor]:
    """Pointers ``[heads, rows + 1]`` and columns, heads one after the other; both int32."""
    counts = layout.sum(-1)
    ends = counts.flatten().cumsum(0).view_as(counts)
    starts = ends[:, :1] - counts[:, :1]
    return torch.cat([starts, ends], 1).to(torch.int32), layout.nonzero()[:, 2].to(torch.int32)


def compressed_index(layout: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The index of a layout in the form of :func:`traced_index`."""
    _check_values(layout)
    kept = layout.bool().tril() if causal else layout.bool()
    rows, columns = _compressed(kept)
    t_rows, t_columns = _compressed(kept.transpose(1, 2))
    room = layout.numel()
    return rows, _padded(columns, room), t_rows, _padded(t_columns, room)


def _padded(columns: Tensor, room: int) -> Tensor:
    return torch.cat([columns, columns.new_zeros(room - len(columns))])


def _index_fake(layout: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, blocks, _ = layout.shape

    def rows() -> Tensor:
        return layout.new_empty((heads, blocks + 1), dtype=torch.int32)

    def columns() -> Tensor:
        return layout.new_empty((heads * blocks * blocks,), dtype=torch.int32)

    return rows(), columns(), rows(), columns()


_LIBRARY.impl("layout_index", compressed_index, "CompositeExplicitAutograd")
torch.library.register_fake("dscompile::layout_index", _index_fake, lib=_LIBRARY)
