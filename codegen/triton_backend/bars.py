"""The bars that every generated kernel is held to without a GPU, per target; what cannot hold where, with the reason.

They speak of the machine code, not of time: no GPU's speed is measured or claimed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dscompile.codegen.triton_backend.aot import Build
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.targets import ROW_REGISTERS, launch_options

REGISTER_FILE = 65536
"""32-bit registers of one multiprocessor of every CUDA target."""
MOST_BYTES = 1.05
"""Bytes that a kernel may move, over those of its inputs and outputs once."""
LISTING_LOADS = 24
"""Most narrow loads of an attention kernel: offsets, indices, masks and the softmax's statistics."""


@dataclass(frozen=True, slots=True)
class Excuse:
    """A bar that does not hold: where, and why."""

    bar: str
    targets: tuple[str, ...]
    kinds: tuple[str, ...]
    reason: str


_ALL = ("sm_80", "sm_90", "sm_100", "gfx942")

EXCEPTIONS = (
    Excuse("S4", ("sm_80", "sm_90"), ("matrix-wide",), "heads above 64: eight warps hold what one program sums"),
    Excuse(
        "S4", ("gfx942",), ("matrix",), "512 registers a thread: one wave on each unit is the least, not two programs"
    ),
    Excuse("S5", _ALL, ("finish",), "32 results a program: stores are narrow, and few"),
    Excuse("S5", ("gfx942",), ("matrix",), "results leave the matrix units 64 bits a thread"),
    Excuse(
        "S7", ("gfx942",), ("matrix",), "loads go through registers: gfx942 copies 32 bits a thread to shared memory"
    ),
    Excuse("S7", ("sm_80", "sm_90", "sm_100"), ("matrix-1",), "wide heads in fp32 leave room for one turn's tiles"),
    Excuse("S8", _ALL, ("matrix",), "several programs read the same tiles: one after another, most from cache"),
    Excuse("S8", _ALL, ("scattering",), "what it stores to is filled first, and adding reads it"),
    Excuse("S8", _ALL, ("walking",), "its rows are too long to be held: every pass reads them"),
)
"""What is not asked, per target and kind of kernel.

``matrix-1``: one stage; ``matrix-wide``: heads above 64; ``scattering``: stores at places that data decide;
``walking``: rows in blocks.
"""


def excused(bar: str, target: str, kind: str) -> str:
    """Why a bar is not asked ("" if it is)."""
    return next((e.reason for e in EXCEPTIONS if e.bar == bar and target in e.targets and kind in e.kinds), "")


@dataclass(frozen=True, slots=True)
class Judgement:
    """The bars (S2 to S8) that a build does not reach: ``faults`` with its figures, ``excused`` with the reasons."""

    faults: tuple[str, ...]
    excused: tuple[str, ...]


def judge(build: Build) -> Judgement:
    """Hold a build to every bar."""
    kernel, target, f = build.kernel, build.target, build.figures
    cuda = target.backend == "cuda"
    options = launch_options(kernel, target.backend, target.warp)
    threads = options["num_warps"] * target.warp
    faults: list[str] = []
    reasons: list[str] = []

    def bar(name: str, holds: bool, text: str, kind: str = kernel.kind) -> None:
        if holds:
            return
        reason = excused(name, target.name, kind)
        (reasons if reason else faults).append(f"{name}: {text}" + (f" ({reason})" if reason else ""))

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
        stages = f"matrix-{options['num_stages']}" if options["num_stages"] == 1 and cuda else "matrix"
        bar("S7", f.copies > 0, "no asynchronous copies", stages)
    bar(
        "S8",
        kernel.bytes <= MOST_BYTES * kernel.ideal,
        f"{kernel.bytes} bytes, {kernel.ideal} are the least",
        _way(kernel),
    )
    return Judgement(tuple(faults), tuple(reasons))


def _way(kernel: Kernel) -> str:
    """What decides how many bytes a kernel has to move."""
    if kernel.matrix:
        return "matrix"
    if kernel.starts:
        return "scattering"
    walks = int(kernel.constants.get("COL_BLOCK", 0)) < int(kernel.constants.get("COLS", 0))
    return "walking" if walks and "PROGRAMS" not in kernel.constants else kernel.kind


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
