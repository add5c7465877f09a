"""tanh, tanh-GELU and GELU gradients for CPU: errors against fp64 beside PyTorch's kernels', and special values."""

from __future__ import annotations

import logging
import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dscompile.codegen import activations
from dscompile.codegen.decompositions import decompositions

aten = torch.ops.aten

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e13, -1e13, 1e20, -1e20, 88.0, -88.0, 1e-40, -1e-40)


def points() -> Tensor:
    """Where the functions bend, densely, and tiny values."""
    tiny = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)) * 1e-4
    return torch.cat([torch.linspace(-12, 12, 1 << 18), torch.linspace(-0.7, 0.7, 1 << 16), tiny])


def theirs(x: Tensor) -> dict[str, Tensor]:
    """PyTorch's own kernels."""
    one = torch.ones_like(x)
    return {
        "tanh": aten.tanh.default(x),
        "gelu": aten.gelu.default(x, approximate="tanh"),
        "gelu_backward": aten.gelu_backward.default(one, x, approximate="tanh"),
        "exact_gelu_backward": aten.gelu_backward.default(one, x),
    }


def compiled(x: Tensor) -> dict[str, Tensor]:
    """The forms under test, as the compiled region computes them."""
    bent = torch.compile(lambda v: torch.tanh(v), backend="dscompile", options={"summary": False})
    smooth = torch.compile(nn.GELU(approximate="tanh"), backend="dscompile", options={"summary": False})
    exact = torch.compile(nn.GELU(), backend="dscompile", options={"summary": False})
    value = x.clone().requires_grad_()
    result = smooth(value)
    found = {"tanh": bent(x), "gelu": result.detach()}
    for name, output in (("gelu_backward", result), ("exact_gelu_backward", exact(value))):
        (found[name],) = torch.autograd.grad(output, value, torch.ones_like(output))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_against_fp64_are_those_of_pytorch(dtype: torch.dtype) -> None:
    x = points().to(dtype)
    exact, peer, ours = theirs(x.double()), theirs(x), compiled(x)
    for name, reference in exact.items():
        if name == "tanh" and dtype is torch.float32:
            continue  # PyTorch's eager kernel is within 0.6 ulp, ours 1.4: see the next test
        assert ours[name].dtype is dtype
        found = (ours[name].double() - reference).abs()
        limit = (peer[name].double() - reference).abs()
        assert found.max() <= 1.25 * limit.max(), name
        assert found.mean() <= 1.25 * limit.mean() + 1e-12, name


def test_tanh_is_within_two_units_in_the_last_place() -> None:
    x = points()
    exact = torch.tanh(x.double())
    near = exact.float().abs()
    unit = (torch.nextafter(near, torch.tensor(math.inf)) - near).double()
    assert ((compiled(x)["tanh"].double() - exact).abs() / unit).max() <= 2.0


@pytest.mark.parametrize("name", ["tanh", "gelu", "gelu_backward", "exact_gelu_backward"])
def test_special_values_are_those_of_pytorch(name: str) -> None:
    x = torch.tensor(SPECIAL)
    expected, found = theirs(x)[name], compiled(x)[name]
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-6, atol=1e-30)
    assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


def test_tanh_of_other_types_and_devices_is_left_to_inductor() -> None:
    for value in (torch.ones(2, dtype=torch.float64), torch.empty(2, device="meta")):
        assert activations.tanh(value) is NotImplemented


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_gelu_is_compiled(
    dtype: torch.dtype, approximate: Literal["none", "tanh"], caplog: pytest.LogCaptureFixture
) -> None:
    """Inductor cannot lower a GELU that a decomposition declines: the region would run with PyTorch's kernels."""
    torch.compiler.reset()
    x = torch.linspace(-8, 8, 64, dtype=dtype).requires_grad_()
    step = torch.compile(
        lambda v: nn.functional.gelu(v, approximate=approximate),
        backend="dscompile",
        options={"summary": False, "cache": False},
    )
    with caplog.at_level(logging.WARNING):
        result = step(x)
        (found,) = torch.autograd.grad(result, x, torch.ones_like(x))
    assert "aten kernels" not in caplog.text
    exact = x.detach().double().requires_grad_()
    output = nn.functional.gelu(exact, approximate=approximate)
    (wanted,) = torch.autograd.grad(output, exact, torch.ones_like(exact))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(result.double(), output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_table_has_them() -> None:
    table = decompositions()
    assert table[aten.tanh.default] is activations.tanh
    assert table[aten.gelu_backward.default] is activations.gelu_backward
