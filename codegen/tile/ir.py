"""The tile language: what one kernel computes, as expressions over a two-dimensional space of rows and columns.

An expression is a node of a graph: equal expressions are one object (:class:`Exprs` makes them), so that common
subexpressions need no pass. Indices into buffers are sympy expressions of the space's symbols, in elements.

The type rule is part of the language: a floating-point load is widened to fp32, everything is computed in fp32, and a
store rounds to the type of its buffer. In between nothing is rounded, so a fused kernel is at least as accurate as the
graph it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import sympy
import torch

ROW, COL = sympy.Symbol("r", integer=True, nonnegative=True), sympy.Symbol("c", integer=True, nonnegative=True)
"""The row and the column of an element of the space. A flat space has columns only."""


class SpaceKind(StrEnum):
    """How a kernel walks its space: see :class:`Space`."""

    FLAT = "flat"
    ROWS = "rows"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Space:
    """The elements that a kernel visits.

    ``FLAT``: ``cols`` elements in any order. ``ROWS``: ``rows`` x ``cols``, a program holds whole rows, so that it can
    reduce along a row. ``FINISH``: ``cols`` results, each reduced over the ``rows`` partial results of another kernel.

    ``inner``: of a ``ROWS`` space whose rows lie in pieces of that many elements, a piece of every row after another: a
    channel of ``[N, C, H, W]`` is a row of ``N`` pieces of ``H * W``. None: a row lies in one piece.
    """

    kind: SpaceKind
    rows: sympy.Expr
    cols: sympy.Expr
    inner: sympy.Expr | None = None

    @property
    def numel(self) -> sympy.Expr:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that a kernel reads or writes: a name, a dtype, and how many elements it covers."""

    name: str
    dtype: torch.dtype
    numel: sympy.Expr

    @property
    def bytes(self) -> sympy.Expr:
        """Bytes of the whole buffer."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False, slots=True)
class Expr:
    """A value at every point of the space. ``kind`` is ``float`` (fp32), ``int`` (int64 or int32) or ``bool``."""

    kind: str
    symbols: frozenset[sympy.Symbol]

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The expressions this one is computed from."""
        return ()


@dataclass(frozen=True, eq=False, slots=True)
class Const(Expr):
    """A number."""

    value: float | int | bool


Through = tuple[tuple[sympy.Symbol, "Expr"], ...]
"""What stands for data in an index: a symbol, and the expression whose value it is."""


@dataclass(frozen=True, eq=False, slots=True)
class Index(Expr):
    """An index expression used as a value."""

    index: sympy.Expr
    through: Through = ()

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The values that the index depends on."""
        return tuple(e for _, e in self.through)


@dataclass(frozen=True, eq=False, slots=True)
class Bounded(Expr):
    """An integer from memory as an index: asserted to be from 0 to ``size - 1`` where ``mask`` holds.

    ``wraps``: negative numbers count from the end.
    """

    arg: Expr
    size: sympy.Expr
    wraps: bool
    mask: Expr | None = None

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The number and the mask."""
        return (self.arg,) if self.mask is None else (self.arg, self.mask)


@dataclass(frozen=True, eq=False, slots=True)
class Load(Expr):
    """An element of a buffer, widened to fp32 if it is floating point; 0 where ``mask`` is false."""

    buffer: Buffer
    index: sympy.Expr
    mask: Expr | None = None
    through: Through = ()

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The values that the index depends on, and the mask."""
        return tuple(e for _, e in self.through) + (() if self.mask is None else (self.mask,))

    @property
    def places(self) -> frozenset[sympy.Symbol]:
        """The symbols of the space on which the address depends, itself or through data."""
        return places(self.index).union(*(e.symbols for _, e in self.through))


@dataclass(frozen=True, eq=False, slots=True)
class Pointwise(Expr):
    """An operator of :data:`dscompile.codegen.tile.ops.KINDS` applied element by element."""

    op: str
    args: tuple[Expr, ...]

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The arguments."""
        return self.args


