"""The instruments of ``benchmarks/``: that they measure what they say. No test here asserts a speed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import machine, memory, optimizers
from benchmarks.measure import Sample, interleave, paired_ratio, summary, timed
from benchmarks.results import table
from benchmarks.shares import time_shares
from benchmarks.variants import Spec, Trainer, storage_bytes

MIB = 1 << 20


def test_allocation_peak_counts_what_lives_together() -> None:
    def step() -> torch.Tensor:
        first = torch.ones(4 * MIB, dtype=torch.uint8)
        second = torch.ones(2 * MIB, dtype=torch.uint8)
        del first
        third = torch.ones(3 * MIB, dtype=torch.uint8)
        return second[:1] + third[:1]

    assert memory.allocation_peak(step) == pytest.approx(6 * MIB, abs=4096)


def test_resident_peak_agrees_with_allocations_on_large_buffers() -> None:
    def step() -> None:
        first = torch.ones(96 * MIB, dtype=torch.uint8)
        second = torch.ones(32 * MIB, dtype=torch.uint8)
        first += second[0]

    step()
    assert memory.resident_peak(step) == pytest.approx(memory.allocation_peak(step), rel=memory.AGREE)


def test_live_bytes_counts_a_storage_once() -> None:
    before = memory.live_bytes()
    kept = torch.zeros(5 * MIB, dtype=torch.uint8)
    views = [kept[i:] for i in range(3)]
    assert memory.live_bytes() - before == 5 * MIB
    assert storage_bytes(views) == 5 * MIB


def test_variants_take_turns_in_a_rotating_order() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[int], dict[str, Sample]]:
        def run(index: int) -> dict[str, Sample]:
            order.append(f"{name}{index}")
            return {"step": Sample(float(index), 0.0)}

        return run

    found = interleave({name: call(name) for name in "abc"}, rounds=4)
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert [s.wall for s in found["b"]["step"]] == [0.0, 1.0, 2.0, 3.0]


def test_timed_tells_waiting_from_work() -> None:
    sample = timed(lambda: time.sleep(0.05))
    assert sample.wall >= 0.05
    assert sample.cpu < sample.wall


def test_ratios() -> None:
    ratio = paired_ratio([2.0, 2.0, 9.0], [4.0, 1.0, 3.0])
    assert ratio == {"of_medians": 2 / 3, "median": 2.0, "min": 0.5, "max": 3.0, "n": 3}
    assert summary([3.0, 1.0, 2.0])["median"] == 2.0


def test_table_is_aligned() -> None:
    assert table("t", ["a", "long"], [["x", 1.0]]).splitlines()[3:] == [
        "| a | long  |",
        "|---|-------|",
        "| x | 1.000 |",
    ]


def test_spec_travels_as_json() -> None:
    spec = Spec("dscompile", "gpt-1m", layers=2, options={"regions": "whole"})
    assert Spec.from_json(spec.to_json()) == spec
    assert spec.config.layers == 2


def test_same_gemm_changes_the_peers_only() -> None:
    assert Spec("inductor", gemm="same").precision == "medium"
    assert {Spec("dscompile", gemm="same").precision, Spec("eager", gemm="user").precision} == {"highest"}


def test_trainers_start_equal_and_learn() -> None:
    a, b = (Trainer(Spec("eager", "gpt-1m", layers=1, batch=1)) for _ in range(2))
    ids = a.batch(0)
    assert torch.equal(ids, b.batch(0))
    assert not torch.equal(ids, b.batch(1))
    first = a.forward_backward(ids)
    assert torch.equal(first, b.forward_backward(ids))
    a.update()
    assert all(p.grad is None for p in a.model.parameters())
    assert a.forward_backward(ids) < first
    parameters = storage_bytes(list(a.model.parameters()))
    assert a.state_bytes() == pytest.approx(3 * parameters, rel=1e-3)


def test_machine_is_described() -> None:
    described = machine.describe()
    assert described["cpu"] != "unknown"
    assert described["torch"] == torch.__version__
    assert any(str(described["cpu"]) in line for line in machine.lines(described))


def test_shares_of_time() -> None:
    a, b = torch.randn(400, 400), torch.randn(4, 4, 16, 8)
    products = time_shares(lambda: [a @ a for _ in range(5)])
    assert products["gemm"] > 0.5
    attention = time_shares(lambda: [torch.nn.functional.scaled_dot_product_attention(b, b, b) for _ in range(5)])
    assert attention["attention"] > 0.5
    others = time_shares(lambda: [a.exp() for _ in range(5)])
    assert others["other_aten"] > 0.5
    assert sum(others.values()) == pytest.approx(1)


def test_optimizers_step_the_same_parameters() -> None:
    sizes = optimizers.shapes(0.02, 16)
    assert len(sizes) % 12 == 0
    assert sum(torch.Size(size).numel() for size in sizes) == pytest.approx(20_000, rel=0.2)
    kinds = {name: optimizers.optimizer(name, sizes) for name in optimizers.NAMES}
    assert [type(one).__name__ for one in kinds.values()] == ["AdamW", "HostAdamW", "HostAdamW", "Lamb", "Lamb"]
    assert kinds["adamw"].param_groups[0]["fused"] is True
    assert [kinds[name].param_groups[0]["compiled"] for name in ("lamb", "lamb_foreach")] == [True, False]
    values = {name: [p.detach().clone() for p in one.param_groups[0]["params"]] for name, one in kinds.items()}
    assert all(torch.equal(a, b) for a, b in zip(values["adamw"], values["lamb"], strict=True))
    for one in kinds.values():
        one.step()
    after = {name: one.param_groups[0]["params"] for name, one in kinds.items()}
    assert not torch.equal(after["lamb"][0], values["lamb"][0])
    for mine, other in (("lamb", "lamb_foreach"), ("host", "adamw")):
        for a, b in zip(after[mine], after[other], strict=True):
            torch.testing.assert_close(a, b)
