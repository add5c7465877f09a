"""Render a tile as one Triton file: readable, self-contained, with a header that says what it computes and moves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import sympy
import torch

from dscompile.codegen.tile.cost import bytes_read, bytes_written
from dscompile.codegen.tile.indexing import Div
from dscompile.codegen.tile.ir import (
    COL,
    ROW,
    Bounded,
    Buffer,
    Expr,
    Index,
    Load,
    Reduce,
    SpaceKind,
    Store,
    Tile,
    places,
)
from dscompile.codegen.tile.schedule import Hints, Schedule, hint, in_step
from dscompile.codegen.triton_backend.body import HELPERS, IDENTITY, TYPES, Body
from dscompile.codegen.triton_backend.kernel import Kernel

_PROGRAM = sympy.Symbol("program", integer=True, nonnegative=True)
WIDE = 2**31


def render(tile: Tile, schedule: Schedule, name: str, hints: Hints | None = None) -> Kernel:
    """The Triton kernel of a tile."""
    return _Render(tile, schedule, name, hints or {}).kernel()


class _Render:
    def __init__(self, tile: Tile, schedule: Schedule, name: str, hints: Hints) -> None:
        self.tile = tile
        self.schedule = schedule
        self.name = name
        self.hints = hints
        loaded = dict.fromkeys(load.buffer for load in tile.loads())
        self.reads: tuple[Buffer, ...] = tuple(sorted(loaded, key=lambda b: tile.order.get(b.name, 0)))
        self.writes: tuple[Buffer, ...] = tuple(dict.fromkeys(s.buffer for s in tile.stores))
        self.flat = tile.space.kind is SpaceKind.FLAT
        self.extra = sorted(self._symbols(), key=str)
        self.wide = "" if self._narrow() else ".to(tl.int64)"
        self.loop = self._loop_symbol()
        self.body = Body(self._places(), self._masks(), tile.names, self._moving, self._reserved())
        self.body.reduce = self._reduce
        self.lines: list[str] = []

    # -- what surrounds the body ---------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        self._prologue()
        if self.tile.programs:
            self._accumulating()
        elif self.schedule.persistent:
            self._at_once()
        else:
            self._in_passes()
        moved = bytes_read(self.tile, self.schedule, self.hints) + bytes_written(self.tile, self.hints)
        ideal = sum(hint(b.bytes, self.hints) for b in (*self.reads, *self.writes))
        sizes = [(self._length(), self._count()), *((s.name, s) for s in self.extra)]
        return Kernel(
            self.name,
            self._source(moved, ideal),
            self.reads,
            self.writes,
            tuple(sizes),
            self._constants(),
            self._grid(),
            warps=self.schedule.warps,
            bytes=moved,
            ideal=ideal,
            nodes=self.tile.nodes,
            kind="finish" if self.tile.space.kind is SpaceKind.FINISH else "row",
            scalars=self._scalars(),
            checks=any(isinstance(e, Bounded) for e in self.tile.expressions()),
            starts={s.buffer.name: s.start for s in self.tile.stores if s.start is not None},
            adds=any(s.adds for s in self.tile.stores),
        )

    def _scalars(self) -> tuple[int, int]:
        """Loads and stores of one value: of a row, of a program, or of a thread where neighbours' lie apart.

        And those of which a thread has less than 128 bits.
        """
        block = self.schedule

        def narrow(index: sympy.Expr, buffer: Buffer, moving: bool, rows: int = block.row_block) -> int:
            if not moving:
                return rows
            each = -(-rows * block.col_block // (32 * block.warps))
            return each if not in_step(index) else int(each * buffer.dtype.itemsize < 16)

        loads = sum(narrow(load.index, load.buffer, COL in load.places) for load in self.tile.loads())
        rows = {s: 1 if s.partial else block.row_block for s in self.tile.stores}
        return loads, sum(narrow(s.index, s.buffer, COL in s.places, n) for s, n in rows.items())

    def _source(self, moved: int, ideal: int) -> str:
        space = self.tile.space
        what = {
            SpaceKind.FLAT: f"pointwise over {space.cols} elements",
            SpaceKind.ROWS: f"{space.rows} rows of {space.cols}"
            + (f" in pieces of {space.inner}" if space.inner else ""),
            SpaceKind.FINISH: f"{space.cols} results from {space.rows} partial ones each",
        }[space.kind]
        how = "" if self.schedule.persistent else f", in {self.schedule.passes} passes over a row"
        how += f", {self.tile.programs} programs leave partial results" if self.tile.programs else ""
        loads = ", ".join(f"{b.name} {_dtype(b)}[{b.numel}]" for b in self.reads)
        stores = ", ".join(f"{b.name} {_dtype(b)}[{b.numel}]" for b in self.writes)
        head = [f"{self.name}: {what}{how}.", ""]
        adds = ", ".join(s.buffer.name for s in self.tile.stores if s.adds)
        titles = [("reads", loads), ("writes", stores), ("computes", " ".join(self.tile.nodes))]
        titles += [("adds, in no fixed order", adds)] * bool(adds)
        for title, text in titles:
            head += textwrap.wrap(f"{title}: {text}", 110, subsequent_indent="    ", break_long_words=False)
        examples = ", ".join(f"{s} = {hint(s, self.hints)}" for s in sorted(self._sizes(), key=str))
        moves = f"moves: {moved} bytes; every input and output once: {ideal}"
        head.append(f"{moves} (if {examples})" if examples else moves)
        helpers = [f"\n\n{HELPERS[h]}" for h in sorted(self.body.helpers)]
        arguments = [f"{b.name}_ptr" for b in (*self.reads, *self.writes)]
        arguments += [self._length(), *(s.name for s in self.extra)]
        arguments += [f"{c}: tl.constexpr" for c in self._constants()]
        body = textwrap.indent("\n".join(self.lines), "    ")
        joined = textwrap.fill(
            ", ".join(arguments).replace(": ", ":~"), 110, initial_indent="    ", subsequent_indent="    ",
            break_long_words=False,
        ).replace(":~", ": ")  # fmt: skip
        return (
            '"""' + "\n".join(head) + '\n"""\n\nimport triton\nimport triton.language as tl\n' + "".join(helpers)
            + f"\n\n@triton.jit\ndef {self.name}(\n{joined},\n):\n{body}\n"
        )  # fmt: skip

    def _constants(self) -> dict[str, int | bool | float | str]:
        constants: dict[str, int | bool | float | str] = {}
        if self.flat:
            constants["BLOCK"] = self.schedule.col_block
        else:
            if self.tile.space.cols.is_Integer:
                constants["COLS"] = int(self.tile.space.cols)
            constants |= {"ROW_BLOCK": self.schedule.row_block, "COL_BLOCK": self.schedule.col_block}
        if self.tile.programs:
            constants["PROGRAMS"] = self.tile.programs
        return constants

    def _grid(self) -> tuple[sympy.Expr, ...]:
        rows, cols = self.tile.space.rows, self.tile.space.cols
        blocks = Div(cols + self.schedule.col_block - 1, sympy.Integer(self.schedule.col_block))
        if self.tile.programs:
            return (sympy.Integer(self.tile.programs),) + (() if self.flat else (blocks,))
        if self.tile.space.kind is not SpaceKind.ROWS:
            return (blocks,)
        return (Div(rows + self.schedule.row_block - 1, sympy.Integer(self.schedule.row_block)),)

    def _length(self) -> str:
        return "numel" if self.flat else "rows"

    def _count(self) -> sympy.Expr:
        return self.tile.space.cols if self.flat else self.tile.space.rows

    def _symbols(self) -> set[sympy.Symbol]:
        indices = [load.index for load in self.tile.loads()] + [s.index for s in self.tile.stores]
        indices += [e.index for e in self.tile.expressions() if hasattr(e, "index")]
        if not self.flat and not self.tile.space.cols.is_Integer:
            indices.append(self.tile.space.cols)
        checked = [e for e in self.tile.expressions() if isinstance(e, Bounded)]
        indices += [e.size for e in checked]
        data = {s for e in self.tile.expressions() if isinstance(e, (Load, Index)) for s, _ in e.through}
        data |= {s for store in self.tile.stores for s, _ in store.through}
        return set().union(*(i.free_symbols for i in indices)) - {ROW, COL, _PROGRAM} - data

    def _sizes(self) -> set[sympy.Symbol]:
        """The symbolic sizes that decide how many bytes are moved."""
        return set().union(*(b.numel.free_symbols for b in (*self.reads, *self.writes)))

    def _narrow(self) -> bool:
        """Whether every offset fits 32 bits for sure."""
        sizes = [b.numel for b in (*self.reads, *self.writes)]
        return all(s.is_Integer and s < WIDE for s in sizes)

    def _reserved(self) -> set[str]:
        names = {f"{b.name}_ptr" for b in (*self.reads, *self.writes)} | {s.name for s in self.extra} | set(HELPERS)
        return names | {self.name, "numel", "rows", "program", "start", "tl", "triton", "sum", "max", "min", "any"}

    # -- places, masks, scopes -----------------------------------------------------------------------------------------

    def _places(self) -> dict[sympy.Symbol, str]:
        if self.flat:
            return {COL: "i"}
        return {ROW: "p" if self.tile.space.kind is SpaceKind.FINISH else "r", COL: "c"}

    def _masks(self) -> dict[sympy.Symbol, str]:
        if self.flat:
            return {COL: "inside"}
        masks = {}
        finish = self.tile.space.kind is SpaceKind.FINISH
        if self.schedule.row_block > 1 and not (finish and self.schedule.row_block == self.tile.space.rows):
            masks[ROW] = "row_inside"
        if self.tile.space.cols % self.schedule.col_block != 0:
            masks[COL] = "col_inside"
        return masks

    def _loop_symbol(self) -> sympy.Symbol | None:
        if self.tile.programs:
            return COL if self.flat else ROW
        return None if self.schedule.persistent else COL

    def _moving(self, expr: Expr) -> bool:
        return self.loop is not None and self.loop in expr.symbols

    def _prologue(self) -> None:
        block = self.schedule
        columns = f"tl.arange(0, {'BLOCK' if self.flat else 'COL_BLOCK'})"
        if self.flat:
            if not self.tile.programs:
                self.lines += [f"i = tl.program_id(0){self.wide} * BLOCK + {columns}", "inside = i < numel"]
            return
        finish = self.tile.space.kind is SpaceKind.FINISH
        rows = "tl.arange(0, ROW_BLOCK)[:, None]"
        if finish:
            self.lines.append(f"p = {rows}{self.wide}")
        elif not self.tile.programs:
            self.lines.append(f"r = tl.program_id(0){self.wide} * ROW_BLOCK + {rows}")
        if ROW in self.body.masks and not self.tile.programs:
            self.lines.append(f"row_inside = {self._places()[ROW]} < rows")
        if block.persistent:
            first = "tl.program_id(0)" if finish else "tl.program_id(1)" if self._col_blocks() else ""
            self.lines.append(f"c = {first} * COL_BLOCK + {columns}[None, :]" if first else f"c = {columns}[None, :]")
            if COL in self.body.masks:
                self.lines.append(f"col_inside = c < {self._cols()}")

    def _col_blocks(self) -> bool:
        cols = self.tile.space.cols
        return bool(self.tile.programs) and not (cols.is_Integer and cols <= self.schedule.col_block)

    def _cols(self) -> str:
        return "COLS" if self.tile.space.cols.is_Integer else self.body.index(self.tile.space.cols)

    # -- the three shapes of a body ------------------------------------------------------------------------------------

    def _at_once(self) -> None:
        """No loop: everything is in one block."""
        for store in self.tile.stores:
            self._store(store)
        self.lines += self.body.outer.lines

    def _accumulating(self) -> None:
        """A loop over rows (or flat blocks), with an accumulator for each partial result."""
        partial = [s for s in self.tile.stores if s.partial]
        accumulators: list[tuple[Store, Reduce, str]] = []
        start: list[str] = []
        shape = "[BLOCK]" if self.flat else "[ROW_BLOCK, COL_BLOCK]"
        for store in partial:
            found = store.value
            assert isinstance(found, Reduce)
            name = self.body.name(f"{self.tile.names.get(found, 'sum')}_acc")
            start.append(f"{name} = tl.full({shape}, {_identity(found)}, {_accumulator(found)})")
            accumulators.append((store, found, name))
        body = self.body
        for store in self.tile.stores:
            if not store.partial:
                self._store(store)
        for _, found, name in accumulators:
            value = self._masked(found, found.arg)
            body.inner.lines.append(f"{name} = {body.combine(found.how, name, value)}")
        if self.flat:
            step, place = "BLOCK", f"i = start + tl.arange(0, BLOCK){self.wide}"
            masks = ["inside = i < numel"]
        else:
            step, place = "ROW_BLOCK", f"r = start + tl.arange(0, ROW_BLOCK)[:, None]{self.wide}"
            masks = ["row_inside = r < rows"] if ROW in body.masks else []
        length = self._length()
        self.lines += ["program = tl.program_id(0)", *body.outer.lines, *start]
        self.lines.append(f"for start in range(program * {step}, {length}, PROGRAMS * {step}):")
        self.lines += [f"    {line}" for line in [place, *masks, *body.inner.lines]]
        for store, found, name in accumulators:
            self.lines += self._partial_store(store, found, name)

    def _partial_store(self, store: Store, found: Reduce, name: str) -> list[str]:
        body = self.body
        pointer = body.pointer(store.buffer, store.index)
        result = body.across(found.how, name, 0)
        if store.buffer.dtype in (torch.float16, torch.bfloat16):
            result = f"{result}.to({TYPES[store.buffer.dtype]})"  # one program: this is the result itself
        if self.flat:
            return [f"tl.store({pointer}, {result.replace(', keep_dims=True', '')})"]
        pointer += " + c" if COL not in store.index.free_symbols else ""  # one column: a block of one address
        mask = body.mask(frozenset({COL}))
        return [f"tl.store({pointer}, {result}{', mask=' + mask if mask else ''})"]

    def _in_passes(self) -> None:
        """A loop over the columns for each level of reductions, and one for what is stored."""
        levels = self.schedule.levels
        for level in range(max(levels.values(), default=-1) + 1):
            self._pass([r for r, at in levels.items() if at == level])
        stores = [s for s in self.tile.stores if COL in s.value.symbols or COL in s.places]
        for store in self.tile.stores:
            if store not in stores:
                self._store(store)
        self._flush()
        if stores:
            for store in stores:
                self._store(store)
            self._flush(loop=True)

    def _pass(self, reductions: Sequence[Reduce]) -> None:
        from dscompile.codegen.triton_backend.online import online

        body = self.body
        start: list[str] = []
        after: list[str] = []
        partners = {a: b for b, a in self.schedule.online.items()}
        for found in reductions:
            if found in self.schedule.online:
                continue  # made with its partner
            if found in partners:
                pair = online(body, found, partners[found], self._masked(found, found.arg, fill=False))
                start, after = start + pair.start, after + pair.after
                body.inner.lines += pair.turn
                continue
            acc = body.name(f"{self.tile.names.get(found, found.how)}_acc")
            start.append(f"{acc} = tl.full([ROW_BLOCK, COL_BLOCK], {_identity(found)}, {_accumulator(found)})")
            body.inner.lines.append(f"{acc} = {body.combine(found.how, acc, self._masked(found, found.arg))}")
            name = body.name(self.tile.names.get(found, found.how))
            after.append(f"{name} = {body.across(found.how, acc, 1)}" + _as_bool(found))
            body.results[found] = name
        self._flush(start, loop=True)
        self.lines += after

    def _flush(self, start: Sequence[str] = (), *, loop: bool = False) -> None:
        """Move the lines written so far to the kernel: those outside the loop, then the loop."""
        body = self.body
        self.lines += [*body.outer.lines, *start]
        body.outer.lines = []
        if not loop:
            return
        turn = ["c = start + tl.arange(0, COL_BLOCK)[None, :]"]
        turn += [f"col_inside = c < {self._cols()}"] if COL in body.masks else []
        self.lines.append(f"for start in range(0, {self._cols()}, COL_BLOCK):")
        self.lines += [f"    {line}" for line in [*turn, *body.inner.lines]]
        body.inner.lines, body.inner.names = [], {}

    # -- statements ----------------------------------------------------------------------------------------------------

    def _store(self, store: Store) -> None:
        body, space = self.body, self.tile.space
        value = body.value(store.value)
        symbols = frozenset(store.places & set(body.places))
        pointer = body.pointer(store.buffer, store.index, store.through)
        spread = [body.places[s] for s in (ROW, COL) if s in store.visits and s not in self._held(store)]
        pointer += "".join(f" + 0*{place}" for place in spread)  # an address for every value that is stored
        if not symbols:  # a single element: the block of addresses must have the rank of the value
            lonely = COL if self.flat or space.kind is SpaceKind.FINISH else ROW
            pointer, symbols = f"{pointer} + {body.places[lonely]}", frozenset({lonely})
        mask = body.mask(symbols)
        dtype = store.buffer.dtype
        if store.value.kind == "float" and TYPES[dtype] != "tl.float32" and dtype.is_floating_point:
            value = f"{value}.to({TYPES[dtype]})"
        scope = body.inner if self._moving(store.value) or (self.loop in symbols) else body.outer
        how = "tl.atomic_add({}, {}{}, sem='relaxed')" if store.adds else "tl.store({}, {}{})"
        scope.lines.append(how.format(pointer, value, f", mask={mask}" if mask else "").replace("'", '"'))

    @staticmethod
    def _held(store: Store) -> frozenset[sympy.Symbol]:
        """The symbols with which a scatter's address changes."""
        return places(store.index).union(*(e.symbols for _, e in store.through))

    def _masked(self, found: Reduce, arg: Expr, *, fill: bool = True) -> str:
        """The operand of a reduction, with the identity outside the tensor."""
        value = self.body.value(arg)
        if found.how == "any":
            value = f"{value}.to(tl.int32)"
        elif found.how == "sum" and found.kind == "int":
            value = f"{value}.to(tl.int64)"
        needed = frozenset({found.over}) if not self.tile.programs or self.flat else frozenset({ROW, COL})
        mask = self.body.mask(needed)
        if not fill or not (mask or found.over not in arg.symbols):
            return value
        everywhere = mask or f"{self.body.places[found.over]} >= 0"
        return f"tl.where({everywhere}, {value}, {_identity(found)})"

    def _reduce(self, found: Reduce) -> str:
        """A reduction inside one block."""
        axis = 0 if found.over == ROW else 1
        return self.body.across(found.how, self._masked(found, found.arg), axis) + _as_bool(found)


def _as_bool(found: Reduce) -> str:
    return " != 0" if found.how == "any" else ""


def _identity(found: Reduce) -> str:
    return "0" if found.how == "sum" and found.kind == "int" else IDENTITY[found.how]


def _accumulator(found: Reduce) -> str:
    return "tl.int32" if found.how == "any" else "tl.int64" if found.kind == "int" else "tl.float32"


def _dtype(buffer: Buffer) -> str:
    return str(buffer.dtype).removeprefix("torch.")
