"""Random modules: views, in-place writes, draws, norms, indexing, ties, mutated buffers, outputs that alias.

A program is a list of small modules that read and write a pool of [4, 6] tensors. Everything follows from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS, COLUMNS = 4, 6
SHAPE = (ROWS, COLUMNS)

Two = Callable[[Tensor, Tensor], Tensor]


def _write_slice(a: Tensor, b: Tensor) -> Tensor:
    y = a * 1
    y[:, 1:3] = b[:, 3:5]
    return y


def _write_view(a: Tensor, b: Tensor) -> Tensor:
    y = a + 0.5
    y.t()[2].mul_(b[:, 0])
    return y


def _write_mask(a: Tensor, b: Tensor) -> Tensor:
    y = a.clone()
    y[b > 0] = 0.25
    return y


def _write_chain(a: Tensor, b: Tensor) -> Tensor:
    y = a - b
    y.mul_(2).add_(b).tanh_()
    return y


def _write_row(a: Tensor, b: Tensor) -> Tensor:
    y = torch.zeros_like(a)
    y[0].copy_(b[1])
    y[1:3] += a[:2]
    return y


def _write_shared(a: Tensor, b: Tensor) -> Tensor:
    a.add_(b.detach().sigmoid())  # whoever else holds a, or a view of it, sees this
    return a.view(-1).view(SHAPE)


def _scatter(a: Tensor, b: Tensor) -> Tensor:
    return torch.zeros_like(a).scatter_add(1, b.argsort(1), a)


def _gather(a: Tensor, b: Tensor) -> Tensor:
    return a.gather(1, b.argmax(1, keepdim=True).expand(SHAPE)) * b


def _index_add(a: Tensor, b: Tensor) -> Tensor:
    return a.index_add(0, torch.tensor([0, 0, 3]), b[1:])


def _split(a: Tensor, b: Tensor) -> Tensor:
    first, second, third = torch.cat([a, b, a * b], 1).split([5, COLUMNS, 7], 1)
    return second + first.sum() * 0.1 + third.mean(1, keepdim=True)


def _unbind(a: Tensor, b: Tensor) -> Tensor:
    rows = a.unbind(0)
    return torch.stack([rows[3], rows[1] * 2, b[0], rows[0]])


def _attention(a: Tensor, b: Tensor) -> Tensor:
    q, k = a.view(2, 2, 2, 3), b.view(2, 2, 2, 3)
    return F.scaled_dot_product_attention(q, k, q, is_causal=True).transpose(1, 2).reshape(SHAPE)


def _strided(a: Tensor, b: Tensor) -> Tensor:
    return a.t().reshape(SHAPE).flip(0) + b.view(2, 12).roll(1, 1).view(SHAPE)


def _no_grad(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = a.square().mean().add_(1)
    return b / scale


def _double(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * 3 + b).float()


def _statistics(a: Tensor, b: Tensor) -> Tensor:
    values, _ = a.sort(1)
    return values - b.amax(0) + b.var(1, keepdim=True) + a.cumsum(1).norm()


def _repeat(a: Tensor, b: Tensor) -> Tensor:
    return a[:1].expand(SHAPE) + b[:, :1] + a.repeat(2, 1)[2:6]


def _complex(a: Tensor, b: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(a) * 2, n=COLUMNS) - b


FUNCTIONS: tuple[Two, ...] = (
    torch.add, torch.mul, torch.maximum, torch.minimum,
    _write_slice, _write_view, _write_mask, _write_chain, _write_row, _write_shared,
    _scatter, _gather, _index_add, _split, _unbind, _attention, _strided, _no_grad, _double, _statistics,
    _repeat, _complex,
    lambda a, b: a @ b.t() @ a,
    lambda a, b: F.dropout(a, 0.4) + b,
    lambda a, b: a * torch.rand_like(b),
    lambda a, b: a + torch.bernoulli(torch.full_like(b, 0.5)),
    lambda a, b: torch.where(a > b, a.exp().clamp(max=3), b),
    lambda a, b: F.softmax(a, 1) - F.gelu(b),
    lambda a, b: a[:, :],
    lambda a, b: a.detach().masked_fill(b > 0, -1.0) + a,
    lambda a, b: F.layer_norm(a + b, (COLUMNS,)),
    lambda a, b: (a.view(SHAPE), b)[0],
    lambda a, b: a.abs().sqrt().nan_to_num() * b.sign(),
    lambda a, b: F.pad(a, (1, 1)).unfold(1, 3, 1).sum(-1) + b,
    lambda a, b: torch.einsum("ij,kj->ik", a, b) @ b,
)  # fmt: skip


class Call(nn.Module):
    """A function of two tensors."""

    def __init__(self, function: Two) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


class Layer(nn.Module):
    """A module of one tensor, with a residual from the other; ``checkpoint`` recomputes it in backward."""

    def __init__(self, layer: nn.Module, checkpoint: bool) -> None:
        super().__init__()
        self.layer = layer
        # Eager runs a checkpointed BatchNorm's update again in backward, torch.compile by design does not.
        self.checkpoint = checkpoint and not isinstance(layer, nn.BatchNorm1d)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.checkpoint:
            return b + torch.utils.checkpoint.checkpoint(self.layer, a, use_reentrant=False)
        return self.layer(a) + b


class Running(nn.Module):
    """Buffers that every call changes, one of them a view's base."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(COLUMNS))
        self.register_buffer("table", torch.zeros(SHAPE))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.count += 1
        self.mean.mul_(0.9).add_(a.detach().mean(0), alpha=0.1)
        self.table[1].copy_(b.detach()[2])
        return a - self.mean + self.table.t().reshape(SHAPE)


