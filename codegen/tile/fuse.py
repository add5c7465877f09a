"""Fusion: an FX graph as few kernels, each of which moves fewer bytes than its parts would.

Every operator starts as a kernel of its own. Two kernels become one if one program can compute both, if no other kernel
would have to run between them, and if that moves fewer bytes (or as many in one launch less). The tile builder is the
oracle: it makes the kernel, or says why it cannot. Every refusal is kept, with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from dscompile.codegen.tile.build import Builder, Part
from dscompile.codegen.tile.cost import tile_bytes
from dscompile.codegen.tile.flow import Flow
from dscompile.codegen.tile.ir import Tile
from dscompile.codegen.tile.schedule import Hints, Schedule, hint, schedule
from dscompile.codegen.tile.values import RefusedError, buffer_of

_STEP = 32
"""Neighbours are looked for by values of at least 1/32, 1/1024, ... of the largest, and in the end by all."""


class WhyNot(NamedTuple):
    """Two neighbours that did not become one kernel (or one operator that is none), and why."""

    left: str
    right: str
    reason: str


@dataclass(frozen=True)
class Group:
    """Parts of operators computed by one kernel; ``copies`` are computed here although another kernel does, too."""

    parts: frozenset[Part]
    copies: frozenset[fx.Node] = frozenset()

    @property
    def label(self) -> str:
        """Names of the first and last operator."""
        names = [p.node.name for p in sorted(self.parts, key=lambda p: p.order)]
        return names[0] if len(set(names)) == 1 else f"{names[0]}..{names[-1]}"


@dataclass
class Fused:
    """The result: kernels in an order in which they can run, operators left to PyTorch, and every refusal."""

    kernels: list[tuple[Group, Tile, Schedule, int]] = field(default_factory=list)
    order: list[Group | fx.Node] = field(default_factory=list)
    refusals: list[WhyNot] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes that all kernels move."""
        return sum(moved for *_, moved in self.kernels)


def fuse(graph: fx.Graph, hints: Hints | None = None, *, columns_apart: bool = False) -> Fused:
    """Fuse a functional, decomposed aten graph.

    Args:
        graph: every node carries ``meta["val"]``; strides of outputs are those of the fake values.
        hints: numbers for symbolic sizes, used in costs only.
        columns_apart: keep sums over columns, and over rows that lie in pieces, out of kernels that store more than
            sums: what a compiler without one-pass backward and batch norm does.
    """
    return _Fusion(graph, hints or {}, columns_apart).run()


