"""Symbolic sizes as text: sympy expressions and the ``symbol`` lines of a graph's header, printed and read back.

``str(expr)`` is not a format (term order depends on hashing rules) and ``sympify`` evaluates Python. So sums and
products are printed with sorted terms, functions as ``FloorDiv(s0, 2)``, and a small reader builds the same tree again.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
import torch

from dscompile.torch_compat import ShapeEnv, restore_symbol, symbol_facts, symbol_functions, symbolic_value

_RELATIONS: dict[str, type] = {
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
    "Lt": sympy.StrictLessThan,
    "Le": sympy.LessThan,
    "Gt": sympy.StrictGreaterThan,
    "Ge": sympy.GreaterThan,
}
_LOGIC: dict[str, type] = {"And": sympy.And, "Or": sympy.Or, "Not": sympy.Not}
FUNCTIONS: dict[str, type] = {**symbol_functions(), **_RELATIONS, **_LOGIC}
_NAME_OF = {cls: name for name, cls in FUNCTIONS.items()}
_UNORDERED = ("Max", "Min", "And", "Or")
_CONSTANTS: dict[str, Any] = {"true": sympy.true, "false": sympy.false, "inf": sympy.oo}
_TEXT_OF_CONSTANT = {sympy.true: "true", sympy.false: "false", sympy.oo: "inf", -sympy.oo: "-inf"}

_TOKEN = re.compile(r"\s*(?:(\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)|(\d+)|([A-Za-z_]\w*)|(\*\*|[-+*(),]))", re.ASCII)
_MAX_DEPTH = 60
_MAX_DIGITS = 20
_MAX_POWER = 64


class SymbolError(ValueError):
    """An expression that does not parse; ``offset`` counts characters from the start of its text."""

    def __init__(self, message: str, offset: int) -> None:
        """``message`` says what is wrong at ``offset``."""
        super().__init__(message)
        self.offset = offset


def expr_of(value: Any) -> Any:
    """The sympy expression of a Python or symbolic number."""
    node = getattr(value, "node", None)
    return node.expr if node is not None else sympy.sympify(value)


def size_text(value: int | torch.SymInt) -> str:
    """Text of one size, stride or offset."""
    return str(value) if type(value) is int else expr_text(expr_of(value))


def expr_text(expr: Any) -> str:
    """Canonical text of a sympy expression; a part that cannot be read back prints as ``lost(ClassName)``."""
    if isinstance(expr, sympy.Symbol):
        return str(expr.name)
    if isinstance(expr, sympy.Integer):
        return str(int(expr))
    if isinstance(expr, sympy.Float):
        return repr(float(expr))
    if expr in _TEXT_OF_CONSTANT:
        return _TEXT_OF_CONSTANT[expr]
    if isinstance(expr, sympy.Rational):
        return f"Rational({int(expr.p)}, {int(expr.q)})"
    if isinstance(expr, sympy.Add):
        return " + ".join(sorted(expr_text(a) for a in expr.args))
    if isinstance(expr, sympy.Mul):
        return "*".join(sorted(_atom_text(a) for a in expr.args))
    if isinstance(expr, sympy.Pow):
        return f"{_atom_text(expr.base)}**{_atom_text(expr.exp)}"
    name = _NAME_OF.get(type(expr))
    if name is None:
        return f"lost({type(expr).__name__})"
    parts = [expr_text(a) for a in expr.args]
    return f"{name}({', '.join(sorted(parts) if name in _UNORDERED else parts)})"


def _atom_text(expr: Any) -> str:
    text = expr_text(expr)
    return f"({text})" if isinstance(expr, (sympy.Add, sympy.Mul, sympy.Pow)) or text.startswith("-") else text


def parse_expr(text: str, symbols: dict[str, Any]) -> Any:
    """The sympy expression of ``text``. Raises :class:`SymbolError` with the offset of the fault."""
    return _ExprReader(text, symbols).read()


class _ExprReader:
    """Recursive descent: sums of products of powers of atoms."""

    def __init__(self, text: str, symbols: dict[str, Any]) -> None:
        self.text = text
        self.symbols = symbols
        self.position = 0
        self.depth = 0

    def read(self) -> Any:
        value = self._sum()
        if self.text[self.position :].strip():
            raise SymbolError(f"unexpected {self.text[self.position :].strip()[0]!r} in a size", self.position)
        return value

    def _peek(self) -> str:
        match = _TOKEN.match(self.text, self.position)
        return match.group(4) or "" if match else ""

    def _take(self, symbol: str) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match is None or match.group(4) != symbol:
            raise SymbolError(f"expected {symbol!r} in a size", self.position)
        self.position = match.end()

    def _build(self, offset: int, make: Any, *args: Any, **kwargs: Any) -> Any:
        # sympy's constructors check and simplify their arguments, and may raise anything for nonsense like Mod(s0, 0).
        try:
            value = make(*args, **kwargs)
        except Exception as error:
            raise SymbolError(f"not a valid size expression: {error or type(error).__name__}", offset) from None
        if value.has(sympy.nan, sympy.zoo):
            raise SymbolError("this size expression has no value", offset)
        return value

    def _sum(self) -> Any:
        start, terms = self.position, [self._product()]
        while self._peek() == "+":
            self._take("+")
            terms.append(self._product())
        return terms[0] if len(terms) == 1 else self._build(start, sympy.Add, *terms)

    def _product(self) -> Any:
        start, factors = self.position, [self._power()]
        while self._peek() == "*":
            self._take("*")
            factors.append(self._power())
        if len(factors) == 1:
            return factors[0]
        # sympy would distribute a number over a sum, but torch also holds the undistributed form: keep what is written.
        spread = any(f.is_Number for f in factors) and any(f.is_Add for f in factors)
        return self._build(start, sympy.Mul, *factors, evaluate=not spread)

    def _power(self) -> Any:
        start, base = self.position, self._atom()
        if self._peek() != "**":
            return base
        self._take("**")
        exponent = self._atom()
        if not (exponent.is_Integer and abs(int(exponent)) <= _MAX_POWER):
            raise SymbolError(f"the power in a size must be an integer of at most {_MAX_POWER}", start)
        return self._build(start, sympy.Pow, base, exponent)

    def _atom(self) -> Any:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            raise SymbolError("expected a size", self.position)
        start = match.start() + len(match.group()) - len(match.group().lstrip())
        real, integer, name, symbol = match.groups()
        self.position = match.end()
        if real is not None:
            return sympy.Float(float(real))
        if integer is not None:
            if len(integer) > _MAX_DIGITS:
                raise SymbolError("this integer is too large for a size", start)
            return sympy.Integer(int(integer))
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise SymbolError("this size is nested too deeply", start)
        value = self._compound(start, name, symbol)
        self.depth -= 1
        return value

    def _compound(self, start: int, name: str | None, symbol: str) -> Any:
        if symbol == "-":
            return self._build(start, lambda x: -x, self._atom())
        if symbol == "(":
            value = self._sum()
            self._take(")")
            return value
        if name is None:
            raise SymbolError(f"unexpected {symbol!r} in a size", start)
        if self._peek() != "(":
            known = _CONSTANTS.get(name, self.symbols.get(name))
            if known is None:
                raise SymbolError(f"undefined symbol {name!r}", start)
            return known
        make = sympy.Rational if name == "Rational" else FUNCTIONS.get(name)
        if make is None:
            raise SymbolError(f"unknown function {name!r} in a size", start)
        self._take("(")
        args = [] if self._peek() == ")" else [self._sum()]
        while args and self._peek() == ",":
            self._take(",")
            args.append(self._sum())
        self._take(")")
        return self._build(start, make, *args)


# -- the header's symbol lines -----------------------------------------------------------------------------------------

_SYMBOL_LINE = re.compile(
    r"symbol ([A-Za-z_]\w*)(?: = (-?[\d.]+(?:e[+-]?\d+)?))? in \[(-?[\w.+-]+), (-?[\w.+-]+)\]((?: \w+)*)", re.ASCII
)


def symbol_line(env: ShapeEnv, symbol: Any) -> str:
    """``symbol s58 = 4 in [2, 1024] positive``: name, hint (absent: unbacked), range, and sympy's assumptions."""
    hint, lower, upper, size_like = symbol_facts(env, symbol)
    flags = [
        *(["real"] if not symbol.is_integer else []),
        *(["positive"] if symbol.is_positive else []),
        *(["nonnegative"] if symbol.is_nonnegative and not symbol.is_positive else []),
        *(["size"] if size_like else []),
    ]
    given = "" if hint is None else f" = {expr_text(hint)}"
    low, high = ("-inf" if lower is None else expr_text(lower)), ("inf" if upper is None else expr_text(upper))
    return " ".join([f"symbol {symbol.name}{given} in [{low}, {high}]", *flags])


