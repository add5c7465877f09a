"""Probing a process through the kernel, and cutting the connections between two processes and no others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection

import pytest

from dscompile.runtime.board import Record
from dscompile.runtime.links import cut, links, listens_on, reverse
from dscompile.runtime.liveness import Limits, Peer
from dscompile.runtime.pulse import Probe, Pulse, local_address, network_stack

LIMITS = Limits.of(30.0)


def serve(pipe: Connection, fork: bool) -> None:
    pulse = Pulse("127.0.0.1")
    child = os.fork() if fork else 0
    if fork and child == 0:
        time.sleep(60)
    pipe.send((pulse.address, child))
    time.sleep(60)


@pytest.mark.parametrize("fork", [False, True])
def test_probe_tells_busy_from_dead(fork: bool) -> None:
    """A stopped process is alive; a killed one is dead at once, even where a forked child of it lives on."""
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, fork))
    process.start()
    address, child = mine.recv()
    try:
        early = Probe(address, 2.0)
        os.kill(process.pid or 0, signal.SIGSTOP)
        late = Probe(address, 2.0)
        assert early.alive()
        assert late.alive()
        process.kill()
        process.join()
        assert not early.alive()
        assert not late.alive()
        assert not Probe(address, 2.0).alive()
    finally:
        process.kill()
        if child:
            os.kill(child, signal.SIGKILL)


def test_closed_pulse_looks_dead() -> None:
    pulse = Pulse("127.0.0.1")
    probe = Probe(pulse.address, 2.0)
    pulse.serve()
    assert probe.alive()
    pulse.close()
    assert not probe.alive()
    assert not Probe(pulse.address, 2.0).alive()


def test_dropped_probes_are_forgotten() -> None:
    pulse = Pulse("127.0.0.1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Probe(pulse.address, 2.0).close()
    pulse.serve()
    pulse.serve()
    assert len(os.listdir("/proc/self/fd")) == before
    pulse.close()


def test_local_address() -> None:
    assert local_address("127.0.0.1", 29500) == "127.0.0.1"
    assert local_address("no.such.host.invalid", 29500) == "127.0.0.1"


def peer(pulse: tuple[str, int] | None, stack: str) -> Peer:
    other = Peer(1)
    assert other.heard(Record(1, beat=1, process="process 1 on other", pulse=pulse, stack=stack), 0.0)
    return other


def test_refusal_counts_on_this_machine() -> None:
    pulse = Pulse("127.0.0.1")
    pulse.close()
    other = peer(pulse.address, network_stack())
    assert other.judge(0.0, LIMITS, suspected=False) == "alive"
    assert other.judge(0.0, LIMITS, suspected=True) == "gone"


def test_refusal_from_another_machines_loopback_means_nothing() -> None:
    pulse = Pulse("127.0.0.1")
    pulse.close()
    other = peer(pulse.address, "another machine")
    assert other.judge(0.0, LIMITS, suspected=True) == "alive"
    assert other.probed is False


@pytest.mark.parametrize("pulse", [None, ("127.0.0.1", 1)])
def test_without_a_probe_silence_counts(pulse: tuple[str, int] | None) -> None:
    limits = Limits.of(30.0)
    other = peer(pulse, "another machine")
    record = other.record
    assert record is not None
    other.heard(record, limits.silence - 0.01)
    assert other.judge(0.0, limits, suspected=False) == "alive"
    other.heard(record, 0.02)
    assert other.judge(0.0, limits, suspected=False) == "gone"


def test_every_path_ends_within_the_timeout() -> None:
    for timeout in (0.6, 6.0, 30.0, 300.0):
        limits = Limits.of(timeout)
        assert limits.silence + limits.last + 2 * limits.interval + limits.probe < timeout
        assert limits.quiet + limits.probe + limits.settle + limits.last < timeout


def test_cut_ends_wanted_connections_only() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert listens_on(port)
        pairs = [(socket.create_connection(("127.0.0.1", port)), server.accept()[0]) for _ in range(2)]
        (a, b), (c, d) = pairs
        link = (*a.getsockname(), *a.getpeername())
        assert {link, reverse(link)} <= links()
        assert link not in links({port})
        assert cut({link}) == 1
        assert b.recv(1) == b"", "the other end sees the end"
        assert a.recv(1) == b""
        c.sendall(b"x")
        assert d.recv(1) == b"x"
        for end in (a, b, c, d):
            end.close()
    assert not listens_on(port)
