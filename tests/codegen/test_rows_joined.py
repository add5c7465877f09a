"""Loops over long rows become one loop: a row comes from memory once, whatever is computed of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dscompile import last_report
from dscompile.codegen.lower import lower_region
from dscompile.codegen.regions import cut
from dscompile.config import Config
from tests.build import trace

WEIGHT, BIAS = torch.linspace(0.5, 2, 96), torch.linspace(-1, 1, 96)


def layer_norm(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return F.layer_norm(x, (width,), WEIGHT[:width], BIAS[:width])


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "layer norm": layer_norm,
    "layer norm and its statistics": lambda x: torch.native_layer_norm(x, [x.shape[-1]], None, None, 1e-5),
    "RMS norm": lambda x: F.rms_norm(x, (x.shape[-1],), WEIGHT[: x.shape[-1]]),
    "log-softmax": lambda x: x.log_softmax(-1),
    "log-sum-exp": lambda x: (x - x.logsumexp(-1, keepdim=True)).relu(),
    "standardised": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True).log1p() + 1),
    "variance of 16 bits": lambda x: (x.bfloat16().var(-1, keepdim=True).sqrt() + x).bfloat16(),
    "rows and their own gate": lambda x: x.softmax(-1) * torch.sigmoid(x.amax(-1, keepdim=True)),
    "a mask of rows": lambda x: torch.where(x.sum(-1, keepdim=True) > 0, x, x.logsumexp(-1, keepdim=True)),
    "rows of rows": lambda x: x.view(8, -1, x.shape[-1]).log_softmax(-1).sum(1),
    "two reductions of one row": lambda x: (x.amax(-1), x.amin(-1).exp(), x - x.mean(-1, keepdim=True)),
}


def loops_over_rows(function: Callable[[Tensor], Any], rows: int, width: int) -> int:
    """How many loops over ``rows`` the C++ of a function has."""
    with torch.no_grad():
        graph = trace(function, torch.randn(rows, width))
    config = Config.load({"regions": "whole"})
    (region,) = (r for r in cut(graph, config) if not r.inline)
    code = lower_region(region, config)
    assert code.kind == "inductor", code.reason
    return len(re.findall(rf"for\(int64_t x0=.*; x0<static_cast<int64_t>\({rows}L\)", code.source))


@pytest.mark.parametrize("name", ["layer norm", "layer norm and its statistics", "RMS norm", "log-softmax"])
def test_one_loop(name: str) -> None:
    assert loops_over_rows(FUNCTIONS[name], 320, 96) == 1


def test_short_rows_keep_their_vectors() -> None:
    """A vector of rows a step: a ``log`` for every row of 48 elements would cost more than it saves."""
    assert loops_over_rows(FUNCTIONS["log-softmax"], 320, 48) > 1


@pytest.mark.parametrize("width", [96, 71, 8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, width: int) -> None:
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(width)) * 3
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(FUNCTIONS[name], backend="dscompile")(x)
        wanted = FUNCTIONS[name](x)
    assert last_report()[-1].fallbacks == []
    torch.testing.assert_close(found, wanted, rtol=2e-2 if "16" in name else 1e-5, atol=7e-2 if "16" in name else 1e-5)
