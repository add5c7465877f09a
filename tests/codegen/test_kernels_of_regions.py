"""Each fused region of a transformer is one C++ kernel on CPU and no call of PyTorch's, but for sums that run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dscompile.codegen import lower
from dscompile.codegen.lower import lower_region
from dscompile.codegen.regions import cut
from dscompile.codegen.triton_backend.library import entries
from dscompile.config import Config
from dscompile.graph import StepGraph
from dscompile.inductor_compat import inductor_compile
from tests.build import trace

OTHERS = ("dropout", "batch_norm", "pool", "embedding_backward", "pad_join", "scatter_rows", "index_add", "histogram")
"""Dropout draws from a seed that only a GPU's kernels take; the others are no fused region of a transformer."""
LIBRARY = [name for name in entries() if not any(other in name for other in OTHERS)]

CALLS = {"cumulative_softmax": 1}
"""Calls of PyTorch's kernels that remain: Inductor's C++ has no running sum."""

KERNEL = re.compile(r"^(\w+) = async_compile\.cpp_pybinding\(", re.MULTILINE)


def kernels_and_calls(graph: StepGraph, **options: object) -> tuple[int, int]:
    """C++ kernels and other calls that the whole graph's wrapper makes."""
    config = Config.load({"regions": "whole", **options})
    (region,) = (r for r in cut(graph, config) if not r.inline)
    code = lower_region(region, config)
    assert code.kind == "inductor", code.reason
    kernels = KERNEL.findall(code.source)
    body = code.source.partition("def call(")[2]
    other = re.findall(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops|aten)\.\w+", body, re.MULTILINE)
    assert all(body.count(f"{name}(") == 1 for name in kernels)
    return len(kernels), len(other)


@pytest.mark.parametrize("name", LIBRARY)
def test_one_kernel(name: str) -> None:
    entry = entries()[name]
    with torch.no_grad():
        graph = trace(entry.function, *entry.make(torch.float32, 256, 128))
    assert kernels_and_calls(graph) == (1, CALLS.get(name, 0))


def test_bias_dropout_residual_draws_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``rng="fused"``: one kernel forward, which draws; backward one more, which draws again or reads the mask."""
    sources: list[str] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        artifact = inductor_compile(*args, **kwargs)
        sources.append(artifact.source_code)
        return artifact

    def region(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(x + bias, 0.1)

    monkeypatch.setattr(lower, "inductor_compile", spy)
    torch.compiler.reset()
    options = {"rng": "fused", "summary": False, "cache": False}
    compiled = torch.compile(region, backend="dscompile", options=options)
    x, bias, residual = torch.randn(64, 128, requires_grad=True), torch.randn(128), torch.zeros(64, 128)
    result = compiled(x, bias, residual)
    result.sum().backward()
    assert x.grad is not None
    kept = x.grad != 0
    torch.testing.assert_close(result, torch.where(kept, (x + bias) / 0.9, 0.0))
    torch.testing.assert_close(x.grad, torch.where(kept, 1 / 0.9, 0.0))
    assert 0.85 < kept.float().mean() < 0.95
    assert not torch.equal(compiled(x, bias, residual), result), "a second call draws anew"
    assert [len(KERNEL.findall(source)) for source in sources] == [1, 1]


def test_a_product_is_a_call_and_two_regions_are_two_kernels() -> None:
    """The count can tell."""
    with torch.no_grad():
        graph = trace(lambda x: torch.softmax(F.gelu(x) @ x, 1), torch.randn(64, 64))
    assert kernels_and_calls(graph) == (2, 1)
