"""What each pointwise operator means in the tile language: one table, operator name -> how to build it.

A new operator is one entry. The formulas are PyTorch's own definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import sympy
import torch

from dscompile.codegen.tile.indexing import Div, Rem, non_negative
from dscompile.codegen.tile.ir import Const, Expr, Exprs, Index

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


def div(b: Exprs, x: Expr, y: Expr, rounding_mode: str | None = None) -> Expr:
    """``x / y`` in fp32; or rounded, of integers in integers. KeyError for fp32 rounded down."""
    if rounding_mode is not None and "float" not in (x.kind, y.kind):
        return _whole(b, b.cast("int", x), b.cast("int", y), down=rounding_mode == "floor", rest=False)
    if rounding_mode == "floor":
        raise KeyError("a quotient of floating-point numbers rounded down")
    if rounding_mode == "trunc":
        return trunc(b, div(b, x, y))
    x, y = b.cast("float", x), b.cast("float", y)
    return x if isinstance(y, Const) and y.value == 1 else b.pointwise("div", "float", x, y)


def _whole(b: Exprs, x: Expr, y: Expr, *, down: bool, rest: bool) -> Expr:
    """The quotient or the remainder of integers, rounded down or (as the hardware does) towards zero."""
    positive = isinstance(y, Const) and y.value > 0
    if isinstance(x, Index) and isinstance(y, Const) and positive and non_negative(x.index):
        return b.index((Rem if rest else Div)(x.index, sympy.Integer(int(y.value))))
    quotient, remainder = b.pointwise("quotient", "int", x, y), b.pointwise("rest", "int", x, y)
    if not down:
        return remainder if rest else quotient
    zero = b.const(0)
    apart = b.pointwise("ne", "bool", b.pointwise("lt", "bool", remainder, zero), b.pointwise("lt", "bool", y, zero))
    wrong = b.pointwise("and", "bool", b.pointwise("ne", "bool", remainder, zero), apart)
    return where(b, wrong, *((add(b, remainder, y), remainder) if rest else (sub(b, quotient, b.const(1)), quotient)))


def _remainder(down: bool) -> Build:
    def build(b: Exprs, x: Expr, y: Expr) -> Expr:
        if "float" in (x.kind, y.kind):
            raise KeyError("a remainder of floating-point numbers")
        return _whole(b, b.cast("int", x), b.cast("int", y), down=down, rest=True)

    return build


def trunc(b: Exprs, x: Expr) -> Expr:
    """Towards zero."""
    down, up = (b.pointwise(op, x.kind, x) for op in ("floor", "ceil"))
    return x if x.kind == "int" else where(b, b.pointwise("lt", "bool", x, b.const(0.0)), up, down)


def sign(b: Exprs, x: Expr) -> Expr:
    """1, -1, or 0: of zeros and of NaN, too."""
    one, zero = (b.cast(x.kind, b.const(n)) for n in (1, 0))
    below = where(b, b.pointwise("lt", "bool", x, zero), b.cast(x.kind, b.const(-1)), zero)
    return where(b, b.pointwise("gt", "bool", x, zero), one, below)


def leaky_relu(b: Exprs, x: Expr, slope: Expr | None = None) -> Expr:
    """``x`` above 0, else ``x * slope``."""
    return where(b, b.pointwise("gt", "bool", x, b.const(0.0)), x, mul(b, x, slope or b.const(0.01)))


def hardtanh(b: Exprs, x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    """Between two numbers, -1 and 1 if not said."""
    return clamp(b, x, low or b.const(-1.0), high or b.const(1.0))


def _round(op: str) -> Build:
    return lambda b, x: x if x.kind == "int" else b.pointwise(op, x.kind, x)


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
    "sin": _float("sin"), "cos": _float("cos"), "floor": _round("floor"), "ceil": _round("ceil"), "trunc": trunc,
    "sign": sign, "fmod": _remainder(down=False), "remainder": _remainder(down=True), "hardtanh": hardtanh,
    "leaky_relu": leaky_relu,
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
