"""``dscompile.checkpointing``: DeepSpeed's activation checkpointing, by ``torch.utils.checkpoint``.

The recomputation becomes part of the compiled graph, with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from dscompile.engine.key_check import check, read
from dscompile.errors import ConfigError

__all__ = ["checkpoint", "configure"]

_SECTION = "activation_checkpointing"
_OPTIONS = {
    "partition_activations": "partition_activations",
    "contiguous_checkpointing": "contiguous_memory_optimization",
    "num_checkpoints": "number_checkpoints",
    "checkpoint_in_cpu": "cpu_checkpointing",
    "synchronize": "synchronize_checkpoint_boundary",
    "profile": "profile",
}
"""Arguments of :func:`configure` and the keys of the configuration that mean the same."""


def configure(
    mpu_: Any,
    deepspeed_config: Mapping[str, Any] | str | Path | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Check the options of activation checkpointing; there is nothing to keep, since none changes what is computed.

    Args:
        mpu_: not read: there is no model parallelism to divide activations over.
        deepspeed_config: its section ``activation_checkpointing`` is checked.
        partition_activations: refused.
        contiguous_checkpointing: refused.
        num_checkpoints: has no effect.
        checkpoint_in_cpu: refused, except when training runs on the CPU.
        synchronize: has no effect.
        profile: refused.

    Raises:
        ConfigError: names the option and the reason.
    """
    from dscompile.engine.processes import default_device

    section: dict[str, Any] = {}
    if deepspeed_config is not None:
        given = read(deepspeed_config)[1].get(_SECTION) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"config: {_SECTION}: expected an object of options, got {given!r}.")
        section |= given
    arguments = (
        partition_activations,
        contiguous_checkpointing,
        num_checkpoints,
        checkpoint_in_cpu,
        synchronize,
        profile,
    )
    section |= {key: value for key, value in zip(_OPTIONS.values(), arguments, strict=True) if value is not None}
    check("checkpointing.configure()", {_SECTION: section}, default_device().type)


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, whose intermediate values are computed again in backward in place of being kept."""
    return torch_checkpoint(function, *args, use_reentrant=False)
