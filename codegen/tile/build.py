"""Build one kernel from parts of operators, or say why they are none."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import fx

from dscompile.codegen.tile.flow import Flow, Part
from dscompile.codegen.tile.indexing import Div, contiguous, linear, product, simplify
from dscompile.codegen.tile.ir import COL, ROW, Buffer, Expr, Space, SpaceKind, Store, Tile
from dscompile.codegen.tile.ops import convert
from dscompile.codegen.tile.reductions import Along, Reduction, operator_name
from dscompile.codegen.tile.scatter import Scatter
from dscompile.codegen.tile.schedule import PERSISTENT, PROGRAMS, programs
from dscompile.codegen.tile.sizes import shape_of, size
from dscompile.codegen.tile.values import SCANS, Place, RefusedError, Values, buffer_of

__all__ = ["Builder", "Part"]

_SHORT = 64
"""A row of fewer elements is not worth a row of its own in a block."""

_PROGRAM = sympy.Symbol("program", integer=True, nonnegative=True)


class Builder:
    """Makes tiles for one graph."""

    def __init__(self, flow: Flow, *, columns_apart: bool = False) -> None:
        """Give every two-kernel reduction its buffer of partial results, and scatters apart that of their sums."""
        self.flow = flow
        self.columns_apart = columns_apart
        self.partials = {
            node: Buffer(
                f"{node.name}_partial", _partial_dtype(found), programs(found.rows, found.cols) * _results(found)
            )
            for node, found in flow.reductions.items()
            if found.partial
        }
        self.partials |= {
            node: Buffer(f"{node.name}_sums", stores.dtype, product(shape_of(node)))
            for node, stores in flow.scatters.items()
            if stores.apart
        }
        self._positions = {node.name: flow.order(node) for node in flow.graph.nodes}
        self._positions |= {b.name: flow.order(node) for node, b in self.partials.items()}

    def tile(self, parts: frozenset[Part], copies: frozenset[fx.Node], needed: frozenset[fx.Node]) -> Tile:
        """The kernel that computes ``parts`` and stores ``needed``.

        Raises:
            RefusedError: no single kernel does that.
        """
        space = self._space(parts)
        tile = self._tile(space, parts, copies, needed)
        table = _as_table(tile)
        if table is None:
            return tile
        try:
            return self._tile(table, parts, copies, needed)
        except RefusedError:
            return tile

    def _tile(
        self, space: Space, parts: frozenset[Part], copies: frozenset[fx.Node], needed: frozenset[fx.Node]
    ) -> Tile:
        inside = frozenset(p.node for p in parts if not p.partial) | copies
        ended = self._ended(parts)
        if early := [p.node for p in parts if p.partial and p.node in self.flow.scatters and p.node in inside]:
            raise RefusedError(f"%{early[0].name} must be added up before anything can read it")
        values = Values(space, inside, self.flow.reductions, self.partials, self.flow.scatters)
        stores: list[Store] = []
        partial = False
        for part in sorted(parts, key=lambda p: p.order):
            stored = self.flow.scatters.get(part.node)
            if stored is not None and part.partial == stored.apart:
                stores.append(self._scatter(values, stored))
            elif part.partial:
                stores.append(self._partial_store(values, self.flow.reductions[part.node], part.node in ended))
                partial = True
            elif part.node in needed and part.node not in ended:
                stores.append(self._store(values, part.node))
        if not stores:
            raise RefusedError("nothing is stored")
        nodes = tuple(p.node.name for p in sorted(parts, key=lambda p: p.order))
        tile = Tile(
            space,
            stores,
            programs(space.rows, space.cols) if partial else 0,
            values.names,
            tuple(dict.fromkeys(nodes)),
            self._positions,
        )
        if self.columns_apart and partial and not all(s.partial for s in stores):
            raise RefusedError("sums over columns are kept apart")
        if self.columns_apart and space.inner is not None and any({COL} & (s.value.symbols | s.places) for s in stores):
            raise RefusedError("sums over channels are kept apart")
        if space.kind is SpaceKind.ROWS:
            self._check_rows(tile)
        if tile.programs and any(s.scatters and COL not in s.visits for s in tile.stores):
            raise RefusedError("programs that share a row would each scatter its values")
        return tile

    def _space(self, parts: frozenset[Part]) -> Space:
        """The one space in which every part can be computed."""
        spaces: set[Space] = set()
        ended = self._ended(parts)
        sizes: set[sympy.Expr] = set()
        for part in parts:
            found = self.flow.reductions.get(part.node)
            stores = self.flow.scatters.get(part.node)
            if stores is not None and part.partial == stores.apart:
                sizes.add(product(stores.shape))
            elif operator_name(part.node) in SCANS:
                shape = shape_of(part.node)
                spaces.add(Space(SpaceKind.ROWS, product(shape[:-1]), shape[-1]))
            elif found is None:
                sizes.add(product(shape_of(part.node)))
            elif part.node in ended and not part.partial:
                continue
            elif found.partial and not part.partial:
                spaces.add(Space(SpaceKind.FINISH, sympy.Integer(programs(found.rows, found.cols)), _results(found)))
            elif found.along is Along.ALL:
                spaces.add(Space(SpaceKind.FLAT, sympy.Integer(1), found.cols))
            else:
                spaces.add(Space(SpaceKind.ROWS, found.rows, found.cols, found.inner))
        if not spaces:
            whole = {s for s in sizes if not any(o != s and (o - s).is_positive for o in sizes)}
            if len(whole) > 1:
                raise RefusedError("their sizes cannot be compared")
            spaces.add(Space(SpaceKind.FLAT, sympy.Integer(1), whole.pop()))
        if len(spaces) > 1:
            kinds = {s.kind for s in spaces}
            if SpaceKind.FINISH in kinds and len(kinds) > 1:
                raise RefusedError("a reduction over all rows must end before its result is read")
            raise RefusedError("they walk " + " and ".join(sorted(map(_describe, spaces))))
        (space,) = spaces
        if space.numel == 0:
            raise RefusedError("it has no elements")
        return space

    def _ended(self, parts: frozenset[Part]) -> frozenset[fx.Node]:
        """Reductions over all rows whose first half is their result: one program sees everything."""
        halves = {p.node for p in parts if p.partial} & {p.node for p in parts if not p.partial}
        halves &= self.flow.reductions.keys()
        return frozenset(n for n in halves if self._by_one_program(self.flow.reductions[n]))

    def _by_one_program(self, found: Reduction) -> bool:
        value = found.node.meta["val"]
        plain = found.scale == 1.0 and found.count == 1 and not found.root and found.how != "any"
        return plain and bool(value.is_contiguous()) and programs(found.rows, found.cols) == 1

    def _check_rows(self, tile: Tile) -> None:
        """A program that sums over columns holds its row; it cannot walk a long one in blocks as well."""
        cols = tile.space.cols
        if tile.programs and tile.along_rows and not (cols.is_Integer and int(cols) <= PERSISTENT):
            raise RefusedError(f"a row of {cols} is too long to hold the sums of its columns")

    def _places(self, values: Values, node: fx.Node) -> list[Place]:
        """The indices at which the space can see a node: one element each, or one a row."""
        return self._places_of(values, shape_of(node), node)

    def _places_of(self, values: Values, shape: Sequence[sympy.Expr], node: fx.Node) -> list[Place]:
        found = []
        for attempt in (values.full, values.per_row):
            try:
                found.append(attempt(shape))
            except RefusedError as error:
                reason = error
        if not found:
            raise RefusedError(f"%{node.name}: {reason}")
        return found

    def _store(self, values: Values, node: fx.Node) -> Store:
        strides = [size(s) for s in node.meta["val"].stride()]
        reason: RefusedError | None = None
        for place in self._places(values, node):
            try:
                value = values.at(node, place)
                return Store(buffer_of(node), simplify(linear(place, strides), values.limits), value)
            except RefusedError as error:
                reason = error
        assert reason is not None
        raise reason

    def _scatter(self, values: Values, found: Scatter) -> Store:
        """The store of every element of a scatter's values, at the place that data decide."""
        node, whole = found.node, values.space
        place = self._places_of(values, found.shape, node)[0]
        rows = whole.kind is SpaceKind.ROWS and product(found.shape) == whole.rows and whole.cols != 1
        visits = {s for s, n in ((ROW, whole.rows), (COL, whole.cols)) if n != 1}
        visits &= {ROW} if rows else {ROW, COL} if whole.kind is SpaceKind.ROWS else {COL}
        value = found.value(values, place)
        strides = contiguous(shape_of(node)) if found.apart else [size(s) for s in node.meta["val"].stride()]
        index = simplify(linear(found.place(values, place), strides), values.limits)
        buffer = self.partials[node] if found.apart else buffer_of(node)
        value = convert(values.exprs, value, found.dtype)
        return values.exprs.scatter(buffer, index, value, frozenset(visits), adds=found.adds, start=found.start)

    def _partial_store(self, values: Values, found: Reduction, ended: bool) -> Store:
        place = values.full(shape_of(found.node.args[0]))  # type: ignore[arg-type]
        over = COL if found.along is Along.ALL else ROW
        operand = values.reduced_operand(found, place)
        result: Expr = values.exprs.reduce(found.how, operand, over)
        values.names.setdefault(result, found.node.name)
        index = sympy.Integer(0) if found.along is Along.ALL or found.cols == 1 else COL
        if ended:
            return Store(buffer_of(found.node), index, result, partial=True)
        return Store(self.partials[found.node], _PROGRAM * _results(found) + index, result, partial=True)


