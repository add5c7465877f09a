"""One file for other programs: a checkpoint's model as safetensors, and weights from such a file into a model."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dscompile.engine.checkpoint_directory import find
from dscompile.engine.checkpoint_files import DirectoryReader
from dscompile.engine.checkpoint_peers import Collective
from dscompile.engine.checkpoint_state import ModelState, differences, stored_model_keys
from dscompile.engine.safetensors_file import SafetensorsFile, write_safetensors
from dscompile.errors import CheckpointError
from dscompile.placement import spec_of
from dscompile.slots import slot_of


def export_safetensors(directory: str | Path, tag: str | None, file: str | Path) -> int:
    """Write a checkpoint's model tensors to one safetensors file, one tensor in memory at a time; needs no ranks.

    Names are the plain ones. Other names of tied tensors are noted in the header, as ``safetensors.torch.save_model``
    does, so ``safetensors.torch.load_model`` finds them.

    Args:
        directory: of the run, as :func:`dscompile.engine.checkpoint.save_checkpoint` was given.
        tag: which checkpoint; None for the newest.
        file: to write; one that exists is replaced once the new one is complete.

    Returns:
        the file's size in bytes.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or a file that cannot be written.
    """
    reader, file = DirectoryReader(find(directory, tag)), Path(file)
    contents = reader.contents
    keys = stored_model_keys(contents)
    layout = {k: (contents.tensor(k).properties.dtype, tuple(contents.tensor(k).size)) for k in keys}
    temporary = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        notes = {"format": "pt", **contents.facts["ties"]}
        write_safetensors(temporary, layout, (reader.tensor(key) for key in keys), notes)
        temporary.replace(file)
        return file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file}: cannot write: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


Box = Sequence[tuple[int, int]]
"""First index, and the one after the last, of each dimension."""


class _Weights(Protocol):
    """Named tensors of a file."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each."""

    def part(self, name: str, box: Box) -> Tensor:
        """The part from the first index to before the last of each dimension."""


class _Safetensors:
    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._file.entries.items()}

    def part(self, name: str, box: Box) -> Tensor:
        shape = self._file.entries[name].shape
        if not box or list(box[1:]) != [(0, size) for size in shape[1:]]:
            return _narrowed(self._file.tensor(name), box)
        first, last = box[0]
        return self._file.rows(name, first, last - first)


class _Mapped:
    """A PyTorch file, mapped into memory: only the rows that are used are read from the disk."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def part(self, name: str, box: Box) -> Tensor:
        return _narrowed(self._tensors[name], box)


def _narrowed(whole: Tensor, box: Box) -> Tensor:
    return whole[tuple(slice(first, last) for first, last in box)]


def load_weights(model: nn.Module, path: str | Path, *, key: str | None = None, strict: bool = True) -> list[str]:
    """Load a state dictionary from one file into a model, distributed or not. Call it on every rank.

    Each rank reads its own rows; where they do not lie together, one whole tensor at a time. Floating-point values are
    converted to the model's dtype. No code of the file is run.

    Args:
        model: takes the values in place.
        path: a ``.safetensors`` file, or a file that ``torch.save`` wrote (read with ``weights_only=True``).
        key: of a PyTorch file that holds more, the entry that is the state dictionary, such as ``"module"``.
        strict: the model and the file must have the same names. Shapes must always agree.

    Returns:
        the names of the model's tensors that were not in the file; empty with ``strict``.

    Raises:
        CheckpointError: on every rank: an unreadable file, or one of another model. Nothing was changed.
    """
    peers, path = Collective(), Path(path)
    error: Exception | None = None
    parts: dict[str, Tensor] = {}
    missing: list[str] = []
    found = ModelState({}, {})
    try:
        found = ModelState.of(model)
        weights = _open(path, key)
        names, missing = _match(path, found, weights.shapes(), strict)
        for name, stored in names.items():
            parts[name] = _part(found.tensors[name], weights, stored)
    except CheckpointError as failure:
        error = failure
    peers.agree(error)
    with torch.no_grad():
        for name, part in parts.items():
            target = found.tensors[name]
            target.copy_(_like(target, part))
    return missing


def _part(target: Tensor, weights: _Weights, name: str) -> Tensor:
    """The part of a stored tensor that this rank holds, in memory of its own and in the target's dtype."""
    spec, slot = spec_of(target), slot_of(target)
    if isinstance(target, DTensor) and (spec is None or slot is None):
        raise CheckpointError(f"{name}: a DTensor that dscompile.distribute did not make; load it with PyTorch's DCP.")
    if spec is None or slot is None or spec.dim < 0:
        box = [(0, size) for size in target.shape]
    else:
        box = spec.layout.box(slot.rank)
    part = weights.part(name, box)
    if part.dtype != target.dtype and not (part.is_floating_point() and target.is_floating_point()):
        raise CheckpointError(f"{name}: is {part.dtype} in the file and {target.dtype} in the model.")
    return torch.empty(part.shape, dtype=target.dtype).copy_(part)


def _like(target: Tensor, part: Tensor) -> Tensor:
    if not isinstance(target, DTensor):
        return part
    return DTensor.from_local(
        part.to(target.device),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def _open(path: Path, key: str | None) -> _Weights:
    if path.suffix == ".safetensors":
        if key is not None:
            raise CheckpointError(f"{path}: a safetensors file has no entries; leave key={key!r} out.")
        return _Safetensors(SafetensorsFile.open(path))
    try:
        with path.open("rb") as file:
            os.fstat(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}.") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: PyTorch cannot read it with weights_only=True, which runs no code: {reason}"
        ) from None
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        held = ", ".join(map(repr, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: not a state dictionary of tensors (it holds {held}); name the entry with key=.")
    return _Mapped(cast("dict[str, Tensor]", content))


_PREFIXES = ("_orig_mod.", "module.", "model.")


def _match(
    path: Path, model: ModelState, shapes: Mapping[str, tuple[int, ...]], strict: bool
) -> tuple[dict[str, str], list[str]]:
    """Where each of the model's tensors is in the file; and those that are not there."""
    plain = dict.fromkeys(shapes)
    stored = {name: name for name in plain}
    for prefix in _PREFIXES:  # a wrapper's, if every name has it and the model's do not
        alike = all(name.startswith(prefix) for name in stored)
        if alike and not any(name.startswith(prefix) for name in model.tensors):
            stored = {name.removeprefix(prefix): at for name, at in stored.items()}
    others = {name: [other for other, known in model.ties.items() if known == name] for name in model.tensors}
    names = {}
    for name in model.tensors:
        at = next((candidate for candidate in (name, *others[name]) if candidate in stored), None)
        if at is not None:
            names[name] = stored[at]
    missing = [name for name in model.tensors if name not in names]
    unused = [name for name in stored if name not in model.tensors and name not in model.ties]
    text = differences(
        {n: tuple(t.shape) for n, t in model.tensors.items()},
        {**{n: shapes[at] for n, at in stored.items()}, **{n: shapes[at] for n, at in names.items()}},
        missing if strict else [],
        unused if strict else [],
        [n for n, at in names.items() if shapes[at] != tuple(model.tensors[n].shape)],
        "file",
    )
    if text:
        raise CheckpointError(f"{path}: holds another model: {text}.")
    return names, missing
