"""Parity with eager by the rule of the project: loss, outputs and every gradient, judged by norms.

A value passes if it is as near to eager as the rule demands. A model whose own rounding error is larger than that
(MobileNetV2's BatchNorm over two values) cannot be judged so: there eager fp32 is itself 2e-5 from fp64 in the loss and
3e-4 in a gradient. What fails the first criterion passes the second if it is as near to eager *in fp64* as eager in
fp32 is, times :data:`OWN_ERROR_FACTOR`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LOSS_RTOL = 1e-5
GRADIENT_TOL = 1e-4
FLOOR = 1e-3
"""A gradient is judged against the larger of its own norm and this share of the global norm."""

OWN_ERROR_FACTOR = 2.0
OWN_ERROR_LIMIT = 1e-2
"""The second criterion refuses to judge where eager is further than this from fp64: random draws differ, say."""


def default_loss(output: Any) -> Tensor:
    """A scalar that every floating output takes part in."""
    if hasattr(output, "loss") and output.loss is not None:
        return output.loss
    tensors = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
    weights = [torch.linspace(0.5, 1.5, t.numel()).view(t.shape) for t in tensors]
    wide = [t if t.dtype is torch.float64 else t.float() for t in tensors]
    return sum((t * w + t.square()).mean() for t, w in zip(wide, weights, strict=True))


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


Run = tuple[float, dict[str, Tensor | None]]
"""A loss and the gradients (or buffers) that belong to it."""


def gradient_errors(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> dict[str, float]:
    """The relative error of each gradient; one that is missing on one side only is an assertion."""
    assert found.keys() == expected.keys()
    norms = [g.double().norm() for g in expected.values() if g is not None]
    total = float(torch.stack(norms).norm()) if norms else 0.0
    errors = {}
    for name, want in expected.items():
        have = found[name]
        assert (have is None) == (want is None), f"{name}: gradient is {have}, eager's is {want}"
        if have is not None and want is not None:
            error = float((have.double() - want.double()).norm())
            errors[name] = error / max(float(want.double().norm()), FLOOR * total, 1e-300)
    return errors


def loss_error(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-6)


def assert_gradients_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, error in gradient_errors(found, expected).items():
        assert error <= GRADIENT_TOL, f"{name}: gradient differs from eager by {error:.3g}, allowed {GRADIENT_TOL:.3g}"


def assert_run_close(found: Run, expected: Run, exact: Callable[[], tuple[Run, list[Run]]]) -> None:
    """Loss and gradients pass one of the two criteria; ``exact`` gives fp64 and the fp32 runs that measure rounding."""
    worst = max(gradient_errors(found[1], expected[1]).items(), key=lambda item: item[1], default=("", 0.0))
    loss = loss_error(found[0], expected[0])
    if loss <= LOSS_RTOL and worst[1] <= GRADIENT_TOL:
        return
    reference, samples = exact()
    own_loss = max(loss_error(sample[0], reference[0]) for sample in samples)
    own = max(max(gradient_errors(sample[1], reference[1]).values(), default=0.0) for sample in samples)
    seen = (
        f"loss off by {loss:.3g}, gradient of {worst[0]} by {worst[1]:.3g}; eager's own error {own_loss:.3g}, {own:.3g}"
    )
    assert own <= OWN_ERROR_LIMIT, f"not judged by fp64: {seen}"
    error = loss_error(found[0], reference[0])
    assert error <= max(LOSS_RTOL, OWN_ERROR_FACTOR * own_loss), f"loss is {error:.3g} from fp64: {seen}"
    for name, error in gradient_errors(found[1], reference[1]).items():
        allowed = max(GRADIENT_TOL, OWN_ERROR_FACTOR * own)
        assert error <= allowed, f"{name}: gradient is {error:.3g} from fp64, allowed {allowed:.3g}: {seen}"


def float_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    return {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers() if b.is_floating_point()}


Read = Callable[[nn.Module], dict[str, Tensor | None]]


def _exact_runs(model: nn.Module, run: Callable[[nn.Module, bool], Tensor], read: Read) -> tuple[Run, list[Run]]:
    """Eager in fp64, and in fp32 with parameters as they are and twice moved by half a unit in the last place."""

    def once(one: nn.Module, double: bool = False) -> Run:
        value = run(one, double)
        one.zero_grad()
        value.backward()
        return float(value.detach()), read(one)

    samples = [once(copy.deepcopy(model))]
    for seed in range(2):
        moved = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(1 + 2.0**-24 * (2 * torch.rand(parameter.shape, generator=generator) - 1).double())
        samples.append(once(moved))
    return once(copy.deepcopy(model).double(), double=True), samples


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
        before = copy.deepcopy(reference)

        def run(module: Any, double: bool = False, step: int = step) -> Tensor:
            torch.manual_seed(step)
            given = {k: _fresh(v, double) for k, v in kwargs.items()}
            return loss(module(*(_fresh(a, double) for a in args), **given))

        runs = []
        for module in (compiled, reference):
            module.zero_grad()
            value = run(module)
            value.backward()
            runs.append(float(value.detach()))
        for read in (gradients, float_buffers):
            found, expected = (runs[0], read(model)), (runs[1], read(reference))
            assert_run_close(found, expected, functools.partial(_exact_runs, before, run, read))
        buffers = dict(reference.named_buffers())
        for name, buffer in model.named_buffers():
            assert buffer.is_floating_point() or torch.equal(buffer, buffers[name]), f"buffer {name}"
    return compiled


def _fresh(value: Any, double: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.double() if double and value.is_floating_point() else value.clone()
