"""Attention that a model writes out (matrix product, softmax, matrix product): where it is, and how to mask it.

Such a graph holds its scores, so a layout can only hide some of them: the meaning is that of the block-sparse
operator, time and memory stay those of dense attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from dscompile.graph import Phase, StepGraph, info

aten = torch.ops.aten

SOFTMAXES = frozenset({aten._softmax.default, aten._safe_softmax.default})
_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default, aten.matmul.default})
_BETWEEN = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.expand.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.alias.default,
        aten.detach.default,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.tanh.default,
        aten.native_dropout.default,
    }
)
"""Operators that stand between the products and the softmax: scale, cap, bias, mask, dropout, cast, shape."""


def is_written_out(node: fx.Node) -> bool:
    """Whether a softmax is that of an attention: a product of two batches before it, and one after it."""
    if node.target not in SOFTMAXES or info(node).phase is not Phase.FORWARD:
        return False
    return any(_products(node, lambda n: n.all_input_nodes)) and any(_products(node, lambda n: n.users))


def spelt_out(softmax: fx.Node) -> str:
    """Why the scores of an attention are there to be masked, and what to do about it."""
    if softmax.target is aten._safe_softmax.default:
        return (
            "PyTorch spells this scaled_dot_product_attention out (dropout inside, a mask with a gradient, or other "
            "shapes than [batch, heads, seq, head_dim]), so hidden scores are masked: right, but neither faster nor "
            "smaller"
        )
    return (
        "the model writes attention out, so hidden scores are masked: right, but neither faster nor smaller; "
        "let it call scaled_dot_product_attention (transformers: attn_implementation='sdpa')"
    )


def operands(softmax: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of the product that made the scores; None if which it is cannot be told."""
    scores = str(softmax.meta["val"].numel())  # text, as a symbolic number may be
    found = [n for n in _products(softmax, lambda n: n.all_input_nodes) if str(n.meta["val"].numel()) == scores]
    if len(found) != 1:
        return None
    first, second = found[0].args[1:3] if found[0].target is aten.baddbmm.default else found[0].args[:2]
    return first, second  # type: ignore[return-value]


def _products(node: fx.Node, steps: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """The products that lie in one direction, past operators of :data:`_BETWEEN` (and their getitems) only."""
    stack, seen = list(steps(node)), set[fx.Node]()
    while stack:
        current = stack.pop()
        if current in seen or info(current).phase is not Phase.FORWARD:
            continue
        seen.add(current)
        if current.target in _PRODUCTS:
            yield current
        elif current.target in _BETWEEN or getattr(current.target, "__name__", "") == "getitem":
            stack += steps(current)


def hide(graph: StepGraph, softmax: fx.Node, visible: fx.Node) -> fx.Node:
    """Let a softmax see only the scores where ``visible`` (bool, broadcasts to them) is true.

    Its derivative needs no change: it reads the probabilities, and those of hidden scores are 0. A row that sees
    nothing gets zeros, as from the block-sparse operator; a softmax of nothing would be NaN. Returns what took the
    softmax's place.
    """

    def add(target: object, *args: object) -> fx.Node:
        return graph.insert_call(softmax, target, args, like=softmax)

    scores = add(aten.where.ScalarOther, visible, softmax.args[0], -torch.inf)
    shares = graph.insert_call(softmax, softmax.target, (scores, *softmax.args[1:]), dict(softmax.kwargs), like=softmax)
    seen = add(aten.any.dim, add(aten.ne.Scalar, scores, -torch.inf), -1, True)
    result = add(aten.where.ScalarOther, seen, shares, 0.0)
    graph.replace(softmax, result)
    return result
