"""Copy what will be saved to host memory while training goes on, at the latest before the next optimizer step.

Parameters and optimizer state change in ``optimizer.step()`` only, so the copying runs beside the next forward and
backward pass, and a hook makes the step wait for its end. Everything else (buffers, values of the script) is copied at
once. A tensor that something else wrote to meanwhile (PyTorch counts writes) fails the save: a checkpoint of two
moments would be worse than none. The host buffer is used again by the next save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from dscompile.errors import CheckpointError
from dscompile.torch_compat import local_of

_ALIGNMENT = 64


class HostBuffer:
    """One flat buffer of bytes, pinned if there is a GPU, that grows and never shrinks."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """The first ``nbytes`` bytes."""
        if self._bytes.numel() < nbytes:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._bytes[:nbytes]


class Staging:
    """The copies of one save: made (in part) by the constructor, completed by :meth:`copy`, read by :meth:`chunks`.

    Args:
        resolved: what this rank writes: DCP's item and the local tensor it stands for.
        sources: the state dictionary's tensors, by key, whose writes are watched.
        deferred: keys of the tensors that only optimizer steps change.
        buffer: takes the copies.
    """

    def __init__(
        self,
        resolved: Sequence[tuple[WriteItem, Tensor]],
        sources: Mapping[str, Tensor],
        deferred: set[str],
        buffer: HostBuffer,
    ) -> None:
        places, total = [], 0
        for _, tensor in resolved:
            places.append(total)
            total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        flat = buffer.take(total)
        self._copies = [
            (item, tensor, flat[start : start + tensor.nbytes])
            for (item, tensor), start in zip(resolved, places, strict=True)
        ]
        self._sources = sources
        self._deferred = [copy for copy in self._copies if copy[0].index.fqn in deferred]
        self._versions = [_versions(sources[item.index.fqn]) for item, _, _ in self._deferred]
        self._ready = _mark_streams(tensor for _, tensor, _ in self._deferred)
        with torch.no_grad():
            for item, tensor, target in self._copies:
                if item.index.fqn not in deferred:
                    _copy(tensor, target, wait=True)

    def copy(self) -> None:
        """Complete the copies, from any thread.

        Raises:
            CheckpointError: something other than an optimizer step wrote to a tensor meanwhile.
        """
        with torch.no_grad(), _side_stream(self._ready):
            for _, tensor, target in self._deferred:
                _copy(tensor, target, wait=False)
        for (item, _, _), before in zip(self._deferred, self._versions, strict=True):
            if _versions(self._sources[item.index.fqn]) != before:
                raise CheckpointError(
                    f"{item.index.fqn} was written to while it was being saved; call handle.wait_staged() before "
                    "changing values outside of optimizer.step(), or save with asynchronous=False."
                )
        self._deferred, self._sources = [], {}

    def chunks(self) -> Iterator[tuple[WriteItem, memoryview]]:
        """The items and their bytes, once all are copied."""
        return ((item, target.numpy().data) for item, _, target in self._copies)


def _copy(tensor: Tensor, target: Tensor, *, wait: bool) -> None:
    if tensor.numel():
        view = target.view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor.detach(), non_blocking=not wait)


def _versions(tensor: Tensor) -> tuple[int, int]:
    local = local_of(cast(Any, tensor)) if hasattr(tensor, "to_local") else tensor
    return int(tensor._version), int(local._version)


def _mark_streams(tensors: Iterator[Tensor]) -> Any:
    """An event after what the GPU was told so far, None on the CPU."""
    if not any(tensor.is_cuda for tensor in tensors):
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream())
    return event


@contextlib.contextmanager
def _side_stream(after: Any) -> Iterator[None]:
    """A stream beside the one that computes, which begins at an event; all its copies are complete at the end."""
    if after is None:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
