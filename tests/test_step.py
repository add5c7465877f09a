"""The step entry: one graph for forward and backward, every parameter by name, gradients equal to eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dscompile
from dscompile.errors import UnsupportedError
from dscompile.graph import InputKind, info
from dscompile.text import print_graph
from dscompile.text_parse import parse_graph
from tests.tied import Tied

ATEN = {"regions": "aten", "summary": False}


def loss(model: nn.Module, ids: Tensor, scale: Tensor) -> Tensor:
    return (model(ids).square() * scale).mean()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randint(7, (6,)), torch.rand(7)


def test_inputs_are_named(batch: tuple[Tensor, Tensor]) -> None:
    graph = dscompile.trace_step(Tied(), loss, *batch)
    by_fqn = {i.fqn: i for i in graph.inputs if i.fqn}
    assert by_fqn["embed.weight"].aliases == ("head.weight",)
    assert by_fqn["embed.weight"].trainable
    assert not by_fqn["frozen.weight"].trainable
    assert by_fqn["norm.running_mean"].kind is InputKind.BUFFER
    assert {"unused.weight", "unused.bias"} <= set(graph.unused)
    gradients = {o.of for o in graph.outputs if o.kind == "gradient"}
    assert gradients == {"embed.weight", "norm.weight", "norm.bias"}


def test_the_batch_is_no_parameter(batch: tuple[Tensor, Tensor]) -> None:
    graph = dscompile.trace_step(Tied(), loss, *batch)
    names = [i.fqn for i in graph.inputs if i.fqn]
    assert len(set(names)) == len(names)
    found = [i for i in graph.inputs if i.kind is InputKind.INPUT]
    assert [i.fqn for i in found] == ["batch[0]", "batch[1]"]
    assert not any(i.trainable or i.aliases for i in found)
    shapes = {n.name: n.meta["val"].shape for n in graph.placeholders()}
    assert [shapes[i.name] for i in found] == [b.shape for b in batch]
    assert parse_graph(print_graph(graph)).inputs == graph.inputs


def test_nodes_name_the_models_own_modules(batch: tuple[Tensor, Tensor]) -> None:
    graph = dscompile.trace_step(Tied(), loss, *batch)
    assert {info(n).fqn for n in graph.nodes if n.op == "call_function"} - {""} == {"embed", "norm", "frozen", "head"}


@pytest.mark.parametrize("config", [ATEN, {"summary": False}], ids=["aten", "compiled"])
def test_gradients_equal_eager(batch: tuple[Tensor, Tensor], config: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = Tied()
    reference = copy.deepcopy(model)
    step = dscompile.compile_step(model, loss, *batch, config=config)
    for _ in range(2):  # the second call accumulates
        found = step(*batch)
        expected = loss(reference, *batch)
        expected.backward()
        torch.testing.assert_close(found, expected.detach())
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, b), (_, c) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)


def test_a_batch_that_the_step_writes_to_and_differentiates() -> None:
    """What belongs to the batch goes to the batch, never to the parameter of the same number."""

    def writes(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
        x.add_(1)
        return (model(x) * scale).square().mean()

    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    reference = copy.deepcopy(model)
    x, scale = torch.randn(2, 3), torch.randn(3, requires_grad=True)
    y, other = x.clone(), scale.detach().clone().requires_grad_()
    step = dscompile.compile_step(model, writes, x.clone(), scale, config=ATEN)
    torch.testing.assert_close(step(x, scale), writes(reference, y, other).detach())
    writes(reference, y.clone().sub_(1), other).backward()
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(scale.grad, other.grad)
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))
    torch.testing.assert_close(model.weight.grad, reference.weight.grad)


def test_other_shapes_are_refused(batch: tuple[Tensor, Tensor]) -> None:
    step = dscompile.compile_step(Tied(), loss, *batch, config=ATEN)
    with pytest.raises(UnsupportedError, match="compiled for"):
        step(batch[0][:3], batch[1])


def test_loss_must_be_a_scalar(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="scalar"):
        dscompile.trace_step(Tied(), lambda model, ids, scale: model(ids) * scale, *batch)


def test_a_graph_break_is_refused_with_the_way_out(batch: tuple[Tensor, Tensor]) -> None:
    def breaks(model: nn.Module, ids: Tensor, scale: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return loss(model, ids, scale)

    with pytest.raises(UnsupportedError, match=r"torch\.compile"):
        dscompile.trace_step(Tied(), breaks, *batch)


def test_a_distributed_model_gets_its_gradients() -> None:
    def square(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    store, x = dist.HashStore(), torch.randn(2, 4)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        for stage in (0, 1, 3):
            reference = nn.Linear(4, 3)
            model = dscompile.distribute(
                copy.deepcopy(reference), config={"zero": {"stage": stage}, "regions": "aten", "summary": False}
            )
            with pytest.raises(UnsupportedError, match=f"weight is placed at stage {stage}"):
                dscompile.trace_step(model, square, x)
            step = dscompile.compile_step(model, square, x)
            assert all(p.grad is None for p in model.parameters())  # compiling runs nothing
            expected = square(reference, x)
            expected.backward()
            torch.testing.assert_close(step(x), expected.detach())
            for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    finally:
        dist.destroy_process_group()
