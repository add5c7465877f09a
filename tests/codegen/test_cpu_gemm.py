"""fp32 matrix products on AMX tiles: accuracy against fp64, the range that falls back, the choice, and compiled models.

What needs tiles is skipped on a CPU without them; the choice and the fallbacks run everywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

import dscompile
from dscompile import gemm_ops
from dscompile.codegen.cpu import builder, gemm_choice
from dscompile.codegen.cpu.builder import GemmBuild, build_gemm, gemm_kernel
from dscompile.codegen.cpu.gemm_choice import choose_gemm, measured
from dscompile.codegen.cpu.gemm_kernel import GemmKernel
from dscompile.codegen.cpu.gemm_sites import Site
from dscompile.config import Config
from dscompile.report import REPORTS

aten = torch.ops.aten
matmul = torch.ops.dscompile.matmul

tiles = pytest.mark.skipif(bool(gemm_kernel().reason), reason=f"no AMX kernel: {gemm_kernel().reason}")

FORMS = ("nn", "nt", "tn", "tt")
SHAPES = (
    (1, 1, 1),
    (5, 3, 7),
    (16, 32, 16),
    (33, 129, 31),
    (64, 64, 64),
    (70, 300, 530),
    (1100, 40, 37),
    (20, 1100, 1070),
    (530, 600, 200),
    (40, 600, 4200),
)


def operand(rows: int, columns: int, transposed: bool, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if transposed:
        return torch.randn(columns, rows, generator=generator).t()
    return torch.randn(rows, columns, generator=generator)


def errors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute errors of ours and of PyTorch's product, against fp64."""
    kernel = gemm_kernel().kernel
    assert kernel is not None
    exact, out = a.double() @ b.double(), a.new_empty(a.shape[0], b.shape[1])
    assert kernel.product(a, b, None, out), "the tiles refused it: nothing is compared"
    return (out - exact).abs(), (a @ b - exact).abs()


@tiles
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_accurate_as_pytorchs(shape: tuple[int, int, int], form: str) -> None:
    m, k, n = shape
    ours, theirs = errors(operand(m, k, form[0] == "t", 1), operand(k, n, form[1] == "t", 2))
    assert ours.max() <= 2 * max(float(theirs.max()), k**0.5 * 2**-24)


@tiles
@pytest.mark.parametrize("form", FORMS)
def test_long_sums(form: str) -> None:
    ours, theirs = errors(operand(33, 65536, form[0] == "t", 1), operand(65536, 18, form[1] == "t", 2))
    assert ours.max() <= 2 * theirs.max()


@tiles
def test_sums_that_cancel() -> None:
    a, b = operand(64, 512, False, 1), operand(512, 48, False, 2)
    ours, theirs = errors(torch.cat([a, -a + 1e-4 * operand(64, 512, False, 3)], 1), torch.cat([b, b]))
    assert ours.max() <= 2 * theirs.max()


@tiles
def test_rows_and_columns_of_different_scales() -> None:
    rows, columns = 10.0 ** torch.arange(-10, 10).unsqueeze(1), 10.0 ** torch.arange(-8, 8)
    a, b = operand(20, 256, False, 1) * rows, operand(256, 16, True, 2) * columns
    ours, theirs = errors(a, b)
    assert (ours / rows / columns).max() <= 2 * (theirs / rows / columns).max()


@tiles
def test_it_is_not_bf16() -> None:
    """The tests above could pass on loose bounds: one-plane products err by 2^-9, these by less than 2^-22."""
    a, b = operand(64, 64, False, 1), operand(64, 64, False, 2)
    ours, _ = errors(a, b)
    rounded = (a.bfloat16().float() @ b.bfloat16().float() - a.double() @ b.double()).abs()
    assert ours.max() < 2**-10 * rounded.max()


@tiles
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("left", [True, False])
def test_what_tiles_cannot_represent_runs_on_pytorchs_product(value: float, left: bool) -> None:
    kernel = gemm_kernel().kernel
    assert kernel is not None
    a, b = operand(40, 70, False, 1), operand(70, 50, True, 2)
    (a if left else b)[3, 33] = value
    before = kernel.refused
    torch.testing.assert_close(matmul(a, b, None), a @ b, rtol=0, atol=0, equal_nan=True)
    assert kernel.refused == before + 1


@tiles
@pytest.mark.parametrize("value", [1e-35, 1e-38, 1e-45])
def test_tiny_elements_among_ordinary_ones_stay_on_the_tiles(value: float) -> None:
    """Tails of a softmax or of GELU; whole rows and columns of them have the flush's absolute error."""
    a, b = operand(40, 70, False, 1), operand(70, 50, True, 2)
    a[::3, ::2] = value
    a[7], b[:, 9] = value, -value
    ours, theirs = errors(a, b)
    assert ours.max() <= 2 * theirs.max()
    flushed = 70 * 2.0**-126 * float(a.max() + b.max() + 1)
    assert ours[7].max() <= flushed
    assert ours[:, 9].max() <= flushed


