"""Bytes of forward and backward of layers as models write them: traced, split, fused, and counted against the ideal.

The ideal is counted here by hand from shapes: every tensor that the layer must read or write, once. The layers are
spelt in the ways of several models; none of them is in the kernel library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dscompile.codegen.regions import cut, region_module
from dscompile.codegen.tile.fuse import Fused, fuse
from dscompile.codegen.tile.trace import decomposed
from dscompile.config import Config
from dscompile.manager import PassContext, parse_pipeline, run_pipeline
from dscompile.split import split
from tests.build import trace

BATCH, SEQ, WIDTH, HEADS, DIM, VOCAB = 8, 1024, 1024, 8, 64, 4096
TOKENS = BATCH * SEQ
ROW = TOKENS * WIDTH
HALF = torch.bfloat16


class Rms(nn.Module):
    """RMSNorm as Llama writes it (``offset`` 0) or Gemma (1: the weight is stored less 1)."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.offset:
            return (wide * (self.offset + self.weight.float())).type_as(x)
        return self.weight * wide.to(x.dtype)


class Residual(nn.Module):
    """A residual, then a norm: before the next block (returned, too), or scaled and behind it (DeepNorm)."""

    def __init__(self, norm: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        if self.scale == 1.0:
            hidden = x + residual
            return self.norm(hidden), hidden
        return self.norm(x + residual * self.scale)


class Activation(nn.Module):
    """``act(x + bias)``, or that times a second input."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bias, self.act = nn.Parameter(torch.zeros(WIDTH)), act

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        y = self.act(x + self.bias)
        return y if up is None else y * up


class Scores(nn.Module):
    """Softmax of scores: with a mask, rounded from fp32 or not; or capped by tanh as Gemma 2's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return torch.softmax(torch.tanh(scores / 30) * 30, -1)
        wide = torch.float32 if self.how == "fp32" else None
        return torch.softmax(scores * 0.125 + mask, -1, dtype=wide).to(scores.dtype)


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Rotary(nn.Module):
    """Rotary embedding: of q and k in halves (Llama), of a quarter of each head (NeoX), of neighbours (GPT-J)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        return self.turn(q, cosine, sine), self.turn(k, cosine, sine)

    def turn(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        if self.how == "neighbours":
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack((a * cosine - b * sine, a * sine + b * cosine), -1).flatten(-2)
        part = cosine.shape[-1]
        turned = x[..., :part] * cosine + halves(x[..., :part]) * sine
        return turned if part == x.shape[-1] else torch.cat((turned, x[..., part:]), -1)


class Embeddings(nn.Module):
    """BERT's: three tables, added, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.kinds = (nn.Embedding(n, WIDTH) for n in (VOCAB, SEQ, 2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        embedded = self.tokens(ids) + self.places(torch.arange(ids.shape[1])) + self.kinds(kinds)
        result: Tensor = self.norm(embedded)
        return result


def hidden(count: int) -> list[Tensor]:
    return [torch.empty(BATCH, SEQ, WIDTH, requires_grad=True) for _ in range(count)]


def turned(part: int) -> list[Tensor]:
    heads = [torch.empty(BATCH, HEADS, SEQ, DIM, requires_grad=True) for _ in range(2)]
    return [*heads, *(torch.empty(SEQ, part) for _ in range(2))]


def scores() -> Tensor:
    return torch.empty(2, HEADS, SEQ, SEQ, requires_grad=True)


@dataclass(frozen=True)
class Layer:
    """How a layer is made and called, and how often the ideal passes over its hidden states forward and backward.

    Attributes:
        forward, backward: large tensors that are read or written, what is kept for backward included, each of ``size``
            elements of the layer's type.
        wide: how many more of them are fp32 even in 16 bits, in each half.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]]
    forward: int
    backward: int
    size: int = ROW
    wide: int = 0


PAIR, SCORES = 2 * BATCH * HEADS * SEQ * DIM, 2 * HEADS * SEQ * SEQ
LAYERS = {
    "layer norm": Layer(lambda: nn.LayerNorm(WIDTH), lambda: hidden(1), 2, 3),
    "rms norm": Layer(lambda: nn.RMSNorm(WIDTH), lambda: hidden(1), 2, 3),
    "llama's norm": Layer(Rms, lambda: hidden(1), 2, 3),
    "gemma's norm": Layer(lambda: Rms(1.0), lambda: hidden(1), 2, 3),
    "llama's residual and norm": Layer(lambda: Residual(Rms()), lambda: hidden(2), 4, 4),
    "deep norm": Layer(lambda: Residual(nn.LayerNorm(WIDTH), 1.7), lambda: hidden(2), 4, 4),
    "bias and gelu": Layer(lambda: Activation(F.gelu), lambda: hidden(1), 2, 3),
    "bias and tanh gelu": Layer(lambda: Activation(lambda x: F.gelu(x, approximate="tanh")), lambda: hidden(1), 2, 3),
    "bias and silu": Layer(lambda: Activation(F.silu), lambda: hidden(1), 2, 3),
    "bias, silu and gate": Layer(lambda: Activation(F.silu), lambda: hidden(2), 4, 6),
    "masked softmax": Layer(lambda: Scores(""), lambda: [scores(), torch.empty(SEQ, SEQ)], 2, 3, SCORES),
    "fp32 softmax": Layer(lambda: Scores("fp32"), lambda: [scores(), torch.empty(SEQ, SEQ)], 2, 2, SCORES, 1),
    "capped softmax": Layer(lambda: Scores("capped"), lambda: [scores()], 3, 4, SCORES),
    "llama's rotary": Layer(lambda: Rotary("halves"), lambda: turned(DIM), 2, 2, PAIR),
    "neox's rotary": Layer(lambda: Rotary("part"), lambda: turned(DIM // 4), 2, 2, PAIR),
    "gpt-j's rotary": Layer(lambda: Rotary("neighbours"), lambda: turned(DIM // 2), 2, 2, PAIR),
}


def fused(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> list[Fused]:
    """The kernels of forward and backward after the default passes."""
    module.to(dtype)
    values = [v.to(dtype).detach().requires_grad_(v.requires_grad) if v.is_floating_point() else v for v in inputs]
    graph = trace(module, *values)
    run_pipeline(graph, parse_pipeline("default"), PassContext(Config()))
    parts = split(graph)
    regions = [cut(half, Config(regions="whole")) for half in (parts.forward, parts.backward)]
    return [fuse(decomposed(region_module(found)).graph) for (found,) in regions]


WIDER = ["layer norm", "rms norm", "llama's norm", "gemma's norm"]


@pytest.mark.parametrize(("name", "dtype"), [*((n, HALF) for n in LAYERS), *((n, torch.float32) for n in WIDER)])
def test_a_layer_as_models_write_it_moves_the_ideal_bytes(name: str, dtype: torch.dtype) -> None:
    """In one kernel forward; backward in one, and one that adds up what weights and biases got from each program."""
    layer = LAYERS[name]
    found = fused(layer.make(), layer.inputs(), dtype)
    for half, passes in zip(found, (layer.forward, layer.backward), strict=True):
        ideal = layer.size * (passes * dtype.itemsize + 4 * layer.wide)
        assert [n for n in half.order if isinstance(n, fx.Node)] == []
        assert ideal <= half.bytes <= 1.05 * ideal
    assert len(found[0].kernels) == 1
    assert len(found[1].kernels) <= 2


@pytest.mark.parametrize(("dtype", "adding"), [(HALF, 4 + 2 * 4 + 4 + 2), (torch.float32, 4 + 2 * 4)])
def test_embeddings_and_a_norm(dtype: torch.dtype, adding: int) -> None:
    """Forward is one kernel, and reads tables once. Backward adds rows in memory, in fp32.

    For each element of a table ``adding`` is what its gradient moves: it is filled with zeros; read and written by what
    is added; and, in 16 bits, read again and rounded. Beside that, gradient and hidden states are read and the hidden
    states' gradient is written and read again, for it is summed over the batch for the places; that sum, in fp32, is
    written and read, and so is what each of 128 programs leaves for the norm's weight and bias.
    """
    ids, kinds = (torch.zeros(BATCH, SEQ, dtype=torch.int64) for _ in range(2))
    forward, backward = fused(Embeddings(), [ids, kinds], dtype)
    table = (VOCAB + SEQ + 2) * WIDTH
    assert len(forward.kernels) == 1
    assert forward.bytes <= 1.01 * (table + 2 * ROW) * dtype.itemsize
    ideal = 4 * ROW * dtype.itemsize + table * adding + 2 * 4 * SEQ * WIDTH + 2 * 2 * 4 * 128 * WIDTH
    assert ideal <= backward.bytes <= 1.01 * ideal


def test_a_sum_over_few_long_rows_leaves_no_partial_results() -> None:
    """The gradient of learned positions: the batch's rows are a million elements, and few."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.zeros(1, SEQ, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * 2.0 + self.places

    _, backward = fused(Places(), hidden(1), HALF)
    assert backward.bytes == 2 * (2 * ROW + SEQ * WIDTH), "the gradient in and out, and the places' own"
