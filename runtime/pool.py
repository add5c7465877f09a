"""Reuse of large CPU buffers from step to step.

The C library maps fresh pages for every large tensor and unmaps them when it dies, so each step pays a page fault for
every 4 KiB it writes. Compiled regions take buffers of at least :data:`SMALLEST` from this pool instead: when the
tensor's storage dies (in the program, in autograd, or in the user's hands) its block comes back and is handed out
again.

The pool never owns more than the most bytes that were ever in use at one moment: before it allocates past that mark
it returns idle blocks to the system. Peak memory is therefore that of the program, not more.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SMALLEST = 1 << 20
"""Requests below this many bytes go to PyTorch's allocator, which recycles them well."""

WASTE = 1.25
"""An idle block may serve a request of at least 1/1.25 of its size."""


class _Lease(np.ndarray):
    """A view of a block that a tensor keeps alive; its end returns the block."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Bytes in use and idle now, the most ever in use at once, and how often a block was reused or newly allocated."""

    used: int
    idle: int
    peak: int
    reused: int
    allocated: int


class BufferPool:
    """Blocks of memory by size. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._sizes: list[int] = []  # sizes of idle blocks, sorted; _idle holds the blocks of each size
        self._idle: dict[int, list[torch.Tensor]] = {}
        self._used = self._idle_bytes = self._peak = self._reused = self._allocated = 0

    def use(self) -> PoolUse:
        """Figures for reports and for the memory accounts of benchmarks."""
        return PoolUse(self._used, self._idle_bytes, self._peak, self._reused, self._allocated)

    def empty_strided(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, as ``torch.empty_strided``; from the pool if it is large."""
        elements = 1
        for length, step in zip(size, stride, strict=True):
            if length == 0:
                return torch.empty_strided(size, stride, dtype=dtype)
            elements += (length - 1) * step
        bytes_ = elements * dtype.itemsize
        if bytes_ < SMALLEST:
            return torch.empty_strided(size, stride, dtype=dtype)
        block = self._take(bytes_)
        lease = block.numpy().view(_Lease)
        weakref.finalize(lease, self._give_back, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=elements).as_strided(size, stride)

    def release_idle(self) -> None:
        """Return every idle block to the system."""
        with self._lock:
            self._sizes.clear()
            self._idle.clear()
            self._idle_bytes = 0

    def _take(self, bytes_: int) -> torch.Tensor:
        with self._lock:
            position = bisect_left(self._sizes, bytes_)
            if position < len(self._sizes) and self._sizes[position] <= bytes_ * WASTE:
                block = self._pop(position)
                self._reused += 1
            else:
                self._peak = max(self._peak, self._used + bytes_)
                while self._sizes and self._used + self._idle_bytes + bytes_ > self._peak:
                    self._pop(len(self._sizes) - 1)
                block = torch.empty(bytes_, dtype=torch.uint8)
                self._allocated += 1
            self._used += block.numel()
            self._peak = max(self._peak, self._used)
            return block

    def _pop(self, position: int) -> torch.Tensor:
        size = self._sizes.pop(position)
        self._idle_bytes -= size
        return self._idle[size].pop()

    def _give_back(self, block: torch.Tensor) -> None:
        with self._lock:
            size = block.numel()
            self._used -= size
            self._idle_bytes += size
            insort(self._sizes, size)
            self._idle.setdefault(size, []).append(block)


POOL = BufferPool()
"""The process's pool: memory is the process's resource, whichever program asks."""
