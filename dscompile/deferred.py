"""Deferred construction: build a model without memory, and fill it one tensor at a time.

``with deferred_init(): model = Model(config)`` runs the constructor and records what it does to tensors instead of
doing it. :func:`materialise` computes each parameter and buffer from the record, bit for bit what the constructor would
have made from the same seed, and hands it to a callback that keeps a shard: no rank ever holds the whole model.
The method is that of torchdistX (``deferred_init``), with storages in place of tensors as the recorded thing, and with
values that steer the constructor (``trunc_normal_``'s rejection loop) computed when they are asked for.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from dscompile.deferred_log import WORTH_RETURNING, Cell, return_memory
from dscompile.deferred_record import Recorder
from dscompile.deferred_slots import Slot, find_slots
from dscompile.deferred_tensor import DeferredTensor, real_twin, user_line
from dscompile.torch_compat import dispatch_modes, no_modes, swap_contents

Place = Callable[[str, torch.Tensor, bool], torch.Tensor]
"""``place(fqn, full, is_parameter)`` returns what to keep: ``full`` itself, or another tensor, such as a shard."""


@dataclass(frozen=True, slots=True)
class DeferredReport:
    """What :func:`materialise` did.

    Attributes:
        route: ``"deferred"``; ``"mixed"`` if some tensors were built for real because they cannot be recorded (see
            ``fallbacks``); ``"real"`` if the model holds no deferred tensor.
        recorded: operations in the record.
        replayed: operations run to get values, those run during the construction included.
        materialised: tensors filled from the record.
        given: tensors of the model that came with their values (``torch.tensor``, NumPy) and were never deferred.
        value_reads: how often a value was computed during the construction, as the constructor asked for it or as no
            fake kernel tells its shape, by ``operator at file.py:line``.
        peak_bytes: the most bytes of full-size storages alive at once, in the construction or here: the tensor being
            filled, what it is computed from, and full tensors that ``place`` kept; not the
            shards it returned, nor values that came from outside.
        largest_bytes: the largest storage of the model's construction.
        fallbacks: the reasons why tensors were built for real, one each.
    """

    route: Literal["deferred", "mixed", "real"]
    recorded: int
    replayed: int
    materialised: int
    given: int
    value_reads: dict[str, int]
    peak_bytes: int
    largest_bytes: int
    fallbacks: tuple[str, ...]


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Build modules in this block without their data; fill them with :func:`materialise` or ``distribute``.

    Random generators move on as if the block were not there. Tensors that come with their values (``torch.tensor``,
    NumPy) stay real. A block inside another belongs to the outer one. A value that the constructor asks for is
    computed on the spot, exactly; what cannot be recorded is built for real and reported, or refused with
    :class:`~dscompile.errors.UnsupportedError`.
    """
    if any(isinstance(mode, Recorder) for mode in dispatch_modes()):
        yield
        return
    recorder = Recorder(user_line())

    def name(module: nn.Module, attribute: str, value: Any) -> None:
        if isinstance(value, DeferredTensor) and value.recorder is recorder and not value.owner:
            value.owner = f"{type(module).__name__}.{attribute}"

    hooks = (register_module_parameter_registration_hook(name), register_module_buffer_registration_hook(name))
    try:
        with recorder:
            yield
    finally:
        recorder.active = False
        recorder.log.forget()
        for hook in hooks:
            hook.remove()


def is_deferred(value: nn.Module | torch.Tensor) -> bool:
    """Whether a tensor, or any parameter, buffer or tensor attribute of a module, waits for its values."""
    if isinstance(value, torch.Tensor):
        return isinstance(value, DeferredTensor)
    return any(isinstance(slot.tensor, DeferredTensor) for slot in find_slots(value))


def build_deferred(model_fn: Callable[[], nn.Module]) -> tuple[nn.Module, str | None]:
    """``model_fn()`` under :func:`deferred_init`, or for real if that cannot be.

    A constructor that fails when deferred is run again without, from the same random states (PyTorch's, Python's and
    NumPy's); its own errors come out of that second run.

    Returns:
        The model, and None or the reason why it was built for real.
    """
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with deferred_init():
            return model_fn(), None
    except Exception as error:  # whatever it is, the real build decides whether it is the user's
        reason = f"{type(error).__name__}: {error}"
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for index, state in enumerate(gpus):
        torch.cuda.set_rng_state(state, index)
    return model_fn(), reason


