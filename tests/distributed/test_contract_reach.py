"""Values and flags that reach a sharded model from outside: ``functional_call``, ``get_parameter``, unfreezing."""

from __future__ import annotations

import copy
import io
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import dscompile
from tests.distributed.contract import assert_gradients, data, mean_loss, param, run_checks, seeded
from tests.distributed.test_contract_matrix import square
from tests.ranks import run_ranks


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 3)))


loss = square((4, 3))


def _compiled(fn: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(fn, backend="dscompile", options={"regions": "aten"})


def _values(reference: nn.Module) -> dict[str, Tensor]:
    return {name: (2 * p).detach().requires_grad_() for name, p in reference.named_parameters()}


def check_functional_call_inside_compiled_code(rank: int, world: int) -> None:
    for stage in (1, 3):
        model = dscompile.distribute(seeded(net), config={"zero": {"stage": stage}})
        reference = seeded(net)
        ours, theirs = _values(reference), _values(reference)
        run = _compiled(lambda values, x, model=model: functional_call(model, values, (x,)))
        for _ in range(2):
            got, want = run(ours, data((4, 3), rank)), functional_call(reference, theirs, (data((4, 3), rank),))
            torch.testing.assert_close(got, want)
            got.square().sum().backward()
            want.square().sum().backward()
            for name in ours:
                torch.testing.assert_close(ours[name].grad, theirs[name].grad)
        assert all(p.grad is None for p in model.parameters())


def check_functional_call_around_a_compiled_model(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(net)), seeded(net)
    run = _compiled(model)
    x = data((4, 3), rank)
    torch.testing.assert_close(run(x), reference(x))
    values = {name: p.detach() for name, p in _values(reference).items()}
    got = functional_call(run, {f"_orig_mod.{name}": value for name, value in values.items()}, (x,))
    torch.testing.assert_close(got, functional_call(reference, values, (x,)))
    torch.testing.assert_close(run(x), reference(x))  # its own parameters again


def check_functional_call_with_some_values_and_own_parameters(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(net)), seeded(net)
    x = data((4, 3), rank)
    bias = torch.arange(5.0)
    run = _compiled(lambda values: functional_call(model, values, (x,)))
    torch.testing.assert_close(run({"0.bias": bias}), functional_call(reference, {"0.bias": bias}, (x,)))
    own = dict(model.named_parameters())
    run(own).square().mean().backward()
    mean_loss(reference, loss_on(x, rank, world), world).backward()
    assert_gradients(model, reference)


def loss_on(x: Tensor, rank: int, world: int) -> Any:
    return lambda model, r: model(data((4, 3), r)).square().mean()


def check_get_parameter(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(net))
    for name, p in model.named_parameters():
        assert model.get_parameter(name) is p
    assert model[1].get_parameter("1.bias") is param(model, "1.1.bias")
    assert model[0].get_parameter("weight") is param(model, "0.weight")
    with pytest.raises(AttributeError):
        model.get_parameter("0.nothing")


def check_copies_keep_their_kind(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(net))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other).__name__ == "Sequential"
        assert isinstance(other, nn.Sequential)
        assert other.get_parameter("0.weight") is param(other, "0.weight")
        assert other.get_parameter("0.weight") is not param(model, "0.weight")
        values = {"0.bias": torch.arange(5.0)}
        x = data((4, 3), rank)
        want = functional_call(seeded(net), values, (x,))
        torch.testing.assert_close(_compiled(lambda v, m=other, x=x: functional_call(m, v, (x,)))(values), want)


def check_unfreezing_a_module_is_seen(rank: int, world: int) -> None:
    for stage in (1, 3):
        model = dscompile.distribute(seeded(net), config={"zero": {"stage": stage}})
        reference = seeded(net)
        model[1].requires_grad_(False)
        run = _compiled(model)
        loss(run, rank).backward()
        assert param(model, "1.1.weight").grad is None
        model.zero_grad()
        model[1].requires_grad_(True)
        loss(run, rank).backward()
        mean_loss(reference, loss, world).backward()
        assert_gradients(model, reference)


def check_unfreezing_a_parameter_is_an_error_at_the_next_forward(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(net)), seeded(net)
    run = _compiled(model)
    param(model, "1.1.weight").requires_grad_(False)
    for _ in range(2):  # the first call finds out
        loss(run, rank).backward()
        assert param(model, "1.1.weight").grad is None
    model.zero_grad()
    param(model, "1.1.weight").requires_grad_(True)
    with torch.no_grad():
        loss(run, rank)
    with pytest.raises(dscompile.DscompileError, match=r"1\.1\.weight .*unfrozen after .*call the model again"):
        loss(run, rank)
    loss(run, rank).backward()
    mean_loss(reference, loss, world).backward()
    assert_gradients(model, reference)


def check_a_parameter_frozen_by_itself_is_not_reduced_for_long(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(net))
    param(model, "1.1.weight").requires_grad_(False)
    run = _compiled(model)
    graphs = []
    for _ in range(3):
        loss(run, rank).backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2]  # the first call finds out, the second compiles without the reduction
    assert not vars(model[1][1])["_shard_weight"].requires_grad


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=240)


@pytest.mark.parametrize("row", ROWS)
def test_reach(row: str) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(2)) if found[row]]
    assert not failed, "\n".join(failed)
