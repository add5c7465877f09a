"""A generated kernel: its source, how to call it, and what it moves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from dscompile.codegen.tile.ir import Buffer


@dataclass(frozen=True)
class Kernel:
    """One kernel, self-contained.

    Attributes:
        name: of the function in ``source``. source: a whole Python file. reads, writes: its buffers, in argument order.
        sizes: run-time integers after the pointers, as expressions of the graph's symbolic sizes.
        constants: compile-time values after those. grid: programs along each axis. warps (of 32 threads), stages: how
        a program is built. bytes: that it moves; ideal: that any kernel with these inputs and outputs must move (both
        at the hinted sizes). nodes: what it computes. kind: ``row`` (a row or a flat block a program), ``finish`` (adds
        up partial results) or ``matrix``. registers: most of a CUDA thread; 0: as many as its kind takes. scalars:
        loads and stores of one value a program or a row. checks: whether it asserts that indices are in bounds. starts:
        of buffers that must be filled before it runs, with what. adds: whether it adds in memory, in no fixed order.
    """

    name: str
    source: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    sizes: tuple[tuple[str, sympy.Expr], ...]
    constants: Mapping[str, int | bool | float | str]
    grid: tuple[sympy.Expr, ...]
    warps: int = 4
    stages: int = 3
    bytes: int = 0
    ideal: int = 0
    nodes: tuple[str, ...] = ()
    kind: str = "row"
    registers: int = 0
    scalars: tuple[int, int] = (0, 0)
    checks: bool = False
    starts: Mapping[str, float] = field(default_factory=dict)
    adds: bool = False

    @property
    def matrix(self) -> bool:
        """Whether it multiplies matrices: then its tiles are cut by warps."""
        return self.kind == "matrix"

    @property
    def even(self) -> bool:
        """Whether its rows (or its flat length) are whole numbers of 16 elements: wide accesses are possible."""
        length = self.constants.get("COLS")
        if length is None:
            length = next((int(size) for name, size in self.sizes if name == "numel" and size.is_Integer), 0)
        return bool(self.matrix or int(length) % 16 == 0)

    def key(self) -> str:
        """SHA-256 of everything that decides the machine code, but for the target and the versions."""
        types = [(b.name, str(b.dtype)) for b in (*self.reads, *self.writes)]
        sizes = [(name, str(size)) for name, size in self.sizes]
        parts = [self.name, self.source, types, sizes, sorted(self.constants.items()), self.warps, self.stages]
        return hashlib.sha256(repr(parts).encode()).hexdigest()
