"""When a resident full parameter (ZeRO stage 1 and 2) has to be gathered again.

After a gradient arrived, because an optimizer step follows (a fused one is seen by no version counter); and after any
other write, which PyTorch counts on the DTensor parameter, not on the local tensor inside it. A local tensor finds its
parameter through its mark; one without a mark is never taken to be fresh.
"""

from __future__ import annotations

from torch import Tensor

from dscompile.slots import Slot, slot_of


def is_fresh(local: Tensor) -> bool:
    """Whether nothing wrote to the parameter of ``local`` since :func:`set_fresh`."""
    slot = slot_of(local)
    return slot is not None and slot.fresh == _version(slot)


def set_fresh(local: Tensor) -> None:
    """Remember that the resident buffer behind ``local`` is up to date."""
    slot = slot_of(local)
    if slot is not None:
        slot.fresh = _version(slot)


def _version(slot: Slot) -> int:
    return int(slot.param._version)
