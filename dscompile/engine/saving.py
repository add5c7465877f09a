"""What of an engine goes into a checkpoint, and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dscompile.engine.checkpoint import load_checkpoint, save_checkpoint
from dscompile.engine.checkpoint_directory import LATEST
from dscompile.errors import CheckpointError

if TYPE_CHECKING:
    from dscompile.engine.engine import Engine

_LOG = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Position:
    """How far a run is: the counts of :class:`dscompile.engine.engine.Engine`."""

    global_steps: int
    skipped_steps: int
    micro_steps: int


def save(
    engine: Engine, directory: str | Path, tag: str, client_state: Mapping[str, Any], *, asynchronous: bool
) -> None:
    """Save an engine under ``directory/tag``. Raises :class:`CheckpointError`."""
    _check_tags(engine, tag)
    state: dict[str, Any] = {"position": asdict(engine.position()), "client_state": dict(client_state)}
    for name, part in _parts(engine).items():
        if part is not None:
            state[name] = part.state_dict()
    save_checkpoint(
        directory, tag, model=engine.module, optimizer=engine.optimizer, state=state, asynchronous=asynchronous
    )


def _parts(engine: Engine) -> dict[str, Any]:
    return {"lr_scheduler": engine.lr_scheduler, "scaler": engine.scaler, "loader": engine.training_dataloader}


def _check_tags(engine: Engine, tag: str) -> None:
    """Compare the ranks' tags as ``checkpoint.tag_validation`` says."""
    mode = engine.settings.tag_validation
    if mode == "ignore" or engine.world_size == 1:
        return
    tags: list[str] = [""] * engine.world_size
    dist.all_gather_object(tags, tag)
    other = next((rank for rank, theirs in enumerate(tags) if theirs != tags[0]), None)
    if other is None:
        return
    text = f"rank 0 saves under the tag {tags[0]!r} and rank {other} under {tags[other]!r}"
    if mode == "fail":
        raise CheckpointError(f"{text}; give the same on every rank (checkpoint.tag_validation is 'fail').")
    _LOG.warning("%s; rank 0's counts", text)


def load(
    engine: Engine,
    directory: str | Path,
    tag: str | None,
    *,
    strict: bool,
    optimizer: bool,
    scheduler: bool,
    position: bool,
) -> tuple[str | None, dict[str, Any]]:
    """Load into an engine; returns the path and the client state. Raises :class:`CheckpointError`."""
    if tag is None and not _has_latest(Path(directory)):
        _LOG.warning("%s holds no checkpoint: nothing was loaded, training starts from the beginning", directory)
        return None, {}
    loaded = load_checkpoint(
        directory,
        tag,
        model=engine.module,
        optimizer=engine.optimizer if optimizer else None,
        strict=strict,
        load_optimizer=optimizer,
        load_rng=position,
    )
    state = loaded.state
    wanted = {"lr_scheduler": scheduler, "scaler": position, "loader": position}
    for name, part in _parts(engine).items():
        if part is not None and wanted[name]:
            if name in state:
                part.load_state_dict(state[name])
            else:
                _LOG.warning("%s has no %s: the engine's keeps its state", loaded.path, name)
    if position:
        engine.move_to(Position(**state["position"]))
    return str(loaded.path), dict(state.get("client_state", {}))


def _has_latest(directory: Path) -> bool:
    """Rank 0's answer: files may appear while ranks look."""
    box = [(directory / LATEST).exists()]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def save_half(engine: Engine, path: Path) -> bool:
    """Gather the model and write it to one file on rank 0, in the dtype it computes in."""
    if engine.zero_optimization_partition_weights() and not engine.settings.gather_on_save:
        _LOG.warning(
            "save_16bit_model: not saved: zero_optimization.stage3_gather_16bit_weights_on_model_save is false"
        )
        return False
    dtype = _DTYPES[engine.settings.compiler.precision.param_dtype]
    whole: dict[str, torch.Tensor] = {}
    for name, value in engine.module.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if engine.global_rank == 0:
            whole[name] = (full.to(dtype) if full.is_floating_point() else full).cpu()
    error: str | None = None
    if engine.global_rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            torch.save(whole, temporary)
            temporary.replace(path)
        except OSError as failure:
            error = f"{path}: cannot be written: {failure.strerror or failure}."
    box = [error]
    if engine.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise CheckpointError(box[0])
    return True
