"""The process group and the device of an engine: by a launcher's variables, or this process alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dscompile.errors import ConfigError

_LOG = logging.getLogger(__name__)
_VARIABLES = ("RANK", "WORLD_SIZE")


def default_device() -> torch.device:
    """The device of this process: its local rank's GPU, or the CPU (also with DeepSpeed's ``DS_ACCELERATOR=cpu``)."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def local_rank() -> int:
    """The number of this process on its machine, which the launcher says; 0 without one."""
    return _integer("LOCAL_RANK", 0)


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Mapping[str, object] | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start ``torch.distributed``, unless it runs. Without a launcher this process is the only rank.

    Args:
        dist_backend: by default ``nccl`` on GPUs and ``gloo`` on the CPU.
        auto_mpi_discovery: has no effect: under an MPI launcher, start the processes by ``torchrun`` instead.
        distributed_port: port of rank 0's store, if the launcher names none.
        verbose: log what was started.
        timeout: of collectives; by default PyTorch's.
        init_method: a rendezvous of PyTorch's, with ``rank`` and ``world_size``.
        dist_init_required: False: it must run already.
        config: not read; DeepSpeed's signature has it.
        rank: this process, with ``init_method``.
        world_size: all of them, with ``init_method``.

    Raises:
        ConfigError: it must run but does not, an incomplete launcher environment, or an MPI launcher.
    """
    if dist.is_initialized():
        if verbose:
            _LOG.debug("torch.distributed runs already: %d ranks", dist.get_world_size())
        return
    if dist_init_required is False:
        raise ConfigError(
            "dist_init_required is False, but torch.distributed does not run; call init_process_group() first, or "
            "leave it out."
        )
    backend = dist_backend or ("nccl" if default_device().type == "cuda" else "gloo")
    waiting: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if init_method is not None or rank >= 0 or world_size >= 0:
        if rank < 0 or world_size < 0:
            raise ConfigError("init_distributed: give rank= and world_size= together (init_method= needs both).")
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, **waiting)
    elif any(name in os.environ for name in _VARIABLES):
        absent = next((name for name in _VARIABLES if name not in os.environ), None)
        if absent is not None:
            raise ConfigError(f"the environment has {_other(absent)} but not {absent}; start the script by torchrun.")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
        dist.init_process_group(backend, rank=_integer("RANK", 0), world_size=_integer("WORLD_SIZE", 1), **waiting)
    elif _integer("OMPI_COMM_WORLD_SIZE", 1) > 1 or _integer("PMI_SIZE", 1) > 1:
        raise ConfigError("an MPI launcher started several processes, which cannot find each other; use torchrun.")
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **waiting)
    if verbose:
        _LOG.info("torch.distributed: rank %d of %d, %s", dist.get_rank(), dist.get_world_size(), backend)


def _other(name: str) -> str:
    return next(other for other in _VARIABLES if other != name)


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdigit():
        raise ConfigError(f"environment variable {name} = {text!r} is no number; start the script by torchrun.")
    return int(text)
