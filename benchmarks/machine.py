"""What a figure was measured on: a number without its machine is not a result."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "hypervisor")
ENVIRONMENT = ("OMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES", "TORCH", "DSCOMPILE")


def _first(path: str, key: str = "") -> str:
    """The first line of a file, or the value of its first ``key: value`` line; ``unknown`` where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() if key else line for line in lines if line.startswith(key)), "unknown")


def describe() -> dict[str, object]:
    """The processor, its load, the versions, and every environment variable that changes a CPU figure."""
    flags = _first("/proc/cpuinfo", "flags").split()
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "governor": _first("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "load_1_5_15_min": [round(load, 2) for load in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
        "command": sys.argv,
    }


def lines(machine: dict[str, object]) -> list[str]:
    """The description for people, two lines and a warning if other work was running."""
    flags, load = machine["flags"], machine["load_1_5_15_min"]
    assert isinstance(flags, list)
    assert isinstance(load, list)
    out = [
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {' '.join(flags)}; "
        f"governor {machine['governor']}; load {load[0]}; Python {machine['python']}, torch {machine['torch']}",
        f"environment (both sides alike): {machine['environment'] or 'nothing set: default malloc, default OpenMP'}",
    ]
    if load[0] > 0.5:
        out.append(f"WARNING: load {load[0]} before the first step: wall times include waiting for other work.")
    return out
