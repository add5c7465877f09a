"""Index arithmetic on non-negative integers: quotient and remainder that sympy can simplify, shapes and strides.

Triton's ``//`` and ``%`` round towards zero. They are only asked for what is not negative where it counts (elsewhere a
mask holds), so no sum is taken apart unless what is left is known not to be negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy

Limits = Mapping[sympy.Symbol, sympy.Expr]
"""Symbol -> how many values it takes: 0 up to, and not including, that."""


class Div(sympy.Function):  # type: ignore[misc]
    """``a // b``, rounded down."""

    nargs = (2,)
    is_integer = True

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        """Take whole multiples of ``b`` out, and nest no quotients."""
        if b == 1:
            return a
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) // int(b))
        whole, rest = _split(a, b)
        if whole and non_negative(rest):
            return sympy.Add(*(t / b for t in whole)) + (cls(rest, b) if rest != 0 else 0)
        if isinstance(a, Div):
            return cls(a.args[0], a.args[1] * b)
        return None


class Rem(sympy.Function):  # type: ignore[misc]
    """``a % b``, between 0 and ``b - 1``."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        """Drop whole multiples of ``b``."""
        if b == 1:
            return sympy.Integer(0)
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) % int(b))
        whole, rest = _split(a, b)
        if whole and non_negative(rest):
            return cls(rest, b)
        if isinstance(a, Rem) and (a.args[1] / b).is_integer:
            return cls(a.args[0], b)
        return None


def _split(a: sympy.Expr, b: sympy.Expr) -> tuple[list[sympy.Expr], sympy.Expr]:
    """The terms of ``a`` that ``b`` divides, and the sum of the rest."""
    terms = sympy.Add.make_args(sympy.expand(a))
    whole = [t for t in terms if (t / b).is_integer]
    return whole, sympy.Add(*(t for t in terms if not (t / b).is_integer))


def product(sizes: Sequence[Any]) -> sympy.Expr:
    """The product of sizes."""
    return sympy.Mul(*map(sympy.sympify, sizes))


def linear(index: Sequence[sympy.Expr], strides: Sequence[Any]) -> sympy.Expr:
    """The offset of an element in elements."""
    return sympy.Add(*(i * s for i, s in zip(index, strides, strict=True)))


def contiguous(shape: Sequence[Any]) -> list[sympy.Expr]:
    """The strides of a contiguous tensor."""
    return [product(shape[k + 1 :]) for k in range(len(shape))]


def delinearise(flat: sympy.Expr, shape: Sequence[Any], limits: Limits) -> tuple[sympy.Expr, ...]:
    """The index of element number ``flat`` of a contiguous tensor."""
    out = []
    for k, size in enumerate(shape):
        if size == 1:
            out.append(sympy.Integer(0))
            continue
        part = Div(flat, product(shape[k + 1 :]))
        outermost = all(s == 1 for s in shape[:k])  # flat is below the number of elements
        out.append(simplify(part if outermost else Rem(part, sympy.sympify(size)), limits))
    return tuple(out)


def reshaped(
    index: Sequence[sympy.Expr], shape: Sequence[sympy.Expr], other: Sequence[sympy.Expr], limits: Limits
) -> tuple[sympy.Expr, ...]:
    """Where element ``index`` of ``shape`` is in its view of shape ``other``; dimensions at either end of both stay.

    So a place that may be negative (before padding) is not mixed with the places of other dimensions.
    """
    first, last, most = 0, 0, min(len(shape), len(other))
    while first < most and shape[first] == other[first]:
        first += 1
    while last < most - first and shape[-1 - last] == other[-1 - last]:
        last += 1
    stop = len(shape) - last
    middle = slice(first, stop), slice(first, len(other) - last)
    flat = simplify(linear(index[middle[0]], contiguous(shape[middle[0]])), limits)
    return (*index[:first], *delinearise(flat, other[middle[1]], limits), *index[stop:])


def simplify(expr: sympy.Expr, limits: Limits) -> sympy.Expr:
    """The same value, with quotients and remainders that cancel or cannot occur removed."""
    while True:
        new = sympy.expand(_merge(_inner(sympy.expand(expr), limits)))
        if new == expr:
            return new
        expr = new


def _inner(expr: sympy.Expr, limits: Limits) -> sympy.Expr:
    """Remove ``Div(a, b)`` and ``Rem(a, b)`` with ``a < b``."""
    if isinstance(expr, (Div, Rem)):
        a, b = simplify(expr.args[0], limits), expr.args[1]
        top = upper(a, limits)
        if top is not None and (b - top).is_positive and non_negative(a):
            return sympy.Integer(0) if isinstance(expr, Div) else a
        for unit in _units(a, b):
            whole, rest = _split(a, unit)
            left = upper(rest, limits)
            if whole and left is not None and (unit - left).is_positive and non_negative(rest):
                a, b = sympy.Add(*(t / unit for t in whole)), b / unit
                return Div(a, b) if isinstance(expr, Div) else unit * Rem(a, b) + rest
        return type(expr)(a, b)
    if not expr.args:
        return expr
    return expr.func(*(_inner(a, limits) for a in expr.args))


def _units(a: sympy.Expr, b: sympy.Expr) -> list[sympy.Expr]:
    """Factors of ``b`` in terms of ``a``: with such a factor m, ``(m*q + rest) // (m*n)`` is ``q // n`` if rest < m."""
    found = []
    for term in sympy.Add.make_args(a):
        unit = sympy.Mul(*(f for f in sympy.Mul.make_args(term) if f.is_Integer or f.is_Pow or _is_size(f)))
        if unit != 1 and (b / unit).is_integer:
            found.append(unit)
    return list(dict.fromkeys(found))


