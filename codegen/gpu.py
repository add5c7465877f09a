"""A GPU region: our own Triton kernels where they move fewer bytes than Inductor's would, and why not elsewhere.

Both kinds mix in one program. The comparison is of bytes, from the tile language: Inductor's are those of the same
fusion with what Inductor is known to do otherwise, a sum over columns in kernels of its own, which read its operands
again (its layer norm's backward moves 1.21 times the ideal, bias + GELU 1.26, and a batch norm, whose channels it sums
up in a kernel of their own, 1.5). What the tile language does not have and Inductor does (a reduction between other
dimensions, large windows) runs as PyTorch's operator beside our kernels and counts against them. No time is predicted.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.codegen.regions import Region
from dscompile.codegen.tile.fuse import fuse
from dscompile.codegen.tile.sizes import size
from dscompile.codegen.tile.trace import decomposed
from dscompile.codegen.triton_backend.assemble import Assembled, assemble
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.symbols import hints
from dscompile.errors import UnsupportedError
from dscompile.torch_compat import OpOverload, tensor_bytes, unbacked_symbol_names


@dataclass(frozen=True)
class TritonRegion:
    """The kernels of a region, in a form that is stored with the program."""

    kernels: tuple[Kernel, ...]

    def launchers(self) -> dict[str, Callable[..., None]]:
        """What the region's source calls."""
        from dscompile.codegen.triton_backend.launch import Launcher

        return {f"launch_{kernel.name}": Launcher(kernel) for kernel in self.kernels}

    def prepare_for_serialization(self) -> None:
        """Nothing in it belongs to this process."""


@dataclass(frozen=True)
class Choice:
    """What runs a GPU region. ``assembled`` is None where Inductor does; ``why`` says it in bytes, or in words."""

    assembled: Assembled | None
    why: str


def on_gpu(region: Region) -> bool:
    """Whether every tensor that a region reads or makes is on a GPU."""
    values = [n.meta.get("val") for n in (*region.inputs, *region.nodes)]
    devices = {v.device.type for v in values if isinstance(v, torch.Tensor)}
    return devices == {"cuda"}


def choose(module: fx.GraphModule, key: str) -> Choice:
    """Compare our kernels with Inductor's for one region's module."""
    if importlib.util.find_spec("triton") is None:
        return Choice(None, "the extra 'triton' is not installed")
    if reason := _refused(module):
        return Choice(None, reason)
    try:
        graph = decomposed(module)
    except Exception as error:  # whatever an operator's own checks raise; Inductor traces by other rules
        return Choice(None, f"it cannot be retraced: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if reason := _changed(module, graph):
        return Choice(None, reason)
    try:
        assembled = assemble(graph, f"region_{key[:8]}")
    except UnsupportedError as error:
        return Choice(None, str(error))
    if not assembled.kernels:
        return Choice(None, "nothing in it is a tile operator")
    theirs = fuse(graph.graph, hints(graph.graph), columns_apart=True).bytes
    alone = [n for n in assembled.fused.order if isinstance(n, fx.Node) and not _with_any_compiler(n)]
    moved = assembled.bytes + sum(map(_bytes, alone))
    count = len(assembled.kernels)
    ours = f"our {count} kernel{'s' * (count != 1)}"
    if alone:
        names = ", ".join(sorted({str(n.target).removeprefix("aten.") for n in alone}))
        ours += f" and {len(alone)} operators of PyTorch's ({names})"
    comparison = f"{ours} move {moved} bytes, Inductor's about {theirs}"
    comparison += "; both add gradients of gathers in no fixed order" if assembled.adds else ""
    return Choice(assembled if moved < theirs else None, comparison)


_LIBRARY = ("mm", "convolution", "scaled_dot_product", "sparse_attention", "evoformer_attention")


def _with_any_compiler(node: fx.Node) -> bool:
    """Whether Inductor would call the same operator: it makes kernels of the others, fused with their neighbours."""
    return node.target is operator.getitem or any(part in str(node.target) for part in _LIBRARY)


def _bytes(node: fx.Node) -> int:
    """At least what an operator moves that stands alone: its result, written and (the part of an operand) read."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return 2 * sum(map(tensor_bytes, values))


def _refused(module: fx.GraphModule) -> str:
    """What a region of ours may not hold: effects on its inputs, branches, sizes that data decide."""
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            return f"%{node.name} ({node.target}) writes to its operand"
        if node.op == "get_attr" or (node.op == "call_function" and not _plain(node.target)):
            return f"%{node.name} ({node.target}) is no operator"
        value = node.meta.get("val")
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            return f"%{node.name} is a number that depends on symbolic sizes"
        if unbacked := unbacked_symbol_names(value):
            return f"%{node.name} has a size that data decide ({', '.join(sorted(unbacked))})"
    return ""


def _plain(target: Any) -> bool:
    return isinstance(target, OpOverload) or getattr(target, "__module__", "") in ("_operator", "operator")


def _changed(module: fx.GraphModule, graph: fx.GraphModule) -> str:
    """Whether decomposition changed the type or the strides of a result, which callers rely on."""
    for before, after in zip(_results(module), _results(graph), strict=True):
        old, new = before.meta.get("val"), after.meta.get("val")
        if (
            isinstance(old, torch.Tensor)
            and isinstance(new, torch.Tensor)
            and (old.dtype, list(map(size, old.stride()))) != (new.dtype, list(map(size, new.stride())))
        ):
            return f"%{before.name} has strides {old.stride()} in the graph and {new.stride()} once decomposed"
    return ""


def _results(module: fx.GraphModule) -> list[fx.Node]:
    return [v for v in module.graph.output_node().args[0] if isinstance(v, fx.Node)]  # type: ignore[union-attr]
