"""From FX nodes to the tile language: the value of a node at an index, seen from inside one kernel.

Nodes that the kernel computes are expanded, everything else is loaded. Views cost nothing: they change the index.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from dscompile.codegen.tile.gather import GATHERS, gathered, why_no_gather
from dscompile.codegen.tile.indexing import (
    Div,
    Limits,
    Rem,
    contiguous,
    delinearise,
    linear,
    product,
    reshaped,
    simplify,
)
from dscompile.codegen.tile.ir import COL, ROW, Buffer, Const, Expr, Exprs, Load, Space, SpaceKind
from dscompile.codegen.tile.moves import MOVES, moved, why_no_move
from dscompile.codegen.tile.ops import BOOLEAN, KINDS, add, convert, div, mul, sqrt
from dscompile.codegen.tile.reductions import Along, Reduction, node_argument, operator_name, reduction, why_no_scan
from dscompile.codegen.tile.scatter import Scatter, scatter
from dscompile.codegen.tile.sizes import shape_of, size

Place = tuple[sympy.Expr, ...]
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int32, torch.int64, torch.uint8})
"""Types that a kernel may read and write. fp64 is not one: everything is computed in fp32."""

VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "expand", "permute", "t", "transpose", "unsqueeze", "squeeze", "select", "slice",
    "split", "split_with_sizes", "alias", "detach",
})  # fmt: skip
CONSTANTS = frozenset({
    "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "scalar_tensor", "arange", "iota", "empty",
    "empty_like", "empty_permuted", "empty_strided", "new_empty",
})  # fmt: skip
"""Values that are known; memory that nobody has written reads as zeros."""
SCANS = frozenset({"cumsum"})
_CONVERSIONS = frozenset({"_to_copy", "convert_element_type"})
_WORDS = frozenset({"alpha", "value", "approximate", "rounding_mode"})
_SORTS = frozenset({"topk", "sort", "kthvalue", "median", "mode", "argsort", "unique"})
_RANDOM = frozenset({"inductor_random"})


class RefusedError(Exception):
    """A set of nodes is not one kernel; the text says why."""


def is_view(node: fx.Node) -> bool:
    """Whether a node only renames elements."""
    if node.target is operator.getitem:
        return operator_name(node.args[0]) in VIEWS  # type: ignore[arg-type]
    return operator_name(node) in VIEWS and not str(node.target).endswith(".dtype")  # view(dtype) reads other bits


def why_not(node: fx.Node) -> str:
    """Why the language does not have a node ("" if it does)."""
    name = operator_name(node)
    value = node.meta.get("val")
    if is_view(node) or name in CONSTANTS:
        return ""
    if name in _SORTS:
        return f"{node.target} sorts: the language compares no element with all others"
    if not isinstance(value, torch.Tensor):
        return f"{node.target} does not return one tensor"
    found = reduction(node)
    if isinstance(found, str):
        return f"{node.target}: {found}"
    if found is not None and found.how in ("max", "min") and not value.dtype.is_floating_point:
        return f"{node.target} of {value.dtype} is not a tile reduction"
    if name in SCANS and (reason := why_no_scan(node)):
        return reason
    if name in GATHERS and (reason := why_no_gather(node)):
        return reason
    if name in MOVES and (reason := why_no_move(node)):
        return reason
    stores = scatter(node)
    if isinstance(stores, str):
        return stores
    known = (
        isinstance(stores, Scatter)
        or name in KINDS
        or name in BOOLEAN
        or name in _CONVERSIONS | _RANDOM | GATHERS | MOVES | SCANS
    )
    if found is None and not known:
        return f"{node.target} is not a tile operator"
    for read in (node, *node.all_input_nodes):
        kept = read.meta.get("val")
        if isinstance(kept, torch.Tensor) and kept.dtype not in DTYPES:
            return f"{node.target}: {kept.dtype} is not computed in fp32 without loss"
    if name in BOOLEAN and value.dtype is not torch.bool:
        return f"{node.target} on integers is not a tile operator"
    rounded = name in ("fmod", "remainder") or (name == "div" and node.kwargs.get("rounding_mode") == "floor")
    if rounded and value.dtype.is_floating_point:
        return f"{node.target} of floating-point numbers is not a tile operator: their remainder is not exact"
    if name == "pow" and node.args[1] not in (0.5, -0.5, 1, 2, 3, -1):
        return f"{node.target} with exponent {node.args[1]} is not a tile operator"
    if name in ("lerp",) and isinstance(node.args[2], fx.Node):
        return f"{node.target} with a tensor as weight is not a tile operator"
    return ""


@dataclass
class Values:
    """Builds expressions for one kernel.

    Attributes:
        space: what the kernel visits. inside: nodes that it computes. reductions: of nodes of the graph, by node.
        partials: for each two-kernel reduction, the buffer of partial results; for a scatter apart, that of its sums.
    """

    space: Space
    inside: frozenset[fx.Node]
    reductions: dict[fx.Node, Reduction]
    partials: dict[fx.Node, Buffer]
    scatters: dict[fx.Node, Scatter]
    exprs: Exprs = field(default_factory=Exprs)
    names: dict[Expr, str] = field(default_factory=dict)
    _known: dict[Any, Expr] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """How far each symbol of the space runs."""
        return {ROW: self.space.rows, COL: self.space.cols, **self.exprs.data_limits}

    def at(self, node: fx.Node, index: Place, mask: Expr | None = None) -> Expr:
        """The value of ``node`` at ``index``; a load under ``mask`` gives 0 where it is false."""
        key = (node, index, mask)
        if key not in self._known:
            self._known[key] = found = self._at(node, index, mask)
            if node in self.inside and not (isinstance(found, Load) and operator_name(node) in _CONVERSIONS):
                self.names.setdefault(found, node.name)  # a value that is only loaded and cast is called as its buffer
        return self._known[key]

    def operand(self, value: Any, shape: Sequence[sympy.Expr], index: Place, mask: Expr | None) -> Expr:
        """An argument of a pointwise operator of result ``shape``, broadcast to it."""
        if not isinstance(value, fx.Node):
            return self.exprs.const(value)
        if not isinstance(value.meta["val"], torch.Tensor):
            return self.exprs.index(size(value.meta["val"]))
        return self.at(value, self._broadcast(shape_of(value), shape, index), mask)

    def _broadcast(self, inner: Sequence[sympy.Expr], outer: Sequence[sympy.Expr], index: Place) -> Place:
        skip = len(outer) - len(inner)
        return tuple(sympy.Integer(0) if s == 1 else index[k + skip] for k, s in enumerate(inner))

    def _at(self, node: fx.Node, index: Place, mask: Expr | None) -> Expr:
        name = operator_name(node)
        if is_view(node):
            return self.at(*self._viewed(node, index), mask)
        if name in CONSTANTS:
            return self._constant(node, name, index)
        if node not in self.inside:
            value = node.meta["val"]
            place = simplify(linear(index, [size(s) for s in value.stride()]), self.limits)
            return self.exprs.load(buffer_of(node), place, mask)
        if node in self.reductions:
            return self._reduced(self.reductions[node], index)
        if node in self.scatters:
            return self._added(self.scatters[node], index, mask)
        if name in _CONVERSIONS:
            dtype = node_argument(node, 1, "dtype", None) or node.meta["val"].dtype
            return convert(self.exprs, self.operand(node.args[0], shape_of(node), index, mask), dtype)
        if name in GATHERS:
            return gathered(self, node, index, mask)
        if name in SCANS:
            return self._scanned(node, index)
        if name in MOVES:
            return moved(self, node, index, mask)
        if name in _RANDOM:
            offset = simplify(linear(index, contiguous(shape_of(node))), self.limits)
            seed = self.operand(node.args[1], (), (), None)
            return self.exprs.pointwise("rand", "float", seed, self.exprs.index(offset))
        build = KINDS[BOOLEAN.get(name, name)]
        args = [
            self.operand(a, shape_of(node), index, mask) if a is not None and not isinstance(a, str) else a
            for a in node.args
        ]
        kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k in _WORDS}
        if name.startswith("clamp"):
            bounds = {"min": "low", "max": "high"}
            given: dict[str, Any] = dict(node.kwargs)
            kwargs = {bounds[k]: self.exprs.const(v) for k, v in given.items() if k in bounds and v is not None}
        return build(self.exprs, *args, **kwargs)

    # -- views ---------------------------------------------------------------------------------------------------------

    def _viewed(self, node: fx.Node, index: Place) -> tuple[fx.Node, Place]:
        """The node that a view looks at, and the index there."""
        if node.target is operator.getitem:
            return self._part(node, index)
        source: Any = node.args[0]
        name, shape, inner = operator_name(node), shape_of(node), shape_of(source)
        if name in ("view", "_unsafe_view", "reshape"):
            return source, reshaped(index, shape, inner, self.limits)
        if name == "expand":
            return source, self._broadcast(inner, shape, index)
        if name in ("alias", "detach"):
            return source, index
        if name in ("t", "transpose", "permute"):
            order = self._order(node, len(inner))
            place = [sympy.Integer(0)] * len(inner)
            for k, d in enumerate(order):
                place[d] = index[k]
            return source, tuple(place)
        if name == "unsqueeze":
            position: Any = node.args[1]
            d = position % len(shape)
            return source, index[:d] + index[d + 1 :]
        if name == "squeeze":
            dims = node_argument(node, 1, "dim", None)
            every = range(len(inner)) if dims is None else [dims] if isinstance(dims, int) else dims
            gone = {d % len(inner) for d in every if inner[d % len(inner)] == 1}
            rest = iter(index)
            return source, tuple(sympy.Integer(0) if k in gone else next(rest) for k in range(len(inner)))
        d = node_argument(node, 1, "dim", 0) % len(inner)
        start = size(node_argument(node, 2, "start", 0) or 0)
        if start.is_negative:
            start += inner[d]
        if name == "select":
            return source, (*index[:d], start, *index[d:])
        return source, (*index[:d], start + index[d] * size(node_argument(node, 4, "step", 1)), *index[d + 1 :])

    def _order(self, node: fx.Node, rank: int) -> list[int]:
        name = operator_name(node)
        if name == "permute":
            dims: Any = node.args[1]
            return [d % rank for d in dims]
        order = list(range(rank))
        if rank > 1:
            a, b = (0, 1) if name == "t" else (int(node.args[1]) % rank, int(node.args[2]) % rank)  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        return order

    def _part(self, node: fx.Node, index: Place) -> tuple[fx.Node, Place]:
        """An element of ``split``."""
        split: Any = node.args[0]
        number: Any = node.args[1]
        source = split.args[0]
        d = node_argument(split, 2, "dim", 0) % len(shape_of(source))
        sizes = split.args[1]
        start = size(sizes) * number if not isinstance(sizes, (list, tuple)) else sympy.Add(*map(size, sizes[:number]))
        return source, (*index[:d], index[d] + start, *index[d + 1 :])

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _constant(self, node: fx.Node, name: str, index: Place) -> Expr:
        dtype = node.meta["val"].dtype
        if name in ("arange", "iota"):
            numbers = [a for a in node.args if not isinstance(a, fx.Node)]
            start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
            if name == "arange" and len(numbers) > 1:
                start, step = numbers[0], (numbers[2] if len(numbers) > 2 else 1)
            return convert(self.exprs, self.exprs.index(size(start) + size(step) * index[0]), dtype)
        filled: dict[str, Any] = {"zeros": 0, "zeros_like": 0, "ones": 1, "ones_like": 1}
        filled |= dict.fromkeys((n for n in CONSTANTS if "empty" in n), 0)
        value = filled[name] if name in filled else node.args[0] if name == "scalar_tensor" else node.args[1]
        return convert(self.exprs, self.operand(value, (), (), None), dtype)

    def _reduced(self, found: Reduction, index: Place) -> Expr:
        """The result of a reduction that this kernel makes or finishes."""
        b, shape = self.exprs, shape_of(found.node.args[0])  # type: ignore[arg-type]
        if found.partial:
            result = self._finished(found, index)
        else:
            full = self.full(shape)
            kept = [full[k] for k in range(len(shape)) if k not in found.dims]
            asked = [index[k] for k in range(len(index)) if not (found.keepdim and k in found.dims)]
            if any(simplify(a - k, self.limits) != 0 for a, k in zip(asked, kept, strict=True)):
                raise RefusedError(f"%{found.node.name} is read at another row than the one it reduces")
            result = b.reduce(found.how, self.reduced_operand(found, full), COL)
        result = result if found.scale == 1.0 else mul(b, result, b.const(found.scale))
        result = result if found.count == 1 else div(b, result, b.index(found.count))
        return sqrt(b, result) if found.root else result

    def _added(self, found: Scatter, index: Place, mask: Expr | None) -> Expr:
        """The sums of a scatter, and what they are added to."""
        node = found.node
        if not found.apart:
            raise RefusedError(f"%{node.name} must be stored before anything can read it")
        place = simplify(linear(index, contiguous(shape_of(node))), self.limits)
        sums = self.exprs.load(self.partials[node], place, mask)
        base = self.at(found.base, index, mask)
        return sums if isinstance(base, Const) and base.value == 0 else add(self.exprs, base, sums)

    def reduced_operand(self, found: Reduction, place: Place) -> Expr:
        """What a reduction adds up, at a place of its operand."""
        value = self.at(found.node.args[0], place)  # type: ignore[arg-type]
        if found.how == "sum":
            value = convert(self.exprs, value, found.node.meta["val"].dtype)
        elif found.how == "any":
            value = convert(self.exprs, value, torch.bool)
        return mul(self.exprs, value, value) if found.square else value

    def _finished(self, found: Reduction, index: Place) -> Expr:
        if self.space.kind is not SpaceKind.FINISH:
            raise RefusedError(f"%{found.node.name} needs every row before anything can read it")
        out = simplify(linear(index, contiguous(shape_of(found.node))), self.limits)
        if out != (COL if self.space.cols != 1 else 0):
            raise RefusedError(f"%{found.node.name} is read at another column than the one it reduces")
        partial = self.partials[found.node]
        cols = sympy.Integer(1) if found.along is Along.ALL else found.cols
        return self.exprs.reduce(found.how, self.exprs.load(partial, ROW * cols + out), ROW)

    def _scanned(self, node: fx.Node, index: Place) -> Expr:
        """A running sum over the row that this program holds."""
        shape = shape_of(node)
        whole = self.space.kind is SpaceKind.ROWS and self.space.cols == shape[-1] and self.space.inner is None
        place = self.full(shape) if whole else ()
        if not whole or any(simplify(a - k, self.limits) != 0 for a, k in zip(index, place, strict=True)):
            raise RefusedError(f"%{node.name} is read at another place than the one to which it adds up")
        value = convert(self.exprs, self.at(node.args[0], place), node.meta["val"].dtype)  # type: ignore[arg-type]
        return self.exprs.scan(value)

    def full(self, shape: Sequence[sympy.Expr]) -> Place:
        """The index of a tensor that has one element for each of the space. RefusedError for another shape."""
        if self.space.kind is not SpaceKind.ROWS:
            if product(shape) != self.space.cols:
                raise RefusedError("different numbers of elements")
            return delinearise(COL if self.space.cols != 1 else sympy.Integer(0), shape, self.limits)
        row = ROW if self.space.rows != 1 else sympy.Integer(0)
        col = COL if self.space.cols != 1 else sympy.Integer(0)
        if self.space.inner is not None:
            return self._in_pieces(row, col, self.space.inner, shape)
        for k in range(len(shape), -1, -1):
            if product(shape[:k]) == self.space.rows and product(shape[k:]) == self.space.cols:
                return delinearise(row, shape[:k], self.limits) + delinearise(col, shape[k:], self.limits)
        raise RefusedError(f"a shape of {list(map(str, shape))} has not {self.space.rows} rows of {self.space.cols}")

    def _in_pieces(self, row: sympy.Expr, col: sympy.Expr, inner: sympy.Expr, shape: Sequence[sympy.Expr]) -> Place:
        """The index of a tensor of which the space's rows are pieces: by the number of the element."""
        if product(shape) != self.space.numel:
            raise RefusedError("different numbers of elements")
        number = Div(col, inner) * self.space.rows * inner + row * inner + Rem(col, inner)
        return delinearise(simplify(number, self.limits), shape, self.limits)

    def per_row(self, shape: Sequence[sympy.Expr]) -> Place:
        """The index of a tensor that has one element for each row. RefusedError for another shape."""
        if self.space.kind is not SpaceKind.ROWS or product(shape) != self.space.rows:
            raise RefusedError("different numbers of elements")
        return delinearise(ROW if self.space.rows != 1 else sympy.Integer(0), shape, self.limits)


def buffer_of(node: fx.Node) -> Buffer:
    """The memory behind a node's value."""
    value = node.meta["val"]
    return Buffer(node.name, value.dtype, product([size(s) for s in value.shape]))
