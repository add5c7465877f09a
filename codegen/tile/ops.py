"""What each pointwise operator means in the tile language: one table, operator name -> how to build it.

A new operator is one entry. The formulas are PyTorch's own definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dscompile.codegen.tile.ir import Const, Expr, Exprs

Build = Callable[..., Expr]
"""``(exprs, *operands, **constants) -> Expr``; numbers arrive as constants of the language."""


def _join(b: Exprs, *args: Expr) -> tuple[Expr, ...]:
    """Operands of one kind: fp32 if any is floating point, else integers, else booleans."""
    kinds = {a.kind for a in args}
    kind = "float" if "float" in kinds else "int" if "int" in kinds else "bool"
    return tuple(b.cast(kind, a) for a in args)


def _arithmetic(op: str) -> Build:
    def build(b: Exprs, x: Expr, y: Expr) -> Expr:
        x, y = _join(b, x, y)
        if x.kind == "bool" and op == "mul":
            return b.pointwise("and", "bool", x, y)
        if x.kind == "bool":
            x, y = b.cast("int", x), b.cast("int", y)
        if isinstance(x, Const) and isinstance(y, Const) and op in _FOLD:
            return b.const(_FOLD[op](x.value, y.value))
        return _neutral(op, x, y) or b.pointwise(op, x.kind, x, y)

    return build


_FOLD: dict[str, Callable[[float, float], float]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
}


def _neutral(op: str, x: Expr, y: Expr) -> Expr | None:
    """``x * 1`` and ``x - 0`` are ``x``, exactly. ``x + 0`` is not: -0.0 + 0.0 is 0.0."""
    for value, other in ((x, y), (y, x)):
        if op == "mul" and isinstance(value, Const) and value.value == 1:
            return other
    return x if op == "sub" and isinstance(y, Const) and y.value == 0 and not _negative_zero(y) else None


def _negative_zero(value: Const) -> bool:
    return math.copysign(1.0, value.value) < 0


add, sub, mul = _arithmetic("add"), _arithmetic("sub"), _arithmetic("mul")
maximum, minimum = _arithmetic("maximum"), _arithmetic("minimum")


def div(b: Exprs, x: Expr, y: Expr) -> Expr:
    """``x / y`` in fp32."""
    x, y = b.cast("float", x), b.cast("float", y)
    return x if isinstance(y, Const) and y.value == 1 else b.pointwise("div", "float", x, y)


def _scaled(operator: Build) -> Build:
    """``add`` and ``sub`` have a factor for their second operand."""

    def build(b: Exprs, x: Expr, y: Expr, alpha: float = 1) -> Expr:
        return operator(b, x, y if alpha == 1 else mul(b, y, b.const(alpha)))

    return build


def _compare(op: str) -> Build:
    def build(b: Exprs, x: Expr, y: Expr) -> Expr:
        return b.pointwise(op, "bool", *_join(b, x, y))

    return build


def _float(op: str) -> Build:
    return lambda b, x: b.pointwise(op, "float", b.cast("float", x))


def _same(op: str) -> Build:
    return lambda b, x: b.pointwise(op, x.kind, x)


def _logic(op: str) -> Build:
    return lambda b, *args: b.pointwise(op, "bool", *(b.cast("bool", a) for a in args))


exp, erf, sigmoid, sqrt, rsqrt, neg = (
    _float("exp"),
    _float("erf"),
    _float("sigmoid"),
    _float("sqrt"),
    _float("rsqrt"),
    _same("neg"),
)


def tanh(b: Exprs, x: Expr) -> Expr:
    """``2 sigmoid(2x) - 1``: Triton's language has no tanh of its own."""
    return sub(b, mul(b, b.const(2.0), sigmoid(b, mul(b, b.const(2.0), x))), b.const(1.0))


def where(b: Exprs, condition: Expr, x: Expr, y: Expr) -> Expr:
    """``x`` where the condition holds, else ``y``."""
    x, y = _join(b, x, y)
    return b.pointwise("where", x.kind, b.cast("bool", condition), x, y)


def gelu(b: Exprs, x: Expr, approximate: str = "none") -> Expr:
    """Hendrycks and Gimpel, 2016: ``x Phi(x)``, or its tanh approximation."""
    half = mul(b, x, b.const(0.5))
    if approximate == "none":
        return mul(b, half, add(b, b.const(1.0), erf(b, mul(b, x, b.const(math.sqrt(0.5))))))
    cube = mul(b, mul(b, x, x), x)
    inner = mul(b, b.const(math.sqrt(2 / math.pi)), add(b, x, mul(b, b.const(0.044715), cube)))
    return mul(b, half, add(b, b.const(1.0), tanh(b, inner)))


