"""``checkpoint.json``: what a checkpoint holds, and where. JSON with a checksum: reading it runs no code.

::

    {"format": 1, "sha256": "..."}                                     of all that follows
    {"id": "9c...", "world": 2, "files": [["rank_00000.bin", 4096], ...],
     "tensors": {"0.weight": ["float32", [8, 4], [[[0, 0], [4, 4], 0, 0, 64, 2774], ...]], ...}, ...}

A chunk is: its offset in the tensor, its shape, the index of its file, its place there in bytes, its length in bytes,
and its CRC-32. DCP's own metadata file is a pickle, which runs what it says when it is read: hence this one.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dscompile.errors import CheckpointError

FORMAT = 1
METADATA = "checkpoint.json"
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What reading values of the wrong kinds raises."""
_FILE_NAME = re.compile(r"rank_\d{5,}\.bin")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.complex64, torch.complex128, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, ``"float32"``; :class:`CheckpointError` for one that no checkpoint holds."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise CheckpointError(f"a tensor of dtype {dtype} cannot be saved; convert it first.")
    return name


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk's bytes lie: file index, first byte, length in bytes, and the CRC-32 of those bytes."""

    file: int
    position: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint's description.

    Attributes:
        tensors: shape, dtype and chunks of each tensor, by key, as DCP wants them; ``storage_data`` maps each chunk's
            ``MetadataIndex`` to its :class:`Place`.
        files: name and length in bytes of each data file.
        facts: everything else, JSON values: ``id``, ``world``, ``ties``, ``optimizer``, ``state``, ``rng``.
    """

    tensors: Metadata
    files: tuple[tuple[str, int], ...]
    facts: Mapping[str, Any]

    def tensor(self, key: str) -> TensorStorageMetadata:
        """Shape, dtype and chunks of one tensor."""
        return cast(TensorStorageMetadata, self.tensors.state_dict_metadata[key])

    def place(self, key: str, chunk: ChunkStorageMetadata) -> Place:
        """Where a chunk's bytes lie."""
        return cast(Place, self.tensors.storage_data[MetadataIndex(key, chunk.offsets)])

    def dump(self) -> bytes:
        """The text of ``checkpoint.json``."""
        tensors = {}
        for key in self.tensors.state_dict_metadata:
            found = self.tensor(key)
            rows = []
            for chunk in found.chunks:
                at = self.place(key, chunk)
                rows.append([list(chunk.offsets), list(chunk.sizes), at.file, at.position, at.nbytes, at.crc])
            tensors[key] = [dtype_name(found.properties.dtype), list(found.size), rows]
        body = json.dumps({**self.facts, "files": [list(f) for f in self.files], "tensors": tensors}).encode()
        return json.dumps({"format": FORMAT, "sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n" + body

    @classmethod
    def load(cls, path: Path) -> Contents:
        """Read and check ``checkpoint.json``.

        Raises:
            CheckpointError: the file is missing, unreadable, damaged, of another format, or contradicts itself.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror or error}.") from None
        head, _, body = data.partition(b"\n")
        try:
            header = json.loads(head)
            version, digest = header["format"], header["sha256"]
        except MALFORMED:
            raise damaged(path, "its first line is not that of a checkpoint") from None
        if version != FORMAT:
            raise CheckpointError(f"{path}: has format {version!r}; this version of dscompile reads format {FORMAT}.")
        if hashlib.sha256(body).hexdigest() != digest:
            raise damaged(path, "its checksum differs")
        try:
            return _parse(json.loads(body))
        except MALFORMED as error:
            raise damaged(path, f"it contradicts itself ({type(error).__name__}: {error})") from None


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that is not what was written."""
    return CheckpointError(
        f"{path}: the file is damaged: {what}. Load an older tag, or copy the checkpoint again. Nothing was changed."
    )


def _parse(found: dict[str, Any]) -> Contents:
    """Every number is checked: a file may be made by hand. Raises ValueError and its like."""
    files = tuple((str(name), int(size)) for name, size in found.pop("files"))
    for name, _ in files:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a data file")
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Place] = {}
    for key, (dtype, shape, rows) in found.pop("tensors").items():
        size, item = _sizes(shape), _DTYPES[dtype].itemsize
        chunks, covered = [], 0
        for offsets, sizes, *numbers in rows:
            chunk = ChunkStorageMetadata(_sizes(offsets), _sizes(sizes))
            place = Place(*map(int, numbers))
            inside = len(size) == len(chunk.offsets) == len(chunk.sizes) and all(
                o + s <= whole for o, s, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
            )
            fits = 0 <= place.position <= files[place.file][1] - place.nbytes and place.file >= 0
            if not (inside and fits and place.nbytes == math.prod(chunk.sizes) * item):
                raise ValueError(f"tensor {key!r} has an impossible chunk")
            index = MetadataIndex(key, chunk.offsets)
            if index in places:
                raise ValueError(f"tensor {key!r} has two chunks at one place")
            places[index] = place
            covered += math.prod(chunk.sizes)
            chunks.append(chunk)
        if covered != math.prod(size):
            raise ValueError(f"the chunks of tensor {key!r} do not cover it")
        properties = TensorProperties(dtype=_DTYPES[dtype])
        tensors[key] = TensorStorageMetadata(properties=properties, size=size, chunks=chunks)
    for name in ("id", "world", "ties", "optimizer", "state", "rng"):
        if name not in found:
            raise ValueError(f"{name} is missing")
    if any(type(k) is not str or type(v) is not str for k, v in found["ties"].items()):
        raise ValueError("ties are names")
    return Contents(Metadata(tensors, storage_data=places), files, found)


def _sizes(values: Sequence[Any]) -> torch.Size:
    if any(type(v) is not int or v < 0 for v in values):
        raise ValueError(f"{values!r} is not a shape")
    return torch.Size(values)


# -- values that are not model tensors ---------------------------------------------------------------------------------


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """A value of a state dictionary as JSON; its tensors are put into ``tensors``, under keys that begin ``where``.

    Kept exactly: None, bool, int, float (infinities and NaN too), str, bytes, list, tuple, dict with any such keys,
    ``Counter`` (schedules hold one), tensors; numbers of NumPy become Python's.

    Raises:
        CheckpointError: anything else, naming its place.
    """
    if value is None or (isinstance(value, (bool, int, float, str)) and type(value) in (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        while where in tensors:  # {"a.b": ..., "a": {"b": ...}}
            where += "'"
        tensors[where] = value
        return {"$tensor": where}
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, (list, tuple)):
        items = [encode(v, _below(where, i), tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping) and not any(isinstance(k, Tensor) for k in value):
        if type(value) is not collections.Counter and all(type(k) is str and k[:1] != "$" for k in value):
            return {k: encode(v, _below(where, k), tensors) for k, v in value.items()}
        pairs = [[encode(k, _below(where, "keys"), {}), encode(v, _below(where, k), tensors)] for k, v in value.items()]
        return {"$counter" if isinstance(value, collections.Counter) else "$dict": pairs}
    if isinstance(value, (bool, int, float, str)):  # a subclass: numpy.float64, an IntEnum
        base = next(t for t in (bool, int, float, str) if isinstance(value, t))
        return base(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), where, tensors)
    raise CheckpointError(
        f"state {where}: a {type(value).__module__}.{type(value).__qualname__} cannot be saved; a checkpoint holds "
        "numbers, strings, lists, tuples, dictionaries and tensors, so that loading one runs no code."
    )


def _below(where: str, key: object) -> str:
    return f"{where}{key}" if where.endswith("/") else f"{where}.{key}"


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`encode` was given. Raises ``ValueError`` or ``LookupError`` for what it did not write."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next((k for k in value if k.startswith("$")), None)
    if tag is None:
        return {k: decode(v, tensors) for k, v in value.items()}
    content = value[tag]
    if tag == "$tensor":
        return tensors[content]
    if tag == "$bytes":
        return base64.b64decode(content, validate=True)
    if tag == "$tuple":
        return tuple(decode(v, tensors) for v in content)
    if tag in ("$dict", "$counter"):
        pairs = {decode(k, tensors): decode(v, tensors) for k, v in content}
        return pairs if tag == "$dict" else collections.Counter(pairs)
    raise ValueError(f"{tag!r} is no kind of value")
