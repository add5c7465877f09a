"""Gradients of LayerNorm and RMSNorm in one sweep: against fp64, bytes, choice, and what is taken along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.memory import allocation_peak
from dscompile import norm_ops
from dscompile.codegen.cpu.norms import choose_norms
from dscompile.config import Config
from dscompile.graph import StepGraph
from tests.build import Hand, trace

aten = torch.ops.aten
OURS = torch.ops.dscompile.layer_norm_backward.default
RMS = torch.ops.dscompile.rms_norm_backward.default


def problem(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """``grad, x, mean, rstd, weight, residual``."""
    generator = torch.Generator().manual_seed(rows + columns)
    grad, x, residual = (torch.randn(rows, columns, generator=generator).to(dtype) for _ in range(3))
    weight = torch.randn(columns, generator=generator).to(dtype)
    x = 2 * x + 1
    _, mean, rstd = aten.native_layer_norm.default(x, [columns], weight, weight, 1e-5)
    return [grad, x, mean, rstd, weight, residual]


def reference(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
    """The definition, in fp64."""
    grad, x, mean, rstd, weight, residual = (t.double() for t in (grad, x, mean, rstd, weight, residual))
    normal, scaled = (x - mean) * rstd, grad * weight
    along, level = (scaled * normal).mean(1, keepdim=True), scaled.mean(1, keepdim=True)
    return [rstd * (scaled - normal * along - level) + residual, (grad * normal).sum(0), grad.sum(0)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 16), (513, 33), (1023, 512), (2, 4099), (300, 128)])
def test_the_kernel_against_fp64(rows: int, columns: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = problem(rows, columns)
        found = OURS(*given)
    finally:
        torch.set_num_threads(before)
    kernel, reason = norm_ops.norm_kernel()
    assert kernel is not None, reason
    for value, exact in zip(found, reference(*given), strict=True):
        assert (value - exact).norm() <= 1e-6 * exact.norm() + 1e-6


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (4, 16), (513, 33), (1023, 512), (2, 4099)])
def test_rms_norms_kernel_against_fp64(rows: int, columns: int, added: bool, kept: bool) -> None:
    grad, x, _, _, weight, residual = problem(rows, columns)
    rstd = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
    leaf, wide = x.double().requires_grad_(), weight.double().requires_grad_()
    out = leaf * torch.rsqrt(leaf.square().mean(1, keepdim=True) + 1e-6) * wide
    exact = torch.autograd.grad(out, [leaf, wide], grad.double())
    found = RMS(grad, x, rstd, weight, x * rstd if kept else None, residual if added else None)
    wanted = (exact[0] + residual if added else exact[0], exact[1])
    for value, right in zip(found, wanted, strict=True):
        assert (value - right).norm() <= 2e-6 * right.norm() + 1e-6
    composed = RMS(*(None if t is None else t.double() for t in (grad, x, rstd, weight, None, residual)))
    torch.testing.assert_close(composed[0], exact[0] + residual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(composed[1], exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["alike", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (513, 33), (300, 128)])
def test_16_bits_are_rounded_once(rows: int, columns: int, dtype: torch.dtype, weights: str) -> None:
    """Everything that returns is the fp64 result but for its own rounding: half a unit in the last place."""
    grad, x, mean, rstd, weight, residual = problem(rows, columns, dtype)
    if weights == "fp32":
        mean, rstd, weight = mean.float(), rstd.float(), weight.float()
    given = [grad, x, mean, rstd, weight, residual]
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
    found = OURS(*given)
    assert [t.dtype for t in found] == [dtype, weight.dtype, weight.dtype]
    for value, exact in zip(found, reference(*given), strict=True):
        slack = 1e-5 * exact.abs().max() + 1e-6
        assert ((value.double() - exact).abs() <= rounding[value.dtype] * exact.abs() + slack).all()


@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rms_norms_kernel_in_mixed_dtypes(types: tuple[torch.dtype, torch.dtype], kept: torch.dtype | None) -> None:
    grad, x, _, _, weight, residual = problem(70, 24)
    grad, x, residual = grad.to(types[0]), x.to(types[1]), residual.to(types[1])
    rstd = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-6)
    normal = None if kept is None else (x.float() * rstd).to(kept)
    found = RMS(grad, x, rstd, weight, normal, residual)
    composed = RMS(*(None if t is None else t.double() for t in (grad, x, rstd, weight, normal, residual)))
    assert [t.dtype for t in found] == [x.dtype, torch.float32]
    torch.testing.assert_close(found[0].double(), composed[0], rtol=2.0**-8 if x.itemsize == 2 else 1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), composed[1], rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_one_in_16_bits() -> None:
    given = problem(4, 8, torch.bfloat16)
    given[0][1, 2] = torch.nan
    dx = OURS(*given)[0]
    assert dx[1].isnan().all()
    assert not dx[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_those_of_pytorch(dtype: torch.dtype) -> None:
    given = problem(2048, 256, dtype)
    exact = reference(*given)
    grad, x, mean, rstd, weight, residual = given
    dx, *rest = aten.native_layer_norm_backward.default(grad, x, [256], mean, rstd, weight, weight, [True] * 3)
    for ours, theirs, wanted in zip(OURS(*given), (dx + residual, *rest), exact, strict=True):
        assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm()


def test_without_a_residual_and_with_strides() -> None:
    grad, x, mean, rstd, weight, residual = problem(24, 16)
    spread = torch.stack([grad, grad], dim=2)[:, :, 0]
    assert not spread.is_contiguous()
    expected = reference(grad, x, mean, rstd, weight, torch.zeros_like(residual))
    for value, exact in zip(OURS(spread, x, mean, rstd, weight, None), expected, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_ideal_within_a_twentieth(dtype: torch.dtype) -> None:
    """What it allocates beyond its results is a few rows a thread: inputs are read from memory once, in one sweep."""
    given = problem(1024, 256, dtype)
    ideal = given[1].nbytes + 2 * given[4].nbytes
    assert allocation_peak(lambda: OURS(*given)) <= 1.05 * ideal


def test_another_dtype_runs_with_pytorchs_kernel() -> None:
    given = problem(8, 16, torch.float64)
    for value, exact in zip(OURS(*given), reference(*given), strict=True):
        torch.testing.assert_close(value, exact)


def test_the_fake_kernel_says_what_the_kernel_returns() -> None:
    grad, x, mean, rstd, weight, residual = problem(4, 8)
    for op, given in ((OURS, (grad, x, mean, rstd, weight, residual)), (RMS, (grad, x, rstd, weight, None, residual))):
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))


# -- the choice --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A pre-norm block's skeleton: the norm's gradient meets the residual's."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, bias=bias)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.linear(self.norm(x))
        return result


def module_of(model: nn.Module, x: Tensor) -> fx.GraphModule:
    graph: StepGraph = trace(model, x)
    return graph.module


def chosen(module: fx.GraphModule, **options: Any) -> str:
    (text,) = choose_norms(module, Config.load(options))
    module.graph.lint()
    return text


def test_the_residuals_gradient_is_taken_along() -> None:
    module = module_of(Residual(), torch.randn(4, 8, requires_grad=True))
    additions = len(module.graph.find_nodes(op="call_function", target=aten.add.Tensor))
    assert "our kernel with the residual's gradient" in chosen(module, norm_backward="kernel")
    assert len(module.graph.find_nodes(op="call_function", target=aten.add.Tensor)) == additions - 1
    (node,) = module.graph.find_nodes(op="call_function", target=OURS)
    assert node.args[5].name.startswith("tangents")


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Residual(), {"norm_backward": "inductor"}, "norm_backward='inductor'"),
        (Residual(), {}, "fewer than"),
        (Residual(bias=False), {"norm_backward": "kernel"}, "not all three"),
        (Residual().double(), {"norm_backward": "kernel"}, "32 or 16 bits"),
    ],
)
def test_where_inductor_keeps_it_and_why(model: nn.Module, options: dict[str, Any], reason: str) -> None:
    dtype = next(model.parameters()).dtype
    module = module_of(model, torch.randn(4, 8, requires_grad=True, dtype=dtype))
    text = chosen(module, **options)
    assert "Inductor" in text
    assert reason in text
    assert not module.graph.find_nodes(op="call_function", target=OURS)


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dscompile.codegen.cpu.norms.norm_kernel", lambda: (None, "no C++ compiler"))
    module = module_of(Residual(), torch.randn(4, 8, requires_grad=True))
    assert "no C++ compiler" in chosen(module, norm_backward="kernel")


def test_a_compiled_model_has_eagers_gradients() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Residual(), Residual(), nn.LayerNorm(8)), torch.randn(2, 6, 8, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="dscompile", options={"summary": False, "norm_backward": "kernel"})
    leaves, probe = [x, *model.parameters()], torch.randn(2, 6, 8)
    wanted = torch.autograd.grad((model(x) * probe).sum(), leaves)
    found = torch.autograd.grad((compiled(x) * probe).sum(), leaves)
    for value, exact in zip(found, wanted, strict=True):
        assert (value - exact).norm() <= 1e-5 * exact.norm()


# -- RMSNorm, which is many operators ----------------------------------------------------------------------------------


class LlamaNorm(nn.Module):
    """RMSNorm as models write it: operands the other way round, and a cast."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class RmsBlock(nn.Module):
    def __init__(self, norm: nn.Module, residual: bool, size: int = 8) -> None:
        super().__init__()
        self.norm, self.linear, self.residual = norm, nn.Linear(size, size), residual

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.norm(x))
        return x + result if self.residual else result


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [nn.RMSNorm(8), LlamaNorm()])
def test_rms_norms_are_found_by_what_they_compute(norm: nn.Module, residual: bool) -> None:
    module = module_of(RmsBlock(norm, residual), torch.randn(2, 4, 8, requires_grad=True))
    text = chosen(module, norm_backward="kernel")
    assert text.startswith("RMS norm backward [2, 4, 8]: our kernel")
    (node,) = module.graph.find_nodes(op="call_function", target=RMS)
    assert node.args[4] is None, "x * rstd is computed in this graph and need not be read"
    rest = [n for n in module.graph.nodes if n.target in (aten.pow.Tensor_Scalar, aten.rsqrt.default)]
    assert len(rest) == 2, "the forward's square and root are all that is left"


