"""Lowering: equal regions are compiled once; what Inductor cannot compile runs with PyTorch's kernels and says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dscompile
from dscompile.codegen import lower
from dscompile.codegen.lower import lower_region, lower_regions
from dscompile.codegen.regions import Region, cut
from dscompile.config import Config
from dscompile.graph import StepGraph
from dscompile.inductor_compat import InductorFailure
from dscompile.report import GraphReport
from dscompile.runtime.execute import load_region
from dscompile.tools.gpt import GPT, GPTConfig
from tests.build import Hand

aten = torch.ops.aten
OPTIONS = {"summary": False, "cache": False}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def region(*targets: Any) -> Region:
    h = Hand()
    x = h.input("x", 4, 6)
    for target in targets or (aten.sin.default, aten.cos.default):
        x = h.call(target, x)
    (found,) = cut(h.done([x]), Config(regions="whole"))
    return found


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor refuses everything."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InductorFailure("LoweringException: no such kernel")

    monkeypatch.setattr(lower, "inductor_compile", refuse)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("dscompile"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


def test_a_compiled_region_has_its_reference() -> None:
    code = lower_region(region(), Config())
    assert (code.kind, code.reason) == ("inductor", "")
    x = torch.randn(4, 6)
    for source in (code, lower_region(region(), Config(regions="aten"))):
        (found,) = load_region(source)([x.clone()])
        torch.testing.assert_close(found, x.sin().cos())
    assert "def run(args)" in code.reference


def test_equal_regions_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = lower.lower_region
    monkeypatch.setattr(lower, "lower_region", lambda r, c: compiled.append(r.key) or original(r, c))
    regions = [region(), region(), region(aten.exp.default), region(aten.t.default)]
    codes = lower_regions(regions, Config(regions="aten"))
    assert compiled == [regions[0].key, regions[2].key]  # the view alone runs inline
    assert codes.keys() == {regions[0].key, regions[2].key}


def test_a_failure_falls_back_with_the_reason(broken: None, warnings: pytest.LogCaptureFixture) -> None:
    code = lower_region(region(), Config())
    assert code.kind == "aten"
    assert code.reason.startswith("2 nodes from %sin_default (aten.sin.default) to %cos_default (aten.cos.default): ")
    assert code.reason.endswith("LoweringException: no such kernel")
    assert code.reason in warnings.text
    x = torch.randn(4, 6)
    torch.testing.assert_close(load_region(code)([x])[0], x.sin().cos())


def reports() -> list[GraphReport]:
    return [r for r in dscompile.last_report()][-2:]


def test_a_whole_model_trains_on_fallbacks_and_every_one_is_counted(
    broken: None, warnings: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))
    compiled, x = torch.compile(model, backend="dscompile", options=OPTIONS), torch.randn(4, 6)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want)
    for report in reports():
        assert report.facts["compiled_regions"] == report.facts["bytes_compiled"] == 0
        assert report.facts["aten_regions"] == len(report.fallbacks) == 1
        assert "1 FALLBACK(S)" in report.line()
        assert "no such kernel" in report.line()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fallback_runs_nothing_that_was_chosen_for_inductor(broken: None, dtype: torch.dtype) -> None:
    """Our norms, products and attention, and the joined gradient of the loss, are for regions that compile."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), nn.LayerNorm(32), nn.Linear(32, 7)
    )
    x, target = torch.randn(2, 16, 32), torch.randint(7, (32,))
    options = {**OPTIONS, "norm_backward": "kernel", "gemm": "amx", "attention": "kernel"}
    compiled = torch.compile(model, backend="dscompile", options=options)

    def gradients(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = nn.functional.cross_entropy(call(x).flatten(0, 1), target)
        return torch.autograd.grad(loss, list(model.parameters()))

    for have, want in zip(gradients(compiled), gradients(model), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert all(report.fallbacks for report in reports())


@torch.library.custom_op("dscompile_tests::shifted_sine", mutates_args=())
def shifted_sine(x: Tensor) -> Tensor:
    return x.sin() + 1


@shifted_sine.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


shifted_sine.register_autograd(
    lambda ctx, gradient: gradient * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class WithCustom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(shifted_sine(self.linear(x)) * 2)


def check(model: nn.Module, x: Tensor) -> list[GraphReport]:
    compiled = torch.compile(model, backend="dscompile", options=OPTIONS)
    found = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want)
    return reports()


def test_an_operator_without_a_decomposition_is_called_inside_a_compiled_region() -> None:
    for report in check(WithCustom(), torch.randn(4, 6)):
        assert report.fallbacks == []
        assert report.facts["bytes_compiled"] == report.facts["bytes"] > 0


def test_an_operator_that_inductor_cannot_lower_falls_back(
    monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    """A real failure inside Inductor: its lowering of the operator raises. Only that region falls back."""
    from torch._inductor import lowering

    def fails(x: Any) -> Any:
        raise NotImplementedError("no lowering on this machine")

    monkeypatch.setitem(lowering.lowerings, torch.ops.dscompile_tests.shifted_sine.default, fails)
    forward, backward = check(WithCustom(), torch.randn(4, 6))
    assert len(forward.fallbacks) == forward.facts["aten_regions"] == 1
    assert "no lowering on this machine" in forward.fallbacks[0]
    assert "no lowering on this machine" in warnings.text
    assert backward.fallbacks == []


@pytest.mark.slow
def test_the_share_of_compiled_bytes_of_a_small_gpt_is_everything() -> None:
    model, ids = GPT(GPTConfig(32, 2, 16, 2, 8)), torch.randint(0, 32, (2, 8))
    torch.compile(model, backend="dscompile", options=OPTIONS)(ids, ids).backward()
    for report in reports():
        assert report.fallbacks == []
        assert report.facts["bytes_compiled"] >= 0.95 * report.facts["bytes"] > 0
        assert "% of non-GEMM bytes" in report.line()
        assert report.facts["regions"] <= 4 * 2


def effect_only(graph: Hand) -> StepGraph:
    p = graph.input("p", 4)
    graph.call(aten.add_.Tensor, p, 1.0)
    return graph.done([p])


def test_a_region_that_only_writes() -> None:
    """It returns nothing, and what it writes is the caller's tensor."""
    (found,) = cut(effect_only(Hand()), Config(regions="whole"))
    assert found.outputs == []
    for config in (Config(), Config(regions="aten")):
        p = torch.zeros(4)
        assert tuple(load_region(lower_region(found, config))([p])) == ()
        assert torch.equal(p, torch.ones(4)), config.regions
