"""Gradient accumulation: add up full gradients locally, reduce once at the boundary.

::

    with dscompile.no_sync(model):
        model(first).backward()      # full gradients add up; .grad stays as it was; no hooks, no communication
    model(last).backward()           # reduces both together, then fills .grad; hooks fire
    optimizer.step()

The accumulator is full-sized on every rank, in ``precision.grad_dtype`` (by default the master's dtype), from the first
backward pass inside ``no_sync`` to the one at the boundary. ``optimizer.zero_grad()`` does not touch it:
:func:`discard_accumulation` does. ``zero.reduce_micro_batches`` (stages 2 and 3) trades it for a reduction in every
micro-batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dscompile.errors import ShardingError, UnsupportedError
from dscompile.ops import REPLICATED, reduce_grad
from dscompile.placement import spec_of
from dscompile.sharded import Sync, set_variant, sharded_modules, slots_in
from dscompile.slots import Slot, slot_of
from dscompile.torch_compat import wrap_like


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Forward passes inside accumulate gradients without reducing them; the first one after it reduces all.

    As with DDP, it is the *forward* pass that must be inside. Compiled graphs have one variant for each of: plain,
    inside, and boundary. May be nested. With ``zero.reduce_micro_batches`` it changes nothing: shards add up in
    ``.grad``.
    """
    slots = slots_in(model)
    if slots and slots[0].config.zero.reduce_micro_batches:
        yield
        return
    modules = list(sharded_modules(model))
    before = [type(m) for m in modules]
    for slot in slots:
        slot.open_window()
    for module in modules:
        set_variant(module, Sync.LOCAL)
    try:
        yield
    finally:
        for module, cls in zip(modules, before, strict=True):
            nested = getattr(cls, "_dscompile_sync", None) is Sync.LOCAL
            set_variant(module, Sync.LOCAL if nested else Sync.BOUNDARY)


def pending_accumulation(model: nn.Module) -> list[str]:
    """Names of the parameters that hold micro-batch gradients not reduced yet; empty after a boundary."""
    return [slot.spec.fqn for slot in slots_in(model) if slot.accumulated is not None]


def reduce_pending(model: nn.Module) -> None:
    """Reduce what the boundary's backward pass left, because it did not use those parameters, into their ``.grad``.

    A collective for each such parameter: every rank must have left the same ones.
    """
    for slot in slots_in(model):
        if slot.accumulated is not None:
            _reduce(slot)


def _reduce(slot: Slot) -> None:
    spec, full = slot.spec, cast(Tensor, slot.accumulated)
    with torch.no_grad():
        shape, out = slot.shard.shape, slot.param.grad_dtype or slot.shard.dtype
        rows = 0 if spec.dim == REPLICATED else shape[spec.dim]
        tile = None if spec.tile is None else (spec.tile.dim, shape[spec.tile.dim], spec.tile.parts)
        local = reduce_grad(full, spec.dim, rows, spec.world, spec.group, spec.wire, out, tile)
        grad = wrap_like(slot.param, local)
        slot.param.grad = grad if slot.param.grad is None else slot.param.grad + grad
    slot.close_window()


def discard_accumulation(model: nn.Module) -> None:
    """Drop accumulated gradients, for instance after a NaN in the middle of a window."""
    for slot in slots_in(model):
        slot.close_window()


# -- what optimizers must not do ---------------------------------------------------------------------------------------

NOT_ELEMENTWISE = (torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam, torch.optim.Muon)
"""Optimizers whose update of one element depends on others, or that need sparse gradients."""


@functools.cache
def watch_optimizers() -> None:
    """Check sharded parameters before every ``optimizer.step()``, once a process (a public hook of torch.optim)."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = False
    for param in params:
        spec = spec_of(param)
        if spec is None:
            continue
        slot = slot_of(param)
        if slot is not None:
            _check_slot(slot)
        sharded = sharded or spec.stage > 0
    if not sharded:
        return
    if isinstance(optimizer, NOT_ELEMENTWISE):
        raise UnsupportedError(
            f"{type(optimizer).__name__} does not update element by element, so it would compute something else on "
            "shards; use an elementwise optimizer (SGD, Adam, AdamW, ...) or zero.stage 0."
        )
    plain = [p for p in params if spec_of(p) is None and p.grad is not None]
    if plain:
        raise ShardingError(
            f"{len(plain)} parameter(s) (the first: shape {tuple(plain[0].shape)}) were added after distribute(): "
            "their gradients are not reduced. Call distribute(model) again, then make the optimizer; "
            "check_plain(model) names them."
        )


def _check_slot(slot: Slot) -> None:
    slot.fresh = None  # a fused optimizer writes unseen by version counters
    if slot.accumulated is not None:
        raise ShardingError(
            f"optimizer.step() in the middle of an accumulation window: {slot.spec.fqn} holds gradients that were "
            "never reduced. Run the last micro-batch outside no_sync(), or call reduce_pending(model) if it did not "
            "use this parameter, or discard_accumulation(model)."
        )
    if slot.stale:  # only a compiled model's forward pass leaves one stale
        wrong = slot.moved or (slot.param.requires_grad and slot.param.grad is None)
        slot.renew()
        if wrong:
            raise ShardingError(
                f"{slot.spec.fqn} was unfrozen or moved after the model was compiled, which the last forward pass did "
                "not notice. It is up to date now; run forward and backward again."
            )


# -- parameters that distribute() never saw --------------------------------------------------------------------------


def check_plain(model: nn.Module) -> None:
    """Raise :class:`ShardingError` if a distributed model has trainable parameters that are not sharded.

    They are what adapters and assignments add afterwards: their gradients would differ by rank.
    """
    if not any(True for _ in sharded_modules(model)):
        return
    names = [name for name, p in model.named_parameters() if p.requires_grad and spec_of(p) is None]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ShardingError(
            f"parameter {names[0]}{more}: added after distribute(), so it is not sharded and its gradient is not "
            "reduced. Call distribute(model) again."
        )
