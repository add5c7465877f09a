"""What reads what in a graph, once views and constants are looked through."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from dscompile.codegen.tile.reductions import Reduction, operator_name, reduction
from dscompile.codegen.tile.scatter import Scatter, scatter
from dscompile.codegen.tile.values import CONSTANTS, is_view, why_not


class Part(NamedTuple):
    """One operator; or, of one that takes two kernels, the first (``partial``) or the second half."""

    node: fx.Node
    partial: bool
    order: int


class Flow:
    """A graph's operators as parts of kernels.

    Attributes:
        parts: what kernels can compute. left: operators that PyTorch runs, with the reason. kept: nodes that are
            returned or that an operator left to PyTorch reads. reductions, scatters: by node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Sort the nodes of ``graph``."""
        self.graph = graph
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self.reductions: dict[fx.Node, Reduction] = {}
        self.scatters: dict[fx.Node, Scatter] = {}
        self.parts: list[Part] = []
        self.left: dict[fx.Node, str] = {}
        self.inputs = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
        self.output = graph.output_node()
        self._sources: dict[fx.Node, frozenset[fx.Node]] = {}
        self._reads: dict[tuple[frozenset[Part], frozenset[fx.Node]], frozenset[fx.Node]] = {}
        for node in graph.nodes:
            if node.op != "call_function" or is_view(node) or operator_name(node) in CONSTANTS:
                continue
            if isinstance(node.meta.get("val"), torch.SymInt):
                continue  # a size: an expression wherever it is read
            if reason := why_not(node):
                self.left[node] = reason
                continue
            found = reduction(node)
            if isinstance(found, Reduction):
                self.reductions[node] = found
                if found.partial:
                    self.parts.append(Part(node, True, self._order[node]))
            stores = scatter(node)
            if isinstance(stores, Scatter):
                self.scatters[node] = stores
                if stores.apart:
                    self.parts.append(Part(node, True, self._order[node]))
            self.parts.append(Part(node, False, self._order[node]))

    @property
    def kept(self) -> frozenset[fx.Node]:
        """Nodes that must be in memory for somebody who is no kernel."""
        return frozenset().union(*(self.sources(n) for n in [self.output, *self.left]))

    def order(self, node: fx.Node) -> int:
        """Position in the program."""
        return self._order[node]

    def leave(self, node: fx.Node, reason: str) -> None:
        """Leave a node to PyTorch after all."""
        self.left[node] = reason
        self.parts = [p for p in self.parts if p.node is not node]

    def sources(self, node: fx.Node) -> frozenset[fx.Node]:
        """The operators and inputs that a node reads, looking through views and constants."""
        known = self._sources.get(node)
        if known is None:
            known = self._sources[node] = self._find_sources(node)
        return known

    def _find_sources(self, node: fx.Node) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            read = stack.pop()
            if is_view(read) or operator_name(read) in CONSTANTS:
                stack += read.all_input_nodes
            else:
                found.add(read)
        return frozenset(found)

    def reads(self, parts: frozenset[Part], copies: frozenset[fx.Node] = frozenset()) -> frozenset[fx.Node]:
        """What a kernel of these parts loads: sources that it does not make itself."""
        known = self._reads.get((parts, copies))
        if known is None:
            known = self._reads[parts, copies] = self._find_reads(parts, copies)
        return known

    def _find_reads(self, parts: frozenset[Part], copies: frozenset[fx.Node]) -> frozenset[fx.Node]:
        found: set[fx.Node] = set()
        for part in parts:
            finishes = part.node in self.reductions and self.reductions[part.node].partial and not part.partial
            stores = self.scatters.get(part.node)
            if stores is not None and stores.apart:
                found |= self._of_half(stores, part.partial)
            elif not finishes:
                found |= self.sources(part.node)
        for node in copies:
            found |= self.sources(node)
        return frozenset(found - {p.node for p in parts if not p.partial} - copies)

    def _of_half(self, stores: Scatter, first: bool) -> frozenset[fx.Node]:
        """What the first half of a scatter reads, places and values; or the second, what they are added to."""
        reads = [n for n in stores.node.all_input_nodes if n is not stores.base] if first else [stores.base]
        if first and stores.values is stores.base:
            reads.append(stores.base)
        return frozenset().union(*(self._behind(n) for n in reads))

    def _behind(self, node: fx.Node) -> frozenset[fx.Node]:
        """A node, or what it is a view of."""
        return self.sources(node) if is_view(node) or operator_name(node) in CONSTANTS else frozenset({node})

    def touched(self, parts: frozenset[Part]) -> frozenset[object]:
        """Everything that a kernel reads or makes: two kernels are neighbours if they have one in common."""
        halves = {(p.node, "half") for p in parts if p.node in self.reductions and self.reductions[p.node].partial}
        made = {p.node for p in parts if not p.partial}
        siblings = {s for p in parts if not p.partial for s in self._halves_beside(p)}
        return frozenset(self.reads(parts)) | frozenset(made) | frozenset(halves) | siblings

    def _halves_beside(self, part: Part) -> set[object]:
        """Second halves of reductions over the same table finish in one kernel."""
        found = self.reductions.get(part.node)
        return {("finish", found.rows, found.cols)} if found is not None and found.partial else set()