@dataclass(frozen=True, eq=False, slots=True)
class Cast(Expr):
    """A value converted to ``bool`` or ``int`` (towards zero), or an integer to ``float``; see the type rule."""

    arg: Expr

    @property
    def operands(self) -> tuple[Expr, ...]:
        """The argument."""
        return (self.arg,)


@dataclass(frozen=True, eq=False, slots=True)
class Reduce(Expr):
    """``sum``, ``max``, ``min`` or ``any`` of ``arg`` over one symbol of the space.

    Over :data:`COL` in a ``ROWS`` space it is the row's result. Over :data:`ROW` there, or over :data:`COL` in a
    ``FLAT`` space, it is what one program saw: a partial result, only good for a store.
    """

    how: str
    arg: Expr
    over: sympy.Symbol

    @property
    def operands(self) -> tuple[Expr, ...]:
        """What is reduced."""
        return (self.arg,)


@dataclass(frozen=True, eq=False, slots=True)
class Scan(Expr):
    """The sum of ``arg`` over the columns up to and including each one, in a ``ROWS`` space."""

    arg: Expr

    @property
    def operands(self) -> tuple[Expr, ...]:
        """What is added up."""
        return (self.arg,)


@dataclass(frozen=True, slots=True)
class Store:
    """Write ``value``, rounded to the buffer's dtype, at ``index``. ``partial``: one row of the buffer a program.

    Attributes:
        through: what stands for data in the index: then the store is a scatter. visits: of a scatter, the symbols whose
            every value is a store of its own. adds: add to what is there, atomically. start: what is to be there
            before the kernel runs; None if nothing needs to be.
    """

    buffer: Buffer
    index: sympy.Expr
    value: Expr
    partial: bool = False
    through: Through = ()
    visits: frozenset[sympy.Symbol] = frozenset()
    adds: bool = False
    start: float | None = None

    @property
    def scatters(self) -> bool:
        """Whether data decide where it writes, or it adds."""
        return self.adds or bool(self.through)

    @property
    def places(self) -> frozenset[sympy.Symbol]:
        """The symbols of the space on which the address depends, itself or through data, or that it visits."""
        return places(self.index).union(self.visits, *(e.symbols for _, e in self.through))


