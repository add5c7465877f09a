"""What models return and what batches are: finding tensors, the loss, and moving to a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import UnsupportedError


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a model's output: in mappings, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def moved(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


def call_with(model: Callable[..., Any], batch: Any) -> Any:
    """Call a model with a batch: a mapping by name, a sequence by position, anything else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        return model(*batch)
    return model(batch)


def loss_in(outputs: Any) -> Tensor:
    """The loss of a model's output: itself, its ``loss``, or its first item.

    Raises:
        UnsupportedError: none of these is a scalar tensor.
    """
    candidate = outputs
    if isinstance(outputs, Mapping):
        candidate = outputs.get("loss")
    elif isinstance(outputs, (list, tuple)) and outputs:
        candidate = getattr(outputs, "loss", outputs[0])
    elif not isinstance(outputs, Tensor):
        candidate = getattr(outputs, "loss", None)
    if not isinstance(candidate, Tensor) or candidate.numel() != 1:
        what = f"shape {tuple(candidate.shape)}" if isinstance(candidate, Tensor) else type(outputs).__name__
        raise UnsupportedError(
            f"train_batch needs a scalar loss, and the model returned {what}: return the loss, a mapping or object "
            "with `loss`, or pass loss_fn= for batches of (inputs, labels)."
        )
    return candidate
