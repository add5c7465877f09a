"""Operators that put elements in another place: ``cat``, padding, flipping, and a slice put into a tensor.

Each is a load at another index, under a mask where an element may come from elsewhere: nothing is computed, and
whatever kernel reads the result reads its sources instead.
"""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from dscompile.codegen.tile.gather import Place, Reader
from dscompile.codegen.tile.indexing import Div, Rem, non_negative, simplify, upper
from dscompile.codegen.tile.ir import Expr
from dscompile.codegen.tile.ops import convert, where
from dscompile.codegen.tile.reductions import node_argument, operator_name
from dscompile.codegen.tile.sizes import shape_of, size

MOVES = frozenset({"cat", "constant_pad_nd", "flip", "slice_scatter"})


def why_no_move(node: fx.Node) -> str:
    """Why the language does not have this move ("" if it does)."""
    if operator_name(node) != "slice_scatter":
        return ""
    numbers = (*_slice(node), shape_of(node)[_dim(node, 2)])
    known = all(isinstance(n, int) or getattr(n, "is_Integer", False) for n in numbers)
    return "" if known else f"{node.target} of a slice of symbolic length is not a tile operator"


def moved(values: Reader, node: fx.Node, index: Place, mask: Expr | None) -> Expr:
    """The value of a move at an index of its result."""
    name = operator_name(node)
    if name == "cat":
        return _joined(values, node, index, mask)
    if name == "constant_pad_nd":
        return _padded(values, node, index, mask)
    if name == "slice_scatter":
        return _replaced(values, node, index, mask)
    source: Any = node.args[0]
    flipped: Any = node.args[1]
    shape, dims = shape_of(source), {d % len(index) for d in flipped}
    return values.at(source, tuple(shape[k] - 1 - i if k in dims else i for k, i in enumerate(index)), mask)


def _dim(node: fx.Node, position: int) -> int:
    source: Any = node.args[0]
    dim: int = node_argument(node, position, "dim", 0) % source.meta["val"].dim()
    return dim


def _joined(values: Reader, node: fx.Node, index: Place, mask: Expr | None) -> Expr:
    """``cat``: each part under its own mask."""
    parts: Any = node.args[0]
    d = node_argument(node, 1, "dim", 0) % len(index)
    start = sympy.Integer(0)
    result: Expr | None = None
    for part in parts:
        stop = start + shape_of(part)[d]
        here = _between(values, index[d], start, stop)
        value = values.at(part, (*index[:d], index[d] - start, *index[d + 1 :]), _both(values, mask, here))
        result = value if result is None or here is None else where(values.exprs, here, value, result)
        start = stop
    assert result is not None
    return result


def _padded(values: Reader, node: fx.Node, index: Place, mask: Expr | None) -> Expr:
    """Padding by a number; negative padding cuts off."""
    source: Any = node.args[0]
    pads: Any = node.args[1]
    fill = convert(values.exprs, values.exprs.const(node_argument(node, 2, "value", 0)), node.meta["val"].dtype)
    shape, place = shape_of(source), list(index)
    inside: Expr | None = None
    for k in range(len(pads) // 2):
        d, before, after = len(shape) - 1 - k, size(pads[2 * k]), size(pads[2 * k + 1])
        low = before if not before.is_nonpositive else sympy.Integer(0)
        high = None if after.is_nonpositive else before + shape[d]
        place[d] = index[d] - before
        inside = _both(values, inside, _between(values, index[d], low, high))
    if inside is None:
        return values.at(source, tuple(place), mask)
    value = values.at(source, tuple(place), _both(values, mask, inside))
    return where(values.exprs, inside, value, fill)


def _slice(node: fx.Node) -> tuple[Any, Any, Any]:
    """Start, end and step of a slice, as numbers from the front; what is symbolic stays as it is."""
    length = shape_of(node)[_dim(node, 2)]
    start, end, step = (node_argument(node, 3 + k, name, default)
                        for k, (name, default) in enumerate((("start", None), ("end", None), ("step", 1))))  # fmt: skip
    if all(v is None or isinstance(v, int) for v in (start, end, step)) and length.is_Integer:
        return slice(start, end, step).indices(int(length))
    return start, end, step


def _replaced(values: Reader, node: fx.Node, index: Place, mask: Expr | None) -> Expr:
    """A slice's elements from the second operand, the others from the first."""
    base: Any = node.args[0]
    source: Any = node.args[1]
    d = _dim(node, 2)
    start, end, step = _slice(node)
    inside = _between(values, index[d], sympy.Integer(start), sympy.Integer(end))
    offset = index[d] - start
    if step != 1:
        turn = values.exprs.index(simplify(Rem(offset, sympy.Integer(step)), values.limits))
        inside = _both(values, inside, values.exprs.pointwise("eq", "bool", turn, values.exprs.const(0)))
    place = simplify(Div(offset, sympy.Integer(step)), values.limits)
    found = values.at(source, (*index[:d], place, *index[d + 1 :]), _both(values, mask, inside))
    return found if inside is None else where(values.exprs, inside, found, values.at(base, index, mask))


def _between(values: Reader, place: sympy.Expr, low: sympy.Expr, high: sympy.Expr | None) -> Expr | None:
    """``low <= place < high``; None if that is so for every place."""
    b, found = values.exprs, None
    place, top = simplify(place, values.limits), upper(place, values.limits)
    if high is not None and top is not None and (high - top).is_positive:
        high = None
    if low != 0 and not non_negative(place - low):
        found = b.pointwise("ge", "bool", b.index(place), b.index(low))
    if high is not None:
        found = _both(values, found, b.pointwise("lt", "bool", b.index(place), b.index(high)))
    return found


def _both(values: Reader, first: Expr | None, second: Expr | None) -> Expr | None:
    """Both masks."""
    if first is None or second is None:
        return first if second is None else second
    return values.exprs.pointwise("and", "bool", first, second)
