"""Parity with eager by the rule of the project: loss, outputs and every gradient, judged by norms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LOSS_RTOL = 1e-5
GRADIENT_TOL = 1e-4
FLOOR = 1e-3
"""A gradient is judged against the larger of its own norm and this share of the global norm."""


def default_loss(output: Any) -> Tensor:
    """A scalar that every floating output takes part in."""
    if hasattr(output, "loss") and output.loss is not None:
        return output.loss
    tensors = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    weights = [torch.linspace(0.5, 1.5, t.numel()).view(t.shape) for t in tensors]
    return sum((t.float() * w + t.float().square()).mean() for t, w in zip(tensors, weights, strict=True))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}


def assert_gradients_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    total = float(torch.stack([g.double().norm() for g in expected.values() if g is not None]).norm())
    for name, want in expected.items():
        have = found[name]
        assert (have is None) == (want is None), f"{name}: gradient is {have}, eager's is {want}"
        if want is None:
            continue
        error = float((have.double() - want.double()).norm())
        allowed = GRADIENT_TOL * max(float(want.double().norm()), FLOOR * total)
        assert error <= allowed, f"{name}: gradient differs from eager by {error:.3g}, allowed {allowed:.3g}"


def assert_matches_eager(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    loss: Callable[[Any], Tensor] = default_loss,
    options: dict[str, Any] | None = None,
    steps: int = 1,
    dynamic: bool | None = None,
) -> nn.Module:
    """Run forward and backward compiled and eager from the same state and seed; compare loss, gradients and buffers.

    Returns the compiled module, so that a test can go on with it.
    """
    kwargs = kwargs or {}
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="dscompile", options=options, dynamic=dynamic)
    for step in range(steps):
        values = []
        for module in (compiled, reference):
            torch.manual_seed(step)
            module.zero_grad()
            value = loss(module(*_fresh(args), **_fresh_kwargs(kwargs)))
            value.backward()
            values.append(float(value.detach()))
        assert abs(values[0] - values[1]) <= LOSS_RTOL * max(abs(values[1]), 1e-6), f"step {step}: loss {values}"
        assert_gradients_close(gradients(model), gradients(reference))
        buffers = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(
                buffer, buffers[name], rtol=1e-4, atol=1e-6, msg=f"buffer {name}", equal_nan=True
            )
    return compiled


def _fresh(args: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def _fresh_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
