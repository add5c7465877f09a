"""``dscompile.initialize``: DeepSpeed's entry, with its arguments and its four results."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dscompile.distribution import distribute
from dscompile.engine.data import Loader, create_loader
from dscompile.engine.ds_config import EngineConfig, report
from dscompile.engine.engine import Engine, Parts
from dscompile.engine.optimizers import check_optimizer, create_optimizer
from dscompile.engine.processes import default_device, init_distributed
from dscompile.engine.schedules import check_schedule, create_schedule
from dscompile.engine.swap import Replaced
from dscompile.errors import ConfigError
from dscompile.world import DATA, World, default_mesh

_LOG = logging.getLogger(__name__)

OptimizerLike = torch.optim.Optimizer | Callable[[list[Any]], torch.optim.Optimizer]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: OptimizerLike | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh_param: tuple[int, ...] | None = None,
    config_params: Mapping[str, Any] | str | Path | None = None,
) -> tuple[Engine, torch.optim.Optimizer | None, Loader | None, Any]:
    """Make an engine that trains a model as a DeepSpeed configuration says.

    Starts ``torch.distributed`` if it does not run (by a launcher's variables, else as the only rank), moves the model
    to this process's device, shards it in place and compiles it.

    Args:
        args: ``args.deepspeed_config`` is used where ``config`` is not given (:func:`add_config_arguments`).
        model: the model; changed in place.
        optimizer: one of the model's parameters, which has taken no step, or a function from parameters to one. The
            configuration's ``optimizer`` is not made then.
        model_parameters: parameters, or groups of them, for the optimizer; by default those that require gradients.
        training_data: a dataset, of which a loader of this rank's micro-batches is made.
        lr_scheduler: of the optimizer, or a function from the optimizer to one; else the configuration's ``scheduler``.
        distributed_port: port of rank 0's store, if the launcher names none.
        mpu: refused unless it has no model parallelism.
        dist_init_required: False: ``torch.distributed`` must run already.
        collate_fn: makes a batch of a list of samples.
        config: a mapping, a JSON file's path or JSON text.
        mesh_param: sizes of the data and the sequence axis; the second must be 1.
        config_params: older name of ``config``.

    Returns:
        (engine, optimizer, loader, scheduler); what was not asked for is None.

    Raises:
        ConfigError: names the key or argument, the reason and the remedy; the same on every rank.
        ShardingError: the optimizer has taken steps before.
        UnsupportedError: a model or optimizer that cannot be distributed.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"initialize(model=...): expected an nn.Module, got {type(model).__name__}.")
    source = _source(args, config, config_params)
    device = default_device()
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    world, rank = dist.get_world_size(), dist.get_rank()
    _check_axes(mpu, mesh_param, world)
    settings = _agreed(source, world, rank, device)
    if settings.logging.level is not None:
        logging.getLogger("dscompile").setLevel(settings.logging.level.upper())
    if rank == 0:
        report(settings)
        if settings.logging.state:
            _LOG.info("configuration: %s", json.dumps(dict(settings.given), indent=1, default=str))
    _check_names(settings, optimizer, lr_scheduler)
    if device.type != "cpu":
        model.to(device)
    given = list(model_parameters) if model_parameters is not None else None
    replaced = Replaced(model)
    mesh = default_mesh(device.type)
    World.of(mesh)
    distribute(model, mesh, settings.compiler, axis=DATA)
    made = _optimizer(settings, optimizer, given, model, replaced)
    scheduler = _scheduler(settings, lr_scheduler, made)
    loader = None
    if training_data is not None:
        loader = create_loader(
            training_data,
            micro_batch_size=settings.batch.micro,
            data_rank=rank,
            data_world=world,
            collate_fn=collate_fn,
            drop_last=settings.drop_last,
            pin_memory=device.type == "cuda",
        )
    engine = Engine(Parts(model, settings, made, scheduler, loader, device, rank, world))
    return engine, made, loader, scheduler


