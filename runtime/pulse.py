"""Is a process alive, whatever it is doing? A listening socket that the kernel answers for it.

Heartbeats come from a Python thread, and a thread cannot beat while another holds the interpreter lock: a long sort, a
C extension. The kernel accepts a TCP connection to a listening socket without the process, and resets it when the
process dies. So before a silent rank is called dead, it is probed: connection refused, reset or unreachable means dead;
connected means busy. A probe is evidence only if the same address answered before (firewalls, several networks), or
lies in the same network stack.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import weakref
from pathlib import Path

BACKLOG = 4096
"""Connections the kernel may hold while this process cannot accept: one for each rank that probes it."""

KEEPALIVE_SECONDS = 5
"""A host that vanished without closing its connections is noticed after about this long."""

Address = tuple[str, int]


class Pulse:
    """A listening socket of this process. ``address`` is what the others probe."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of ``host``, one of this machine's addresses; raises ``OSError``."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self._accepted: list[socket.socket] = []
        self.address: Address = (host, int(self._listener.getsockname()[1]))
        _close_in_children(self)

    def serve(self) -> None:
        """Take the waiting probes from the kernel's queue and drop those whose other end is gone. Never blocks."""
        with contextlib.suppress(OSError):  # BlockingIOError: none is waiting
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._accepted.append(connection)
        for connection in [c for c in self._accepted if not _open(c)]:
            connection.close()
            self._accepted.remove(connection)

    def close(self) -> None:
        """From now on this process looks dead to a probe."""
        for connection in (self._listener, *self._accepted):
            connection.close()
        self._accepted.clear()


class Probe:
    """A connection to another rank's pulse, kept open until it breaks or :meth:`close`."""

    def __init__(self, address: Address, timeout: float) -> None:
        """Connect within ``timeout`` seconds; a refusal is an answer, not an error."""
        self._socket: socket.socket | None = None
        with contextlib.suppress(OSError):
            self._socket = socket.create_connection(address, timeout=timeout)
            self._socket.setblocking(False)
            _keepalive(self._socket)

    def alive(self) -> bool:
        """Whether the other process lives. Never blocks."""
        if self._socket is not None and not _open(self._socket):
            self.close()
        return self._socket is not None

    def close(self) -> None:
        """Drop the connection; :meth:`alive` is False from now on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def local_address(host: str, port: int) -> str:
    """The machine's own address on the way to ``host`` (the store's); the loopback address if it cannot be told."""
    with contextlib.suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # a datagram socket: this sends nothing
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def network_stack() -> str:
    """Equal in two processes only if they reach each other's loopback address; ``""`` where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
    except OSError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether an address means another machine on every machine."""
    return ipaddress.ip_address(host).is_loopback


def _open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != b""
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False


def _keepalive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", KEEPALIVE_SECONDS - 1)):
        if hasattr(socket, name):  # Linux; elsewhere the system's own, longer, periods hold
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _close_in_children(pulse: Pulse) -> None:
    """A forked child (a data loader's worker) must not answer for its dead parent."""
    reference = weakref.ref(pulse)

    def close() -> None:
        parent = reference()
        if parent is not None:
            parent.close()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close)
