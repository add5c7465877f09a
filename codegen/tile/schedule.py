"""How many rows and columns a program takes at a time, and how often it goes over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from dscompile.codegen.tile.indexing import Div, Rem
from dscompile.codegen.tile.ir import COL, Const, Expr, Pointwise, Reduce, SpaceKind, Tile

PERSISTENT = 16384
"""Most columns that a program holds at once (64 KiB in fp32); longer rows are walked in blocks of :data:`LOOPED`."""
LOOPED = 2048
ELEMENTS = 1024
"""Elements of a block, where the row does not decide: 8 a thread with four warps, 16 bytes of a 16-bit type."""
WINDOW = 8
"""Loads of elements that lie apart from which on a thread has half as many: each keeps addresses and masks."""
PROGRAMS = 128
"""Programs that leave partial results: as many as a GPU has multiprocessors, about; more would only write more."""

Hints = Mapping[sympy.Symbol, int]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Blocks of ``row_block`` x ``col_block`` elements; ``passes`` > 1: the row does not fit, and is read that often.

    Attributes:
        persistent: the whole row is one block. programs: of a kernel that leaves partial results, else 0.
        warps: of 32 threads. levels: for each reduction along a row, in which pass its result is known.
    """

    row_block: int
    col_block: int
    persistent: bool
    programs: int
    warps: int
    passes: int
    levels: Mapping[Reduce, int]
    online: Mapping[Reduce, Reduce]


def power(n: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def hint(size: sympy.Expr, hints: Hints) -> int:
    """A size as a number; symbolic sizes take their hint, or 1024."""
    return int(size.xreplace({s: sympy.Integer(hints.get(s, 1024)) for s in size.free_symbols}))


def programs(rows: sympy.Expr, cols: sympy.Expr) -> int:
    """How many programs leave partial results of each column of a table: no more than there are blocks of rows.

    Rows too long to be held are cut into blocks of columns, which are programs too: the more of them, the fewer share
    a column. One alone leaves no partial result, but the result.
    """
    if not (rows * cols).is_Integer:
        return PROGRAMS
    if rows == 1:
        return min(PROGRAMS, -(-int(cols) // ELEMENTS))
    beside = -(-int(cols) // ELEMENTS) if cols > PERSISTENT else 1
    return min(-(-PROGRAMS // beside), -(-int(rows) // _row_block(int(rows), int(cols))))


def _row_block(rows: int, cols: int) -> int:
    return min(max(1, ELEMENTS // power(cols)), power(rows))


def schedule(tile: Tile, hints: Hints) -> Schedule:
    """Choose blocks from the shape of the space."""
    space = tile.space
    window = sum(not in_step(load.index) for load in tile.loads()) >= WINDOW
    if space.kind is SpaceKind.FLAT:
        return Schedule(1, ELEMENTS // 2 if window else ELEMENTS, True, tile.programs, 4, 1, {}, {})
    if space.kind is SpaceKind.FINISH:
        cols = min(power(hint(space.cols, hints)), 32)
        return Schedule(power(int(space.rows)), cols, True, 0, 4, 1, {}, {})
    cols = hint(space.cols, hints)
    along_rows = tile.along_rows
    persistent = bool(space.cols.is_Integer) and cols <= PERSISTENT
    cols = cols if persistent else max(cols, ELEMENTS)  # a block for every length that a symbol may take
    block = power(cols) if persistent and (along_rows or not tile.programs) else min(power(cols), LOOPED)
    if tile.programs and not along_rows:
        block, persistent = min(power(cols), ELEMENTS), True
    row_block = _row_block(hint(space.rows, hints), block)
    warps = min(max(power(row_block * block) // (128 if window else 256), 1), 16)
    if persistent:
        return Schedule(row_block, block, True, tile.programs, warps, 1, {}, {})
    online = online_pairs(tile)
    levels = _levels(tile, online)
    stored = max(levels.values(), default=-1) + 1 if _stores_rows(tile) else max(levels.values(), default=-1)
    return Schedule(1, block, False, tile.programs, min(block // 256, 16), stored + 1, levels, online)


def _stores_rows(tile: Tile) -> bool:
    """Whether anything but a result per row is stored."""
    return any(COL in s.value.symbols or COL in s.places for s in tile.stores)


def _levels(tile: Tile, online: Mapping[Reduce, Reduce]) -> dict[Reduce, int]:
    """In which pass over the row each reduction is made: after every reduction that its operand reads."""
    known: dict[Expr, int] = {}
    levels: dict[Reduce, int] = {}
    for expr in tile.expressions():
        below = max((known[o] for o in expr.operands), default=0)
        if isinstance(expr, Reduce):
            levels[expr] = levels[online[expr]] if expr in online else below
            below = levels[expr] + 1
        known[expr] = below
    return levels


def in_step(index: sympy.Expr) -> bool:
    """Whether the addresses of 16 columns that follow each other do so too, from a multiple of 16 elements on."""
    steps = 0
    for term in sympy.Add.make_args(index):
        factor, rest = term.as_coeff_Mul()
        if not term.has(COL) and factor % _TOGETHER == 0:
            continue
        if isinstance(rest, (Div, Rem)) and rest.args[1] % _TOGETHER == 0 and rest.args[0] == COL:
            together = factor == 1 if isinstance(rest, Rem) else factor % _TOGETHER == 0
        else:
            together = term == COL or (factor % _TOGETHER == 0 and isinstance(rest, Rem) and _whole(rest.args[0]))
        if not together:
            return False
        steps += factor == 1
    return steps == 1


_TOGETHER = 16
"""Elements that one thread, or two, access at once."""


def _whole(expr: sympy.Expr) -> bool:
    """Whether an index is the same for 16 columns that follow each other."""
    return isinstance(expr, Div) and expr.args[0] == COL and expr.args[1] % _TOGETHER == 0


def online_pairs(tile: Tile) -> dict[Reduce, Reduce]:
    """Reductions that can be made in the pass of another one that they read.

    A sum of ``exp(x - max(x))`` (Milakov and Gimelshein, 2018), and a sum of ``(x - mean(x))**2`` (Chan, Golub and
    LeVeque, 1979), each maps to the maximum, or to the sum behind the mean.
    """
    pairs: dict[Reduce, Reduce] = {}
    for expr in tile.reductions():
        if expr.how != "sum" or not isinstance(expr.arg, Pointwise):
            continue
        arg = expr.arg
        if arg.op == "exp" and (found := _centred(arg.args[0], "max")):
            pairs[expr] = found
        if arg.op == "mul" and arg.args[0] is arg.args[1] and (found := _centred(arg.args[0], "sum")):
            pairs[expr] = found
    return {b: a for b, a in pairs.items() if list(pairs.values()).count(a) == 1 and not _inner_reductions(a)}


def _centred(expr: Expr, how: str) -> Reduce | None:
    """The reduction of ``x`` in ``x - max(x)`` or ``x - sum(x) / n``."""
    if not isinstance(expr, Pointwise) or expr.op != "sub":
        return None
    x, middle = expr.args
    if how == "sum":
        if not (isinstance(middle, Pointwise) and middle.op == "mul" and isinstance(middle.args[1], Const)):
            return None
        middle = middle.args[0]
    return middle if isinstance(middle, Reduce) and middle.how == how and middle.arg is x else None


def _inner_reductions(expr: Reduce) -> bool:
    stack: list[Expr] = list(expr.operands)
    while stack:
        found = stack.pop()
        if isinstance(found, Reduce):
            return True
        stack += found.operands
    return False
