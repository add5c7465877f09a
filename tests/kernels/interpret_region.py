"""A process of its own: the joint graph of a model, whole, as our kernels and PyTorch's own operators in one function.

``NAME-dynamic``: with symbolic sizes, at several of them; ``NAME-long``: at a long sequence too.
Prints, for each model, figures of the fusion and how far every output and gradient is from PyTorch's own kernels.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dscompile.codegen.emit import emit_aten
from dscompile.codegen.gpu import choose
from dscompile.codegen.regions import cut, region_module
from dscompile.codegen.triton_backend.assemble import bind
from dscompile.codegen.triton_backend.launch import Launcher
from dscompile.config import Config
from dscompile.runtime.execute import define
from dscompile.torch_compat import size_hint
from tests.build import random_inputs, trace
from tests.kernels.interpret import main


class Block(nn.Module):
    """A pre-norm transformer's two halves, with attention written out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 4.0, -1)
        x = x + self.out(weights @ v)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Llama(nn.Module):
    """RMSNorm and a gated feed-forward layer."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, width), nn.RMSNorm(width)
        self.gate, self.up, self.down = (nn.Linear(width, 40, bias=False), nn.Linear(width, 40, bias=False),
                                         nn.Linear(40, width, bias=False))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Mean(nn.Module):
    """Sums to one value, between and around kept dimensions, means over a symbolic length, and a scattered slice."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.rand(width)), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) * self.scale
        y = torch.cat([y, x.mean(1, keepdim=True).expand_as(x)], -1)
        weights = torch.softmax(x.transpose(1, 2), -1)
        groups = x.unflatten(-1, (4, 6))
        z = torch.slice_scatter(x, x[..., 2:5] * 3, -1, 2, 5).tanh().sum() + groups.sum((0, 1, 3)).sin().sum()
        return (
            z
            + (groups * 2).sum(2).square().sum()
            + y.square().mean()
            + y.sum(-1).exp().mean()
            + weights.std(-1).sum()
            + (x.sum(0) * x).amax()
        )


MODELS = {"block": Block, "llama": Llama, "mean": Mean}
SIZES = ((2, 9), (3, 17), (5, 2), (2, 1100))
"""Batch and sequence; the graph is traced with the first."""


def _at(value: Any, sizes: dict[int, int]) -> Any:
    """A number or random tensor for a fake one, whose symbolic sizes have hints that ``sizes`` replaces."""
    if isinstance(value, torch.SymInt):
        return _number(value, sizes)
    return torch.randn([_number(s, sizes) for s in value.shape]) * 0.5


def _number(size: Any, sizes: dict[int, int]) -> int:
    return size if isinstance(size, int) else sizes[size_hint(size)]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def run_dynamic(name: str, long: bool) -> dict[str, Any]:
    """One choice for symbolic batch and sequence, run at several of their values; the largest error of each."""
    torch.manual_seed(0)
    width = 32 if name == "block" else 24
    graph = trace(MODELS[name](width), torch.randn(*SIZES[0], width), dynamic=True)
    (region,) = cut(graph, Config(regions="whole"))
    module = region_module(region)
    choice = choose(module, region.key)
    assert choice.assembled is not None, choice.why
    launchers: dict[str, Launcher] = {}
    run = bind(choice.assembled, lambda kernel: launchers.setdefault(kernel.name, Launcher(kernel)))
    reference = define(emit_aten(module), "run", {})
    errors: dict[str, list[float]] = {}
    same = True
    for batch, seq in SIZES if long else SIZES[:3]:
        arguments = [_at(n.meta["val"], {SIZES[0][0]: batch, SIZES[0][1]: seq}) for n in region.inputs]
        wanted, found = reference([*map(_copy, arguments)]), run([*map(_copy, arguments)])
        pairs = list(zip(found, wanted, strict=True))
        errors[f"{batch} x {seq}"] = [float((f - w).abs().max() / w.abs().max()) for f, w in pairs]
        same &= all((f.shape, f.stride(), f.dtype) == (w.shape, w.stride(), w.dtype) for f, w in pairs)
    return {
        "errors": errors, "strides": same, "source": choice.assembled.source,
        "kernels": [k.source for k in choice.assembled.kernels], "why": choice.why,
    }  # fmt: skip


def run(name: str) -> dict[str, Any]:
    model, _, how = name.partition("-")
    if how:
        return run_dynamic(model, how == "long")
    torch.manual_seed(0)
    width = 32 if name == "block" else 24
    graph = trace(MODELS[name](width), torch.randn(2, 9, width))
    (region,) = cut(graph, Config(regions="whole"))
    module = region_module(region)
    values = random_inputs(graph)
    arguments = [values[n.name] for n in region.inputs]
    start = time.perf_counter()
    choice = choose(module, region.key)
    seconds = time.perf_counter() - start
    assert choice.assembled is not None, choice.why
    wanted = define(emit_aten(module), "run", {})([a.clone() for a in arguments])
    found = bind(choice.assembled, Launcher)([a.clone() for a in arguments])
    errors = [float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)]
    return {
        "errors": errors, "kernels": len(choice.assembled.kernels), "seconds": seconds, "why": choice.why,
        "left": sorted({w.left for w in choice.assembled.fused.refusals if not w.right}),
        "strides": all(f.stride() == w.stride() and f.dtype == w.dtype for f, w in zip(found, wanted, strict=True)),
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:], run)