def power(b: Exprs, x: Expr, exponent: Expr) -> Expr:
    """``x ** exponent`` for the exponents that have an exact form; KeyError for others."""
    if not isinstance(exponent, Const):
        raise KeyError("a power with a tensor as exponent")
    forms: dict[float, Callable[[], Expr]] = {
        0.5: lambda: sqrt(b, x),
        -0.5: lambda: rsqrt(b, x),
        1: lambda: x,
        2: lambda: mul(b, x, x),
        3: lambda: mul(b, mul(b, x, x), x),
        -1: lambda: div(b, b.const(1.0), x),
    }
    return forms[float(exponent.value)]()


def clamp(b: Exprs, x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    """``min(max(x, low), high)``."""
    x = x if low is None else maximum(b, x, low)
    return x if high is None else minimum(b, x, high)


def is_finite(b: Exprs, x: Expr) -> Expr:
    """Neither infinite nor NaN."""
    return b.pointwise("lt", "bool", b.pointwise("abs", "float", b.cast("float", x)), b.const(math.inf))


def convert(b: Exprs, x: Expr, dtype: torch.dtype) -> Expr:
    """A conversion: between floating types nothing happens before the store."""
    return b.cast("float" if dtype.is_floating_point else "bool" if dtype is torch.bool else "int", x)


def _lerp(b: Exprs, start: Expr, end: Expr, weight: Expr) -> Expr:
    """PyTorch's form: from the nearer end, so that weight 1 gives ``end`` exactly."""
    difference = sub(b, end, start)
    near = isinstance(weight, Const) and abs(weight.value) < 0.5
    if near:
        return add(b, start, mul(b, weight, difference))
    if isinstance(weight, Const):
        return sub(b, end, mul(b, difference, b.const(1.0 - weight.value)))
    raise KeyError("lerp with a tensor as weight")


def _addcmul(b: Exprs, x: Expr, y: Expr, z: Expr, value: float = 1) -> Expr:
    return add(b, x, mul(b, mul(b, b.const(float(value)), y), z))


def _addcdiv(b: Exprs, x: Expr, y: Expr, z: Expr, value: float = 1) -> Expr:
    return add(b, x, div(b, mul(b, b.const(float(value)), y), z))


KINDS: dict[str, Build] = {
    "add": _scaled(add), "sub": _scaled(sub), "mul": mul, "div": div, "neg": neg, "abs": _same("abs"),
    "rsub": lambda b, x, y, alpha=1: _scaled(sub)(b, y, x, alpha),
    "maximum": maximum, "minimum": minimum, "clamp": clamp, "clamp_min": clamp, "clamp_max": minimum,
    "exp": exp, "exp2": _float("exp2"), "log": _float("log"), "log2": _float("log2"), "sqrt": sqrt, "rsqrt": rsqrt,
    "reciprocal": lambda b, x: div(b, b.const(1.0), x), "erf": erf, "tanh": tanh, "sigmoid": sigmoid,
    "sin": _float("sin"), "cos": _float("cos"), "floor": _float("floor"),
    "relu": lambda b, x: maximum(b, x, b.const(0)),
    "gelu": gelu, "silu": lambda b, x: mul(b, x, sigmoid(b, x)), "pow": power, "square": lambda b, x: mul(b, x, x),
    "lerp": _lerp, "addcmul": _addcmul, "addcdiv": _addcdiv, "where": where,
    "eq": _compare("eq"), "ne": _compare("ne"), "lt": _compare("lt"), "le": _compare("le"), "gt": _compare("gt"),
    "ge": _compare("ge"), "isfinite": is_finite, "isnan": lambda b, x: b.pointwise("ne", "bool", x, x),
    "isinf": lambda b, x: b.pointwise("eq", "bool", b.pointwise("abs", "float", x), b.const(math.inf)),
    "logical_and": _logic("and"), "logical_or": _logic("or"), "logical_not": _logic("not"),
    "clone": lambda b, x: x, "lift_fresh_copy": lambda b, x: x,
}  # fmt: skip
"""Operator of aten (without overload) -> its meaning."""

BOOLEAN = {"bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_not": "logical_not"}
"""Operators that are logic on booleans, and not in the language on integers."""