class Exprs:
    """Makes expressions; two calls with equal arguments give the same object."""

    def __init__(self) -> None:
        """Start empty."""
        self._made: dict[tuple[Any, ...], Expr] = {}
        self._data: dict[sympy.Symbol, Bounded] = {}

    def const(self, value: float | int | bool) -> Expr:
        """A number."""
        kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
        return self._make((Const, kind, repr(value)), lambda: Const(kind, frozenset(), value))

    def index(self, index: sympy.Expr) -> Expr:
        """An integer that is a function of the place."""
        if index.is_Integer:
            return self.const(int(index))
        through = self._through(index)
        symbols = places(index).union(*(e.symbols for _, e in through))
        return self._make((Index, index), lambda: Index("int", symbols, index, through))

    def place(self, arg: Expr, size: sympy.Expr, *, wraps: bool, mask: Expr | None = None) -> sympy.Symbol:
        """A symbol for an integer from memory, to be used in indices of a dimension of ``size``."""
        symbols = arg.symbols | (mask.symbols if mask is not None else frozenset())
        key = (Bounded, arg, size, wraps, mask)
        found = self._make(key, lambda: Bounded("int", symbols, arg, size, wraps, mask))
        assert isinstance(found, Bounded)
        for symbol, known in self._data.items():
            if known is found:
                return symbol
        symbol = sympy.Symbol(f"at{len(self._data)}", integer=True, nonnegative=True)
        self._data[symbol] = found
        return symbol

    @property
    def data_limits(self) -> dict[sympy.Symbol, sympy.Expr]:
        """How many values each symbol for data takes."""
        return {symbol: found.size for symbol, found in self._data.items()}

    def _through(self, index: sympy.Expr) -> Through:
        return tuple((s, self._data[s]) for s in sorted(index.free_symbols & self._data.keys(), key=str))

    def scatter(
        self, buffer: Buffer, index: sympy.Expr, value: Expr, visits: frozenset[sympy.Symbol], *, adds: bool,
        start: float | None,
    ) -> Store:  # fmt: skip
        """A store at a place that data decide."""
        return Store(buffer, index, value, False, self._through(index), visits, adds, start)

    def load(self, buffer: Buffer, index: sympy.Expr, mask: Expr | None = None) -> Expr:
        """An element of a buffer."""
        kind = "float" if buffer.dtype.is_floating_point else "bool" if buffer.dtype is torch.bool else "int"
        through = self._through(index)
        symbols = places(index).union(*(e.symbols for _, e in through), mask.symbols if mask is not None else ())
        return self._make((Load, buffer, index, mask), lambda: Load(kind, symbols, buffer, index, mask, through))

    def pointwise(self, op: str, kind: str, *args: Expr) -> Expr:
        """An operator applied element by element."""
        symbols = frozenset[sympy.Symbol]().union(*(a.symbols for a in args))
        return self._make((Pointwise, op, kind, *args), lambda: Pointwise(kind, symbols, op, args))

    def cast(self, kind: str, arg: Expr) -> Expr:
        """A conversion between kinds; none if the kind is right already."""
        if arg.kind == kind:
            return arg
        if isinstance(arg, Const):
            return self.const({"float": float, "int": int, "bool": bool}[kind](arg.value))
        return self._make((Cast, kind, arg), lambda: Cast(kind, arg.symbols, arg))

    def reduce(self, how: str, arg: Expr, over: sympy.Symbol) -> Expr:
        """A reduction over one symbol."""
        return self._make((Reduce, how, arg, over), lambda: Reduce(arg.kind, arg.symbols - {over}, how, arg, over))

    def scan(self, arg: Expr) -> Expr:
        """A running sum over the columns."""
        return self._make((Scan, arg), lambda: Scan(arg.kind, arg.symbols | {COL}, arg))

    def _make(self, key: tuple[Any, ...], make: Any) -> Expr:
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found


def places(index: sympy.Expr) -> frozenset[sympy.Symbol]:
    """The symbols of the space that an index depends on."""
    return frozenset(index.free_symbols & {ROW, COL})


@dataclass
class Tile:
    """One kernel, before a backend renders it.

    Attributes:
        space: what it visits. stores: what it writes, in order. programs: how many programs leave partial results.
        names: a readable name for some expressions (the FX node they stand for). nodes: the FX nodes it computes.
        order: position of each buffer's node in the graph, so that arguments stand in that order.
    """

    space: Space
    stores: list[Store]
    programs: int = 0
    names: dict[Expr, str] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    order: dict[str, int] = field(default_factory=dict)

    def expressions(self) -> Iterator[Expr]:
        """Every expression once, operands before what is computed from them."""
        seen: set[Expr] = set()
        for store in self.stores:
            for _, data in store.through:
                yield from _postorder(data, seen)
            yield from _postorder(store.value, seen)

    def reductions(self) -> list[Reduce]:
        """The reductions, inner ones first."""
        return [e for e in self.expressions() if isinstance(e, Reduce)]

    @property
    def along_rows(self) -> bool:
        """Whether a program must hold the whole row: it reduces it or adds it up."""
        return any(isinstance(e, Scan) or (isinstance(e, Reduce) and e.over == COL) for e in self.expressions())

    def loads(self) -> list[Load]:
        """The loads."""
        return [e for e in self.expressions() if isinstance(e, Load)]


def _postorder(root: Expr, seen: set[Expr]) -> Iterator[Expr]:
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        expr, done = stack.pop()
        if done:
            yield expr
        elif expr not in seen:
            seen.add(expr)
            stack.append((expr, True))
            stack += [(operand, False) for operand in reversed(expr.operands)]
