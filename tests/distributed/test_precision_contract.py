"""What a user of 16-bit computation may rely on: memory held, masters that move, casts, reads, writes, checkpoints."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dscompile
from dscompile.engine.host_adam import HostAdamW, keep_reduced_gradients
from dscompile.placement import mark_of, resident_of
from dscompile.torch_compat import local_of
from tests.distributed.contract import data, full, param, run_checks, seeded
from tests.ranks import run_ranks

BF16 = {"param_dtype": "bf16"}


def make(model: nn.Module, stage: int, precision: dict[str, Any] | None = None) -> nn.Module:
    config = {"zero": {"stage": stage}, "precision": precision or BF16, "cache": False, "summary": False}
    return dscompile.distribute(model, config=config)


def compiled(model: nn.Module, regions: str = "aten") -> Callable[..., Tensor]:
    torch.compiler.reset()
    found: Callable[..., Tensor] = torch.compile(model, backend="dscompile", options={"regions": regions})
    return found


def live_bytes() -> int:
    """Bytes of all storages that a Python tensor holds, each once; the least of a few moments.

    Threads that watch other ranks may look at this thread's frames, and so hold their locals, for one of them.
    """
    return min(_live_bytes() for _ in range(3) if time.sleep(0.05) is None)


def _live_bytes() -> int:
    gc.collect()
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in gc.get_objects():
            if not isinstance(value, Tensor) or type(value).__name__ == "FakeTensor" or value.device.type != "cpu":
                continue
            storage = (local_of(value) if isinstance(value, DTensor) else value).untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


class Stack(nn.Module):
    """Matrices only, so that nothing is padded: 16,384 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def check_bytes_held_are_those_of_the_zero_table(rank: int, world: int) -> None:
    """Bytes a parameter, with the engine's Adam: p16 + master + m + v between steps, and a 16-bit gradient before one.

    ZeRO's table (K = 12) is 16 | 4 + 12/N | 2 + 14/N | 16/N, with 16-bit gradients kept; these are dropped here between
    steps. Stage 1 keeps no whole gradient and stage 3 no 16-bit shard of the parameter: 2 and 2/N fewer.
    """
    table = {0: 16, 1: 4 + 12 / world, 2: 2 + 14 / world, 3: 16 / world}
    spared = {0: 0, 1: 2 - 2 / world, 2: 0, 3: 2 / world}
    before = {stage: table[stage] - spared[stage] for stage in table}
    gradient = {0: 2, 1: 2 / world, 2: 2 / world, 3: 2 / world}
    _count_bytes(HostAdamW, gradient, before)


def check_bytes_with_an_optimizer_of_torchs(rank: int, world: int) -> None:
    """It takes fp32 gradients only: 2 bytes more before a step at stage 0, 2/N at the others."""
    gradient = {0: 4, 1: 4 / world, 2: 4 / world, 3: 4 / world}
    _count_bytes(torch.optim.AdamW, gradient, {0: 18, 1: 2 + 16 / world, 2: 2 + 16 / world, 3: 16 / world})


def _count_bytes(adam: type[torch.optim.Adam], gradient: dict[int, float], expected: dict[int, float]) -> None:
    """``gradient`` and ``expected`` are bytes a parameter just before a step, by stage."""
    elements, rank = 4 * 64 * 64, torch.distributed.get_rank()
    for stage in range(4):
        before = live_bytes()
        model = make(seeded(Stack), stage)
        run, optimizer = compiled(model), adam(model.parameters(), 1e-3)
        if isinstance(optimizer, HostAdamW):
            keep_reduced_gradients(optimizer, accumulation=1)
        for _ in range(2):
            run(data((4, 64), rank)).square().mean().backward()
            with_gradients = live_bytes() - before
            optimizer.step()
            optimizer.zero_grad()
        run(data((4, 64), rank))  # a forward pass refreshes copies
        held = live_bytes() - before
        slack = 0.02 * elements  # counters of the optimizer, and what a compiled frame keeps
        between = expected[stage] - gradient[stage]
        assert held == pytest.approx(between * elements, abs=slack), (stage, held / elements)
        count = with_gradients / elements
        assert with_gradients == pytest.approx(expected[stage] * elements, abs=slack), (stage, count)
        del model, run, optimizer
        torch.compiler.reset()


