"""The compiled cross-entropy of rows against fp64, its edge cases against PyTorch, and the loss without a compiler."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dscompile import linear_cross_entropy
from dscompile.codegen.cpu import builder
from dscompile.codegen.cpu.builder import LossBuild, build_loss, loss_kernel
from dscompile.codegen.cpu.loss_kernel import LossKernel

ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def kernel() -> LossKernel:
    found = loss_kernel().kernel
    if found is None:
        pytest.skip(loss_kernel().reason)
    return found


def logits_and_target(rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    logits = (scale * torch.randn(rows, classes, generator=generator)).to(dtype)
    return logits, torch.randint(classes, (rows,), generator=generator)


def exact(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.double()
    return F.cross_entropy(wide, target, reduction="none"), wide.softmax(1) - F.one_hot(target, logits.shape[1])


@pytest.mark.parametrize("classes", [1, 5, 16, 17, 250, 4099, 9000])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_losses_and_gradients(kernel: LossKernel, dtype: torch.dtype, classes: int) -> None:
    if not kernel.takes(dtype):
        pytest.skip("the compiler has no such type")
    logits, target = logits_and_target(9, classes, dtype)
    losses, gradients = exact(logits, target)
    alone = kernel.rows(logits, target, None, gradient=False)
    torch.testing.assert_close(logits, logits_and_target(9, classes, dtype)[0], rtol=0, atol=0)
    found = kernel.rows(logits, target, None, gradient=True)
    assert torch.equal(alone, found)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=1e-6)
    smallest = torch.finfo(dtype).smallest_normal if dtype is torch.float16 else 1e-37
    assert ((logits.double() - gradients).abs() <= ROUNDING[dtype] * 4 * gradients.abs() + 2e-7 + smallest).all()


def test_rows_that_do_not_count(kernel: LossKernel) -> None:
    logits, target = logits_and_target(6, 100, torch.float32)
    counted = torch.tensor([True, False, True, True, False, True])
    losses, gradients = exact(logits, target)
    found = kernel.rows(logits, target, counted, gradient=True)
    torch.testing.assert_close(found, losses * counted, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.double(), gradients * counted.unsqueeze(1), rtol=1e-5, atol=1e-6)
    assert not logits[1].any()
    assert not logits[4].any()


@pytest.mark.parametrize("place", [0, 33, 99])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-45])
def test_special_logits_are_pytorchs(kernel: LossKernel, value: float, place: int) -> None:
    logits, target = logits_and_target(3, 100, torch.float32)
    logits[1, place] = value
    wide = logits.clone().requires_grad_()
    losses = F.cross_entropy(wide, target, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    found = kernel.rows(logits, target, None, gradient=True)
    torch.testing.assert_close(found.float(), losses, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, gradient, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_a_row_of_minus_infinity_is_nan(kernel: LossKernel) -> None:
    logits = torch.full((1, 20), -torch.inf)
    assert kernel.rows(logits, torch.tensor([3]), None, gradient=True).isnan().all()
    assert logits.isnan().all()


def test_long_rows_sum_as_accurately_as_pytorch(kernel: LossKernel) -> None:
    logits, target = logits_and_target(4, 200_000, torch.float32, scale=0.01)
    losses, _ = exact(logits, target)
    theirs = (F.cross_entropy(logits, target, reduction="none") - losses).abs().max()
    assert (kernel.rows(logits, target, None, gradient=False) - losses).abs().max() <= theirs


def test_any_number_of_threads_gives_the_same_bits(kernel: LossKernel) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits, target = logits_and_target(7, 1000, torch.bfloat16)
            results.append((kernel.rows(logits, target, None, gradient=True), logits))
    finally:
        torch.set_num_threads(threads)
    for losses, gradients in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradients, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_the_loss_runs_on_pytorchs_kernels(
    kernel: LossKernel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loss and gradients, within rounding: with the kernel and without."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in ((40, 16), (90, 16)))
    target = torch.randint(90, (40,), generator=generator)
    target[::7] = -100

    def run() -> list[Tensor]:
        loss = linear_cross_entropy(x, weight, target)
        return [loss, *torch.autograd.grad(loss, (x, weight))]

    with_kernel = run()
    monkeypatch.setattr(builder, "loss_kernel", lambda: LossBuild(None, "none here"))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for one, other in zip(with_kernel, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 0.1)


def test_a_compiler_that_is_missing_is_named(tmp_path: Path) -> None:
    build = build_loss(tmp_path, {"CXX": "/nonexistent/c++", "PATH": ""})
    assert build.kernel is None
    assert "/nonexistent/c++" in build.reason


def test_a_damaged_library_is_removed(kernel: LossKernel, tmp_path: Path) -> None:
    first = build_loss(tmp_path, os.environ)
    assert first.kernel is not None
    (library,) = tmp_path.glob("loss-*.so")
    damaged = tmp_path / "other"
    damaged.mkdir()
    (damaged / library.name).write_bytes(b"no library")
    assert "removed" in build_loss(damaged, os.environ).reason
    assert not (damaged / library.name).exists()
