"""Where a step's time goes: matrix products, attention, PyTorch's other kernels, and everything else.

Read from a profile of one forward + backward by the self time of its events. The profiler sees PyTorch's operators but
not generated kernels: their time, and that of the Python around them, is the self time of whatever event called them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

GEMMS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::convolution")
ATTENTION = "scaled_dot_product"


def time_shares(step: Callable[[], object]) -> dict[str, float]:
    """Share of each kind in the profiled time of ``step``: ``gemm``, ``attention``, ``other_aten``, ``rest``.

    An operator counts with all that it calls, so a copy inside a matrix product is ``gemm``.
    """
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        result = step()
    del result
    seconds = dict.fromkeys(("gemm", "attention", "other_aten", "rest"), 0.0)
    for event in prof.events():
        seconds[_kind(event)] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: value / total for kind, value in seconds.items()}


def _kind(event: Any) -> str:
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    if any(e.name in GEMMS for e in chain):
        return "gemm"
    if any(ATTENTION in e.name for e in chain):
        return "attention"
    return "other_aten" if event.name.startswith("aten::") else "rest"
