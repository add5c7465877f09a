"""Build a kernel ahead of time, for a GPU that need not be there, and say what came out.

Not for a process with ``TRITON_INTERPRET`` set: there Triton has no functions to compile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dscompile.codegen.triton_backend.cache import build_key, load_figures, save_figures, source_file
from dscompile.codegen.triton_backend.inspect import Figures, amd_figures, nvidia_figures, reader_digest
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.launch import interpreted, load
from dscompile.codegen.triton_backend.targets import Target, launch_options
from dscompile.errors import RunError, UnsupportedError

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1", torch.int32: "i32",
    torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip
ALIGNMENT = 16
"""Bytes to which PyTorch's allocator aligns every tensor, and the multiple that makes a size worth a promise."""


@dataclass(frozen=True)
class Build:
    """A kernel for one target."""

    kernel: Kernel
    target: Target
    figures: Figures


def build(kernel: Kernel, target: Target, *, aligned: bool = True, folder: Path | None = None) -> Build:
    """Compile a kernel and read registers, memory and instructions off the result; kept in the cache.

    Args:
        kernel: whose sizes must be numbers.
        target: what to build for.
        aligned: promise that pointers, and sizes that are, are multiples of 16; False is the tests' negative control.
        folder: of the cache; default: the compile cache.

    Raises:
        UnsupportedError: Triton is not installed or only interprets, or a size is symbolic.
        RunError: Triton or its assembler fails; names kernel, target and source file. The next call tries again.
    """
    options = launch_options(kernel, target.backend, target.warp)
    key = build_key(kernel, target.name, repr((sorted(options.items()), aligned, reader_digest())))
    kept = load_figures(key, folder)
    if kept is not None:
        return Build(kernel, target, Figures(**kept))
    figures = _compile(kernel, target, aligned)
    save_figures(key, asdict(figures), folder)
    return Build(kernel, target, figures)


def _compile(kernel: Kernel, target: Target, aligned: bool) -> Figures:
    if interpreted():
        raise UnsupportedError("TRITON_INTERPRET is set: this process can run kernels, but not build them.")
    function: Any = load(kernel)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialisation(kernel, aligned)
    source = ASTSource(function, signature, constants, attributes)
    options = launch_options(kernel, target.backend, target.warp)
    gpu = GPUTarget(target.backend, target.arch, target.warp)
    try:
        built: Any = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # Triton's own errors, its assemblers', the operating system's
        raise RunError(
            f"kernel {kernel.name!r} cannot be built for {target.name}: {_short(error)}. Its source: "
            f"{source_file(kernel)}."
        ) from error
    shared = int(built.metadata.shared)
    if target.backend == "cuda":
        return nvidia_figures(built.asm["cubin"], shared)
    return amd_figures(built.asm["amdgcn"], shared)


def _short(error: Exception) -> str:
    """Type and first telling line of an error; assemblers print a banner before it."""
    lines = [line.strip(" `.") for line in str(error).splitlines() if line.strip(" `")]
    telling = [line for word in ("fatal", "error:", "") for line in lines if word in line.lower()]
    return f"{type(error).__name__}: {telling[0]}" if telling else type(error).__name__


def specialisation(kernel: Kernel, aligned: bool = True) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Triton's signature, constants and attributes of a kernel."""
    buffers = (*kernel.reads, *kernel.writes)
    signature = {f"{b.name}_ptr": f"*{_TYPES[b.dtype]}" for b in buffers}
    promised = list(range(len(buffers)))
    for name, size in kernel.sizes:
        if not size.is_Integer:
            raise UnsupportedError(f"kernel {kernel.name!r}: size {name} = {size} is symbolic; nothing to build for.")
        if int(size) % ALIGNMENT == 0:
            promised.append(len(signature))
        signature[name] = "i32" if int(size) < 2**31 else "i64"
    constants: dict[Any, Any] = {}
    for name, value in kernel.constants.items():
        constants[(len(signature),)] = value
        signature[name] = "constexpr"
    attributes = {(i,): [["tt.divisibility", ALIGNMENT]] for i in promised} if aligned else {}
    return signature, constants, attributes