def materialise(model: nn.Module, place: Place | None = None) -> DeferredReport:
    """Fill a deferred model: bit for bit what its constructor would have built from the same seed.

    Args:
        model: its parameters, then its buffers, then tensors in plain attributes (also in lists, tuples and dicts) are
            filled, in the order of ``named_parameters()`` and so in the same order on every rank.
        place: called once for each distinct parameter and buffer, real ones included, with its first name, its full
            value (a ``Parameter`` if it is one) and whether it is a parameter. If it returns another tensor, that
            replaces it everywhere in the model's modules, and the full value is freed before the next is computed. By
            default, and if it returns the tensor it was given, the deferred tensor itself gets the values: references
            to it anywhere (an optimizer's, a recurrent layer's) stay good.

    Returns:
        A report; the global random state is left as it is.

    Raises:
        UnsupportedError: an operation's real result is laid out otherwise than its fake kernel promised.
    """
    places: dict[int, list[Slot]] = {}
    for slot in find_slots(model):
        places.setdefault(id(slot.tensor), []).append(slot)
    tensors = [holders[0].tensor for holders in places.values()]
    recorders = list(dict.fromkeys(t.recorder for t in tensors if isinstance(t, DeferredTensor)))
    filler = _Filler([t for t in tensors if isinstance(t, DeferredTensor)])
    given = 0
    for tensor in tensors:
        holders = places[id(tensor)]
        first = holders[0]
        if first.kind == "attribute" and not isinstance(tensor, DeferredTensor):
            continue
        full = filler.fill(tensor) if isinstance(tensor, DeferredTensor) else tensor
        given += full is tensor
        result = (
            full if place is None or first.kind == "attribute" else place(first.fqn, full, first.kind == "parameter")
        )
        if result is not full:
            for slot in holders:
                slot.assign(result)
        elif isinstance(tensor, DeferredTensor):
            filler.keep(tensor, full)
        freed = full.nbytes if full is not tensor and result is not full else 0
        del full, result
        if freed >= WORTH_RETURNING:
            return_memory()
    fallbacks = tuple(reason for recorder in recorders for reason in recorder.fallbacks)
    reads: Counter[str] = sum((recorder.value_reads for recorder in recorders), Counter())
    logs = [recorder.log for recorder in recorders]
    return DeferredReport(
        route="real" if not recorders else "mixed" if fallbacks else "deferred",
        recorded=sum(log.length for log in logs),
        replayed=sum(log.replayed for log in logs),
        materialised=filler.filled,
        given=given,
        value_reads=dict(reads),
        peak_bytes=max([filler.peak, *(log.peak for log in logs)]),
        largest_bytes=max([0, *(log.largest for log in logs)]),
        fallbacks=fallbacks,
    )


class _Filler:
    """Computes full tensors one at a time. ``kept`` counts the bytes of full storages that must outlive their turn."""

    def __init__(self, tensors: list[DeferredTensor]) -> None:
        self.filled = 0
        self.peak = 0
        self._kept = 0
        self._waiting = Counter(t.recorder.ref(t).cell for t in tensors)
        self._shared: dict[Cell, torch.UntypedStorage] = {}

    def fill(self, tensor: DeferredTensor) -> torch.Tensor:
        """The full value of ``tensor``; its storage is remembered only for tensors that share it and come later."""
        self.filled += 1
        with no_modes():
            ref = tensor.recorder.ref(tensor)
            storage = self._shared.pop(ref.cell, None)
            if storage is None:
                storage, peak = tensor.recorder.log.value(ref.cell)
                self.peak = max(self.peak, self._kept + peak)
            else:
                self._kept -= storage.nbytes()
            self._waiting[ref.cell] -= 1
            if self._waiting[ref.cell]:
                self._shared[ref.cell] = storage
                self._kept += storage.nbytes()
            return real_twin(tensor, ref.on(storage))

    def keep(self, tensor: DeferredTensor, full: torch.Tensor) -> None:
        """Turn ``tensor`` itself into ``full``."""
        if tensor.recorder.ref(tensor).cell not in self._shared:
            self._kept += full.untyped_storage().nbytes()
        swap_contents(tensor, full)
