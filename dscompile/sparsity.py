"""Block-sparsity layouts: which blocks of keys each block of queries attends to.

The classes carry DeepSpeed's names, arguments and defaults, so code that builds them needs no change. Layouts follow
what DeepSpeed's code does (``deepspeed/ops/sparse_attention/sparsity_config.py``, read for its behaviour and written
anew here), with three differences:

- ``attention="unidirectional"`` never keeps a block above the diagonal. DeepSpeed's Variable layout may draw random
  blocks of the future, and its Fixed layout with several global blocks keeps some.
- Random blocks come from ``seed``, not from Python's global generator: every rank and every process draws the same.
- A unidirectional row that has fewer than ``num_random_blocks`` blocks to draw from takes them all; DeepSpeed raises.

Inside the diagonal block a layout says nothing: whether a token sees later ones there is ``causal`` of the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import ConfigError

_DIRECTIONS = ("bidirectional", "unidirectional")


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    return value


def _direction(value: Any, *, horizontal: bool = False) -> str:
    if value not in _DIRECTIONS:
        raise ConfigError(f"attention must be 'bidirectional' or 'unidirectional', got {value!r}.")
    if horizontal and value != "bidirectional":
        raise ConfigError(
            "horizontal_global_attention needs attention='bidirectional': a global row would attend to the future."
        )
    return str(value)


def _blocks_of(name: str, value: Any, least: int) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ConfigError(f"{name} must be a list of whole numbers, got {value!r}.")
    return tuple(_whole(f"{name}[{i}]", v, least) for i, v in enumerate(value))


def _ranges(starts: Any, ends: Any) -> tuple[tuple[int, int], ...]:
    """The half-open ranges of global blocks; without ``ends`` each start is one block."""
    first = _blocks_of("global_block_indices", starts, 0)
    if ends is None:
        return tuple((i, i + 1) for i in first)
    last = _blocks_of("global_block_end_indices", ends, 0)
    if len(first) != len(last):
        raise ConfigError(
            f"global_block_end_indices has {len(last)} entries and global_block_indices {len(first)}; they go in pairs."
        )
    for start, end in zip(first, last, strict=True):
        if start >= end:
            raise ConfigError(f"global blocks: the start {start} must lie before the end {end}, which is exclusive.")
    return tuple(zip(first, last, strict=True))


class SparsityConfig:
    """What every layout has in common; user classes derive from it and define :meth:`head_layout`.

    Classes written for DeepSpeed, which define ``make_layout`` with the two helpers below, work as they are.

    Args:
        num_heads: attention heads.
        block: tokens of a block's side.
        different_layout_per_head: each head gets its own pattern, not all of them the first head's.
        seed: of the random blocks, for the layouts that have any.
    """

    def __init__(
        self, num_heads: int, block: int = 16, different_layout_per_head: bool = False, *, seed: int = 0
    ) -> None:
        self.num_heads = _whole("num_heads", num_heads, 1)
        self.block = _whole("block", block, 1)
        self.different_layout_per_head = bool(different_layout_per_head)
        self.num_layout_heads = self.num_heads if self.different_layout_per_head else 1
        self.seed = seed

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """The bool pattern ``[blocks, blocks]`` of one head (row: block of queries, column: block of keys)."""
        raise NotImplementedError(f"{type(self).__name__} must define head_layout(head, blocks)")

    def make_layout(self, seq_len: int) -> Tensor:
        """The layout for a sequence: int64 ``[num_heads, seq_len / block, seq_len / block]`` of zeros and ones.

        Raises:
            ConfigError: ``seq_len`` is not a multiple of the block, or too short for the pattern.
        """
        blocks = self._blocks(seq_len)
        layout = torch.stack([self.head_layout(head, blocks) for head in range(self.num_layout_heads)])
        return layout.expand(self.num_heads, blocks, blocks).to(torch.int64)

    def setup_layout(self, seq_len: int) -> Tensor:
        """Zeros ``[num_heads, seq_len / block, seq_len / block]``, int64: what DeepSpeed's user classes fill.

        Raises:
            ConfigError: ``seq_len`` is not a multiple of the block.
        """
        blocks = self._blocks(seq_len)
        return torch.zeros(self.num_heads, blocks, blocks, dtype=torch.int64)

    def check_and_propagate_first_head_layout(self, layout: Tensor) -> Tensor:
        """``layout`` with the first head's pattern in every head, unless each head has its own (in place)."""
        if not self.different_layout_per_head:
            layout[1:] = layout[:1]
        return layout

    def _blocks(self, seq_len: int) -> int:
        if _whole("seq_len", seq_len, 1) % self.block:
            up = -(-seq_len // self.block) * self.block
            raise ConfigError(
                f"the sequence length {seq_len} is no multiple of the block {self.block}; make the layout for {up} "
                "(attention accepts a shorter last block), or pad with SparseAttentionUtils.pad_to_block_size."
            )
        return seq_len // self.block

    def _fits(self, name: str, count: int, blocks: int) -> None:
        if blocks < count:
            raise ConfigError(f"{name} is {count}, but a sequence of {blocks * self.block} tokens has {blocks} blocks.")

    def _random(self, head: int, blocks: int, count: int, *, past_only: bool) -> Tensor:
        """``count`` distinct random columns in each row, among the row's past if ``past_only``."""
        self._fits("num_random_blocks", count, blocks)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + head)
        draws = torch.rand(blocks, blocks, generator=generator)
        if past_only:
            draws = draws.masked_fill(~_lower(blocks), float("inf"))
        chosen = torch.zeros(blocks, blocks, dtype=torch.bool)
        return chosen.scatter_(1, draws.topk(count, dim=1, largest=False).indices, True)


