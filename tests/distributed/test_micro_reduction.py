"""``zero.reduce_micro_batches``: stages 2 and 3 reduce inside ``no_sync`` too, so no rank holds whole gradients."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dscompile
from tests.distributed.contract import assert_gradients, assert_values, run_checks, seeded
from tests.distributed.test_contract_accumulation import Net, batch, window
from tests.ranks import run_ranks

MICRO = 4


def _sent(run: Any, model: nn.Module, rank: int) -> int:
    """Elements that this rank gives to reductions in one window of ``MICRO`` micro-batches."""
    exchange, sent = dist.all_to_all_single, []

    def counted(out: Any, flat: Any, *rest: Any, **options: Any) -> Any:
        sent.append(flat.numel())
        return exchange(out, flat, *rest, **options)

    with mock.patch.object(dist, "all_to_all_single", counted):
        with dscompile.no_sync(model):
            for step in range(MICRO - 1):
                run(batch(rank, step)).backward()
        run(batch(rank, MICRO - 1)).backward()
    return sum(sent)


def check_parity_and_bytes(rank: int, world: int) -> None:
    for stage in (2, 3):
        sent = {}
        for every in (False, True):
            reference = seeded(Net)
            zero = {"stage": stage, "reduce_micro_batches": every}
            model = dscompile.distribute(seeded(Net, rank), config={"zero": zero, "regions": "aten"})
            torch.compiler.reset()
            run = torch.compile(model, backend="dscompile")
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
            sent[every] = _sent(run, model, rank)
            assert not dscompile.pending_accumulation(model)
            assert ("_leaf_weight" in vars(model.twice) and vars(model.twice)["_leaf_weight"] is not None) is not every
            window(reference, world, list(range(MICRO)))
            assert_gradients(model, reference)
            for optimizer in optimizers:
                optimizer.step()
            assert_values(model, reference, atol=1e-6)
        assert sent[True] == MICRO * sent[False] > 0


def check_eager(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net), config={"zero": {"stage": 3, "reduce_micro_batches": True}})
    reference = seeded(Net)
    with dscompile.no_sync(model):
        model(batch(rank, 0)).backward()
        window(reference, world, [0])
        assert_gradients(model, reference)  # already reduced
    model(batch(rank, 1)).backward()
    window(reference, world, [1])
    assert_gradients(model, reference)


def check_stage_1_is_refused(rank: int, world: int) -> None:
    for stage in (0, 1):
        with pytest.raises(dscompile.DscompileError, match=r"reduce_micro_batches.*stage 2 or 3"):
            dscompile.distribute(seeded(Net), config={"zero": {"stage": stage, "reduce_micro_batches": True}})


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=240)


@pytest.mark.parametrize("row", ROWS)
def test_micro_reduction(row: str) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(2)) if found[row]]
    assert not failed, "\n".join(failed)
