"""Bytes on the wire: a network namespace of its own, in which nothing but the ranks talks over ``lo``.

The kernel counts what ``lo`` transmits, TCP headers and acknowledgements included. The count is read from
``/proc/self/net/dev``, which follows the reader's namespace; ``/sys/class/net`` shows the namespace that mounted it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 0x1
"""SIOCGIFFLAGS, SIOCSIFFLAGS and IFF_UP of <linux/sockios.h> and <linux/if.h>."""


def private_prefix() -> list[str] | None:
    """The command in front of another that gives it its own network; None where the system forbids it."""
    if shutil.which("unshare") is None:
        return None
    prefix = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    allowed = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else None


def raise_loopback() -> None:
    """Bring ``lo`` up: a new namespace starts with it down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(control, GET_FLAGS, request))[1]
        fcntl.ioctl(control, SET_FLAGS, struct.pack("16sh14x", b"lo", flags | UP))


def transmitted() -> int:
    """Bytes that ``lo`` has transmitted in this process's network namespace."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise OSError("/proc/self/net/dev has no lo")
