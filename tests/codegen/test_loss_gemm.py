"""The products of the fused loss on AMX tiles: sums into what is there, gradients against fp64, and what falls back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import dscompile
from dscompile import gemm_ops, loss_ops
from dscompile.codegen.cpu import builder, gemm_choice
from dscompile.codegen.cpu.builder import GemmBuild, gemm_kernel
from dscompile.codegen.cpu.gemm_choice import Route, choose_gemm
from dscompile.codegen.cpu.gemm_kernel import GemmKernel
from dscompile.config import Config
from dscompile.report import REPORTS

fused = torch.ops.dscompile.linear_cross_entropy.default

tiles = pytest.mark.skipif(bool(gemm_kernel().reason), reason=f"no AMX kernel: {gemm_kernel().reason}")

ROWS, WIDTH, CLASSES = 210, 130, 700
ALL = (True, True, True)


def problem(bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, WIDTH, generator=generator) for n in (ROWS, CLASSES))
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    return x, weight * 0.1, torch.randn(CLASSES, generator=generator) if bias else None, target


def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_ops, "CHUNK_BYTES", rows * CLASSES * 4)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    return list(torch.autograd.grad(F.cross_entropy(F.linear(*leaves), target, reduction=reduction), leaves))


def ours(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, on: Sequence[bool]
) -> list[Tensor]:
    kinds = {"mean": loss_ops.MEAN, "sum": loss_ops.SUM}
    return list(fused(x, weight, bias, target, kinds[reduction], -100, True, on))


# -- the kernel ------------------------------------------------------------------------------------------------------


@tiles
@pytest.mark.parametrize("shape", [(5, 3, 7), (70, 300, 530), (40, 1300, 37), (20, 70, 2100)], ids=str)
@pytest.mark.parametrize("form", ["nn", "tn"])
def test_a_scaled_product_is_added(shape: tuple[int, int, int], form: str) -> None:
    torch.manual_seed(0)
    m, k, n = shape
    a, b, c = torch.randn(k, m).t() if form == "tn" else torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    want, theirs, mine = c.double() + 0.37 * (a.double() @ b.double()), c.addmm(a, b, alpha=0.37), c.clone()
    assert gemm_ops.add_product(mine, a, b, 0.37)
    assert (mine - want).abs().max() <= 2 * (theirs - want).abs().max()


@tiles
def test_nothing_is_added_to_where_the_sum_is_empty() -> None:
    c = torch.randn(4, 5)
    before = c.clone()
    assert gemm_ops.add_product(c, torch.ones(4, 0), torch.ones(0, 5), 1.0)
    assert torch.equal(c, before)


# -- the loss --------------------------------------------------------------------------------------------------------


@tiles
@pytest.mark.parametrize("rows_a_chunk", [20, 1000])
@pytest.mark.parametrize("masked", ["none", "some", "most", "zeroed"])
@pytest.mark.parametrize(("bias", "reduction"), [(False, "mean"), (True, "sum")])
def test_gradients_are_no_worse_than_with_mkl(
    bias: bool, reduction: str, masked: str, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against fp64, as root of the mean square; the softmax between the products has errors of its own."""
    chunks_of(rows_a_chunk, monkeypatch)
    x, weight, b, target = problem(bias)
    if masked == "most":
        target[torch.arange(ROWS) % 7 != 0] = -100
    elif masked != "none":
        target[3:50] = -100
    if masked == "zeroed":  # all rows are projected, the ones that do not count with gradient 0
        monkeypatch.setattr(loss_ops, "_places", lambda *_: None)
    loss, *mine = ours(x, weight, b, target, reduction, ALL)
    plain, *theirs = ours(x, weight, b, target, reduction, loss_ops.ON_NO_TILES)
    torch.testing.assert_close(loss, plain)
    for got, mkl, want in zip(mine, theirs, exact(x, weight, b, target, reduction), strict=False):
        assert not torch.equal(got, mkl)
        assert (got - want).norm() <= (mkl - want).norm()


