"""Our Adam of 16-bit training: the formula in double precision, PyTorch's own step, and what the engine makes of it."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dscompile
from dscompile.engine import adam_kernel as kernels
from dscompile.engine import host_adam, optimizers
from dscompile.engine.host_adam import HostAdam, HostAdamW
from dscompile.engine.lamb import WORTH
from dscompile.errors import UnsupportedError
from tests.engine.runs import TIMEOUT
from tests.ranks import run_ranks

SHAPES = [(7, 5), (5,), (), (0, 3), (3, 2, 2), (3, 1500), (70, 1001)]  # 0 elements, odd ones, enough for two threads
GIVEN: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
}  # larger than rounding where gradient and decay cancel


@pytest.fixture(autouse=True)
def alone() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


def masters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for param in found:
        param.grad_dtype = None
    return found


def gradients(dtype: torch.dtype, steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(steps)]


def run(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], rows: list[list[Tensor]], **attributes: Any
) -> None:
    for row in rows:
        for param, grad in zip(params, row, strict=True):
            param.grad = grad.clone()
        for name, value in attributes.items():
            setattr(optimizer, name, value)
        optimizer.step()


def by_the_formula(
    values: list[Tensor], rows: list[list[Tensor]], *, decay: float, decoupled: bool, factor: float = 1.0
) -> list[Tensor]:
    """Adam (Kingma & Ba) and AdamW (Loshchilov & Hutter), in double precision."""
    lr, (b1, b2), eps = GIVEN["lr"], GIVEN["betas"], GIVEN["eps"]
    values = [v.detach().double() for v in values]
    m, v = ([torch.zeros_like(x) for x in values] for _ in range(2))
    for t, row in enumerate(rows, 1):
        for n, g in enumerate(grad.double() * factor for grad in row):
            if decoupled:
                values[n] = values[n] * (1 - lr * decay)
            else:
                g = g + decay * values[n]
            m[n] = b1 * m[n] + (1 - b1) * g
            v[n] = b2 * v[n] + (1 - b2) * g * g
            values[n] = values[n] - lr * (m[n] / (1 - b1**t)) / ((v[n] / (1 - b2**t)).sqrt() + eps)
    return [value.float() for value in values]


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_five_steps_by_the_formula(dtype: torch.dtype, decay: float, decoupled: bool) -> None:
    params, rows = masters(), gradients(dtype, 5)
    expected = by_the_formula(params, rows, decay=decay, decoupled=decoupled)
    run((HostAdamW if decoupled else HostAdam)(params, weight_decay=decay, **GIVEN), params, rows)
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "theirs"), [(HostAdamW, torch.optim.AdamW), (HostAdam, torch.optim.Adam)])
def test_it_is_torchs_fused_step_on_fp32_gradients(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    """After one step of the same state: two units in the last place of the larger operand, and the states alike."""
    params, rows = masters(), gradients(dtype, 3)
    mine, fused = ours(params, weight_decay=0.1, **GIVEN), None
    for row in rows:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        fused = theirs(others, weight_decay=0.1, fused=True, **GIVEN)
        fused.load_state_dict(copy.deepcopy(mine.state_dict()) | {"param_groups": fused.state_dict()["param_groups"]})
        before = [p.detach().clone() for p in params]
        run(mine, params, [row])
        run(fused, others, [[grad.float() for grad in row]])
        for param, other, start in zip(params, others, before, strict=True):
            unit = torch.finfo(torch.float32).eps * torch.maximum(start.abs(), other.detach().abs())
            assert ((param - other).abs() <= 2 * unit + 1e-9).all()
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(mine.state[param][name], fused.state[other][name], rtol=3e-7, atol=3e-7)
            assert float(mine.state[param]["step"]) == float(fused.state[other]["step"])


def test_the_factor_multiplies_in_fp32_and_for_one_step() -> None:
    params, rows = masters(), gradients(torch.bfloat16, 1)
    expected = by_the_formula(params, rows, decay=0.1, decoupled=True, factor=1 / 3000)
    optimizer = HostAdamW(params, weight_decay=0.1, **GIVEN)
    run(optimizer, params, rows, gradient_factor=1 / 3000)
    assert optimizer.gradient_factor == 1.0
    for param, value, grad in zip(params, expected, rows[0], strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-6, atol=1e-6)
        assert torch.equal(param.grad, grad)  # left as it was


def test_threads_change_no_bit() -> None:
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            params = masters()
            run(HostAdamW(params, **GIVEN), params, gradients(torch.bfloat16, 2))
        finally:
            torch.set_num_threads(before)
        results.append(params)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_states_are_torchs_and_go_on_in_torchs_class() -> None:
    params, rows = masters(), gradients(torch.float32, 2)
    mine = HostAdamW(params, **GIVEN)
    run(mine, params, rows[:1])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(others, **GIVEN)
    theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
    run(mine, params, rows[1:])
    run(theirs, others, rows[1:])
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_and_groups_of_their_own() -> None:
    first, second, third = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = HostAdamW([{"params": [first], "lr": 0.0}, {"params": [second, third], "lr": 0.5}], weight_decay=0.0)
    first.grad = second.grad = torch.tensor([1.0, -1.0, 2.0])
    optimizer.step()
    assert first.tolist() == third.tolist() == [1.0] * 3
    torch.testing.assert_close(second.detach(), torch.tensor([0.5, 1.5, 0.5]))  # the first step is lr * sign
    assert third not in optimizer.state


def test_nan_and_infinity_reach_the_parameter() -> None:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor([math.nan, math.inf, 1.0])
    HostAdamW([param], lr=0.1).step()
    assert param.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("what", ["strided", "double", "amsgrad"])
def test_what_it_cannot_take_is_an_error(what: str) -> None:
    value = torch.ones(4, 4).T[:, ::2] if what == "strided" else torch.ones(4, dtype=torch.double)
    param = nn.Parameter(torch.ones(4) if what == "amsgrad" else value)
    param.grad = torch.ones_like(param)
    with pytest.raises(UnsupportedError, match="amsgrad" if what == "amsgrad" else "contiguous fp32"):
        HostAdamW([param], amsgrad=what == "amsgrad").step()


# -- in the engine -----------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Its 128 * width matrix elements and the biases are just enough for the kernel at ``WORTH // 128``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(64, width)
        self.second = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out.float().square().mean()


def engine_of(stage: int, accumulation: int = 1, width: int = WORTH // 128, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.05,
        "dscompile": {"regions": "aten", "cache": False},
        **more,
    }
    return dscompile.initialize(model=Wide(width), config=config)[0]


def trained(rank: int, world: int, half: dict[str, Any], stage: int, accumulation: int, ours: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "WORTH", 0)
        if not ours:
            patch.setattr(optimizers, "adam_kernel", lambda: None)
        engine = engine_of(stage, accumulation, 65, **half)
    assert isinstance(engine.optimizer, HostAdamW) == ours
    seen, losses = set(), []
    for index in range(3 * accumulation):
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(10 * index + rank))
        loss = engine(x)
        engine.backward(loss)
        if engine.is_gradient_accumulation_boundary():
            seen |= {p.grad.to_local().dtype for p in engine.module.parameters()}
        engine.step()
        losses.append(float(loss))
    weights = [p.full_tensor().detach() for p in engine.module.parameters()]
    averages = [engine.optimizer.state[p]["exp_avg"].full_tensor() for p in engine.module.parameters()]
    torch.compiler.reset()
    return seen, losses, weights, averages


CASES = [(0, 1, "bf16"), (1, 2, "fp16"), (3, 2, "bf16"), (3, 1, "fp16")]


def cases_on(rank: int, world: int) -> list[Any]:
    found = []
    for stage, accumulation, name in CASES:
        half = {name: {"enabled": True, **({"initial_scale_power": 8} if name == "fp16" else {})}}
        found.append([trained(rank, world, half, stage, accumulation, ours) for ours in (True, False)])
    return found


def test_the_engine_keeps_16_bit_gradients_and_trains_as_with_torchs() -> None:
    """Gradients are what ranks agreed on in 16 bits either way; only unscaling and clipping round elsewhere."""
    for found in run_ranks(cases_on, 2, timeout=TIMEOUT):
        for (_, _, name), (ours, theirs) in zip(CASES, found, strict=True):
            assert ours[0] == {torch.bfloat16 if name == "bf16" else torch.float16}
            assert theirs[0] == {torch.float32}
            assert ours[1] == pytest.approx(theirs[1], rel=1e-3)
            for mine, other in zip(ours[2], theirs[2], strict=True):  # 1 % of the way of three steps
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=3e-5)
            for mine, other in zip(ours[3], theirs[3], strict=True):  # unlike Adam's steps, these have a scale
                assert (mine - other).norm() <= 1e-3 * other.norm()


def test_without_a_compiler_it_is_torchs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    kernels.adam_kernel.cache_clear()
    monkeypatch.setattr("dscompile.inductor_compat.load_cpp_library", fail)
    try:
        with caplog.at_level(logging.WARNING, "dscompile"):
            engine = engine_of(0, bf16={"enabled": True})
    finally:
        kernels.adam_kernel.cache_clear()
    assert type(engine.optimizer) is torch.optim.AdamW
    assert engine.optimizer.param_groups[0]["fused"]
    assert "no compiler here" in caplog.text
    engine.backward(engine(torch.randn(2, 64)))
    assert {p.grad.dtype for p in engine.module.parameters()} == {torch.float32}
    engine.step()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, torch.float32),
        ({"bf16": {"enabled": True}, "gradient_accumulation_steps": 2}, torch.float32),  # one rank adds up in fp32
    ],
)
def test_gradients_are_rounded_only_where_ranks_did(more: dict[str, Any], expected: torch.dtype) -> None:
    engine = engine_of(2, **more)
    assert isinstance(engine.optimizer, HostAdamW)
    assert {p.grad_dtype for p in engine.module.parameters()} == {expected}


def test_the_step_writes_the_copy_that_the_model_reads() -> None:
    """At stage 0: the next forward pass has nothing to refresh, and computes with the new weights."""
    engine = engine_of(0, bf16={"enabled": True})
    for _ in range(2):
        engine.backward(engine(torch.ones(2, 64)))
        engine.step()
    for param in engine.module.parameters():
        (copied,) = [host_adam._copy_of(param)]
        assert copied is not None
        assert torch.equal(copied, param.to_local().detach().bfloat16())
        mark = dscompile.placement.mark_of(param)
        assert mark.slot().fresh == param._version
    with torch.no_grad():
        found = float(engine(torch.ones(2, 64)))
        weights = [p.to_local().bfloat16() for p in engine.module.parameters()]
        x = torch.ones(2, 64).bfloat16()
        hidden = torch.tanh(nn.functional.linear(x, weights[0], weights[1]))
        expected = float(nn.functional.linear(hidden, weights[2], weights[3]).float().square().mean())
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("saved_by_ours", [True, False])
def test_checkpoints_go_on_in_the_other_class(
    saved_by_ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is saved under one and goes on under the other has the losses of one that is not interrupted."""

    def engine_with(ours: bool) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(optimizers, "WORTH", 0)
            if not ours:
                patch.setattr(optimizers, "adam_kernel", lambda: None)
            made = engine_of(1, 1, 65, bf16={"enabled": True})
        assert isinstance(made.optimizer, HostAdamW) == ours
        return made

    def losses_of(engine: Any, steps: range) -> list[float]:
        found = []
        for index in steps:
            loss = engine(torch.randn(2, 64, generator=torch.Generator().manual_seed(index)))
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        return found

    first = engine_with(saved_by_ours)
    losses_of(first, range(3))
    first.save_checkpoint(tmp_path)
    expected = losses_of(first, range(3, 6))
    second = engine_with(not saved_by_ours)
    second.load_checkpoint(tmp_path)
    assert losses_of(second, range(3, 6)) == pytest.approx(expected, rel=1e-3)
    assert second.optimizer.param_groups[0]["fused"] == (True if saved_by_ours else None)  # its own choice
    (state,) = {float(s["step"]) for s in second.optimizer.state.values()}
    assert state == 6.0
