"""Kernels and bytes beside TorchInductor's for the same graphs: its code generator runs, no GPU is needed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.kernels.workers import work

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the extra 'triton' is not installed"
)

BACKWARD = ("layer_norm_backward", "rms_norm_backward")


@pytest.fixture(scope="module")
def norms() -> dict[str, Any]:
    return work("count_kernels", [f"library/{name}" for name in ("layer_norm", *BACKWARD)])


@pytest.mark.parametrize("name", ["layer_norm", *BACKWARD])
def test_a_norm_takes_no_more_kernels_and_fewer_bytes_than_inductors(norms: dict[str, Any], name: str) -> None:
    """The ideal: every input and output of the graph once."""
    found = norms[f"library/{name}"]
    assert not isinstance(found, str), found
    figures = found[""]
    assert figures["alone"] == []
    assert figures["ours"] <= figures["inductor"]
    assert figures["bytes"] <= 1.05 * figures["graph ideal"]
    if name in BACKWARD:
        assert figures["inductor bytes"] > 1.1 * figures["graph ideal"], "sums over columns read their operands again"


MOST = {
    "llama": (16, 15), "gpt2": (12, 17), "mistral": (16, 15), "mixtral": (32, 33), "bert": (12, 17), "t5": (42, 50),
    "vit": (9, 19), "resnet": (10, 8),
}  # fmt: skip
"""Launches of forward and backward as counted: more is a regression, even where Inductor takes more still.

Memory that is filled before a kernel scatters into it is a launch, as it is a kernel of Inductor's.
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "gpt2", "mistral", "mixtral", "bert", "t5", "vit", "resnet"])
def test_a_model_takes_no_more_launches_than_inductors(model: str) -> None:
    (found,) = work("count_kernels", [model]).values()
    assert not isinstance(found, str), found
    for (half, figures), most in zip(found.items(), MOST[model], strict=True):
        ours = figures["ours"] + figures["fills"] + len(figures["alone"])
        theirs = figures["inductor"] + len(figures["their alone"])
        assert ours <= min(theirs, most), (half, figures)
        assert figures["bytes"] < figures["inductor bytes"], (half, figures)
