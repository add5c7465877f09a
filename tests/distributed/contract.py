"""Run many small checks of the parameter contract in one start of the ranks, and compare with a single process."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dscompile

Loss = Callable[[nn.Module, int], Tensor]
"""``loss(model, r)``: the loss on rank ``r``'s data, the same wherever it is computed."""


def run_checks(rank: int, world: int, module: str, names: list[str]) -> dict[str, str]:
    """Traceback of each check ``module.name(rank, world)``, "" if it passed."""
    found = {}
    for name in names:
        try:
            torch.manual_seed(0)
            getattr(importlib.import_module(module), name)(rank, world)
            found[name] = ""
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
    return found


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def data(shape: tuple[int, ...], rank: int, *, high: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, high, shape, generator=generator) if high else torch.randn(shape, generator=generator)


def full(value: Tensor) -> Tensor:
    """The whole of a DTensor, by PyTorch's own collective rather than ours."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def param(model: nn.Module, name: str) -> nn.Parameter:
    """The DTensor: ``get_parameter`` reads the attribute, which is the gathered value."""
    return dict(model.named_parameters())[name]


def assert_gradients(model: nn.Module, reference: nn.Module, *, atol: float = 1e-6) -> None:
    expected = dict(reference.named_parameters())
    assert list(expected) == [name for name, _ in model.named_parameters()]
    for name, param in model.named_parameters():
        want = expected[name].grad
        if want is None:
            assert param.grad is None, f"{name}: a gradient where there is none"
        else:
            assert param.grad is not None, f"{name}: no gradient"
            torch.testing.assert_close(full(param.grad), want, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_values(model: nn.Module, reference: nn.Module, *, atol: float = 0.0) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(full(ours).detach(), theirs.detach(), atol=atol, rtol=0, msg=f"{name} differs")


def mean_loss(reference: nn.Module, loss: Loss, world: int) -> Tensor:
    total = loss(reference, 0)
    for rank in range(1, world):
        total = total + loss(reference, rank)
    return total / world


def parity(
    make: Callable[[], nn.Module], loss: Loss, rank: int, world: int, *, stage: int = 3, run: Any = None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A distributed model and its single-process reference, after one backward pass whose gradients agree.

    ``run`` is what calls the model (a compiled one), made from it.
    """
    reference = seeded(make)
    model = dscompile.distribute(seeded(make, seed=rank), config={"zero": {"stage": stage}}, **options)
    assert_values(model, reference)
    loss(model if run is None else run(model), rank).backward()
    mean_loss(reference, loss, world).backward()
    assert_gradients(model, reference)
    return model, reference
