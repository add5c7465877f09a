"""The layout of a ``sparse_attention`` section for a length that is known only when the graph runs.

``dscompile::section_index(like, section, causal)`` makes the index that :mod:`dscompile.attention_ops` reads, for the
heads and the length of ``like`` (``[batch, heads, seq, head_dim]``); ``section`` is the section as JSON. Column indices
are as long as if every block were kept; what lies past the last pointer is never read.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from dscompile.block_layout import compressed_index
from dscompile.errors import ConfigError
from dscompile.sparse_section import SparseAttentionConfig
from dscompile.torch_compat import OpOverload

log = logging.getLogger("dscompile")

Index = tuple[Tensor, Tensor, Tensor, Tensor]

_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define(
    "section_index(Tensor like, str section, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _rows(section: SparseAttentionConfig, heads: int) -> int:
    """Rows of pointers in the index: one for all heads, or one each."""
    return heads if section.different_layout_per_head else 1


@functools.lru_cache(maxsize=64)
def _made(section: str, heads: int, blocks: int, causal: bool, device: torch.device) -> Index:
    """An index on ``device``. A sequence too short for the section is attended to densely, and a warning says so."""
    config = SparseAttentionConfig.model_validate_json(section)
    rows = _rows(config, heads)
    try:
        layout = config.for_heads(heads).make_layout(blocks * config.block)[:rows]
    except ConfigError as error:
        log.warning("sparse_attention: attention to %d tokens stays dense: %s", blocks * config.block, error)
        layout = torch.ones(rows, blocks, blocks, dtype=torch.int64)
    first, second, third, fourth = (x.to(device) for x in compressed_index(layout, causal))
    return first, second, third, fourth


def _section_index(like: Tensor, section: str, causal: bool) -> Index:
    block = SparseAttentionConfig.model_validate_json(section).block
    return _made(section, like.shape[1], -(-like.shape[2] // block), causal, like.device)


def _section_index_fake(like: Tensor, section: str, causal: bool) -> Index:
    config = SparseAttentionConfig.model_validate_json(section)
    heads, blocks = _rows(config, like.shape[1]), -(-like.shape[2] // config.block)

    def of(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.int32)

    room = heads * blocks * blocks
    return of(heads, blocks + 1), of(room), of(heads, blocks + 1), of(room)


_LIBRARY.impl("section_index", _section_index, "CompositeExplicitAutograd")
torch.library.register_fake("dscompile::section_index", _section_index_fake, lib=_LIBRARY)

SECTION_INDEX: OpOverload = torch.ops.dscompile.section_index.default
"""The operator."""
