"""Reading and writing sharded parameters outside compiled graphs: the ``gathered`` context, and the count of reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dscompile.placement import resident_of
from dscompile.sharded import slots_in
from dscompile.slots import Slot
from dscompile.torch_compat import local_of, process_group


@contextlib.contextmanager
def gathered(module: nn.Module, *, write: bool = False, source: int | None = None) -> Iterator[None]:
    """Inside, attribute reads of ``module``'s sharded parameters give one full value each, gathered once, on entry.

    Args:
        module: every rank enters with the same module: gathering is a collective.
        write: the values may be written in place (initialisation, surgery); on exit each rank keeps its rows. Reads
            then have no autograd, and are the masters, in their own dtype rather than the compute dtype.
        source: with ``write``, the rank of the parameter's group whose values all ranks take.

    Without ``write``, reads that autograd must see still gather for themselves. A graph compiled earlier reads the
    shards, so it sees writes after the context has ended. Nothing is written back if the body raises.
    """
    with gathered_slots(slots_in(module), write=write, source=source):
        yield


@contextlib.contextmanager
def gathered_slots(slots: Sequence[Slot], *, write: bool = False, source: int | None = None) -> Iterator[None]:
    """:func:`gathered` for some parameters; those gathered already belong to the outer context."""
    slots = [slot for slot in slots if slot.full is None]
    with torch.no_grad():
        for slot in slots:
            slot.full, slot.writable = slot.gather(master=write), write
    try:
        yield
        if write:
            for slot in slots:
                _write_back(slot, source)
    finally:
        for slot in slots:
            slot.full, slot.writable = None, False


def _write_back(slot: Slot, source: int | None) -> None:
    full = cast(Tensor, slot.full)
    with torch.no_grad():
        if source is not None and slot.spec.world > 1:
            dist.broadcast(full, group=process_group(slot.spec.group), group_src=source)
        resident = resident_of(slot.param)
        if resident is not None:
            resident.copy_(full)
        else:
            local_of(slot.param).copy_(slot.spec.shard_of(full, slot.rank))
            slot.fresh = None


def access_count(module: nn.Module) -> int:
    """How often code outside compiled graphs read a sharded parameter of ``module``; each read was a gather."""
    return sum(slot.reads for slot in slots_in(module))
