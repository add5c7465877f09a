"""The body of a kernel: tile expressions as lines of Triton, each value named once, each line where it must stand.

A kernel with a loop has two scopes. A value that does not change from turn to turn stands before the loop.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
import torch
from sympy.printing.str import StrPrinter

from dscompile.codegen.tile.ir import (
    COL,
    ROW,
    Bounded,
    Buffer,
    Cast,
    Const,
    Expr,
    Index,
    Load,
    Pointwise,
    Reduce,
    Scan,
    Through,
)
from dscompile.errors import UnsupportedError

TYPES = {
    torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.bool: "tl.int1",
    torch.int32: "tl.int32", torch.int64: "tl.int64", torch.uint8: "tl.uint8",
}  # fmt: skip

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "and": "&", "or": "|", "quotient": "//", "rest": "%",
}  # fmt: skip
_CALLS = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sqrt": "tl.sqrt_rn", "rsqrt": "tl.rsqrt",
    "erf": "tl.erf", "sigmoid": "tl.sigmoid", "sin": "tl.sin", "cos": "tl.cos", "floor": "tl.floor", "ceil": "tl.ceil",
    "abs": "tl.abs", "where": "tl.where", "rand": "tl.rand",
}  # fmt: skip
NAN_CALLS = {"maximum": "larger", "minimum": "smaller"}
"""Helpers of a kernel's file: PyTorch's maximum and minimum of NaN and a number is NaN, the hardware's is not."""

HELPERS = {
    name: f"@triton.jit\ndef {name}(a, b):\n    return tl.{op}(a, b, propagate_nan=tl.PropagateNan.ALL)\n"
    for op, name in NAN_CALLS.items()
}
_LONG = 60
"""Characters of an address from which on it has a line of its own."""
IDENTITY = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")', "any": "0"}
_COMBINE = {"max": "larger", "min": "smaller"}


class _Printer(StrPrinter):  # type: ignore[misc]
    """Index arithmetic as Python."""

    def _print_Div(self, expr: sympy.Expr) -> str:  # noqa: N802
        a, b = expr.args
        return f"{_atom(self, a)} // {_atom(self, b)}"

    def _print_Rem(self, expr: sympy.Expr) -> str:  # noqa: N802
        a, b = expr.args
        return f"{_atom(self, a)} % {_atom(self, b)}"

    def _print_Pow(self, expr: sympy.Expr) -> str:  # noqa: N802
        return "*".join([_atom(self, expr.base)] * int(expr.exp))

    def _print_LatticeOp(self, expr: sympy.Expr) -> str:  # noqa: N802
        raise UnsupportedError(f"the symbolic size {expr} is no sum of products, which a kernel's index must be")

    _print_Max = _print_Min = _print_LatticeOp  # noqa: N815

    def _print_Mul(self, expr: sympy.Expr) -> str:  # noqa: N802
        return "*".join(_atom(self, a) for a in expr.args)


def _atom(printer: _Printer, expr: sympy.Expr) -> str:
    text: str = printer._print(expr)
    return text if expr.is_Symbol or (expr.is_Integer and expr >= 0) else f"({text})"


def index_text(index: sympy.Expr) -> str:
    """Index arithmetic as Python, which is Triton too."""
    text: str = _Printer().doprint(index)
    return text


@dataclass
class Scope:
    """Lines at one depth, and the names of what they compute."""

    lines: list[str] = field(default_factory=list)
    names: dict[Expr, str] = field(default_factory=dict)


