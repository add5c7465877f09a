"""Sanitize: run every compiled region beside PyTorch's own kernels on the same inputs and stop at the first difference.

A wrong kernel is then named by the value it got wrong, the module and the user's source line, instead of by a
diverging loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dscompile.errors import VerifyError
from dscompile.program import Program

Boxed = Callable[[list[Any]], Any]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest difference of a value, relative to its own norm, by dtype; other dtypes must be equal."""


def checked_regions(program: Program, regions: dict[str, Boxed], references: dict[str, Boxed]) -> dict[str, Boxed]:
    """Replacements for a program's ``region_k`` names that check each call; regions without a reference run unchecked.

    Args:
        program: gives the names of the values that each call writes.
        regions: what runs, by structural key.
        references: the same regions with PyTorch's own kernels.
    """
    checked: dict[str, Boxed] = {}
    for name, key in program.calls.items():
        if key in references:
            writes = [step.writes for step in program.steps if step.call == name]
            checked[name] = _checked(program, name, writes, regions[key], references[key])
    return checked


def _checked(program: Program, name: str, writes: list[tuple[str, ...]], run: Boxed, reference: Boxed) -> Boxed:
    calls = 0

    def call(args: list[Any]) -> Any:
        nonlocal calls
        names = writes[calls % len(writes)]
        calls += 1
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        state = torch.get_rng_state()
        expected = reference(copies)
        torch.set_rng_state(state)
        found = run(args)
        for value, have, want in zip(names, found, expected, strict=True):
            problem = difference(have, want)
            if problem:
                where = program.labels.get(value, "")
                raise VerifyError(
                    f"sanitize: {program.name} value %{value} of {name} {problem}"
                    + (f" [{where}]" if where else "")
                    + "; run with options={'regions': 'aten'} to go on without compiled regions"
                )
        return found

    return call


def difference(found: Any, expected: Any) -> str:
    """How a value differs from what it should be ("" if it does not, within :data:`TOLERANCE`)."""
    if not isinstance(expected, torch.Tensor):
        return "" if found == expected else f"is {found!r}, should be {expected!r}"
    if found.shape != expected.shape or found.dtype != expected.dtype or found.stride() != expected.stride():
        return f"is {_kind(found)}, should be {_kind(expected)}"
    tolerance = TOLERANCE.get(expected.dtype)
    if tolerance is None:
        return "" if torch.equal(found, expected) else "is not equal to PyTorch's"
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return (
            f"has {int((~found.isfinite()).sum())} non-finite elements, should have {int((~expected.isfinite()).sum())}"
        )
    finite = expected.isfinite()
    error = float((found[finite].double() - expected[finite].double()).norm())
    scale = float(expected[finite].double().norm())
    return f"differs by {error:.3g} (norm {scale:.3g})" if error > tolerance * max(scale, 1e-6) else ""


def _kind(value: torch.Tensor) -> str:
    return f"{value.dtype}{tuple(value.shape)} strides {value.stride()}"
