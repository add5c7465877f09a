"""Load a generated kernel and launch it: on the GPU, or in Triton's interpreter where ``TRITON_INTERPRET`` is set.

Importing this file imports no triton; :func:`load` does.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from dscompile.codegen.triton_backend.body import index_text
from dscompile.codegen.triton_backend.cache import source_file, triton_version
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.targets import launch_options
from dscompile.errors import UnsupportedError


def load(kernel: Kernel) -> Callable[..., Any]:
    """The kernel's function, a ``triton.jit`` object.

    Raises:
        UnsupportedError: Triton is not installed.
    """
    triton_version()
    path = source_file(kernel)
    name = f"dscompile_kernel_{kernel.key()[:16]}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    function: Callable[..., Any] = getattr(module, kernel.name)
    return function


class Launcher:
    """A kernel ready to be launched.

    ``launcher(*reads, *writes, **symbols)``: tensors in the kernel's order, and the numbers of symbolic sizes.
    """

    def __init__(self, kernel: Kernel) -> None:
        """Load the kernel."""
        self.kernel = kernel
        self.function: Any = load(kernel)
        self._sizes = _evaluator([size for _, size in kernel.sizes])
        self._grid = _evaluator(kernel.grid)

    def __call__(self, *tensors: torch.Tensor, **symbols: int) -> None:
        """Launch it on the tensors' device and its current stream.

        Raises:
            UnsupportedError: the tensors are not where the kernel can run.
        """
        _check_device(self.kernel, tensors)
        kernel = self.kernel
        grid = self._grid(**symbols)
        if 0 in grid:
            return
        with torch.cuda.device_of(tensors[0]):
            self.function[grid](*tensors, *self._sizes(**symbols), **kernel.constants, **_options(kernel))


def _options(kernel: Kernel) -> dict[str, int]:
    """How to build a kernel for the GPU that is there."""
    if interpreted():
        return {}
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return launch_options(kernel, target.backend, target.warp_size)


def _evaluator(sizes: Sequence[sympy.Expr]) -> Callable[..., tuple[int, ...]]:
    """A function from the numbers of symbolic sizes to those of ``sizes``; a launch must not take sympy's time."""
    if all(size.is_Integer for size in sizes):
        numbers = tuple(map(int, sizes))
        return lambda **_: numbers
    names = sorted({s.name for size in sizes for s in size.free_symbols})
    printed = ", ".join(map(index_text, sizes))
    made: Callable[..., tuple[int, ...]] = eval(f"lambda *, {', '.join(names)}, **_: ({printed},)")
    return made


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter (the variable counts when a kernel is loaded)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _check_device(kernel: Kernel, tensors: Sequence[torch.Tensor]) -> None:
    if interpreted():
        return
    wrong = {t.device.type for t in tensors} - {"cuda"}
    if wrong:
        raise UnsupportedError(
            f"kernel {kernel.name!r} runs on a GPU, but a tensor is on {wrong.pop()!r}; set TRITON_INTERPRET=1 before "
            "the first launch to run it in Triton's interpreter."
        )
