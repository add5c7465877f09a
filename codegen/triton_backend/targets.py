"""The GPUs that kernels are built for ahead of time, and what each allows. Figures are the vendors', not measured."""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.errors import UnsupportedError, nearest


@dataclass(frozen=True, slots=True)
class Target:
    """One GPU architecture.

    Attributes:
        name: as users and tables call it. backend, arch, warp: what Triton calls it, and threads a warp. shared: most
        bytes of shared memory that one program may use (opt-in limit). matrix: the instruction that its matrix units
        are reached by, as it is spelt in assembly, for tiles of 64 rows and more; small: the same for smaller tiles.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: str
    small: str


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 166912, "HMMA", "HMMA"),
        Target("sm_90", "cuda", 90, 32, 232448, "HGMMA", "HMMA"),
        Target("sm_100", "cuda", 100, 32, 232448, "UTCMMA", "HMMA"),
        Target("gfx942", "hip", "gfx942", 64, 65536, "v_mfma", "v_mfma"),
    )
}
"""Name -> target: A100, H100, B200 and MI300X."""


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
        UnsupportedError: no such target; lists the known ones.
    """
    if name not in TARGETS:
        raise UnsupportedError(
            f"no kernels are built for target {name!r}.{nearest(name, TARGETS)} Known targets: {', '.join(TARGETS)}."
        )
    return TARGETS[name]


ROW_REGISTERS = 80
"""Most registers of a row kernel's thread: six programs of 128 threads on a multiprocessor."""


def launch_options(kernel: Kernel, backend: str, warp: int) -> dict[str, int]:
    """``num_warps``, ``num_stages`` and, on CUDA, ``maxnreg`` of a kernel on a GPU with warps of ``warp`` threads.

    ptxas spills a few registers to reach a rounder occupancy if it is not told how many it may use.

    A row kernel has as many threads everywhere. A matrix kernel's tiles are cut by warps: AMD's take four at most, and
    one stage, because more spill (seen in ahead-of-time builds for gfx942). Indices from memory are asserted to be in
    bounds on CUDA only, as by TorchInductor: for gfx942 an assertion cuts every access of the kernel narrow.
    """
    if backend != "cuda":
        warps = min(kernel.warps, 4) if kernel.matrix else max(1, kernel.warps * 32 // warp)
        return {"num_warps": warps, "num_stages": 1 if kernel.matrix else kernel.stages}
    options: dict[str, int] = {"num_warps": kernel.warps, "num_stages": kernel.stages}
    if kernel.checks:
        options |= {"debug": True, "sanitize_overflow": False}  # without them Triton drops device_assert
    if kernel.registers or not kernel.matrix:
        options["maxnreg"] = kernel.registers or ROW_REGISTERS
    return options
