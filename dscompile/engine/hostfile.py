"""DeepSpeed's hostfile, read for ``torchrun``: which machines, how many processes on each, and the command of each.

A line is ``host slots=N``; ``#`` begins a comment. ``--include`` and ``--exclude`` select as in DeepSpeed's launcher:
``worker-0@worker-1:0,2`` is all slots of worker-0 and slots 0 and 2 of worker-1.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dscompile.errors import ConfigError, nearest

_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>\d+)")

Slots = Mapping[str, tuple[int, ...]]
"""Host -> its slots, in the file's order."""


def read_hostfile(path: str | Path) -> Slots:
    """The hosts and slots of a file.

    Raises:
        ConfigError: names the file and the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the hostfile: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the hostfile is no text file.") from None
    hosts: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigError(f"{path}:{number}: expected 'host slots=N', got {text!r}.")
        host, slots = found["host"], int(found["slots"])
        if host in hosts:
            raise ConfigError(f"{path}:{number}: host {host!r} stands twice; give all its slots in one line.")
        if slots == 0:
            raise ConfigError(f"{path}:{number}: host {host!r} has no slots; leave the line out.")
        hosts[host] = tuple(range(slots))
    if not hosts:
        raise ConfigError(f"{path}: the hostfile names no host.")
    return hosts


def select(hosts: Slots, include: str = "", exclude: str = "") -> Slots:
    """The hosts and slots that are left.

    Raises:
        ConfigError: both given, a host or slot that does not exist, or nothing left.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude exclude each other; give one of them.")
    if include:
        chosen = _parse("--include", include, hosts)
        return {host: chosen[host] for host in hosts if host in chosen}
    removed = _parse("--exclude", exclude, hosts) if exclude else {}
    left = {host: tuple(s for s in slots if s not in removed.get(host, ())) for host, slots in hosts.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ConfigError(f"--exclude {exclude}: nothing is left.")
    return left


def _parse(option: str, text: str, hosts: Slots) -> dict[str, tuple[int, ...]]:
    chosen: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in hosts:
            raise ConfigError(f"{option} {text}: no host {host!r} in the hostfile.{nearest(host, hosts)}")
        if host in chosen:
            raise ConfigError(f"{option} {text}: host {host!r} stands twice.")
        slots = listed.split(",") if colon else [str(slot) for slot in hosts[host]]
        wrong = next((slot for slot in slots if not slot.isdigit() or int(slot) not in hosts[host]), None)
        if wrong is not None:
            raise ConfigError(f"{option} {text}: host {host!r} has no slot {wrong!r}; it has 0 to {hosts[host][-1]}.")
        chosen[host] = tuple(sorted({int(slot) for slot in slots}))
    return chosen


def torchrun_commands(hosts: Slots, script: Sequence[str], port: int = 29500) -> dict[str, str]:
    """The command to start on each host: ``torchrun`` with the first host as the meeting place.

    Raises:
        ConfigError: hosts with different numbers of slots, which torchrun cannot start with a fixed world size.
    """
    counts = {host: len(slots) for host, slots in hosts.items()}
    first = next(iter(counts))
    other = next((host for host, count in counts.items() if count != counts[first]), None)
    if other is not None:
        raise ConfigError(
            f"{first} has {counts[first]} slots and {other} has {counts[other]}: torchrun starts the same number on "
            "every host; select as many of each with --include."
        )
    commands = {}
    for rank, (host, slots) in enumerate(hosts.items()):
        words = ["torchrun", f"--nnodes={len(hosts)}", f"--node-rank={rank}", f"--nproc-per-node={len(slots)}"]
        words += [f"--master-addr={first}", f"--master-port={port}", *script]
        visible = "" if slots == tuple(range(len(slots))) else f"CUDA_VISIBLE_DEVICES={','.join(map(str, slots))} "
        commands[host] = visible + shlex.join(words)
    return commands
