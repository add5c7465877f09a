"""A distributed model's whole step as one program: loss and gradients are those of frames and of one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dscompile
from dscompile.config import Config
from dscompile.report import REPORTS
from dscompile.step_frame import StepFrame
from tests.distributed.contract import assert_gradients, data, seeded
from tests.ranks import run_ranks
from tests.tied import Tied

OPTIONS: dict[str, Any] = {"regions": "aten", "summary": False, "cache": False}


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).square().mean()


def against_one_process(rank: int, world: int, stage: int, micro: int, regions: str) -> int:
    options = {**OPTIONS, "regions": regions, "zero": {"stage": stage}}
    model = dscompile.distribute(seeded(Tied), config=options)
    references = [seeded(Tied) for _ in range(world)]  # one a rank: the buffers are each rank's own
    step = StepFrame(model, loss, Config.load(options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in range(2):
        for reference in references:
            reference.zero_grad()
        for index in range(micro):
            batches = [data((6,), 10 * (window * micro + index) + r, high=7) for r in range(world)]
            wanted = [loss(reference, batch) for reference, batch in zip(references, batches, strict=True)]
            for value in wanted:
                (value / micro).backward()
            with dscompile.no_sync(model) if index < micro - 1 else torch.enable_grad():
                found = step(batches[rank], share=micro)
            torch.testing.assert_close(found, wanted[rank].detach())
            assert not found.requires_grad
        mean = copy.deepcopy(references[0])
        for target, *sources in zip(mean.parameters(), *(r.parameters() for r in references), strict=True):
            if target.requires_grad and sources[0].grad is not None:
                target.grad = torch.stack([s.grad for s in sources if s.grad is not None]).mean(0)
        assert not dscompile.pending_accumulation(model)
        assert_gradients(model, mean)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for reference in references:
                for p, q in zip(reference.parameters(), mean.parameters(), strict=True):
                    p.copy_(p if q.grad is None else p - 0.1 * q.grad)
    for ours, theirs in zip(model.buffers(), references[rank].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert step.code is not None
    return len(step.code.program.facts["collectives"])


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loss_and_gradients_are_those_of_one_process(stage: int, micro: int) -> None:
    counts = run_ranks(against_one_process, 2, stage, micro, "aten", timeout=200)
    assert counts[0] == counts[1] > 0


def test_compiled_regions() -> None:
    run_ranks(against_one_process, 2, 3, 1, "auto", timeout=300)


def train(
    entry: bool, rank: int, world: int, stage: int, more: dict[str, Any]
) -> tuple[list[float], list[Tensor], str, int]:
    torch.compiler.reset()
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": stage},
        "dscompile": {**OPTIONS, "step_entry": entry},
        **more,
    }
    engine, *_ = dscompile.initialize(model=model, config=config)
    stream = iter([(data((2, 6), 10 * i + rank), data((2,), 10 * i + rank, high=3)) for i in range(16)])
    losses = [engine.train_batch(stream, loss_fn=nn.functional.cross_entropy).item() for _ in range(3)]
    values = [p.full_tensor().detach() for p in engine.module.parameters()]
    reason, runs = engine.one_program.reason, engine.one_program.runs
    engine.destroy()
    return losses, values, reason, runs


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and clipping": {"gradient_accumulation_steps": 4, "gradient_clipping": 0.1},
    "bf16": {"bf16": {"enabled": True}, "gradient_accumulation_steps": 2},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8}, "gradient_accumulation_steps": 2},
}


def both_ways(rank: int, world: int, stage: int) -> None:
    for name, more in VARIANTS.items():
        ours, values, reason, runs = train(True, rank, world, stage, more)
        frames, expected, off, none = train(False, rank, world, stage, more)
        assert (reason, runs, off, none) == ("", 3 * more.get("gradient_accumulation_steps", 1), "step_entry is off", 0)
        exact = {} if "16" not in name else {"atol": 1e-3, "rtol": 1e-2}
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(frames), msg=lambda m, n=name: f"{n}: {m}", **exact)
        torch.testing.assert_close(values, expected, msg=lambda m, n=name: f"{n}: {m}", **exact)


@pytest.mark.parametrize("stage", [1, 3])
def test_train_batch_is_the_same_both_ways(stage: int) -> None:
    run_ranks(both_ways, 2, stage, timeout=300)


class Uneven(nn.Module):
    """Cannot be one graph on rank 1 only."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.inner, self.breaks = nn.Linear(6, 3), breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return self.inner(x).square().mean()


def one_rank_cannot(rank: int, world: int) -> tuple[str, int, float]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": 3},
        "dscompile": {**OPTIONS, "step_entry": True},
    }
    engine, *_ = dscompile.initialize(model=seeded(lambda: Uneven(rank == 1)), config=config)
    stream = iter([data((2, 6), 10 * i + rank) for i in range(4)])
    loss = [engine.train_batch(stream).item() for _ in range(2)][-1]
    reported = [r.fallbacks for r in REPORTS.all() if r.graph == "train_batch"]
    assert reported == [[engine.one_program.reason]]
    return engine.one_program.reason, engine.one_program.runs, loss


def test_all_ranks_fall_back_if_one_must() -> None:
    (theirs, none, loss), (mine, zero, same) = run_ranks(one_rank_cannot, 2, timeout=200)
    assert none == zero == 0
    assert "another rank" in theirs
    assert "cannot be one program" in mine
    assert loss == same


def shapes_and_steps(rank: int, world: int) -> None:
    def scaled(model: nn.Module, x: Tensor, kind: str) -> Tensor:
        return (model(x) * len(kind)).square().mean()

    model = dscompile.distribute(seeded(lambda: nn.Linear(4, 3)), config={**OPTIONS, "zero": {"stage": 0}})
    steps = [StepFrame(model, loss, Config.load(OPTIONS)) for _ in range(10)]
    for step in steps:  # each has programs of its own
        step(data((2, 4), 0))
    step = StepFrame(model, scaled, Config.load(OPTIONS))
    for count in range(1, 11):  # Dynamo keeps a program for each string
        step(data((2, 4), 0), "x" * count)


def test_many_steps_and_many_variants_of_one_are_compiled() -> None:
    run_ranks(shapes_and_steps, 1, timeout=200)
