"""Saving a checkpoint: all ranks plan it together, each writes its file, rank 0 gives the whole its name."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem

import dscompile
from dscompile.accumulate import pending_accumulation
from dscompile.engine import checkpoint_directory as layout
from dscompile.engine.checkpoint_files import describe, file_name, raw, write_chunks, write_synced
from dscompile.engine.checkpoint_format import METADATA, encode
from dscompile.engine.checkpoint_peers import Collective, Peers, ThroughStore, raise_first
from dscompile.engine.checkpoint_peers import describe as describe_error
from dscompile.engine.checkpoint_plan import Plan, agree, write_error
from dscompile.engine.checkpoint_saver import SaveHandle, Saver, saver_of
from dscompile.engine.checkpoint_stage import Staging
from dscompile.engine.checkpoint_state import GROUPS, STATE, ModelState, OptimizerState, unwrap
from dscompile.engine.rng import get_rng
from dscompile.errors import CheckpointError


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
    content, error, cause = _Content(), None, None
    try:
        saver.settle()
        layout.check_tag(tag)
        content = _Content.of(model, optimizer, {} if state is None else state)
    except CheckpointError as failure:
        error = str(failure)
    except Exception as failure:  # the model's or the optimizer's own: the other ranks must not wait for this one
        error, cause = describe_error(failure), failure
    try:
        agreed = agree(peers, saver.plan, content.tensors, get_rng(), error, handle.path)
    except CheckpointError as failure:
        raise failure from cause
    saver.plan = agreed.plan
    facts = {**content.facts, "id": agreed.temporary.name, "world": peers.world, "rng": agreed.gathered}
    job = _Job(peers.rank, agreed.plan, agreed.temporary, handle.path.name, facts)
    resolved = agreed.plan.resolve(content.tensors)
    if not asynchronous:
        _complete(peers, job, ((item, raw(tensor)) for item, tensor in resolved), handle)
        handle.end()
        handle.blocked_seconds = time.perf_counter() - start
        return handle
    background = ThroughStore(job.temporary.name, peers, timeout)
    chunks = _staged(resolved, content, saver, handle)
    saver.begin(handle, lambda: _in_background(background, job, chunks, handle))
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
        deferred = {k for k, v in found.tensors.items() if isinstance(v, nn.Parameter)}
        deferred |= {k for k in kept.tensors if not k.startswith(GROUPS)}
        return cls({**found.tensors, **kept.tensors, **extra}, facts, deferred)


@dataclass(frozen=True, slots=True)
class _Job:
    """The part of a save that falls to this rank. ``facts`` are complete on rank 0, which describes the checkpoint."""

    rank: int
    plan: Plan
    temporary: Path
    tag: str
    facts: dict[str, Any]


# -- writing -----------------------------------------------------------------------------------------------------------


def _complete(peers: Peers, job: _Job, chunks: Iterable[tuple[WriteItem, memoryview]], handle: SaveHandle) -> None:
    """Write this rank's file; once all have, rank 0 describes and names the checkpoint. Raises on every rank alike."""
    results, error = None, None
    try:
        results = write_chunks(job.temporary / file_name(job.rank), job.rank, chunks)
    except Exception as failure:  # whatever it is, the other ranks must not wait for this one
        error = write_error(handle.path, failure)
    gathered = peers.gather((results, error))
    verdict = None
    if gathered is not None:
        try:
            raise_first([text for _, text in gathered])
            contents = describe(cast(Metadata, job.plan.metadata), [written for written, _ in gathered], job.facts)
            write_synced(job.temporary / METADATA, [contents.dump()])
            layout.commit(job.temporary, job.tag)
        except Exception as failure:
            layout.abandon(job.temporary)
            verdict = write_error(handle.path, failure)
    verdict = peers.broadcast(verdict)
    if verdict is not None:
        raise CheckpointError(verdict)


def _staged(
    resolved: Sequence[tuple[WriteItem, Tensor]], content: _Content, saver: Saver, handle: SaveHandle
) -> Iterable[tuple[WriteItem, memoryview]]:
    """What to write in the background, copied when the first is asked for; an error is raised then."""
    staging: Staging | None = None
    failure: Exception | None = None
    try:
        staging = Staging(resolved, content.tensors, content.deferred, saver.buffer)
    except Exception as error:  # no memory, for instance: the other ranks must hear of it
        failure = error

    def chunks() -> Iterable[tuple[WriteItem, memoryview]]:
        if staging is None:
            raise cast(Exception, failure)
        try:
            staging.copy()
        finally:
            handle.set_staged()
        yield from staging.chunks()

    return chunks()


def _in_background(peers: Peers, job: _Job, chunks: Iterable[tuple[WriteItem, memoryview]], handle: SaveHandle) -> None:
    error: CheckpointError | None = None
    try:
        _complete(peers, job, chunks, handle)
    except CheckpointError as failure:
        error = failure
    except BaseException as failure:  # of our own: it must reach the training thread, which waits
        error = CheckpointError(f"{handle.path}: {type(failure).__name__}: {failure}")
    finally:
        handle.end(error)
