"""Stores at places that data decide: ``index_put``, ``scatter`` and ``scatter_add``, the gradients of gathers.

Adding is done by atomic instructions, in fp32 or integers, into memory that starts as zeros. The order in which a GPU
adds is not fixed, so the last bits of a sum differ from run to run (as with TorchInductor's kernels); under
``torch.use_deterministic_algorithms`` adding is left to PyTorch's operator, which refuses or sorts. Sums of a 16-bit
type, and sums added to a tensor, are made in a buffer of their own in fp32 and rounded once by whoever reads them.

Without adding, equal places race, as in PyTorch. It is done where what is not written is one known number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from dscompile.codegen.tile.gather import Place, Reader, indexed, placed
from dscompile.codegen.tile.reductions import node_argument, operator_name
from dscompile.codegen.tile.sizes import shape_of, size

SCATTERS = frozenset({"index_put", "_unsafe_index_put", "scatter_add", "scatter"})
_ATOMIC = frozenset({torch.float32, torch.int32, torch.int64})
"""Types that every target adds to in memory."""
_FILLS: dict[str, float | None] = {
    "zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1, "empty": None, "empty_like": None, "empty_permuted": None,
    "empty_strided": None, "new_empty": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scatter:
    """A node that stores ``values`` (or a number) of ``shape`` at data's places of its result.

    Attributes:
        adds: whether it adds to what is there. start: what the memory holds before (None: anything). apart: whether it
            adds into a buffer of its own, which is added to ``base`` where the result is read.
    """

    node: fx.Node
    base: fx.Node
    values: Any
    shape: tuple[sympy.Expr, ...]
    adds: bool
    start: float | None
    apart: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of the memory that is stored to."""
        own: torch.dtype = self.node.meta["val"].dtype
        return torch.float32 if self.apart and own.is_floating_point else own

    def place(self, values: Reader, index: Place) -> Place:
        """Where in the result element ``index`` of ``shape`` goes."""
        node = self.node
        result = shape_of(node)
        if operator_name(node) in ("scatter", "scatter_add"):
            d = node_argument(node, 1, "dim", 0) % len(result)
            number = values.at(node_argument(node, 2, "index", None), index)
            return (*index[:d], placed(values, node, number, result[d], None), *index[d + 1 :])
        given: Any = node.args[1]
        return indexed(values, node, given, result, self.shape, index, None)

    def value(self, values: Reader, index: Place) -> Any:
        """What is stored for that element."""
        if operator_name(self.node) in ("scatter", "scatter_add"):  # the operand may be larger than the index
            return (
                values.at(self.values, index) if isinstance(self.values, fx.Node) else values.exprs.const(self.values)
            )
        return values.operand(self.values, self.shape, index, None)


def scatter(node: fx.Node) -> Scatter | str | None:
    """What a node scatters; None if it does not, a reason if the language does not have it."""
    name = operator_name(node)
    if name not in SCATTERS:
        return None
    base: Any = node.args[0]
    along = name in ("scatter", "scatter_add")
    values = node_argument(node, 3 if along else 2, "src" if along else "values", None)
    values = node_argument(node, 3, "value", None) if values is None else values
    adds = name == "scatter_add" or (not along and bool(node_argument(node, 3, "accumulate", False)))
    dtype = node.meta["val"].dtype
    if reason := _why_not(node, base, along, adds):
        return f"{node.target}{reason}"
    known, start = _fill(base)
    shape = shape_of(node_argument(node, 2, "index", None)) if along else _chosen(node)
    apart = adds and not (known and start == 0 and dtype in _ATOMIC)
    if not adds and not known:
        return f"{node.target} into a tensor that is not one number is not a tile operator"
    if apart and not dtype.is_floating_point and dtype not in _ATOMIC:
        return f"{node.target}: no target adds {dtype} in memory"
    return Scatter(node, base, values, shape, adds, 0 if adds else start, apart)


def _why_not(node: fx.Node, base: fx.Node, along: bool, adds: bool) -> str:
    if adds and torch.are_deterministic_algorithms_enabled():
        return " adds in no fixed order, which torch.use_deterministic_algorithms forbids"
    given: Any = [node_argument(node, 2, "index", None)] if along else node.args[1]
    wrong = [
        i.meta["val"].dtype for i in given if i is not None and i.meta["val"].dtype not in (torch.int32, torch.int64)
    ]
    if wrong:
        return f" with an index of {wrong[0]} is not a tile operator"
    shape = base.meta["val"].shape
    if not shape or any(isinstance(n, int) and n == 0 for n in shape):
        return f" into a tensor of shape {list(shape)} is not a tile operator"
    if node.kwargs.get("reduce"):
        return f" with {node.kwargs['reduce']} is not a tile operator"
    return ""


def _fill(base: fx.Node) -> tuple[bool, float | None]:
    """Whether every element of a tensor is one number that the graph says, and which (None: any will do)."""
    name = operator_name(base)
    if name in _FILLS:
        return True, _FILLS[name]
    value: Any = base.args[1] if name in ("full", "full_like") else None
    return isinstance(value, (int, float)), value if isinstance(value, (int, float)) else None


def _chosen(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape of ``base[indices]``."""
    given: Any = node.args[1]
    base = shape_of(node.args[0])  # type: ignore[arg-type]
    given = [*given, *[None] * (len(base) - len(given))]
    where = [k for k, i in enumerate(given) if i is not None]
    shapes = [i.meta["val"].shape for i in given if i is not None]
    together = tuple(map(size, torch.broadcast_shapes(*shapes)))
    adjacent = where == list(range(where[0], where[-1] + 1))
    first = where[0] if adjacent else 0
    rest = [base[k] for k in range(len(base)) if given[k] is None]
    return (*rest[:first], *together, *rest[first:])