def _is_size(factor: sympy.Expr) -> bool:
    """Whether a factor is the symbol of a size: places may be 0, sizes are positive."""
    return bool(factor.is_Symbol and factor.is_positive)


def non_negative(expr: sympy.Expr) -> bool:
    """Whether an index is known not to be negative: terms of the module's own quotients and remainders are not."""
    return all(bool(t.is_nonnegative) for t in sympy.Add.make_args(expr)) or isinstance(expr, (Div, Rem))


def _merge(expr: sympy.Expr) -> sympy.Expr:
    """``b*(a // b) + a % b`` is ``a``, ``b*((a // b) % n) + a % b`` is ``a % (b*n)``; each times a factor.

    So is ``b*((a % (b*n)) // b) + a % b``.
    """
    terms = list(sympy.Add.make_args(expr))
    for rem in terms:
        factor, rems = _factored(rem, Rem)
        if rems is None:
            continue
        a, b = rems.args
        for other in terms:
            times, found = _factored(other, Div)
            if found is not None and found == Div(a, b) and times == factor * b:
                return expr - rem - other + factor * a
            whole = found.args[0] if found is not None else None
            nested = isinstance(whole, Rem) and whole.args[0] == a and (whole.args[1] / b).is_integer
            if nested and found == Div(whole, b) and times == factor * b:
                return expr - rem - other + factor * whole
            times, found = _factored(other, Rem)
            if found is not None and found.args[0] == Div(a, b) and times == factor * b:
                return expr - rem - other + factor * Rem(a, b * found.args[1])
    return expr


def _factored(term: sympy.Expr, kind: type) -> tuple[sympy.Expr, sympy.Expr | None]:
    """A term as a factor times one function of ``kind``; None for any other term."""
    factors = sympy.Mul.make_args(term)
    found = [f for f in factors if isinstance(f, kind)]
    if len(found) != 1:
        return term, None
    return sympy.Mul(*(f for f in factors if f is not found[0])), found[0]


def upper(expr: sympy.Expr, limits: Limits) -> sympy.Expr | None:
    """A bound that a non-negative index does not exceed, or None."""
    if expr.is_Integer:
        return expr
    if expr.is_Symbol:
        limit = limits.get(expr)
        return expr if limit is None else limit - 1
    if isinstance(expr, Rem):
        return expr.args[1] - 1
    if isinstance(expr, Div):
        top = upper(expr.args[0], limits)
        return None if top is None else Div(top, expr.args[1])
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        parts = [upper(a, limits) for a in expr.args]
        known = [p for p in parts if p is not None]
        if len(known) < len(parts) or not all(a.is_nonnegative for a in expr.args):
            return None
        return expr.func(*known)
    return None
