"""fuse_loss: what it rewrites, what it leaves alone and why, and that loss and gradients are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dscompile.config import Config
from dscompile.graph import StepGraph
from dscompile.manager import Decision, PassContext, parse_pipeline, run_pipeline
from dscompile.text import print_graph
from dscompile.tools.gpt import GPT, GPTConfig
from tests.build import execute, random_inputs, trace

ROWS, WIDTH, CLASSES = 6, 4, 11


class Head(nn.Module):
    """A projection and its loss, in the ways that models spell it."""

    def __init__(self, bias: bool = False, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, bias=bias)
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> Any:
        return self.loss(self.head(x), target)


def inputs(*lead: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*lead, WIDTH, requires_grad=True), torch.randint(CLASSES, lead)


def run(graph: StepGraph, fused_loss: str = "on") -> list[Decision]:
    """The pass's decisions; apart from the loss and its gradients, the manager proves the graph unchanged."""
    context = PassContext(Config.load({"fused_loss": fused_loss}))
    record = run_pipeline(graph, parse_pipeline("canonicalise,fuse_loss"), context)[1]
    fused = [d for d in context.decisions if d.choice == "fused"]
    assert (record.apart_from > 0) == bool(fused)
    return [d for d in context.decisions if d.pass_name == "fuse_loss"]


def flat(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, CLASSES), target.view(-1), **options)


# -- the graph ---------------------------------------------------------------------------------------------------------

EXPECTED = """\
dscompile graph v1 joint forward_outputs=1
in %primals_1 : f32[11, 4]{4, 1}@cpu | parameter head.weight trainable
in %primals_2 : f32[6, 4]{4, 1}@cpu | input x
in %primals_3 : i64[6]{1}@cpu | input target
in %tangents_1 : f32[]{}@cpu | tangent
%fused = dscompile.linear_cross_entropy.default(%primals_2, %primals_1, None, %primals_3, 1, -100, True) \
: (f32[]{}@cpu, f32[6, 4]{4, 1}@cpu, f32[11, 4]{4, 1}@cpu, f32[0]{1}@cpu) | f compute head
%getitem_2 = operator.getitem(%fused, 0) : f32[]{}@cpu ~%fused.0 | f compute head
%getitem_3 = operator.getitem(%fused, 1) : f32[6, 4]{4, 1}@cpu ~%fused.1 | f compute head
%getitem_4 = operator.getitem(%fused, 2) : f32[11, 4]{4, 1}@cpu ~%fused.2 | f compute head
%mul_tensor_1 = aten.mul.Tensor(%getitem_4, %tangents_1) : f32[11, 4]{4, 1}@cpu | b compute head
%t_2 = aten.t.default(%mul_tensor_1) : f32[4, 11]{1, 4}@cpu ~%mul_tensor_1 | b view head
%mul_tensor = aten.mul.Tensor(%getitem_3, %tangents_1) : f32[6, 4]{4, 1}@cpu | b compute head
%t_4 = aten.t.default(%t_2) : f32[11, 4]{4, 1}@cpu ~%mul_tensor_1 | b view head
out (%getitem_2, %t_4, %mul_tensor, None) | output, gradient head.weight, gradient x, none
""".replace("%fused", "%linear_cross_entropy_default")


def test_the_logits_are_gone_from_the_graph() -> None:
    graph = trace(Head(), *inputs(ROWS))
    assert "f32[6, 11]" in print_graph(graph)
    assert [d.choice for d in run(graph)] == ["fused"]
    assert print_graph(graph) == EXPECTED


def test_all_but_the_loss_and_its_gradients_is_proved_unchanged() -> None:
    graph = trace(Head(bias=True), *inputs(ROWS))
    context = PassContext(Config.load({"fused_loss": "on"}))
    record = run_pipeline(graph, parse_pipeline("canonicalise,fuse_loss"), context)[1]
    assert record.apart_from == 4  # the loss, and the gradients of input, weight and bias


def smoothed(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=0.1)


def weighted(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight=torch.arange(1.0, CLASSES + 1))


def each_row(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none").sum()


def with_logits(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, target), logits


def with_z_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) + 1e-2 * logits.logsumexp(1).pow(2).mean()


def shifted(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], target[1:])


