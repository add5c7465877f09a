"""Sanitize: right regions pass whatever their inputs look like, a wrong one is named with its value and source."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dscompile.errors import VerifyError
from dscompile.program import Program, RegionCode, Step
from dscompile.runtime.execute import define
from dscompile.runtime.sanitize import Boxed, Checks, difference

INF, NAN = float("inf"), float("nan")


def tensor(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (tensor(1, 2), tensor(1, 2)),
        (tensor(1, 2 + 1e-6), tensor(1, 2)),
        (tensor(1, NAN), tensor(1, NAN)),
        (tensor(1, INF), tensor(1, INF)),
        (tensor(1, 2.01, dtype=torch.bfloat16), tensor(1, 2, dtype=torch.bfloat16)),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2.00001j])),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (3, 3),
        (None, None),
    ],
)
def test_no_difference(found: Any, expected: Any) -> None:
    assert difference(found, expected) == ""


@pytest.mark.parametrize(
    ("found", "expected", "says"),
    [
        (tensor(1, 2.1), tensor(1, 2), "differs by 0.1"),
        (tensor(1, NAN), tensor(1, 2), "1 non-finite elements, should have 0"),
        (tensor(1, 2), tensor(INF, 2), "0 non-finite elements, should have 1"),
        (tensor(1, -INF), tensor(1, INF), "infinity of the wrong sign"),
        (tensor(1, NAN), tensor(1, INF), "NaN where an infinity"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2.1j]), "differs by 0.1"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "not equal"),
        (torch.tensor([True]), torch.tensor([False]), "not equal"),
        (tensor(1, 2), tensor(1, 2, dtype=torch.float64), "should be torch.float64"),
        (torch.ones(2, 3), torch.ones(3, 2), "should be"),
        (torch.ones(3, 3).t(), torch.ones(3, 3), "strides"),
        (3, 4, "is 3, should be 4"),
        (None, tensor(1), "should be"),
    ],
)
def test_difference(found: Any, expected: Any, says: str) -> None:
    assert says in difference(found, expected)


def test_what_cancels_to_rounding_is_judged_by_what_went_in() -> None:
    found, expected = tensor(1e-6, 0), tensor(0, 2e-6)
    assert "differs" in difference(found, expected)
    assert difference(found, expected, floor=0.1) == ""
    assert "differs" in difference(tensor(0, 0), tensor(0.1, 0), floor=0.1)


def twice(region: Boxed) -> Program:
    """``y = region(x); z = region(y)``, with labels as the emitter writes them."""
    steps = [
        Step("y, = region_0([x])", "region_0", ("x",), ("y",), ()),
        Step("z, = region_0([y])", "region_0", ("y",), ("z",), ()),
    ]
    return Program(
        "forward", ("x",), steps, ("y", "z"), {"region_0": "key"}, {"key": RegionCode("key", "inductor", "")},
        labels={"y": "first at a.py:1", "z": "second at a.py:2"},
    )  # fmt: skip


def checked(region: Boxed, reference: Boxed) -> Callable[[Tensor], Any]:
    program = twice(region)
    checks = Checks(program, {"key": region}, {"key": reference})
    run = checks.restarting(define(program.source(), "forward", checks.namespace))
    return lambda x: run([x])


def plus_one(args: list[Any]) -> Any:
    return (args[0] + 1,)


def test_a_right_region_passes_and_its_values_are_the_programs() -> None:
    y, z = checked(plus_one, plus_one)(tensor(1))
    assert (float(y), float(z)) == (2, 3)


def test_the_call_that_is_wrong_is_named_in_every_run() -> None:
    """The second call is wrong; a run that stopped in the middle does not shift the names of the next."""

    def wrong_above_one(args: list[Any]) -> Any:
        return (args[0] + (2 if float(args[0]) > 1 else 1),)

    run = checked(wrong_above_one, plus_one)
    for start, value, label in ((1, "z", "second"), (5, "y", "first"), (5, "y", "first"), (1, "z", "second")):
        with pytest.raises(VerifyError) as caught:
            run(tensor(start))
        message = str(caught.value)
        assert f"value %{value} of region_0 differs by" in message
        assert f"[{label} at a.py:" in message
        assert "regions': 'aten'" in message


def test_an_overwritten_input_does_not_disturb_the_reference() -> None:
    def in_place(args: list[Any]) -> Any:
        return (args[0].add_(1),)

    _, z = checked(in_place, plus_one)(tensor(1))
    assert float(z) == 3


def test_both_draw_the_same_random_numbers_and_the_generator_goes_on_as_without() -> None:
    def noisy(args: list[Any]) -> Any:
        return (args[0] + torch.rand(4),)

    torch.manual_seed(0)
    checked(noisy, noisy)(torch.zeros(4))
    after = torch.rand(())
    torch.manual_seed(0)
    torch.rand(4), torch.rand(4)
    assert torch.equal(after, torch.rand(()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(1, 4).expand(3, 4),
        lambda: torch.randn(4, 1).expand(4, 3).t(),
        lambda: torch.randn(8, 8)[1::2, 2:5],
        lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
        lambda: torch.randn(6, 6)[:, :3].t(),
    ],
    ids=["expanded", "expanded_t", "sliced", "permuted", "sliced_t"],
)
def test_the_reference_sees_inputs_of_the_same_layout(make: Callable[[], Tensor]) -> None:
    layouts: list[Any] = []

    def look(args: list[Any]) -> Any:
        layouts.append((args[0].stride(), args[0].storage_offset()))
        return (args[0] * 2,)

    checked(look, look)(make())
    assert layouts[0] == layouts[1]


def test_inputs_that_share_memory_still_do() -> None:
    def both(args: list[Any]) -> Any:
        a, b = args
        a.add_(1)
        return (b * 1,)

    step = Step("y, = region_0([a, b])", "region_0", ("a", "b"), ("y",), ())
    program = Program("forward", ("a", "b"), [step], ("y",), {"region_0": "key"}, {})
    run = define(program.source(), "forward", Checks(program, {"key": both}, {"key": both}).namespace)
    a = torch.zeros(4)
    (y,) = run([a, a[1:]])
    assert torch.equal(y, torch.ones(3))


OPTIONS = {"sanitize": True, "summary": False, "cache": False}


def test_a_model_runs_sanitized_with_dropout_and_buffers() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    compiled = torch.compile(model, backend="dscompile", options=OPTIONS)
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    found = compiled(x)
    found.sum().backward()
    torch.manual_seed(1)
    torch.testing.assert_close(found, model(x))


def test_a_region_without_a_reference_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dscompile"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert Checks(twice(plus_one), {"key": plus_one}, {}).namespace == {}
    assert "region_0 has no reference and runs unchecked" in caplog.text
