"""``distribute``: turn a model's parameters into DTensor shards, in place.

After it, ``model.parameters()`` yields DTensors for optimizers, clipping and checkpoints, while the model's own code
reads full values. What users must do differently is what FSDP2 asks for too: make the optimizer afterwards, and run
every collective step (forward, eager reads, printing a parameter) on every rank.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.parameter import is_lazy

from dscompile.accumulate import watch_optimizers
from dscompile.config import Config
from dscompile.deferred import build_deferred, is_deferred, materialise
from dscompile.dtypes import cast_inputs, convert_buffers, parameter_dtypes
from dscompile.errors import ConfigError, ShardingError, UnsupportedError
from dscompile.ops import REPLICATED
from dscompile.placement import Mark, ShardSpec, choose_columns, choose_layout, mark_of, set_mark
from dscompile.shard_layout import ShardLayout
from dscompile.sharded import adopt, adopt_containers, slots_in
from dscompile.slots import window
from dscompile.torch_compat import has_hooks, process_group, set_local
from dscompile.world import DATA, World, as_grid, can_be_grid, columns_of, default_mesh

_LOG = logging.getLogger(__name__)


def distribute(
    model: nn.Module | None = None,
    mesh: DeviceMesh | None = None,
    config: Config | dict[str, Any] | str | Path | None = None,
    *,
    model_fn: Callable[[], nn.Module] | None = None,
    axis: str = DATA,
    sync_init: bool = True,
) -> nn.Module:
    """Shard a model's parameters over the ranks of a mesh axis, as the ZeRO stage in ``config`` says.

    Call it on every rank, before making the optimizer. Called again, it shards only parameters added since (adapters),
    on the same mesh and configuration.

    Args:
        model: the model; changed in place. Its buffers stay whole on every rank. Floating-point parameters become fp32
            masters if ``config`` computes in another type.
        mesh: a device mesh with a dimension named ``axis``; by default one axis over all ranks.
        config: options (``zero.stage``, ...); remembered, so that ``torch.compile`` needs none.
        model_fn: builds the model instead of ``model``, with deferred initialisation.
        axis: the mesh dimension to shard over.
        sync_init: take parameters and buffers from the axis' first rank. Off, every rank must hold equal values.

    Returns:
        the model.

    Raises:
        ConfigError: no process group, a mesh without the axis, or options that differ from the first call's.
        ShardingError: gradients or hooks that would be lost, or a module that keeps parameters elsewhere.
        UnsupportedError: lazy parameters, parameters that already are tensor subclasses, ``max_norm`` embeddings.
    """
    if (model is None) == (model_fn is None):
        raise ConfigError("distribute() takes either a model or model_fn=.")
    if model is None:
        model, reason = build_deferred(cast(Callable[[], nn.Module], model_fn))
        if reason is not None:
            _LOG.warning("the model was built for real on every rank, then sharded: %s", reason)
    known = slots_in(model)
    settings = _settings(config, known[0].config if known else None)
    if settings.zero.reduce_micro_batches and settings.zero.stage < 2:
        raise ConfigError(
            f"zero.reduce_micro_batches needs stage 2 or 3, not {settings.zero.stage}: the others keep whole gradients."
        )
    if known and (mesh is None or can_be_grid(mesh)):
        mesh = known[0].param.device_mesh  # a grid, if the first call made one
    elif mesh is None:
        mesh = default_mesh(_device(model))
    world = World.of(mesh)
    group, size = world.group(axis), world.size(axis)
    columns = columns_of(mesh)
    if not known and can_be_grid(mesh):
        shapes = [tuple(p.shape) for p in model.parameters() if not is_lazy(p)]  # which the plan refuses
        columns = choose_columns(shapes, size, settings.zero.stage)
    plan = _plan(model, settings, size, group, columns)
    _check(model, plan)
    _agree(plan, group)
    if columns > columns_of(mesh):
        mesh = as_grid(mesh, axis, columns)
    placer = _Placer(mesh, axis, group, settings, sync_init)
    _place(model, plan, placer, buffers=not known)
    for planned in plan:
        for module, name in planned.owners:
            adopt(module, name, cast(DTensor, planned.sharded), planned.spec, settings)
    adopt_containers(model)
    if not known:
        convert_buffers(model, settings.precision)
        cast_inputs(model, settings.precision)
    watch_optimizers()
    return model


@dataclass
class _Planned:
    """A parameter that will be sharded, and the modules that hold it."""

    param: nn.Parameter
    spec: ShardSpec
    owners: list[tuple[nn.Module, str]]
    sharded: DTensor | None = None


def _settings(config: Config | dict[str, Any] | str | Path | None, known: Config | None) -> Config:
    if known is None:
        return Config.load(config)
    if config is not None and Config.load(config) != known:
        raise ConfigError(
            "distribute() was called on this model before, with other options; leave config out, or build the model "
            "again."
        )
    return known


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _plan(model: nn.Module, config: Config, world: int, group: str, columns: int) -> list[_Planned]:
    """The parameters not sharded yet, each once, in ``named_parameters()`` order."""
    stage = config.zero.stage
    plan: dict[int, _Planned] = {}
    for fqn, param in model.named_parameters():
        if mark_of(param) is None:
            if is_lazy(param):
                raise UnsupportedError(f"parameter {fqn} has no shape yet; run one forward pass before distribute().")
            shape = tuple(param.shape)
            real = param.is_floating_point()
            layout = choose_layout(shape, world, stage, columns) if real else ShardLayout(shape, REPLICATED, world)
            dtypes = parameter_dtypes(config.precision) if real else (None, None, None)
            spec = ShardSpec(fqn, shape, layout.dim, world, group, stage, *dtypes, layout.tile)
            plan[id(param)] = _Planned(param, spec, [])
    for module in model.modules():
        for name, held in module._parameters.items():  # named_parameters() leaves out the other names of a tied one
            if held is not None and id(held) in plan:
                plan[id(held)].owners.append((module, name))
    return list(plan.values())


def _place(model: nn.Module, plan: list[_Planned], placer: _Placer, *, buffers: bool) -> None:
    """Make each planned parameter's DTensor, one full value at a time, and make buffers equal."""
    if is_deferred(model):
        by_name = {planned.spec.fqn: planned for planned in plan}

        def place(fqn: str, full: Tensor, is_parameter: bool) -> Tensor:
            if not is_parameter:
                return placer.broadcast(full)
            planned = by_name[fqn]
            planned.sharded = placer.parameter(full, planned.spec)
            return planned.sharded

        report = materialise(model, place)
        if report.fallbacks:
            reasons = "; ".join(report.fallbacks)
            _LOG.warning("%d tensor(s) were built for real, not deferred: %s", len(report.fallbacks), reasons)
        return
    for planned in plan:
        planned.sharded = placer.parameter(planned.param, planned.spec)
    if buffers:
        for buffer in model.buffers():
            placer.broadcast(buffer)