def capped(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(10 * torch.tanh(logits / 10), target)


def twice(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target) + F.cross_entropy(logits, target.flip(0))


def likelihood(logits: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(logits, target)


def classes_second(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.unsqueeze(0).transpose(1, 2), target.unsqueeze(0))


KEPT = {
    classes_second: "classes are not the last dimension",
    smoothed: "the log-probabilities are also read by",
    weighted: "classes are weighted",
    each_row: "a loss for each row is wanted",
    with_logits: "the logits are also read by the caller",
    with_z_loss: "the logits are also read by",
    shifted: "its logits come from no projection",
    capped: "its logits come from no projection",
    twice: "the log-probabilities are also read by",
    likelihood: "its input is no log-softmax over classes",
}


@pytest.mark.parametrize("loss", KEPT, ids=lambda loss: loss.__name__)
def test_left_alone_with_a_reason(loss: Callable[..., Any]) -> None:
    graph = trace(Head(loss=loss), *inputs(ROWS))
    decisions = run(graph)
    assert {d.choice for d in decisions} == {"kept"}
    assert all(d.reason.startswith(KEPT[loss]) for d in decisions), decisions
    assert "linear_cross_entropy" not in print_graph(graph)


def test_frozen_projection_is_left_alone() -> None:
    graph = trace(Head().requires_grad_(False), *inputs(ROWS))
    (decision,) = run(graph)
    assert (decision.choice, decision.reason) == (
        "kept",
        "the gradient of the projection's input or weight is not wanted",
    )


def test_auto_counts_bytes() -> None:
    small, large = trace(Head(), *inputs(ROWS)), trace(Head(), *inputs(1 << 21))
    assert [d.choice for d in run(small, "auto")] == ["kept"]
    assert [d.choice for d in run(large, "auto")] == ["fused"]
    assert run(trace(Head(), *inputs(ROWS)), "off") == []


# -- the numbers -------------------------------------------------------------------------------------------------------


def summed(logits: Tensor, target: Tensor) -> Tensor:
    return flat(logits, target, reduction="sum") / 7


def ignoring(logits: Tensor, target: Tensor) -> Tensor:
    return flat(logits, target.where(target > 0, 2), ignore_index=2)


def upcast(logits: Tensor, target: Tensor) -> Tensor:
    return flat(logits.float(), target)


SITES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "plain": (Head(), inputs(ROWS)),
    "bias": (Head(bias=True), inputs(ROWS)),
    "batched": (Head(bias=True, loss=flat), inputs(2, ROWS)),
    "sum": (Head(loss=summed), inputs(2, ROWS)),
    "ignored rows": (Head(bias=True, loss=ignoring), inputs(3, ROWS)),
    "gpt": (GPT(GPTConfig(32, 1, 16, 2, 8)), (torch.randint(32, (2, 8)), torch.randint(32, (2, 8)))),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_loss_and_gradients(name: str, dynamic: bool) -> None:
    model, batch = SITES[name]
    graph = trace(model, *batch, dynamic=dynamic)
    values = random_inputs(graph)
    before = execute(graph, values).outputs
    assert [d.choice for d in run(graph)] == ["fused"]
    for got, want in zip(execute(graph, values).outputs, before, strict=True):
        torch.testing.assert_close(got, want)


def test_without_gradients() -> None:
    graph = trace(Head(bias=True).requires_grad_(False), inputs(ROWS)[0].detach(), inputs(ROWS)[1])
    values = random_inputs(graph)
    before = execute(graph, values).outputs
    assert [d.choice for d in run(graph)] == ["fused"]
    torch.testing.assert_close(execute(graph, values).outputs, before)


@pytest.mark.parametrize("regions", ["aten", "auto"])
def test_compiled_step(regions: str) -> None:
    model, batch = SITES["gpt"]
    expected = model(*batch)
    wanted = torch.autograd.grad(expected * 3, list(model.parameters()))
    options = {"fused_loss": "on", "regions": regions, "summary": False}
    loss = torch.compile(model, backend="dscompile", options=options)(*batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, list(model.parameters())), wanted)


def test_autocast_keeps_the_products_in_16_bits() -> None:
    model, (x, target) = Head(bias=True, loss=upcast), inputs(64)

    def step(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, target)

    exact = torch.autograd.grad(model(x, target), [x, *model.parameters()])
    eager = torch.autograd.grad(step(x, target), [x, *model.parameters()])
    options = {"fused_loss": "on", "regions": "aten", "summary": False}
    torch.compiler.reset()
    loss = torch.compile(step, backend="dscompile", options=options)(x, target)
    ours = torch.autograd.grad(loss, [x, *model.parameters()])
    graph = trace(step, x, target)
    assert [d.choice for d in run(graph)] == ["fused"]
    for got, plain, want in zip(ours, eager, exact, strict=True):
        assert (got - want).norm() <= 1.5 * (plain - want).norm() + 1e-6
