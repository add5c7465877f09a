"""The measure itself: exact runs pass, wrong ones do not, and an unstable model's rounding is not called wrong."""

from __future__ import annotations

import pytest
import torch
from parity import Run, assert_run_close


def _run(loss: float, *gradient: float) -> Run:
    return loss, {"weight": torch.tensor(gradient, dtype=torch.float64)}


EXACT = _run(1.0, 1.0, 2.0)


def test_near_to_eager_passes_without_fp64() -> None:
    assert_run_close(_run(1.000001, 1.0, 2.0001), EXACT, lambda: pytest.fail("not needed"))


@pytest.mark.parametrize("found", [_run(1.001, 1.0, 2.0), _run(1.0, 1.01, 2.0)], ids=["loss", "gradient"])
def test_a_wrong_value_of_a_stable_model_fails(found: Run) -> None:
    with pytest.raises(AssertionError, match="from fp64"):
        assert_run_close(found, EXACT, lambda: (EXACT, [_run(1.000001, 1.0, 2.00001)]))


def test_as_near_to_fp64_as_eager_passes() -> None:
    eager = _run(1.0003, 1.002, 2.0)
    assert_run_close(_run(0.9997, 0.998, 2.0), eager, lambda: (EXACT, [eager]))


def test_three_times_eagers_error_fails() -> None:
    eager = _run(1.0003, 1.002, 2.0)
    with pytest.raises(AssertionError, match="gradient is"):
        assert_run_close(_run(1.0003, 1.006, 2.0), eager, lambda: (EXACT, [eager]))


def test_eager_far_from_fp64_judges_nothing() -> None:
    eager = _run(1.0, 1.5, 2.0)
    with pytest.raises(AssertionError, match="not judged"):
        assert_run_close(_run(1.0, 1.4, 2.0), eager, lambda: (EXACT, [eager]))