class Symbols:
    """The symbols of one parsed text, in one fresh shape environment, and the symbolic numbers built of them."""

    def __init__(self) -> None:
        """Starts with no symbols."""
        self.env = ShapeEnv()
        self.known: dict[str, Any] = {}
        self._sizes: dict[str, int | torch.SymInt] = {}
        self._by_expr: dict[Any, int | torch.SymInt] = {}

    def define(self, line: str) -> None:
        """Read one ``symbol`` line. Raises :class:`SymbolError`."""
        match = _SYMBOL_LINE.fullmatch(line)
        if match is None:
            raise SymbolError("expected 'symbol NAME [= HINT] in [LOW, HIGH] [flags]'", 0)
        name, hint, low, high, words = match.groups()
        flags = words.split()
        unknown = [f for f in flags if f not in ("real", "positive", "nonnegative", "size")]
        if unknown or len(set(flags)) < len(flags):
            raise SymbolError(f"unknown or repeated flag {(unknown or flags)[0]!r} of a symbol", match.start(5))
        if name in self.known or name in _CONSTANTS:
            raise SymbolError(f"symbol {name!r} is defined twice", match.start(1))
        real = "real" in flags
        assumptions = {("real" if real else "integer"): True}
        if "positive" in flags or "nonnegative" in flags:
            assumptions["positive" if "positive" in flags else "nonnegative"] = True
        symbol = sympy.Symbol(name, **assumptions)
        bounds = [_bound(text, real, match.start(3 + i)) for i, text in enumerate((low, high))]
        value = None if hint is None else _bound(hint, real, match.start(2))
        low_bound, high_bound = bounds
        below = value is not None and low_bound is not None and value < low_bound
        if below or (value is not None and high_bound is not None and value > high_bound):
            raise SymbolError(f"hint {hint} lies outside [{low}, {high}]", match.start(2))
        try:
            restore_symbol(self.env, symbol, value, *bounds, size_like="size" in flags)
        except ValueError as error:
            raise SymbolError(str(error), match.start(3)) from None
        self.known[name] = symbol

    def size(self, text: str) -> int | torch.SymInt:
        """The size, stride or offset that ``text`` spells. Raises :class:`SymbolError`."""
        found = self._sizes.get(text)
        if found is None:
            expr = parse_expr(text, self.known)
            if not expr.is_integer:
                raise SymbolError("a size must be an integer", 0)
            found = self._sizes[text] = self.of_expr(expr)
        return found

    def of_expr(self, expr: Any) -> int | torch.SymInt:
        """An int if ``expr`` is a number, else a SymInt; equal expressions give one object."""
        found = self._by_expr.get(expr)
        if found is None:
            found = int(expr) if expr.is_Integer else symbolic_value(self.env, expr, int)
            self._by_expr[expr] = found
        return found

    def number(self, text: str, kind: type) -> Any:
        """A SymInt, SymFloat or SymBool, by ``kind``. Raises :class:`SymbolError`."""
        return symbolic_value(self.env, parse_expr(text, self.known), kind)


def _bound(text: str, real: bool, offset: int) -> Any:
    if text in ("inf", "-inf"):
        return None
    try:
        if len(text) > _MAX_DIGITS and not real:
            raise ValueError
        return sympy.Float(float(text)) if real else sympy.Integer(int(text))
    except ValueError:
        raise SymbolError(f"{text!r} is not a bound of a symbol", offset) from None
