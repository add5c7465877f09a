"""Fake results of our own operators without PyTorch's general path, which caches only ``aten`` operators.

An operator of sharded parameters has one result for each parameter, and each is made several times while a step is
traced, planned and verified. What it makes is plain: fresh, contiguous memory like an operand's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dscompile.torch_compat import FakeTensor, FakeTensorMode

Rule = Callable[[FakeTensorMode, Any, Any, tuple[Any, ...], dict[str, Any]], Any]
"""What ``torch.library.register_torch_dispatch`` takes for a mode."""


def quick_empty(mode: FakeTensorMode, like: Any, shape: Sequence[Any], dtype: torch.dtype | None) -> Tensor | None:
    """``like.new_empty(shape, dtype=dtype)`` as a fake tensor of ``mode``, contiguous, without gradient.

    None where that takes the general path: symbolic sizes, or a ``like`` that is no plain fake tensor of this mode.
    """
    if type(like) is not FakeTensor or like.fake_mode is not mode or any(type(n) is not int for n in shape):
        return None
    meta = torch.empty(shape, dtype=dtype or like.dtype, device="meta")
    return FakeTensor(mode, meta, like.fake_device)


def empties_like_first(shapes: Callable[..., Sequence[Sequence[Any]]], dtype_at: int) -> Rule:
    """A rule for an operator that makes a list of fresh tensors like its first operand, of which it reads nothing.

    Args:
        shapes: the results' shapes, from the operator's arguments after the first.
        dtype_at: which argument is their dtype; without one, or None, it is the operand's.
    """

    def rule(mode: FakeTensorMode, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = args[dtype_at] if len(args) > dtype_at else None
        asked = [] if kwargs else shapes(*args[1:dtype_at])
        found = [quick_empty(mode, args[0], shape, dtype) for shape in asked]
        general = bool(kwargs) or any(value is None for value in found)
        return mode.__torch_dispatch__(func, types, args, kwargs) if general else found

    return rule
