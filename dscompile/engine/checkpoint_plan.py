"""Who writes what: DCP's plan of a save, made by all ranks together and kept for the next save of the same layout.

For a thousand tensors planning costs as much as writing a hundred megabytes, nearly all of it to describe what the last
save described. So each rank compares the layout of its tensors with that of the plan it has, and only if some rank's is
new do all plan again.

Large shards are written in pieces, each with a checksum of its own: a rank that needs some rows of one later reads and
verifies the pieces they lie in, and holds one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from dscompile.engine import checkpoint_directory as layout
from dscompile.engine.checkpoint_peers import Collective, describe, raise_first
from dscompile.errors import CheckpointError
from dscompile.torch_compat import local_of

PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank writes, and of what layout; on rank 0 also the description of all tensors.

    ``starts`` are the first rows of this rank's shards in the whole tensors, by key.
    """

    signature: tuple[Any, ...]
    items: tuple[WriteItem, ...]
    starts: Mapping[str, int]
    metadata: Metadata | None

    def resolve(self, tensors: Mapping[str, Tensor]) -> list[tuple[WriteItem, Tensor]]:
        """The items, each with its rows of this rank's tensor, as a view."""
        found = []
        for item in self.items:
            tensor, chunk = local(tensors[item.index.fqn]), cast(TensorWriteData, item.tensor_data).chunk
            if tensor.ndim:
                tensor = tensor.narrow(0, chunk.offsets[0] - self.starts[item.index.fqn], chunk.sizes[0])
            found.append((item, tensor))
        return found


@dataclass(frozen=True, slots=True)
class Agreed:
    """One save as all ranks agreed on it. ``gathered`` are the ranks' own values, on rank 0."""

    plan: Plan
    temporary: Path
    gathered: list[Any]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor


def write_error(path: Path, error: Exception) -> str:
    """What to tell of a save that failed."""
    if isinstance(error, CheckpointError):
        return str(error)
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return (
        f"{path}: cannot write the checkpoint: {reason}. What was there before is intact; make room, or save elsewhere."
    )


def agree(
    peers: Collective, known: Plan | None, tensors: Mapping[str, Tensor], own: Any, error: str | None, path: Path
) -> Agreed:
    """Let rank 0 make the temporary folder and decide who writes what.

    Args:
        peers: the ranks.
        known: the plan of the last save on this rank.
        tensors: what to save, by key, on this rank.
        own: any value for rank 0.
        error: why this rank cannot save, or None.
        path: where the checkpoint will be.

    Raises:
        CheckpointError: on every rank alike, for the first error of any.
    """
    signature = () if error else _signature(peers, tensors)
    if known is not None and known.signature != signature:
        known = None
    again = True
    while again:
        whole, mine = None, None
        if error is None and known is None:
            try:
                whole = _local_plan(tensors)
                mine = SavePlan([piece for item in whole.items for piece in _pieces(item)])
            except Exception as failure:  # DCP's own: the other ranks must not wait for this one
                error = describe(failure)
        gathered = peers.gather((error, mine, own))
        reply = peers.scatter(None if gathered is None else _decide(gathered, known, path))
        again, items, metadata, temporary, refused = reply
        if refused is not None:
            raise CheckpointError(refused)
        if again:
            known = None
    plan = known if items is None else Plan(signature, items, _starts(cast(SavePlan, whole)), metadata)
    return Agreed(cast(Plan, plan), temporary, [] if gathered is None else [found for _, _, found in gathered])


def _signature(peers: Collective, tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    def one(tensor: Tensor) -> tuple[Any, ...]:
        if isinstance(tensor, DTensor):
            return tensor.shape, tensor.dtype, tensor.placements, id(tensor.device_mesh), local_of(tensor).shape
        return tensor.shape, tensor.dtype

    return peers.rank, peers.world, tuple((key, one(tensor)) for key, tensor in tensors.items())


def _local_plan(tensors: Mapping[str, Tensor]) -> SavePlan:
    planner = _planner()
    planner.set_up_planner({**tensors})
    return _without_empty(planner.create_local_plan())


def _starts(plan: SavePlan) -> dict[str, int]:
    chunks = {item.index.fqn: cast(TensorWriteData, item.tensor_data).chunk for item in plan.items}
    return {key: chunk.offsets[0] for key, chunk in chunks.items() if chunk.offsets}


def _pieces(item: WriteItem) -> list[WriteItem]:
    """A shard as pieces of at most :data:`PIECE_BYTES`, or of one row each."""
    data = cast(TensorWriteData, item.tensor_data)
    offsets, sizes = data.chunk.offsets, data.chunk.sizes
    nbytes = math.prod(sizes) * data.properties.dtype.itemsize
    if nbytes <= PIECE_BYTES or not sizes or sizes[0] <= 1:
        return [item]
    step = max(PIECE_BYTES * sizes[0] // nbytes, 1)
    found = []
    for first in range(0, sizes[0], step):
        at = torch.Size((offsets[0] + first, *offsets[1:]))
        chunk = ChunkStorageMetadata(at, torch.Size((min(step, sizes[0] - first), *sizes[1:])))
        piece = TensorWriteData(chunk, data.properties, data.size)
        # SHARD: for DCP any other type means that there is only one of the name.
        found.append(WriteItem(MetadataIndex(item.index.fqn, at), WriteItemType.SHARD, tensor_data=piece))
    return found


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


_Reply = tuple[bool, tuple[WriteItem, ...] | None, Metadata | None, Path | None, str | None]
"""Plan again; this rank's items or None for those it has; description; temporary folder; error."""


def _decide(gathered: list[Any], known: Plan | None, path: Path) -> list[_Reply]:
    """Rank 0's answer to each rank."""
    world = len(gathered)
    plans = [plan for _, plan, _ in gathered]
    try:
        raise_first([error for error, _, _ in gathered])
        if any(plan is None for plan in plans) and not all(plan is None for plan in plans):
            return [(True, None, None, None, None)] * world
        decided, metadata = (None, None) if plans[0] is None else _planner().create_global_plan(plans)
        temporary = layout.begin(path.parent)
    except (OSError, ValueError, AssertionError, CheckpointError) as failure:  # the middle two are DCP's
        return [(False, None, None, None, write_error(path, failure))] * world
    if decided is None:
        return [(False, None, None, temporary, None)] * world
    described = [metadata, *[None] * (world - 1)]
    return [(False, tuple(plan.items), m, temporary, None) for plan, m in zip(decided, described, strict=True)]


def _without_empty(plan: SavePlan) -> SavePlan:
    """A plan without the empty shards that uneven sharding leaves on some ranks."""

    def useful(item: WriteItem) -> bool:
        data = item.tensor_data
        return data is None or math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0

    return SavePlan([item for item in plan.items if useful(item)])
