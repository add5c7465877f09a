"""The engine trains as the same loop written by hand does: loop styles, stages, accumulation; and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dscompile
from dscompile.errors import ConfigError, DscompileError, RunError, ShardingError
from tests.engine.runs import CLASSES, LR, MICRO, TIMEOUT, WIDTH, batches, by_hand, config, make_model, whole
from tests.ranks import run_ranks

STEPS = 3


def train(rank: int, world: int, style: str, accumulation: int, more: dict[str, Any]) -> tuple[list[float], Any, Any]:
    """Train in one of three styles; returns the losses, the parameters, and some of the engine's answers."""
    model = make_model()
    given = config(gradient_accumulation_steps=accumulation, **more)
    engine, optimizer, _, _ = dscompile.initialize(model=model, model_parameters=model.parameters(), config=given)
    assert optimizer is not None
    losses = []
    data = batches(STEPS * accumulation, rank, world)
    if style == "train_batch":
        stream = iter(data)
        losses = [float(engine.train_batch(stream, loss_fn=nn.functional.cross_entropy)) for _ in range(STEPS)]
    for index, (x, y) in enumerate(data if style != "train_batch" else []):
        loss = nn.functional.cross_entropy(engine(x), y)
        losses.append(loss.item())
        if style == "engine":
            assert engine.is_gradient_accumulation_boundary() == ((index + 1) % accumulation == 0)
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            if (index + 1) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
    answers = (engine.global_steps, engine.skipped_steps, engine.get_global_grad_norm())
    return losses, whole(engine), answers


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_train_as_one_process_does(stage: int, accumulation: int) -> None:
    """Clipping is on and bites: the norm is taken over all shards."""
    clip = 0.3
    more = {"zero_optimization": {"stage": stage}, "gradient_clipping": clip}
    results = run_ranks(train, 2, "engine", accumulation, more, timeout=TIMEOUT)
    losses, parameters = by_hand(STEPS, accumulation, clip)
    means = [(a + b) / 2 for a, b in zip(results[0][0], results[1][0], strict=True)]
    assert means == pytest.approx(losses, rel=1e-5)
    for _, ours, (steps, skipped, norm) in results:
        assert (steps, skipped) == (STEPS, 0)
        assert norm > clip
        for mine, expected in zip(ours, parameters, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", ["plain", "train_batch"])
def test_the_other_loops_are_the_same_training(style: str) -> None:
    more = {"zero_optimization": {"stage": 3}, "gradient_clipping": 0.3}
    results = run_ranks(train, 2, style, 2, more, timeout=TIMEOUT)
    losses, parameters = by_hand(STEPS, 2, 0.3)
    for _, ours, (steps, _, _) in results:
        assert steps == STEPS
        for mine, expected in zip(ours, parameters, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    if style == "train_batch":
        pairs = [sum(losses[2 * i : 2 * i + 2]) / 2 for i in range(STEPS)]
        assert results[0][0] == pytest.approx(pairs, rel=1e-5)
        assert results[0][0] == results[1][0]


def test_sum_multiplies_gradients_by_the_ranks() -> None:
    more = {"gradient_allreduce_op": "sum", "gradient_clipping": 0.3}
    results = run_ranks(train, 2, "engine", 1, more, timeout=TIMEOUT)
    _, parameters = by_hand(STEPS, 1, 0.3, total=True)
    for _, ours, _ in results:
        for mine, expected in zip(ours, parameters, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


# -- one rank, without a launcher --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone() -> Any:
    """The engine starts the process group itself; each test leaves none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


def make(**more: Any) -> Any:
    model = make_model()
    return dscompile.initialize(model=model, model_parameters=model.parameters(), config=config(**more))


def one_step(engine: Any, index: int = 0) -> torch.Tensor:
    x, y = batches(index + 1)[index]
    loss = nn.functional.cross_entropy(engine(x), y)
    engine.backward(loss)
    return loss


def test_one_rank_needs_no_launcher() -> None:
    engine, optimizer, loader, scheduler = make(zero_optimization={"stage": 3})
    assert (loader, scheduler) == (None, None)
    assert isinstance(optimizer, torch.optim.AdamW)
    one_step(engine)
    engine.step()
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 1, MICRO)
    assert (engine.train_batch_size(), engine.zero_optimization_stage(), engine.cur_scale) == (MICRO, 3, 1.0)
    assert engine.get_lr() == [LR]
    assert engine.get_mom() == [(0.9, 0.999)]
    assert list(engine.state_dict()) == list(make_model().state_dict())


def test_evaluation_is_a_mean_without_gradients() -> None:
    engine, *_ = make(gradient_accumulation_steps=2)
    data = batches(2)
    value = float(engine.eval_batch(iter(data), loss_fn=nn.functional.cross_entropy))
    model = make_model()
    expected = sum(nn.functional.cross_entropy(model(x), y).item() for x, y in data) / 2
    assert value == pytest.approx(expected, rel=1e-6)
    assert engine.module.training
    assert all(p.grad is None for p in engine.module.parameters())
    assert engine.micro_steps == 0


def test_the_schedule_moves_with_steps() -> None:
    engine, _, _, scheduler = make(
        gradient_accumulation_steps=2,
        scheduler={
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 0.4, "warmup_num_steps": 4, "warmup_type": "linear"},
        },
    )
    assert scheduler is engine.lr_scheduler
    rates = []
    for index in range(6):
        one_step(engine, index)
        engine.step()
        rates.append(engine.get_lr()[0])
    assert rates[0] == rates[2 - 2]
    assert rates[1] == rates[2] != rates[3]


def test_attributes_of_the_model_are_found() -> None:
    engine, *_ = dscompile.initialize(model=WithLoss(), config=config())
    assert engine.body is engine.module.body
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing


class WithLoss(nn.Module):
    """Returns a mapping, as models of transformers do, and has a parameter that only odd calls use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(WIDTH, CLASSES)
        self.rare = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: torch.Tensor, y: torch.Tensor, rare: bool = False) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        if rare:
            logits = logits * self.rare
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


@pytest.mark.parametrize("order", [(True, False), (False, True), (False, False)])
def test_a_parameter_that_only_some_micro_batches_use(order: tuple[bool, bool]) -> None:
    """Also one that the last micro-batch does not use: its gradient is reduced when the step is taken."""
    engine, *_ = dscompile.initialize(
        model=WithLoss(), config=config(gradient_accumulation_steps=2, gradient_clipping=0)
    )
    reference = WithLoss()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    for (x, y), rare in zip(batches(2), order, strict=True):
        engine.backward(engine(x=x, y=y, rare=rare)["loss"])
        engine.step()
        (reference(x, y, rare)["loss"] / 2).backward()
    optimizer.step()
    for mine, expected in zip(whole(engine), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-6)


def test_an_unused_parameter_is_an_error_if_asked_for() -> None:
    engine, *_ = dscompile.initialize(
        model=WithLoss(), config=config(zero_optimization={"ignore_unused_parameters": False})
    )
    x, y = batches(1)[0]
    engine.backward(engine(x, y)["loss"])
    with pytest.raises(ShardingError, match="parameter rare: got no gradient"):
        engine.step()


def test_two_losses_before_one_step_add_up() -> None:
    engine, *_ = make(gradient_accumulation_steps=2, gradient_clipping=0)
    reference = make_model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    for x, y in batches(2):
        for weight in (1.0, 0.25):
            engine.backward(weight * nn.functional.cross_entropy(engine(x), y))
            (weight * nn.functional.cross_entropy(reference(x), y) / 2).backward()
        engine.step()
    optimizer.step()
    assert engine.global_steps == 1
    for mine, expected in zip(whole(engine), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_model_in_evaluation_mode_trains_alike() -> None:
    engine, *_ = make(gradient_accumulation_steps=2, gradient_clipping=0)
    engine.eval()
    for index in range(4):
        one_step(engine, index)
        engine.step()
    _, expected = by_hand(2, 2, 0)
    assert engine.global_steps == 2
    for mine, theirs in zip(whole(engine), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


class Broken(nn.Module):
    """Its loss is computed from another output of it, outside the compiled graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.body(x)
        torch._dynamo.graph_break()
        return nn.functional.cross_entropy(logits, y), logits


def test_a_plain_backward_is_divided_once_through_outputs_of_outputs() -> None:
    given = config(gradient_accumulation_steps=2, gradient_clipping=0, optimizer={"type": "SGD", "params": {"lr": LR}})
    engine, optimizer, *_ = dscompile.initialize(model=Broken(), config=given)
    reference = Broken()
    theirs = torch.optim.SGD(reference.parameters(), lr=LR)
    for x, y in batches(2):
        engine(x, y)[0].backward()
        (reference(x, y)[0] / 2).backward()
    optimizer.step()
    theirs.step()
    for mine, expected in zip(whole(engine), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-6)


def test_two_kinds_of_backward_in_one_window_are_refused() -> None:
    engine, *_ = make(gradient_accumulation_steps=2)
    (x, y), (x2, y2) = batches(2)
    engine.backward(nn.functional.cross_entropy(engine(x), y))
    engine.step()
    nn.functional.cross_entropy(engine(x2), y2).backward()
    with pytest.raises(RunError, match="in one accumulation window"):
        engine.step()


def test_no_sync_adds_to_the_next_step() -> None:
    engine, *_ = make(gradient_clipping=0)
    reference = make_model()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.0)
    data = batches(2)
    with engine.no_sync():
        one_step(engine, 0)
        with pytest.raises(RunError, match=r"engine\.step\(\) inside engine\.no_sync\(\)"):
            engine.step()
    one_step(engine, 1)
    engine.step()
    for x, y in data:
        nn.functional.cross_entropy(reference(x), y).backward()
    optimizer.step()
    for mine, expected in zip(whole(engine), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_boundary_can_be_moved() -> None:
    engine, *_ = make(gradient_accumulation_steps=4)
    engine.set_gradient_accumulation_boundary(False)
    one_step(engine)
    engine.step()
    assert engine.global_steps == 0
    engine.set_gradient_accumulation_boundary(True)
    one_step(engine, 1)
    engine.step()
    assert engine.global_steps == 1


def test_the_batch_can_be_changed_between_steps() -> None:
    engine, *_ = make()
    engine.set_train_batch_size(MICRO * 3)
    assert engine.get_batch_info() == (MICRO * 3, MICRO, 3)
    for index in range(3):
        assert engine.global_steps == 0
        one_step(engine, index)
        if index == 1:
            with pytest.raises(RunError, match=r"window is open \(2 of 3\)"):
                engine.set_train_batch_size(MICRO)
        engine.step()
    assert engine.global_steps == 1
    with pytest.raises(ConfigError, match="must be a multiple of micro-batch"):
        engine.set_train_batch_size(MICRO * 3 + 1)


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_an_optimizer_made_before_is_kept() -> None:
    model = make_model()
    mine = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[2].weight]}], lr=0.3)
    engine, optimizer, _, scheduler = dscompile.initialize(
        model=model, optimizer=mine, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1), config=config()
    )
    assert optimizer is mine
    bias = model.state_dict()["2.bias"].full_tensor().clone()
    one_step(engine)
    engine.step()
    assert engine.get_lr() == pytest.approx([0.01, 0.03])
    assert torch.equal(model.state_dict()["2.bias"].full_tensor(), bias)  # it is in no group
    assert scheduler.last_epoch == 1


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    model = make_model()
    mine = torch.optim.Adam(model.parameters())
    model(batches(1)[0][0]).sum().backward()
    mine.step()
    mine.zero_grad()
    with pytest.raises(ShardingError, match="Adam has taken steps before initialize"):
        dscompile.initialize(model=model, optimizer=mine, config=config())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": None}, "expected an nn.Module, got NoneType"),
        ({"config": None}, r"needs config="),
        ({"config_params": {}}, "leave one out"),
        ({"model_parameters": [nn.Parameter(torch.zeros(3))]}, r"model_parameters has a parameter of shape \(3,\)"),
        ({"mesh_param": (1, 2)}, r"expected \(1, 1\)"),
        ({"config": {"train_batch_size": 2, "optimizer": {"type": "Adamm"}}}, "Did you mean 'Adam"),
        ({"config": {"train_batch_size": 2, "optimizer": {"type": "Adam", "params": {"ls": 1}}}}, "'lr'"),
        ({"config": {"train_batch_size": 2, "scheduler": {"type": "WarmupLR"}}}, "a schedule without an optimizer"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(DscompileError, match=says):
        dscompile.initialize(**{"model": make_model(), "config": config(), **arguments})


def other_config(rank: int, world: int, ours: list[dict[str, Any]]) -> str:
    with pytest.raises(ConfigError) as caught:
        dscompile.initialize(model=make_model(), config=ours[rank])
    return str(caught.value)


def test_ranks_with_different_configurations_all_say_so() -> None:
    good, other, bad = config(), config(gradient_clipping=2.0), config(zero_optimization={"stage": 9})
    first, second = run_ranks(other_config, 2, [good, other], timeout=TIMEOUT)
    assert first == second == "the configuration differs between rank 0 and rank 1; give every rank the same."
    first, second = run_ranks(other_config, 2, [good, bad], timeout=TIMEOUT)
    assert first == f"rank 1: {second}"
    assert "zero_optimization.stage = 9: must be at most 3" in second


# -- what goes wrong in the loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": {"type": "AdmW"}}, "unknown optimizer 'AdmW'"),
        ({"optimizer": {"type": "OneBitAdam"}}, "OneBitAdam"),
        ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, "unknown parameter 'learning_rate'"),
        ({"scheduler": {"type": "WarmUp"}}, "unknown scheduler 'WarmUp'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"steps": 1}}}, "unknown parameter 'steps'"),
    ],
)
def test_an_unknown_optimizer_or_schedule_leaves_the_model_alone(wrong: dict[str, Any], said: str) -> None:
    model = make_model()
    with pytest.raises(DscompileError, match=said):
        dscompile.initialize(model=model, config=config(**wrong))
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert type(model) is nn.Sequential


def test_a_plain_step_in_mid_accumulation_is_an_error() -> None:
    engine, optimizer, *_ = make(gradient_accumulation_steps=3)
    one_step(engine)
    with pytest.raises(DscompileError, match=r"accumulation window|after 1 of 3 micro-batches"):
        optimizer.step()


def early_step(rank: int, world: int) -> str:
    engine, optimizer, *_ = make(gradient_accumulation_steps=3, zero_optimization={"stage": 3})
    x, y = batches(1, rank, world)[0]
    nn.functional.cross_entropy(engine(x), y).backward()
    with pytest.raises(DscompileError) as caught:
        optimizer.step()
    return str(caught.value)


def test_it_is_one_on_every_rank() -> None:
    first, second = run_ranks(early_step, 2, timeout=TIMEOUT)
    assert first == second
    assert "accumulation window" in first


def test_backward_of_something_else_is_named() -> None:
    engine, *_ = make()
    with pytest.raises(RunError, match=r"expected a scalar tensor, got shape \(2, 3\)"):
        engine.backward(engine(batches(1)[0][0][:2]))
    with torch.no_grad():
        loss = engine(batches(1)[0][0]).sum()
    with pytest.raises(RunError, match="needs no gradient"):
        engine.backward(loss)


def test_data_that_ends_in_a_window_is_named() -> None:
    engine, *_ = make(gradient_accumulation_steps=3)
    with pytest.raises(RunError, match="ended after 2 of 3 micro-batches"):
        engine.train_batch(iter(batches(2)), loss_fn=nn.functional.cross_entropy)
    with pytest.raises(RunError, match="after 2 of 3 micro-batches"):
        engine.train_batch(iter(batches(3)), loss_fn=nn.functional.cross_entropy)


def test_train_batch_needs_data_and_a_loss() -> None:
    engine, *_ = make()
    with pytest.raises(RunError, match="list is no iterator"):
        engine.train_batch(batches(1))
    with pytest.raises(RunError, match="no data"):
        engine.train_batch()
    with pytest.raises(DscompileError, match=r"the model returned shape \(4, 3\)"):
        engine.train_batch(iter([batches(1)[0][0]]))


def test_a_micro_batch_that_is_no_pair_is_named() -> None:
    """A tensor of two rows and a mapping of two keys unpack as pairs do."""
    engine, *_ = make()
    x, y = batches(1)[0]
    for batch, what in ((x[:2], r"a tensor of shape \(2, 6\)"), ({"x": x, "y": y}, "dict"), ((x, y, y), "tuple of 3")):
        for method in (engine.train_batch, engine.eval_batch):
            with pytest.raises(RunError, match=rf"\(inputs, labels\), got {what}"):
                method(iter([batch]), loss_fn=nn.functional.cross_entropy)


def test_an_engine_without_optimizer_evaluates_and_does_not_step() -> None:
    engine, optimizer, *_ = dscompile.initialize(model=make_model(), config={"train_batch_size": 2})
    assert optimizer is None
    assert engine(batches(1)[0][0]).shape == (MICRO * 2, CLASSES)
    with pytest.raises(RunError, match="without an optimizer"):
        engine.step()


def test_what_is_ignored_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dscompile"):
        make(zero_optimization={"contiguous_gradients": False}, steps_per_print=1)
    assert "zero_optimization.contiguous_gradients = false changes nothing: buckets" in caplog.text
    assert "gradient_clipping is not given: 1" in caplog.text


def test_a_progress_line_says_what_deepspeed_s_does(caplog: pytest.LogCaptureFixture) -> None:
    engine, *_ = make(steps_per_print=2, wall_clock_breakdown=True, memory_breakdown=True)
    with caplog.at_level(logging.INFO, logger="dscompile.engine.progress"):
        for index in range(3):
            one_step(engine, index)
            engine.step()
    lines = [record.getMessage() for record in caplog.records if record.name == "dscompile.engine.progress"]
    assert len(lines) == 1
    for part in ("step=2", "skipped=0", f"lr=[{LR}]", "mom=[(0.9, 0.999)]", "samples/s=", "peak=", "forward="):
        assert part in lines[0]


def beside_bare_compile(rank: int, world: int) -> tuple[list[float], list[float], int]:
    """The engine, and ``distribute`` with ``torch.compile``, on the same data."""
    losses: list[list[float]] = [[], []]
    options = config(zero_optimization={"stage": 3}, gradient_clipping=0)
    model = make_model()
    engine, *_ = dscompile.initialize(model=model, model_parameters=model.parameters(), config=options)
    bare = dscompile.distribute(make_model(), config={"zero": {"stage": 3}, "regions": "aten", "cache": False})
    optimizer = torch.optim.AdamW(bare.parameters(), lr=LR, weight_decay=0.0, fused=True)
    compiled = torch.compile(bare, backend="dscompile", fullgraph=True)
    for x, y in batches(20, rank, world):
        loss = nn.functional.cross_entropy(engine(x), y)
        losses[0].append(loss.item())
        engine.backward(loss)
        engine.step()
        loss = nn.functional.cross_entropy(compiled(x), y)
        losses[1].append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    breaks = torch._dynamo.utils.counters["graph_break"]
    return losses[0], losses[1], sum(breaks.values())


def test_the_engine_adds_nothing_to_the_numbers() -> None:
    """Twenty losses, bit for bit those of plain ``torch.compile``, and no graph break."""
    for engine, bare, breaks in run_ranks(beside_bare_compile, 2, timeout=TIMEOUT):
        assert engine == bare
        assert breaks == 0