def _agreed(source: Any, world: int, rank: int, device: torch.device) -> EngineConfig:
    """The configuration, if every rank could read it and has the same: else all would wait for one for ever.

    Raises:
        ConfigError: on every rank.
    """
    settings: EngineConfig | None = None
    problem: str | None = None
    try:
        settings = EngineConfig.load(source, world=world, device=device.type)
    except ConfigError as error:
        problem = str(error)
    if world > 1 and dist.get_backend() != "fake":
        content = json.dumps(settings.given, sort_keys=True, default=str) if settings is not None else ""
        mine = problem, hashlib.sha256(content.encode()).hexdigest()
        found: list[Any] = [None] * world
        dist.all_gather_object(found, mine)
        if problem is None and (other := next((r for r, (text, _) in enumerate(found) if text), None)) is not None:
            problem = f"rank {other}: {found[other][0]}"
        elif problem is None and (other := next((r for r, f in enumerate(found) if f != found[0]), None)) is not None:
            problem = f"the configuration differs between rank 0 and rank {other}; give every rank the same."
    if settings is None or problem is not None:
        raise ConfigError(problem or "")
    return settings


def _source(args: Any, config: Any, config_params: Any) -> Any:
    """The one configuration among the arguments."""
    if config_params is not None:
        if config is not None:
            raise ConfigError("initialize() got config= and its older name config_params=; leave one out.")
        config = config_params
    named = getattr(args, "deepspeed_config", None)
    if config is not None and named is not None:
        raise ConfigError(f"initialize() got config= and args.deepspeed_config = {named!r}; leave one of them out.")
    config = named if config is None else config
    if config is None:
        raise ConfigError("initialize() needs config= (a mapping, a file or JSON text), or args.deepspeed_config.")
    return config


def _check_axes(mpu: Any, mesh_param: tuple[int, ...] | None, world: int) -> None:
    if mpu is not None:
        data = mpu.get_data_parallel_world_size() if hasattr(mpu, "get_data_parallel_world_size") else None
        if data != world:
            raise ConfigError(
                f"initialize(mpu=...): its data-parallel size is {data}, but there are {world} ranks: there is no "
                "model parallelism yet. Leave mpu out."
            )
    if mesh_param is not None and (len(mesh_param) != 2 or tuple(mesh_param) != (world, 1)):
        raise ConfigError(
            f"initialize(mesh_param={mesh_param!r}): expected ({world}, 1), the ranks and no sequence parallelism, "
            "which does not exist yet."
        )


def _check_names(settings: EngineConfig, optimizer: OptimizerLike | None, scheduler: Any) -> None:
    """Raise for an optimizer or schedule that cannot be made while the model is still as it was."""
    if optimizer is None and settings.optimizer is not None:
        check_optimizer(settings.optimizer.type, settings.optimizer.params)
    if scheduler is None and settings.scheduler is not None:
        check_schedule(settings.scheduler.type, settings.scheduler.params)
    if optimizer is None and settings.optimizer is None and (scheduler is not None or settings.scheduler is not None):
        raise ConfigError("a schedule without an optimizer: pass one, or name one in the configuration.")


def _optimizer(
    settings: EngineConfig,
    given: OptimizerLike | None,
    parameters: list[Any] | None,
    model: nn.Module,
    replaced: Replaced,
) -> torch.optim.Optimizer | None:
    if isinstance(given, torch.optim.Optimizer):
        replaced.in_optimizer(given)
        return given
    if given is None and settings.optimizer is None:
        return None
    if parameters is None:
        chosen: list[Any] = [p for p in model.parameters() if p.requires_grad]
    else:
        chosen = replaced.groups(parameters, "model_parameters")
    if given is not None:
        made = given(chosen)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"initialize(optimizer=...): the function returned {type(made).__name__}, no optimizer.")
        return made
    assert settings.optimizer is not None
    return create_optimizer(settings.optimizer.type, chosen, settings.optimizer.params)


def _scheduler(settings: EngineConfig, given: Any, optimizer: torch.optim.Optimizer | None) -> Any:
    if given is None and settings.scheduler is None:
        return None
    assert optimizer is not None  # _check_names
    if given is not None:
        return given(optimizer) if not hasattr(given, "step") else given
    assert settings.scheduler is not None
    return create_schedule(settings.scheduler.type, optimizer, settings.scheduler.params)
