"""Who reduces an accumulation window when several readers share a parameter: graphs, eager code, a second call."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dscompile
from tests.distributed.contract import assert_gradients, data, param, run_checks, seeded
from tests.ranks import run_ranks


class TiedAcrossBreak(nn.Module):
    """Embedding and head share a weight, and so do two calls of one layer; a graph break parts them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.twice(self.embed(tokens)))
        torch._dynamo.graph_break()
        x = torch.tanh(self.twice(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten().roll(1))


class EagerBetween(TiedAcrossBreak):
    """The same parameters, also read by code that is never compiled."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.plain()

    @torch.compiler.disable
    def plain(self) -> Tensor:
        return 1 + self.twice.weight.square().mean() + self.embed.weight.square().mean()


def batch(rank: int, step: int) -> Tensor:
    return data((2, 3), 10 * step + rank, high=7)


def _compiled(model: nn.Module, backend: str = "dscompile") -> Any:
    torch.compiler.reset()
    options = {"regions": "aten"} if backend == "dscompile" else None
    return torch.compile(model, backend=backend, options=options)


def _window(run: Any, model: nn.Module, rank: int, count: int, loss: Any, first: int = 0) -> None:
    with dscompile.no_sync(model):
        for step in range(first, first + count - 1):
            loss(run, rank, step).backward()
    loss(run, rank, first + count - 1).backward()


def _expect(reference: nn.Module, world: int, count: int, loss: Any, first: int = 0) -> None:
    steps = range(first, first + count)
    (sum(loss(reference, r, s) for s in steps for r in range(world)) / world).backward()


def one(run: Any, rank: int, step: int) -> Tensor:
    return run(batch(rank, step))


def two_calls(run: Any, rank: int, step: int) -> Tensor:
    """A siamese step: the model is called twice before backward."""
    return run(batch(rank, step)) * run(batch(rank, step + 50))


def _parity(make: Any, loss: Any, rank: int, world: int, backend: str = "dscompile", stages: Any = (1, 2, 3)) -> None:
    for stage in stages:
        model = dscompile.distribute(seeded(make, rank), config={"zero": {"stage": stage}})
        reference = seeded(make)
        run = _compiled(model, backend) if backend else model
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for first, count in ((0, 1), (4, 4), (8, 4), (12, 1)):
            _window(run, model, rank, count, loss, first)
            assert not dscompile.pending_accumulation(model)
            _expect(reference, world, count, loss, first)
            assert_gradients(model, reference)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


def check_tied_across_a_break(rank: int, world: int) -> None:
    _parity(TiedAcrossBreak, one, rank, world)


def check_two_calls_in_one_step(rank: int, world: int) -> None:
    _parity(TiedAcrossBreak, two_calls, rank, world, stages=(3,))


def check_eager_and_compiled_readers(rank: int, world: int) -> None:
    _parity(EagerBetween, one, rank, world, stages=(1, 3))


def check_eager_only(rank: int, world: int) -> None:
    _parity(EagerBetween, two_calls, rank, world, backend="", stages=(0, 3))


def check_markers_not_lowered(rank: int, world: int) -> None:
    _parity(TiedAcrossBreak, one, rank, world, backend="aot_eager", stages=(3,))


def check_a_forward_without_backward_does_not_take_the_window(rank: int, world: int) -> None:
    for backend in ("", "dscompile"):
        model, reference = dscompile.distribute(seeded(TiedAcrossBreak)), seeded(TiedAcrossBreak)
        run = _compiled(model) if backend else model
        with dscompile.no_sync(model):
            run(batch(rank, 0)).backward()
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                run(batch(rank, 5))  # a metric: its graph is dropped
        run(batch(rank, 1)).backward()
        assert not dscompile.pending_accumulation(model)
        _expect(reference, world, 2, one)
        assert_gradients(model, reference)


def check_second_backward_through_the_boundary(rank: int, world: int) -> None:
    for backend in ("", "aot_eager"):  # dscompile's programs free what they save
        model, reference = dscompile.distribute(seeded(TiedAcrossBreak)), seeded(TiedAcrossBreak)
        run = _compiled(model, backend) if backend else model
        with dscompile.no_sync(model):
            run(batch(rank, 0)).backward()
        loss = run(batch(rank, 1))
        loss.backward(retain_graph=True)
        loss.backward()
        # The window was closed by the first: what later readers sent since waits for its own reduction, not silently.
        assert sorted(dscompile.pending_accumulation(model)) == ["embed.weight", "twice.bias", "twice.weight"]
        dscompile.reduce_pending(model)
        total = sum(one(reference, r, 0) + 2 * one(reference, r, 1) for r in range(world))
        (total / world).backward()
        assert_gradients(model, reference)


def check_checkpointed_readers(rank: int, world: int) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(TiedAcrossBreak):
        def forward(self, tokens: Tensor) -> Tensor:
            def block(x: Tensor) -> Tensor:
                return torch.tanh(self.twice(x))

            x = checkpoint(self.embed, tokens, use_reentrant=False)
            x = checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)
            return F.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten().roll(1))

    _parity(Checkpointed, one, rank, world, backend="", stages=(3,))


def check_one_reduction_of_the_window(rank: int, world: int) -> None:
    """Only the first reader reduces: the later ones add to what it will send."""
    model = dscompile.distribute(seeded(TiedAcrossBreak))
    fired: list[str] = []
    param(model, "embed.weight").register_post_accumulate_grad_hook(lambda _: fired.append("embed.weight"))
    _window(_compiled(model), model, rank, 3, one)
    assert fired == ["embed.weight"]


ROWS = sorted(name for name in dict(globals()) if name.startswith("check_"))


@cache
def outcome(world: int) -> list[dict[str, str]]:
    return run_ranks(run_checks, world, __name__, ROWS, timeout=240)


@pytest.mark.parametrize("row", ROWS)
def test_readers(row: str) -> None:
    failed = [f"rank {rank}\n{found[row]}" for rank, found in enumerate(outcome(2)) if found[row]]
    assert not failed, "\n".join(failed)
