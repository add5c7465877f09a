"""Cross-entropy fused with the output projection, against PyTorch's two operators in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.memory import allocation_peak
from dscompile import cross_entropy, linear_cross_entropy
from dscompile.errors import UnsupportedError


def tensors(tokens: int, size: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size, generator=generator) / size**0.5).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    target[::5] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_bias: bool, reduction: str
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS", 5 * 37)  # chunks of 5 tokens, and a last one of 3
    hidden, weight, bias, target = tensors(23, 16, 37, dtype)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = functional.linear(*exact)
    wanted = functional.cross_entropy(logits, target, reduction=reduction)
    found = linear_cross_entropy(hidden, weight, target, bias if with_bias else None, reduction=reduction)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    weights = torch.rand(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad((wanted * weights).sum(), exact)
    mine = torch.autograd.grad((found * weights.to(found.dtype)).sum(), leaves)
    for x, y, leaf in zip(mine, theirs, leaves, strict=True):
        assert x.dtype == leaf.dtype
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_all_tokens_ignored_is_nan_as_in_pytorch() -> None:
    hidden, weight, _, target = tensors(4, 8, 5, torch.float32)
    target[:] = -100
    assert linear_cross_entropy(hidden, weight, target).isnan()
    assert functional.cross_entropy(functional.linear(hidden, weight), target).isnan()


def test_it_differentiates_traces_and_is_proved() -> None:
    hidden, weight, bias, target = tensors(6, 8, 11, torch.float64)
    op = torch.ops.dscompile.linear_cross_entropy.default
    assert torch.autograd.gradcheck(lambda *x: op(*x, target, -100)[0], (hidden, weight, bias))
    torch.library.opcheck(op, (hidden, weight, bias, target, -100))
    torch.compiler.reset()
    compiled = torch.compile(linear_cross_entropy, backend="dscompile", options={"cache": False})
    torch.testing.assert_close(
        compiled(hidden, weight, target, bias), linear_cross_entropy(hidden, weight, target, bias)
    )
    import dscompile

    assert dscompile.last_report()[-1].verdict == "proved"


def test_a_quarter_of_the_memory_at_a_vocabulary_of_128k() -> None:
    hidden, weight, _, target = tensors(512, 8, 128_000, torch.float32)

    def eager() -> None:
        loss = functional.cross_entropy(functional.linear(hidden, weight), target)
        torch.autograd.grad(loss, (hidden, weight))

    def fused() -> None:
        torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))

    assert allocation_peak(fused) <= allocation_peak(eager) / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "reduction"),
        ({"target": torch.zeros(3)}, "target is"),
        ({"weight": torch.zeros(5, 9)}, "weight is"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    hidden, weight, _, target = tensors(4, 8, 5, torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "target": target, **change}
    with pytest.raises(UnsupportedError, match=message):
        linear_cross_entropy(**arguments)  # type: ignore[arg-type]