class Break(nn.Module):
    """Two graphs instead of one."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return a - b


class Program(nn.Module):
    """``forward(x)`` reads and writes a pool that starts as [x, parameter]; returns a few of its tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.start = nn.Parameter(torch.randn(SHAPE))
        self.mutates_input = rng.random() < 0.15
        block = rng.randint(2, 6)
        count = block * rng.choice((1, 1, 2, 3)) if rng.random() < 0.5 else rng.randint(1, 9)
        kinds = [rng.randrange(1 << 30) for _ in range(block)]
        linears: list[nn.Linear] = []
        self.calls = nn.ModuleList(_module(random.Random(kinds[i % block]), linears) for i in range(count))
        self.reads = [(_recent(rng, i + 2), _recent(rng, i + 2)) for i in range(count)]
        self.returns = [rng.randrange(count + 2) for _ in range(rng.randint(1, 4))]
        if count + 1 not in self.returns:
            self.returns.append(count + 1)
        self.views = rng.random() < 0.3

    def forward(self, x: Tensor) -> Any:
        if self.mutates_input:
            x.add_(1)
        pool = [x, self.start]
        for call, (i, j) in zip(self.calls, self.reads, strict=True):
            pool.append(call(pool[i], pool[j]))
        results = [pool[i] for i in self.returns]
        if self.views:
            results.append(results[0].t()[1:])
        return {"tuple": tuple(results), "none": None, "number": 3, "last": results[-1].sum()}


def _recent(rng: random.Random, size: int) -> int:
    return rng.randrange(size) if rng.random() < 0.4 else size - 1


def _module(rng: random.Random, linears: list[nn.Linear]) -> nn.Module:
    kind = rng.random()
    if kind < 0.62:
        return Call(rng.choice(FUNCTIONS))
    if kind < 0.68:
        return Running()
    if kind < 0.71:
        return Break()
    return Layer(_layer(rng, linears), checkpoint=rng.random() < 0.1)


def _layer(rng: random.Random, linears: list[nn.Linear]) -> nn.Module:
    kind = rng.randrange(7)
    if kind <= 2:
        linear = nn.Linear(COLUMNS, COLUMNS, bias=rng.random() < 0.7)
        if linears and rng.random() < 0.3:
            linear.weight = rng.choice(linears).weight
        if rng.random() < 0.15:
            linear.weight.requires_grad_(False)
        linears.append(linear)
        return nn.Sequential(linear, nn.GELU()) if rng.random() < 0.5 else linear
    if kind == 3:
        return nn.BatchNorm1d(COLUMNS)
    if kind == 4:
        return nn.LayerNorm(COLUMNS)
    if kind == 5:
        return nn.Sequential(nn.Linear(COLUMNS, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, COLUMNS))
    return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 3, padding=1), nn.Flatten(), nn.Dropout(0.2))
