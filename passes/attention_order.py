"""Causal masks of a symbolic length: comparisons of key positions with query positions, read off the graph.

Such a mask cannot be computed while compiling. Positions are index tensors ``offset + sum(step_d * index_d)``; what is
no such tensor, or another comparison, is not recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_LATER: Mapping[Any, int] = {aten.gt.Tensor: 0, aten.lt.Tensor: 1}
"""Comparisons that hold where the key comes after the query, and which operand is then the key's position."""

_SEEN: Mapping[Any, int] = {aten.le.Tensor: 0, aten.ge.Tensor: 1}
"""The same for keys that do not come after the query."""

_SAME = frozenset({aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default})
_SHAPES = frozenset({aten.view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default})


@dataclass(frozen=True, slots=True)
class _Positions:
    """``offset + sum(steps[d] * index_d)``; dimensions of size 1 have step 0."""

    offset: int
    steps: tuple[int, ...]


def is_order(node: fx.Node, seq: int | torch.SymInt, *, visible: bool) -> bool:
    """Whether keys are visible where ``node``, of a shape ``[.., seq, seq]``, is ``visible``, and those are causal."""
    key = (_SEEN if visible else _LATER).get(node.target)
    shape = [str(n) for n in node.meta["val"].shape]
    if key is None or shape[-2:] != [str(seq)] * 2 or any(n != "1" for n in shape[:-2]):
        return False
    of_key, of_query = (_positions(node.args[i]) for i in (key, 1 - key))
    if of_key is None or of_query is None or of_key.offset != of_query.offset:
        return False
    along = [tuple(p.steps[-2:]) if any(p.steps) else () for p in (of_key, of_query)]
    return along in ([(0, 1), (1, 0)], [(1,), (1, 0)])


def _positions(value: Any) -> _Positions | None:
    if not isinstance(value, fx.Node) or value.meta["val"].dtype not in (torch.int64, torch.int32):
        return None
    target = value.target
    if target is torch.ops.prims.iota.default:
        start, step = value.kwargs.get("start", 0), value.kwargs.get("step", 1)
        return _Positions(start, (step,)) if type(start) is int and type(step) is int else None
    if target is aten.arange.default:
        return _Positions(0, (1,))
    if target is aten.arange.start_step or target is aten.arange.start:
        start, step = value.args[0], value.args[2] if len(value.args) > 2 else 1
        return _Positions(start, (step,)) if type(start) is int and type(step) is int else None
    inner = _positions(value.args[0]) if value.args else None
    if inner is None:
        return None
    before, after = value.args[0].meta["val"].shape, value.meta["val"].shape  # type: ignore[union-attr]
    if target in _SAME or (target is aten.slice.Tensor and str(before) == str(after)):
        return inner  # a slice of the same size is of the whole
    if target is aten.add.Tensor and type(value.args[1]) is int and not value.kwargs:
        return replace(inner, offset=inner.offset + value.args[1])
    if target in _SHAPES:
        return _reshaped(inner, before, after)
    return None


def _reshaped(inner: _Positions, before: Any, after: Any) -> _Positions | None:
    """The positions under dimensions of size 1 that come or go; None if the others change their order or size."""
    old, new = [str(n) for n in before], [str(n) for n in after]
    steps = [step for size, step in zip(old, inner.steps, strict=True) if size != "1"]
    places = [d for d, size in enumerate(new) if size != "1"]
    if [n for n in old if n != "1"] != [new[d] for d in places]:
        return None
    made = dict(zip(places, steps, strict=True))
    return replace(inner, steps=tuple(made.get(d, 0) for d in range(len(new))))
