"""Where generated kernels and what was built from them are kept: by source, specialisation, target and versions.

Kernels must lie in files: Triton reads their source from there. They are written whole or not at all, and a file whose
content is not what its name promises is written again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from dscompile.artifact import write_whole
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.errors import UnsupportedError
from dscompile.inductor_compat import cache_directory

FOLDER = "dscompile_kernels"


def root() -> Path:
    """The folder of all kernels, in the compile cache."""
    return Path(cache_directory()) / FOLDER


def triton_version() -> str:
    """The version of Triton.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError("generated kernels need Triton: pip install 'dscompile[triton]'.") from None


def source_file(kernel: Kernel, folder: Path | None = None) -> Path:
    """The file of a kernel's source, written if it is not there or is damaged."""
    path = (folder or root()) / kernel.key()[:16] / f"{kernel.name}.py"
    try:
        whole = path.read_text() == kernel.source
    except (OSError, UnicodeDecodeError):
        whole = False
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, kernel.source, hint="Generated kernels cannot be kept.")
    return path


def build_key(kernel: Kernel, target: str, options: str = "") -> str:
    """SHA-256 of everything that decides a build: kernel, specialisation, target, options, versions."""
    parts = [kernel.key(), target, options, triton_version(), torch.__version__]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_figures(key: str, folder: Path | None = None) -> dict[str, Any] | None:
    """What was found out about a build, or None if nothing (whole) is kept."""
    try:
        content = json.loads((_figures(key, folder)).read_text())
    except (OSError, ValueError):
        return None
    figures = content.get("figures") if isinstance(content, dict) else None
    if not isinstance(figures, dict) or content.get("digest") != _digest(figures):
        return None
    return figures


def save_figures(key: str, figures: dict[str, Any], folder: Path | None = None) -> None:
    """Keep what was found out about a build."""
    path = _figures(key, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"digest": _digest(figures), "figures": figures}, indent=1, sort_keys=True)
    write_whole(path, text, hint="Kernels will be built again.")


def _figures(key: str, folder: Path | None) -> Path:
    return (folder or root()) / "built" / f"{key}.json"


def _digest(figures: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()
