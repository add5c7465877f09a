"""save_narrow: the tensor that a cast was made from is saved, not the cast; the same bits, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dscompile.config import Config
from dscompile.graph import StepGraph
from dscompile.manager import Decision, PassContext, parse_pipeline, run_pipeline
from dscompile.split import saved_for_backward
from dscompile.text import print_graph
from dscompile.text_diff import diff_text
from dscompile.text_parse import parse_graph
from tests.build import trace

GRAPHS = Path(__file__).with_name("graphs")
ROWS, WIDTH = 6, 64
BF16 = torch.bfloat16


class SpeltOut(nn.Module):
    """RMSNorm as transformers writes it: fp32 inside, the weight applied to what was rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def block(norm: type[nn.Module] = SpeltOut, dtype: torch.dtype = BF16) -> nn.Module:
    made = norm(WIDTH) if norm is nn.RMSNorm else norm()
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), made, nn.Linear(WIDTH, WIDTH)).to(dtype)


def joint(function: Any, *inputs: Tensor) -> StepGraph:
    graph = trace(function, *inputs)
    run_pipeline(graph, parse_pipeline("canonicalise"), PassContext(Config()))
    return graph


def run(graph: StepGraph) -> list[Decision]:
    """The decisions; the manager proves the result bit for bit equal."""
    context = PassContext(Config())
    (record,) = run_pipeline(graph, parse_pipeline("save_narrow"), context)
    assert record.verdict == "proved"
    return context.decisions


def saved(graph: StepGraph) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Of what is saved between the halves apart from the graph's inputs."""
    found = [n.meta["val"] for n in saved_for_backward(graph)[0] if n.op == "call_function"]
    return sorted(((v.dtype, tuple(v.shape)) for v in found), key=str)


X, XW, STATISTIC = (BF16, (ROWS, WIDTH)), (torch.float32, (ROWS, WIDTH)), (torch.float32, (ROWS, 1))


@pytest.mark.parametrize(("norm", "wide"), [(SpeltOut, [XW]), (nn.RMSNorm, [XW, XW])])
def test_a_norm_saves_its_input_and_statistic(norm: type[nn.Module], wide: list[Any]) -> None:
    """Beside them the last product's operand. transformers' also rounds ``x * rstd``, which its weight is given."""
    graph = joint(block(norm), torch.randn(ROWS, WIDTH, dtype=BF16))
    rounded = [X] if norm is SpeltOut else []
    assert saved(graph) == sorted([*wide, STATISTIC, X, *rounded], key=str)
    decisions = run(graph)
    assert saved(graph) == sorted([X, STATISTIC, X], key=str)
    again = [d for d in decisions if d.choice == "computed again"]
    assert sum(d.facts["saved_bytes"] for d in again) == ROWS * WIDTH * (2 + 2 if norm is SpeltOut else 2 + 4)


def test_fp32_saves_no_product_with_the_statistic() -> None:
    graph = joint(block(dtype=torch.float32), torch.randn(ROWS, WIDTH))
    run(graph)
    assert saved(graph) == sorted([XW, STATISTIC, XW], key=str)


def test_before_and_after() -> None:
    """Backward widens the product, scales it and rounds it again; nothing else changes."""
    graph = parse_graph((GRAPHS / "save_narrow.txt").read_text())
    run(graph)
    assert diff_text((GRAPHS / "save_narrow.after.txt").read_text(), print_graph(graph)) == ""


def test_a_mask_of_bytes_is_saved_not_what_it_was_widened_to() -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    graph = joint(lambda x, m: linear(x) * m.to(torch.float32), torch.randn(ROWS, WIDTH), torch.ones(ROWS, WIDTH) > 0)
    assert saved(graph) == [XW]
    (decision,) = run(graph)
    assert decision.facts["saved_bytes"] == 4 * ROWS * WIDTH, "the mask is an input of the graph"
    assert saved(graph) == []