@tiles
@pytest.mark.parametrize("scale", [1e-36, 1e-42])
def test_an_operand_of_nothing_but_tiny_elements_runs_on_pytorchs_product(scale: float) -> None:
    kernel = gemm_kernel().kernel
    assert kernel is not None
    a, b = operand(40, 70, False, 1) * scale, operand(70, 50, True, 2)
    before = kernel.refused
    torch.testing.assert_close(matmul(a, b, None), a @ b, rtol=0, atol=0)
    assert kernel.refused == before + 1


@tiles
@pytest.mark.parametrize("scale", [1e-17, 1e-25, 1e18, 1e20])
def test_products_outside_the_range_run_on_pytorchs_product(scale: float) -> None:
    """Each operand is harmless, their product is not: it underflows what tiles keep, or overflows."""
    a, b = operand(40, 70, False, 1) * scale, operand(70, 50, False, 2) * scale
    torch.testing.assert_close(
        matmul(a, b, None), a @ b, rtol=1e-5, atol=float((a @ b).abs().nan_to_num().max()) * 1e-6
    )


@tiles
@pytest.mark.parametrize("bias", ["row", "one_row", "column", "full", "transposed"])
def test_bias(bias: str) -> None:
    m, n = 37, 50
    value = {
        "row": torch.randn(n), "one_row": torch.randn(1, n), "column": torch.randn(m, 1), "full": torch.randn(m, n),
        "transposed": torch.randn(n, m).t(),
    }[bias]  # fmt: skip
    a, b = operand(m, 2500, False, 1), operand(2500, n, True, 2)
    exact = a.double() @ b.double() + value.double()
    assert (matmul(a, b, value) - exact).abs().max() <= 2 * (torch.addmm(value, a, b) - exact).abs().max()


@tiles
def test_batches_and_strides_that_no_side_is_adjacent_in() -> None:
    a, b = torch.randn(3, 40, 70), torch.randn(3, 45, 70).transpose(1, 2)
    torch.testing.assert_close(matmul(a, b, None), torch.bmm(a, b))
    wide = torch.randn(40, 140)[:, ::2]
    torch.testing.assert_close(matmul(wide, b[0], None), wide @ b[0])
    shared = torch.randn(1, 70).expand(40, 70)
    torch.testing.assert_close(matmul(shared, b[0], None), shared @ b[0])


@pytest.mark.parametrize("shape", [(0, 4, 5), (4, 0, 5), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_empty_sides(shape: tuple[int, int, int], with_bias: bool) -> None:
    m, k, n = shape
    bias = torch.arange(float(n)) if with_bias else None
    expected = torch.zeros(m, n) if bias is None else torch.arange(float(n)).expand(m, n)
    assert torch.equal(matmul(torch.ones(m, k), torch.ones(k, n), bias), expected)


@tiles
def test_the_same_bits_on_every_run_and_any_number_of_threads() -> None:
    a, b = operand(300, 700, True, 1), operand(700, 210, False, 2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            results.append(matmul(a, b, None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], x) for x in results[1:])


@tiles
@pytest.mark.parametrize("shape", [(70, 1300, 2100), (300, 600, 40), (1030, 33, 70), (40, 1030, 4200)], ids=str)
def test_more_threads_than_rows_share_out_evenly(shape: tuple[int, int, int]) -> None:
    """Threads then share columns, some have none; more than one step wide or deep, every element is written."""
    m, k, n = shape
    a, b = operand(m, k, False, 1), operand(k, n, True, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 16):
            torch.set_num_threads(threads)
            results.append(matmul.out(a, b, None, out=torch.full((m, n), float("nan"))))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(results[0], x) for x in results[1:])


@tiles
def test_into_rows_that_are_apart() -> None:
    a, b, memory = operand(30, 40, False, 1), operand(40, 50, False, 2), torch.full((30, 80), 7.0)
    matmul.out(a, b, None, out=memory[:, :50])
    torch.testing.assert_close(memory[:, :50], a @ b)
    assert (memory[:, 50:] == 7).all()


# -- the choice ------------------------------------------------------------------------------------------------------


def graph_of(a: Tensor, b: Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("a"), graph.placeholder("b")
    x.meta["val"], y.meta["val"] = a, b
    node = graph.call_function(aten.mm.default, (x, y))
    node.meta["val"] = a @ b
    graph.output((node,))
    return fx.GraphModule(torch.nn.Module(), graph)


def targets(module: fx.GraphModule) -> list[object]:
    return [n.target for n in module.graph.find_nodes(op="call_function", target=matmul.default)]


def test_without_a_kernel_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(None, "no compiler today"))
    module = graph_of(torch.randn(512, 512), torch.randn(512, 512))
    for option in ("auto", "amx"):
        (line,) = choose_gemm(module, Config(gemm=option))
        assert line == "1 x [512, 512] @ [512, 512]: PyTorch (no compiler today)"
    assert not targets(module)


@pytest.mark.parametrize(("gain", "chosen"), [(gemm_choice.GAIN, True), (gemm_choice.GAIN - 0.01, False)])
def test_auto_needs_a_gain(monkeypatch: pytest.MonkeyPatch, gain: float, chosen: bool) -> None:
    class Exact:
        integers = False

        @staticmethod
        def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> bool:
            out.copy_(a.double() @ b.double())
            return True

    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(Exact))  # type: ignore[arg-type]
    monkeypatch.setattr(gemm_choice, "gain", lambda theirs, mine, clock: gain)
    measured.cache_clear()
    module = graph_of(torch.randn(512, 512), torch.randn(512, 512))
    (line,) = choose_gemm(module, Config())
    measured.cache_clear()
    assert ("AMX tiles" in line) is chosen
    assert bool(targets(module)) is chosen