def check_small_updates_move_the_master(rank: int, world: int) -> None:
    """Sixteen updates of 2**-12 relative to the weight move it by 2**-8."""
    for stage in range(4):
        model = nn.Linear(8, 8, bias=False)
        nn.init.ones_(model.weight)
        make(model, stage)
        run = compiled(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for moved in (2.0**-8, 2.0**-7):  # half a unit in bf16's last place, then a whole one, which the model sees
            for _ in range(16):  # the gradient of each element is the same, whatever the weight
                (run(torch.ones(1, 8)).sum() * -(2.0**-12)).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert torch.equal(full(param(model, "weight").detach()), torch.full((8, 8), 1 + moved))
        assert torch.equal(run(torch.ones(1, 8)), torch.full((1, 8), 8 * (1 + 2.0**-7)).bfloat16())
        alone = torch.ones(8, 8, dtype=torch.bfloat16)
        for _ in range(16):
            alone += 2.0**-12
        assert torch.equal(alone, torch.ones_like(alone))  # without masters nothing moves


class Mixed(nn.Module):
    """Tells what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.register_buffer("count", torch.ones(4, dtype=torch.long))
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, index: Tensor, more: dict[str, Tensor]) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen = [x.dtype, index.dtype, more["y"].dtype, self.table.dtype, self.layer.weight.dtype]
        return self.layer(x)[index] + more["y"] + self.table + self.count


def check_inputs_are_cast_and_buffers_only_if_asked(rank: int, world: int) -> None:
    x, index, more = torch.randn(4, 4), torch.tensor([0, 2]), {"y": torch.randn(4)}
    low, whole = torch.bfloat16, torch.float32
    cases: list[tuple[dict[str, Any], list[torch.dtype]]] = [
        (BF16, [low, torch.int64, low, whole, low]),
        (BF16 | {"buffer_dtype": "bf16"}, [low, torch.int64, low, low, low]),
        ({"param_dtype": "fp32"}, [whole, torch.int64, whole, whole, whole]),
    ]
    for precision, expected in cases:
        model = make(seeded(Mixed), 3, precision)
        model(x, index, more=more)
        assert model.seen == expected
        assert model.count.dtype is torch.int64
    model = make(seeded(Mixed), 3, BF16 | {"cast_forward_inputs": False})
    model(x.bfloat16(), index, more)
    assert model.seen[2] is whole


def check_reads_and_writes(rank: int, world: int) -> None:
    """Reads are what the model computes with; writes reach the masters in full, and the copies after them."""
    for stage in range(4):
        model = make(seeded(Stack), stage)
        weight = seeded(Stack).layers[0].weight.detach()
        read = model.layers[0].weight
        assert read.dtype is torch.bfloat16
        assert torch.equal(read.detach(), weight.bfloat16())
        with dscompile.gathered(model):
            assert model.layers[0].weight.dtype is torch.bfloat16
        run = compiled(model)
        first = run(torch.ones(1, 64)).detach().clone()
        with dscompile.gathered(model, write=True):
            assert torch.equal(model.layers[0].weight, weight)
            for layer in model.layers:
                layer.weight.mul_(1 + 2.0**-12)
        assert torch.equal(full(param(model, "layers.0.weight").detach()), weight * (1 + 2.0**-12))
        with dscompile.gathered(model, write=True):
            for layer in model.layers:
                layer.weight.mul_(2)
        assert not torch.equal(run(torch.ones(1, 64)), first)


def check_a_copy_refreshed_between_gradient_and_step_is_refreshed_again(rank: int, world: int) -> None:
    """A forward pass between backward and a fused step, which no version counter sees."""
    for stage in (0, 1):
        model = make(seeded(Stack), stage)
        run = compiled(model)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
        run(data((2, 64), rank)).square().mean().backward()
        with torch.no_grad():
            run(data((2, 64), rank))
        optimizer.step()
        with torch.no_grad():
            found = run(torch.ones(1, 64))
        expected = torch.ones(1, 64).bfloat16()
        for layer in range(4):
            weight = full(param(model, f"layers.{layer}.weight").detach()).bfloat16()
            expected = nn.functional.linear(expected, weight)
        torch.testing.assert_close(found, expected)


def check_models_of_16_bits_get_masters(rank: int, world: int) -> None:
    for stage in (0, 1, 3):
        model = make(seeded(Stack).bfloat16(), stage)
        weight = param(model, "layers.0.weight")
        assert weight.dtype is torch.float32
        assert torch.equal(full(weight.detach()), seeded(Stack).bfloat16().layers[0].weight.float())


def check_state_dicts_copies_and_pickles_hold_masters(rank: int, world: int) -> None:
    for stage in (1, 3):
        model = make(seeded(Stack), stage)
        compiled(model)(data((2, 64), rank)).sum().backward()
        model.zero_grad()
        state = model.state_dict()
        assert {v.dtype for v in state.values()} == {torch.float32}
        other = make(seeded(Stack, seed=5), stage)
        other.load_state_dict(state)
        for found in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            weight = param(found, "layers.3.weight")
            assert weight.dtype is torch.float32
            assert torch.equal(local_of(weight), local_of(param(model, "layers.3.weight")))
            mine, theirs = compiled(found)(torch.ones(1, 64)), compiled(model)(torch.ones(1, 64))
            assert mine.dtype is torch.bfloat16
            assert torch.equal(mine, theirs)


def check_masters_are_no_views_of_copies(rank: int, world: int) -> None:
    model = make(seeded(Stack), 1)
    weight = param(model, "layers.0.weight")
    assert resident_of(weight) is None
    assert mark_of(weight).copy is None  # made by the first compiled forward pass
    compiled(model)(torch.ones(1, 64))
    assert mark_of(weight).copy.dtype is torch.bfloat16
    assert local_of(weight).untyped_storage().nbytes() == 64 * 64 * 4 // world


def check_accumulators_are_of_the_chosen_type(rank: int, world: int) -> None:
    for name, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        model = make(seeded(Stack), 3, BF16 | {"grad_dtype": name})
        with dscompile.no_sync(model):
            compiled(model)(data((2, 64), rank)).sum().backward()
        (slot, *_) = dscompile.sharded.slots_in(model)
        assert slot.accumulated.dtype is dtype
        dscompile.reduce_pending(model)
        assert param(model, "layers.0.weight").grad.dtype is torch.float32


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=500)


@pytest.mark.parametrize("row", ROWS)
def test_precision(row: str) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(2)) if found[row]]
    assert not failed, "\n".join(failed)
