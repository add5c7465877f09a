"""Data files of a checkpoint, as DCP's storage interface: ``DirectoryWriter`` and ``DirectoryReader``.

One file a rank, ``rank_00000.bin``: the bytes of its chunks one after the other, nothing else. Every chunk is checked
against its CRC-32 before any of it is used. Both fit :func:`torch.distributed.checkpoint.save` and ``load``::

    torch.distributed.checkpoint.load({"0.weight": tensor}, storage_reader=DirectoryReader("run/step_100"))
"""

from __future__ import annotations

import os
import secrets
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dscompile.engine.checkpoint_format import METADATA, Contents, Place, damaged
from dscompile.errors import CheckpointError


def file_name(rank: int) -> str:
    """Name of a rank's data file."""
    return f"rank_{rank:05d}.bin"


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes on the host, in row-major order; without a copy if that is how they lie already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_synced(path: Path, parts: Iterable[memoryview | bytes]) -> None:
    """Write a new file and wait until it is on the disk. Raises ``OSError``."""
    with FileIO(path, "xb") as file:
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def write_chunks(path: Path, file: int, chunks: Iterable[tuple[WriteItem, memoryview]]) -> list[WriteResult]:
    """Write one rank's chunks to its file, synced. Raises ``OSError``."""
    results: list[WriteResult] = []
    position = 0

    def parts() -> Iterable[memoryview]:
        nonlocal position
        for item, data in chunks:
            place = Place(file, position, len(data), zlib.crc32(data))
            results.append(WriteResult(item.index, len(data), place))
            position += len(data)
            yield data

    write_synced(path, parts())
    return results


def describe(metadata: Metadata, results: Iterable[list[WriteResult]], facts: Mapping[str, Any]) -> Contents:
    """The description of a checkpoint whose ranks wrote ``results``, in rank order."""
    places, files = {}, []
    for rank, written in enumerate(results):
        places.update({result.index: result.storage_data for result in written})
        files.append((file_name(rank), sum(result.size_in_bytes for result in written)))
    return Contents(Metadata(metadata.state_dict_metadata, storage_data=places), tuple(files), facts)


class DirectoryWriter(StorageWriter):
    """Writes one checkpoint into an existing directory. Tensors only: DCP pickles other objects.

    The caller decides when a directory counts as complete (:mod:`dscompile.engine.checkpoint_directory`).
    """

    def __init__(self, path: str | Path, rank: int | None = None) -> None:
        """``rank``: this rank, by default that of the process group."""
        self.path = Path(path)
        if rank is None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._rank = rank
        self.facts: Mapping[str, Any] = {
            "id": secrets.token_hex(8), "world": None, "ties": {}, "optimizer": None, "state": {}, "rng": [],
        }  # fmt: skip

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin again, in another directory if one is given."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        chunks = ((item, raw(cast(Tensor, planner.resolve_data(item)))) for item in plan.items)
        future: Future[list[WriteResult]] = Future()
        future.set_result(write_chunks(self.path / file_name(self._rank), self._rank, chunks))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write ``checkpoint.json``."""
        write_synced(self.path / METADATA, [describe(metadata, results, self.facts).dump()])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the path is one of an existing directory."""
        return Path(checkpoint_id).is_dir()


class DirectoryReader(StorageReader):
    """Reads one checkpoint, at any number of ranks. Every chunk is verified before any of it is used.

    Raises:
        CheckpointError: from every method, for what is missing, unreadable or damaged; it names the file.
    """

    def __init__(self, path: str | Path, contents: Contents | None = None) -> None:
        """``contents``: the description, if it was read before."""
        self.path = Path(path)
        self._contents = contents

    @property
    def contents(self) -> Contents:
        """The checkpoint's description; data files are compared with it when it is first read."""
        if self._contents is None:
            contents = Contents.load(self.path / METADATA)
            self.check_files(contents)
            self._contents = contents
        return self._contents

    def check_files(self, contents: Contents) -> None:
        """Compare the sizes of data files with the description."""
        for name, size in contents.files:
            path = self.path / name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path}: cannot read: {error.strerror or error}.") from None
            if found != size:
                raise damaged(path, f"it has {found} bytes, not {size}")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin again, with another directory if one is given."""
        if checkpoint_id is not None:
            self.path, self._contents = Path(checkpoint_id), None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes, dtypes and chunks of all tensors."""
        return self.contents.tensors

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each chunk that the plan wants once, and copy the wanted parts of it."""
        wanted: dict[Place, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[self.contents.tensors.storage_data[item.storage_index]].append(item)

        def deliver(place: Place, data: Tensor) -> None:
            for item in wanted[place]:
                part = _chunk(self.contents, item, data)
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    part = part.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)

        self._read(wanted, deliver)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def tensor(self, key: str) -> Tensor:
        """One whole tensor, on the CPU."""
        found = self.contents.tensor(key)
        whole = torch.empty(found.size, dtype=found.properties.dtype)
        chunks = {self.contents.place(key, chunk): chunk for chunk in found.chunks}

        def deliver(place: Place, data: Tensor) -> None:
            chunk = chunks[place]
            part = whole
            for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dim, start, length)
            part.copy_(data.view(whole.dtype).view(chunk.sizes))

        self._read(chunks, deliver)
        return whole

    def _read(self, places: Iterable[Place], deliver: Callable[[Place, Tensor], None]) -> None:
        """Hand over the verified bytes of each place, in file order."""
        by_file: dict[int, list[Place]] = defaultdict(list)
        for place in places:
            by_file[place.file].append(place)
        for file, found in sorted(by_file.items()):
            path = self.path / self.contents.files[file][0]
            try:
                with FileIO(path, "rb") as opened:
                    for place in sorted(found, key=lambda p: p.position):
                        deliver(place, _verified(path, opened, place))
            except OSError as error:
                raise CheckpointError(f"{path}: cannot read: {error.strerror or error}.") from None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether the path is one of a checkpoint."""
        return Path(checkpoint_id, METADATA).is_file()


def _verified(path: Path, file: FileIO, place: Place) -> Tensor:
    data = torch.empty(place.nbytes, dtype=torch.uint8)
    view = data.numpy().data
    file.seek(place.position)
    got = 0
    while got < place.nbytes:
        count = file.readinto(view[got:])
        if not count:
            raise damaged(path, f"it ends at byte {place.position + got}")
        got += count
    if zlib.crc32(view) != place.crc:
        raise damaged(path, f"the checksum of bytes {place.position} to {place.position + place.nbytes} differs")
    return data


def _chunk(contents: Contents, item: ReadItem, data: Tensor) -> Tensor:
    found, at = contents.tensor(item.storage_index.fqn), item.storage_index
    chunk: ChunkStorageMetadata = found.chunks[cast(int, at.index)]
    return data.view(found.properties.dtype).view(chunk.sizes)