def test_a_frozen_weight_leaves_rms_norm_to_inductor() -> None:
    norm = nn.RMSNorm(8)
    norm.weight.requires_grad_(False)
    module = module_of(RmsBlock(norm, True), torch.randn(2, 4, 8, requires_grad=True))
    assert choose_norms(module, Config.load({"norm_backward": "kernel"})) == []


class Twice(nn.Module):
    """Nearly a norm: the gradient of the input holds the second term twice."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * root * weight + root


def test_what_is_no_rms_norm_is_left() -> None:
    x, weight = torch.randn(2, 4, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    module = trace(Twice(), x, weight).module
    assert choose_norms(module, Config.load({"norm_backward": "kernel"})) == []


def test_a_sum_over_everything_is_no_norm() -> None:
    """The start of the pattern, with a sum that spells its dimensions None."""
    h = Hand()
    x, rstd = h.input("x", 4, 8), h.input("rstd", 4, 1)
    total = h.call(aten.sum.dim_IntList, h.call(aten.mul.Tensor, x, x), None, True)
    half = h.call(aten.mul.Scalar, total, -0.5)
    product = h.call(aten.mul.Tensor, half, h.call(aten.pow.Tensor_Scalar, rstd, 3))
    assert choose_norms(h.done([product]).module, Config.load({"norm_backward": "kernel"})) == []


@pytest.mark.parametrize("norm", [nn.RMSNorm(8), LlamaNorm()])
def test_a_compiled_model_of_rms_norms_has_eagers_gradients(norm: nn.Module) -> None:
    """One norm is shared, one has no residual; what was kept for the backward comes late, as a view."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), RmsBlock(norm, True), RmsBlock(norm, False), nn.RMSNorm(8))
    x, probe = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 8)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="dscompile", options={"summary": False, "norm_backward": "kernel"})
    leaves = [x, *model.parameters()]
    wanted = torch.autograd.grad((model(x) * probe).sum(), leaves)
    found = torch.autograd.grad((compiled(x) * probe).sum(), leaves)
    for value, exact in zip(found, wanted, strict=True):
        assert (value - exact).norm() <= 1e-5 * exact.norm()
