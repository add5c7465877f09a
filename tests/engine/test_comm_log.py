"""The communication log: totals are ZeRO's volumes to the byte, bandwidths are by their definitions."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import dscompile
from dscompile.collectives import LOG, Collective
from dscompile.engine.comm_log import CommLog, bus_factor, readable, trimmed_mean
from dscompile.engine.optimizers import create_optimizer
from dscompile.errors import ConfigError
from tests.ranks import run_ranks

WIDTH, LAYERS = 16, 4
PSI = WIDTH * WIDTH * LAYERS
"""Parameters of the model, which divide evenly by two ranks."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())])


def steps(
    rank: int, world: int, stage: int, compiled: bool, kind: str, count: int
) -> tuple[int, dict[str, int], list[tuple[str, int, int]], int]:
    """Bytes that this rank moved in ``count`` steady steps, payloads by operator, rows, and the parameters read."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    model = dscompile.distribute(net(), config={"zero": zero})
    pipeline = f"canonicalise,zero{stage},bucket,prefetch" if stage == 3 else "default"
    options = {"summary": False, "cache": False, "regions": "aten", "pipeline": pipeline}
    run: Any = torch.compile(model, backend="dscompile", options=options) if compiled else model
    opt = create_optimizer(kind, model.parameters(), {"lr": 0.01})
    x = torch.randn(4, WIDTH, requires_grad=True)  # so that backward reads every weight, the first too
    log = CommLog()
    for step in range(count + 1):
        if step == 1:
            log.start()
        run(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    log.stop()
    payloads: dict[str, int] = {}
    for row in log.rows():
        payloads[row.op] = payloads.get(row.op, 0) + row.count * row.bytes
    assert all(row.latency >= row.waited >= 0 and row.world == world for row in log.rows())
    return log.moved_bytes(), payloads, [(row.op, row.bytes, row.count) for row in log.rows()], LOG.active


@pytest.mark.parametrize(("stage", "passes"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_totals_are_zeros_volumes(stage: int, passes: int) -> None:
    """A rank transmits (N - 1) / N of 2 Psi elements a step at stages 0 to 2, of 3 Psi at stage 3 (ZeRO, section 7)."""
    count = 3
    for moved, payloads, _, active in run_ranks(steps, 2, stage, True, "AdamW", count, timeout=120):
        assert moved == count * 4 * passes * PSI * (2 - 1) // 2
        assert payloads == {
            "all_gather_into_tensor": count * 4 * PSI * (passes - 1),
            "all_to_all_single": count * 4 * PSI,  # gloo's reduction
        }
        assert not active


def test_eager_reads_and_lamb_are_logged() -> None:
    found = run_ranks(steps, 2, 3, False, "Lamb", 2)
    for _, payloads, rows, _ in found:
        # Eager: each weight gathered in forward (autograd keeps it for backward), each gradient reduced.
        assert payloads["all_gather_into_tensor"] == 2 * 4 * PSI
        assert payloads["all_to_all_single"] == 2 * 4 * PSI
        assert ("all_reduce", 2 * LAYERS * 4, 2) in rows  # two squared norms a tensor, one all-reduce a step


def event(op: str, size: int = 1000, latency: float = 1e-3, world: int = 4, place: str = "") -> Collective:
    return Collective(op, size, world, latency, latency / 2, place)


def test_bandwidths_by_their_definitions() -> None:
    log = CommLog()
    for latency in (1e-3, 3e-3):
        log.add(event("all_reduce", 1_000_000, latency))
    log.add(event("all_gather_into_tensor", 1_000_000, 2e-3))
    gather, reduce = log.rows()
    assert (reduce.count, reduce.latency, reduce.waited) == (2, pytest.approx(4e-3), pytest.approx(2e-3))
    assert reduce.algorithm_bandwidth == pytest.approx(4.0)  # 8e6 bits in 2 ms
    assert reduce.bus_bandwidth == pytest.approx(4.0 * 2 * 3 / 4)
    assert gather.bus_bandwidth == pytest.approx(4.0 * 3 / 4)
    assert (reduce.moved, gather.moved) == (2 * 1_500_000, 750_000)
    assert log.moved_bytes() == 3_750_000
    assert bus_factor("all_to_all_single", 2) == 0.5


def test_the_table() -> None:
    log = CommLog()
    log.add(event("all_reduce", 1 << 20, 1e-3))
    lines = log.summary().splitlines()
    assert lines[0].split()[:4] == ["collective", "size", "ranks", "count"]
    assert lines[1].split() == ["all_reduce", "1.00", "MiB", "4", "1", "1.00", "1.000", "0.50", "8.389", "12.583"]
    assert lines[2] == "transmitted by this rank: 1.50 MiB"
    log.reset()
    assert log.summary() == ""


def test_sections() -> None:
    assert CommLog.from_config(None) is None
    assert CommLog.from_config({"enabled": False, "verbose": True}) is None
    log = CommLog.from_config({"enabled": True, "prof_all": False, "prof_ops": ["all_gather"]})
    assert log is not None
    for op in ("all_gather_into_tensor", "all_reduce", "all_gather"):
        log.add(event(op))
    assert [row.op for row in log.rows()] == ["all_gather", "all_gather_into_tensor"]
    with pytest.raises(ConfigError, match=r"'prof_op'\. Did you mean 'prof_ops'"):
        CommLog.from_config({"enabled": True, "prof_op": []})
    with pytest.raises(ConfigError, match="must be a list"):
        CommLog.from_config({"enabled": True, "prof_all": False, "prof_ops": "all_gather"})


def test_debug_tells_places_apart() -> None:
    log = CommLog(debug=True)
    log.add(event("all_reduce", place="blocks.0"))
    log.add(event("all_reduce", place="blocks.1"))
    assert [(row.op, row.place) for row in log.rows()] == [("all_reduce", "blocks.0"), ("all_reduce", "blocks.1")]
    assert "all_reduce | blocks.1 " in log.summary()
    assert log.rows()[0].moved == 1500
    assert log.rows()[0].bus_bandwidth == pytest.approx(1.5 * log.rows()[0].algorithm_bandwidth)


def test_verbose_says_each_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        CommLog(verbose=True).add(event("all_reduce", place="blocks.0"))
    assert "all_reduce at blocks.0: 1000 B, 1.000 ms (waited 0.500), 0.008 Gbit/s, bus 0.012" in caplog.text


def collective() -> None:
    tensor = torch.zeros(4)
    with LOG.timing("all_reduce", tensor, 2):
        pass


def test_logs_start_and_stop_by_themselves() -> None:
    first, second = CommLog(), CommLog()
    collective()
    with first:
        collective()
        with second:
            collective()
        second.stop()  # again: nothing happens
        collective()
    assert not LOG.active
    collective()
    assert [row.count for row in first.rows()] == [3]
    assert [row.count for row in second.rows()] == [1]
    assert [row.bytes for row in second.rows()] == [16]


def test_units_and_means() -> None:
    assert [readable(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.50 KiB", "5.00 GiB"]
    assert trimmed_mean([100.0, *[1.0] * 8, 0.0]) == 1.0
    assert trimmed_mean([1.0, 3.0]) == 2.0
