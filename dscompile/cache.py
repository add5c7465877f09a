"""The key under which compiled programs are cached: the whole configuration, every version, and our own source.

The programs of frames are stored by AOTAutograd's cache (one file an entry, written to a temporary name and renamed, so
that two processes may write at once), those of whole steps by :mod:`dscompile.step_cache`. PyTorch hashes the captured
graph and its own state; this module adds what is ours.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch

import dscompile
from dscompile.config import Config


def key(config: Config, placements: str = "") -> str:
    """SHA-256 over the configuration, versions of dscompile, PyTorch and Python, and dscompile's source files.

    ``placements`` says how a frame's parameters are sharded, and which rank this is.
    """
    recorded = "dumped" if config.dump is not None else ""  # such a program carries its texts; where they go is open
    versions = [dscompile.__version__, torch.__version__, platform.python_version()]
    parts = [placements, config.digest(), recorded, *versions, source_digest()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def source_digest() -> str:
    """SHA-256 of every source file of the package: an edited pass never meets programs of its older self."""
    digest = hashlib.sha256()
    for path in sorted({path for folder in _folders() for path in folder.rglob("*.py")}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _folders() -> list[Path]:
    here = Path(dscompile.__file__).resolve().parent
    names = ("passes", "codegen", "runtime")
    return [here, *(base / name for base in (here, here.parent) for name in names if (base / name).is_dir())]