def _lower(blocks: int) -> Tensor:
    return torch.ones(blocks, blocks, dtype=torch.bool).tril()


def _one_way(layout: Tensor, attention: str) -> Tensor:
    return layout.tril() if attention == "unidirectional" else layout


def _same_window(windows: Tensor) -> Tensor:
    return windows[:, None] == windows[None, :]


def _band(blocks: int, width: int) -> Tensor:
    """``width // 2`` blocks to either side of the diagonal, as DeepSpeed counts a sliding window."""
    index = torch.arange(blocks)
    return (index[:, None] - index[None, :]).abs() <= width // 2


def _columns(blocks: int, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A bool ``[blocks]``: which blocks lie in one of the ranges; parts past the end count for nothing."""
    marked = torch.zeros(blocks, dtype=torch.bool)
    for start, end in ranges:
        marked[start:end] = True
    return marked


def _cross(marked: Tensor, *, rows: bool) -> Tensor:
    """Whole columns, and whole rows if ``rows``, at the marked blocks."""
    columns = marked[None, :].expand(len(marked), -1)
    return columns | marked[:, None] if rows else columns


class DenseSparsityConfig(SparsityConfig):
    """Every block: attention as usual, for comparison."""

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """All ones."""
        return torch.ones(blocks, blocks, dtype=torch.bool)


class FixedSparsityConfig(SparsityConfig):
    """Windows that attend to themselves, and in each window some blocks that all attend to.

    After "Generating Long Sequences with Sparse Transformers" (arXiv 1904.10509), as DeepSpeed customised it.

    Args:
        num_heads: attention heads. block: tokens of a block's side. different_layout_per_head: see the base class.
        num_local_blocks: blocks of a window.
        num_global_blocks: consecutive blocks of each window that represent it; divides ``num_local_blocks``.
        attention: ``"unidirectional"`` keeps the diagonal and below.
        horizontal_global_attention: the global blocks also attend to all blocks (bidirectional only).
        num_different_global_patterns: heads take their global blocks from that many places, from the window's last
            blocks backwards; more than 1 needs ``different_layout_per_head``.

    Raises:
        ConfigError: options that contradict each other.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_local_blocks = _whole("num_local_blocks", num_local_blocks, 1)
        self.num_global_blocks = _whole("num_global_blocks", num_global_blocks, 1)
        if num_local_blocks % num_global_blocks:
            raise ConfigError(
                f"num_local_blocks ({num_local_blocks}) must be a multiple of num_global_blocks ({num_global_blocks})."
            )
        self.attention = _direction(attention, horizontal=horizontal_global_attention)
        self.horizontal_global_attention = bool(horizontal_global_attention)
        patterns = self.num_different_global_patterns = _whole(
            "num_different_global_patterns", num_different_global_patterns, 1
        )
        if patterns > 1 and not different_layout_per_head:
            raise ConfigError(
                f"num_different_global_patterns is {patterns}, but all heads share one layout; "
                "set different_layout_per_head to true."
            )
        if patterns > num_local_blocks // num_global_blocks:
            raise ConfigError(
                f"num_different_global_patterns is {patterns}, but a window of {num_local_blocks} blocks has only "
                f"{num_local_blocks // num_global_blocks} places for {num_global_blocks} global block(s)."
            )

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """Windows on the diagonal, and the global columns of this head's pattern."""
        window, width = self.num_local_blocks, self.num_global_blocks
        first = window - (1 + head % self.num_different_global_patterns) * width
        full = blocks - blocks % window
        ranges = [(i, i + width) for i in range(first, full, window)]
        if full < blocks:  # a short last window: its representatives move in from the end
            start = max(0, min(full + first, blocks - width))
            ranges.append((start, start + width))
        local = _same_window(torch.arange(blocks) // window)
        layout = local | _cross(_columns(blocks, ranges), rows=self.horizontal_global_attention)
        return _one_way(layout, self.attention)


class VariableSparsityConfig(SparsityConfig):
    """Windows of given sizes, global blocks at given places, and random blocks.

    Args:
        num_heads: attention heads. block: tokens of a block's side. different_layout_per_head: see the base class.
        num_random_blocks: random blocks in each row.
        local_window_blocks: blocks of the first window, the second, ...; the last size repeats to the end.
        global_block_indices: blocks that all attend to; those past the end of a sequence are ignored.
        global_block_end_indices: if given, global blocks are the ranges from an index up to its end (exclusive).
        attention: ``"unidirectional"`` keeps the diagonal and below.
        horizontal_global_attention: the global blocks also attend to all blocks (bidirectional only).
        seed: of the random blocks.

    Raises:
        ConfigError: options that contradict each other.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, seed=seed)
        self.num_random_blocks = _whole("num_random_blocks", num_random_blocks, 0)
        self.local_window_blocks = _blocks_of("local_window_blocks", local_window_blocks, 1)
        if not self.local_window_blocks:
            raise ConfigError("local_window_blocks is empty; it needs at least one window size.")
        self.global_ranges = _ranges(global_block_indices, global_block_end_indices)
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = None if global_block_end_indices is None else list(global_block_end_indices)
        self.attention = _direction(attention, horizontal=horizontal_global_attention)
        self.horizontal_global_attention = bool(horizontal_global_attention)

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """Windows, global columns (and rows), random blocks."""
        sizes = torch.tensor(self.local_window_blocks)
        rest = max(0, blocks - int(sizes.sum()))
        more = sizes.new_full((-(-rest // int(sizes[-1])),), int(sizes[-1]))
        sizes = torch.cat([sizes, more])
        windows = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[:blocks]
        random = self._random(head, blocks, self.num_random_blocks, past_only=self.attention == "unidirectional")
        marked = _columns(blocks, self.global_ranges)
        layout = _same_window(windows) | _cross(marked, rows=self.horizontal_global_attention) | random
        return _one_way(layout, self.attention)


class BigBirdSparsityConfig(SparsityConfig):
    """A sliding window, global first blocks (rows and columns), and random blocks.

    After "Big Bird: Transformers for Longer Sequences" (arXiv 2007.14062), in blocks.

    Args:
        num_heads: attention heads. block: tokens of a block's side. different_layout_per_head: see the base class.
        num_random_blocks: random blocks in each row.
        num_sliding_window_blocks: width of the window in blocks: half of it (rounded down) to either side.
        num_global_blocks: the first blocks, which all attend to and which attend to all.
        attention: ``"unidirectional"`` keeps the diagonal and below.
        seed: of the random blocks.

    Raises:
        ConfigError: a wrong option; :meth:`make_layout`: more blocks asked for than there are.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, seed=seed)
        self.num_random_blocks = _whole("num_random_blocks", num_random_blocks, 0)
        self.num_sliding_window_blocks = _whole("num_sliding_window_blocks", num_sliding_window_blocks, 1)
        self.num_global_blocks = _whole("num_global_blocks", num_global_blocks, 0)
        self.attention = _direction(attention)

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """The window's band, the global cross, and random blocks."""
        self._fits("num_sliding_window_blocks", self.num_sliding_window_blocks, blocks)
        self._fits("num_global_blocks", self.num_global_blocks, blocks)
        random = self._random(head, blocks, self.num_random_blocks, past_only=self.attention == "unidirectional")
        layout = _band(blocks, self.num_sliding_window_blocks) | random
        layout |= _cross(_columns(blocks, [(0, self.num_global_blocks)]), rows=True)
        return _one_way(layout, self.attention)


class BSLongformerSparsityConfig(SparsityConfig):
    """A sliding window and global blocks at given places (rows and columns).

    After "Longformer: The Long-Document Transformer" (arXiv 2004.05150), in blocks.

    Args:
        num_heads: attention heads. block: tokens of a block's side. different_layout_per_head: see the base class.
        num_sliding_window_blocks: width of the window in blocks: half of it (rounded down) to either side.
        global_block_indices: blocks that all attend to and that attend to all; those past the end are ignored.
        global_block_end_indices: if given, global blocks are the ranges from an index up to its end (exclusive).
        attention: ``"unidirectional"`` keeps the diagonal and below.

    Raises:
        ConfigError: options that contradict each other; :meth:`make_layout`: a window wider than the sequence.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_sliding_window_blocks = _whole("num_sliding_window_blocks", num_sliding_window_blocks, 1)
        self.global_ranges = _ranges(global_block_indices, global_block_end_indices)
        self.global_block_indices = list(global_block_indices)
        self.global_block_end_indices = None if global_block_end_indices is None else list(global_block_end_indices)
        self.attention = _direction(attention)

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """The window's band and the global cross."""
        self._fits("num_sliding_window_blocks", self.num_sliding_window_blocks, blocks)
        cross = _cross(_columns(blocks, self.global_ranges), rows=True)
        return _one_way(_band(blocks, self.num_sliding_window_blocks) | cross, self.attention)


class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A sliding window alone.

    Args:
        num_heads: attention heads. block: tokens of a block's side.
        num_sliding_window_blocks: width of the window in blocks: half of it (rounded down) to either side.
        attention: ``"unidirectional"`` (DeepSpeed's default here) keeps the diagonal and below.

    Raises:
        ConfigError: a wrong option; :meth:`make_layout`: a window wider than the sequence.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = "unidirectional",
    ) -> None:
        super().__init__(num_heads, block)
        self.num_sliding_window_blocks = _whole("num_sliding_window_blocks", num_sliding_window_blocks, 1)
        self.attention = _direction(attention)

    def head_layout(self, head: int, blocks: int) -> Tensor:
        """The window's band."""
        self._fits("num_sliding_window_blocks", self.num_sliding_window_blocks, blocks)
        return _one_way(_band(blocks, self.num_sliding_window_blocks), self.attention)
