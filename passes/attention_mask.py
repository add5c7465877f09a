"""What an attention mask in a graph says: causal, key padding, both, or something else.

Models build masks from index arithmetic (``key <= query``) and from a padding input, joined by ``&``. A mask is taken
apart at those joints; a part that depends on no input is computed here, on the CPU, and looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.effects import constant, is_effect, is_random
from dscompile.passes.attention_order import is_order
from dscompile.torch_compat import no_modes

aten = torch.ops.aten

HIDES = -1e4
"""An added mask hides a key where it is this or less (models use -inf, the dtype's minimum, or -10000)."""

_SAME = frozenset(
    {aten.expand.default, aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default}
)
_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default})
_AND = frozenset({aten.bitwise_and.Tensor, aten.logical_and.default})
_OR = frozenset({aten.bitwise_or.Tensor, aten.logical_or.default})
_NOT = frozenset({aten.bitwise_not.default, aten.logical_not.default})
_SHAPE_ONLY = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
    }
)
"""Operators whose result depends on the shape of their operand alone."""


class UnknownMaskError(Exception):
    """A mask that is neither causal nor key padding; the text says why."""


@dataclass(frozen=True, slots=True)
class Part:
    """One operand of the conjunction: keys are visible where ``node``, reshaped to ``shape``, is ``visible``."""

    node: fx.Node
    visible: bool
    shape: tuple[Any, ...]

    @classmethod
    def of(cls, node: fx.Node, *, visible: bool) -> Part:
        """A part in the node's own shape."""
        return cls(node, visible, tuple(node.meta["val"].shape))

    def is_padding(self, seq: int | torch.SymInt) -> bool:
        """Whether it hides whole keys: ``[batch or 1, 1, 1, seq]``, fewer dimensions, or ``[batch, seq]`` made so."""
        shape, found = ([str(n) for n in sizes] for sizes in (self.shape, self.node.meta["val"].shape))
        if shape[-1] != str(seq) or any(size != "1" for size in shape[-3:-1]):  # text, as a symbolic size may be
            return False
        return found in (shape, [shape[0] if len(shape) == 4 else "1", str(seq)])


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask that attention kernels know: ``causal``, and parts that hide whole keys."""

    causal: bool
    padding: tuple[Part, ...]


def understand(mask: fx.Node, seq: int | torch.SymInt) -> Mask:
    """Take a mask of ``[.., seq, seq]`` (or broadcast to it) apart; bool masks are True where a key is visible.

    Raises:
        UnknownMaskError: a part hides something else than the keys after the query or whole keys.
    """
    with no_modes():  # the compiler runs passes on fake tensors; constants are real
        return _understand(mask, seq)


def _understand(mask: fx.Node, seq: int | torch.SymInt) -> Mask:
    causal, padding = False, []
    for part in _parts(mask):
        if _is_constant(part.node):
            causal |= _is_causal(part, seq)
        elif part.is_padding(seq):
            padding.append(part)
        elif is_order(part.node, seq, visible=part.visible):
            causal = True
        else:
            raise UnknownMaskError(
                f"the mask depends on an input and differs from query to query (%{part.node.name}, {list(part.shape)})"
            )
    return Mask(causal, tuple(padding))


def _peeled(node: fx.Node) -> fx.Node:
    """``node`` without operators that leave the values and, up to broadcasting, the shape."""
    while True:
        if node.target in _SAME:
            node = node.args[0]  # type: ignore[assignment]
        elif node.target in _RESHAPES and (base := _reshaped(node)).meta["val"].shape == node.meta["val"].shape:
            node = base
        else:
            return node


def _reshaped(node: fx.Node) -> fx.Node:
    """What a chain of reshapes (and copies between them) started from."""
    while node.target in _RESHAPES or node.target is aten.clone.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _parts(mask: fx.Node) -> Iterator[Part]:
    mask = _peeled(mask)
    if _is_constant(mask):
        yield Part.of(mask, visible=True)
    elif mask.meta["val"].dtype is torch.bool:
        yield from _conjunction(mask, True)
    elif mask.target in _RESHAPES:
        inner = _reshaped(mask)
        parts = list(_parts(inner))
        if len(parts) != 1 or parts[0].shape != tuple(inner.meta["val"].shape):
            raise UnknownMaskError(f"%{mask.name} reshapes a mask of several parts")
        yield replace(parts[0], shape=tuple(mask.meta["val"].shape))
    else:
        yield from _added(mask)


def _added(mask: fx.Node) -> Iterator[Part]:
    """The boolean behind values that are added to the scores."""
    if mask.target is aten.where.self:
        kept, other = (_constant_number(a) for a in mask.args[1:3])
        for visible, keeps, hides in ((True, kept, other), (False, other, kept)):
            if keeps == 0 and _hides(hides):
                yield from _conjunction(mask.args[0], visible)  # type: ignore[arg-type]
                return
    if mask.target is aten.masked_fill.Scalar and _hides(mask.args[2]) and _constant_number(mask.args[0]) == 0:
        yield from _conjunction(mask.args[1], False)  # type: ignore[arg-type]
        return
    raise UnknownMaskError(
        f"values added to the scores come from an input (%{mask.name}); known are masks made of a boolean by where or "
        "masked_fill with 0 and -inf"
    )


def _hides(value: object) -> bool:
    return isinstance(value, (int, float)) and value <= HIDES


def _constant_number(value: object) -> float | None:
    """The one value that a constant node holds, or None."""
    if not isinstance(value, fx.Node):
        return float(value) if isinstance(value, (int, float)) else None
    if not _is_constant(value):
        return None
    values = _compute(value).unique()
    return float(values.item()) if values.numel() == 1 else None


def _conjunction(node: fx.Node, visible: bool) -> Iterator[Part]:
    node = _peeled(node)
    if node.target in (_AND if visible else _OR):
        for operand in node.args[:2]:
            yield from _conjunction(operand, visible)  # type: ignore[arg-type]
    elif node.target in _NOT:
        yield from _conjunction(node.args[0], not visible)  # type: ignore[arg-type]
    elif node.meta["val"].dtype is not torch.bool:
        raise UnknownMaskError(f"a mask is made of numbers, no booleans (%{node.name})")
    else:
        yield Part.of(node, visible=visible)


def _is_causal(part: Part, seq: int | torch.SymInt) -> bool:
    """Whether a constant part hides the keys after the query; False if it hides nothing.

    Raises:
        UnknownMaskError: it hides something else.
    """
    values = _compute(part.node)
    if values.dtype is not torch.bool:
        hidden = values <= HIDES
        if not (hidden | (values == 0)).all():
            raise UnknownMaskError("the values added to the scores are a bias, not a mask")
        values = ~hidden
    seen = values if part.visible else ~values
    if seen.all():
        return False
    lower = torch.ones(seq, seq, dtype=torch.bool).tril()
    if seen.shape[-2:] == lower.shape and (seen == lower).all():
        return True
    raise UnknownMaskError("the mask hides other keys than those after the query (a window, or a prefix)")


def _is_constant(node: fx.Node) -> bool:
    """Whether a value depends on no input, draw, effect or symbolic size."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        value = current.meta.get("val")
        if current.op == "placeholder" or is_random(current) or is_effect(current):
            return False
        if not isinstance(value, Tensor) or not all(type(size) is int for size in value.shape):
            return False
        if current.target not in _SHAPE_ONLY:
            stack += current.all_input_nodes
    return True


def _compute(node: fx.Node) -> Tensor:
    """Run the operators behind a constant on the CPU, each once."""
    done: dict[fx.Node, Tensor] = {}
    stack = [node]
    while stack:
        current = stack[-1]
        if current in done:
            stack.pop()
            continue
        if current.op == "get_attr":
            done[current] = constant(current).detach().cpu()
            continue
        if current.target in _SHAPE_ONLY:
            shape = current.meta["val"]
            done[current] = torch.full(shape.shape, _fill(current), dtype=shape.dtype)
            continue
        waiting = [operand for operand in current.all_input_nodes if operand not in done]
        stack += waiting
        if not waiting:
            args, named = fx.map_arg((current.args, current.kwargs), done.__getitem__)
            here = {"device": torch.device("cpu")} if "device" in named else {}
            done[current] = current.target(*args, **{**named, **here})  # type: ignore[operator]
    return done[node]


def _fill(node: fx.Node) -> float:
    if node.target in (aten.new_ones.default, aten.ones_like.default):
        return 1
    if node.target in (aten.new_zeros.default, aten.zeros_like.default):
        return 0
    value = node.args[-1] if len(node.args) > 1 else node.kwargs.get("fill_value", math.nan)
    return float(value)  # type: ignore[arg-type]
