"""What the engine does, as a DeepSpeed configuration says.

Every key of DeepSpeed's page has a row in :data:`dscompile.engine.key_check.KEYS`. One that is acted on shows in
:class:`EngineConfig`; one that changes nothing is recorded in :attr:`EngineConfig.accepted` with the reason; anything
else is an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from dscompile.config import Config
from dscompile.engine.batch import Batch, batch_sizes
from dscompile.engine.key_check import KEYS, OURS, Accepted, check, flatten, read
from dscompile.engine.keys import State
from dscompile.errors import ConfigError
from dscompile.sparse_section import from_config

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """An optimizer or a schedule: its name and its arguments."""

    type: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Logging:
    """What is logged, and how often."""

    every: int | None
    breakdown: bool
    memory: bool
    throughput: bool
    state: bool
    level: str | None


@dataclass(frozen=True)
class EngineConfig:
    """What the engine does.

    Attributes:
        batch: samples of a step, of a forward pass on one rank, and forward passes per step.
        optimizer: to be made by the engine, or None.
        scheduler: to be made by the engine, or None.
        compiler: options of ``distribute`` and of the backend: ZeRO, precision, ``dscompile``'s own.
        autocast: dtype of ``torch.autocast`` around forward, or None.
        loss_scaling: arguments of :class:`dscompile.precision.LossScaler`, or None.
        skip_overflow: whether a step whose gradients are not finite is skipped.
        gradient_clipping: largest global norm; 0 is no clipping.
        gradient_sum: gradients of the sum over ranks, not of the mean.
        all_used: whether a trainable parameter without a gradient is an error.
        drop_last: whether the loader drops an incomplete batch.
        gather_on_save: whether ``save_16bit_model`` may gather a sharded model.
        tag_validation: what to do when ranks save under different tags.
        freeze_gc: whether automatic garbage collection is off while the engine lives.
        logging: progress lines.
        monitors: sections of the writers that are on.
        comms: the section of the communication log if it is on.
        accepted: what was given and changes nothing, with the reasons.
        given: the configuration as it was read.
    """

    batch: Batch
    optimizer: Named | None
    scheduler: Named | None
    compiler: Config
    autocast: str | None
    loss_scaling: Mapping[str, Any] | None
    skip_overflow: bool
    gradient_clipping: float
    gradient_sum: bool
    all_used: bool
    drop_last: bool
    gather_on_save: bool
    tag_validation: Literal["ignore", "warn", "fail"]
    freeze_gc: bool
    logging: Logging
    monitors: Mapping[str, Mapping[str, Any]]
    comms: Mapping[str, Any] | None
    accepted: tuple[Accepted, ...]
    given: Mapping[str, Any]

    @classmethod
    def load(
        cls, source: EngineConfig | Mapping[str, Any] | str | Path, *, world: int = 1, device: str = "cpu"
    ) -> EngineConfig:
        """Read a configuration.

        Args:
            source: a mapping, the path of a JSON file, or JSON text.
            world: data-parallel ranks.
            device: type of the device that training runs on.

        Raises:
            ConfigError: names the key, the reason and the remedy.
        """
        if isinstance(source, EngineConfig):
            return source
        where, given = read(source)
        return build(where, given, world=world, device=device)


# -- building ----------------------------------------------------------------------------------------------------------

_ZERO_OPTIONS: Final = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "overlap_comm",
)
_SCALE_OPTIONS: Final = (
    "loss_scale",
    "initial_scale_power",
    "loss_scale_window",
    "hysteresis",
    "consecutive_hysteresis",
    "min_loss_scale",
)


def build(where: str, given: Mapping[str, Any], *, world: int, device: str) -> EngineConfig:
    """The engine's configuration of a DeepSpeed one. Raises :class:`ConfigError` as :meth:`EngineConfig.load` does."""
    values, accepted = check(where, given, device)
    half = [name for name in ("fp16", "bf16", "torch_autocast") if values[f"{name}.enabled"]]
    if len(half) > 1:
        raise ConfigError(f"{where}: {half[0]}.enabled and {half[1]}.enabled exclude each other; turn one of them off.")
    if values["data_parallel_size"] not in (None, world):
        raise ConfigError(
            f"{where}: data_parallel_size = {values['data_parallel_size']}, but there are {world} ranks and no other "
            "parallelism; leave the key out."
        )
    autocast = values["torch_autocast.dtype"] if values["torch_autocast.enabled"] else None
    if autocast == "fp32":
        raise ConfigError(f"{where}: torch_autocast.dtype = 'fp32': expected bf16 or fp16.")
    scaled = values["fp16.enabled"] or autocast == "fp16"
    monitors = {
        name: _section(values, name) for name in ("tensorboard", "csv_monitor", "wandb") if values[f"{name}.enabled"]
    }
    return EngineConfig(
        batch=batch_sizes(
            where,
            values["train_batch_size"],
            values["train_micro_batch_size_per_gpu"],
            values["gradient_accumulation_steps"],
            world,
        ),
        optimizer=_named(where, "optimizer", values),
        scheduler=_named(where, "scheduler", values),
        compiler=_compiler(where, given, values),
        autocast=autocast,
        loss_scaling={name: values[f"fp16.{name}"] for name in _SCALE_OPTIONS} if scaled else None,
        skip_overflow=scaled or (values["bf16.enabled"] and values["bf16.check_grad_overflow"]),
        gradient_clipping=float(values["gradient_clipping"]),
        gradient_sum=values["gradient_allreduce_op"] == "sum",
        all_used=not values["zero_optimization.ignore_unused_parameters"],
        drop_last=values["dataloader_drop_last"],
        gather_on_save=values["zero_optimization.stage3_gather_16bit_weights_on_model_save"]
        or values["zero_optimization.stage3_gather_fp16_weights_on_model_save"],
        tag_validation=values["checkpoint.tag_validation"],
        freeze_gc=values["disable_python_gc"],
        logging=Logging(
            every=values["steps_per_print"],
            breakdown=values["wall_clock_breakdown"],
            memory=values["memory_breakdown"],
            throughput=values["timers.throughput.enabled"],
            state=values["dump_state"],
            level=values["log_level"],
        ),
        monitors=monitors,
        comms=_section(values, "comms_logger") if values["comms_logger.enabled"] else None,
        accepted=accepted,
        given=dict(given),
    )


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = {path.rpartition(".")[2]: path for path, key in KEYS.items() if key.section == name}
    return {option: values[path] for option, path in section.items() if KEYS[path].state is State.ACTED}


