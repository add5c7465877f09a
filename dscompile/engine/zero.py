"""``dscompile.zero``: DeepSpeed's names for building a model that no rank holds whole, and for changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dscompile.deferred import deferred_init, is_deferred
from dscompile.errors import ConfigError, ShardingError, UnsupportedError
from dscompile.reads import gathered_slots
from dscompile.slots import Slot, slot_of
from dscompile.torch_compat import process_group

__all__ = ["GatheredParameters", "Init"]


@contextlib.contextmanager
def Init(  # noqa: N802 - DeepSpeed's name
    module: nn.Module | None = None,
    data_parallel_group: Any = None,
    mem_efficient_linear: bool = True,
    remote_device: str | None = None,
    pin_memory: bool = False,
    config_dict_or_path: Any = None,
    config: Any = None,
    enabled: bool = True,
    dtype: torch.dtype | None = None,
    mpu: Any = None,
) -> Iterator[None]:
    """Build modules in this block without their data; ``initialize`` fills their shards, one tensor at a time.

    Args:
        module: refused: a module that exists is sharded by ``initialize``.
        data_parallel_group: refused: shards span all ranks.
        mem_efficient_linear: has no effect: no gathered weight is saved for backward.
        remote_device: ``"cpu"`` or None.
        pin_memory: has no effect: nothing is offloaded.
        config_dict_or_path: not read here; ``initialize`` reads the configuration.
        config: as ``config_dict_or_path``.
        enabled: off, the block has no effect.
        dtype: refused unless fp32: masters are fp32, and the computing dtype is the configuration's.
        mpu: refused: shards span all ranks.
    """
    wrong = next((n for n, v in (("module", module), ("mpu", mpu)) if v is not None), None)
    if data_parallel_group is not None and data_parallel_group is not dist.group.WORLD:
        wrong = "data_parallel_group"
    if wrong is not None:
        raise ConfigError(f"zero.Init({wrong}=...) is not supported: initialize() shards the model, over all ranks.")
    if remote_device not in (None, "cpu", "none"):
        raise ConfigError(f"zero.Init(remote_device={remote_device!r}) is not supported: there is no offload yet.")
    if dtype not in (None, torch.float32):
        raise ConfigError(
            f"zero.Init(dtype={dtype}) is not supported: masters are fp32; set bf16.enabled or fp16.enabled in the "
            "configuration."
        )
    with deferred_init() if enabled else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def GatheredParameters(  # noqa: N802 - DeepSpeed's name
    params: nn.Module | Tensor | Iterable[Tensor],
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[list[Tensor]]:
    """Inside, attribute reads (``layer.weight``) of these parameters give whole values; a collective.

    The values are also what the context returns, in order. Parameter objects themselves stay sharded: write to
    ``layer.weight``, not to an object kept from ``model.parameters()``.

    Args:
        params: a module, a parameter, or several: objects of ``model.parameters()``, or attribute reads that autograd
            saw.
        modifier_rank: the rank whose writes all ranks take; None: the values are only read.
        fwd_module: has no effect.
        enabled: off, the block has no effect.

    Raises:
        ConfigError: a ``modifier_rank`` that does not exist.
        ShardingError: a parameter that no distributed module holds, or one written as an object, which would be lost.
        UnsupportedError: parameters of :func:`Init` before ``initialize`` has filled them.
    """
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    listed = [params] if isinstance(params, Tensor) else list(params)
    if not enabled or not listed:
        yield listed
        return
    if any(is_deferred(p) for p in listed):
        raise UnsupportedError(
            "zero.GatheredParameters: the parameters have no values yet; initialise them inside zero.Init, or open it "
            "after initialize()."
        )
    if not any(_is_placed(p) for p in listed):  # not distributed (yet): whole already
        yield listed
        return
    slots = [_slot(p) for p in listed]
    if modifier_rank is not None and not 0 <= modifier_rank < process_group(slots[0].spec.group).size():
        raise ConfigError(f"zero.GatheredParameters(modifier_rank={modifier_rank}): no such rank.")
    before = [slot.param._version for slot in slots]
    with gathered_slots(slots, write=modifier_rank is not None, source=modifier_rank):
        yield [slot.full for slot in slots if slot.full is not None]
        for slot, version in zip(slots, before, strict=True):
            if slot.param._version != version:
                raise ShardingError(
                    f"{slot.spec.fqn} was written through its parameter object inside zero.GatheredParameters, which "
                    "changes this rank's shard only; write to the module's attribute, or to what the context returns."
                )


def _is_placed(value: Tensor) -> bool:
    return isinstance(value, DTensor) or _source(value) is not None


def _slot(value: Tensor) -> Slot:
    """The slot of a parameter, or of a value that was read from it."""
    parameter = value if isinstance(value, DTensor) else _source(value)
    slot = slot_of(parameter) if parameter is not None else None
    if slot is None:
        raise ShardingError(
            f"zero.GatheredParameters: a tensor of shape {tuple(value.shape)} is no parameter of a distributed model; "
            "pass objects of model.parameters(), or the module."
        )
    return slot


def _source(value: Tensor) -> DTensor | None:
    """The parameter that an attribute read came from: the one at the end of its short autograd graph."""
    nodes = [value.grad_fn]
    for _ in range(6):
        found: list[Any] = []
        for node in nodes:
            parameter = getattr(node, "param", None)
            if isinstance(parameter, DTensor):
                return parameter
            if node is not None:
                found += [following for following, _ in node.next_functions]
        nodes = found
    return None
