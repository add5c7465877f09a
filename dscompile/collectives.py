"""The collectives as eager code calls them, and the log that every collective of ours passes by.

``COLLECTIVES.all_gather_into_tensor(...)`` is ``torch.ops._c10d_functional.all_gather_into_tensor(...)``, and so on.
Compiled programs launch theirs in :mod:`dscompile.runtime.comm` and tell :data:`LOG` themselves. While nobody listens
that costs one attribute read a collective.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.torch_compat import process_group

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that is over.

    Attributes:
        op: name of the operator, as PyTorch has it.
        bytes: payload: a gather's output, a scatter's or an exchange's input, an all-reduce's tensor.
        world: ranks that took part.
        latency: seconds from the launch to the end of the wait; of an overlapped one, computation included.
        waited: seconds of it that this rank stood still.
        place: module or node that waited, if it is known.
    """

    op: str
    bytes: int
    world: int
    latency: float
    waited: float
    place: str

    @property
    def moved(self) -> int:
        """Bytes that this rank transmitted: ``(world - 1) / world`` of the payload, twice that for an all-reduce.

        Source: the ring algorithms' cost, Rajbhandari et al., ZeRO (2020), section 7.
        """
        return self.bytes * (self.world - 1) * (2 if self.op == "all_reduce" else 1) // self.world


Listener = Callable[[Collective], None]


class CollectiveLog:
    """Tells listeners of every collective that ends. Launched ones are kept by the tensor that is waited for."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._open: dict[int, tuple[str, int, int, float]] = {}

    @property
    def active(self) -> bool:
        """Whether somebody listens."""
        return bool(self._listeners)

    def start(self, listener: Listener) -> None:
        """Tell ``listener`` from now on."""
        self._listeners = (*self._listeners, listener)

    def stop(self, listener: Listener) -> None:
        """Tell ``listener`` no more."""
        self._listeners = tuple(one for one in self._listeners if one != listener)
        if not self._listeners:
            self._open.clear()

    def launched(self, op: str, out: Tensor, payload: Tensor, world: int) -> None:
        """A collective whose result is ``out`` begins; ``payload`` is the tensor whose size counts."""
        if self._listeners:
            _settle(out)
            self._open[id(out)] = (op, payload.numel() * payload.element_size(), world, time.perf_counter())

    def clock(self) -> float:
        """Now, if somebody listens: what :meth:`finished` wants to know from before the wait."""
        return time.perf_counter() if self._listeners else 0.0

    def finished(self, out: Tensor, began: float, place: str = "") -> None:
        """The wait for ``out``, which began at ``began``, is over."""
        if not self._listeners or (found := self._open.pop(id(out), None)) is None:
            return
        _settle(out)
        op, size, world, launched = found
        now = time.perf_counter()
        event = Collective(op, size, world, now - launched, now - began, place)
        for listener in self._listeners:
            listener(event)

    @contextlib.contextmanager
    def timing(self, op: str, payload: Tensor, world: int, place: str = "") -> Iterator[None]:
        """A collective that is over at the end of the block."""
        self.launched(op, payload, payload, world)
        began = self.clock()
        yield
        self.finished(payload, began, place)


def _settle(tensor: Tensor) -> None:
    """Wait for the device, as times of a GPU's collectives mean nothing otherwise."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


LOG = CollectiveLog()
"""This process's collectives."""


class _Collectives:
    """The functional collectives, by their own names and arguments."""

    def all_gather_into_tensor(self, flat: Tensor, world: int, group: str) -> Tensor:
        """Gather ``flat`` from every rank, one behind the other."""
        out: Tensor = _c10d.all_gather_into_tensor(flat, world, group)
        LOG.launched("all_gather_into_tensor", out, out, world)
        return out

    def all_gather_into_tensor_out(self, flat: Tensor, world: int, group: str, *, out: Tensor) -> Tensor:
        """Gather into ``out``."""
        launched: Tensor = _c10d.all_gather_into_tensor_out(flat, world, group, out=out)
        LOG.launched("all_gather_into_tensor", launched, launched, world)
        return launched

    def all_to_all_single(self, flat: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
        """Exchange parts of ``flat``."""
        out: Tensor = _c10d.all_to_all_single(flat, receive, send, group)
        LOG.launched("all_to_all_single", out, flat, len(send))
        return out

    def reduce_scatter_tensor(self, flat: Tensor, kind: str, world: int, group: str) -> Tensor:
        """Reduce ``flat``, of which each rank keeps its part."""
        out: Tensor = _c10d.reduce_scatter_tensor(flat, kind, world, group)
        LOG.launched("reduce_scatter_tensor", out, flat, world)
        return out

    def all_reduce(self, tensor: Tensor, kind: str, group: str) -> Tensor:
        """Reduce ``tensor`` to every rank."""
        out: Tensor = _c10d.all_reduce(tensor, kind, group)
        if LOG.active:
            LOG.launched("all_reduce", out, out, process_group(group).size())
        return out

    def wait_tensor(self, launched: Tensor, place: str = "") -> Tensor:
        """Wait for a launched collective."""
        began = LOG.clock()
        out: Tensor = _c10d.wait_tensor(launched)
        LOG.finished(launched, began, place)
        return out


COLLECTIVES = _Collectives()
"""What eager code calls in place of ``torch.ops._c10d_functional``."""
