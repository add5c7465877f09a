"""A process of its own: the joint graph of a model, whole, as our kernels and PyTorch's own operators in one function.

Prints, for each model, figures of the fusion and how far every output and gradient is from PyTorch's own kernels.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import time  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from dscompile.codegen.emit import emit_aten  # noqa: E402
from dscompile.codegen.gpu import choose  # noqa: E402
from dscompile.codegen.regions import cut, region_module  # noqa: E402
from dscompile.codegen.triton_backend.assemble import bind  # noqa: E402
from dscompile.codegen.triton_backend.launch import Launcher  # noqa: E402
from dscompile.config import Config  # noqa: E402
from dscompile.runtime.execute import define  # noqa: E402
from tests.build import random_inputs, trace  # noqa: E402
from tests.kernels.interpret import main  # noqa: E402


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
        self.norm = nn.RMSNorm(width)
        self.gate, self.up, self.down = (nn.Linear(width, 40, bias=False), nn.Linear(width, 40, bias=False),
                                         nn.Linear(40, width, bias=False))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


MODELS = {"block": Block, "llama": Llama}


def run(name: str) -> dict[str, Any]:
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
