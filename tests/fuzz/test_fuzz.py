"""Random programs against eager: thirty always, five hundred under ``-m slow``. A seed is the whole reproducer."""

from __future__ import annotations

import pytest
from compare import EagerFailureError, check

REFERENCE, COMPILED, MANY = 26, 4, 500


def _check(seed: int, options: dict[str, object]) -> None:
    try:
        check(seed, options, dynamic=True if seed % 7 == 0 else None)
    except EagerFailureError as error:
        pytest.skip(f"not a program: {error}")


@pytest.mark.parametrize("seed", range(REFERENCE))
def test_with_pytorchs_kernels(seed: int) -> None:
    _check(seed, {"regions": "aten"})


@pytest.mark.parametrize("seed", range(REFERENCE, REFERENCE + COMPILED))
def test_compiled(seed: int) -> None:
    _check(seed, {})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1000 + MANY))
def test_many(seed: int) -> None:
    _check(seed, {"regions": "aten"} if seed % 3 else {})