def test_what_a_product_reads_stays_with_the_reason() -> None:
    """A product would need the wide value in memory."""
    linear = nn.Linear(WIDTH, WIDTH)
    graph = joint(lambda x: linear(x.to(torch.float32)), torch.randn(ROWS, WIDTH, dtype=BF16))
    before = print_graph(graph)
    (decision,) = run(graph)
    assert decision.choice == "saved"
    assert "from memory in backward" in decision.reason
    assert print_graph(graph) == before


@pytest.mark.parametrize("view", [False, True])
def test_what_the_caller_receives_stays_saved(view: bool) -> None:
    linear = nn.Linear(WIDTH, WIDTH, dtype=BF16)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = linear(x).to(torch.float32)
        return wide.view(-1) if view else wide, wide.square().sum()

    graph = joint(function, torch.randn(ROWS, WIDTH, dtype=BF16))
    before = saved(graph)
    assert run(graph) == []
    assert saved(graph) == before == [XW]


def test_what_is_as_large_as_the_value_is_not_saved_instead() -> None:
    """Two large operands, neither of which backward has: the sum stays saved."""
    one, other = (nn.Linear(WIDTH, WIDTH, dtype=BF16) for _ in range(2))
    graph = joint(lambda x: (one(x) + other(x)).square().sum(), torch.randn(ROWS, WIDTH, dtype=BF16))
    before = print_graph(graph)
    run(graph)
    assert print_graph(graph) == before


def test_a_buffer_that_the_step_writes_to_is_not_read_later() -> None:
    """Backward would see the new contents."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("mean", torch.zeros(ROWS, WIDTH, dtype=BF16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x) * self.mean.to(torch.float32)
            self.mean.add_(1)
            return y

    graph = joint(Counts(), torch.randn(ROWS, WIDTH))
    assert run(graph) == []
    assert saved(graph) == [XW]


def test_a_view_of_a_larger_tensor_is_not_saved_instead() -> None:
    """A slice keeps all of its storage: eight times the bytes of what it would replace."""
    linear = nn.Linear(WIDTH, 16 * WIDTH, dtype=BF16)
    graph = joint(lambda x: linear(x)[:, :WIDTH].to(torch.float32).square().sum(), torch.randn(ROWS, WIDTH, dtype=BF16))
    (decision,) = run(graph)
    assert decision.choice == "saved"
    assert decision.facts == {"bytes": 4 * ROWS * WIDTH, "instead_bytes": 2 * 16 * ROWS * WIDTH}
    assert saved(graph) == [XW]


@pytest.mark.parametrize("norm", [SpeltOut, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_gradients_are_the_same_in_bits(norm: type[nn.Module], dtype: torch.dtype) -> None:
    """With PyTorch's own kernels: against the pipeline without the pass, and against eager."""
    torch.manual_seed(0)
    model, x = block(norm, dtype), torch.randn(ROWS, WIDTH).to(dtype)

    def step(function: Any) -> list[Tensor]:
        loss = function(x).float().square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, model.parameters())]

    def compiled(pipeline: str) -> list[Tensor]:
        torch.compiler.reset()
        options = {"summary": False, "regions": "aten", "pipeline": pipeline}
        return step(torch.compile(model, backend="dscompile", options=options))

    narrow, plain = compiled("default"), compiled("canonicalise,fuse_loss")
    torch.testing.assert_close(narrow, plain, rtol=0, atol=0)
    torch.testing.assert_close(narrow, step(model), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_compiled_gradients_are_eagers(dtype: torch.dtype) -> None:
    """Against fp64: not further off than eager's own rounding allows."""
    torch.manual_seed(0)
    model, x = block(dtype=dtype), torch.randn(ROWS, WIDTH).to(dtype)
    torch.compiler.reset()

    def step(function: Any, inputs: Tensor, parameters: Any) -> list[Tensor]:
        return list(torch.autograd.grad(function(inputs).double().square().mean(), list(parameters)))

    found = step(torch.compile(model, backend="dscompile", options={"summary": False}), x, model.parameters())
    exact = block(dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    wanted = step(exact, x.double(), exact.parameters())
    for f, w in zip(found, wanted, strict=True):
        assert (f - w).abs().max() <= w.abs().max() * (2e-2 if dtype is BF16 else 1e-5)
