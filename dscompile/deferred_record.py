"""Recording a construction: the tensor that has no data yet, and the mode that logs what is done to it.

Shapes come from fake tensors. Random operations are also run for real, on scratch, as they are met: the global
generators are then at every moment where they would be without deferral, so seeds, ``fork_rng`` and
``get_rng_state`` inside a constructor mean what they mean. An operation whose *result steers Python* (``item``,
``mask.any()``, ``nonzero``) is computed from the log on the spot.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dscompile.deferred_log import Cell, Draw, Log, Op, Ref, default_generator
from dscompile.effects import traits
from dscompile.errors import DeferredError, UnsupportedError
from dscompile.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    no_modes,
    storage_key,
    swap_contents,
    tensor_hooks,
)

_ATEN = torch.ops.aten
_FILLS = frozenset(
    {
        _ATEN.normal_.default, _ATEN.uniform_.default, _ATEN.zero_.default, _ATEN.fill_.Scalar, _ATEN.fill_.Tensor,
        _ATEN.copy_.default, _ATEN.random_.default, _ATEN.random_.to, getattr(_ATEN.random_, "from"),
        _ATEN.exponential_.default, _ATEN.geometric_.default, _ATEN.cauchy_.default, _ATEN.log_normal_.default,
        _ATEN.bernoulli_.float,
    }
)  # fmt: skip
"""In-place operators that write every element of their first operand and read none."""

_READS_VALUES = frozenset({_ATEN._local_scalar_dense.default, _ATEN.equal.default})
_AFTERWARDS = frozenset({_ATEN.clone.default, _ATEN._to_copy.default, _ATEN.detach.default})
"""What may still be recorded after the block, with views: ``model.to(dtype)``, ``deepcopy``, ``state_dict()``."""


class DeferredTensor(FakeTensor):
    """A tensor of known shape, dtype and device whose values are still a recipe in a :class:`Recorder`'s log."""

    recorder: Recorder
    owner: str = ""

    @classmethod
    def __torch_dispatch__(
        cls, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        own = next(t for t in found if isinstance(t, DeferredTensor))
        if own.recorder.faking or func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        harmless = func in _AFTERWARDS or (traits(func).shares is not None and not traits(func).writes)
        if not harmless or len(found) != 1:
            raise DeferredError(own.complaint(f"{func} needs its values"))
        return own.recorder.record(func, args, kwargs or {})

    def complaint(self, what: str) -> str:
        """The sentence of an error: which tensor, why, and what to do."""
        name = f"{self.owner} " if self.owner else ""
        return (
            f"{name}(shape {tuple(self.shape)}) has no values yet: it was built under dscompile.deferred_init() at "
            f"{self.recorder.where}, and {what}. Call dscompile.distribute(model) or dscompile.materialise(model) first"
            " (a tensor held outside the model's modules is not filled: take it from the model afterwards)."
        )

    def real(self, what: str) -> torch.Tensor:
        """A copy with the values it has at this point of the construction; an error after it."""
        if not self.recorder.active:
            raise DeferredError(self.complaint(f"{what} needs its values"))
        return self.recorder.read(self)

    def tolist(self) -> Any:
        return self.real("tolist()").tolist()

    def numpy(self, *, force: bool = False) -> Any:
        array = self.real("numpy()").numpy(force=force)
        array.flags.writeable = False  # a write would be lost: NumPy raises instead
        return array

    def data_ptr(self) -> int:
        """An address that is equal for equal memory, as ties are told by it; nothing may be read there."""
        ref = self.recorder.ref(self)
        return (id(ref.cell) << 8) + ref.offset * ref.dtype.itemsize

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, DeferredTensor):
            self.recorder.become(self, value)
            return
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.fake_device = value.fake_device

    def __repr__(self, **_: Any) -> str:
        kind = "Parameter" if isinstance(self, nn.Parameter) else "Tensor"
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"{kind}(deferred, size={tuple(self.shape)}, dtype={self.dtype}, device={self.device}{grad})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        memo[id(self)] = copied = self.recorder.deepcopy(self, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DeferredError(self.complaint("saving it needs its values"))


