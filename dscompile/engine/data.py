"""The data loader of the engine: each data-parallel rank its share, a position that can be saved and continued.

Shares and shuffles are those of :class:`torch.utils.data.DistributedSampler`: the order of an epoch is a permutation
seeded by ``seed + epoch``, padded from its own beginning to a multiple of the ranks, of which rank ``r`` takes every
``data_world``-th element from the ``r``-th on. Ranks that work on the same batch (tensor, pipeline and sequence
parallelism) pass the same ``data_rank``.

A position is the number of samples that *all* ranks have taken from the epoch's order, so it can be continued on
another number of ranks, and with another micro-batch: the next samples are the same, none is repeated or left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dscompile.errors import ConfigError, UnsupportedError

Collate = Callable[[list[Any]], Any]


def epoch_order(samples: int, *, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """Indices of an epoch, int64 ``[samples]``, in order, equal on every rank."""
    if not shuffle:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch))


def share(order: Tensor, consumed: int, rank: int, world: int) -> list[int]:
    """A rank's indices after the first ``consumed`` of an epoch's order, padded so that all ranks have as many."""
    left = order[consumed:]
    missing = -len(left) % world
    padding = order.repeat(math.ceil(missing / len(order)))[:missing]
    mine: list[int] = torch.cat([left, padding])[rank::world].tolist()
    return mine


class Loader:
    """Batches of one rank. Make it with :func:`create_loader`.

    Each iteration is one epoch, and the epoch advances when an iteration ends (PyTorch repeats the first epoch's order
    until ``set_epoch`` is called; calling it is allowed here too). An iteration that is left early starts again from
    the epoch's beginning, unless its ``state_dict`` is loaded.

    With worker processes the position is that of the batches handed out, not of those fetched ahead. Random numbers
    that the dataset itself draws are seeded by (``seed``, ``epoch``), but their position within an epoch is not saved.

    Attributes:
        epoch: the epoch of the current or next iteration.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        data_rank: int,
        data_world: int,
        collate_fn: Collate | None,
        drop_last: bool,
        shuffle: bool,
        seed: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size, self.data_rank, self.data_world = micro_batch_size, data_rank, data_world
        self.drop_last, self.shuffle, self.seed = drop_last, shuffle, seed
        self._options = {"collate_fn": collate_fn, "num_workers": num_workers, "pin_memory": pin_memory}
        self._samples = len(cast(Sized, dataset))
        self.epoch = 0
        self._start = 0
        self._consumed = 0

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank."""
        return self._batches(math.ceil(self._samples / self.data_world))

    def _batches(self, samples: int) -> int:
        return samples // self.micro_batch_size if self.drop_last else math.ceil(samples / self.micro_batch_size)

    def __iter__(self) -> Iterator[Any]:
        """The batches of this epoch from the loaded position, or from its beginning."""
        self._consumed, self._start = self._start, 0
        order = epoch_order(self._samples, shuffle=self.shuffle, seed=self.seed, epoch=self.epoch)
        mine = share(order, self._consumed, self.data_rank, self.data_world)
        size = self.micro_batch_size
        batches = [mine[first : first + size] for first in range(0, self._batches(len(mine)) * size, size)]
        # A generator of its own: torch would draw the workers' seed from the global one and shift the model's numbers.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        loader: DataLoader[Any] = DataLoader(
            self.dataset, batch_sampler=batches, generator=generator, **cast(Any, self._options)
        )
        for indices, batch in zip(batches, loader, strict=True):
            self._consumed = min(self._consumed + len(indices) * self.data_world, self._samples)
            yield batch
        self.epoch += 1
        self._consumed = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch. At the epoch that a loaded position belongs to, the position stays."""
        if epoch != self.epoch:
            self.epoch, self._start, self._consumed = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch and samples taken from it by all ranks, and what its order depends on."""
        return {
            "epoch": self.epoch,
            "consumed": self._consumed or self._start,
            "samples": self._samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position at the next iteration, on this loader's number of ranks.

        Raises:
            ConfigError: the position belongs to other data, or to another order.
        """
        ours = {"samples": self._samples, "seed": self.seed, "shuffle": self.shuffle}
        for key, value in ours.items():
            if state_dict.get(key) != value:
                raise ConfigError(
                    f"data position: it was saved with {key} {state_dict.get(key)!r}, but this loader has {value!r}; "
                    "continue with the same data and seed, or start without the saved position."
                )
        self.epoch = int(state_dict["epoch"])
        self._start = int(state_dict["consumed"])
        self._consumed = 0


class RepeatingLoader:
    """Wrap a loader so that it begins again at its end. Its iterator is itself, so ``next()`` works.

    A loader with a ``set_epoch`` sampler gets a new epoch each time. Positions are those of the wrapped loader.

    Raises:
        ConfigError: on iteration, the wrapped loader is empty.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._iterator: Iterator[Any] | None = None
        self._rounds = 0

    def __iter__(self) -> RepeatingLoader:
        return self

    def __len__(self) -> int:
        """Batches of one round."""
        return len(self.loader)

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            self._advance()
        self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ConfigError("RepeatingLoader: the wrapped loader has no batches.") from None

    def _advance(self) -> None:
        self._rounds += 1
        sampler: Any = getattr(self.loader, "sampler", None)
        if not isinstance(self.loader, Loader) and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self._rounds)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch of the wrapped loader."""
        self.loader.set_epoch(epoch)
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """The wrapped loader's position."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved position of the wrapped loader."""
        self.loader.load_state_dict(state_dict)
        self._iterator = None


def create_loader(
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    data_rank: int,
    data_world: int,
    collate_fn: Collate | None = None,
    drop_last: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """A loader of one rank's micro-batches.

    Args:
        dataset: with ``__getitem__`` and ``__len__``.
        micro_batch_size: samples in a batch of one rank.
        data_rank: coordinate on the data axis; equal for ranks that work on the same batch.
        data_world: ranks on the data axis.
        collate_fn: makes a batch of a list of samples; by default PyTorch's.
        drop_last: leave out a rank's last batch if it is not full.
        shuffle: a new permutation each epoch, else the dataset's order.
        seed: of the permutations.
        num_workers: processes that fetch ahead.
        pin_memory: copy batches to page-locked memory.

    Raises:
        ConfigError: a size or rank out of range, or an empty dataset.
        UnsupportedError: an ``IterableDataset``, or one without a length.
    """
    if isinstance(dataset, IterableDataset):
        raise UnsupportedError(
            f"{type(dataset).__name__} is an IterableDataset: it has no indices to divide over ranks or to continue "
            "from. Divide it inside the dataset by data_rank, and pass the DataLoader you make of it."
        )
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UnsupportedError(f"{type(dataset).__name__} has no __getitem__ and __len__: a dataset needs both.")
    if len(cast(Sized, dataset)) == 0:
        raise ConfigError(f"{type(dataset).__name__} is empty.")
    for name, value, least in (
        ("micro_batch_size", micro_batch_size, 1),
        ("data_world", data_world, 1),
        ("data_rank", data_rank, 0),
        ("num_workers", num_workers, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"data loader: {name} must be a whole number of at least {least}, got {value!r}.")
    if data_rank >= data_world:
        raise ConfigError(f"data loader: data_rank {data_rank} does not exist among {data_world} rank(s).")
    return Loader(
        dataset,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_world=data_world,
        collate_fn=collate_fn,
        drop_last=drop_last,
        shuffle=shuffle,
        seed=seed,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
