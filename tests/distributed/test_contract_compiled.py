"""Sharded models under torch.compile with the markers not lowered: what Dynamo and AOTAutograd make of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dscompile
from dscompile.placement import config_of, resident_of, spec_of
from tests.distributed.contract import assert_gradients, data, mean_loss, param, parity, run_checks, seeded
from tests.distributed.test_contract_matrix import Odd, odd_loss, square
from tests.ranks import run_ranks


class Broken(nn.Module):
    """Two graphs, both of which read both layers, and an uncompiled region in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)).tanh()
        torch._dynamo.graph_break()
        x = self.plain(self.first(x))
        return self.second(x)

    @torch.compiler.disable
    def plain(self, x: Tensor) -> Tensor:
        return x + self.second.weight.sum() * self.first.bias


def compiled(model: nn.Module, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", **options)


def check_one_graph_with_plain_inputs(rank: int, world: int) -> None:
    torch.compiler.reset()
    seen: list[tuple[torch.fx.GraphModule, list[Tensor]]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append((gm, [t for t in inputs if isinstance(t, Tensor)]))
        return gm.forward

    for stage in (1, 3):
        seen.clear()
        torch.compiler.reset()
        parity(Odd, odd_loss, rank, world, stage=stage, run=lambda m: torch.compile(m, backend=backend, fullgraph=True))
        ((gm, inputs),) = seen
        reads = [n for n in gm.graph.nodes if "unshard" in str(n.target)]
        assert len(reads) == 7  # embed and head, inner twice, scale, one, wide
        specs = {s.fqn: s for t in inputs if (s := spec_of(t)) is not None}
        assert sorted(specs) == [
            "embed.weight",
            "inner.bias",
            "inner.weight",
            "one",
            "scale",
            "wide",
        ]  # a tied pair is one
        assert all(type(t) is Tensor for t in inputs)
        assert config_of(inputs).zero.stage == stage
        resident = {s.fqn for t in inputs if (s := spec_of(t)) is not None and resident_of(t) is not None}
        assert resident == (set(specs) - {"scale"} if stage == 1 else set())


def check_graph_breaks(rank: int, world: int) -> None:
    model, _ = parity(Broken, square((2, 3)), rank, world, run=compiled)
    assert dscompile.access_count(model) == 2  # the uncompiled region's


class Recurrent(nn.Module):
    """Dynamo leaves an LSTM to eager execution: its weights, of many shapes, are read there one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(6, 8, num_layers=2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.cells(x)[0]))


def check_recurrent_layers(rank: int, world: int) -> None:
    torch.compiler.reset()
    model, _ = parity(Recurrent, square((4, 5, 6)), rank, world, run=compiled)
    assert dscompile.access_count(model) >= 8  # the LSTM's


def check_inference(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Odd)), seeded(Odd)
    run = compiled(model, fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(odd_loss(run, 0), odd_loss(reference, 0))


def check_frozen_after_compiling(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Odd)), seeded(Odd)
    run = compiled(model)
    odd_loss(run, rank).backward()
    model.zero_grad()
    for m in (model, reference):
        param(m, "inner.weight").requires_grad_(False)
    odd_loss(run, rank).backward()
    mean_loss(reference, odd_loss, world).backward()
    assert_gradients(model, reference)


def check_unfrozen_after_compiling(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Odd)), seeded(Odd)
    param(model, "inner.weight").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = compiled(model)
    odd_loss(run, rank).backward()
    optimizer.step()
    model.load_state_dict(seeded(Odd).state_dict())
    model.zero_grad()
    param(model, "inner.weight").requires_grad_(True)
    odd_loss(run, rank).backward()
    with pytest.raises(dscompile.DscompileError, match=r"inner\.weight was unfrozen.*run forward and backward again"):
        optimizer.step()
    model.zero_grad()
    odd_loss(run, rank).backward()
    mean_loss(reference, odd_loss, world).backward()
    assert_gradients(model, reference)


def check_steps_are_seen(rank: int, world: int) -> None:
    for stage in (1, 3):
        model = dscompile.distribute(seeded(Odd), config={"zero": {"stage": stage}})
        reference = seeded(Odd)
        run = compiled(model, fullgraph=True)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, reference)]
        for _ in range(3):
            odd_loss(run, rank).backward()
            mean_loss(reference, odd_loss, world).backward()
            assert_gradients(model, reference)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def check_second_model_cut_along_another_dimension(rank: int, world: int) -> None:
    """Dynamo takes sizes that changed between two calls of one code for dynamic; a shard's never are."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight.cos().mean() * x

    torch.compiler.reset()
    for stage in (1, 3):
        model, reference = dscompile.distribute(seeded(Plain), config={"zero": {"stage": stage}}), seeded(Plain)
        # [5, 4]: whole rows of a resident copy, 3 + 2; the columns, 2 + 2, pad less; on 4 ranks only columns fill all
        assert spec_of(param(model, "weight")).dim == int(stage == 3 or world == 4)
        torch.compile(model, backend="dscompile", options={"regions": "aten"})(data((), rank)).backward()
        mean_loss(reference, lambda m, r: m(data((), r)), world).backward()
        assert_gradients(model, reference)


def check_loaded_and_moved_models_are_seen(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(lambda: nn.Linear(3, 4)))
    run = compiled(model)
    with torch.no_grad():
        run(data((2, 3), 0))
        other = seeded(lambda: nn.Linear(3, 4), 5)
        model.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(run(data((2, 3), 0)), other(data((2, 3), 0)))
        model.double()
        torch.testing.assert_close(run(data((2, 3), 0).double()), other.double()(data((2, 3), 0).double()))
        with dscompile.gathered(model, write=True):
            model.weight.fill_(2.0)
        other.weight.fill_(2.0)
        torch.testing.assert_close(run(data((2, 3), 0).double()), other(data((2, 3), 0).double()))


def check_compiled_twice_does_not_recompile(rank: int, world: int) -> None:
    torch.compiler.reset()
    count = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        count.append(gm)
        return gm.forward

    model = dscompile.distribute(seeded(Odd))
    run = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        with dscompile.no_sync(model):
            odd_loss(run, rank).backward()
        odd_loss(run, rank).backward()
        optimizer.step()
        odd_loss(run, rank).backward()
        optimizer.step()
    assert len(count) == 3  # one for each of: plain, inside no_sync, boundary


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=300)


@pytest.mark.parametrize("row", ROWS)
def test_compiled(row: str) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(2)) if found[row]]
    assert not failed, "\n".join(failed)
