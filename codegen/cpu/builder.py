"""Builds the C++ kernels of attention, products and losses once, keeps them on disk, and says why where that fails.

A library is called after the SHA-256 of everything it depends on: sources, flags, compiler, PyTorch and the CPU's
features. It is written under a temporary name and renamed, under a lock that the system releases when its holder dies:
two processes may build at once, and a build that is killed leaves nothing that a later one trusts or waits for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock

from dscompile.codegen.cpu.gemm_kernel import GemmKernel, NoTiles
from dscompile.codegen.cpu.kernels import AttentionKernels
from dscompile.codegen.cpu.loss_kernel import LossKernel
from dscompile.torch_compat import kernel_cache_directory

log = logging.getLogger("dscompile")

_Kernels = TypeVar("_Kernels")

SOURCE = "block_sparse_attention.cpp"
GEMM_SOURCE = "gemm.cpp"
LOSS_SOURCE = "loss_rows.cpp"
"""The translation units, in this folder with the headers they include."""

FLAGS = (
    *("-O3", "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fopenmp"),
)
"""How it is compiled. No ``-ffast-math``: infinities and NaNs mean something here."""

COMPILERS = ("g++", "clang++", "c++")
"""What is tried, in order, if ``CXX`` does not say."""

TIMEOUT = 300
"""Seconds after which a compiler is given up; it takes up to ten."""


@dataclass(frozen=True)
class Build:
    """The kernels, or the reason why there are none."""

    kernels: AttentionKernels | None
    reason: str = ""


@functools.cache
def attention_kernels() -> Build:
    """The kernels of this machine, built at the first call of a process; a failure is warned of once."""
    build = build_kernels(Path(kernel_cache_directory()), os.environ)
    if build.kernels is None:
        log.warning("attention on CPU runs as gathered attention, several times slower: %s", build.reason)
    return build


@dataclass(frozen=True)
class GemmBuild:
    """The matrix product on AMX tiles, or the reason why there is none."""

    kernel: GemmKernel | None
    reason: str = ""


@functools.cache
def gemm_kernel() -> GemmBuild:
    """The matrix product of this machine, built at the first call of a process."""
    return build_gemm(Path(kernel_cache_directory()), os.environ)


def build_gemm(folder: Path, environment: Mapping[str, str]) -> GemmBuild:
    """As :func:`build_kernels`. No compiler is called where the processor has no tiles."""
    if "amx_bf16" not in _cpu().split():
        return GemmBuild(None, "this processor has no AMX tiles of bf16")
    try:
        return GemmBuild(*_loaded(folder, environment, GEMM_SOURCE, "gemm", GemmKernel.load))
    except NoTiles as error:
        return GemmBuild(None, str(error))


@dataclass(frozen=True)
class LossBuild:
    """The cross-entropy of rows of logits, or the reason why there is none."""

    kernel: LossKernel | None
    reason: str = ""


@functools.cache
def loss_kernel() -> LossBuild:
    """The loss of this machine, built at the first call of a process; a failure is warned of once."""
    build = build_loss(Path(kernel_cache_directory()), os.environ)
    if build.kernel is None:
        log.warning("fused cross-entropy on CPU runs on PyTorch's kernels, slower: %s", build.reason)
    return build


def build_loss(folder: Path, environment: Mapping[str, str]) -> LossBuild:
    """As :func:`build_kernels`."""
    return LossBuild(*_loaded(folder, environment, LOSS_SOURCE, "loss", LossKernel.load))


def build_kernels(folder: Path, environment: Mapping[str, str]) -> Build:
    """Load the library from ``folder``, building it if it is not there. ``environment`` may name the compiler (CXX)."""
    return Build(*_loaded(folder, environment, SOURCE, "attention", AttentionKernels.load))


def _loaded(
    folder: Path, environment: Mapping[str, str], source: str, name: str, load: Callable[[str], _Kernels]
) -> tuple[_Kernels | None, str]:
    """What ``load`` makes of the library built from ``source``; or None and why."""
    path, reason = _library(folder, environment, source, name)
    if path is None:
        return None, reason
    try:
        return load(str(path)), ""
    except (OSError, AttributeError) as error:
        return None, _damaged(path, error)


def _library(folder: Path, environment: Mapping[str, str], source: str, name: str) -> tuple[Path | None, str]:
    """The library built from ``source``, built now if it is not there; or None and why."""
    try:
        compiler = _compiler(environment)
        version = _run([*compiler, "--version"])
    except BuildError as error:
        return None, str(error)
    path = folder / f"{name}-{_digest(compiler, version)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _compile(compiler, path, source)
    except BuildError as error:
        return None, f"{path}: {error}"
    except OSError as error:
        why = error.strerror or error
        return None, f"{path}: cannot be written ({why}); set TORCHINDUCTOR_CACHE_DIR to a folder that can"
    return path, ""


def _damaged(path: Path, error: Exception) -> str:
    path.unlink(missing_ok=True)  # the next start builds it again
    return f"{path}: cannot be loaded ({error}); removed, the next start builds it again"


class BuildError(Exception):
    """A compiler that is missing or fails; says which and how."""


def _compiler(environment: Mapping[str, str]) -> list[str]:
    given = environment.get("CXX", "")
    try:
        named = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX is {given!r}, which is no command: {error}") from None
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0], path=environment.get("PATH")):
            return command
    tried = " ".join(named) or ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler found (tried {tried}); install one or set CXX")


def _run(command: list[str]) -> str:
    """What a command prints; it and all that it starts are ended after :data:`TIMEOUT`, or if we are."""
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror or error}") from None
    with process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]} did not finish in {TIMEOUT} s") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if code := process.returncode:
        lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
        end = f"was killed by signal {-code}" if code < 0 else f"failed ({code})"
        raise BuildError(f"{command[0]} {end}: {lines[0].strip() if lines else 'it said nothing'}")
    return output


def _compile(compiler: list[str], path: Path, source: str) -> None:
    """Build under a temporary name, whole or not at all; what killed builds left behind is removed."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _run([*compiler, *FLAGS, str(Path(__file__).with_name(source)), "-o", str(temporary)])
        if not temporary.exists():
            raise BuildError(f"{compiler[0]} says that it succeeded, and wrote nothing")
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _digest(compiler: list[str], version: str) -> str:
    digest = hashlib.sha256()
    for part in (*compiler, version, *FLAGS, torch.__version__, _cpu()):
        digest.update(part.encode() + b"\0")
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _cpu() -> str:
    """The processor's features, which ``-march=native`` compiles for."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
