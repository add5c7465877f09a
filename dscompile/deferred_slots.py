"""Where a model's modules hold tensors: registered parameters and buffers, and plain attributes with containers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["parameter", "buffer", "attribute"]
_RANK: dict[Kind, int] = {"parameter": 0, "buffer": 1, "attribute": 2}


@dataclass(frozen=True, slots=True)
class Slot:
    """One place that holds a tensor. ``assign`` puts another there."""

    fqn: str
    kind: Kind
    tensor: torch.Tensor
    assign: Callable[[Any], None]


def find_slots(model: nn.Module) -> list[Slot]:
    """Every slot of ``model``: parameters first, in ``named_parameters()``' order, then buffers, then attributes.

    Attributes are followed into lists, tuples and dicts; a tensor in any other object is not found.
    """
    slots = [slot for prefix, module in model.named_modules() for slot in _module_slots(prefix, module)]
    return sorted(slots, key=lambda slot: _RANK[slot.kind])


def _module_slots(prefix: str, module: nn.Module) -> Iterator[Slot]:
    tables: tuple[tuple[Kind, dict[str, Any]], ...] = (
        ("parameter", module._parameters),
        ("buffer", module._buffers),
        ("attribute", {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}),
    )
    seen: set[int] = set()
    for kind, table in tables:
        home = vars(module) if kind == "attribute" else table
        for name, value in table.items():
            for tensor, assign in _tensors(value, functools.partial(home.__setitem__, name), seen):
                yield Slot(f"{prefix}.{name}" if prefix else name, kind, tensor, assign)


def _tensors(
    value: Any, assign: Callable[[Any], None], seen: set[int]
) -> Iterator[tuple[torch.Tensor, Callable[[Any], None]]]:
    """The tensors in a value, each with what replaces it."""
    if isinstance(value, torch.Tensor):
        yield value, assign
    elif isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _tensors(item, functools.partial(value.__setitem__, key), seen)
    elif type(value) is tuple:
        items = list(value)

        def put(index: int, item: Any) -> None:
            items[index] = item
            assign(tuple(items))

        for index, item in enumerate(value):
            yield from _tensors(item, functools.partial(put, index), seen)