def _as_table(tile: Tile) -> Space | None:
    """A flat kernel that loads one value per row of a table walks rows instead: it loads each once, not per element."""
    if tile.space.kind is not SpaceKind.FLAT or tile.programs:
        return None
    lengths = {q.args[1] for load in tile.loads() for q in load.index.atoms(Div) if q.args[0] == COL}
    for length in lengths:
        alone = all(load.index.has(Div(COL, length)) or COL in load.index.free_symbols or not load.index.free_symbols
                    for load in tile.loads())  # fmt: skip
        rows = tile.space.cols / length
        enough = length.is_Integer and rows.is_Integer and (length <= PERSISTENT or rows >= PROGRAMS)
        fits = enough and length >= _SHORT
        once = any(COL in load.index.free_symbols and _by_row(load.index, length) for load in tile.loads())
        if alone and fits and once:
            return Space(SpaceKind.ROWS, rows, length)
    return None


def _by_row(index: sympy.Expr, length: sympy.Expr) -> bool:
    """Whether an index depends on the place by its row of ``length`` alone."""
    if index == COL:
        return False
    if isinstance(index, Div) and index.args == (COL, length):
        return True
    return all(_by_row(a, length) for a in index.args)


def _results(found: Reduction) -> sympy.Expr:
    return sympy.Integer(1) if found.along is Along.ALL else found.cols


def _partial_dtype(found: Reduction) -> torch.dtype:
    dtype = found.node.meta["val"].dtype
    if found.how == "any":
        return torch.int32
    return torch.float32 if dtype.is_floating_point else torch.int64


def _describe(space: Space) -> str:
    if space.kind is SpaceKind.ROWS:
        pieces = "" if space.inner is None else f" in pieces of {space.inner}"
        return f"{space.rows} rows of {space.cols}{pieces}"
    return f"{space.cols} {'results' if space.kind is SpaceKind.FINISH else 'elements'}"
