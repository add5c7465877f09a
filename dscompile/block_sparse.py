"""Block-sparse attention as users call it: the function, DeepSpeed's module, and its padding helpers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dscompile.block_layout import BlockLayout, checked_layout, traced_index
from dscompile.errors import ConfigError, UnsupportedError
from dscompile.sparsity import SparsityConfig


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor | BlockLayout,
    block: int | None = None,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over the blocks that a layout keeps: ``softmax(scale * q k^T, over the visible keys) v``.

    Args:
        q: queries ``[batch, heads, seq, head_dim]``, fp32, bf16, fp16 or fp64 (the autocast dtype under autocast);
            ``head_dim`` a multiple of 8. ``seq`` need not be a multiple of the block.
        k: keys, like ``q``; or with fewer heads, each read by as many consecutive heads of ``q`` (grouped-query
            attention).
        v: values, like ``k``.
        layout: ``[heads, blocks, blocks]`` or ``[blocks, blocks]`` of zeros and ones with
            ``blocks = ceil(seq / block)``, or a :class:`~dscompile.block_layout.BlockLayout` built once of one.
        block: tokens of a block's side, a multiple of 16 up to 128; may be left out with a ``BlockLayout``.
        causal: hide keys after the query.
        key_padding_mask: bool ``[batch, seq]``, True where a key is padding and hidden from every query (as in
            ``torch.nn.MultiheadAttention``).
        scale: factor of the scores; ``head_dim ** -0.5`` by default.

    Returns:
        ``[batch, heads, seq, head_dim]``. A query that sees no key gets zeros, and gives no gradient.

    Raises:
        ConfigError: a layout or block that does not fit the sequence.
        UnsupportedError: a dtype, head size or mask that no kernel takes.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape[2:] != q.shape[2:] or v.shape != k.shape:
        raise UnsupportedError(
            f"sparse attention: q, k, v have shapes {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; expected "
            "[batch, heads, seq, head_dim] with one seq (self-attention) and head_dim, and v like k."
        )
    if isinstance(layout, BlockLayout):
        if block not in (None, layout.block):
            raise ConfigError(f"sparse attention: block is {block}, but the layout was built for {layout.block}.")
        if layout.causal and not causal:
            raise ConfigError("sparse attention: the layout was built with causal=True; pass causal=True here too.")
        heads, blocks, side = layout.heads, layout.blocks, layout.block
    else:
        if block is None:
            raise ConfigError(
                "sparse attention: a layout tensor needs its block, e.g. sparse_attention(..., block=64)."
            )
        layout = checked_layout(layout, block)
        heads, blocks, side = layout.shape[0], layout.shape[1], block
    _check_fit(heads, blocks, side, q)
    if isinstance(layout, BlockLayout):
        index = (layout.row_ptr, layout.col_idx, layout.t_row_ptr, layout.t_col_idx)
    elif torch.compiler.is_compiling():
        index = traced_index(layout, causal)
    else:
        made = BlockLayout.of(layout, side, causal=causal)
        index = (made.row_ptr, made.col_idx, made.t_row_ptr, made.t_col_idx)
    kind = q.device.type
    casts = torch.amp.is_autocast_available(kind)  # not on the meta device
    if casts and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    # The kernel chooses its own precision.
    with torch.autocast(kind, enabled=False) if casts else contextlib.nullcontext():
        out: Tensor = torch.ops.dscompile.block_sparse_attention.default(
            q, k, v, *index, side, causal, key_padding_mask, scale
        )[0]
    return out


def _check_fit(heads: int, blocks: int, block: int, q: Tensor) -> None:
    if heads not in (1, q.shape[1]):
        raise ConfigError(f"sparse attention: the layout has {heads} heads, q has {q.shape[1]}.")
    needed = -(-q.shape[2] // block)
    if blocks != needed:
        raise ConfigError(
            f"sparse attention: the layout has {blocks} x {blocks} blocks of {block} tokens; a sequence of "
            f"{q.shape[2]} tokens needs {needed} x {needed}. Make it with make_layout({needed * block})."
        )


class SparseSelfAttention(nn.Module):
    """DeepSpeed's module around block-sparse attention.

    A sequence shorter than ``max_seq_length`` uses the upper left part of the longest layout, as DeepSpeed does.

    Args:
        sparsity_config: the layout.
        key_padding_mask_mode: ``"add"``: the mask is added to the scores, 0 keeps a key and -10000 or less hides it;
            ``"mul"``: 0 hides a key.
        attn_mask_mode: accepted for compatibility; see ``forward``.
        max_seq_length: of the longest sequence, in tokens.
        causal: hide keys after the query, inside the diagonal blocks too (what DeepSpeed's users pass as
            ``attn_mask``).
    """

    def __init__(
        self,
        sparsity_config: SparsityConfig,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "mul",
        max_seq_length: int = 2048,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if not hasattr(sparsity_config, "make_layout"):
            raise ConfigError(
                f"SparseSelfAttention: sparsity_config is a {type(sparsity_config).__name__}; expected a class of "
                "dscompile.sparsity, e.g. FixedSparsityConfig(num_heads=12)."
            )
        for name, mode in (("key_padding_mask_mode", key_padding_mask_mode), ("attn_mask_mode", attn_mask_mode)):
            if mode not in ("add", "mul"):
                raise ConfigError(f"{name} must be 'add' or 'mul', got {mode!r}.")
        self.sparsity_config = sparsity_config
        self.key_padding_mask_mode = key_padding_mask_mode
        self.attn_mask_mode = attn_mask_mode
        self.causal = causal
        self.register_buffer("master_layout", sparsity_config.make_layout(max_seq_length), persistent=False)
        self._compiled: dict[int, BlockLayout] = {}

    def get_layout(self, seq_len: int) -> Tensor:
        """The layout of a sequence: ``[heads, ceil(seq_len / block), ceil(seq_len / block)]``.

        Raises:
            ConfigError: the sequence is longer than ``max_seq_length``.
        """
        layout: Tensor = self.get_buffer("master_layout")
        blocks = -(-seq_len // self.sparsity_config.block)
        if blocks > layout.shape[1]:
            longest = layout.shape[1] * self.sparsity_config.block
            raise ConfigError(f"SparseSelfAttention: a sequence of {seq_len} tokens; max_seq_length is {longest}.")
        return layout[:, :blocks, :blocks]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of a whole sequence to itself.

        Args:
            query: ``[batch, heads, seq, head_dim]``.
            key: like ``query``.
            value: like ``query``.
            rpe: must be None.
            key_padding_mask: ``[batch, seq]`` or with dimensions of 1 between (``[batch, 1, 1, seq]``).
            attn_mask: must be None.

        Raises:
            UnsupportedError: ``rpe``, ``attn_mask``, a mask of another shape, or an added one with values other than 0
                and -10000 or less.
        """
        if rpe is not None:
            raise UnsupportedError("SparseSelfAttention: rpe (a bias on the scores) is not supported.")
        if attn_mask is not None:
            raise UnsupportedError(
                "SparseSelfAttention: attn_mask is not supported; for causal attention build the module with "
                "causal=True, other fixed masks belong into the layout."
            )
        padding = None if key_padding_mask is None else self._padding(key_padding_mask)
        layout = self.get_layout(query.shape[-2])
        known = layout if torch.compiler.is_compiling() else self._index(layout)
        return sparse_attention(
            query, key, value, known, self.sparsity_config.block, causal=self.causal, key_padding_mask=padding
        )

    def _index(self, layout: Tensor) -> BlockLayout:
        made = self._compiled.get(layout.shape[1])
        if made is None or made.device != layout.device:
            made = BlockLayout.of(layout, self.sparsity_config.block, causal=self.causal)
            self._compiled[layout.shape[1]] = made
        return made

    def _padding(self, mask: Tensor) -> Tensor:
        batch, keys = mask.shape[0], mask.shape[-1]
        if mask.dim() < 2 or any(size != 1 for size in mask.shape[1:-1]):
            raise UnsupportedError(
                f"SparseSelfAttention: the key_padding_mask has shape {list(mask.shape)}; expected [batch, seq], with "
                "dimensions of 1 between at most: it hides whole keys. Other fixed masks belong into the layout."
            )
        mask = mask.reshape(batch, keys)
        if self.key_padding_mask_mode == "mul":
            return mask == 0
        if mask.dtype is torch.bool:
            raise UnsupportedError(
                "SparseSelfAttention: a bool key_padding_mask with key_padding_mask_mode='add'; use 'mul' (True keeps)."
            )
        hidden: Tensor = torch.ops.dscompile.hidden_keys.default(mask.detach())
        return hidden


