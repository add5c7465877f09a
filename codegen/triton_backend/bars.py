"""The bars that every generated kernel is held to without a GPU, per target; what cannot hold where, with the reason.

They speak of the machine code, not of time: no GPU's speed is measured or claimed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dscompile.codegen.triton_backend.aot import Build
from dscompile.codegen.triton_backend.targets import ROW_REGISTERS, launch_options

REGISTER_FILE = 65536
"""32-bit registers of one multiprocessor of every CUDA target."""
LISTING_LOADS = 24
"""Most narrow loads of an attention kernel: offsets, indices, masks and the softmax's statistics."""


@dataclass(frozen=True, slots=True)
class Excuse:
    """A bar that does not hold: where, and why."""

    bar: str
    targets: tuple[str, ...]
    kinds: tuple[str, ...]
    reason: str


EXCEPTIONS = (
    Excuse("S4", ("sm_80", "sm_90"), ("matrix-wide",), "heads above 64: eight warps hold what one program sums"),
    Excuse(
        "S4", ("gfx942",), ("matrix",), "512 registers a thread: one wave on each unit is the least, not two programs"
    ),
    Excuse(
        "S5", ("sm_80", "sm_90", "sm_100", "gfx942"), ("finish",), "32 results a program: stores are narrow, and few"
    ),
    Excuse("S5", ("gfx942",), ("matrix",), "results leave the matrix units 64 bits a thread"),
    Excuse(
        "S7", ("gfx942",), ("matrix",), "loads go through registers: gfx942 copies 32 bits a thread to shared memory"
    ),
    Excuse("S7", ("sm_80", "sm_90", "sm_100"), ("matrix-1",), "wide heads in fp32 leave room for one turn's tiles"),
)
"""What is not asked, per target and kind of kernel. ``matrix-1``: one stage; ``matrix-wide``: heads above 64."""


def excused(bar: str, target: str, kind: str) -> str:
    """Why a bar is not asked ("" if it is)."""
    return next((e.reason for e in EXCEPTIONS if e.bar == bar and target in e.targets and kind in e.kinds), "")


def faults(build: Build) -> list[str]:
    """Every bar (S2 to S7) that a build does not reach, with its figures."""
    kernel, target, f = build.kernel, build.target, build.figures
    cuda = target.backend == "cuda"
    options = launch_options(kernel, target.backend, target.warp)
    threads = options["num_warps"] * target.warp
    found = []

    def bar(name: str, holds: bool, text: str, kind: str = kernel.kind) -> None:
        if not holds and not excused(name, target.name, kind):
            found.append(f"{name}: {text}")

    bar("S2", f.stack == 0 and f.spills == 0, f"{f.spills} spills, {f.stack} bytes of stack")
    bar("S3", f.shared <= target.shared, f"{f.shared} bytes of shared memory, {target.shared} are there")
    if kernel.matrix:
        fits = 2 * threads * f.registers <= REGISTER_FILE
        wide = "matrix-wide" if int(kernel.constants["DIM_BLOCK"]) > 64 and cuda else "matrix"
        bar("S4", fits, f"{f.registers} registers: one program at a time", wide)
    else:
        bar("S4", f.registers <= ROW_REGISTERS, f"{f.registers} registers, at most {ROW_REGISTERS}")
    if kernel.even:
        loads, stores = (LISTING_LOADS, 1) if kernel.matrix else kernel.scalars
        bar("S5", f.narrow_loads <= loads, f"{f.narrow_loads} narrow loads, {loads} are of single values")
        bar("S5", f.narrow_stores <= stores, f"{f.narrow_stores} narrow stores, {stores} are of single values")
    if kernel.matrix:
        wanted, banned = matrix_class(build)
        bar("S6", not wanted or f.matrix.get(wanted, 0) > 0, f"no {wanted}, but {f.matrix or 'nothing'}")
        bar("S6", not banned or f.matrix.get(banned, 0) == 0, f"{f.matrix.get(banned, 0)} {banned}")
        bar(
            "S7",
            f.copies > 0,
            "no asynchronous copies",
            f"matrix-{options['num_stages']}" if options["num_stages"] == 1 and cuda else "matrix",
        )
    return found


def matrix_class(build: Build) -> tuple[str, str]:
    """The matrix instruction that a kernel must use, and the one that it must not ("" for none).

    Tiles below 64 rows cannot use the instructions of sm_90 and sm_100 that take 64 rows; fp32 at full precision has no
    matrix instruction on CUDA targets, and has one on AMD's.
    """
    kernel, target = build.kernel, build.target
    full = kernel.reads[0].dtype is torch.float32 and kernel.constants["PRECISION"] == "ieee"
    if full and target.backend == "cuda":
        return "", ""
    large = int(kernel.constants["TILE"]) >= 64
    other = target.small if large and target.small != target.matrix else ""
    return target.matrix if large else target.small, other
