"""What a kernel costs: the bytes it moves between memory and the chip, read off the tile language.

A buffer that every program reads (a bias, a weight) counts once: it stays in cache. A row that does not fit on the chip
counts once for each pass over it.
"""

from __future__ import annotations

import sympy

from dscompile.codegen.tile.ir import COL, ROW, Buffer, Expr, Load, Reduce, Store, Tile
from dscompile.codegen.tile.schedule import Hints, Schedule, hint


def bytes_read(tile: Tile, schedule: Schedule, hints: Hints) -> int:
    """Bytes loaded."""
    limits = {ROW: tile.space.rows, COL: tile.space.cols}
    touched: dict[Buffer, int] = {}
    for load in tile.loads():
        elements = sympy.Mul(*(limits[s] for s in load.places if s in limits))
        often = passes_of(load, tile, schedule) if COL in load.symbols else 1
        found = min(hint(elements, hints), hint(load.buffer.numel, hints)) * often
        most = hint(load.buffer.numel, hints) * max(schedule.passes, 1)
        touched[load.buffer] = min(touched.get(load.buffer, 0) + found, most)
    return sum(n * b.dtype.itemsize for b, n in touched.items())


def bytes_written(tile: Tile, hints: Hints) -> int:
    """Bytes stored; of a scatter also what its buffer is filled with first, and what adding reads."""
    return sum(_stored(s, tile, hints) for s in tile.stores)


def _stored(store: Store, tile: Tile, hints: Hints) -> int:
    whole = hint(store.buffer.bytes, hints)
    if not store.scatters:
        return whole
    limits = {ROW: tile.space.rows, COL: tile.space.cols}
    visited = hint(sympy.Mul(*(limits[s] for s in store.visits)), hints) * store.buffer.dtype.itemsize
    visited = min(visited, whole)  # as of a gather: an element that many add to stays in cache
    return whole * (store.start is not None) + visited * (2 if store.adds else 1)


def tile_bytes(tile: Tile, schedule: Schedule, hints: Hints) -> int:
    """Bytes moved."""
    return bytes_read(tile, schedule, hints) + bytes_written(tile, hints)


def passes_of(load: Load, tile: Tile, schedule: Schedule) -> int:
    """In how many passes over the row a load is needed."""
    if schedule.persistent:
        return 1
    return len({level for level, reached in _reached(tile, schedule).items() if load in reached})


def _reached(tile: Tile, schedule: Schedule) -> dict[int, set[Expr]]:
    """For each pass, what it computes: down to the results of earlier passes."""
    out: dict[int, set[Expr]] = {}
    roots = [(level, r.arg) for r, level in schedule.levels.items()]
    last = max(schedule.levels.values(), default=-1) + 1
    stored = [s for s in tile.stores if COL in s.places or COL in s.value.symbols]
    roots += [(last, e) for s in stored for e in (s.value, *(data for _, data in s.through))]
    for level, root in roots:
        stack, seen = [root], out.setdefault(level, set())
        while stack:
            expr = stack.pop()
            if expr in seen or (isinstance(expr, Reduce) and schedule.levels.get(expr, level) < level):
                continue
            seen.add(expr)
            stack += expr.operands
    return out
