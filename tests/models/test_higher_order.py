"""Operators that call graphs or have effects: conditionals, loops, nested regions, checks of linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dscompile

OPTIONS = pytest.mark.parametrize("options", [{"regions": "aten"}, {}], ids=["aten", "compiled"])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def conditional(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda v: v.sin() * 2, lambda v: v.cos(), (x,))


def loop(x: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 1.5), (torch.tensor(0), x.detach()))[1] + x


def scan(x: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, v: (carry + v, carry * v), torch.zeros(3), x)[1]


@torch.compiler.nested_compile_region
def _nested(x: Tensor) -> Tensor:
    return x.sin() * x


def nested(x: Tensor) -> Tensor:
    return _nested(x) + _nested(x * 2)


def factorised(x: Tensor) -> Tensor:
    return torch.linalg.cholesky(x @ x.T + 4 * torch.eye(4))


FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (conditional, loop, scan, nested, factorised)


def _run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    result = function(x)
    result.square().sum().backward()
    assert x.grad is not None
    return result.detach(), x.grad


@OPTIONS
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_matches_eager(function: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    found = _run(torch.compile(function, backend="dscompile", options={**options, "summary": False}))
    torch.testing.assert_close(found, _run(function))


def test_what_inductor_cannot_compile_falls_back_and_is_counted() -> None:
    torch.compile(scan, backend="dscompile", options={"cache": False})(torch.randn(4, 3))
    report = dscompile.last_report()[-1]
    assert report.fallbacks or report.facts["compiled_regions"]  # a later Inductor may compile it
    assert len(report.fallbacks) == report.facts["aten_regions"]


@OPTIONS
def test_a_failed_check_raises_also_when_a_cached_program_could_serve(options: dict[str, Any]) -> None:
    def factorise(x: Tensor) -> Tensor:
        return torch.linalg.cholesky(x)

    good, bad = torch.eye(3) * 2, -torch.eye(3)
    for _ in range(2):  # the second time AOTAutograd's cache is asked
        torch._dynamo.reset()
        compiled = torch.compile(factorise, backend="dscompile", options=options)
        torch.testing.assert_close(compiled(good), factorise(good))
        with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
            compiled(bad)
