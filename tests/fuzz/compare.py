"""One random program, compiled and eager: outputs, which of them share memory, gradients, buffers, the input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from programs import SHAPE, Program
from torch import Tensor, nn
from torch.utils import _pytree as pytree

STEPS = 2
TOLERANCE = 1e-4
"""Error of a tensor relative to its own norm or 1, whichever is larger."""

NUDGES = 4
"""So many times an ill-conditioned program is run again in eager mode, each parameter moved by its last bit."""

SENSITIVITY = 4.0
"""An error may be this many times what the nudges change: then rounding explains it."""

RUNAWAY = 1e12
"""A program with values above this has no second step: their squares and variances leave fp32's range."""


class EagerFailureError(Exception):
    """Eager PyTorch refuses the program (a value that autograd needs was overwritten)."""


def check(seed: int, options: dict[str, Any], *, dynamic: bool | None = None) -> None:
    """Train the program of ``seed`` for two steps on both sides.

    Raises:
        EagerFailureError: the program is no program.
        AssertionError: the first thing that differs.
    """
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Program(seed)
    start = copy.deepcopy(model)
    try:
        expected = _run(copy.deepcopy(start))
    except RuntimeError as error:
        raise EagerFailureError(str(error)) from error
    compiled = torch.compile(model, backend="dscompile", options={"summary": False, **options}, dynamic=dynamic)
    for step, want in enumerate(expected):
        have = _step(compiled, model, step)
        assert have.keys() == want.keys()
        for name, value in want.items():
            try:
                _assert_same(f"seed {seed}, step {step}: {name}", have[name], value)
            except AssertionError:
                if not _explained_by_rounding(start, step, name, have[name], value):
                    raise


def _run(model: nn.Module) -> list[dict[str, Any]]:
    """Eager steps, none after a runaway one."""
    steps: list[dict[str, Any]] = []
    while len(steps) < STEPS and not (steps and _runs_away(steps[-1])):
        steps.append(_step(model, model, len(steps)))
    return steps


def _runs_away(step: dict[str, Any]) -> bool:
    floating = [v for v in step.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return any(bool((~(v.abs() <= RUNAWAY)).any()) for v in floating)


def _explained_by_rounding(start: nn.Module, step: int, name: str, found: Any, expected: Any) -> bool:
    """Whether eager's own value changes as much when each parameter is moved by one unit in its last place."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if not torch.equal(found.isnan(), expected.isnan()):
        return False
    moved = []
    for nudge in range(NUDGES):
        model = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for parameter in model.parameters():
                up = torch.randint(2, parameter.shape, generator=generator).bool()
                parameter.copy_(parameter.nextafter(torch.where(up, torch.inf, -torch.inf)))
        steps = _run(model)
        if step < len(steps):
            moved.append(_distance(steps[step][name], expected))
    return bool(moved) and _distance(found, expected) <= SENSITIVITY * max(moved)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).nan_to_num().norm())


def _step(run: Callable[[Tensor], Any], model: nn.Module, step: int) -> dict[str, Any]:
    torch.manual_seed(100 + step)
    leaf = torch.randn(SHAPE, requires_grad=True)
    x = leaf * 1
    torch.manual_seed(step)
    result = run(x)
    leaves = pytree.tree_leaves(result)
    outputs = [v for v in leaves if isinstance(v, Tensor)]
    differentiable = [v for v in outputs if v.requires_grad]
    loss = sum(((v * torch.linspace(0.5, 1.5, v.numel()).view(v.shape)).mean() for v in differentiable), leaf.sum() * 0)
    loss.backward()
    found: dict[str, Any] = {f"output {i}": v for i, v in enumerate(leaves)}
    found["input"] = x
    found["sharing"] = _sharing([x, *outputs])
    found["needs gradients"] = [v.requires_grad for v in outputs]
    found["input gradient"] = leaf.grad
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found[f"gradient of {name}"] = parameter.grad
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.05)
                parameter.grad = None
    found |= {f"buffer {name}": b for name, b in model.named_buffers()}
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}


def _sharing(tensors: list[Tensor]) -> list[int]:
    """For each tensor the first one in whose storage it lives."""
    first: dict[int, int] = {}
    return [first.setdefault(t.untyped_storage().data_ptr(), i) for i, t in enumerate(tensors)]


def _assert_same(what: str, found: Any, expected: Any) -> None:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        assert type(found) is type(expected), f"{what} is {found!r}, should be {expected!r}"
        assert found == expected, f"{what} is {found!r}, should be {expected!r}"
        return
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    assert torch.equal(found.isnan(), expected.isnan()), f"{what}: NaN at other places"
    error = _distance(found, expected)
    assert error <= TOLERANCE * max(1.0, float(expected.double().nan_to_num().norm())), f"{what} differs by {error:.3g}"
