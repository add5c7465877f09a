"""``dscompile.sparse_attention`` against dense attention with a mask, in fp64 by hand, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dscompile
from dscompile.block_layout import BlockLayout
from dscompile.block_sparse import SparseAttentionUtils, SparseSelfAttention
from dscompile.errors import ConfigError, UnsupportedError
from dscompile.sparsity import FixedSparsityConfig
from tests.sparse.layouts import HEADS, LAYOUTS

SIZE = 16
TOLERANCE = {
    torch.float32: (5e-5, 5e-4),
    torch.bfloat16: (3e-2, 3e-2),
    torch.float16: (4e-3, 4e-3),
    torch.float64: (1e-12, 1e-10),
}
"""Absolute and relative; fp32 is DeepSpeed's own bar, bf16 and fp16 some units of rounding on values around 1."""


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensor, block: int, causal: bool, padding: Tensor | None
) -> Tensor:
    """Masked dense attention in fp64, every score written out; a query without keys gives 0."""
    seq = q.shape[2]
    seen = layout.bool().repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :seq, :seq]
    seen = seen.expand(q.shape[0], q.shape[1], seq, seq).clone()
    if causal:
        seen &= torch.arange(seq)[None, :] <= torch.arange(seq)[:, None]
    if padding is not None:
        seen &= ~padding[:, None, None, :]
    scores = (q.double() @ k.double().transpose(-1, -2)) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * seen
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-300), 0.0) @ v.double()


def inputs(seq: int, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, heads, seq, SIZE, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]
    return made, torch.randn(2, heads, seq, SIZE, dtype=torch.float64).to(dtype)


