"""Reuse of large CPU buffers from step to step.

The C library maps fresh pages for every large tensor and unmaps them when it dies, so each step pays a page fault for
every 4 KiB it writes. Compiled regions take buffers of at least :data:`SMALLEST` from an arena instead: one reserved
range of addresses, handed out best fit, in which neighbours merge when they come back. When a tensor's storage dies (in
the program, in autograd, or in the user's hands) its bytes are free for the next request of any size, and their pages
stay.

The arena becomes as large as the most bytes that were in use at once, plus fragmentation (0 to 6 % in the training
steps that were measured). Whenever nothing is in use a *round* ends, usually with ``zero_grad``, and pages that none of
the last :data:`ROUNDS` rounds reached go back to the system.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from dscompile.inductor_compat import empty_strided_cpu, reinterpret

log = logging.getLogger(__name__)

SMALLEST = 1 << 20
"""Requests below this many bytes go to PyTorch's allocator, which recycles them well."""

ROUNDS = 16
"""An evaluation may come every few training steps: memory that one of so many rounds used is worth keeping."""

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Figures of a pool.

    Attributes:
        used: bytes of live buffers. peak: the most that ``used`` ever was. owned: bytes of the arena, in use or idle,
        that may hold pages: what the pool costs the process. reused: requests served within owned bytes. grown:
        requests that went past them. refused: requests left to PyTorch's allocator, since the arena is full or could
        not be reserved.
    """

    used: int
    peak: int
    owned: int
    reused: int
    grown: int
    refused: int


class _Lease(weakref.ref[memoryview]):
    """What calls back when nothing refers to a buffer any more; it must be kept alive until then.

    ``weakref.finalize`` would do, in three times the time.
    """

    __slots__ = ("place",)
    place: tuple[int, int]

    def __hash__(self) -> int:
        """By identity: views of equal contents are different buffers."""
        return id(self)

    def __eq__(self, other: object) -> bool:
        """By identity."""
        return self is other


@functools.lru_cache(maxsize=4096)
def _elements(size: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> int:
    """How many elements a large tensor spans; 0 for one that the pool leaves to PyTorch."""
    if prod(size) * itemsize < SMALLEST:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))


class BufferPool:
    """One arena, reserved at the first large request. Several threads may use it.

    Args:
        capacity: bytes of addresses to reserve; the machine's memory by default. Reserving takes no memory.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._reserved = False
        self._arena: mmap.mmap | None = None
        self._free: list[tuple[int, int]] = []  # (start, stop), by address; no two touch
        # A garbage collection may kill tensors at any moment, even in a thread that holds the lock: what they return
        # waits here, lock-free, until the next request.
        self._returned: deque[tuple[int, int]] = deque()
        self._leases: set[_Lease] = set()
        self._tops: deque[int] = deque([0], maxlen=ROUNDS)  # highest address of each round, the current one last
        self._owned = self._used = self._peak = self._reused = self._grown = self._refused = 0
        self.renew_lock()

    def renew_lock(self) -> None:
        """Forget who holds the lock: for a forked child, whose copy of the lock nobody will ever release."""
        self._lock = threading.Lock()

    def use(self) -> PoolUse:
        """Figures for reports and for the memory accounts of benchmarks."""
        with self._lock:
            self._collect()
            return PoolUse(self._used, self._peak, self._owned, self._reused, self._grown, self._refused)

    def empty_strided(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, as ``torch.empty_strided``; from the arena if it is large."""
        count = _elements(tuple(size), tuple(stride), dtype.itemsize)
        lease = self._take(count * dtype.itemsize) if count else None
        if lease is None:
            return empty_strided_cpu(size, stride, dtype)
        return reinterpret(torch.frombuffer(lease, dtype=dtype, count=count), size, stride)

    def release_idle(self) -> None:
        """Return the pages of everything idle to the system; the next step pays for fresh ones."""
        with self._lock:
            self._collect()
            for start, stop in self._free:
                self._drop(start, min(stop, self._owned))
            if self._free and self._free[-1][1] >= self._owned:
                self._owned = min(self._owned, self._free[-1][0])

    def _take(self, size: int) -> memoryview | None:
        """Lease ``size`` bytes, or None. The lease ends when nothing refers to the view any more."""
        with self._lock:
            if not self._reserved:
                self._reserve()
            self._collect()
            needed = -(-size // _ALIGN) * _ALIGN
            best, index = 0, -1  # the smallest hole that is large enough, the first of several
            for place, (start, stop) in enumerate(self._free):
                if stop - start >= needed and (index < 0 or stop - start < best):
                    best, index = stop - start, place
            if self._arena is None or index < 0:
                self._refused += 1
                return None
            start, hole_stop = self._free[index]
            stop = start + needed
            self._free[index : index + 1] = [(stop, hole_stop)] if stop < hole_stop else []
            self._used += needed
            self._peak = max(self._peak, self._used)
            self._tops[-1] = max(self._tops[-1], stop)
            if stop > self._owned:
                self._owned = stop
                self._grown += 1
            else:
                self._reused += 1
            lease = memoryview(self._arena)[start : start + size]
        end = _Lease(lease, self._return)
        end.place = start, stop
        self._leases.add(end)
        return lease

    def _return(self, lease: _Lease) -> None:
        self._leases.discard(lease)
        self._returned.append(lease.place)

    def _reserve(self) -> None:
        """Reserve the addresses, once: where that is forbidden (``ulimit -v``), every request is refused."""
        self._reserved = True
        capacity = self._capacity or os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
        capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            self._arena = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            log.warning(
                "large buffers are not reused: %.0f GB of addresses could not be reserved (%s). Lift the limit "
                "(ulimit -v, vm.overcommit_memory) or set options={'buffers': 'off'}.",
                capacity / 1e9,
                error.strerror,
            )
            return
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._arena.madvise(mmap.MADV_HUGEPAGE)
        self._free = [(0, capacity)]

    def _collect(self) -> None:
        """Take back what has been returned; end the round if nothing is in use."""
        while self._returned:
            start, stop = self._returned.popleft()
            self._used -= stop - start
            index = bisect_left(self._free, (start, stop))
            if index < len(self._free) and self._free[index][0] == stop:
                stop = self._free.pop(index)[1]
            if index and self._free[index - 1][1] == start:
                index -= 1
                start = self._free.pop(index)[0]
            self._free.insert(index, (start, stop))
        if not self._used and self._tops[-1]:
            kept = max(self._tops)
            self._drop(kept, self._owned)
            self._owned = kept
            self._tops.append(0)

    def _drop(self, start: int, stop: int) -> None:
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self._arena is not None and start < stop:
            self._arena.madvise(mmap.MADV_DONTNEED, start, stop - start)


def wanted(option: str) -> bool:
    """Decide ``Config.buffers``: ``auto`` reuses buffers on Linux, the one system this was measured on.

    There is no probe of the machine, as there is for products: a kept page never costs more than a fresh one. The
    figures are in ``docs/architecture.md``.
    """
    return option == "on" or (option == "auto" and sys.platform == "linux")


POOL = BufferPool()
"""The process's pool: memory is the process's resource, whichever program asks."""

os.register_at_fork(after_in_child=POOL.renew_lock)
