"""DeepSpeed's other names: zero.Init, GatheredParameters, checkpointing, arguments, garbage, monitors."""

from __future__ import annotations

import argparse
import csv
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dscompile
from dscompile.errors import ConfigError, ShardingError, UnsupportedError
from tests.engine.runs import TIMEOUT, batches, config, make_model, whole
from tests.ranks import run_ranks

FACTS = config(zero_optimization={"stage": 3})


@pytest.fixture(autouse=True)
def alone() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


# -- zero --------------------------------------------------------------------------------------------------------------


def test_a_model_of_zero_init_has_its_values_after_initialize() -> None:
    with dscompile.zero.Init(config_dict_or_path=FACTS):
        model = make_model()
    assert dscompile.is_deferred(model)
    engine, *_ = dscompile.initialize(model=model, model_parameters=model.parameters(), config=FACTS)
    for mine, expected in zip(whole(engine), make_model().parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"module": nn.Linear(1, 1)}, r"zero\.Init\(module=\.\.\.\)"),
        ({"mpu": object()}, "mpu"),
        ({"remote_device": "nvme"}, "no offload"),
        ({"dtype": torch.float16}, "masters are fp32"),
    ],
)
def test_zero_init_refuses_what_it_cannot_do(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says), dscompile.zero.Init(**arguments):
        pass


def gather_and_write(rank: int, world: int) -> list[Any]:
    model = make_model()
    engine, *_ = dscompile.initialize(model=model, model_parameters=model.parameters(), config=FACTS)
    layer = engine.module[0]
    with dscompile.zero.GatheredParameters(layer.weight, modifier_rank=1):
        if rank == 1:
            layer.weight.fill_(3.0)
    with dscompile.zero.GatheredParameters(list(engine.module.parameters())) as values:
        seen = [tuple(v.shape) for v in values]
    return [whole(engine)[0].unique().tolist(), seen, layer.weight.sum().item()]


def test_gathered_parameters_write_one_rank_s_values_everywhere() -> None:
    shapes = [(8, 6), (8,), (3, 8), (3,)]
    assert run_ranks(gather_and_write, 2, timeout=TIMEOUT) == [[[3.0], shapes, 144.0]] * 2


def test_gathered_parameters_of_a_plain_model_are_itself() -> None:
    model = make_model()
    with dscompile.zero.GatheredParameters(model[0].weight, modifier_rank=0):
        nn.init.zeros_(model[0].weight)
    assert model[0].weight.count_nonzero() == 0


def test_gathered_parameters_name_what_would_be_lost() -> None:
    with dscompile.zero.Init():
        model = make_model()
    with pytest.raises(UnsupportedError, match="no values yet"), dscompile.zero.GatheredParameters(model[0].weight):
        pass
    engine, *_ = dscompile.initialize(model=model, model_parameters=model.parameters(), config=FACTS)
    first, *_ = engine.module.parameters()
    with (
        pytest.raises(ShardingError, match=r"0\.weight was written through its parameter object"),
        dscompile.zero.GatheredParameters([first], modifier_rank=0),
        torch.no_grad(),
    ):
        first.zero_()
    with pytest.raises(ConfigError, match="no such rank"), dscompile.zero.GatheredParameters([first], modifier_rank=5):
        pass


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, use: bool) -> None:
        super().__init__()
        self.inner, self.use = make_model(), use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dscompile.checkpointing.checkpoint(self.inner, x) if self.use else self.inner(x)  # type: ignore[no-any-return]


def test_a_checkpointed_model_trains_alike() -> None:
    results = []
    for use in (False, True):
        engine, *_ = dscompile.initialize(model=Checkpointed(use), config=FACTS)
        for x, y in batches(2):
            engine.backward(nn.functional.cross_entropy(engine(x), y))
            engine.step()
        results.append(whole(engine))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_options_of_checkpointing_are_checked() -> None:
    dscompile.checkpointing.configure(None)
    dscompile.checkpointing.configure(None, num_checkpoints=4, synchronize=True)
    dscompile.checkpointing.configure(None, {"train_batch_size": 1, "activation_checkpointing": {"profile": False}})
    with pytest.raises(ConfigError, match=r"activation_checkpointing\.partition_activations = True is refused"):
        dscompile.checkpointing.configure(None, partition_activations=True)
    with pytest.raises(ConfigError, match=r"activation_checkpointing\.profile = True is refused"):
        dscompile.checkpointing.configure(None, {"activation_checkpointing": {"profile": True}})


# -- arguments, garbage, monitors --------------------------------------------------------------------------------------


def test_the_configuration_may_come_from_the_command_line(tmp_path: Path) -> None:
    import json

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config(train_micro_batch_size_per_gpu=3)))
    parser = dscompile.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    engine, *_ = dscompile.initialize(args=args, model=make_model())
    assert engine.train_batch_size() == 3
    with pytest.raises(ConfigError, match="leave one of them out"):
        dscompile.initialize(args=args, model=make_model(), config={"train_batch_size": 1})


def test_garbage_collection_is_off_while_the_engine_lives() -> None:
    assert gc.isenabled()
    engine, *_ = dscompile.initialize(model=make_model(), config=config(disable_python_gc=True))
    assert not gc.isenabled()
    assert engine.collect_python_gc() >= 0
    engine.destroy()
    assert gc.isenabled()


def test_metrics_are_written_by_samples(tmp_path: Path) -> None:
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    given = config(csv_monitor=monitor, gradient_accumulation_steps=2, wall_clock_breakdown=True, steps_per_print=2)
    engine, *_ = dscompile.initialize(model=make_model(), config=given)
    losses = []
    for x, y in batches(4):
        loss = nn.functional.cross_entropy(engine(x), y)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    engine.destroy()
    rows = list(csv.reader((tmp_path / "job" / "Train_Samples_train_loss.csv").open()))
    assert [int(step) for step, _ in rows[1:]] == [4, 8]
    expected = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    assert [float(value) for _, value in rows[1:]] == pytest.approx(expected, rel=1e-6)
    times = list(csv.reader((tmp_path / "job" / "Train_Samples_elapsed_time_ms_backward.csv").open()))
    assert [int(step) for step, _ in times[1:]] == [8]
    assert float(times[1][1]) > 0


def log_of_collectives(rank: int, world: int) -> dict[str, int]:
    engine, *_ = dscompile.initialize(
        model=make_model(), config=config(zero_optimization={"stage": 3}, comms_logger={"enabled": True})
    )
    x, y = batches(1, rank, world)[0]
    engine.backward(nn.functional.cross_entropy(engine(x), y))
    engine.step()
    rows = engine.progress.comm_log.rows()
    assert all(row.op in engine.log_summary() for row in rows)
    engine.destroy()
    return {row.op: row.count for row in rows}


def test_collectives_are_logged() -> None:
    first, second = run_ranks(log_of_collectives, 2, timeout=TIMEOUT)
    assert first == second
    assert sum(first.values()) >= 2
