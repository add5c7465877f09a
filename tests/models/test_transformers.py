"""Real architectures, unchanged: forward and backward equal eager. Inductor for all of them is the slow sweep."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from more import MORE
from parity import assert_matches_eager
from zoo import ZOO

FAST = ("llama", "bert")
"""Compiled with Inductor in CI; the others run there with aten kernels, and with Inductor under ``-m slow``."""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ZOO)
def test_same_program_with_aten_kernels(name: str) -> None:
    model, inputs = ZOO[name]()
    assert_matches_eager(model, kwargs=inputs, options={"regions": "aten"}, steps=2)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
def test_compiled(name: str) -> None:
    model, inputs = ZOO[name]()
    assert_matches_eager(model, kwargs=inputs, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures_with_aten_kernels(name: str) -> None:
    model, inputs = MORE[name]()
    assert_matches_eager(model, kwargs=inputs, options={"regions": "aten"}, steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures_compiled(name: str) -> None:
    model, inputs = MORE[name]()
    assert_matches_eager(model, kwargs=inputs, steps=1)
