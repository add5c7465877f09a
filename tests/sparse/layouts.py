"""One layout of every kind, for two heads and blocks of 16; shared by the tests of the CPU and the GPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dscompile.sparsity import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    VariableSparsityConfig,
)

HEADS = 2
LAYOUTS: dict[str, Callable[[], Any]] = {
    "dense": lambda: DenseSparsityConfig(HEADS),
    "fixed": lambda: FixedSparsityConfig(HEADS, num_local_blocks=2),
    "fixed per head": lambda: FixedSparsityConfig(HEADS, 16, True, num_local_blocks=2, num_different_global_patterns=2),
    "variable": lambda: VariableSparsityConfig(HEADS, num_random_blocks=1, local_window_blocks=[1, 2]),
    "bigbird": lambda: BigBirdSparsityConfig(HEADS, 16, True),
    "longformer": lambda: BSLongformerSparsityConfig(HEADS, global_block_indices=[1]),
    "window": lambda: LocalSlidingWindowSparsityConfig(HEADS),
}