@dataclass(frozen=True)
class _Placer:
    """Makes shards on this rank."""

    mesh: DeviceMesh
    axis: str
    group: str
    config: Config
    sync: bool

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The group's first rank's value, in place."""
        group = process_group(self.group)
        if self.sync and group.size() > 1 and tensor.numel():
            value = tensor.detach().contiguous()
            dist.broadcast(value.view(torch.uint8) if value.dtype is torch.bool else value, group=group, group_src=0)
            if value.data_ptr() != tensor.data_ptr():
                with torch.no_grad():
                    tensor.copy_(value)
        return tensor

    def parameter(self, full: Tensor, spec: ShardSpec) -> DTensor:
        """The DTensor parameter of a full value, which may be freed afterwards."""
        self.broadcast(full)
        rank = process_group(self.group).rank()
        value = full.detach()
        if spec.dtype is not None and value.dtype.itemsize < torch.float32.itemsize:
            value = value.float()  # a 16-bit model gets fp32 masters
        local = spec.shard_of(value, rank).clone(memory_format=torch.contiguous_format)
        placements: list[Placement] = [Replicate()] * self.mesh.ndim
        if spec.tile is not None:
            placements = [Shard(spec.dim), Shard(spec.tile.dim)]
        elif spec.dim != REPLICATED:
            placements[cast(tuple[str, ...], self.mesh.mesh_dim_names).index(self.axis)] = Shard(spec.dim)
        stride = torch.empty(value.shape, device="meta").stride()
        wrapped = DTensor.from_local(local, self.mesh, placements, run_check=False, shape=value.shape, stride=stride)
        param = nn.Parameter(wrapped, requires_grad=full.requires_grad)
        param.__dict__.update(full.__dict__)  # what libraries note on parameters
        resident = None
        if spec.stage in (1, 2) and spec.dim != REPLICATED and spec.dtype is None:
            resident = value.clone(memory_format=torch.contiguous_format)
            set_local(cast(DTensor, param), window(resident, spec, rank))
        set_mark(param, Mark(spec, self.config, resident))
        return cast(DTensor, param)


def _agree(plan: list[_Planned], group: str) -> None:
    """Compare what every rank is about to shard: ranks with different models would wait for each other for ever.

    Raises:
        ShardingError: on every rank, naming the first parameter that differs and the two ranks.
    """
    pg = process_group(group)
    if pg.size() == 1 or dist.get_backend(pg) == "fake":
        return
    mine = [f"{planned.spec.fqn} {tuple(planned.spec.shape)} {planned.param.dtype}" for planned in plan]
    found: list[list[str]] = [[] for _ in range(pg.size())]
    dist.all_gather_object(found, mine, group=pg)
    for rank, theirs in enumerate(found):
        pairs = itertools.zip_longest(found[0], theirs, fillvalue="no further parameter")
        difference = next(((a, b) for a, b in pairs if a != b), None)
        if difference is not None:
            raise ShardingError(
                f"distribute() got different models: rank 0 has {difference[0]!r} where rank {rank} has "
                f"{difference[1]!r}. Build the same model on every rank."
            )


# -- what cannot be distributed --------------------------------------------------------------------------------------


def _check(model: nn.Module, plan: list[_Planned]) -> None:
    for planned in plan:
        _check_parameter(planned)
    swapped = {id(planned.param): planned.spec.fqn for planned in plan}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise UnsupportedError(
                f"{path or type(module).__name__}: max_norm rewrites the weight during forward, which a sharded "
                "parameter cannot do; renormalise inside dscompile.gathered(module, write=True) after each step."
            )
        for key, fqn in _kept_elsewhere(module, swapped):
            raise UnsupportedError(
                f"{path or type(module).__name__}.{key} keeps a second reference to parameter {fqn}, which would stay "
                "whole and untrained; look the parameter up where it is used instead."
            )


def _check_parameter(planned: _Planned) -> None:
    param, fqn = planned.param, planned.spec.fqn
    if isinstance(param, DTensor):
        raise UnsupportedError(
            f"parameter {fqn} is a DTensor already ({param.placements}); distribute() takes plain ones."
        )
    if param.grad is not None:
        raise ShardingError(f"parameter {fqn} has a gradient, which would be lost; call model.zero_grad() first.")
    if has_hooks(param):
        raise ShardingError(
            f"parameter {fqn} has gradient hooks, which would be lost; register them after distribute()."
        )


def _kept_elsewhere(module: nn.Module, swapped: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Attributes of a module, other than its registered parameters, that hold a parameter about to be replaced."""
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules") or key.startswith("_flat_weight"):
            continue  # RNN lists have their rule in dscompile.sharded
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in values:
            if id(item) in swapped:
                yield key, swapped[id(item)]
