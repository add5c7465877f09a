"""Sparsity layouts against matrices written by hand, and what their errors say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dscompile.errors import ConfigError
from dscompile.sparse_section import from_config
from dscompile.sparsity import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)


def rows(layout: torch.Tensor, head: int = 0) -> list[str]:
    return ["".join(str(int(v)) for v in row) for row in layout[head]]


CASES: dict[str, tuple[SparsityConfig, list[str]]] = {
    "dense": (DenseSparsityConfig(2), ["1111"] * 4),
    # Windows 0-1 and 2-3, then a short window 4; globals 1, 3 and, moved in, 4.
    "fixed": (
        FixedSparsityConfig(1, num_local_blocks=2),
        ["11011", "11011", "01111", "01111", "01011"],
    ),
    "fixed unidirectional": (
        FixedSparsityConfig(1, num_local_blocks=2, attention="unidirectional"),
        ["10000", "11000", "01100", "01110", "01011"],
    ),
    "fixed horizontal": (
        FixedSparsityConfig(1, num_local_blocks=2, horizontal_global_attention=True),
        ["1101", "1111", "0111", "1111"],
    ),
    # Two global blocks a window of four: blocks 2, 3; nothing above the diagonal.
    "fixed two globals, one way": (
        FixedSparsityConfig(1, num_local_blocks=4, num_global_blocks=2, attention="unidirectional"),
        ["100000", "110000", "111000", "111100", "001110", "001111"],
    ),
    # Windows of 1, 2, 2, ...; global 0.
    "variable": (
        VariableSparsityConfig(1, local_window_blocks=[1, 2]),
        ["10000", "11100", "11100", "10011", "10011"],
    ),
    "variable horizontal, ranges": (
        VariableSparsityConfig(
            1,
            local_window_blocks=[1],
            global_block_indices=[1, 9],
            global_block_end_indices=[3, 11],
            horizontal_global_attention=True,
        ),
        ["1110", "1111", "1111", "0111"],
    ),
    "variable one way": (
        VariableSparsityConfig(1, local_window_blocks=[2], global_block_indices=[1], attention="unidirectional"),
        ["1000", "1100", "0110", "0111"],
    ),
    "bigbird": (
        BigBirdSparsityConfig(1, num_random_blocks=0),
        ["11111", "11100", "11110", "10111", "10011"],
    ),
    "bigbird one way": (
        BigBirdSparsityConfig(1, num_random_blocks=0, num_global_blocks=2, attention="unidirectional"),
        ["10000", "11000", "11100", "11110", "11011"],
    ),
    "longformer": (
        BSLongformerSparsityConfig(1, global_block_indices=[3]),
        ["11010", "11110", "01110", "11111", "00011"],
    ),
    "longformer one way, range": (
        BSLongformerSparsityConfig(
            1, global_block_indices=[0], global_block_end_indices=[2], attention="unidirectional"
        ),
        ["10000", "11000", "11100", "11110", "11011"],
    ),
    "sliding window": (LocalSlidingWindowSparsityConfig(1), ["1000", "1100", "0110", "0011"]),
    "sliding window, both ways": (
        LocalSlidingWindowSparsityConfig(1, attention="bidirectional"),
        ["1100", "1110", "0111", "0011"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_layouts_by_hand(name: str) -> None:
    config, expected = CASES[name]
    layout = config.make_layout(16 * len(expected[0]))
    assert layout.dtype == torch.int64
    assert layout.shape == (config.num_heads, len(expected), len(expected))
    for head in range(config.num_heads):
        assert rows(layout, head) == expected


def test_heads_take_their_global_blocks_from_different_places() -> None:
    config = FixedSparsityConfig(5, different_layout_per_head=True, num_local_blocks=4, num_different_global_patterns=4)
    layout = config.make_layout(16 * 8)
    # Row 0 lies in window 0: what it sees of window 1 is that window's one global block.
    assert [rows(layout, head)[0][4:] for head in range(5)] == ["0001", "0010", "0100", "1000", "0001"]


def test_the_default_fixed_layout_keeps_a_quarter_and_three_blocks_a_row() -> None:
    for blocks in (8, 32):
        layout = FixedSparsityConfig(2).make_layout(16 * blocks)
        assert layout.sum().item() == 2 * (blocks**2 // 4 + 3 * blocks)


@pytest.mark.parametrize("width", [1, 3, 4, 5])
def test_a_band_has_the_blocks_of_its_diagonals(width: int) -> None:
    blocks, half = 12, width // 2
    both = LocalSlidingWindowSparsityConfig(1, num_sliding_window_blocks=width, attention="bidirectional")
    assert both.make_layout(16 * blocks).sum().item() == blocks * (2 * half + 1) - half * (half + 1)
    past = LocalSlidingWindowSparsityConfig(1, num_sliding_window_blocks=width)
    assert past.make_layout(16 * blocks).sum().item() == blocks * (half + 1) - half * (half + 1) // 2


def random_part(config: SparsityConfig, without: SparsityConfig, blocks: int) -> torch.Tensor:
    return config.make_layout(16 * blocks) - without.make_layout(16 * blocks)


def test_random_blocks_are_as_many_as_asked_and_reproducible_in_another_process() -> None:
    config = VariableSparsityConfig(
        3, different_layout_per_head=True, num_random_blocks=2, local_window_blocks=[1], global_block_indices=[]
    )
    layout = config.make_layout(16 * 24)
    per_row = layout.sum(-1)
    assert per_row.min() >= 2
    assert per_row.max() <= 3
    assert not torch.equal(layout[0], layout[1])
    assert torch.equal(layout, config.make_layout(16 * 24))
    code = (
        "import random, torch; torch.manual_seed(99); random.seed(5); torch.rand(7)\n"
        "from dscompile.sparsity import VariableSparsityConfig as V\n"
        "c = V(3, different_layout_per_head=True, num_random_blocks=2, local_window_blocks=[1],"
        " global_block_indices=[])\n"
        "print(c.make_layout(384).nonzero().tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(layout.nonzero().tolist())


def test_making_a_layout_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    BigBirdSparsityConfig(2).make_layout(16 * 8)
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_draws_other_blocks() -> None:
    layouts = [BigBirdSparsityConfig(1, seed=seed).make_layout(16 * 32) for seed in (0, 1)]
    assert not torch.equal(*layouts)


@pytest.mark.parametrize("make", [VariableSparsityConfig, BigBirdSparsityConfig])
def test_one_way_random_blocks_lie_in_the_past(make: Callable[..., SparsityConfig]) -> None:
    layout = make(1, num_random_blocks=3, attention="unidirectional").make_layout(16 * 40)[0]
    assert not layout.triu(1).any()
    assert layout[-10:].sum() > make(1, num_random_blocks=0, attention="unidirectional").make_layout(640)[0, -10:].sum()


def test_a_layout_of_ones_own() -> None:
    class Checkerboard(SparsityConfig):
        def head_layout(self, head: int, blocks: int) -> torch.Tensor:
            index = torch.arange(blocks)
            return (index[:, None] + index[None, :] + head) % 2 == 0

    layout = Checkerboard(2, different_layout_per_head=True).make_layout(48)
    assert rows(layout, 0) == ["101", "010", "101"]
    assert rows(layout, 1) == ["010", "101", "010"]


def test_a_layout_of_ones_own_in_deepspeeds_way() -> None:
    """Classes written for DeepSpeed fill what ``setup_layout`` returns, and hand the first head's pattern on."""

    class FirstColumn(SparsityConfig):
        def make_layout(self, seq_len: int) -> torch.Tensor:
            layout = self.setup_layout(seq_len)
            for head in range(self.num_layout_heads):
                layout[head, :, head] = 1
            return self.check_and_propagate_first_head_layout(layout)

    alike = FirstColumn(3).make_layout(48)
    assert alike.dtype is torch.int64
    assert [rows(alike, head) for head in range(3)] == [["100"] * 3] * 3
    apart = FirstColumn(2, different_layout_per_head=True).make_layout(48)
    assert [rows(apart, head) for head in range(2)] == [["100"] * 3, ["010"] * 3]
    with pytest.raises(ConfigError, match="100 is no multiple of the block 16"):
        FirstColumn(2).make_layout(100)


