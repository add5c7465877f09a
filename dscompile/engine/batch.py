"""The three batch sizes, any two of which give the third."""

from __future__ import annotations

from dataclasses import dataclass

from dscompile.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Samples per optimizer step over all ranks, per forward pass and rank, and forward passes per step."""

    train: int
    micro: int
    accumulation: int


def batch_sizes(where: str, train: int | None, micro: int | None, accumulation: int | None, world: int) -> Batch:
    """Complete ``train = micro * accumulation * world``.

    With only ``train`` or only ``micro``, there is no accumulation, as in DeepSpeed.

    Raises:
        ConfigError: neither ``train`` nor ``micro``, a product that differs, or a quotient that is no integer.
    """
    if train is None and micro is None:
        raise ConfigError(
            f"{where}: give train_batch_size or train_micro_batch_size_per_gpu; the others follow from "
            "train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks."
        )
    if train is None:
        assert micro is not None
        steps = accumulation or 1
        return Batch(micro * steps * world, micro, steps)
    if micro is None:
        steps = accumulation or 1
        micro = _divide(where, train, "gradient_accumulation_steps", steps, world)
        return Batch(train, micro, steps)
    if accumulation is None:
        accumulation = _divide(where, train, "train_micro_batch_size_per_gpu", micro, world)
    if train != micro * accumulation * world:
        raise ConfigError(
            f"{where}: train_batch_size = {train}, but train_micro_batch_size_per_gpu * gradient_accumulation_steps * "
            f"ranks = {micro} * {accumulation} * {world} = {micro * accumulation * world}; leave one of the three out."
        )
    return Batch(train, micro, accumulation)


def _divide(where: str, train: int, name: str, value: int, world: int) -> int:
    if train % (value * world):
        raise ConfigError(
            f"{where}: train_batch_size = {train} is no multiple of {name} * ranks = {value} * {world} = "
            f"{value * world}; change one of them."
        )
    return train // (value * world)
