"""The ``"sparse_attention": {...}`` section of a configuration, in DeepSpeed's keys."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dscompile.errors import ConfigError, nearest
from dscompile.sparsity import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)

MODES: Mapping[str, type[SparsityConfig]] = MappingProxyType(
    {
        "dense": DenseSparsityConfig,
        "fixed": FixedSparsityConfig,
        "variable": VariableSparsityConfig,
        "bigbird": BigBirdSparsityConfig,
        "bslongformer": BSLongformerSparsityConfig,
        "local_sliding_window": LocalSlidingWindowSparsityConfig,
    }
)
"""``mode`` -> the class of its layout; the last name is ours, DeepSpeed's section has none for it."""

Blocks = Annotated[tuple[int, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]


class SparseAttentionConfig(BaseModel):
    """The section's keys and defaults, as DeepSpeed's configuration reads them.

    A key that another mode has and the chosen one lacks is ignored, as DeepSpeed does: its documented example lists
    all keys at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mode: Literal["dense", "fixed", "variable", "bigbird", "bslongformer", "local_sliding_window"] = Field(
        "fixed", description="The layout."
    )
    block: int = Field(16, description="Tokens of a block's side.")
    different_layout_per_head: bool = Field(False, description="Each head has its own pattern.")
    num_local_blocks: int = Field(4, description="fixed: blocks of a window.")
    num_global_blocks: int = Field(1, description="fixed: global blocks of each window. bigbird: first blocks.")
    attention: Literal["bidirectional", "unidirectional"] | None = Field(
        None, description="Keep all blocks, or the diagonal and below; unset: the layout's default."
    )
    horizontal_global_attention: bool = Field(False, description="fixed, variable: global blocks attend to all.")
    num_different_global_patterns: int = Field(1, description="fixed: places of the global blocks over heads.")
    # 0 for every mode: DeepSpeed's section does so for bigbird too, whose class draws 1.
    num_random_blocks: int = Field(0, description="variable, bigbird: random blocks of each row.")
    local_window_blocks: Blocks = Field((4,), description="variable: sizes of the windows; the last repeats.")
    global_block_indices: Blocks = Field((0,), description="variable, bslongformer: global blocks.")
    global_block_end_indices: Blocks | None = Field(None, description="variable, bslongformer: ends of global ranges.")
    num_sliding_window_blocks: int = Field(3, description="bigbird, bslongformer, local_sliding_window: width.")
    seed: int = Field(0, description="variable, bigbird: of the random blocks, equal on every rank.")

    @model_validator(mode="after")
    def _consistent(self) -> SparseAttentionConfig:
        self.for_heads(1)
        return self

    def for_heads(self, num_heads: int) -> SparsityConfig:
        """The layout's configuration for an attention of that many heads. Raises :class:`ConfigError`."""
        accepted = inspect.signature(MODES[self.mode]).parameters
        values = {k: v for k in accepted if k != "num_heads" and (v := getattr(self, k)) is not None}
        return MODES[self.mode](num_heads, **values)


def from_config(section: Mapping[str, Any], num_heads: int) -> SparsityConfig:
    """The layout that a ``"sparse_attention"`` section of a DeepSpeed configuration asks for.

    Args:
        section: the section; ``mode`` is ``"fixed"`` if it is missing.
        num_heads: heads of the attention it is for.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong value, or options that contradict each other.
    """
    valid = SparseAttentionConfig.model_fields
    for key in section:
        if key not in valid:
            raise ConfigError(
                f"sparse_attention: unknown key {key!r}.{nearest(str(key), valid)} Keys: {', '.join(valid)}."
            )
    try:
        return SparseAttentionConfig(**section).for_heads(num_heads)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("sparse_attention", *map(str, first["loc"])))
        raise ConfigError(f"{where}: {first['msg']} (got {first['input']!r}).") from None
