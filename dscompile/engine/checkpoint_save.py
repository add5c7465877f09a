"""Saving a checkpoint: all ranks plan it together, each writes its file, rank 0 gives the whole its name."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

import dscompile
from dscompile.accumulate import pending_accumulation
from dscompile.engine import checkpoint_directory as layout
from dscompile.engine.checkpoint_files import describe, file_name, raw, write_chunks, write_synced
from dscompile.engine.checkpoint_format import METADATA, encode
from dscompile.engine.checkpoint_peers import Collective, Peers, ThroughStore, raise_first
from dscompile.engine.checkpoint_saver import SaveHandle, saver_of
from dscompile.engine.checkpoint_stage import Staging
from dscompile.engine.checkpoint_state import STATE, ModelState, OptimizerState, unwrap
from dscompile.engine.rng import get_rng
from dscompile.errors import CheckpointError, DscompileError


def save_checkpoint(
    directory: str | Path,
    tag: str,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    state: Mapping[str, Any] | None = None,
    asynchronous: bool = False,
    timeout: float = 1800.0,
) -> SaveHandle:
    """Save under ``directory/tag``, then let ``directory/latest`` name it. Call it on every rank, between steps.

    Args:
        directory: of the run, on a file system that every rank sees; made if missing.
        tag: name of the checkpoint. One that exists is replaced, once the new one is complete.
        model: distributed or not; its parameters and persistent buffers are saved, each tied one once.
        optimizer: any elementwise one; its groups and state are saved by parameter name.
        state: more values (schedule, scaler, data position, ...): numbers, strings, lists, dictionaries, tensors. Equal
            on every rank, or rank 0's counts.
        asynchronous: return at once and write in the background. Values are copied until the next ``optimizer.step()``,
            which waits for that; an error is raised by the next save or load, or by ``handle.wait()``.
        timeout: seconds until ranks give up waiting for each other in the background.

    Returns:
        a handle; without ``asynchronous`` everything is on the disk.

    Raises:
        CheckpointError: on every rank, for what cannot be saved or written on any. Nothing that was there is changed.
    """
    start = time.perf_counter()
    peers, saver = Collective(), saver_of(model)
    handle = SaveHandle(Path(directory) / str(tag))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        saver.settle()
        layout.check_tag(tag)
        content = _Content.of(model, optimizer, {} if state is None else state)
        planner.set_up_planner({**content.tensors}, is_coordinator=peers.rank == 0)
        mine: Any = planner.create_local_plan(), get_rng()
        error = None
    except DscompileError as failure:
        content, mine, error = _Content(), None, str(failure)
    job = _plan(peers, planner, content, mine, error, handle.path)
    resolved = [(item, cast(Tensor, planner.resolve_data(item)).detach()) for item in job.plan.items]
    if not asynchronous:
        _complete(peers, job, ((item, raw(tensor)) for item, tensor in resolved), handle)
        handle.end()
        handle.blocked_seconds = time.perf_counter() - start
        return handle
    background = ThroughStore(job.temporary.name, peers, timeout)
    staging = Staging(resolved, content.tensors, content.deferred, saver.buffer)
    saver.begin(handle, lambda: _in_background(background, job, staging, handle))
    handle.blocked_seconds += time.perf_counter() - start
    return handle


# -- what is saved -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Content:
    """What this rank has to save: tensors by key, the facts, and the keys that only an optimizer step changes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    deferred: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]) -> _Content:
        pending = pending_accumulation(unwrap(model))
        if pending:
            raise CheckpointError(
                f"a checkpoint in the middle of an accumulation window would lose the gradients of {pending[0]}; save "
                "after optimizer.step(), or call discard_accumulation(model)."
            )
        found = ModelState.of(model)
        kept = OptimizerState() if optimizer is None else OptimizerState.of(optimizer, found)
        extra: dict[str, Tensor] = {}
        facts = {
            "dscompile": dscompile.__version__,
            "torch": torch.__version__,
            "ties": found.ties,
            "optimizer": kept.facts or None,
            "state": encode(dict(state), STATE, extra),
        }
        deferred = {k for k, v in found.tensors.items() if isinstance(v, nn.Parameter)} | set(kept.tensors)
        return cls({**found.tensors, **kept.tensors, **extra}, facts, deferred)


