"""Evoformer attention against the formula in fp64, its gradients, and the memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dscompile
from benchmarks.memory import allocation_peak
from dscompile.errors import UnsupportedError

SHAPE = (2, 8, 32, 4, 16)


def inputs(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    torch.manual_seed(0)
    batch, sequences, residues, heads, _ = shape
    qkv = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]
    mask = torch.randn(batch, sequences, 1, 1, residues, dtype=torch.float64)
    pair = torch.randn(batch, 1, heads, residues, residues, dtype=torch.float64)
    return qkv, [b.to(dtype).requires_grad_() for b in (mask, pair)], torch.randn(shape, dtype=torch.float64).to(dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor], scale: float | None = None) -> Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bnqhd,bnkhd->bnhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    for bias in biases:
        scores = scores + bias.double()
    return torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1), v)


@pytest.mark.parametrize("chunk", [None, 1, 5, 32], ids=str)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_output_and_all_gradients(count: int, chunk: int | None) -> None:
    qkv, biases, grad = inputs()
    biases = biases[:count]
    out = dscompile.evoformer_attention(*qkv, biases, chunk=chunk)
    assert out.dtype is torch.float32
    found = [out, *torch.autograd.grad(out, [*qkv, *biases], grad)]
    want = by_hand(*qkv, biases)
    expected = [want, *torch.autograd.grad(want, [*qkv, *biases], grad.double())]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    qkv, biases, grad = inputs(dtype)
    out = dscompile.DS4Sci_EvoformerAttention(*qkv, biases)
    found = [out, *torch.autograd.grad(out, [*qkv, *biases], grad)]
    want = by_hand(*qkv, biases)
    expected = [want, *torch.autograd.grad(want, [*qkv, *biases], grad.double())]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is dtype
        # One rounding of the result; the output, rounded, also enters the gradients' row sums.
        torch.testing.assert_close(a.double(), b.double(), atol=3e-2, rtol=torch.finfo(dtype).eps * 4)


def test_deepspeeds_function_takes_its_argument_names_and_missing_biases() -> None:
    qkv, (mask, pair), _ = inputs()
    q, k, v = qkv
    for biases in ([], [None], [mask], [None, pair], [mask, pair], [None, None]):
        found = dscompile.DS4Sci_EvoformerAttention(Q=q, K=k, V=v, biases=biases)
        expected = by_hand(q, k, v, [b for b in biases if b is not None])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    with pytest.raises(UnsupportedError, match="biases is a Tensor; expected a list"):
        dscompile.evoformer_attention(q, k, v, mask)


def test_the_pair_bias_alone_and_a_scale() -> None:
    qkv, (_, pair), _ = inputs()
    found = dscompile.evoformer_attention(*qkv, [None, pair], scale=0.1)
    torch.testing.assert_close(found, by_hand(*qkv, [pair], 0.1), atol=1e-5, rtol=1e-5, check_dtype=False)


def test_a_residue_that_sees_nothing_gets_zeros() -> None:
    qkv, (mask, pair), grad = inputs()
    hidden = torch.zeros_like(mask)
    hidden[0, 3] = -torch.inf
    out = dscompile.evoformer_attention(*qkv, [hidden, pair])
    assert not out[0, 3].any()
    for gradient in torch.autograd.grad(out, [*qkv, pair], grad):
        assert gradient.isfinite().all()
    assert not torch.autograd.grad(dscompile.evoformer_attention(*qkv, [hidden, pair]), qkv, grad)[0][0, 3].any()


@pytest.mark.parametrize("chunk", [4, 16])
def test_temporary_memory_keeps_to_the_chunk(chunk: int) -> None:
    shape = (1, 16, 128, 4, 8)
    qkv, biases, grad = inputs(shape=shape)
    naive = 16 * 4 * 128 * 128 * 4
    made: list[Any] = []
    peak = allocation_peak(lambda: made.append(dscompile.evoformer_attention(*qkv, biases, chunk=chunk)))
    out = made[0]
    kept = out.nbytes + 16 * 4 * 128 * 4  # the result, and what backward needs of the softmax
    assert peak - kept <= naive * chunk / 128
    peak = allocation_peak(lambda: made.append(torch.autograd.grad(out, [*qkv, *biases], grad, retain_graph=True)))
    gradients = sum(x.nbytes for x in (*qkv, *biases))
    assert peak - gradients <= naive * chunk / 128


def test_it_traces_as_one_graph() -> None:
    qkv, biases, grad = inputs(shape=(1, 2, 8, 2, 8))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pair: Tensor) -> Tensor:
        return dscompile.evoformer_attention(q * 2, k, v, [mask, pair]) + 1

    torch.compiler.reset()
    options = {"regions": "aten", "cache": False, "summary": False}
    for backend, chosen in (("aot_eager", {}), ("dscompile", {"options": options})):
        out = torch.compile(attend, backend=backend, fullgraph=True, **chosen)(*qkv, *biases)
        found = torch.autograd.grad(out, [*qkv, *biases], grad)
        expected = torch.autograd.grad(attend(*qkv, *biases), [*qkv, *biases], grad)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_bad_input() -> None:
    qkv, (mask, pair), _ = inputs()
    with pytest.raises(UnsupportedError, match="3 biases"):
        dscompile.evoformer_attention(*qkv, [mask, pair, mask])
    with pytest.raises(UnsupportedError, match=r"the mask is torch.float32 \[2, 1, 4, 32, 32\]; expected a float"):
        dscompile.evoformer_attention(*qkv, [pair])
    with pytest.raises(UnsupportedError, match="the pair bias"):
        dscompile.evoformer_attention(*qkv, [mask, mask])
    with pytest.raises(UnsupportedError, match="expected one shape"):
        dscompile.evoformer_attention(qkv[0], qkv[1][:, :, :8], qkv[2])
    with pytest.raises(UnsupportedError, match="expected one float dtype"):
        dscompile.evoformer_attention(qkv[0], qkv[1].bfloat16(), qkv[2])
