"""Read what a GPU binary does: registers, spills, shared memory, and the instructions that decide its speed."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dscompile.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one program (registers: of one thread).

    ``wide`` and ``narrow`` count instructions that load from or store to global memory 128 bits a thread, and fewer;
    ``copies`` those that copy to shared memory asynchronously; ``spills`` are instructions that move registers to
    memory and back, ``stack`` the bytes for that. ``matrix`` counts matrix instructions by name.
    """

    registers: int
    shared: int
    stack: int
    spills: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    copies: int
    matrix: dict[str, int]


def nvidia_figures(cubin: bytes, shared: int) -> Figures:
    """Of a cubin, by the disassembler that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _run("cuobjdump", "--dump-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    loads, stores = _widths(assembly, "LDG"), _widths(assembly, "STG")
    matrix = {
        "HGMMA": len(re.findall(r"\bHGMMA\b", assembly)),
        "HMMA": len(re.findall(r"\bHMMA\b", assembly)),
        "UTCMMA": len(re.findall(r"\bUTC\w*MMA\b", assembly)),
    }
    return Figures(
        int(found[1]), shared, int(found[2]), len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        loads[0], loads[1], stores[0], stores[1], len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", assembly)),
        {name: n for name, n in matrix.items() if n},
    )  # fmt: skip


def _widths(assembly: str, instruction: str) -> tuple[int, int]:
    """How many are 128 bits wide or wider, and how many are not."""
    found = re.findall(rf"\b{instruction}\.([\w.]+)", assembly)
    wide = sum(bool({"128", "256"} & set(f.replace("ENL2", "").split("."))) for f in found)
    return wide, len(found) - wide


def amd_figures(assembly: str, shared: int) -> Figures:
    """Of AMD assembly."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    def count(pattern: str) -> int:
        return len(re.findall(pattern, assembly))

    access = r"(?:global|buffer)_{}_(\w+)"
    loads, stores = re.findall(access.format("load"), assembly), re.findall(access.format("store"), assembly)
    wide_loads, wide_stores = (sum(w.startswith("dwordx4") for w in found) for found in (loads, stores))
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    copies = count(r"(?:global|buffer)_load_(?:lds|dword\S* .*\blds\b)")
    matrix = count(r"\bv_mfma")
    return Figures(
        number("vgpr_count"), shared, number("private_segment_fixed_size"), spills, wide_loads, len(loads) - wide_loads,
        wide_stores, len(stores) - wide_stores, copies, {"v_mfma": matrix} if matrix else {},
    )  # fmt: skip


@functools.cache
def reader_digest() -> str:
    """SHA-256 of this file: figures that an older version of it read are not taken for new ones."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    if not path.exists():
        raise UnsupportedError(f"{path} is missing: Triton's Linux wheel brings it.")
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise UnsupportedError(f"{tool} cannot read a kernel that was just built: {done.stderr.strip()}")
    return done.stdout
