"""Save and load a training run: model, optimizer, random state and whatever else the script keeps.

::

    handle = save_checkpoint("run", "step_100", model=model, optimizer=optimizer, state={"scheduler": s.state_dict()})
    loaded = load_checkpoint("run", model=model, optimizer=optimizer)       # the newest complete one
    scheduler.load_state_dict(loaded.state["scheduler"])

Shards are written and read through PyTorch's distributed checkpoint (DCP), so any number of ranks and any ZeRO stage
may load what any other saved. Every rank calls both functions; both raise the same error on every rank.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.optim.optimizer import register_optimizer_step_pre_hook

import dscompile
from dscompile.accumulate import pending_accumulation
from dscompile.engine import checkpoint_directory as layout
from dscompile.engine.checkpoint_files import DirectoryReader, describe, file_name, raw, write_chunks, write_synced
from dscompile.engine.checkpoint_format import METADATA, Contents, decode, encode
from dscompile.engine.checkpoint_peers import Collective, Peers, ThroughStore, raise_first
from dscompile.engine.checkpoint_stage import HostBuffer, Staging
from dscompile.engine.checkpoint_state import (
    SEPARATOR,
    ModelState,
    OptimizerLoad,
    OptimizerState,
    compare,
    empty_for,
    unwrap,
)
from dscompile.engine.rng import derive_rng, get_rng, set_rng
from dscompile.errors import CheckpointError, DscompileError

_LOG = logging.getLogger(__name__)
_SAVER = "_dscompile_saver"
_EXIT_SECONDS = 60.0
_STATE = f"state{SEPARATOR}"


class SaveHandle:
    """One save. A synchronous one is complete; an asynchronous one goes on in a thread of its own.

    Attributes:
        path: where the checkpoint is, or will be.
        blocked_seconds: how long training waited for it so far: in the call, and before an optimizer step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocked_seconds = 0.0
        self._staged, self._done = threading.Event(), threading.Event()
        self._error: CheckpointError | None = None

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait_staged(self) -> None:
        """Wait until values may change: the checkpoint holds those of the moment of the call."""
        start = time.perf_counter()
        self._staged.wait()
        self.blocked_seconds += time.perf_counter() - start

    def wait(self, timeout: float | None = None) -> Path:
        """Wait for the end; ``timeout`` in seconds.

        Raises:
            CheckpointError: the save failed (the checkpoint before it is intact), or the time is up.
        """
        if not self._done.wait(timeout):
            raise CheckpointError(f"{self.path}: not saved yet after {timeout:g} s.")
        if self._error is not None:
            raise self._error
        return self.path


@dataclass(frozen=True, slots=True)
class Loaded:
    """What :func:`load_checkpoint` found.

    Attributes:
        path: the checkpoint's folder.
        state: what was given to :func:`save_checkpoint` as ``state``; tensors on the CPU.
        missing: with ``strict=False``, names of the model's tensors that were not in the checkpoint.
        unused: with ``strict=False``, names of the checkpoint's tensors that the model lacks.
        exact_rng: whether this rank's random state is the saved one; with another number of ranks it is derived.
    """

    path: Path
    state: dict[str, Any]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    exact_rng: bool = False


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
    peers, saver = Collective(), _saver_of(model)
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
        handle._staged.set()
        handle._done.set()
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
            "state": encode(dict(state), _STATE, extra),
        }
        deferred = {k for k, v in found.tensors.items() if isinstance(v, nn.Parameter)} | set(kept.tensors)
        return cls({**found.tensors, **kept.tensors, **extra}, facts, deferred)


@dataclass(frozen=True, slots=True)
class _Job:
    """This rank's part of a save, as all ranks agreed; rank 0 also has the whole."""

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
            handle._staged.set()
        yield from staging.chunks()

    try:
        _complete(peers, job, chunks(), handle)
    except CheckpointError as error:
        handle._error = error
    except BaseException as error:  # of our own: it must reach the training thread, which waits
        handle._error = CheckpointError(f"{handle.path}: {type(error).__name__}: {error}")
    finally:
        handle._staged.set()
        handle._done.set()


