"""Where a graph's repeated blocks begin and end: the boundaries that regions and communication share.

The code generator cuts regions there, so that equal layers are compiled once; passes put collectives there, so that
they cut no region in two. Both ask with the same nodes (communication left out) and so agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from dscompile.repeats import segments
from dscompile.torch_compat import tensor_bytes


def blocks(body: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Cut consecutive compute nodes into ``(start, stop)`` pieces; repeated blocks are pieces of their own."""
    return segments([_colour(n) for n in body], _crossing_bytes(body)) if body else []


def describe_value(value: object) -> str:
    """Shape, dtype, strides and device of a fake value, as text."""
    if isinstance(value, torch.Tensor):
        layout = value.stride() if value.layout is torch.strided else value.layout
        return f"{value.dtype}{tuple(value.shape)}{layout}@{value.device}+{_offset(value)}"
    if isinstance(value, (list, tuple)):
        return "(" + ",".join(map(describe_value, value)) + ")"
    return f"{type(value).__name__}:{value}"


def _offset(value: torch.Tensor) -> object:
    return value.storage_offset() if value.layout is torch.strided else 0


def _constant(value: object) -> str:
    return f"{type(value).__name__}:{value!r}"


def describe_arguments(node: fx.Node, name: Callable[[fx.Node], str]) -> str:
    """A call's arguments as text; ``name`` spells the nodes among them."""

    def show(argument: object) -> str:
        if isinstance(argument, fx.Node):
            return name(argument)
        if isinstance(argument, (list, tuple)):
            return "[" + ",".join(map(show, argument)) + "]"
        if isinstance(argument, dict):
            return "{" + ",".join(f"{k}={show(v)}" for k, v in argument.items()) + "}"
        return _constant(argument)

    return show(node.args) + show(node.kwargs)


def _colour(node: fx.Node) -> int:
    return hash((str(node.target), describe_arguments(node, lambda _: "%"), describe_value(node.meta.get("val"))))


def _crossing_bytes(body: Sequence[fx.Node]) -> Callable[[int], float]:
    """Bytes of body values alive across each boundary; infinite where a tuple would be cut from its getitems."""
    position = {node: index for index, node in enumerate(body)}
    change = [0.0] * (len(body) + 2)
    forbidden = [0.0] * (len(body) + 2)
    for index, node in enumerate(body):
        last = max((position[u] for u in node.users if u in position), default=index)
        value = node.meta.get("val")
        is_tuple = isinstance(value, (list, tuple))
        target, size = (forbidden, 1.0) if is_tuple else (change, tensor_bytes(value) + 1.0)
        target[index + 1] += size
        target[last + 1] -= size
    total, blocked, crossing = 0.0, 0.0, []
    for step, bar in zip(change, forbidden, strict=True):
        total, blocked = total + step, blocked + bar
        crossing.append(float("inf") if blocked else total)
    return crossing.__getitem__
