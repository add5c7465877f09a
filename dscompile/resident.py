"""When a resident full parameter (ZeRO stage 1 and 2) has to be gathered again.

After a gradient arrived, because an optimizer step follows (a fused one is seen by no version counter); and after any
other write, which PyTorch counts on the DTensor parameter, not on the local tensor inside it. So a local tensor knows
the parameter it belongs to; one without an owner is never taken to be fresh.
"""

from __future__ import annotations

import weakref

from torch import Tensor

_OWNER = "dscompile_owner"
_FRESH = "dscompile_fresh"


def set_owner(local: Tensor, parameter: Tensor) -> None:
    """Say which parameter a local tensor is the shard of; every gradient that reaches it makes the copy stale."""
    setattr(local, _OWNER, weakref.ref(parameter))
    if parameter.requires_grad:
        parameter.register_post_accumulate_grad_hook(lambda _: set_stale(local))


def is_fresh(local: Tensor) -> bool:
    """Whether nothing wrote to the parameter of ``local`` since :func:`set_fresh`."""
    version = _version(local)
    return version is not None and getattr(local, _FRESH, None) == version


def set_fresh(local: Tensor) -> None:
    """Remember that the resident buffer behind ``local`` is up to date."""
    setattr(local, _FRESH, _version(local))


def set_stale(local: Tensor) -> None:
    """Have the resident buffer gathered at the next use, whatever the version says."""
    setattr(local, _FRESH, None)


def _version(local: Tensor) -> int | None:
    owner = getattr(local, _OWNER, None)
    parameter = owner() if owner is not None else None
    return None if parameter is None else int(parameter._version)
