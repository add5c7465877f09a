"""The safetensors format: a length, a JSON header, and the tensors' bytes. Read and written in parts, never as a whole.

Format: https://huggingface.co/docs/safetensors. The package of that name is not needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dscompile.engine.checkpoint_files import raw, write_synced
from dscompile.engine.checkpoint_format import MALFORMED
from dscompile.errors import CheckpointError

_HEADER_LIMIT = 100_000_000  # bytes: the format's own
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: where its bytes begin in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file's header: its tensors by name, and its notes."""

    path: Path
    entries: dict[str, Entry]
    notes: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Read and check the header.

        Raises:
            CheckpointError: the file is missing, cut short, or no safetensors file.
        """
        try:
            size = path.stat().st_size
            with FileIO(path, "rb") as file:
                length = int.from_bytes(_exactly(file, 8), "little")
                if length > min(size - 8, _HEADER_LIMIT):
                    raise ValueError("its header is longer than the file")
                header = json.loads(_exactly(file, length))
            notes = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            entries = {name: _entry(name, found, 8 + length, size) for name, found in header.items()}
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror or error}.") from None
        except MALFORMED as error:
            raise CheckpointError(f"{path}: no whole safetensors file ({error}).") from None
        if sum(entry.nbytes for entry in entries.values()) != size - 8 - length:
            raise CheckpointError(f"{path}: no whole safetensors file (its tensors do not fill it).")
        return cls(path, entries, notes)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """``count`` rows along dimension 0, from ``first`` on; nothing else is read."""
        entry = self.entries[name]
        shape = (count, *entry.shape[1:])
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._read(entry, entry.start + first * row, shape)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor. Raises :class:`CheckpointError`."""
        entry = self.entries[name]
        return self._read(entry, entry.start, entry.shape)

    def _read(self, entry: Entry, start: int, shape: tuple[int, ...]) -> Tensor:
        data = torch.empty(math.prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        try:
            with FileIO(self.path, "rb") as file:
                file.seek(start)
                view, got = data.numpy().data, 0
                while got < data.numel():
                    count = file.readinto(view[got:])
                    if not count:
                        raise CheckpointError(f"{self.path}: the file ends at byte {start + got}.")
                    got += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read: {error.strerror or error}.") from None
        return data.view(entry.dtype).view(shape)


def _exactly(file: FileIO, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = file.read(count - len(parts))
        if not part:
            raise ValueError("it is cut short")
        parts += part
    return bytes(parts)


def _entry(name: str, found: dict[str, Any], base: int, size: int) -> Entry:
    begin, end = found["data_offsets"]
    shape = tuple(found["shape"])
    if found["dtype"] not in _DTYPES or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has dtype {found['dtype']!r} and shape {shape}")
    entry = Entry(_DTYPES[found["dtype"]], shape, base + begin)
    if entry.nbytes != end - begin or base + end > size:
        raise ValueError(f"tensor {name!r} lies outside of it")
    return entry


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterator[Tensor],
    notes: Mapping[str, str],
) -> None:
    """Write a new file; ``values`` gives the tensors in the order of ``layout`` and is read one at a time.

    Raises:
        CheckpointError: a dtype that the format lacks.
        OSError: the file exists or cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    position = 0
    for name, (dtype, shape) in layout.items():
        if dtype not in _NAMES:
            raise CheckpointError(f"{name}: safetensors files hold no tensors of dtype {dtype}.")
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[memoryview | bytes]:
        yield len(text).to_bytes(8, "little")
        yield text
        for value in values:
            yield raw(value)

    write_synced(path, parts())