def _hidden_keys(mask: Tensor) -> Tensor:
    """Which keys an added mask hides; an operator, because in a compiled graph its values are only there at run time.

    Raises:
        UnsupportedError: values that neither keep nor hide.
    """
    hidden = mask <= -10000
    if not (hidden | (mask == 0)).all():
        raise UnsupportedError(
            "SparseSelfAttention: the added key_padding_mask has values other than 0 (keep) and -10000 or less (hide)."
        )
    return hidden


def _hidden_keys_fake(mask: Tensor) -> Tensor:
    return torch.empty_like(mask, dtype=torch.bool)


_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define("hidden_keys(Tensor mask) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("hidden_keys", _hidden_keys, "CompositeExplicitAutograd")
torch.library.register_fake("dscompile::hidden_keys", _hidden_keys_fake, lib=_LIBRARY)


class SparseAttentionUtils:
    """DeepSpeed's helpers for a sequence that is no multiple of the block.

    Attention itself takes a shorter last block; pad where the rest of the model wants whole blocks.
    """

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
        model_embeddings: Any,
    ) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Pad a model's inputs at their end to whole blocks; each may be None.

        Args:
            block_size: tokens of a block.
            input_ids: ``[batch, seq]``, padded with ``pad_token_id``.
            attention_mask: ``[batch, seq]``, padded with 0.
            token_type_ids: ``[batch, seq]``, padded with 0.
            position_ids: ``[batch, seq]``, padded with ``pad_token_id``.
            inputs_embeds: ``[batch, seq, hidden]``, padded with ``model_embeddings(pad_token_id)``.
            pad_token_id: the id of the padding token.
            model_embeddings: from ids to embeddings.

        Returns:
            The number of tokens added, and the five inputs.
        """
        first = next((x for x in (input_ids, inputs_embeds) if x is not None), None)
        if first is None:
            raise ConfigError("pad_to_block_size: neither input_ids nor inputs_embeds was given.")
        batch, seq = first.shape[:2]
        pad = -seq % block_size
        if pad:
            if inputs_embeds is not None:
                ids = torch.full((batch, pad), pad_token_id, dtype=torch.long, device=inputs_embeds.device)
                inputs_embeds = torch.cat([inputs_embeds, model_embeddings(ids)], dim=1)
            input_ids = _padded(input_ids, pad, pad_token_id)
            position_ids = _padded(position_ids, pad, pad_token_id)
            attention_mask = _padded(attention_mask, pad, 0)
            token_type_ids = _padded(token_type_ids, pad, 0)
        return pad, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
        """Cut ``pad_len`` tokens off the end of ``[batch, seq, ...]``."""
        return sequence_output[:, :-pad_len] if pad_len else sequence_output


def _padded(values: Tensor | None, count: int, fill: int) -> Tensor | None:
    return None if values is None else functional.pad(values, (0, count), value=fill)
