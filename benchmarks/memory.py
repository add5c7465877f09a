"""In-step memory, measured two ways that must agree.

*Allocations*: the running sum of the allocator's events in a profile of forward + backward; its peak is exact, but
blind to memory that a library takes from the system itself. *Resident*: the kernel's high-water mark, reset before
the step; it sees every page, and also the allocator's slack. Memory that a variant keeps from step to step is in
neither peak, so it is counted apart, from the live storages, and added to the total. dscompile's arena of large buffers
bypasses the allocator: the whole of what it owns is added to the allocations, and its pages are returned to the system
before the resident peak is taken, so that the step brings them all back.
"""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

AGREE = 0.10
"""The two peaks may differ by this share of the larger one."""


def allocation_peak(step: Callable[[], object]) -> int:
    """Peak of the allocations of ``step`` above its start, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = step()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    assert events, "the profiler recorded no allocation"
    total = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def resident_peak(step: Callable[[], object]) -> int:
    """Peak resident bytes of ``step`` above its start, after handing freed memory back to the system. Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_resident_peak()
    start = resident()
    step()
    return resident_high() - start


def resident() -> int:
    """Resident bytes of this process now."""
    return _status("VmRSS")


def resident_high() -> int:
    """The most resident bytes since :func:`reset_resident_peak`."""
    return _status("VmHWM")


def reset_resident_peak() -> None:
    """Let the kernel's high-water mark start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def live_bytes() -> int:
    """Bytes of every distinct storage that a Python object reaches now."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        kind = type(thing)  # not isinstance(): some modules keep objects whose `__class__` warns
        try:
            if issubclass(kind, torch.Tensor) and thing.layout is torch.strided:
                thing = thing.untyped_storage()
            elif not issubclass(kind, torch.UntypedStorage):
                continue
            address = thing.data_ptr() if thing.device.type == "cpu" else 0
        except (RuntimeError, NotImplementedError):  # no data of its own: fake, functional, or a wrapper as DTensor
            continue
        if address:
            storages[address] = thing.nbytes()
    return sum(storages.values())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