@tiles
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_what_tiles_cannot_represent_gives_pytorchs_bits(
    value: float, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes with the last chunk, and parts of the gradient were summed on tiles before."""
    chunks_of(64, monkeypatch)
    x, weight, bias, target = problem(True)
    (x if where == "input" else weight)[-1, 7] = value
    want = ours(x, weight, bias, target, "mean", loss_ops.ON_NO_TILES)
    for got, wanted in zip(ours(x, weight, bias, target, "mean", ALL), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@tiles
def test_a_chunk_of_tiny_rows_gives_pytorchs_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(64, monkeypatch)
    x, weight, _, target = problem(False)
    x[-80:] *= 1e-36
    kernel = gemm_kernel().kernel
    assert kernel is not None
    before = kernel.refused
    got = ours(x, weight, None, target, "mean", ALL)
    assert kernel.refused > before
    want = ours(x, weight, None, target, "mean", loss_ops.ON_NO_TILES)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_without_a_kernel_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program from the cache may meet a machine without tiles."""
    monkeypatch.setattr(builder, "gemm_kernel", lambda: GemmBuild(None, "no tiles for this loss"))
    want = ours(*problem(True), "mean", loss_ops.ON_NO_TILES)
    assert all(torch.equal(a, b) for a, b in zip(ours(*problem(True), "mean", ALL), want, strict=True))


def test_the_operator_is_registered_right_with_tiles() -> None:
    x, weight, bias, target = problem(True)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    torch.library.opcheck(fused, (*leaves, target, loss_ops.MEAN, -100, True, [True, False, True]))


# -- the choice ------------------------------------------------------------------------------------------------------


def graph_of(rows: int, gradients: bool) -> tuple[fx.GraphModule, fx.Node]:
    graph = fx.Graph()
    values = torch.empty(rows, 512), torch.empty(8192, 512), torch.zeros(rows, dtype=torch.int64)
    inputs = [graph.placeholder(f"x{i}") for i in range(3)]
    for node, value in zip(inputs, values, strict=True):
        node.meta["val"] = value
    call = graph.call_function(fused, (inputs[0], inputs[1], None, inputs[2], loss_ops.MEAN, -100, gradients))
    graph.output((call,))
    return fx.GraphModule(torch.nn.Module(), graph), call


def test_auto_measures_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk, at most 1,024 long; where one is not faster, the others still are."""
    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(GemmKernel))  # type: ignore[arg-type]
    monkeypatch.setattr(
        gemm_choice, "measured", lambda shape, *_: (Route.PYTORCH if shape.a_transposed else Route.TILES, "measured")
    )
    monkeypatch.setattr(loss_ops, "CHUNK_BYTES", 32 << 20)
    module, call = graph_of(4096, True)
    assert choose_gemm(module, Config()) == [
        "1 x [1024, 512] @ [1024, 512]^T, logits in the fused loss: AMX tiles (measured)",
        "1 x [1024, 1024] @ [1024, 512], gradient of the input in the fused loss: AMX tiles (measured)",
        "1 x [1024, 1024]^T @ [1024, 512], gradient of the weight in the fused loss: PyTorch (measured)",
    ]
    assert call.kwargs["tiles"] == [True, True, False]


def test_a_loss_alone_has_one_product_and_options_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(GemmKernel))  # type: ignore[arg-type]
    module, call = graph_of(30, False)
    (line,) = choose_gemm(module, Config())
    assert line == "1 x [30, 512] @ [1024, 512]^T, logits in the fused loss: PyTorch (small)"
    (line,) = choose_gemm(module, Config(gemm="amx"))
    assert call.kwargs["tiles"] == [True, False, False]
    (line,) = choose_gemm(module, Config(gemm="default"))
    assert line.endswith("PyTorch (gemm='default')")
    assert call.kwargs["tiles"] == [False, False, False]


class Head(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.project(x), target)


@tiles
@pytest.mark.parametrize("regions", ["auto", "whole"])
def test_a_compiled_model_has_them(regions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(64, monkeypatch)
    sums = []
    add_product = gemm_ops.add_product
    monkeypatch.setattr(gemm_ops, "add_product", lambda *values: sums.append(values) or add_product(*values))
    x, weight, _, target = problem(False)
    target[::3] = -100
    model = Head()
    model.project.weight.data.copy_(weight)
    REPORTS.clear()
    options = {"gemm": "amx", "fused_loss": "on", "regions": regions, "cache": False}
    x.requires_grad_()
    torch.compile(model, backend="dscompile", options=options)(x, target).backward()
    assert len(sums) == 3  # 140 rows in chunks of 64
    want = exact(x.detach(), weight, None, target, "mean")
    for got, wanted in zip((x.grad, model.project.weight.grad), want, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)
    lines = [line for report in dscompile.last_report() for line in report.facts["products"]]
    assert len(lines) == len(loss_ops.PRODUCTS)
    for line, name in zip(lines, loss_ops.PRODUCTS, strict=True):
        assert line.endswith(f", {name} in the fused loss: AMX tiles (gemm='amx')")
