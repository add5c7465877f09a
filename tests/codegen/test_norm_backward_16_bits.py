"""Norms' gradients in models of 16 bits and under autocast: found, and no further from fp64 than Inductor's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dscompile.codegen.cpu.norms import choose_norms
from dscompile.config import Config
from tests.build import Hand, trace
from tests.codegen.test_norm_backward import OURS, RMS, LlamaNorm, Residual, RmsBlock

aten = torch.ops.aten
BOTH = [torch.bfloat16, torch.float16]


class Autocast(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            result: Tensor = self.model(x)
            return result


def norm_nodes(model: nn.Module, x: Tensor, op: Any) -> list[torch.fx.Node]:
    """The norm operators that one region's module holds once ours were put in."""
    module = trace(model, x.detach().requires_grad_()).module
    choose_norms(module, Config.load({"norm_backward": "kernel"}))
    module.graph.lint()
    return list(module.graph.find_nodes(op="call_function", target=op))


def dtypes(node: torch.fx.Node) -> list[str | None]:
    values = [None if a is None else a.meta["val"].dtype for a in node.args]  # type: ignore[union-attr]
    return [None if dtype is None else str(dtype).removeprefix("torch.") for dtype in values]


@pytest.mark.parametrize("dtype", BOTH)
def test_layer_norm_of_a_16_bit_model(dtype: torch.dtype) -> None:
    (node,) = norm_nodes(Residual().to(dtype), torch.randn(4, 8, dtype=dtype), OURS)
    assert dtypes(node) == [str(dtype).removeprefix("torch.")] * 6


def test_layer_norm_under_autocast() -> None:
    """The first norm reads an fp32 input, the second the 16 bits that a product made."""
    model = nn.Sequential(nn.Linear(8, 8), Residual())
    (node,) = norm_nodes(Autocast(model), torch.randn(4, 8), OURS)
    assert dtypes(node)[:2] == ["bfloat16", "bfloat16"]
    assert dtypes(node)[4:] == ["float32", "bfloat16"]


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [nn.RMSNorm, LlamaNorm])
def test_rms_norm_of_a_16_bit_model(norm: Any, residual: bool, dtype: torch.dtype) -> None:
    """Gradient, input and result are read and written in 16 bits; the square root stays fp32."""
    made = norm(8) if norm is nn.RMSNorm else norm()
    model = RmsBlock(made, residual).to(dtype)
    (node,) = norm_nodes(model, torch.randn(2, 4, 8, dtype=dtype), RMS)
    short = str(dtype).removeprefix("torch.")
    assert dtypes(node) == [short, short, "float32", short, None, short if residual else None]
    assert not [n for n in node.graph.nodes if n.target is aten.pow.Tensor_Scalar and n.args[1] == 3]


@pytest.mark.parametrize("norm", [nn.RMSNorm, LlamaNorm])
def test_rms_norm_under_autocast(norm: Any) -> None:
    made = norm(8) if norm is nn.RMSNorm else norm()
    model = nn.Sequential(nn.Linear(8, 8), RmsBlock(made, True))
    (node,) = norm_nodes(Autocast(model), torch.randn(2, 4, 8), RMS)
    assert dtypes(node)[:2] == ["bfloat16", "bfloat16"]


def backward(kept: bool) -> torch.fx.GraphModule:
    """Backward alone, as a region holds it: the widened input was saved, not the one of 16 bits, or ``kept``: both."""
    half, h = torch.bfloat16, Hand()
    grad, wide, rstd = h.input("grad", 2, 4, 8, dtype=half), h.input("wide", 2, 4, 8), h.input("rstd", 2, 4, 1)
    weight, residual = h.input("weight", 8), h.input("residual", 2, 4, 8, dtype=half)
    up = h.call(aten._to_copy.default, grad, dtype=torch.float32)
    scaled = h.call(aten.mul.Tensor, up, weight)
    along = h.call(aten.sum.dim_IntList, h.call(aten.mul.Tensor, scaled, wide), [2], True)
    product = h.call(aten.mul.Tensor, h.call(aten.mul.Scalar, along, -0.5), h.call(aten.pow.Tensor_Scalar, rstd, 3))
    divided = h.call(aten.div.Scalar, h.call(aten.expand.default, product, [2, 4, 8]), 8)
    term = h.call(aten.mul.Tensor, divided, h.call(aten.mul.Scalar, wide, 2.0))
    dx = h.call(aten.add.Tensor, h.call(aten.mul.Tensor, scaled, rstd), term)
    total = h.call(aten.add.Tensor, residual, h.call(aten._to_copy.default, dx, dtype=half))
    normal = h.input("normal", 2, 4, 8) if kept else h.call(aten.mul.Tensor, wide, rstd)
    dweight = h.call(aten.sum.dim_IntList, h.call(aten.mul.Tensor, up, normal), [0, 1], True)
    return h.done([total, dweight]).module


