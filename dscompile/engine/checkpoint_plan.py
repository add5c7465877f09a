"""Who writes what: DCP's plan of a save, made by all ranks together and kept for the next save of the same layout.

For a thousand tensors planning costs as much as writing a hundred megabytes, nearly all of it to describe what the last
save described. So each rank compares the layout of its tensors with that of the plan it has, and only if some rank's is
new do all plan again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from dscompile.engine import checkpoint_directory as layout
from dscompile.engine.checkpoint_peers import Collective, raise_first
from dscompile.errors import CheckpointError
from dscompile.torch_compat import local_of


@dataclass(frozen=True, slots=True)
class Plan:
    """What this rank writes, and of what layout; on rank 0 also the description of all tensors."""

    signature: tuple[Any, ...]
    items: tuple[WriteItem, ...]
    metadata: Metadata | None


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
        mine = None if error or known else _local_plan(tensors)
        gathered = peers.gather((error, mine, own))
        reply = peers.scatter(None if gathered is None else _decide(gathered, known, path))
        again, items, metadata, temporary, refused = reply
        if refused is not None:
            raise CheckpointError(refused)
        if again:
            known = None
    plan = known if items is None else Plan(signature, items, metadata)
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
