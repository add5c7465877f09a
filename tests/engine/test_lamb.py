"""LAMB: one step by hand, several against the formula in double precision, and its edges."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from dscompile import inductor_compat
from dscompile.engine.lamb import WORTH, Lamb
from dscompile.engine.lamb_kernel import KEPT, PIECE, TOGETHER, lamb_kernel
from dscompile.errors import UnsupportedError


@pytest.fixture(params=[False, True], ids=["foreach", "kernel"])
def compiled(request: pytest.FixtureRequest) -> bool:
    if request.param:
        assert lamb_kernel() is not None
    return bool(request.param)


def test_one_step_by_hand(compiled: bool) -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    x.grad = torch.tensor([1.0, -2.0])
    opt = Lamb([x], lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.5, bias_correction=False, compiled=compiled)
    opt.step()
    # m = 0.5 g = (0.5, -1); v = 0.25 g^2 = (0.25, 1); m / sqrt(v) = (1, -1); u = that + 0.5 x = (2.5, 1)
    # |x| = 5, |u| = sqrt(7.25), so x -= 0.1 * 5 / sqrt(7.25) * u
    scale = 0.1 * 5 / math.sqrt(7.25)
    torch.testing.assert_close(x.detach(), torch.tensor([3 - scale * 2.5, 4 - scale]))
    torch.testing.assert_close(opt.state[x]["exp_avg"], torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(opt.state[x]["exp_avg_sq"], torch.tensor([0.25, 1.0]))


def test_bias_is_corrected_outside_the_ratio(compiled: bool) -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    x.grad = torch.tensor([1.0, -2.0])
    Lamb([x], lr=0.1, betas=(0.5, 0.75), eps=0.0, weight_decay=0.5, compiled=compiled).step()
    scale = 0.1 * (math.sqrt(1 - 0.75) / (1 - 0.5)) * 5 / math.sqrt(7.25)
    torch.testing.assert_close(x.detach(), torch.tensor([3 - scale * 2.5, 4 - scale]))


@pytest.mark.parametrize(
    ("value", "grad", "ratio"),
    [
        ([300.0, 400.0], [1.0, 1.0], 10.0),  # 500 / sqrt(2), clamped
        ([0.003, 0.004], [1.0, 1.0], 0.01),  # 0.005 / sqrt(2), clamped
        ([0.0, 0.0], [1.0, 1.0], 1.0),  # no norm of its own
        ([3.0, 4.0], [0.0, 0.0], 1.0),  # no direction: nothing to move by
    ],
)
def test_the_ratio_is_clamped_and_1_without_norms(
    value: list[float], grad: list[float], ratio: float, compiled: bool
) -> None:
    x = nn.Parameter(torch.tensor(value))
    x.grad = torch.tensor(grad)
    Lamb([x], lr=0.1, betas=(0.0, 0.0), eps=1e-12, bias_correction=False, compiled=compiled).step()
    direction = torch.tensor([1.0 if g else 0.0 for g in grad])  # m = g, v = g^2
    torch.testing.assert_close(x.detach(), torch.tensor(value) - 0.1 * ratio * direction)


def by_the_formula(values: list[torch.Tensor], grads: list[list[torch.Tensor]], **given: Any) -> list[torch.Tensor]:
    lr, (b1, b2), eps, decay = given["lr"], given["betas"], given["eps"], given["weight_decay"]
    values = [v.double() for v in values]
    averages = [torch.zeros_like(v) for v in values]
    squares = [torch.zeros_like(v) for v in values]
    for t, row in enumerate(grads, 1):
        for n, g in enumerate(g.double() for g in row):
            averages[n] = b1 * averages[n] + (1 - b1) * g
            squares[n] = b2 * squares[n] + (1 - b2) * g * g
            root = (squares[n] + eps).sqrt() if given["eps_inside_sqrt"] else squares[n].sqrt() + eps
            u = averages[n] / root + decay * values[n]
            ratio = min(max(float(values[n].norm() / u.norm()), 0.01), 10.0)
            values[n] = values[n] - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * ratio * u
    return [v.float() for v in values]


@pytest.mark.parametrize("inside", [False, True])
def test_five_steps_of_several_tensors(inside: bool, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), (), (3, 2, 2), (3, 1500), (70, 1001)]  # less and more than a piece, and than a thread
    starts = [torch.randn(s, generator=generator) for s in shapes]
    grads = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(5)]
    given = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "eps_inside_sqrt": inside}
    params = [nn.Parameter(s.clone()) for s in starts]
    opt = Lamb(params, **given, compiled=compiled)
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = g.clone()
        opt.step()
    for p, expected in zip(params, by_the_formula(starts, grads, **given), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


def test_groups_have_their_own_rates_and_frozen_ones_stay(compiled: bool) -> None:
    params = [nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(3)]
    opt = Lamb([{"params": [params[0]], "lr": 0.0}, {"params": params[1:]}], lr=0.1, compiled=compiled)
    params[0].grad = params[1].grad = torch.ones(2)
    opt.step()
    assert params[0].tolist() == [3.0, 4.0]
    assert params[1].tolist() != [3.0, 4.0]
    assert params[2].tolist() == [3.0, 4.0]
    assert params[2] not in opt.state


def test_the_state_goes_on() -> None:
    def fresh() -> tuple[nn.Parameter, Lamb]:
        x = nn.Parameter(torch.tensor([3.0, 4.0]))
        return x, Lamb([x], lr=0.1)

    def run(x: nn.Parameter, opt: Lamb, steps: range) -> None:
        for step in steps:
            x.grad = torch.tensor([1.0, step + 1.0])
            opt.step()

    x, opt = fresh()
    run(x, opt, range(6))
    y, first = fresh()
    run(y, first, range(3))
    z, second = fresh()
    with torch.no_grad():
        z.copy_(y)
    second.load_state_dict(first.state_dict())
    run(z, second, range(3, 6))
    assert torch.equal(x, z)


def test_a_closure_is_called() -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))

    def closure() -> Any:
        loss = x.square().sum()
        loss.backward()
        return loss

    loss: Any = Lamb([x]).step(closure)
    assert loss.item() == 25.0
    assert x.tolist() != [3.0, 4.0]


def test_the_parameters_version_moves(compiled: bool) -> None:
    x = nn.Parameter(torch.tensor([3.0, 4.0]))
    x.grad = torch.ones(2)
    before = x._version
    Lamb([x], compiled=compiled).step()
    assert x._version > before


def test_the_kernel_takes_what_it_can_and_the_rest_is_right(compiled: bool) -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(6, 4), torch.randn(6, 4)
    found = []
    for strided in (False, True):
        x = nn.Parameter(start.T.contiguous().T if strided else start.clone())
        x.grad = grad.clone()
        half = nn.Parameter(start.bfloat16())
        half.grad = grad.bfloat16()
        Lamb([x, half], lr=0.1, compiled=compiled).step()
        found.append(x.detach())
        torch.testing.assert_close(half.detach().float(), found[0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[0], found[1])


def test_the_same_bits_with_any_number_of_threads() -> None:
    """Large tensors, of which a part is computed twice and a part kept, and small ones that share a barrier."""
    shapes = [(5000,), (KEPT * PIECE + 9001,), (0,), (30,), (TOGETHER - 3000,), (2500,)]
    generator = torch.Generator().manual_seed(0)
    starts, grads = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    found, before = [], torch.get_num_threads()
    given = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = [nn.Parameter(start.clone()) for start in starts]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            Lamb(params, **given, compiled=True).step()
            found.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(before)
    expected = [
        s if not s.numel() else by_the_formula([s], [[g]], eps_inside_sqrt=False, **given)[0]
        for s, g in zip(starts, grads, strict=True)
    ]
    for one, two, three, exact in zip(*found, expected, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        torch.testing.assert_close(one, exact, rtol=1e-6, atol=1e-6)


def test_large_models_get_the_kernel() -> None:
    small, large = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(WORTH))
    assert Lamb([small]).param_groups[0]["compiled"] is False
    assert Lamb([small, large]).param_groups[0]["compiled"] is True
    assert copy.deepcopy(Lamb([large])).param_groups[0]["compiled"] is True


def test_a_kernel_that_cannot_be_built_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(source: str, flags: Any) -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(inductor_compat, "load_cpp_library", fail)
    lamb_kernel.cache_clear()
    try:
        x = nn.Parameter(torch.tensor([3.0, 4.0]))
        opt = Lamb([x], compiled=True)
        for _ in range(2):
            x.grad = torch.ones(2)
            opt.step()
    finally:
        lamb_kernel.cache_clear()
    assert x.tolist() != [3.0, 4.0]
    assert caplog.text.count("without its C++ kernel: no C++ compiler") == 1
    assert "long story" not in caplog.text


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse"):
        Lamb(embedding.parameters()).step()