def results(out: Tensor, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, qkv, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("seq", [96, 85], ids=["whole", "ragged"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_output_and_gradients_are_those_of_masked_dense_attention(name: str, seq: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]().make_layout(96)
    padding = torch.zeros(2, seq, dtype=torch.bool)
    padding[0, -20:] = True
    absolute, relative = TOLERANCE[dtype]
    for causal, mask in ((False, None), (True, None), (False, padding), (True, padding)):
        qkv, grad = inputs(seq, dtype)
        out = dscompile.sparse_attention(*qkv, layout, 16, causal=causal, key_padding_mask=mask)
        assert out.dtype is dtype
        expected = results(by_hand(*qkv, layout, 16, causal, mask), qkv, grad)
        for got, want in zip(results(out, qkv, grad), expected, strict=True):
            torch.testing.assert_close(got.double(), want.double(), atol=absolute, rtol=relative)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("seq", [256, 250, 129])
def test_block_sizes(block: int, seq: int) -> None:
    blocks = -(-seq // block)
    generator = torch.Generator().manual_seed(block)
    layout = (
        torch.rand(HEADS, blocks, blocks, generator=generator) < 0.5
    )  # some rows see nothing, some columns are unseen
    layout[:, 0] = False
    qkv, grad = inputs(seq, torch.float64)
    out = dscompile.sparse_attention(*qkv, layout, block)
    assert not out[:, :, :block].any()
    for got, want in zip(
        results(out, qkv, grad), results(by_hand(*qkv, layout, block, False, None), qkv, grad), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)


def test_a_built_layout_gives_what_its_tensor_gives() -> None:
    layout = LAYOUTS["bigbird"]().make_layout(96)
    qkv, _ = inputs(96)
    for causal in (False, True):
        want = dscompile.sparse_attention(*qkv, layout, 16, causal=causal)
        for built in (BlockLayout.of(layout, 16, causal=causal), BlockLayout.of(layout.bool(), 16)):
            torch.testing.assert_close(
                dscompile.sparse_attention(*qkv, built, causal=causal), want, atol=1e-6, rtol=1e-5
            )


def test_what_a_built_layout_knows() -> None:
    layout = torch.tensor([[[1, 0, 1], [0, 0, 1], [1, 1, 1]]])
    built = BlockLayout.of(layout.expand(4, 3, 3), 32)
    assert (built.heads, built.blocks, built.kept, built.density) == (4, 3, 24, 24 / 36)
    assert built.row_ptr.tolist() == [[0, 2, 3, 6]]
    assert built.col_idx.tolist() == [0, 2, 2, 0, 1, 2]
    assert built.t_row_ptr.tolist() == [[0, 2, 3, 6]]
    assert built.t_col_idx.tolist() == [0, 2, 2, 0, 1, 2]
    past = BlockLayout.of(layout, 32, causal=True)
    assert past.row_ptr.tolist() == [[0, 1, 1, 4]]
    assert past.col_idx.tolist() == [0, 0, 1, 2]
    assert past.t_col_idx.tolist() == [0, 2, 2, 2]
    two = BlockLayout.of(torch.stack([layout[0], 1 - layout[0]]), 32)
    assert two.row_ptr.tolist() == [[0, 2, 3, 6], [6, 7, 9, 9]]


def test_scale_and_autocast() -> None:
    layout = LAYOUTS["fixed"]().make_layout(96)
    qkv, _ = inputs(96)
    scaled = dscompile.sparse_attention(*qkv, layout, 16, scale=0.5)
    want = by_hand(qkv[0] * 0.5 * SIZE**0.5, *qkv[1:], layout, 16, False, None)
    torch.testing.assert_close(scaled.double(), want, atol=5e-5, rtol=5e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = dscompile.sparse_attention(*qkv, layout, 16)
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.double(), by_hand(*qkv, layout, 16, False, None), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "dscompile"])
@pytest.mark.parametrize("built", [False, True], ids=["tensor", "built"])
def test_it_compiles_as_one_graph(backend: str, built: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout: Any = LAYOUTS["bigbird"]().make_layout(96)
    if built:
        layout = BlockLayout.of(layout, 16, causal=True)
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[1, 50:] = True

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return dscompile.sparse_attention(q * 2, k, v, layout, 16, causal=True, key_padding_mask=mask) + 1

    qkv, grad = inputs(90)
    expected = results(attend(*qkv, padding), qkv, grad)
    torch.compiler.reset()
    if backend == "inductor":  # its cache does not know when an operator of ours returns other strides than before
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = results(torch.compile(attend, backend=backend, fullgraph=True)(*qkv, padding), qkv, grad)
    for got, want in zip(compiled, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_deepspeeds_module() -> None:
    config = FixedSparsityConfig(HEADS, num_local_blocks=2)
    module = SparseSelfAttention(config, max_seq_length=128)
    assert not module.state_dict()
    qkv, _ = inputs(85)
    layout = config.make_layout(128)[:, :6, :6]
    torch.testing.assert_close(module(*qkv).double(), by_hand(*qkv, layout, 16, False, None), atol=5e-5, rtol=5e-4)
    padding = torch.zeros(2, 85, dtype=torch.bool)
    padding[:, 70:] = True
    want = by_hand(*qkv, layout, 16, True, padding)
    add = SparseSelfAttention(config, max_seq_length=128, causal=True)
    mul = SparseSelfAttention(config, key_padding_mask_mode="mul", max_seq_length=128, causal=True)
    for got in (
        add(*qkv, key_padding_mask=padding * -10000.0),
        add(*qkv, key_padding_mask=(padding * -1e9)[:, None, None, :]),
        mul(*qkv, key_padding_mask=(~padding).float()),
        mul(*qkv, key_padding_mask=~padding),
    ):
        torch.testing.assert_close(got.double(), want, atol=5e-5, rtol=5e-4)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), module(*qkv))


def test_padding_and_unpadding() -> None:
    table = torch.nn.Embedding(10, 4)
    ids = torch.arange(10).view(2, 5)
    pad, padded, mask, kinds, places, embeds = SparseAttentionUtils.pad_to_block_size(
        8, ids, torch.ones(2, 5), None, ids, table(ids), 9, table
    )
    assert pad == 3
    assert padded is not None
    assert padded.tolist()[0] == [0, 1, 2, 3, 4, 9, 9, 9]
    assert mask is not None
    assert mask.tolist()[0] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert kinds is None
    assert places is not None
    assert places.shape == (2, 8)
    assert embeds is not None
    assert torch.equal(embeds[:, 5:], table.weight[9].expand(2, 3, 4))
    assert torch.equal(SparseAttentionUtils.unpad_sequence_output(pad, embeds), table(ids))
    assert SparseAttentionUtils.pad_to_block_size(5, ids, None, None, None, None, 9, None)[:2] == (0, ids)
    assert SparseAttentionUtils.unpad_sequence_output(0, ids) is ids


ONES = torch.ones(HEADS, 6, 6, dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_queries_read_shared_heads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, h, 75, 24, generator=generator).to(dtype) for h in (6, 3, 3, 6))
    layout = torch.rand(6, 5, 5, generator=generator) < 0.6
    narrow = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dscompile.sparse_attention(*narrow, layout, 16, causal=True)
    wide = [q.double().requires_grad_(), *(x.double().repeat_interleave(2, 1).requires_grad_() for x in (k, v))]
    expected = dscompile.sparse_attention(*wide, layout, 16, causal=True)
    found = torch.autograd.grad(out, narrow, grad)
    dq, dk, dv = torch.autograd.grad(expected, wide, grad.double())
    summed = [x[:, ::2] + x[:, 1::2] for x in (dk, dv)]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for got, want in zip((out, *found), (expected, dq, *summed), strict=True):
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not square": ({"layout": torch.ones(2, 6, 5, dtype=torch.bool)}, ConfigError, r"shape \[2, 6, 5\]"),
    "floating": ({"layout": ONES.float()}, ConfigError, "torch.float32"),
    "values": ({"layout": ONES.long() * 2}, ConfigError, "other than 0 and 1"),
    "grouped heads": (
        {"q": torch.ones(2, 3, 96, 16), "layout": ONES[:1]},
        UnsupportedError,
        "2 heads of k and v do not divide 3 heads of q",
    ),
    "heads": ({"layout": torch.ones(3, 6, 6, dtype=torch.bool)}, ConfigError, "3 heads, q has 2"),
    "length": ({"layout": ONES[:, :5, :5]}, ConfigError, r"needs 6 x 6. Make it with make_layout\(96\)"),
    "block": ({"block": 24}, ConfigError, "block 24 is not one of 16, 32"),
    "a list": ({"layout": ONES.tolist()}, ConfigError, "the layout is a list; expected a tensor of zeros and ones"),
    "its maker": (
        {"layout": FixedSparsityConfig(HEADS)},
        ConfigError,
        r"the layout is a FixedSparsityConfig; .* its make_layout\(seq_len\)",
    ),
    "a block of 16.0": ({"block": 16.0}, ConfigError, r"block 16\.0 is not one of 16, 32"),
    "no head size": ({name: torch.ones(2, 2, 96, 0) for name in "qkv"}, UnsupportedError, "head size 0 is not"),
    "block in quotes": ({"block": "16"}, ConfigError, "block '16' is not one of 16, 32"),
    "no block": ({"block": None}, ConfigError, "needs its block"),
    "another block": ({"layout": BlockLayout.of(ONES, 16), "block": 32}, ConfigError, "built for 16"),
    "causal layout": ({"layout": BlockLayout.of(ONES, 16, causal=True)}, ConfigError, "pass causal=True"),
    "dtype": ({"q": torch.ones(2, 2, 96, 16, dtype=torch.int32)}, UnsupportedError, "torch.int32"),
    "head size": (
        {name: torch.ones(2, 2, 96, 12) for name in "qkv"},
        UnsupportedError,
        "head size 12 is not a multiple of 8",
    ),
    "cross attention": ({"k": torch.ones(2, 2, 32, 16)}, UnsupportedError, "with one seq"),
    "additive mask": ({"key_padding_mask": torch.zeros(2, 96)}, UnsupportedError, "True where a key is padding"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, message = BAD[name]
    arguments: dict[str, Any] = {n: torch.ones(2, 2, 96, 16) for n in "qkv"}
    arguments |= {"layout": ONES, "block": 16} | change
    with pytest.raises(error, match=message):
        dscompile.sparse_attention(**arguments)


def test_what_deepspeeds_module_refuses() -> None:
    module = SparseSelfAttention(FixedSparsityConfig(HEADS), max_seq_length=128)
    qkv, _ = inputs(96)
    with pytest.raises(UnsupportedError, match="rpe"):
        module(*qkv, rpe=torch.zeros(96, 96))
    with pytest.raises(UnsupportedError, match="causal=True"):
        module(*qkv, attn_mask=torch.ones(96, 96))
    with pytest.raises(UnsupportedError, match="other than 0"):
        module(*qkv, key_padding_mask=torch.full((2, 96), -1.0))
    with pytest.raises(UnsupportedError, match=r"has shape \[2, 1, 96, 96\]; expected \[batch, seq\]"):
        module(*qkv, key_padding_mask=torch.zeros(2, 1, 96, 96))
    with pytest.raises(ConfigError, match="sparsity_config is a dict; expected a class of"):
        SparseSelfAttention({"mode": "fixed"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_seq_length is 128"):
        module(*(torch.ones(1, HEADS, 160, SIZE) for _ in range(3)))
    with pytest.raises(ConfigError, match="'add' or 'mul', got 'plus'"):
        SparseSelfAttention(FixedSparsityConfig(HEADS), key_padding_mask_mode="plus")


def test_values_are_checked_in_a_compiled_graph_too() -> None:
    """There they are known at run time; else an added mask of -1 keeps its key, a layout of twos its block."""
    torch.compiler.reset()
    qkv, _ = inputs(96)
    module = SparseSelfAttention(FixedSparsityConfig(HEADS), max_seq_length=128)

    def attend(mask: Tensor, layout: Tensor) -> Tensor:
        return module(*qkv, key_padding_mask=mask) + dscompile.sparse_attention(*qkv, layout, 16)

    run = torch.compile(attend, backend="dscompile", fullgraph=True, options={"regions": "aten", "cache": False})
    masks = torch.zeros(2, 1, 1, 96)
    masks[0, ..., 60:] = -10000
    torch.testing.assert_close(run(masks, ONES.long()), attend(masks, ONES.long()))
    with pytest.raises(UnsupportedError, match="values other than 0"):
        run(masks - 1, ONES.long())
    with pytest.raises(ConfigError, match="other than 0 and 1"):
        run(masks, ONES.long() * 2)


def test_shapes_on_the_meta_device() -> None:
    qkv = [x.to("meta") for x in inputs(96)[0]]
    assert dscompile.sparse_attention(*qkv, ONES, 16).shape == qkv[0].shape