@pytest.mark.parametrize("make", [VariableSparsityConfig, BSLongformerSparsityConfig])
def test_global_blocks_can_be_read_as_they_were_given(make: Callable[..., Any]) -> None:
    assert (make(1).global_block_indices, make(1).global_block_end_indices) == ([0], None)
    given = make(1, global_block_indices=[0, 4], global_block_end_indices=[2, 5])
    assert (given.global_block_indices, given.global_block_end_indices) == ([0, 4], [2, 5])


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "length": (lambda: DenseSparsityConfig(1).make_layout(100), "100 is no multiple of the block 16; .* 112"),
    "one way, global rows": (
        lambda: FixedSparsityConfig(1, attention="unidirectional", horizontal_global_attention=True),
        "horizontal_global_attention needs",
    ),
    "variable, one way, global rows": (
        lambda: VariableSparsityConfig(1, attention="unidirectional", horizontal_global_attention=True),
        "horizontal_global_attention needs",
    ),
    "patterns": (lambda: FixedSparsityConfig(1, num_different_global_patterns=2), "different_layout_per_head to true"),
    "too many patterns": (
        lambda: FixedSparsityConfig(4, different_layout_per_head=True, num_different_global_patterns=5),
        "only 4 places",
    ),
    "globals in a window": (lambda: FixedSparsityConfig(1, num_global_blocks=3), "multiple of num_global_blocks"),
    "direction": (
        lambda: BigBirdSparsityConfig(1, attention="both"),
        "'bidirectional' or 'unidirectional', got 'both'",
    ),
    "heads": (lambda: DenseSparsityConfig(0), "num_heads must be a whole number of at least 1, got 0"),
    "block": (lambda: DenseSparsityConfig(1, block=1.5), "block must be"),
    "short window": (lambda: BigBirdSparsityConfig(1).make_layout(32), "num_sliding_window_blocks is 3"),
    "short for random": (
        lambda: BigBirdSparsityConfig(1, num_random_blocks=9).make_layout(128),
        "num_random_blocks is 9, but a sequence of 128 tokens has 8 blocks",
    ),
    "pairs": (
        lambda: VariableSparsityConfig(1, global_block_indices=[0, 4], global_block_end_indices=[2]),
        "1 entries and global_block_indices 2",
    ),
    "backward range": (
        lambda: BSLongformerSparsityConfig(1, global_block_indices=[2], global_block_end_indices=[2]),
        "start 2 must lie before the end 2",
    ),
    "negative index": (lambda: BSLongformerSparsityConfig(1, global_block_indices=[-1]), r"global_block_indices\[0\]"),
    "no window": (lambda: VariableSparsityConfig(1, local_window_blocks=[]), "local_window_blocks is empty"),
    "unknown mode": (lambda: from_config({"mode": "big_bird"}, 1), "sparse_attention.mode"),
    "unknown key": (lambda: from_config({"mode": "fixed", "blok": 16}, 1), "Did you mean 'block'"),
    "wrong type": (lambda: from_config({"block": "16"}, 1), "sparse_attention.block.*'16'"),
    "contradiction": (
        lambda: from_config({"attention": "unidirectional", "horizontal_global_attention": True}, 1),
        "horizontal_global_attention needs",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_and_what_to_do(name: str) -> None:
    make, message = ERRORS[name]
    with pytest.raises(ConfigError, match=message):
        make()


DOCUMENTED = {
    "block": 32, "different_layout_per_head": True, "num_local_blocks": 4, "num_global_blocks": 1,
    "attention": "bidirectional", "horizontal_global_attention": False, "num_different_global_patterns": 4,
    "num_random_blocks": 0, "local_window_blocks": [4], "global_block_indices": [0],
    "global_block_end_indices": None, "num_sliding_window_blocks": 3,
}  # fmt: skip
"""The section of DeepSpeed's documentation, which lists the keys of every mode."""


@pytest.mark.parametrize(
    ("mode", "direct"),
    [
        ("dense", DenseSparsityConfig(4, 32, True)),
        ("fixed", FixedSparsityConfig(4, 32, True, num_different_global_patterns=4)),
        ("variable", VariableSparsityConfig(4, 32, True)),
        ("bigbird", BigBirdSparsityConfig(4, 32, True, num_random_blocks=0)),
        ("bslongformer", BSLongformerSparsityConfig(4, 32, True)),
        ("local_sliding_window", LocalSlidingWindowSparsityConfig(4, 32, attention="bidirectional")),
    ],
)
def test_the_documented_section_loads_in_every_mode(mode: str, direct: SparsityConfig) -> None:
    made = from_config({"mode": mode, **DOCUMENTED}, 4)
    assert type(made) is type(direct)
    assert torch.equal(made.make_layout(32 * 9), direct.make_layout(32 * 9))


def test_the_section_alone_is_fixed_and_its_bigbird_draws_nothing() -> None:
    assert torch.equal(from_config({}, 2).make_layout(160), FixedSparsityConfig(2).make_layout(160))
    section = from_config({"mode": "bigbird"}, 1).make_layout(160)
    assert torch.equal(section, BigBirdSparsityConfig(1, num_random_blocks=0).make_layout(160))
