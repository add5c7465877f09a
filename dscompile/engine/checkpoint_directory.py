"""Checkpoints of one run in a directory: one folder a tag, and ``latest``, which names the newest complete one.

::

    DIR/step_100/checkpoint.json, rank_00000.bin, ...
    DIR/latest                                         "step_100"
    DIR/.saving-HOST-PID-ID/                           a save under way; the next save removes what a dead process left
    DIR/.replaced-step_100/                            while a tag that exists is replaced: read if ``step_100`` is gone

A checkpoint is written under a temporary name, synced, renamed; then ``latest`` is replaced. Each of these is atomic,
so whenever the process dies ``latest`` names a complete checkpoint: the new one or the one before.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from dscompile.engine.checkpoint_files import write_synced
from dscompile.errors import CheckpointError, nearest

LATEST = "latest"
_TAG = re.compile(r"[\w+=@,-][\w.+=@,-]{0,199}", re.ASCII)


def check_tag(tag: str) -> str:
    """The tag, if it can name a folder; else :class:`CheckpointError`."""
    if not isinstance(tag, str) or not _TAG.fullmatch(tag) or tag == LATEST:
        raise CheckpointError(
            f"tag {tag!r}: a tag is a folder's name of letters, digits and . _ + = @ , - that does not begin with a "
            f"dot and is not {LATEST!r}."
        )
    return tag


def begin(directory: Path) -> Path:
    """A new temporary folder for a save; removes those of dead processes of this host. Raises ``OSError``."""
    directory.mkdir(parents=True, exist_ok=True)
    for found in directory.glob(f".*-{_host()}-*-*"):
        pid = found.name.rpartition("-")[0].rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            if found.name.startswith(".saving-"):
                shutil.rmtree(found, ignore_errors=True)
            elif found.name.startswith(f".{LATEST}-"):
                found.unlink(missing_ok=True)
    path = _temporary(directory, "saving")
    path.mkdir()
    return path


def _temporary(directory: Path, kind: str) -> Path:
    return directory / f".{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def commit(temporary: Path, tag: str) -> Path:
    """Give a complete, synced folder its name, then let ``latest`` name it. Raises ``OSError``."""
    directory = temporary.parent
    final, replaced = directory / tag, directory / f".replaced-{tag}"
    sync_folder(temporary)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(directory)
    new = _temporary(directory, LATEST)
    write_synced(new, [tag.encode() + b"\n"])
    new.replace(directory / LATEST)
    sync_folder(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def abandon(temporary: Path) -> None:
    """Remove what a failed save has written."""
    shutil.rmtree(temporary, ignore_errors=True)


def find(directory: str | Path, tag: str | None) -> Path:
    """The folder of a tag, or of the one that ``latest`` names.

    Raises:
        CheckpointError: no such directory or tag; lists the tags there are.
    """
    directory = Path(directory)
    try:
        tags = sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
        if tag is None:
            tag = (directory / LATEST).read_text(errors="replace").strip()
    except OSError as error:
        if tag is None and (directory / LATEST) == Path(str(error.filename)) and not (directory / LATEST).exists():
            raise CheckpointError(
                f"{directory}: holds no checkpoint ({LATEST!r} is missing); give a tag, or another directory."
                f"{_listed(tags)}"
            ) from None
        raise CheckpointError(f"{error.filename or directory}: cannot read: {error.strerror or error}.") from None
    check_tag(tag)
    for path in (directory / tag, directory / f".replaced-{tag}"):
        with contextlib.suppress(OSError):
            if path.is_dir():
                return path
    raise CheckpointError(f"{directory}: has no checkpoint {tag!r}.{nearest(tag, tags)}{_listed(tags)}")


def _listed(tags: list[str]) -> str:
    shown = ", ".join(tags[-5:])
    return f" There {'is' if len(tags) == 1 else 'are'}: {'..., ' if len(tags) > 5 else ''}{shown}." if tags else ""


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Raises ``OSError``."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
