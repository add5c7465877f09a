"""Loads at places that data decide: ``embedding``, ``gather``, and ``index`` with tensors of integers.

An index from memory becomes a symbol of the address (:meth:`dscompile.codegen.tile.ir.Exprs.place`), so that what
is gathered from may itself be computed in the kernel, and views of it cost nothing. What is known to be within its
dimension, an ``arange`` for one, is an ordinary index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from dscompile.codegen.tile.indexing import Limits, non_negative, simplify, upper
from dscompile.codegen.tile.ir import Const, Expr, Exprs, Index
from dscompile.codegen.tile.reductions import node_argument, operator_name
from dscompile.codegen.tile.sizes import shape_of

Place = tuple[sympy.Expr, ...]

GATHERS = frozenset({"embedding", "gather", "index", "index_select", "_unsafe_index"})
_WRAPS = frozenset({"index", "_unsafe_index", "index_put", "_unsafe_index_put"})
"""Operators whose negative indices count from the end; in the others they are errors."""


class Reader(Protocol):
    """What gathers need of :class:`dscompile.codegen.tile.values.Values`."""

    exprs: Exprs

    @property
    def limits(self) -> Limits:
        """How far each symbol runs."""

    def at(self, node: fx.Node, index: Place, mask: Expr | None = None) -> Expr:
        """The value of a node at an index."""

    def operand(self, value: Any, shape: Sequence[sympy.Expr], index: Place, mask: Expr | None) -> Expr:
        """The value of a node that is broadcast to ``shape``, at an index."""


def why_no_gather(node: fx.Node) -> str:
    """Why the language does not have this gather ("" if it does)."""
    for index in _indices(node):
        dtype = index.meta["val"].dtype
        if dtype not in (torch.int32, torch.int64):
            return f"{node.target} with an index of {dtype} is not a tile operator"
    source: Any = node.args[0]
    value = source.meta["val"]
    if value.dim() == 0 or any(isinstance(n, int) and n == 0 for n in value.shape):
        return f"{node.target} from a tensor of shape {list(value.shape)} is not a tile operator"
    return ""


def gathered(values: Reader, node: fx.Node, index: Place, mask: Expr | None) -> Expr:
    """The value of a gather at an index of its result."""
    source: Any = node.args[0]
    return values.at(source, _source_place(values, node, index, mask), mask)


def _source_place(values: Reader, node: fx.Node, index: Place, mask: Expr | None) -> Place:
    name, shape = operator_name(node), shape_of(node.args[0])  # type: ignore[arg-type]
    if name == "embedding":
        number = values.at(node.args[1], index[:-1], mask)  # type: ignore[arg-type]
        return (placed(values, node, number, shape[0], mask), index[-1])
    if name == "gather":
        d = node_argument(node, 1, "dim", 0) % len(shape)
        number = values.at(node_argument(node, 2, "index", None), index, mask)
        return (*index[:d], placed(values, node, number, shape[d], mask), *index[d + 1 :])
    if name == "index_select":
        d = node_argument(node, 1, "dim", 0) % len(shape)
        picked: Any = node_argument(node, 2, "index", None)
        number = values.at(picked, (index[d],) if shape_of(picked) else (), mask)
        return (*index[:d], placed(values, node, number, shape[d], mask), *index[d + 1 :])
    given: Any = node.args[1]
    return indexed(values, node, given, shape, shape_of(node), index, mask)


def indexed(
    values: Reader,
    node: fx.Node,
    given: Sequence[fx.Node | None],
    shape: Sequence[sympy.Expr],
    result: Sequence[sympy.Expr],
    index: Place,
    mask: Expr | None,
) -> Place:
    """Where in a tensor of ``shape`` element ``index`` of ``tensor[given]``, a tensor of shape ``result``, lies."""
    where = [k for k, i in enumerate(given) if i is not None]
    adjacent = where == list(range(where[0], where[-1] + 1))
    rank = max(i.meta["val"].dim() for i in given if i is not None)
    first = where[0] if adjacent else 0  # numpy's rule: indices that others stand between make the leading dimensions
    chosen, rest = index[first : first + rank], iter(index[:first] + index[first + rank :])
    place = []
    for d, length in enumerate(shape):
        if d in where:
            number = values.operand(given[d], result[first : first + rank], chosen, mask)
            place.append(placed(values, node, number, length, mask))
        else:
            place.append(next(rest))
    return tuple(place)


def placed(values: Reader, node: fx.Node, number: Expr, length: sympy.Expr, mask: Expr | None) -> sympy.Expr:
    """A number as an index of a dimension: itself where it is known to be inside, else a symbol for checked data."""
    if isinstance(number, Const):
        index = sympy.Integer(int(number.value))
        index = index + length if index.is_negative and operator_name(node) in _WRAPS else index
        if index.is_nonnegative and (length - index).is_positive:
            return index
    if isinstance(number, Index):
        index = simplify(number.index, values.limits)
        top = upper(index, values.limits)
        if non_negative(index) and top is not None and (length - top).is_positive:
            return index
    return values.exprs.place(number, length, wraps=operator_name(node) in _WRAPS, mask=mask)


def _indices(node: fx.Node) -> list[fx.Node]:
    """The index tensors of a gather."""
    if operator_name(node) == "embedding":
        return [node.args[1]]  # type: ignore[list-item]
    if operator_name(node) in ("gather", "index_select"):
        return [node_argument(node, 2, "index", None)]
    given: Any = node.args[1]
    return [i for i in given if i is not None]
