"""Recording a construction: the mode that logs what is done to tensors instead of doing it.

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
from types import FrameType
from typing import Any

import torch
from torch import nn

from dscompile.deferred_log import Cell, Draw, Log, Op, Ref, default_generator
from dscompile.deferred_rejection import TRUNCATED, rejection_loop
from dscompile.deferred_tensor import DeferredTensor, real_twin, user_line
from dscompile.effects import traits
from dscompile.errors import UnsupportedError
from dscompile.torch_compat import (
    FakeTensor,
    OpOverload,
    TorchDispatchMode,
    forget_conversions,
    no_modes,
    pytree,
    storage_key,
    strict_fake_mode,
    swap_contents,
)

_ATEN = torch.ops.aten
_FILLS = frozenset(
    {
        _ATEN.normal_.default, _ATEN.uniform_.default, _ATEN.zero_.default, _ATEN.fill_.Scalar, _ATEN.fill_.Tensor,
        _ATEN.copy_.default, _ATEN.random_.default, _ATEN.random_.to, getattr(_ATEN.random_, "from"),
        _ATEN.exponential_.default, _ATEN.geometric_.default, _ATEN.cauchy_.default, _ATEN.log_normal_.default,
        _ATEN.bernoulli_.float, TRUNCATED,
    }
)  # fmt: skip
"""In-place operators that write every element of their first operand and read none."""

_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_READS_VALUES = frozenset({_ATEN._local_scalar_dense.default, _ATEN.equal.default})


class Recorder(TorchDispatchMode):
    """The mode of one ``deferred_init`` block.

    Attributes:
        where: ``file.py:line`` of the block.
        active: inside the block.
        log: what was recorded.
        value_reads: what was computed during the construction because Python asked for its value or no fake kernel
            tells its shape, by ``operator at file.py:line``.
        fallbacks: tensors that were built for real because they cannot be logged, with the reason.
    """

    def __init__(self, where: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.active = True
        self.faking = False
        self.log = Log()
        self.value_reads: Counter[str] = Counter()
        self.fallbacks: list[str] = []
        self._fake = strict_fake_mode()
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
            # Work on real tensors stays real; so do an empty tensor (lazy modules build on one) and "meta".
            if tensors or not _makes_data(func, args, kwargs):
                return func(*args, **kwargs)
        elif any(t.recorder is not self for t in tensors if isinstance(t, DeferredTensor)):
            raise UnsupportedError(
                f"deferred_init: {func} at {user_line()} uses a tensor that another deferred_init block built. Build "
                "the whole model in one block, or materialise the first part before."
            )
        elif func is _ATEN.detach.default:
            _refuse_parameter_class()
        written = _written(func, args, kwargs)
        odd = next((t for t in tensors if not _plain(t)), None)
        suspects = tensors if traits(func).reshapes else written
        if odd is not None or any(not isinstance(t, DeferredTensor) for t in suspects):
            return self._compute(func, args, kwargs, written, odd)
        return self.record(func, args, kwargs)

    # -- one operation -----------------------------------------------------------------------------------------------

    def record(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func`` on fakes and log it; run it for real too if it draws random numbers or its result is needed."""
        loop = rejection_loop(args[0]) if func is _ATEN.normal_.default else None
        if loop is not None:
            func, (args, kwargs) = TRUNCATED, loop
            self.log.forget()  # the loop's memory is its own
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
                if func in _READS_VALUES or (_custom(func) and loop is None):
                    raise UnsupportedError("it is run for real")
                result = args[0] if loop is not None else self._run_fake(func, args, kwargs)
            except Exception as error:  # a fake kernel's failure or the user's: the real operation tells which
                failure = error
            op = self._op(func, spec, windows, targets, state)
            if failure is not None:
                return self._run_real(op, leaves, failure)
            outputs = pytree.tree_leaves(result)
            op.creates = self._created(outputs)
            op.writes = tuple(dict.fromkeys((*op.writes, *(ref.cell for _, ref in op.creates))))
            if not op.writes and not seeded:  # a view, or a question about shapes
                for output in outputs:
                    if isinstance(output, DeferredTensor):
                        output.owner = output.owner or next(x.owner for x in leaves if isinstance(x, DeferredTensor))
                return result
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
        forget_conversions(self._fake)
        fresh = [leaf for leaf in pytree.tree_leaves(result) if type(leaf) is FakeTensor]
        for leaf in fresh:
            if not _plain(leaf):
                raise UnsupportedError(f"its result is a {_kind(leaf)}")
        for leaf in fresh:
            self._defer(leaf)
        return result

    def _run_real(self, op: Op, leaves: list[Any], failure: Exception) -> Any:
        """Run ``op`` on its real operands, as no fake kernel can tell the result's shape or value."""
        if traits(op.func).shares is not None and not op.writes:  # a view of what the evaluation throws away
            raise UnsupportedError(f"deferred_init: {op.func} at {op.where} cannot be recorded: {failure}") from failure
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
            if isinstance(output, torch.Tensor) and _plain(output):
                deferred = self._empty_like(output)
                op.creates += ((position, self.ref(deferred)),)
                results.append(deferred)
                continue
            if isinstance(output, torch.Tensor):
                self.fallbacks.append(f"{op.func} at {op.where} gives a {_kind(output)}")
            results.append(output)
        op.writes = tuple(ref.cell for _, ref in op.creates)
        if op.writes:
            self.log.add(op)
        if traits(op.func).lists:
            return results
        return results[0] if len(results) == 1 else tuple(results)

    def _compute(
        self,
        func: OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: list[torch.Tensor],
        odd: torch.Tensor | None,
    ) -> Any:
        """Run ``func`` for real now: it writes a real tensor from deferred ones, or an operand cannot be deferred.

        Refused if a deferred tensor is written, or would come to share memory with a real one.
        """
        where = f"{func} at {user_line()}"
        if any(isinstance(t, DeferredTensor) for t in written) or traits(func).reshapes:
            raise UnsupportedError(
                f"deferred_init: {where} mixes a deferred tensor with one that has values in a way that cannot be "
                "recorded. Build this model without deferred_init."
            )
        if odd is None:
            self.value_reads[where] += 1
        else:
            self.fallbacks.append(f"{where} has a {_kind(odd)} operand")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with no_modes():
            leaves = [self.read(x) if isinstance(x, DeferredTensor) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
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
        return Ref(
            self._cell(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.is_conj(),
            tensor.is_neg(),
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

    def deepcopy(self, tensor: DeferredTensor, memo: dict[Any, Any]) -> Any:
        """A recorded copy. Plain tensors that share memory still do, as with ``Tensor.__deepcopy__``."""
        with torch.no_grad():
            if isinstance(tensor, nn.Parameter):
                result: Any = tensor.detach().clone(memory_format=torch.preserve_format)
                result._is_param = True
            else:
                ref = self.ref(tensor)
                key = (id(ref.cell), ref.dtype, ref.conj, ref.neg)
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
        assert key is not None, "only plain tensors are deferred"
        storage = tensor.untyped_storage()
        cell = self._cells.setdefault(key, Cell(tensor.fake_device, storage.nbytes(), storage))
        cell.nbytes = storage.nbytes()  # resize_
        return cell

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


def _plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a window on a storage, as the log knows them."""
    own = isinstance(tensor, FakeTensor) or type(tensor) in (torch.Tensor, nn.Parameter)
    return own and tensor.layout is torch.strided and tensor.dtype not in _QUANTIZED


def _kind(tensor: torch.Tensor) -> str:
    if tensor.dtype in _QUANTIZED:
        return "quantized tensor"
    return f"{type(tensor).__name__} of {tensor.layout} layout"


def _refuse_parameter_class() -> None:
    """``class Mine(nn.Parameter)`` on a deferred tensor would silently come out as a plain parameter: refuse it."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            return
        if frame.f_code is nn.Parameter.__new__.__code__ and frame.f_locals["cls"] is not nn.Parameter:
            raise UnsupportedError(
                f"deferred_init: {frame.f_locals['cls'].__name__} at {user_line()} is a class of parameters; only "
                "nn.Parameter itself can be deferred. Build this model without deferred_init."
            )
        frame = frame.f_back


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


def _custom(func: OpOverload) -> bool:
    """Whether the operator is not PyTorch's own: its tags need not say that it draws, nor its fake kernel be right."""
    return func.namespace not in ("aten", "prim", "prims")


def _draws(func: OpOverload) -> bool:
    """Whether the call may advance a generator."""
    return traits(func).seeded or _custom(func)
