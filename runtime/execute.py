"""Execute a Program: bind its printed source to compiled regions and call it with a boxed list of arguments."""

from __future__ import annotations

import ast
import linecache
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dscompile.bucket_ops import new_empty
from dscompile.inductor_compat import load_artifact, set_allocator
from dscompile.program import Program, RegionCode
from dscompile.runtime.comm import Comm
from dscompile.runtime.pool import POOL, SMALLEST
from dscompile.runtime.sanitize import Boxed, Checks
from dscompile.torch_compat import autocast_is_on, no_autocast

_ALLOCATION = re.compile(r"empty_strided_cpu\((\([\d, ]*\)), \([\d, ]*\), torch\.(\w+)\)")


def bind(
    program: Program, *, reuse_buffers: bool = False, sanitize: bool = False, at: Callable[[str], None] | None = None
) -> Boxed:
    """Make the executable function of a program: ``run(args) -> tuple``; ``args`` is emptied as it is used.

    Args:
        program: what to run.
        reuse_buffers: compiled regions take large CPU buffers from the pool.
        at: told where the program is before it waits for other ranks.
        sanitize: compare every region with PyTorch's own kernels as it runs.
    """
    loaded = {key: load_region(code, reuse_buffers=reuse_buffers) for key, code in program.codes.items()}
    namespace: dict[str, Any] = {name: loaded[key] for name, key in program.calls.items()} | program.constants
    namespace["comm"] = Comm(at or (lambda place: None), _pooled if reuse_buffers else new_empty)
    if not sanitize:
        return _without_autocast(define(program.source(), program.name, namespace))
    references = {key: define(c.reference, "run", {}) for key, c in program.codes.items() if c.reference}
    checks = Checks(program, loaded, references)
    return _without_autocast(checks.restarting(define(program.source(), program.name, namespace | checks.namespace)))


def _pooled(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A buffer from the pool, where the pool serves the device."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    strides = [1] * len(shape)
    for index in range(len(shape) - 2, -1, -1):
        strides[index] = strides[index + 1] * max(shape[index + 1], 1)
    return POOL.empty_strided(tuple(shape), tuple(strides), like.dtype)


def _without_autocast(run: Boxed) -> Boxed:
    """Keep a program's casts those that were traced, whatever the caller has switched on around it."""

    def call(args: list[Any]) -> Any:
        if not autocast_is_on():
            return run(args)
        with no_autocast():
            return run(args)

    return call


def load_region(code: RegionCode, *, reuse_buffers: bool = False) -> Boxed:
    """The boxed callable of one region."""
    if code.kind == "aten":
        return define(code.source, "run", {})
    if code.kind == "triton":
        return define(code.source, "run", code.artifact.launchers())
    call = load_artifact(code.artifact)
    if reuse_buffers and allocates_large(code.source):
        set_allocator(call, POOL.empty_strided)
    return call


def allocates_large(wrapper: str) -> bool:
    """Whether a generated wrapper may ask for a buffer that the pool would serve; sizes it computes may be large.

    Asking the pool costs a microsecond more than PyTorch's allocator, which a program of small buffers would feel.
    """
    found = _ALLOCATION.findall(wrapper)
    if len(found) < wrapper.count("empty_strided_cpu("):
        return True
    return any(math.prod(ast.literal_eval(size)) * getattr(torch, dtype).itemsize >= SMALLEST for size, dtype in found)


def define(source: str, name: str, namespace: dict[str, Any]) -> Boxed:
    """Execute generated source and return the function it defines; tracebacks show the generated lines."""
    path = f"<dscompile {name} {hash((source, id(namespace))) & 0xFFFFFFFF:08x}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    scope = {"torch": torch, "operator": operator, "math": math, **namespace}
    exec(compile(source, path, "exec"), scope)
    function: Boxed = scope[name]
    return function
