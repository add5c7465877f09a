"""Gradient accumulation: no_sync, the boundary, what hooks and ``.grad`` show, and misuse; eager and compiled."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dscompile
from tests.distributed.contract import assert_gradients, assert_values, data, param, run_checks, seeded
from tests.ranks import run_ranks


class Net(nn.Module):
    """A tied pair, a layer used twice, a scalar, reads that autograd never sees, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.branch = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, tokens: Tensor, branch: bool = False) -> Tensor:
        x = self.embed(tokens) + self.frozen
        x = x.to(self.twice.weight.dtype)  # as T5 does
        x = torch.tanh(self.twice(torch.tanh(self.twice(x)))) * self.scale
        if branch:
            x = self.branch(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten().roll(1))


def batch(rank: int, step: int) -> Tensor:
    return data((2, 3), 10 * step + rank, high=7)


def window(reference: nn.Module, world: int, steps: list[int], *, branch_in: tuple[int, ...] = ()) -> None:
    total = sum(reference(batch(r, s), s in branch_in) for s in steps for r in range(world))
    (total / world).backward()


def _steps(rank: int, world: int, backend: str | None, stage: int) -> None:
    reference = seeded(Net)
    model = dscompile.distribute(seeded(Net, rank), config={"zero": {"stage": stage}})
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for first in (0, 3):
        with dscompile.no_sync(model):
            for step in (first, first + 1):
                run(batch(rank, step)).backward()
            assert all(p.grad is None for p in model.parameters())
        pending = dscompile.pending_accumulation(model)
        assert pending == ["scale", "embed.weight", "twice.weight", "twice.bias"]
        run(batch(rank, first + 2)).backward()
        assert not dscompile.pending_accumulation(model)
        window(reference, world, [first, first + 1, first + 2])
        assert_gradients(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    run(batch(rank, 9)).backward()  # back to one reduction a step
    window(reference, world, [9])
    assert_gradients(model, reference)
    assert_values(model, reference, atol=1e-6)


def check_eager(rank: int, world: int) -> None:
    for stage in (0, 2, 3):
        _steps(rank, world, None, stage)


def check_hooks_fire_at_the_boundary_only(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net))
    seen: list[Tensor] = []
    param(model, "twice.weight").register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    with dscompile.no_sync(model), dscompile.no_sync(model):
        model(batch(rank, 0)).backward()
    assert not seen
    model(batch(rank, 1)).backward()
    reference = seeded(Net)
    window(reference, world, [0, 1])
    torch.testing.assert_close(seen[0].full_tensor(), reference.twice.weight.grad)
    assert len(seen) == 1


def check_step_in_the_middle_is_refused(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net))
    optimizer = torch.optim.AdamW(model.parameters())
    with dscompile.no_sync(model):
        model(batch(rank, 0)).backward()
        with pytest.raises(dscompile.DscompileError, match=r"middle of an accumulation window.*no_sync\(\)"):
            optimizer.step()
    with pytest.raises(dscompile.DscompileError, match="middle of an accumulation window"):
        optimizer.step()
    dscompile.discard_accumulation(model)
    model(batch(rank, 1)).backward()
    reference = seeded(Net)
    window(reference, world, [1])
    assert_gradients(model, reference)
    optimizer.step()


def check_parameter_that_the_boundary_does_not_use(rank: int, world: int) -> None:
    model, reference = dscompile.distribute(seeded(Net)), seeded(Net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dscompile.no_sync(model):
        model(batch(rank, 0), branch=True).backward()
    model(batch(rank, 1)).backward()
    assert dscompile.pending_accumulation(model) == ["branch.weight", "branch.bias"]
    with pytest.raises(dscompile.DscompileError, match=r"branch\.weight.*reduce_pending"):
        optimizer.step()
    dscompile.reduce_pending(model)
    window(reference, world, [0, 1], branch_in=(0,))
    assert_gradients(model, reference)
    optimizer.step()


def check_accumulator_takes_no_memory_before_its_gradient(rank: int, world: int) -> None:
    model = dscompile.distribute(seeded(Net))
    with dscompile.no_sync(model):
        leaf = vars(model.twice)["_leaf_weight"]
        assert leaf.shape == (4, 4)
        assert leaf.untyped_storage().nbytes() == 4
        assert vars(model)["_leaf_frozen"] is None


def check_aot_eager(rank: int, world: int) -> None:
    _steps(rank, world, "aot_eager", 3)


def check_inductor(rank: int, world: int) -> None:
    _steps(rank, world, "inductor", 3)


EAGER = sorted(n for n in dict(globals()) if n.startswith("check_") and n not in ("check_aot_eager", "check_inductor"))


@cache
def outcome(world: int, rows: tuple[str, ...]) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, list(rows), timeout=240)


def assert_passed(row: str, results: list[dict[str, str]]) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(results) if found[row]]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("row", EAGER)
def test_eager(row: str, world: int) -> None:
    assert_passed(row, outcome(world, tuple(EAGER)))


@pytest.mark.parametrize("row", ["check_aot_eager", "check_inductor"])
def test_unlowered(row: str) -> None:
    """Any backend runs the markers as they are."""
    assert_passed(row, outcome(2, (row,)))
