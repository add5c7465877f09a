"""benchmarks.fused: every variant is measured against fp64, and an unknown region is refused."""

from __future__ import annotations

import pytest

from benchmarks import fused
from benchmarks.variants import NAMES


def test_a_region_is_measured() -> None:
    found = fused.measure("bias + GELU", 64, 64, rounds=1)
    assert list(found) == list(NAMES)
    for figures in found.values():
        assert figures["seconds"] > 0
        assert figures["error"] < 1e-5


def test_an_unknown_region_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fused.main(["--regions", "nothing"])
    assert "unknown regions" in capsys.readouterr().err
