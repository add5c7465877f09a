"""The private parts of TorchInductor that write loops in C++: subclasses that correct them and fetch memory ahead.

Each class says what it stands on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import sympy
from torch._inductor import config as inductor_config
from torch._inductor.codegen import cpp as inductor_cpp
from torch._inductor.codegen.common import DeferredLine, device_codegens, init_backend_registration
from torch._inductor.cpu_vec_isa import invalid_vec_isa
from torch._inductor.virtualized import V

_AHEAD = 2048
"""Bytes that are fetched ahead of a loop through memory: 32 lines, about memory's latency at a core's share of it."""

_COLD = 1 << 20
"""Buffers of at least so many bytes are taken to be in memory or a shared cache."""


class _Vec(inductor_cpp.CppVecKernel):
    """Inductor's vector loop, fetching ahead what it reads and writes of large buffers in the order of memory.

    A training step's activations are cold when they are needed, and a loop that computes waits for each line: hardware
    does not look far enough past calls (``exp``) and divisions. Values are untouched, and a fetch past a buffer's end
    does nothing. Stands on ``load``, ``store``, ``loads``, ``stores``, ``tiling_idx``, ``_try_get_const_stride`` and
    ``try_get_buffer``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._fetched: set[str] = set()

    def load(self, name: str, index: Any) -> Any:
        """Emit a vector of ``name`` from ``index`` on."""
        value = super().load(name, index)
        self._fetch(self.loads, name, self.args.input(name), index, write=False)
        return value

    def store(self, name: str, index: Any, value: Any, mode: Any = None) -> None:
        """Emit ``name[index] = value``, or the accumulating form."""
        super().store(name, index, value, mode)  # type: ignore[no-untyped-call]
        if mode is None:
            self._fetch(self.stores, name, self.args.output(name), index, write=True)

    def _fetch(self, code: Any, name: str, pointer: str, index: Any, *, write: bool) -> None:
        index = self.rename_indexing(index)
        inner = self.itervars[-1]
        if self.tiling_idx != len(self.itervars) - 1 or self._try_get_const_stride(index, inner) != 1:
            return  # an outer loop is vectorised, or lanes are gathered: what comes next is not adjacent
        buffer = V.graph.try_get_buffer(name)
        if buffer is None or sys.platform == "win32":  # a thread's scratch; MSVC has no such builtin
            return
        width = V.graph.get_dtype(name).itemsize
        size = buffer.get_numel() * width
        if not isinstance(size, (int, sympy.Integer)) or size < _COLD:
            return
        ahead = _AHEAD // width
        line = f"__builtin_prefetch({pointer} + {inductor_cpp.cexpr_index(index)} + {ahead}, {int(write)}, 2);"
        if line not in self._fetched:
            self._fetched.add(line)
            code.writeline(DeferredLine(name, line) if write else line)


class _Tile2D(inductor_cpp.CppTile2DKernel, _Vec):
    """Inductor's 2-D tile with the right address for a parallel scatter.

    torch 2.13 moves the index of a store to the tile's inner row, and its vectorised ``atomic_add`` (an accumulating
    ``index_put`` on more than one thread) then moves it a second time: row ``k`` is added to row ``2 * k``, possibly
    past the buffer's end. Falcon's fused query/key/value gradient is wrong by 2 % so. Here the index is moved once.
    It is a :class:`_Vec` too because Inductor asks its tiles to be of ``vec_kernel_cls``.
    """

    def store(self, name: str, index: Any, value: Any, mode: Any = None) -> None:
        """Emit ``name[index] = value``, or the accumulating form."""
        parallel = inductor_config.cpp.dynamic_threads or self.num_threads != 1
        if mode == "atomic_add" and parallel and not self.need_vec_transpose(self.rename_indexing(index)):  # type: ignore[no-untyped-call]
            inductor_cpp.CppVecKernel.store(self, name, index, value, mode)
        else:
            super().store(name, index, value, mode)  # type: ignore[no-untyped-call]

    def _fetch(self, code: Any, name: str, pointer: str, index: Any, *, write: bool) -> None:
        """Fetch nothing: a tile's rows lie apart."""


