"""Our decompositions: the values of PyTorch's kernels, and no buffer of zeros."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from benchmarks.memory import allocation_peak
from dscompile.codegen.decompositions import (
    cross_entropy_backward,
    join_cross_entropy,
    nll_loss_backward,
    sum_columns,
)

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("shape", "reduction", "weighted"),
    list(itertools.product([(7,), (5, 7), (2, 7, 3, 4)], [0, 1, 2], [False, True])),
)
def test_nll_loss_backward_equals_the_kernel(shape: tuple[int, ...], reduction: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape) + reduction)
    channel = 0 if len(shape) == 1 else 1
    scores = torch.randn(shape, generator=generator)
    target = torch.randint(7, [n for i, n in enumerate(shape) if i != channel], generator=generator)
    if target.dim():
        target.view(-1)[0] = -100  # one ignored target
    weight = torch.rand(7, generator=generator) if weighted else None
    spatial = len(shape) == 4
    forward = torch.ops.aten.nll_loss2d_forward if spatial else torch.ops.aten.nll_loss_forward
    backward = torch.ops.aten.nll_loss2d_backward if spatial else torch.ops.aten.nll_loss_backward
    loss, total = forward(scores, target, weight, reduction, -100)
    gradient = torch.randn(loss.shape, generator=generator)
    expected = backward(gradient, scores, target, weight, reduction, -100, total)
    found = nll_loss_backward(gradient, scores, target, weight, reduction, -100, total)
    assert torch.equal(found, expected)
    assert found.dtype is expected.dtype


def softmax_and_loss_backward(shape: tuple[int, ...], reduction: int, weight: torch.Tensor | None) -> fx.GraphModule:
    """Both gradients of a cross-entropy with an ignored target; its input are log-probabilities and the upstream."""
    generator = torch.Generator().manual_seed(0)
    channel = 0 if len(shape) == 1 else 1
    scores = torch.randn(shape, generator=generator).log_softmax(channel)
    target = torch.randint(7, [n for i, n in enumerate(shape) if i != channel], generator=generator)
    if target.dim():
        target.view(-1)[0] = -100
    forward, backward = aten.nll_loss_forward.default, aten.nll_loss_backward.default
    if len(shape) == 4:
        forward, backward = aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default
    loss, total = forward(scores, target, weight, reduction, -100)

    def gradient(scores: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
        of_scores = backward(upstream, scores, target, weight, reduction, -100, total)
        return aten._log_softmax_backward_data.default(of_scores, scores, channel - len(shape), torch.float32)

    upstream = torch.randn(loss.shape, generator=generator)
    module = make_fx(gradient)(scores, upstream)
    for node in module.graph.find_nodes(op="placeholder"):
        node.meta["val"] = scores if node.name.startswith("scores") else upstream
    return module


def targets_of(module: fx.GraphModule) -> set[object]:
    return {node.target for node in module.graph.nodes}


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 7, 3, 4)])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_the_gradient_of_a_cross_entropy_adds_nothing_up(shape: tuple[int, ...], reduction: int) -> None:
    module = softmax_and_loss_backward(shape, reduction, None)
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    expected = module(*inputs)
    join_cross_entropy(module)
    assert cross_entropy_backward in targets_of(module)
    assert aten._log_softmax_backward_data.default not in targets_of(module)
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_a_weighted_cross_entropy_is_left() -> None:
    module = softmax_and_loss_backward((5, 7), 1, torch.rand(7))
    join_cross_entropy(module)
    assert aten._log_softmax_backward_data.default in targets_of(module)


def test_a_compiled_cross_entropy_needs_one_buffer_of_the_scores_size() -> None:
    """The saved log-probabilities become the gradient in place; Inductor's decomposition needs a second buffer."""
    scores = torch.randn(512, 2048, requires_grad=True)
    target = torch.randint(2048, (512,))
    compiled = torch.compile(F.cross_entropy, backend="dscompile", options={"summary": False})

    def step() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(compiled(scores, target), scores)
        return gradient

    torch.testing.assert_close(step(), torch.autograd.grad(F.cross_entropy(scores, target), scores)[0])
    assert allocation_peak(step) < 1.5 * scores.nbytes


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("rows", [128, 4096])
def test_columns_are_summed_as_accurately(rows: int, keepdim: bool) -> None:
    x = torch.rand(rows, 64, generator=torch.Generator().manual_seed(0))
    found, exact = sum_columns(x, [0], keepdim), x.double().sum([0], keepdim)
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= 3e-7 * exact.max()


@pytest.mark.parametrize(
    ("value", "dim", "dtype"),
    [
        (torch.ones(128, 64), [1], None),
        (torch.ones(127, 64), [0], None),
        (torch.ones(160, 64)[:, ::2], [0], None),
        (torch.ones(64, 128).t(), [0], None),
        (torch.ones(130, 64), [0], None),
        (torch.ones(128, 64), [0], torch.float64),
        (torch.ones(128, 64).double(), [0], None),
        (torch.ones(128, 64, 2), [0], None),
    ],
)
def test_other_sums_are_left_to_inductor(value: torch.Tensor, dim: list[int], dtype: torch.dtype | None) -> None:
    assert sum_columns(value, dim, dtype=dtype) is NotImplemented
