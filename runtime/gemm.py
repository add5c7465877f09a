"""fp32 matrix products on CPU: oneDNN where that is faster *at fp32 accuracy*, never silently bf16.

PyTorch sends fp32 matrix products to MKL, which on some CPUs (AMD with AVX-512) runs at half of what oneDNN reaches.
The switch that selects oneDNN also allows it to round to bf16 where the hardware has such units (AMX), so it is used
only after a probe on this machine has shown both the accuracy of fp32 and a gain.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dscompile.torch_compat import no_modes

ACCURACY = 8.0
"""oneDNN's largest error may be this many times MKL's (against fp64); bf16 would be over 500 times."""

GAIN = 1.25
"""oneDNN must be at least this much faster to be chosen by ``auto``."""

CPUINFO = "/proc/cpuinfo"
"""Where Linux lists the processor's features."""


@dataclass(frozen=True, slots=True)
class GemmChoice:
    """Which library runs fp32 products, and the measurement behind it."""

    onednn: bool
    reason: str

    @staticmethod
    def of(option: str) -> GemmChoice:
        """Decide for ``Config.gemm``: ``auto`` probes once a process; ``onednn`` still refuses bf16 accuracy."""
        if option in (
            "default",
            "amx",
            "amx_int8",
        ):  # our kernels are chosen product by product, as regions are lowered
            return GemmChoice(False, f"gemm={option!r}")
        accurate, gain, error = _probe()
        if not gain:
            return GemmChoice(False, "oneDNN's fp32 products need AVX-512")
        if not accurate:
            return GemmChoice(False, f"oneDNN is not fp32-accurate here (error {error:.0f} x MKL's)")
        if option == "onednn":
            return GemmChoice(True, f"gemm='onednn' ({gain:.2f} x MKL's speed)")
        return GemmChoice(gain >= GAIN, f"oneDNN runs at {gain:.2f} x MKL's speed at fp32 accuracy")


@functools.cache
def _probe() -> tuple[bool, float, float]:
    """(is oneDNN fp32-accurate, its speed over MKL's, its error over MKL's), measured on one product of each kind."""
    if not torch.backends.mkldnn.is_available() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False, 0.0, float("inf")  # without AVX-512 the switch selects nothing and the probe measures noise
    with no_modes(), torch.no_grad():
        return _measure()


def _measure() -> tuple[bool, float, float]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(384, 384, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    result = torch.empty_like(a)

    def measure() -> tuple[float, float]:
        start = time.perf_counter()
        torch.mm(a, b, out=result)
        return time.perf_counter() - start, float((result - exact).abs().max())

    def measure_onednn() -> tuple[float, float]:
        with _OneDnn():
            return measure()

    rounds = [(measure(), measure_onednn()) for _ in range(8)][1:]  # interleaved; the first round warms up
    gain = min(base[0] for base, _ in rounds) / min(other[0] for _, other in rounds)
    ratio = max(other[1] for _, other in rounds) / max(rounds[0][0][1], 1e-30)
    return ratio <= ACCURACY and not _has_bf16_units(), gain, ratio


def _has_bf16_units() -> bool:
    """Whether oneDNN could use AMX tiles, which round fp32 operands to bf16 for shapes the probe did not try.

    A machine that does not say counts as having them.
    """
    try:
        with open(CPUINFO) as file:
            flags = next((line for line in file if line.startswith("flags")), "amx")
    except OSError:
        return True
    return "amx" in flags


class _OneDnn:
    """Context in which fp32 products may go to oneDNN; the user's setting is restored on the way out."""

    __slots__ = ("previous",)

    def __enter__(self) -> None:
        self.previous: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]

    def __exit__(self, *exception: object) -> None:
        torch.backends.mkldnn.matmul.fp32_precision = self.previous  # type: ignore[attr-defined]


def with_gemm(run: Callable[[list[Any]], Any], choice: GemmChoice) -> Callable[[list[Any]], Any]:
    """Wrap a program so that its fp32 products use the chosen library; a no-op for the default one."""
    if not choice.onednn:
        return run

    def run_with_onednn(args: list[Any]) -> Any:
        with _OneDnn():
            return run(args)

    return run_with_onednn
