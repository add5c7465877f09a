"""The ranks of one training run, as its loop sees them: who I am, what we agree on, and whole values of shards.

A run on one rank has no process group: every method is then the identity. :class:`Ranks` of more is entered for the
length of the run; it watches the others, so that a collective that fails names the rank that broke it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dscompile.config import Config
from dscompile.distribution import distribute
from dscompile.errors import ConfigError, DscompileError, RankError, RunError
from dscompile.runtime.guarded import watch_of
from dscompile.runtime.watch import Watch, is_connection_error
from dscompile.torch_compat import default_store
from dscompile.world import DATA, World, default_mesh

T = TypeVar("T")


def launched() -> int | None:
    """How many ranks ``torchrun`` (or our launcher) started, this process among them; None if it did not."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else None


class Ranks:
    """All ranks of the run. Enter it before anything is shared.

    ``timeout``: seconds within which the ranks end after one of them broke; 0 leaves them unwatched.
    """

    def __init__(self, world: int, timeout: float = 30.0) -> None:
        self.rank, self.world = 0, world
        self._timeout = timeout
        self._mesh: DeviceMesh | None = None
        self._watch: Watch | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        """Join the process group. Raises :class:`ConfigError` if another number of ranks was launched."""
        count = launched()
        if count is not None and count != self.world:
            rank = os.environ.get("RANK", "?")
            raise ConfigError(
                f"rank {rank}: --ranks {self.world}, but {count} ranks were launched; leave --ranks out under torchrun."
            )
        if self.world > 1:
            self._mesh = default_mesh("cpu", expected=self.world)
            self.rank = dist.get_rank()
            self._watch = watch_of(World.of(self._mesh).group(DATA), self._timeout)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave, and tell the other ranks why. An error that all ranks have is reported by one of them."""
        if self._mesh is None:
            return
        said = False
        try:
            if isinstance(error, Exception) and (named := self.named(error)) is not error:
                raise named from error
            if error is not None and self._watch is not None:
                self._watch.failed(error)
            said = isinstance(error, DscompileError) and self._said(str(error))
        finally:
            if self._watch is not None:
                self._watch.stop()
            if error is None:
                dist.destroy_process_group()
        if said:
            raise typer.Exit(2) from None

    def named(self, error: Exception) -> Exception:
        """The :class:`RankError` behind a collective that lost its peer; any other error is returned as it is."""
        if self._mesh is None or not is_connection_error(error):
            return error
        if self._watch is None:
            return RankError(
                f"a collective failed on rank {self.rank}, which watches no other (rank_timeout 0): {error}"
            )
        return self._watch.explain(error)

    def _said(self, message: str) -> bool:
        """Whether another rank has reported the same error."""
        key = f"dscompile/train/error/{hashlib.sha256(message.encode()).hexdigest()}"
        with contextlib.suppress(RuntimeError):  # the store may be what was lost
            return default_store().add(key, 1) > 1
        return False

    # -- agreement -----------------------------------------------------------------------------------------------------

    def share(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on the first rank, or the error of ours that it raises there, on every rank."""
        if self._mesh is None:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except DscompileError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], DscompileError):
            raise box[0]
        value: T = box[0]
        return value

    def same(self, what: str, value: str) -> None:
        """Check that ``value`` is equal on every rank. Raises :class:`RunError` on each of them if not."""
        values = self.all(value)
        if other := next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None):
            raise RunError(f"{what} differs between rank 0 and rank {other}; give every machine the same.")

    def all(self, value: T) -> list[T]:
        """The values of all ranks, in rank order."""
        if self._mesh is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over ranks, in double precision and bit for bit equal on every rank."""
        if self._mesh is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    # -- data, model, state --------------------------------------------------------------------------------------------

    def part(self, batch: Tensor) -> Tensor:
        """The rows of this rank, of a batch whose first dimension is a multiple of the number of ranks."""
        rows = batch.shape[0] // self.world
        return batch.narrow(0, self.rank * rows, rows)

    def shard(self, model: nn.Module, config: Config) -> nn.Module:
        """The model with its parameters sharded, in place. It must be equal on every rank."""
        return model if self._mesh is None else distribute(model, self._mesh, config, sync_init=False)

    def whole(self, value: Tensor) -> Tensor:
        """The full tensor of a shard, any other as it is. Every rank must call it."""
        return value.full_tensor() if isinstance(value, DTensor) else value
