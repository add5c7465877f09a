"""``dscompile lr-find``: rates by their formulas, the end of the test, the suggestion, the drawing, the command."""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dscompile.errors import RunError
from dscompile.tools import lr_find
from dscompile.tools.cli import run as command
from dscompile.tools.lr_find import Curve, range_test, rates
from dscompile.tools.plot import draw

TEXT = argparse.__file__


def test_rates() -> None:
    assert rates(5, 1e-4, 1.0, "exponential") == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert rates(5, 0.1, 0.5, "linear") == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


class Bowl:
    """``0.5 * curvature * |x|^2``: gradient descent shrinks x for rates below 2 / curvature, and grows it above."""

    def __init__(self, curvature: float) -> None:
        self.x = torch.nn.Parameter(torch.full((3,), 0.1))
        self.curvature = curvature
        self.optimizer = torch.optim.SGD([{"params": [self.x], "lr_scale": 0.5}], lr=1.0)

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.curvature * self.x.square().sum()


def test_the_test_ends_where_the_loss_explodes() -> None:
    bowl = Bowl(4.0)
    nothing = torch.zeros(0)
    curve = range_test(bowl, bowl.optimizer, lambda step: (nothing, nothing), rates(200, 1e-2, 1e3, "exponential"))
    stable = 2 * 2 / 4.0  # the group's lr_scale halves the rate
    assert curve.exploded
    assert len(curve.rates) == len(curve.losses) < 200
    assert stable < curve.rates[-1] < 30 * stable
    assert all(later < earlier for earlier, later in zip(curve.losses[:40], curve.losses[1:41], strict=True))
    found = curve.suggestion()
    assert found is not None
    assert curve.rates[0] < found < stable


def test_a_loss_that_is_not_finite_at_first_is_an_error() -> None:
    def step_of(*_: Any) -> torch.Tensor:
        return torch.tensor(math.nan)

    with pytest.raises(RunError, match="before the first step"):
        range_test(step_of, Bowl(1.0).optimizer, lambda step: (), [0.1, 0.2])


def test_infinity_later_is_an_explosion() -> None:
    x = torch.nn.Parameter(torch.ones(1))
    values = iter([1.0, 0.9, math.inf])

    def step_of(*_: Any) -> torch.Tensor:
        return (x * 0).sum() + next(values)

    curve = range_test(step_of, torch.optim.SGD([x], lr=1.0), lambda step: (), [0.1, 0.2, 0.3, 0.4])
    assert (curve.exploded, curve.rates, curve.losses) == (True, [0.1, 0.2], pytest.approx([1.0, 0.9]))


def test_smoothing_by_hand_and_the_steepest_descent() -> None:
    curve = Curve([0.1, 1.0, 10.0], [2.0, 1.0, 4.0], False)
    first, second = 0.2 / 0.1, (0.9 * 0.2 + 0.1) / (1 - 0.81)
    third = (0.9 * 0.28 + 0.4) / (1 - 0.729)
    assert curve.smoothed == pytest.approx([first, second, third])
    assert curve.lowest == 1.0
    steps = [10.0**n for n in range(6)]
    falling = [5.0, 5.0, 4.9, 2.0, 1.9, 1.9]
    assert Curve(steps, falling, False).suggestion() in (100.0, 1000.0)


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    assert Curve([0.1, 0.2, 0.3], [1.0, 2.0, 3.0], False).suggestion() is None


def test_the_drawing() -> None:
    text = draw([1e-2, 1e-1, 1.0], [3.0, 2.0, 1.0], x_label="x", y_label="y", width=21, height=3)
    assert text.splitlines() == [
        "   y",
        "3 |*",
        "2 |          *",
        "1 |                    *",
        "  +---------------------",
        "   0.01     0.1        1",
        "          x",
    ]


def test_a_flat_curve_can_be_drawn() -> None:
    assert "*" in draw([0.1, 0.1], [1.0, 1.0], x_label="x", y_label="y")


def options(*more: str) -> list[str]:
    return ["lr-find", "--data", TEXT, "--batch", "2", "--steps", "12", "--backend", "eager", *more]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(options("--csv", "curve.csv", "--min-lr", "1e-4", "--max-lr", "1e-2")) == 0
    said = capsys.readouterr().out
    assert "smoothed loss" in said
    assert "Suggested peak rate" in said
    assert "12 steps from 0.0001 to 0.01" in said
    with open("curve.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "lr", "loss", "smoothed_loss"]
    assert [float(row[1]) for row in rows] == pytest.approx(rates(12, 1e-4, 1e-2, "exponential"))
    assert float(rows[0][2]) == pytest.approx(math.log(512), rel=0.05)  # an untrained model guesses
    assert [file.name for file in tmp_path.iterdir()] == ["curve.csv"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--model", "gpt-500"), "Did you mean 'gpt-500k'"),
        (("--sweep", "exp"), "--sweep 'exp': unknown."),
        (("--steps", "3"), "--steps 3: must be at least 10."),
        (("--min-lr", "0"), "--min-lr 0.0: must be positive"),
        (("--min-lr", "2"), "--max-lr 1.0: must be finite and larger than --min-lr 2.0"),
        (("--csv", "/nowhere/curve.csv"), "--csv /nowhere/curve.csv: cannot write"),
    ],
)
def test_mistakes_are_one_line(more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(options(*more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_the_compiler_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def compile_(model: Any, **arguments: Any) -> Any:
        given.append(arguments)
        return model

    monkeypatch.setattr(lr_find.torch, "compile", compile_)
    assert command(["lr-find", "--data", TEXT, "--batch", "1", "--steps", "10"]) == 0
    assert given == [{"backend": "dscompile", "options": {"summary": False}}]
