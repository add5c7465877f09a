"""PyTorch's own operator database through ``torch.compile``: one operator, one sample, compared with eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

UNDEFINED_VALUES = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
)
"""Their results are uninitialised memory: only shape, strides and dtype are compared."""

TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.complex64: (1e-4, 1e-5), torch.bfloat16: (2e-2, 1e-2)}
"""(relative, absolute) by dtype; other dtypes take ``torch.testing``'s own defaults."""


def operators() -> dict[str, Any]:
    """Every operator that takes float32 on CPU, by name and variant (``nn.functional.gelu``, ``std.unbiased``)."""
    found = {}
    for op in op_db:
        if torch.float32 in op.dtypes:
            found[op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")] = op
    return found


def samples(op: Any, count: int) -> Iterator[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """The first ``count`` sample inputs, the same in every process."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index, sample in enumerate(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd)):
            if index >= count:
                return
            yield sample.input, sample.args, dict(sample.kwargs)


def run(function: Callable[..., Any], arguments: Any) -> tuple[Any, list[Tensor | None], Any]:
    """Call ``function`` on fresh copies of ``arguments`` and differentiate: outputs, gradients, arguments as left."""
    flat, spec = pytree.tree_flatten(arguments)
    leaves = [v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else _own(v) for v in flat]
    torch.manual_seed(1)
    result = function(*pytree.tree_unflatten(leaves, spec))
    outputs = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor) and v.requires_grad]
    wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
    gradients: list[Tensor | None] = []
    if outputs and wanted:
        torch.manual_seed(2)
        tangents = [_tangent(v) for v in outputs]
        gradients = list(torch.autograd.grad(outputs, wanted, tangents, allow_unused=True))
    return result, gradients, leaves


def _own(value: Any) -> Any:
    return value.clone_state() if isinstance(value, torch.Generator) else value


def _tangent(value: Tensor) -> Tensor:
    if value.layout is not torch.strided:
        return torch.ones_like(value)
    return torch.randn_like(value) if value.is_floating_point() or value.is_complex() else torch.ones_like(value)


def assert_same(found: Any, expected: Any, *, values: bool = True) -> None:
    """Outputs, gradients and mutated arguments agree in structure, type, shape and value.

    Raises:
        AssertionError: the first thing that differs.
    """
    have, have_spec = pytree.tree_flatten(found)
    want, want_spec = pytree.tree_flatten(expected)
    assert len(have) == len(want), f"{have_spec} instead of {want_spec}"
    for a, b in zip(have, want, strict=True):
        if not isinstance(b, Tensor):
            same = (
                a is b or a == b or (a != a and b != b) or isinstance(b, (torch.Generator, torch.Size)) or callable(b)
            )
            assert same or (isinstance(b, float) and abs(a - b) <= 1e-5 * abs(b)), f"{a!r} instead of {b!r}"
            continue
        assert isinstance(a, Tensor), f"{a!r} instead of a tensor"
        if not values:
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            continue
        rtol, atol = TOLERANCE.get(b.dtype, (None, None))
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=atol, equal_nan=True)
        assert a.requires_grad == b.requires_grad, f"requires_grad is {a.requires_grad}"


def check(name: str, op: Any, count: int, backend: str, options: dict[str, Any] | None, **settings: Any) -> int:
    """Compare ``count`` samples of an operator, forward and backward; returns how many there were.

    Raises:
        EagerFailureError: eager itself does not run the sample.
    """
    torch._dynamo.reset()
    call = op.get_op()

    def function(value: Any, args: Any, kwargs: Any) -> Any:
        return call(value, *args, **kwargs)

    tried = 0
    for value, args, kwargs in samples(op, count):
        arguments = (value, args, kwargs)
        try:
            expected = run(function, arguments)
        except Exception as error:
            raise EagerFailureError(str(error)) from error
        compiled = torch.compile(function, backend=backend, options=options, **settings)
        assert_same(run(compiled, arguments), expected, values=op.name not in UNDEFINED_VALUES)
        tried += 1
    return tried


class EagerFailureError(Exception):
    """Eager PyTorch does not run a sample."""