@dataclass(frozen=True, slots=True)
class _Job:
    """The part of a save that falls to this rank, as all ranks agreed; rank 0 also has the whole."""

    rank: int
    plan: SavePlan
    temporary: Path
    tag: str
    metadata: Metadata | None
    facts: dict[str, Any]


def _plan(
    peers: Collective, planner: DefaultSavePlanner, content: _Content, mine: Any, error: str | None, path: Path
) -> _Job:
    """Let rank 0 make the temporary folder and decide who writes what. Raises on every rank alike."""
    gathered = peers.gather((mine, error))
    replies: list[Any] | None = None
    metadata, rngs = None, []
    if gathered is not None:
        try:
            raise_first([text for _, text in gathered])
            plans = [_without_empty(plan) for (plan, _), _ in gathered]
            rngs = [rng for (_, rng), _ in gathered]
            decided, metadata = planner.create_global_plan(plans)
            temporary = layout.begin(path.parent)
            replies = [(plan, temporary, None) for plan in decided]
        except (OSError, ValueError, AssertionError, CheckpointError) as failure:  # the middle two are DCP's
            replies = [(None, None, _text(path, failure))] * peers.world
    plan, temporary, refused = peers.scatter(replies)
    if refused is not None:
        raise CheckpointError(refused)
    facts = {**content.facts, "id": temporary.name, "world": peers.world, "rng": rngs}
    return _Job(peers.rank, planner.finish_plan(plan), temporary, path.name, metadata, facts)


def _without_empty(plan: SavePlan) -> SavePlan:
    """A plan without the empty shards that uneven sharding leaves on some ranks."""

    def useful(item: WriteItem) -> bool:
        data = item.tensor_data
        return data is None or math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0

    return SavePlan([item for item in plan.items if useful(item)])


# -- writing -----------------------------------------------------------------------------------------------------------


def _complete(peers: Peers, job: _Job, chunks: Iterable[tuple[WriteItem, memoryview]], handle: SaveHandle) -> None:
    """Write this rank's file; once all have, rank 0 describes and names the checkpoint. Raises on every rank alike."""
    results, error = None, None
    try:
        results = write_chunks(job.temporary / file_name(job.rank), job.rank, chunks)
    except (OSError, CheckpointError) as failure:
        error = _text(handle.path, failure)
    gathered = peers.gather((results, error))
    verdict = None
    if gathered is not None:
        try:
            raise_first([text for _, text in gathered])
            contents = describe(cast(Metadata, job.metadata), [written for written, _ in gathered], job.facts)
            write_synced(job.temporary / METADATA, [contents.dump()])
            layout.commit(job.temporary, job.tag)
        except (OSError, CheckpointError) as failure:
            layout.abandon(job.temporary)
            verdict = _text(handle.path, failure)
    verdict = peers.broadcast(verdict)
    if verdict is not None:
        raise CheckpointError(verdict)


def _in_background(peers: Peers, job: _Job, staging: Staging, handle: SaveHandle) -> None:
    def chunks() -> Iterable[tuple[WriteItem, memoryview]]:
        try:
            staging.copy()
        finally:
            handle.set_staged()
        yield from staging.chunks()

    error: CheckpointError | None = None
    try:
        _complete(peers, job, chunks(), handle)
    except CheckpointError as failure:
        error = failure
    except BaseException as failure:  # of our own: it must reach the training thread, which waits
        error = CheckpointError(f"{handle.path}: {type(failure).__name__}: {failure}")
    finally:
        handle.end(error)


def _text(path: Path, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return (
        f"{path}: cannot write the checkpoint: {reason}. What was there before is intact; make room, or save elsewhere."
    )
