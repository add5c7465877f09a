"""Sanitize: run every compiled region beside PyTorch's own kernels on the same inputs and stop at the first difference.

A wrong kernel is then named by the value it got wrong, the module and the user's source line, instead of by a
diverging loss.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dscompile.errors import VerifyError
from dscompile.program import Program
from dscompile.torch_compat import storage_key

log = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest difference of a value, relative to its norm, by dtype; other dtypes must be equal."""

FLOOR = 1e-3
"""A value is judged against the larger of its own norm and this share of the largest norm that went into the region:
what cancels to zero (the gradient of a bias before BatchNorm) is rounding on both sides."""


class Checks:
    """Stand-ins for a program's ``region_k`` that check each call.

    Attributes:
        namespace: the stand-ins by the name that the program's source calls.
    """

    def __init__(self, program: Program, regions: dict[str, Boxed], references: dict[str, Boxed]) -> None:
        """Build the stand-ins; a region without a reference stays unchecked, and a warning says so.

        Args:
            program: gives the names and sources of the values that each call writes.
            regions: what runs, by structural key.
            references: the same regions with PyTorch's own kernels.
        """
        self._program = program
        self._calls: Counter[str] = Counter()
        self.namespace: dict[str, Boxed] = {}
        for name, key in program.calls.items():
            if key in references:
                self.namespace[name] = self._checked(name, regions[key], references[key])
            else:
                log.warning("sanitize: %s %s has no reference and runs unchecked", program.name, name)

    def restarting(self, run: Boxed) -> Boxed:
        """``run``, the program itself, made to start counting calls anew: an earlier run may have stopped halfway."""

        def start(args: list[Any]) -> Any:
            self._calls.clear()
            return run(args)

        return start

    def _checked(self, name: str, run: Boxed, reference: Boxed) -> Boxed:
        writes = [step.writes for step in self._program.steps if step.call == name]

        def call(args: list[Any]) -> Any:
            names = writes[self._calls[name]]
            self._calls[name] += 1
            floor = FLOOR * _largest_norm(args)
            copies = _copies(args)
            state = torch.get_rng_state()
            expected = reference(copies)
            torch.set_rng_state(state)
            found = run(args)
            for value, have, want in zip(names, found, expected, strict=True):
                if problem := difference(have, want, floor=floor):
                    raise VerifyError(self._message(name, value, problem))
            return found

        return call

    def _message(self, name: str, value: str, problem: str) -> str:
        where = self._program.labels.get(value, "")
        return (
            f"sanitize: {self._program.name} value %{value} of {name} {problem}"
            + (f" [{where}]" if where else "")
            + "; run with options={'regions': 'aten'} to go on without compiled regions"
        )


def _copies(args: Iterable[Any]) -> list[Any]:
    """The arguments with memory of their own but the same layout, and sharing it among each other as before.

    ``clone()`` would make an expanded or sliced tensor dense, and the results' strides with it.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        key = storage_key(value)
        if key is None or value.is_conj() or value.is_neg():
            return value.clone()
        if key not in storages:
            storages[key] = value.untyped_storage().clone()
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(storages[key], value.storage_offset(), value.size(), value.stride())

    with torch.no_grad():
        return [copy(value) for value in args]


def _largest_norm(args: Iterable[Any]) -> float:
    """The largest finite norm of the floating-point tensors among ``args``, or 0."""
    norms = [float(a.double().norm()) for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return max((n for n in norms if n < float("inf")), default=0.0)


def difference(found: Any, expected: Any, *, floor: float = 0.0) -> str:
    """How a value differs from what it should be ("" if it does not, within :data:`TOLERANCE`).

    Args:
        found: what the region computed.
        expected: what it should be.
        floor: a tensor's error is measured against the larger of its norm and this.
    """
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        same = type(found) is type(expected) and found == expected
        return "" if same else f"is {_kind(found)}, should be {_kind(expected)}"
    if found.shape != expected.shape or found.dtype != expected.dtype or found.stride() != expected.stride():
        return f"is {_kind(found)}, should be {_kind(expected)}"
    if expected.is_complex():
        return difference(*(torch.view_as_real(v.resolve_conj()) for v in (found, expected)), floor=floor)
    tolerance = TOLERANCE.get(expected.dtype)
    if tolerance is None:
        return "" if torch.equal(found, expected) else "is not equal to PyTorch's"
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return f"has {int((~found.isfinite()).sum())} non-finite elements, should have {int((~finite).sum())}"
    if not torch.equal(found[~finite].nan_to_num(0.0), expected[~finite].nan_to_num(0.0)):
        return "has NaN where an infinity should be, or the other way round, or an infinity of the wrong sign"
    error = float((found[finite].double() - expected[finite].double()).norm())
    scale = float(expected[finite].double().norm())
    return f"differs by {error:.3g} (norm {scale:.3g})" if error > tolerance * max(scale, floor, 1e-6) else ""


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype}{tuple(value.shape)} strides {value.stride()}"