def _text(path: Path, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return (
        f"{path}: cannot write the checkpoint: {reason}. What was there before is intact; make room, or save elsewhere."
    )


class _Saver:
    """What one model's saves share: the host buffer, and the one under way. Not copied or pickled with the model."""

    def __init__(self) -> None:
        self.buffer = HostBuffer()
        self._pending: SaveHandle | None = None
        self._undo: list[Callable[[], Any]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Saver, ()

    def settle(self) -> None:
        """Wait for the save under way, if any. Raises its error."""
        handle, self._pending = self._pending, None
        if handle is None:
            return
        start = time.perf_counter()
        handle._done.wait()
        waited = time.perf_counter() - start
        if waited > 0.1:
            _LOG.warning("waited %.1f s for the asynchronous save of %s to end", waited, handle.path)
        for undo in self._undo:
            undo()
        self._undo = []
        if handle._error is not None:
            raise handle._error

    def begin(self, handle: SaveHandle, run: Callable[[], None]) -> None:
        """Run a save in a thread. Optimizer steps wait until it has copied, the interpreter's exit until it ends."""
        self._pending = handle
        hook = register_optimizer_step_pre_hook(lambda *_: None if handle._staged.is_set() else handle.wait_staged())

        def at_exit() -> None:
            if not handle._done.wait(_EXIT_SECONDS):
                _LOG.error("%s: not complete %g s after the end of the program", handle.path, _EXIT_SECONDS)
            elif handle._error is not None:
                _LOG.error("%s", handle._error)

        atexit.register(at_exit)
        self._undo = [hook.remove, lambda: atexit.unregister(at_exit)]
        threading.Thread(target=run, name="dscompile save", daemon=True).start()


def _saver_of(model: nn.Module) -> _Saver:
    return cast(_Saver, unwrap(model).__dict__.setdefault(_SAVER, _Saver()))


# -- loading -----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    directory: str | Path,
    tag: str | None = None,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    strict: bool = True,
    load_optimizer: bool = True,
    load_rng: bool = True,
) -> Loaded:
    """Load what :func:`save_checkpoint` saved, at this number of ranks and ZeRO stage. Call it on every rank.

    Everything is read, verified and agreed on before the first value changes. No code of the files is run.

    Args:
        directory: of the run.
        tag: which checkpoint; by default the one that ``latest`` names.
        model: takes the values in place.
        optimizer: takes its state and its groups' options; its groups may be made otherwise.
        strict: the model and the checkpoint must have the same names. Shapes must always agree.
        load_optimizer: off, ``optimizer`` is left as it is.
        load_rng: set this rank's random generators: to their saved state, or, with another number of ranks, to one
            derived from it.

    Raises:
        CheckpointError: on every rank: nothing to load, a damaged file, another model. Nothing was changed.
    """
    peers = Collective()
    error: Exception | None = None
    try:
        _saver_of(model).settle()
    except CheckpointError as failure:
        error = failure
    peers.agree(error)
    path = _agreed_path(peers, directory, tag)
    try:
        load = _Load.read(path, model, optimizer if load_optimizer else None, strict)
        error = None
    except CheckpointError as failure:
        load, error = None, CheckpointError(f"{path}: {failure}" if str(path) not in str(failure) else str(failure))
    peers.agree(error)
    return cast(_Load, load).apply(peers, load_rng)


def _agreed_path(peers: Collective, directory: str | Path, tag: str | None) -> Path:
    """Rank 0's answer: each rank's own might differ while another job saves."""
    found: Any = None
    if peers.rank == 0:
        try:
            found = layout.find(directory, tag)
        except CheckpointError as failure:
            found = str(failure)
    found = peers.broadcast(found)
    if isinstance(found, str):
        raise CheckpointError(found)
    return cast(Path, found)


@dataclass(frozen=True, slots=True)
class _Load:
    """A checkpoint that was read and verified, not applied yet."""

    path: Path
    contents: Contents
    model: ModelState
    values: dict[str, Tensor]
    optimizer: OptimizerLoad | None
    state: dict[str, Any]
    missing: list[str]
    unused: list[str]

    @classmethod
    def read(cls, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, strict: bool) -> _Load:
        reader = DirectoryReader(path)
        contents = reader.contents
        found = ModelState.of(model)
        pairs, missing, unused = compare(found, contents, strict=strict)
        plan = None if optimizer is None else OptimizerLoad.plan(optimizer, found, contents)
        values = {name: empty_for(found.tensors[name], contents.tensor(key)) for name, key in pairs.items()}
        state = {
            k: empty_for(None, contents.tensor(k)) for k in contents.tensors.state_dict_metadata if k.startswith(_STATE)
        }
        targets = {pairs[name]: value for name, value in values.items()}
        targets |= state | ({} if plan is None else plan.targets)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(targets, contents.tensors)
        reader.read_data(planner.create_local_plan(), planner).wait()
        try:
            decoded = decode(contents.facts["state"], state)
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path / METADATA}: holds state that cannot be read ({error}).") from None
        return cls(path, contents, found, values, plan, decoded, missing, unused)

    def apply(self, peers: Collective, load_rng: bool) -> Loaded:
        if self.optimizer is not None:
            self.optimizer.apply()
        with torch.no_grad():
            for name, value in self.values.items():
                self.model.tensors[name].copy_(value)
        if self.missing or self.unused:
            _LOG.warning(
                "%s: %d tensor(s) of the model were not in the checkpoint, %d of the checkpoint were not used",
                self.path,
                len(self.missing),
                len(self.unused),
            )
        rngs = self.contents.facts["rng"]
        exact = len(rngs) == peers.world
        if load_rng and rngs:
            set_rng(rngs[peers.rank]) if exact else derive_rng(rngs, peers.rank, peers.world)
        return Loaded(self.path, self.state, tuple(self.missing), tuple(self.unused), load_rng and exact)