class _KernelProxy(inductor_cpp.CppKernelProxy):
    vec_kernel_cls = _Vec
    tile2d_kernel_cls = _Tile2D


_LONG = 64
"""Elements of a row from which on what is computed once a row costs little without vectors."""


def _members(node: Any) -> list[Sequence[Any]]:
    """The nodes of each loop that may be joined."""
    return [part.get_nodes() for part in node.get_outer_nodes()]


def _ranges(nodes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The outer sizes and the reduced sizes of nodes that share their loops."""
    _, (sizes, reduced) = max(nodes, key=lambda node: int(node.is_reduction())).group
    return list(sizes), list(reduced)


class _RowProxy(_KernelProxy):
    """A loop of several that are to become one over rows: what is computed once a row is not vectorised.

    Inductor joins loops over rows only if all step alike, and a vectorised value of rows (the ``rsqrt`` of a norm, the
    ``log`` of a log-softmax) takes 8 or 16 rows a step: then the matrix comes from memory once for each loop.
    """

    depth = 0
    """How many outer loops are shared."""

    def codegen_nodes(self, nodes: list[Any]) -> None:
        """Generate the loop of ``nodes``. Stands on ``picked_vec_isa``."""
        sizes, reduced = _ranges(nodes)
        # Inductor switches this off when it has given up joining, and generates every loop again
        if len(sizes) == self.depth and not reduced and inductor_config.inplace_buffers:
            self.picked_vec_isa = invalid_vec_isa
        super().codegen_nodes(nodes)


class _CpuScheduling(inductor_cpp.CppScheduling):
    """Inductor's scheduling of CPU loops, joining loops over long rows, and keeping readers behind in-place kernels.

    To fuse loops of different ranks, torch 2.13 computes a node's loads again and forgets that they are of the buffer
    *after* a mutation (a scatter): the reader may then be fused with a producer of the scattered values, in front of
    the scatter. Here the loads keep the names that the scheduler gave them.
    """

    kernel_proxy_cls: type[inductor_cpp.CppKernelProxy] = _KernelProxy

    def codegen_outer_loop_node(self, node: Any) -> None:
        """Generate loops that may be joined over their outer ones. Stands on ``get_outer_nodes`` and ``group``."""
        depth = node.outer_loop_fusion_depth
        inner = [prod(sizes[depth:] + reduced) for sizes, reduced in map(_ranges, _members(node))]
        lengths = [size for size in inner if size != 1]
        long = lengths and all(isinstance(size, (int, sympy.Integer)) and size >= _LONG for size in lengths)
        if long:
            self.kernel_proxy_cls = type("_Rows", (_RowProxy,), {"depth": depth})
        try:
            super().codegen_outer_loop_node(node)
        finally:
            self.kernel_proxy_cls = _KernelProxy

    def _align_compatible_range_nodes(self, node1: Any, node2: Any) -> bool:
        aligned = bool(super()._align_compatible_range_nodes(node1, node2))  # type: ignore[no-untyped-call]
        for node in (*node1.get_nodes(), *node2.get_nodes()):
            node.set_read_writes(node.read_writes.rename(node.mutation_renames))
        return aligned


@contextlib.contextmanager
def corrected_cpu_codegen() -> Iterator[None]:
    """Have Inductor generate CPU kernels through our subclasses while a region compiles; restored on the way out.

    Stands on ``CppScheduling.kernel_proxy_cls`` and ``CppKernelProxy.tile2d_kernel_cls``, made for subclasses, and on
    the table behind ``register_backend_for_device``. A CPU backend that the user chose or registered is left alone.
    """
    init_backend_registration()
    stock = device_codegens["cpu"]
    ours = isinstance(stock.scheduling(None), inductor_cpp.CppScheduling) and inductor_config.cpu_backend == "cpp"
    if ours:
        device_codegens["cpu"] = replace(stock, scheduling=_CpuScheduling)
    try:
        yield
    finally:
        device_codegens["cpu"] = stock