class Body:
    """Writes the lines of one kernel.

    Args:
        places: how the row and the column are called.
        masks: the mask of each, if it needs one.
        hints: readable names for expressions.
        moving: whether an expression changes from turn to turn of the loop.
    """

    def __init__(
        self,
        places: dict[sympy.Symbol, str],
        masks: dict[sympy.Symbol, str],
        hints: dict[Expr, str],
        moving: Callable[[Expr], bool],
        reserved: set[str],
    ) -> None:
        """Start with nothing written."""
        self.places = places
        self.masks = masks
        self.hints = hints
        self.moving = moving
        self.outer = Scope()
        self.inner = Scope()
        self.helpers: set[str] = set()
        self.results: dict[Expr, str] = {}
        self.reduce: Callable[[Reduce], str] | None = None
        self._taken = set(reserved) | set(places.values()) | set(masks.values())

    def index(self, index: sympy.Expr, through: Through = ()) -> str:
        """An index expression as text; writes what it takes to compute the data in it."""
        names = self.places | {s: self.value(e) for s, e in through}
        return index_text(index.xreplace({s: sympy.Symbol(n) for s, n in names.items()}))

    def mask(self, symbols: frozenset[sympy.Symbol], extra: str = "") -> str:
        """The mask of a load or store that touches the places ``symbols``."""
        return " & ".join(
            [self.masks[s] for s in (ROW, COL) if s in symbols and s in self.masks] + [extra] * bool(extra)
        )

    def value(self, expr: Expr) -> str:
        """The name (or literal) of an expression; writes what it takes to compute it."""
        if isinstance(expr, Const):
            return literal(expr.value)
        if isinstance(expr, Index) and expr.index.is_Symbol:
            return self.index(expr.index, expr.through)
        for known in (self.results, self.outer.names, self.inner.names):
            if expr in known:
                return known[expr]
        stack = [expr]
        while stack:  # operands first, without recursion: graphs can be deep
            top = stack[-1]
            missing = [o for o in top.operands if not self._known(o)] if not isinstance(top, Reduce) else []
            if missing:
                stack += missing
                continue
            stack.pop()
            if not self._known(top):
                self._write(top)
        return self.value(expr)

    def _known(self, expr: Expr) -> bool:
        atom = isinstance(expr, Const) or (isinstance(expr, Index) and expr.index.is_Symbol)
        atom = atom and all(map(self._known, expr.operands))
        return atom or expr in self.results or expr in self.outer.names or expr in self.inner.names

    def _write(self, expr: Expr) -> None:
        text = self._text(expr)
        scope = self.inner if self.moving(expr) else self.outer
        plain = expr.buffer.name if isinstance(expr, Load) else "at" if isinstance(expr, Bounded) else "t"
        name = self.name(self.hints.get(expr) or plain)
        scope.lines.append(f"{name} = {text}")
        scope.names[expr] = name
        if isinstance(expr, Bounded):
            scope.lines.append(self.assertion(expr, name))

    def name(self, wish: str) -> str:
        """A name that nothing else has."""
        wish = f"{wish}_" if keyword.iskeyword(wish) or wish in ("tl", "triton") else wish
        name, number = (wish, 0) if wish != "t" else ("t0", 0)
        while name in self._taken:
            number += 1
            name = f"{wish}{number}" if wish == "t" else f"{wish}_{number}"
        self._taken.add(name)
        return name

    def _text(self, expr: Expr) -> str:
        if isinstance(expr, Load):
            return self.load(expr)
        if isinstance(expr, Index):
            return self.index(expr.index, expr.through)
        if isinstance(expr, Bounded):
            return self.bounded(expr)
        if isinstance(expr, Cast):
            type_ = {"float": "tl.float32", "int": "tl.int64", "bool": "tl.int1"}[expr.kind]
            arg = self.value(expr.arg)
            return f"{arg} != 0" if expr.kind == "bool" else f"{arg}.to({type_})"
        if isinstance(expr, Reduce):
            assert self.reduce is not None
            return self.reduce(expr)
        if isinstance(expr, Scan):
            return self.scan(expr)
        assert isinstance(expr, Pointwise)
        args = [self.value(a) for a in expr.args]
        if expr.op in _INFIX:
            return f"{args[0]} {_INFIX[expr.op]} {args[1]}"
        if expr.op == "neg":
            return f"-{args[0]}"
        if expr.op == "not":
            return f"{args[0]} == 0"
        if expr.op in NAN_CALLS and expr.kind != "float":
            return f"tl.{expr.op}({', '.join(args)})"
        if expr.op in NAN_CALLS:
            self.helpers.add(NAN_CALLS[expr.op])
            return f"{NAN_CALLS[expr.op]}({', '.join(args)})"
        return f"{_CALLS[expr.op]}({', '.join(args)})"

    def scan(self, expr: Scan) -> str:
        """A running sum along the block's columns; what is beyond the row is added after all of it."""
        value = self.value(expr.arg)
        if COL not in expr.arg.symbols:
            value = f"tl.where({self.places[COL]} >= 0, {value}, 0)"  # one value for the row: a block of it
        return f"tl.cumsum({value}{'.to(tl.int64)' if expr.kind == 'int' else ''}, axis=1)"

    def bounded(self, expr: Bounded) -> str:
        """An index from memory: of 64 bits, as it may be multiplied by a stride, and counted from the front."""
        arg = f"{self.value(expr.arg)}.to(tl.int64)"
        return f"tl.where({arg} < 0, {arg} + {self.index(expr.size)}, {arg})" if expr.wraps else arg

    def assertion(self, expr: Bounded, name: str) -> str:
        """The check of an index from memory, as PyTorch's own kernels make it on a GPU."""
        top = self.index(expr.size)
        extra = self.value(expr.mask) if expr.mask is not None else ""
        mask = self.mask(expr.symbols, extra)
        inside = f'(0 <= {name}) & ({name} < {top}), "an index is not below {top}"'
        return f"tl.device_assert({inside}{', mask=' + mask if mask else ''})"

    def load(self, expr: Load) -> str:
        """A load, widened as the type rule says."""
        extra = self.value(expr.mask) if expr.mask is not None else ""
        mask = self.mask(frozenset(expr.index.free_symbols & set(self.places)) | expr.symbols, extra)
        pointer = self.pointer(expr.buffer, expr.index, expr.through)
        wider = expr.mask.symbols - expr.places if expr.mask is not None else frozenset()
        pointer += "".join(f" + 0*{self.places[s]}" for s in (ROW, COL) if s in wider)  # an address for each mask
        if len(pointer) > _LONG:
            name = self.name(f"{expr.buffer.name}_at")
            (self.inner if self.moving(expr) else self.outer).lines.append(f"{name} = {pointer}")
            pointer = name
        text = f"tl.load({pointer}, mask={mask}, other=0)" if mask else f"tl.load({pointer})"
        if expr.buffer.dtype.is_floating_point and expr.buffer.dtype is not torch.float32:
            return f"{text}.to(tl.float32)"
        return f"{text} != 0" if expr.buffer.dtype is torch.bool else text

    def pointer(self, buffer: Buffer, index: sympy.Expr, through: Through = ()) -> str:
        """The address of an element."""
        return f"{buffer.name}_ptr" if index == 0 else f"{buffer.name}_ptr + {self.index(index, through)}"

    def combine(self, how: str, accumulator: str, value: str) -> str:
        """One more value in an accumulator."""
        if how == "sum":
            return f"{accumulator} + {value}"
        if how == "any":
            return f"{accumulator} | {value}"
        self.helpers.add(_COMBINE[how])
        return f"{_COMBINE[how]}({accumulator}, {value})"

    def across(self, how: str, value: str, axis: int) -> str:
        """Reduce a block along one of its axes."""
        if how == "sum":
            return f"tl.sum({value}, axis={axis}, keep_dims=True)"
        if how == "any":
            return f"tl.max({value}, axis={axis}, keep_dims=True)"
        self.helpers.add(_COMBINE[how])
        return f"tl.reduce({value}, {axis}, {_COMBINE[how]}, keep_dims=True)"


def literal(value: float | int | bool) -> str:
    """A number as Triton source."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
