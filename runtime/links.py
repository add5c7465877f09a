"""The TCP connections between the ranks, and how to cut them so that a blocked collective raises.

``ProcessGroupGloo.abort()`` and ``shutdown()`` of PyTorch 2.13 leave a collective that has begun blocked (measured: it
returned only when the peer exited). Shutting down the socket underneath ends it at once on both sides with gloo's own
"Connection closed by peer". Connections between ranks are found without touching gloo: every rank lists the (local,
remote) addresses of its connections, and what one lists and another lists reversed connects the two. A user's other
connections are never touched.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Container, Iterator

Link = tuple[str, int, str, int]
"""(local host, local port, remote host, remote port) of an established connection."""


def links(skip_ports: Container[int] = ()) -> set[Link]:
    """Every established TCP connection of this process but those with a port in ``skip_ports``. Empty outside Linux."""
    return {link for _, link in _connections(skip_ports)}


def reverse(link: Link) -> Link:
    """The same connection, seen from its other end."""
    return (link[2], link[3], link[0], link[1])


def cut(wanted: Container[Link]) -> int:
    """Shut down this process's connections that are in ``wanted``; how many there were."""
    count = 0
    for connection, link in _connections(()):
        if link in wanted:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def listens_on(port: int) -> bool:
    """Whether this process has a listening socket on ``port``: it serves the c10d store that others reach there."""
    return any(int(s.getsockname()[1]) == port for s in _sockets() if _listening(s))


def _connections(skip_ports: Container[int]) -> Iterator[tuple[socket.socket, Link]]:
    for connection in _sockets():
        with contextlib.suppress(OSError):  # ENOTCONN: a listening socket, or one that has just closed
            near, far = connection.getsockname(), connection.getpeername()
            if near[1] not in skip_ports and far[1] not in skip_ports:
                yield connection, (_host(near[0]), int(near[1]), _host(far[0]), int(far[1]))


def _sockets() -> Iterator[socket.socket]:
    """A duplicate, closed after its turn, of each TCP socket of this process."""
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError):  # closed meanwhile, or no socket at all
            if not os.readlink(f"{folder}/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM:
                    yield duplicate


def _listening(candidate: socket.socket) -> bool:
    return bool(candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _host(address: str) -> str:
    return address.removeprefix("::ffff:")
