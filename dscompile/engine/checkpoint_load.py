"""Loading a checkpoint: everything is read, verified and agreed on before the first value changes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner

from dscompile.engine import checkpoint_directory as layout
from dscompile.engine.checkpoint_files import DirectoryReader
from dscompile.engine.checkpoint_format import MALFORMED, METADATA, Contents, damaged, decode
from dscompile.engine.checkpoint_peers import Collective
from dscompile.engine.checkpoint_saver import saver_of
from dscompile.engine.checkpoint_state import STATE, ModelState, OptimizerLoad, compare, empty_for
from dscompile.engine.rng import derive_rng, rng_setter
from dscompile.errors import CheckpointError

_LOG = logging.getLogger(__name__)


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
        saver_of(model).settle()
    except CheckpointError as failure:
        error = failure
    peers.agree(error)
    path = _agreed_path(peers, directory, tag)
    try:
        load = _Load.read(path, model, optimizer if load_optimizer else None, strict, peers, load_rng)
        error = None
    except CheckpointError as failure:
        load, error = None, CheckpointError(f"{path}: {failure}" if str(path) not in str(failure) else str(failure))
    except Exception as failure:  # the model's or the optimizer's own: the other ranks must not wait for this one
        load, error = None, failure
    peers.agree(error)
    return cast(_Load, load).apply()


def read_state(directory: str | Path, tag: str | None = None) -> dict[str, Any]:
    """What :func:`save_checkpoint` was given as ``state``, without a model, on this rank alone; tensors on the CPU.

    Args:
        directory: of the run.
        tag: which checkpoint; by default the one that ``latest`` names.

    Raises:
        CheckpointError: no such checkpoint, or a damaged file.
    """
    reader = DirectoryReader(layout.find(directory, tag))
    contents = reader.contents
    tensors = {key: reader.tensor(key) for key in contents.tensors.state_dict_metadata if key.startswith(STATE)}
    try:
        state = decode(contents.facts["state"], tensors)
    except MALFORMED as error:
        raise damaged(reader.path / METADATA, f"it contradicts itself ({type(error).__name__}: {error})") from error
    return cast("dict[str, Any]", state)


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
    install_optimizer: Callable[[], None] | None
    state: dict[str, Any]
    missing: list[str]
    unused: list[str]
    set_rng: Callable[[], None] | None
    exact_rng: bool

    @classmethod
    def read(
        cls,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        strict: bool,
        peers: Collective,
        load_rng: bool,
    ) -> _Load:
        reader = DirectoryReader(path)
        contents = reader.contents
        found = ModelState.of(model)
        try:
            return cls._read(reader, contents, found, optimizer, strict, peers, load_rng)
        except (*MALFORMED, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise damaged(path / METADATA, f"it contradicts itself ({type(error).__name__}: {error})") from error

    @classmethod
    def _read(
        cls,
        reader: DirectoryReader,
        contents: Contents,
        found: ModelState,
        optimizer: torch.optim.Optimizer | None,
        strict: bool,
        peers: Collective,
        load_rng: bool,
    ) -> _Load:
        pairs, missing, unused = compare(found, contents, strict=strict)
        plan = None if optimizer is None else OptimizerLoad.plan(optimizer, found, contents)
        values = {name: empty_for(found.tensors[name], contents.tensor(key)) for name, key in pairs.items()}
        state = {
            k: empty_for(None, contents.tensor(k)) for k in contents.tensors.state_dict_metadata if k.startswith(STATE)
        }
        targets = {pairs[name]: value for name, value in values.items()}
        targets |= state | ({} if plan is None else plan.targets)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(targets, contents.tensors)
        reader.read_data(planner.create_local_plan(), planner).wait()
        decoded = decode(contents.facts["state"], state)
        install = None
        if optimizer is not None and plan is not None:
            install = functools.partial(optimizer.load_state_dict, plan.state_dict())
        rngs = contents.facts["rng"] if load_rng else []
        exact, setter = len(rngs) == peers.world, None
        if rngs:
            setter = rng_setter(rngs[peers.rank if exact else 0])
            if not exact:
                setter = functools.partial(derive_rng, rngs, peers.rank, peers.world)
        return cls(reader.path, contents, found, values, install, decoded, missing, unused, setter, exact)

    def apply(self) -> Loaded:
        if self.install_optimizer is not None:
            self.install_optimizer()
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
        if self.set_rng is not None:
            self.set_rng()
        return Loaded(self.path, self.state, tuple(self.missing), tuple(self.unused), self.exact_rng)
