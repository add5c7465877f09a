"""linear_cross_entropy against cross_entropy in fp64: every chunking, dtype, reduction; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import allocation_peak
from dscompile import linear_cross_entropy, loss_ops
from dscompile.errors import ConfigError

ROWS, WIDTH, CLASSES = 37, 16, 101
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def problem(dtype: torch.dtype, bias: bool) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, WIDTH), (CLASSES, WIDTH), *([(CLASSES,)] if bias else [])]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[3:9] = -100
    return leaves, target


@pytest.mark.parametrize("rows_a_chunk", [1, 10, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradients(monkeypatch, dtype, bias, reduction, rows_a_chunk) -> None:
    monkeypatch.setattr(loss_ops, "CHUNK_BYTES", rows_a_chunk * CLASSES * loss_ops.loss_dtype(dtype).itemsize)
    leaves, target = problem(dtype, bias)
    x, weight, *rest = leaves
    loss = linear_cross_entropy(x, weight, target, *rest, reduction=reduction)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = F.cross_entropy(F.linear(*exact), target, reduction=reduction)
    assert abs(loss - wanted) <= TOLERANCE[dtype] * abs(wanted)
    got = torch.autograd.grad(3 * loss, leaves)
    for gradient, want in zip(got, torch.autograd.grad(3 * wanted, exact), strict=True):
        assert (gradient - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_large_logits_do_not_overflow() -> None:
    x, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1, 0]), reduction="sum")
    assert loss.item() == 2e4
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.tensor([[2.0], [0.0]]))


def test_no_row_counts() -> None:
    leaves, target = problem(torch.float32, False)
    loss = linear_cross_entropy(*leaves, torch.full_like(target, -100))
    assert loss.isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, leaves))


def test_batched_input_and_other_ignored_class() -> None:
    leaves, target = problem(torch.float32, False)
    x = leaves[0][:36].view(2, 18, WIDTH)
    target = target[:36].view(2, 18).where(target[:36].view(2, 18) >= 0, 7)
    got = linear_cross_entropy(x, leaves[1], target, ignore_index=7)
    torch.testing.assert_close(
        got, F.cross_entropy((x @ leaves[1].t()).flatten(0, 1), target.flatten(), ignore_index=7)
    )


def test_a_quarter_of_the_memory_at_a_vocabulary_of_128k() -> None:
    x = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(128_000, 8, requires_grad=True)
    target = torch.randint(128_000, (512,))

    def eager() -> None:
        torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))

    def chunked() -> None:
        torch.autograd.grad(linear_cross_entropy(x, weight, target), (x, weight))

    assert allocation_peak(chunked) <= allocation_peak(eager) / 4


def test_errors() -> None:
    (x, weight), target = problem(torch.float32, False)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        linear_cross_entropy(x, weight, target, reduction="none")
    with pytest.raises(ValueError, match=r"needs a weight \[vocabulary, 16\] and a target \[37\]"):
        linear_cross_entropy(x, weight.t(), target)
    with pytest.raises(IndexError, match="target 101 is out of bounds for 101 classes"):
        linear_cross_entropy(x, weight, target.clamp(min=0) * 0 + CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(CLASSES, WIDTH).bfloat16()}, r"torch.float32, torch.bfloat16; .* one floating dtype"),
        ({"bias": torch.ones(CLASSES - 1)}, r"the bias is \[100\]; expected \[101\]"),
        ({"target": torch.ones(ROWS)}, "the target is torch.float32; expected classes, int64"),
        ({"input": torch.ones(ROWS, WIDTH, dtype=torch.int64)}, "one floating dtype"),
    ],
)
def test_errors_of_dtypes_and_the_bias(change: dict[str, Tensor], message: str) -> None:
    given = {"input": torch.ones(ROWS, WIDTH), "weight": torch.ones(CLASSES, WIDTH), "target": torch.ones(ROWS).long()}
    with pytest.raises(ConfigError, match=message):
        linear_cross_entropy(**(given | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_it_does_for_a_linear_layer(dtype: torch.dtype) -> None:
    """Under autocast the input is what the layer before made, in 16 bits, and the weights are fp32."""
    leaves, target = problem(torch.float32, True)
    found, expected = [], []
    with torch.autocast("cpu", torch.bfloat16):
        x, weight, bias = leaves
        found.append(linear_cross_entropy(x.to(dtype), weight, target, bias))
        expected.append(F.cross_entropy(F.linear(x.to(dtype), weight, bias).float(), target))
    found += torch.autograd.grad(found[0], leaves)
    expected += torch.autograd.grad(expected[0], leaves)
    assert [x.dtype for x in found] == [torch.float32] * 4
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-2)
    exact = F.cross_entropy(F.linear(leaves[0].double(), leaves[1].double(), leaves[2].double()), target)
    assert (found[0] - exact).abs() > 1e-5, "the products are in bf16, as autocast asks"


def test_operator_is_registered_right() -> None:
    leaves, target = problem(torch.float32, True)
    x, weight, bias = leaves
    arguments = (x, weight, bias, target, loss_ops.MEAN, -100, True)
    torch.library.opcheck(torch.ops.dscompile.linear_cross_entropy.default, arguments)


def product_flops(target: Tensor, classes: int = 64) -> int:
    """Operations in the matrix products of one loss with gradients, as the profiler counts them."""
    x, weight = torch.randn(len(target), 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as prof:
        linear_cross_entropy(x, weight, target)
    return sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("one_in", [1, 4, 7])
def test_only_rows_that_count_are_projected(one_in: int) -> None:
    rows = 84
    target = torch.full((rows,), -100)
    target[::one_in] = 3
    every = product_flops(torch.full((rows,), 3))
    assert every >= 2 * (2 * rows * 8 * 64)  # a multiplication and an addition each: forward, input's gradient
    assert product_flops(target) * one_in == every


def test_the_memory_of_a_masked_loss_is_that_of_its_rows() -> None:
    """The buffers are of the rows that count: an eighth of all logits, twice."""
    rows, classes = 512, 4096
    x, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    target = torch.full((rows,), -100)
    target[::8] = 1
    logits = 4 * rows * classes
    assert allocation_peak(lambda: linear_cross_entropy(x, weight, target)) < 0.45 * logits


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_does_not_count_spreads_its_nan_as_in_pytorch(bad: float) -> None:
    leaves, target = problem(torch.float32, True)
    with torch.no_grad():
        leaves[0][4, 2] = bad  # target[4] is ignored
    x, weight, bias = leaves
    got = torch.autograd.grad(linear_cross_entropy(x, weight, target, bias), leaves)
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), target), leaves)
    for gradient, want in zip(got, wanted, strict=True):
        assert torch.equal(gradient.isnan(), want.isnan())
    assert wanted[1].isnan().all()
