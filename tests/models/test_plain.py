"""Small models, each with one thing that compilers get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import assert_matches_eager
from torch import Tensor, nn
from torch.nn import functional as F

import dscompile

ATEN = {"regions": "aten"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            3, 4, 3, bias=False
        )  # a bias before BatchNorm has gradient zero: only rounding to compare
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.unused = nn.Linear(3, 3)
        self.a.requires_grad_(False)
        self.b.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y = self.linear(x * 1)
        y.mul_(2).add_(self.count)
        y[:, 1:3] = 0.5
        x.add_(1)  # the caller's tensor
        return y.sigmoid_() * x


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        a, b = y.chunk(2, dim=1)
        return y, a, b.t(), y.view(-1)[2:7], x.t()


class Break(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        torch._dynamo.graph_break()
        return self.b(y) + self.a(y)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return x


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.tensor([1.0, 2.0, 3.0]) + torch.full((3,), float("-inf")).clamp(min=0.0)


MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "tied": (Tied, lambda: (torch.randint(11, (4, 5)),)),
    "batchnorm": (BatchNorm, lambda: (torch.randn(4, 3, 8, 8),)),
    "frozen": (Frozen, lambda: (torch.randn(4, 6),)),
    "in_place": (InPlace, lambda: (torch.randn(4, 6),)),
    "views": (Views, lambda: (torch.randn(4, 6),)),
    "graph_break": (Break, lambda: (torch.randn(4, 6),)),
    "lstm": (Lstm, lambda: (torch.randn(2, 4, 5),)),
    "encoder_layer": (Attention, lambda: (torch.randn(2, 4, 16),)),
    "checkpointed": (Checkpointed, lambda: (torch.randn(4, 6),)),
    "constants": (Constants, lambda: (torch.randn(4, 3),)),
}


@pytest.mark.parametrize("options", [ATEN, {}], ids=["aten", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_matches_eager(name: str, options: dict[str, Any]) -> None:
    model, inputs = MODELS[name]
    assert_matches_eager(model(), inputs(), options=options, steps=2)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.a(x), 0.3, self.training)
        return F.dropout(self.b(x.relu()), 0.5, self.training) + torch.rand_like(x)


@pytest.mark.parametrize("rng", ["eager", "fused"])
def test_dropout_repeats_with_the_seed(rng: str) -> None:
    model = Dropout()
    compiled = torch.compile(model, backend="dscompile", options={"rng": rng})
    x = torch.randn(8, 16)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        out = compiled(x)
        out.sum().backward()
        runs.append((out.detach().clone(), model.a.weight.grad.clone()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_dropout_draws_what_eager_draws() -> None:
    assert_matches_eager(Dropout(), (torch.randn(8, 16),), steps=2)


def test_no_grad_and_eval_take_the_same_pipeline() -> None:
    model = BatchNorm()
    compiled = torch.compile(model, backend="dscompile")
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    report = next(r for r in reversed(dscompile.last_report()) if r.kind == "inference")
    assert report.passes
    assert report.verdict == "proved"


def test_two_shapes_recompile_at_most_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    counter = torch._dynamo.testing.CompileCounterWithBackend("dscompile")
    compiled = torch.compile(model, backend=counter)
    for batch in (4, 7, 9, 5):
        x = torch.randn(batch, 6)
        model.zero_grad()
        compiled(x).sum().backward()
        found = model[0].weight.grad.clone()
        model.zero_grad()
        model(x).sum().backward()
        torch.testing.assert_close(found, model[0].weight.grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("options", [ATEN, {}], ids=["aten", "compiled"])
def test_dynamic_from_the_start(options: dict[str, Any]) -> None:
    assert_matches_eager(Attention(), (torch.randn(3, 5, 16),), options=options, dynamic=True)


@pytest.mark.parametrize("options", [ATEN, {}], ids=["aten", "compiled"])
def test_checkpointed_batchnorm_does_not_read_overwritten_statistics(options: dict[str, Any]) -> None:
    """Gradients only: eager updates the statistics a second time in backward, torch.compile by design does not."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(lambda v: self.norm(v).sin() * v, x, use_reentrant=False).exp()

    model = Block()
    compiled = torch.compile(model, backend="dscompile", options=options)
    x = torch.randn(4, 6)
    for _ in range(2):
        found, expected = (torch.autograd.grad(run(x).sum(), model.norm.weight)[0] for run in (compiled, model))
        torch.testing.assert_close(found, expected)


def test_sizes_from_data_in_one_graph() -> None:
    def select(x: Tensor) -> Tensor:
        first, again = x * 2, x * 2  # merged: the selection then reads another node than the one it was traced with
        return again[x > 0].exp() * first.sum() + x.sum().item()

    x = torch.randn(4, 3, requires_grad=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for options in (ATEN, {}):
            torch._dynamo.reset()
            compiled = torch.compile(select, backend="dscompile", options=options, fullgraph=True)
            torch.testing.assert_close(compiled(x), select(x))
            found, expected = (torch.autograd.grad(run(x).sum(), x)[0] for run in (compiled, select))
            torch.testing.assert_close(found, expected)


def test_a_model_with_constants_can_be_dumped(tmp_path: Path) -> None:
    """Texts are written while PyTorch traces with fake tensors; constants are real ones."""

    def function(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0])

    x = torch.randn(4, 3, requires_grad=True)
    compiled = torch.compile(function, backend="dscompile", options={**ATEN, "dump": str(tmp_path)})
    torch.testing.assert_close(compiled(x), function(x))
    assert "[1.0, 2.0, 3.0]" in next(tmp_path.glob("*/00-traced.txt")).read_text()


def test_second_derivatives_are_a_clear_error() -> None:
    x = torch.randn(3, requires_grad=True)
    compiled = torch.compile(lambda v: (v**3).sum(), backend="dscompile", options=ATEN)
    (first,) = torch.autograd.grad(compiled(x), x, create_graph=True)
    torch.testing.assert_close(first, 3 * x**2)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_and_one_row_with_dynamic_shapes(rows: int) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    compiled = torch.compile(model, backend="dscompile", options=ATEN, dynamic=True)
    for batch in (3, rows):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(compiled(x), model(x))
        found, expected = (torch.autograd.grad(run(x).sum(), model[0].weight)[0] for run in (compiled, model))
        torch.testing.assert_close(found, expected)


def test_autocast_bf16() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    compiled = torch.compile(model, backend="dscompile")
    x = torch.randn(16, 32)
    results = []
    for module in (compiled, model):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
            loss = out.float().square().mean()
        loss.backward()
        results.append((out.dtype, loss.detach(), model[0].weight.grad.clone()))
    assert results[0][0] is results[1][0] is torch.bfloat16
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-3)
    difference = (results[0][2] - results[1][2]).norm() / results[1][2].norm()
    assert difference < 2e-2


def test_two_models_in_one_process_do_not_mix() -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    one, two = (torch.compile(m, backend="dscompile", options=ATEN) for m in (a, b))
    x = torch.randn(2, 4)
    torch.testing.assert_close(one(x), a(x))
    torch.testing.assert_close(two(x), b(x))