def _named(where: str, section: str, values: Mapping[str, Any]) -> Named | None:
    kind, params = values[f"{section}.type"], values[f"{section}.params"]
    if kind is None and params is not None:
        raise ConfigError(f"{where}: {section}.params without {section}.type; name the {section}.")
    automatic = next((name for name, value in (params or {}).items() if value == "auto"), None)
    if automatic is not None:
        raise ConfigError(
            f"{where}: {section}.params.{automatic} = 'auto': Hugging Face's Trainer fills it in from its own "
            "arguments; write the value."
        )
    return None if kind is None else Named(kind, dict(params or {}))


def _compiler(where: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """The compiler's options: those that DeepSpeed's keys ask for, and the section ``dscompile``."""
    own = given.get(OURS)
    if not isinstance(own, (Mapping, type(None))):
        raise ConfigError(f"{where}: {OURS}: expected an object of options, got {own!r}.")
    own = dict(own or {})
    explicit = flatten(where, given)
    zero: dict[str, Any] = {"stage": values["zero_optimization.stage"]}
    for name in _ZERO_OPTIONS:
        path = f"zero_optimization.{name}"
        if path in explicit and values[path] is not None:
            zero[name] = values[path]
    precision: dict[str, Any] = {}
    for name in ("fp16", "bf16"):
        if values[f"{name}.enabled"]:
            precision["param_dtype"] = name
    for option, path in (
        ("reduce_dtype", "communication_data_type"),
        ("grad_dtype", "data_types.grad_accum_dtype"),
        ("buffer_dtype", "data_types.buffer_dtype"),
    ):
        if values[path] is not None:
            precision[option] = values[path]
    options: dict[str, Any] = {"summary": False}
    if given.get("sparse_attention") is not None:
        section = {p.rpartition(".")[2]: values[p] for p in explicit if p.startswith("sparse_attention.")}
        options["sparse_attention"] = {name: value for name, value in section.items() if value is not None}
        try:
            from_config(options["sparse_attention"], num_heads=1)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
    for name, theirs in (("zero", zero), ("precision", precision)):
        mine = own.pop(name, {})
        if not isinstance(mine, Mapping):
            raise ConfigError(f"{where}: {OURS}.{name}: expected an object of options, got {mine!r}.")
        both = next((option for option in mine if option in theirs and mine[option] != theirs[option]), None)
        if both is not None:
            raise ConfigError(
                f"{where}: {OURS}.{name}.{both} = {mine[both]!r} differs from what DeepSpeed's own keys ask for "
                f"({theirs[both]!r}); give one of them."
            )
        if theirs or mine:
            options[name] = {**theirs, **mine}
    try:
        return Config.load({**options, **own})
    except ConfigError as error:
        raise ConfigError(f"{where}: section {OURS!r}: {str(error).removeprefix('options: ')}") from None


def report(config: EngineConfig) -> None:
    """Log what was accepted without effect, one line each: nothing is ignored in silence."""
    for note in config.accepted:
        _LOG.info("config: %s = %s changes nothing: %s", note.key, json.dumps(note.value, default=str), note.why)
    if "gradient_clipping" not in config.given:
        _LOG.info("config: gradient_clipping is not given: %g, as in DeepSpeed since 2026-06", config.gradient_clipping)