class _Fusion:
    def __init__(self, graph: fx.Graph, hints: Hints, columns_apart: bool) -> None:
        self.flow = Flow(graph)
        self.hints = hints
        self.builder = Builder(self.flow, columns_apart=columns_apart)
        self.groups: list[Group] = [Group(frozenset({p})) for p in self.flow.parts]
        self.refusals: dict[tuple[Group, Group], str] = {}
        self._sizes: dict[object, int] = {
            node: hint(buffer_of(node).bytes, self.hints)
            for node in graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
        }
        self.beside = False  # last, so that no kernel is taken from a neighbour with which it shares bytes
        self._costs: dict[
            tuple[frozenset[Part], frozenset[fx.Node], frozenset[fx.Node]], tuple[Tile, Schedule, int]
        ] = {}

    def run(self) -> Fused:
        self._drop_impossible()
        for floor in self._floors():
            while self._sweep(floor):
                pass
        self._copy()
        self._inline()
        while self._sweep():  # a copy can make two kernels independent of each other
            pass
        self.beside = True
        while self._sweep():
            pass
        self._drop_unread()
        return self._result()

    def _drop_impossible(self) -> None:
        """An operator that is not even a kernel by itself is left to PyTorch."""
        for group in list(self.groups):
            try:
                self._cost(group)
            except RefusedError as error:
                (part,) = group.parts
                self.flow.leave(part.node, str(error))
        self.groups = [g for g in self.groups if not any(p.node in self.flow.left for p in g.parts)]

    # -- merging -------------------------------------------------------------------------------------------------------

    def _floors(self) -> list[int]:
        """Large values first: a merge for a small one must not come between two kernels that read a large one."""
        found = [max(self._sizes.values(), default=0) // _STEP]
        while found[-1]:
            found.append(found[-1] // _STEP)
        return found

    def _sweep(self, floor: int = 0) -> bool:
        """One walk over all neighbours that share a value of at least ``floor`` bytes; True if any two were merged."""
        merged = False
        index = 0
        while index < len(self.groups):
            group = self.groups[index]
            for other in self._neighbours(group, floor):
                if self._merge(group, other):
                    merged = True
                    break
            else:
                index += 1
        return merged

    def _neighbours(self, group: Group, floor: int) -> Iterator[Group]:
        """Groups that share something with this one; in the end, also those that read results of the same kernel."""
        mine = frozenset(t for t in self.flow.touched(group.parts) if not floor or self._sizes.get(t, 0) >= floor)
        makers = self._makers(group) if self.beside else set()
        for other in self.groups:
            if other is group:
                continue
            if mine & self.flow.touched(other.parts) or (makers and makers & self._makers(other)):
                yield other

    def _makers(self, group: Group) -> set[int]:
        reads = self.flow.reads(group.parts, group.copies)
        return {id(other) for other in self.groups if any(p.node in reads for p in other.parts if not p.partial)}

    def _merge(self, left: Group, right: Group) -> bool:
        key = (left, right)  # with their copies: those may have made what is between them needless
        if key in self.refusals or (right, left) in self.refusals:
            return False
        both = Group(left.parts | right.parts, left.copies | right.copies)
        try:
            if between := self._between(left, right):
                raise RefusedError(f"{between} would have to run between them")
            before = self._cost(left)[2] + self._cost(right)[2]
            after = self._cost(both)[2]
            if after > before:
                raise RefusedError(f"together they move {after} bytes, apart {before}")
        except RefusedError as error:
            self.refusals[key] = str(error)
            return False
        at = self.groups.index(left)
        self.groups[at] = both
        self.groups.remove(right)
        return True

    def _between(self, left: Group, right: Group) -> str:
        """Something that one of two groups needs and that needs the other, or ""."""
        for first, second in ((left, right), (right, left)):
            seen: set[object] = set()
            stack = [item for item in self._after(first) if item is not second]
            while stack:
                item = stack.pop()
                if id(item) in seen:
                    continue
                seen.add(id(item))
                for later in self._after(item):
                    if later is second:
                        return item.label if isinstance(item, Group) else f"%{item.name}"
                    stack.append(later)
        return ""

    def _after(self, item: Group | fx.Node) -> list[Group | fx.Node]:
        """Groups and left operators that read what ``item`` makes."""
        made = {p.node for p in item.parts if not p.partial} if isinstance(item, Group) else {item}
        halves = {Part(p.node, False, p.order) for p in item.parts if p.partial} if isinstance(item, Group) else set()
        readers: list[Group | fx.Node] = [
            group
            for group in self.groups
            if group is not item
            and (halves & group.parts or not made.isdisjoint(self.flow.reads(group.parts, group.copies)))
        ]
        return readers + [n for n in self.flow.left if n is not item and not made.isdisjoint(self.flow.sources(n))]

    def _makes(self, item: Group | fx.Node, node: fx.Node) -> bool:
        if isinstance(item, fx.Node):
            return node is item
        return any(p.node is node and not p.partial for p in item.parts)

    # -- recomputation -------------------------------------------------------------------------------------------------

    def _copy(self) -> None:
        """Compute a pointwise value again where that moves fewer bytes than storing and loading it."""
        for index, group in enumerate(self.groups):
            for node in sorted(self.flow.reads(group.parts, group.copies), key=self.flow.order):
                maker = next((g for g in self.groups if self._makes(g, node)), None)
                if maker is None or node in self.flow.reductions or node in self.flow.scatters:
                    continue
                before = self._total()
                old = self.groups[index]
                self.groups[index] = Group(old.parts, old.copies | {node})
                try:
                    if self._total() < before:
                        continue
                except RefusedError:
                    pass
                self.groups[index] = old

    def _inline(self) -> None:
        """Do without a kernel of pointwise values where all its readers compute them again for fewer bytes.

        A batch norm's ``rsqrt(variance + eps)`` is one: its readers load the variance instead.
        """
        for parts in [g.parts for g in self.groups]:
            maker = next(g for g in self.groups if g.parts == parts)  # with what it has taken in by now
            own = frozenset(p.node for p in parts)
            readers = [g for g in self.groups if g is not maker and own & self.flow.reads(g.parts, g.copies)]
            if not readers or own & (self.flow.kept | self.flow.reductions.keys() | self.flow.scatters.keys()):
                continue
            before, old = self._cost(maker)[2] + sum(self._cost(g)[2] for g in readers), self.groups
            copying = {id(g): Group(g.parts, g.copies | own | maker.copies) for g in readers}
            self.groups = [copying.get(id(g), g) for g in old if g is not maker]
            try:
                if sum(self._cost(g)[2] for g in copying.values()) < before:
                    continue
            except RefusedError:
                pass
            self.groups = old

    def _drop_unread(self) -> None:
        """Do without kernels that all their readers came to do without, one after another."""
        while unread := [g for g in self.groups if not self._needed(g) and not any(p.partial for p in g.parts)]:
            self.groups = [g for g in self.groups if g not in unread]

    def _total(self) -> int:
        return sum(self._cost(g)[2] for g in self.groups)

    # -- costs and results ---------------------------------------------------------------------------------------------

    def _needed(self, group: Group) -> frozenset[fx.Node]:
        """What the group has to store: read by another group, by PyTorch, or returned."""
        made = [p.node for p in group.parts if not p.partial]
        elsewhere: set[fx.Node] = set(self.flow.kept)
        for other in self.groups:
            if not other.parts <= group.parts:
                elsewhere |= self.flow.reads(other.parts, other.copies)
        return frozenset(n for n in made if n in elsewhere)

    def _cost(self, group: Group) -> tuple[Tile, Schedule, int]:
        needed = self._needed(group)
        key = (group.parts, group.copies, needed)
        if key not in self._costs:
            tile = self.builder.tile(group.parts, group.copies, needed)
            chosen = schedule(tile, self.hints)
            self._costs[key] = (tile, chosen, tile_bytes(tile, chosen, self.hints))
        return self._costs[key]

    def _result(self) -> Fused:
        fused = Fused()
        waiting: list[Group | fx.Node] = [*self.groups, *self.flow.left]
        while waiting:
            later = {id(n) for item in waiting for n in self._after(item)}
            ready = next(item for item in sorted(waiting, key=self._first) if id(item) not in later)
            fused.order.append(ready)
            waiting = [item for item in waiting if item is not ready]
        fused.kernels = [(g, *self._cost(g)) for g in fused.order if isinstance(g, Group)]
        fused.refusals = [WhyNot(f"%{n.name}", "", reason) for n, reason in self.flow.left.items() if reason]
        alive = set(self.groups)
        for (left, right), reason in self.refusals.items():
            if left in alive and right in alive:
                fused.refusals.append(WhyNot(left.label, right.label, reason))
        return fused

    def _first(self, item: Group | fx.Node) -> int:
        return min(p.order for p in item.parts) if isinstance(item, Group) else self.flow.order(item)
