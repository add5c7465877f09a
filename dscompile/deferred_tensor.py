"""The tensor that has no data yet: a fake tensor that knows its recorder, and refuses to be used for its values."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dscompile.effects import traits
from dscompile.errors import DeferredError, UnsupportedError
from dscompile.torch_compat import FakeTensor, OpOverload, has_hooks, pytree

if TYPE_CHECKING:
    from dscompile.deferred_record import Recorder

_AFTERWARDS = frozenset({torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.detach.default})
"""What may still be recorded after the block, with views: ``model.to(dtype)``, ``deepcopy``, ``state_dict()``."""


class DeferredTensor(FakeTensor):
    """A tensor of known shape, dtype and device whose values are still a recipe in a :class:`Recorder`'s log."""

    recorder: Recorder
    owner: str = ""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        own = next(t for t in found if isinstance(t, DeferredTensor))
        if own.recorder.faking or func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        harmless = func in _AFTERWARDS or (traits(func).shares is not None and not traits(func).writes)
        if not harmless or len(found) != 1:
            raise DeferredError(own.complaint(f"{func} needs its values"))
        return own.recorder.record(func, tuple(args), dict(kwargs))

    def complaint(self, what: str) -> str:
        """The sentence of an error: which tensor, why, and what to do."""
        name = self.owner or "a tensor"
        return (
            f"{name} (shape {tuple(self.shape)}) has no values yet: it was built under dscompile.deferred_init() at "
            f"{self.recorder.where}, and {what}. Call dscompile.distribute(model) or dscompile.materialise(model) first"
            " (a tensor held outside the model's modules is not filled: take it from the model afterwards)."
        )

    def present(self, what: str) -> torch.Tensor:
        """A copy with the values it has at this point of the construction; an error after it."""
        if not self.recorder.active:
            raise DeferredError(self.complaint(f"{what} needs its values"))
        return self.recorder.read(self)

    def tolist(self) -> Any:
        """Its present values, inside the block."""
        return self.present("tolist()").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Its present values, inside the block, as an array that cannot be written."""
        array = self.present("numpy()").numpy(force=force)
        array.flags.writeable = False  # a write would be lost: NumPy raises instead
        return array

    def data_ptr(self) -> int:
        """An address that is equal for equal memory, as ties are told by it; nothing may be read there."""
        ref = self.recorder.ref(self)
        return (id(ref.cell) << 8) + ref.offset * ref.dtype.itemsize

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor. Assigning a real tensor makes this one real."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeferredTensor):
            self.recorder.become(self, value)
            return
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.fake_device = value.fake_device

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "Parameter" if isinstance(self, nn.Parameter) else "Tensor"
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"{kind}(deferred, size={tuple(self.shape)}, dtype={self.dtype}, device={self.device}{grad})"

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        memo[id(self)] = copied = self.recorder.deepcopy(self, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DeferredError(self.complaint("saving it needs its values"))


def real_twin(tensor: DeferredTensor, real: torch.Tensor) -> torch.Tensor:
    """``real`` with the class, ``requires_grad`` and attributes that ``tensor`` would have had undeferred."""
    if has_hooks(tensor):
        raise UnsupportedError(tensor.complaint("gradient hooks were registered on it: register them afterwards"))
    grad = tensor.requires_grad and tensor.is_leaf
    twin = nn.Parameter(real, requires_grad=grad) if isinstance(tensor, nn.Parameter) else real.requires_grad_(grad)
    twin.__dict__.update(tensor.recorder.own_attributes(tensor))
    return twin


def user_line() -> str:
    """``file.py:line`` of the innermost frame that is neither PyTorch's nor ours."""
    ours, torches = str(Path(__file__).parent / "deferred"), str(Path(torch.__file__).parent)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((ours, torches, "<")) and not name.endswith("contextlib.py"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown line"
