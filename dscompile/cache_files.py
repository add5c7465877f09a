"""Damaged files in the compile cache are found before they are used, removed, and so built again.

Inductor and AOTAutograd never look at what their cache directory holds: a library cut short by a full disk or a crash
is handed to the dynamic linker, which may kill the process. So whoever compiles records the SHA-256 of every new file,
and every process looks once, before its first compilation, at the files whose size or time is not the recorded one.

A record is a small file that is called after its own digest. Two processes may write theirs at once, and a file that
two of them built may have several digests: any one vouches for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from dscompile.artifact import write_whole
from dscompile.errors import RunError
from dscompile.inductor_compat import cache_directory, try_build_lock

log = logging.getLogger("dscompile")

RECORDS = "dscompile"
"""Folder of the records, in the cache directory."""

_LINE = re.compile(r"([0-9a-f]{64}) (\d+) (\d+) (.+)")
_SKIPPED = (RECORDS, "locks", "triton")  # ours, empty files, and a cache with checks of its own
_LIBRARY = ".so"

Stamp = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


_FEW = 32
"""So many records are read before they are written together as one: each compilation adds one."""


def checked_files() -> CacheFiles:
    """The cache directory's files, checked once a process."""
    return _checked(Path(cache_directory()))


@functools.cache
def _checked(root: Path) -> CacheFiles:
    files = CacheFiles(root)
    files.check()
    return files


class CacheFiles:
    """The files below one cache directory, and what the records say of them."""

    def __init__(self, root: Path) -> None:
        """Look at nothing yet."""
        self.root = root
        self._known: dict[str, Stamp] = {}

    def check(self) -> list[str]:
        """Remove damaged files; returns their paths, relative to the cache directory, and warns of them.

        A file with another size or time than recorded is damaged if its digest differs too. A file that no record
        names is left alone, unless it is a library cut short or a damaged record may have named it.
        """
        records, whole = self._read_records()
        damaged: list[str] = []
        moved: dict[str, str] = {}
        for name, stamp in self._walk():
            digests = records.get(name)
            if digests is not None and stamp in digests.values():
                self._known[name] = stamp
                continue
            with self._built(name) as built:
                if not built:
                    continue
                digest = _digest(self.root / name) if digests is not None else ""
                if digests is None and whole and _complete(self.root / name):
                    self._known[name] = stamp
                elif digests is not None and digest in digests:
                    moved[name] = digest
                else:
                    damaged.append(name)
                    with contextlib.suppress(OSError):
                        (self.root / name).unlink()
        if damaged:
            log.warning(
                "%s: removed %d damaged file(s) from the compile cache, first %s; what they held is compiled again",
                *(self.root, len(damaged), damaged[0]),
            )
        self._write(moved)
        return damaged

    def record(self) -> None:
        """Record every file that appeared or changed since :meth:`check`."""
        found: dict[str, str] = {}
        for name, stamp in self._walk():
            if self._known.get(name) != stamp:
                with self._built(name) as built:
                    if built and _complete(self.root / name):
                        found[name] = _digest(self.root / name)
        self._write(found)

    def _walk(self) -> Iterator[tuple[str, Stamp]]:
        """Relative path and stamp of every finished file. A name with a dot in front is still being written."""
        for folder, folders, files in os.walk(self.root):
            inside = os.path.relpath(folder, self.root)
            folders[:] = sorted(f for f in folders if not f.startswith((".", "__")))
            if inside == ".":
                folders[:] = [f for f in folders if f not in _SKIPPED]
            for file in sorted(f for f in files if not f.startswith(".")):
                with contextlib.suppress(OSError):  # removed meanwhile
                    status = os.stat(os.path.join(folder, file))
                    yield os.path.normpath(os.path.join(inside, file)), (status.st_size, status.st_mtime_ns)

    @contextlib.contextmanager
    def _built(self, name: str) -> Iterator[bool]:
        """Whether no process is building ``name`` now; held off from starting in this block."""
        if not name.endswith(_LIBRARY):
            yield True
            return
        with try_build_lock(self.root, Path(name).name.partition(".")[0]) as free:
            yield free

    def _read_records(self) -> tuple[dict[str, dict[str, Stamp]], bool]:
        """For each file its digests, with the stamp that each was seen under; and whether all records are whole."""
        while True:
            known: dict[str, dict[str, Stamp]] = {}
            whole, read = True, list[Path]()
            try:
                for path in sorted((self.root / RECORDS).glob("*.txt")):
                    content = path.read_bytes()
                    if hashlib.sha256(content).hexdigest() != path.stem:
                        whole = False
                        path.unlink(missing_ok=True)
                        continue
                    read.append(path)
                    for line in content.decode().splitlines():
                        if match := _LINE.fullmatch(line):
                            known.setdefault(match[4], {})[match[1]] = int(match[2]), int(match[3])
            except FileNotFoundError:
                continue  # another process has just joined records: what this one held is in a new one
            except OSError:
                pass
            if len(read) > _FEW:
                self._join(known, read)
            return known, whole

    def _join(self, known: dict[str, dict[str, Stamp]], read: list[Path]) -> None:
        """Replace the records in ``read`` by one that says the same of the files that still exist."""
        lines = [
            f"{digest} {size} {time} {name}\n"
            for name, digests in known.items()
            if (self.root / name).exists()
            for digest, (size, time) in digests.items()
        ]
        written = self._write_record("".join(lines))
        for path in read if written else ():
            if path != written:
                path.unlink(missing_ok=True)

    def _write(self, digests: dict[str, str]) -> None:
        """Write one record of ``digests``; a cache that cannot be written is no error, only slow."""
        lines = []
        for name, digest in digests.items():
            with contextlib.suppress(OSError):
                status = os.stat(self.root / name)
                self._known[name] = status.st_size, status.st_mtime_ns
                lines.append(f"{digest} {status.st_size} {status.st_mtime_ns} {name}\n")
        self._write_record("".join(lines))

    def _write_record(self, content: str) -> Path | None:
        """The new record; None if there is nothing to say or no place to say it."""
        if not content:
            return None
        path = self.root / RECORDS / f"{hashlib.sha256(content.encode()).hexdigest()}.txt"
        try:
            write_whole(path, content, hint="Compiled programs may not be kept.")
        except RunError as error:
            log.warning("%s", error)
            return None
        return path


def _digest(path: Path) -> str:
    """SHA-256 of a file; "" if it is gone."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _complete(path: Path) -> bool:
    """False for a shared library that ends before its section headers, which linkers write last."""
    if path.suffix != _LIBRARY:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return True
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":  # 64-bit
        return False
    sections = struct.unpack_from("<Q", head, 0x28)[0]
    each, count = struct.unpack_from("<HH", head, 0x3A)
    return bool(sections + each * count <= size)
