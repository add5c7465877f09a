"""Execute a Program: bind its printed source to compiled regions and call it with a boxed list of arguments."""

from __future__ import annotations

import linecache
import math
import operator
from typing import Any

import torch

from dscompile.program import Program, RegionCode
from dscompile.runtime.pool import POOL
from dscompile.runtime.sanitize import Boxed, checked_regions
from dscompile.torch_compat import load_artifact, set_allocator


def bind(program: Program, *, reuse_buffers: bool = False, sanitize: bool = False) -> Boxed:
    """Make the executable function of a program: ``run(args) -> tuple``; ``args`` is emptied as it is used.

    Args:
        program: what to run.
        reuse_buffers: compiled regions take large CPU buffers from the pool.
        sanitize: compare every region with PyTorch's own kernels as it runs.
    """
    loaded = {key: load_region(code, reuse_buffers=reuse_buffers) for key, code in program.codes.items()}
    namespace: dict[str, Any] = {name: loaded[key] for name, key in program.calls.items()} | program.constants
    if sanitize:
        references = {key: define(c.reference, "run", c.bodies) for key, c in program.codes.items() if c.reference}
        namespace |= checked_regions(program, loaded, references)
    return define(program.source(), program.name, namespace)


def load_region(code: RegionCode, *, reuse_buffers: bool = False) -> Boxed:
    """The boxed callable of one region."""
    if code.kind == "aten":
        return define(code.source, "run", code.bodies)
    call = load_artifact(code.artifact)
    if reuse_buffers:
        set_allocator(call, POOL.empty_strided)
    return call


def define(source: str, name: str, namespace: dict[str, Any]) -> Boxed:
    """Execute generated source and return the function it defines; tracebacks show the generated lines."""
    path = f"<dscompile {name} {hash((source, id(namespace))) & 0xFFFFFFFF:08x}>"
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    scope = {"torch": torch, "operator": operator, "math": math, **namespace}
    exec(compile(source, path, "exec"), scope)
    function: Boxed = scope[name]
    return function