class Recorder(TorchDispatchMode):
    """The mode of one ``deferred_init`` block.

    Attributes:
        where: ``file.py:line`` of the block.
        active: inside the block.
        log: what was recorded.
        value_reads: how often Python asked for a value, by ``operator at file.py:line``.
        fallbacks: tensors that were built for real because they cannot be logged, with the reason.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.active = True
        self.faking = False
        self.log = Log()
        self.value_reads: Counter[str] = Counter()
        self.fallbacks: list[str] = []
        self._fake = FakeTensorMode()
        self._cells: dict[int, Cell] = {}
        self._names = frozenset[str]()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], DeferredTensor) else func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(isinstance(t, DeferredTensor) for t in tensors):
            # Work on real tensors stays real. So does an empty tensor (lazy modules build on one) and what is on "meta".
            if tensors or not _makes_data(func, args, kwargs):
                return func(*args, **kwargs)
        elif any(t.recorder is not self for t in tensors if isinstance(t, DeferredTensor)):
            raise UnsupportedError(
                f"deferred_init: {func} at {user_line()} uses a tensor that another deferred_init block built. Build the "
                "whole model in one block, or materialise the first part before."
            )
        written = _written(func, args, kwargs)
        if any(not isinstance(t, DeferredTensor) for t in written):
            return self._write_outside(func, args, kwargs, written)
        return self.record(func, args, kwargs)

    # -- one operation -----------------------------------------------------------------------------------------------

    def record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func`` on fakes and log it; run it for real too if it draws random numbers or its result is needed."""
        with no_modes():
            leaves, spec = pytree.tree_flatten((args, kwargs))
            leaves = [self._adopt(x) if isinstance(x, torch.Tensor) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            windows = tuple(self.ref(x) if isinstance(x, DeferredTensor) else x for x in leaves)
            targets = [self.ref(t) for t in _written(func, args, kwargs)]
            seeded = _draws(func)
            state = self._state(leaves, args, kwargs) if seeded else None
            failure: Exception | None = None
            result: Any = None
            try:
                if func in _READS_VALUES:
                    raise UnsupportedError("its result is a Python value")
                result = self._run_fake(func, args, kwargs)
            except Exception as error:  # a fake kernel's failure or the user's: the real operation tells which
                failure = error
            op = self._op(func, spec, windows, targets, state)
            if failure is not None:
                return self._run_real(op, leaves, failure)
            outputs = pytree.tree_leaves(result)
            op.creates = self._created(outputs)
            op.writes = tuple(dict.fromkeys((*op.writes, *(ref.cell for _, ref in op.creates))))
            if not op.writes and not seeded:
                return result  # a view, or a question about shapes
            if seeded:
                self.log.run_now(op)
            self.log.add(op)
            return result

    def _op(self, func: OpOverload, spec: Any, windows: tuple[Any, ...], targets: list[Ref], draw: Draw | None) -> Op:
        cells = [x.cell for x in windows if isinstance(x, Ref)]
        overwrites = None
        if func in _FILLS and targets[0].whole() and cells.count(targets[0].cell) == 1:
            overwrites = targets[0]
            cells = [cell for cell in cells if cell is not overwrites.cell]
        return Op(
            seq=self.log.length,
            func=func,
            spec=spec,
            leaves=windows,
            reads=tuple(dict.fromkeys(cells)),
            writes=tuple(dict.fromkeys(ref.cell for ref in targets)),
            overwrites=overwrites,
            creates=(),
            draw=draw,
            dtype=torch.get_default_dtype(),
            where=user_line(),
        )

    def _run_fake(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.faking = True
        try:
            with self._fake:
                result = func(*args, **kwargs)
        finally:
            self.faking = False
        for leaf in pytree.tree_leaves(result):
            if type(leaf) is FakeTensor:
                self._defer(leaf)
        return result

    def _run_real(self, op: Op, leaves: list[Any], failure: Exception) -> Any:
        """Run ``op`` on its real operands, as no fake kernel can tell the result's shape or value."""
        outputs = self.log.run_now(op)
        self.value_reads[f"{op.func} at {op.where}"] += 1
        if op.writes:
            self.log.add(op)
            self.log.forget()  # outputs may be windows on cached storages
            operands = [x for x in leaves if isinstance(x, DeferredTensor)]
            if len(outputs) == 1 and self.ref(operands[0]).cell is op.writes[0]:
                return operands[0]
            raise UnsupportedError(f"deferred_init: {op.func} at {op.where} cannot be recorded: {failure}") from failure
        results: list[Any] = []
        for position, output in enumerate(outputs):
            if isinstance(output, torch.Tensor) and output.layout is torch.strided:
                deferred = self._empty_like(output)
                op.creates += ((position, self.ref(deferred)),)
                results.append(deferred)
                continue
            if isinstance(output, torch.Tensor):
                self.fallbacks.append(f"{op.func} at {op.where} gives a {output.layout} tensor")
            results.append(output)
        op.writes = tuple(ref.cell for _, ref in op.creates)
        if op.writes:
            self.log.add(op)
        single = len(op.func._schema.returns) == 1 and not str(op.func._schema.returns[0].type).startswith("List")
        return results[0] if single else tuple(results)

    def _write_outside(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> Any:
        """A real tensor is written from deferred ones: compute those now, and write."""
        if any(isinstance(t, DeferredTensor) for t in written) or traits(func).reshapes:
            raise UnsupportedError(
                f"deferred_init: {func} at {user_line()} mixes a deferred tensor with one that has values in a way that "
                "cannot be recorded. Build this model without deferred_init."
            )
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with no_modes():
            leaves = [self.read(x) if isinstance(x, DeferredTensor) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            self.value_reads[f"{func} at {user_line()}"] += 1
            return func(*args, **kwargs)

    def _state(self, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Generator):
                return Draw(leaf.device, leaf.get_state(), position)
        tensor = next((x for x in leaves if isinstance(x, DeferredTensor)), None)
        device = tensor.fake_device if tensor is not None else torch.device(kwargs.get("device") or "cpu")
        return Draw(device, default_generator(device).get_state(), None)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def ref(self, tensor: DeferredTensor) -> Ref:
        """The window that ``tensor`` is now, on a known or new cell."""
        if tensor.is_neg():
            raise UnsupportedError(f"deferred_init: a lazily negated tensor at {user_line()} is not supported.")
        return Ref(
            self._cell(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.is_conj(),
        )

    def read(self, tensor: DeferredTensor) -> torch.Tensor:
        """A real copy of ``tensor`` as it stands."""
        with no_modes():
            ref = self.ref(tensor)
            return ref.on(self.log.now([ref.cell], self.log.length)[ref.cell]).clone()

    def own_attributes(self, tensor: DeferredTensor) -> dict[str, Any]:
        """The attributes that the user's code set on ``tensor``."""
        return {k: v for k, v in tensor.__dict__.items() if k not in self._names and k not in ("recorder", "owner")}

    def become(self, tensor: DeferredTensor, value: torch.Tensor) -> None:
        """``tensor.data = value`` with a real ``value``: the tensor is real from now on."""
        with no_modes():
            swap_contents(tensor, real_twin(tensor, value.detach()))

    def deepcopy(self, tensor: DeferredTensor, memo: dict[int, Any]) -> DeferredTensor:
        """A recorded copy. Plain tensors that share memory share it after the copy too, as ``Tensor.__deepcopy__`` does."""
        with torch.no_grad():
            if isinstance(tensor, nn.Parameter):
                result: DeferredTensor = tensor.detach().clone(memory_format=torch.preserve_format)
                result._is_param = True
            else:
                ref = self.ref(tensor)
                key = hash((id(ref.cell), ref.dtype))
                if key not in memo:
                    count = ref.cell.nbytes // ref.dtype.itemsize
                    memo[key] = tensor.detach().as_strided((count,), (1,), 0).clone()
                result = memo[key].as_strided(ref.size, ref.stride, ref.offset)
        if not isinstance(tensor, nn.Parameter):
            for name, value in self.own_attributes(tensor).items():
                setattr(result, name, copy.deepcopy(value, memo))
        result.owner = tensor.owner
        return result.requires_grad_(tensor.requires_grad)

    def _cell(self, tensor: DeferredTensor) -> Cell:
        key = storage_key(tensor)
        if key is None:
            raise UnsupportedError(f"deferred_init: a {tensor.layout} tensor at {user_line()} cannot be deferred.")
        if key not in self._cells:
            storage = tensor.untyped_storage()
            self._cells[key] = Cell(tensor.fake_device, storage.nbytes(), storage)
        return self._cells[key]

    def _created(self, outputs: list[Any]) -> tuple[tuple[int, Ref], ...]:
        fresh = [
            (position, output)
            for position, output in enumerate(outputs)
            if isinstance(output, DeferredTensor) and storage_key(output) not in self._cells
        ]
        return tuple((position, self.ref(output)) for position, output in fresh)

    def _adopt(self, tensor: torch.Tensor) -> DeferredTensor:
        """A real operand as a deferred one that holds a copy of its present values."""
        if isinstance(tensor, DeferredTensor):
            return tensor
        if tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise UnsupportedError(
                f"deferred_init: a {type(tensor).__name__} ({tensor.layout}) is combined with a deferred tensor at "
                f"{user_line()}; only plain dense tensors can be. Build this model without deferred_init."
            )
        copied = tensor.detach().clone()
        deferred = self._empty_like(copied)
        self._cell(deferred).given = copied.untyped_storage()
        return deferred

    def _empty_like(self, real: torch.Tensor) -> DeferredTensor:
        with self._fake:
            fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=real.device)
        return self._defer(fake)

    def _defer(self, fake: Any) -> DeferredTensor:
        if not self._names:
            self._names = frozenset(fake.__dict__) | {"_is_param"}
        fake.__class__ = DeferredTensor
        fake.recorder = self
        deferred: DeferredTensor = fake
        return deferred


def real_twin(tensor: DeferredTensor, real: torch.Tensor) -> torch.Tensor:
    """``real`` in the class, with the ``requires_grad`` and the attributes that ``tensor`` would have had undeferred."""
    if tensor_hooks(tensor):
        raise UnsupportedError(tensor.complaint("gradient hooks were registered on it: register them afterwards"))
    grad = tensor.requires_grad and tensor.is_leaf
    twin = nn.Parameter(real, requires_grad=grad) if isinstance(tensor, nn.Parameter) else real.requires_grad_(grad)
    twin.__dict__.update(tensor.recorder.own_attributes(tensor))
    return twin


def _makes_data(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call without tensor operands builds a tensor that is worth deferring."""
    if torch.device(kwargs.get("device") or "cpu").type == "meta":
        return False
    if not any("Tensor" in str(r.type) for r in func._schema.returns):
        return False
    sizes = next((a for a in args if isinstance(a, (list, tuple))), None)
    return sizes is None or 0 not in sizes


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors that a call mutates, in schema order."""
    found = traits(func)
    values = [args[i] if i < len(args) else kwargs.get(found.names[i]) for i in found.writes]
    return [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]


def _draws(func: OpOverload) -> bool:
    """Whether the call may advance a generator. Only ATen's tags are complete: others are taken to."""
    return traits(func).seeded or func.namespace not in ("aten", "prim", "prims")


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
