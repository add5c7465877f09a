"""The guard on gathered values: an in-place write to one would be lost, so it is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import ShardingError
from dscompile.torch_compat import never_a_frame, without_torch_function


class Gathered(Tensor):
    """The gathered value of a sharded parameter: a temporary, so an in-place write to it would be lost.

    Any operation gives a plain tensor, but what still shares memory with the value stays guarded.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _name(func) == "requires_grad_":
            raise ShardingError(
                "requires_grad_ on the gathered value of a sharded parameter has no effect: freeze the DTensor of "
                "named_parameters(). If this is parametrize (weight_norm, ...): register it before distribute()."
            )
        if _writes(func, args, kwargs):
            raise ShardingError(
                f"in-place write ({_name(func)}) to the gathered value of a sharded parameter would be lost; write "
                'inside "with dscompile.gathered(module, write=True):", or to the DTensor of named_parameters().'
            )
        with without_torch_function():
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and type(result) is Tensor:
                return result.as_subclass(Gathered) if _shares(result, args) else result
        if _name(func) == "numpy":
            result.flags.writeable = False
        return result


never_a_frame(Gathered.__torch_function__)


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):  # a property of Tensor: the descriptor knows its own name
        owner = getattr(func, "__self__", None)
        return f"{getattr(owner, '__name__', '')}.{name}"
    return name


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if isinstance(kwargs.get("out"), Gathered):
        return True
    if not args or not isinstance(args[0], Gathered):
        return False
    name = _name(func)
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _PURE)
    if name.endswith(".__set__"):
        return not name.startswith("grad.")
    return (name.endswith("_") and not name.endswith("__")) or bool(kwargs.get("inplace"))


_PURE = frozenset({"__init__", "__index__", "__int__", "__invert__", "__instancecheck__", "__iter__"})


def _shares(result: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a result still is the memory of a guarded argument (a view, ``.data``, ``detach()``)."""
    if result.layout is not torch.strided:
        return False
    where = result.untyped_storage().data_ptr()
    return any(isinstance(a, Gathered) and a.untyped_storage().data_ptr() == where for a in args)