def test_auto_refuses_what_is_not_fp32_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half:
        integers = False

        @staticmethod
        def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> bool:
            out.copy_(a.bfloat16() @ b.bfloat16())
            return True

    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(Half))  # type: ignore[arg-type]
    monkeypatch.setattr(gemm_choice, "gain", lambda theirs, mine, clock: 9.0)
    measured.cache_clear()
    (line,) = choose_gemm(graph_of(torch.randn(512, 512), torch.randn(512, 512)), Config())
    measured.cache_clear()
    assert "PyTorch (not fp32-accurate here" in line


def test_other_dtypes_small_products_and_options_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    half = graph_of(torch.ones(512, 512, dtype=torch.bfloat16), torch.ones(512, 512, dtype=torch.bfloat16))
    assert choose_gemm(half, Config(gemm="amx")) == []
    (line,) = choose_gemm(graph_of(torch.ones(8, 8), torch.ones(8, 8)), Config())
    assert line.endswith("PyTorch (small)")
    (line,) = choose_gemm(graph_of(torch.ones(512, 512), torch.ones(512, 512)), Config(gemm="default"))
    assert line.endswith("PyTorch (gemm='default')")


def test_no_compiler_and_no_tiles_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_cpu", lambda: "flags : avx512f amx_bf16 amx_tile")
    assert "no C++ compiler found" in build_gemm(tmp_path, {"PATH": str(tmp_path)}).reason
    monkeypatch.setattr(builder, "_cpu", lambda: "flags : avx512f")
    assert build_gemm(tmp_path, dict(os.environ)).reason == "this processor has no AMX tiles of bf16"
    assert not list(tmp_path.iterdir())


def test_without_a_kernel_the_operator_is_pytorchs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program from the cache may meet a machine without tiles."""
    said: list[str] = []
    monkeypatch.setattr(gemm_ops.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(builder, "gemm_kernel", lambda: GemmBuild(None, "no tiles in this test"))
    a, b, bias = torch.randn(40, 30), torch.randn(30, 20), torch.randn(20)
    for _ in range(2):
        assert torch.equal(matmul(a, b, bias), torch.addmm(bias, a, b))
    (line,) = said
    assert line.endswith("slower: no tiles in this test")
    assert torch.equal(gemm_ops.plain_product(a, b, None, torch.empty(40, 20)), a @ b)


@tiles
@pytest.mark.parametrize(("regions", "gemm"), [("auto", "amx"), ("whole", "amx"), ("auto", "amx_int8")])
def test_a_compiled_model_trains_the_same(regions: str, gemm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    product = GemmKernel.product

    def counting(
        self: GemmKernel, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, site: Site | None = None
    ) -> bool:
        products.append(tuple(out.shape))
        return product(self, a, b, bias, out, site=site)

    monkeypatch.setattr(GemmKernel, "product", counting)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 72), torch.nn.GELU(), torch.nn.Linear(72, 33))
    x = torch.randn(50, 40)

    def gradients(call: torch.nn.Module) -> list[Tensor]:
        model.zero_grad()
        call(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(model)
    assert not products
    REPORTS.clear()
    compiled = torch.compile(model, backend="dscompile", options={"gemm": gemm, "regions": regions, "cache": False})
    torch.testing.assert_close(gradients(compiled), expected)
    assert len(products) == 5  # two forward, two weight gradients, one input gradient
    lines = [line for report in dscompile.last_report() for line in report.facts["products"]]
    assert lines
    name = "AMX tiles of int8" if gemm == "amx_int8" else "AMX tiles"
    assert all(f"{name} (gemm={gemm!r})" in line for line in lines)