def test_a_gradient_that_is_rounded_is_written_in_16_bits_though_the_input_is_wide() -> None:
    half, module = torch.bfloat16, backward(kept=False)
    given = [torch.randn(2, 4, 8, dtype=half), torch.randn(2, 4, 8), torch.rand(2, 4, 1), torch.rand(8)]
    given.append(torch.randn(2, 4, 8, dtype=half))
    wanted = module(*given)
    choose_norms(module, Config.load({"norm_backward": "kernel"}))
    (node,) = module.graph.find_nodes(op="call_function", target=RMS)
    assert dtypes(node) == ["bfloat16", "float32", "float32", "float32", None, "bfloat16"]
    assert node.kwargs == {"dtype": half}
    for value, right in zip(module(*given), wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=2e-2, atol=2e-2)


def test_inductor_keeps_layer_norm_of_16_bits_unless_asked() -> None:
    module = trace(Residual().bfloat16(), torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)).module
    (text,) = choose_norms(module, Config.load({}))
    assert "Inductor (Inductor's kernels for LayerNorm of 16 bits" in text


def test_inductor_keeps_rms_norm_unless_asked() -> None:
    (text,) = choose_norms(backward(kept=True), Config.load({}))
    assert "Inductor (Inductor's kernels for RMSNorm" in text
    (text,) = choose_norms(backward(kept=True), Config.load({"norm_backward": "kernel"}))
    assert "our kernel" in text


def test_an_fp32_stream_under_autocast_reads_the_gradient_in_16_bits() -> None:
    (node,) = norm_nodes(Autocast(RmsBlock(nn.RMSNorm(8), True)), torch.randn(2, 4, 8), RMS)
    assert dtypes(node) == ["bfloat16", "float32", "float32", "float32", None, "float32"]


class Wide(nn.Module):
    """The widened input has another reader, whose gradient is added in fp32 before the result is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight + wide.sin()


def test_a_sum_in_fp32_stays_one() -> None:
    (node,) = norm_nodes(Wide(), torch.randn(2, 4, 8, dtype=torch.bfloat16), RMS)
    assert dtypes(node)[1] == "float32"


def errors(model: nn.Module, x: Tensor, dtype: torch.dtype | None, option: str) -> list[float]:
    """Relative distances of all gradients from fp64's. ``dtype`` None: autocast to bf16; ``option`` "": eager."""
    exact_model, exact_x = copy.deepcopy(model).double(), x.double().requires_grad_()
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    wanted = torch.autograd.grad((exact_model(exact_x) * probe.double()).sum(), [exact_x, *exact_model.parameters()])
    given = copy.deepcopy(model)
    given = Autocast(given) if dtype is None else given.to(dtype)
    leaf = x.clone().requires_grad_() if dtype is None else x.to(dtype).requires_grad_()
    run: Any = given
    if option:
        torch.compiler.reset()
        run = torch.compile(given, backend="dscompile", options={"summary": False, "norm_backward": option})
    found = torch.autograd.grad((run(leaf).float() * probe.float()).sum(), [leaf, *given.parameters()])
    return [float((f.double() - w).norm() / w.norm()) for f, w in zip(found, wanted, strict=True)]


def model_of(*norms: nn.Module) -> tuple[nn.Module, Tensor]:
    """A model and its input, exact in bf16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), *(RmsBlock(norm, True, 32) for norm in norms))
    for p in model.parameters():
        p.data.copy_(p.bfloat16())
    return model, torch.randn(64, 4, 32).bfloat16().float()


def no_further(ours: list[float], theirs: list[float]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one <= max(1.1 * other, 1e-3)
        assert one <= 3e-2


def test_a_compiled_model_errs_no_more_than_eager() -> None:
    model, x = model_of(LlamaNorm(32))
    no_further(errors(model, x, torch.bfloat16, "kernel"), errors(model, x, torch.bfloat16, ""))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bf16", "fp16", "autocast"])
def test_compiled_models_err_no_more_than_inductors(dtype: torch.dtype | None) -> None:
    model, x = model_of(nn.LayerNorm(32), nn.RMSNorm(32), LlamaNorm(32))
    no_further(errors(model, x, dtype, "kernel"), errors(model, x, dtype, "inductor"))
