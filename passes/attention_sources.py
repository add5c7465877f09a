"""Where the queries and the keys of an attention come from: from one sequence, or from two."""

from __future__ import annotations

import torch
from torch import fx

from dscompile.graph import InputKind, StepGraph

aten = torch.ops.aten

CROSS = "not the attention of a sequence to itself: queries and keys are made of different values"

_PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.convolution.default,
        aten.embedding.default,
    }
)


class Sources:
    """Tells cross-attention from self-attention where both have the same shapes.

    Queries and keys are projections (matrix products). They are of one sequence if something that the inputs of the
    model decide is met on the way from both, up to one product further than the projection: a common projection, or
    a common value that both projections read, normalised or not. Residual streams end at the products that were added
    to them, so a decoder's stream does not lead into the encoder that it attended to before.
    """

    def __init__(self, graph: StepGraph) -> None:
        given = {i.name for i in graph.inputs if i.kind is InputKind.INPUT}
        self._data: set[fx.Node] = set()
        for node in graph.nodes:
            if node.name in given or not self._data.isdisjoint(node.all_input_nodes):
                self._data.add(node)

    def cross(self, q: fx.Node, k: fx.Node) -> bool:
        """Whether ``q`` and ``k`` are projections of different sequences; False if either is no projection."""
        (of_q, q_projected), (of_k, k_projected) = self._met(q), self._met(k)
        return q_projected and k_projected and of_q.isdisjoint(of_k)

    def _met(self, node: fx.Node) -> tuple[set[fx.Node], bool]:
        """What is met on the way back, and whether a projection is."""
        seen: set[tuple[fx.Node, bool]] = set()
        stack = [(node, False)]
        while stack:
            state = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            current, projected = state
            if not (projected and _is_product(current)):
                further = projected or _is_product(current)
                stack += [(n, further) for n in current.all_input_nodes]
        return {n for n, _ in seen if n in self._data}, any(projected for _, projected in seen)


def _is_product(node: fx.Node) -> bool:
    return node.target in _PRODUCTS or "attention" in str(getattr(node.target, "__name__", ""))
