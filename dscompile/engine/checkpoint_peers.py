"""How ranks agree on a save or a load: by collectives in the main thread, through the store in a background one.

A background thread must not use the process group: its collectives would interleave with those of training.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch.distributed as dist

from dscompile.errors import CheckpointError, RankError
from dscompile.torch_compat import default_store

POLL_SECONDS = 0.01


class Peers(Protocol):
    """The ranks of the default process group, or this process alone."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, None elsewhere."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""


class Collective:
    """Peers by collectives. Without a process group (or with a fake one) this process is alone."""

    def __init__(self) -> None:
        self.alone = not dist.is_initialized() or dist.get_backend() == "fake" or dist.get_world_size() == 1
        self.rank, self.world = (0, 1) if self.alone else (dist.get_rank(), dist.get_world_size())

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, None elsewhere."""
        if self.alone:
            return [value]
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        _reached(dist.gather_object, value, found, dst=0)
        return found

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """The one for this rank of the values that rank 0 gives."""
        if self.alone:
            assert values is not None
            return values[0]
        mine: list[Any] = [None]
        _reached(dist.scatter_object_list, mine, None if values is None else list(values), src=0)
        return mine[0]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.alone:
            return value
        found = [value]
        _reached(dist.broadcast_object_list, found, src=0)
        return found[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if there is an error on any: the first rank's, with the ranks that have one.

        Raises:
            CheckpointError: the same text on every rank.
        """
        mine = None if error is None else describe(error)
        found: list[str | None] = [mine] * self.world
        if not self.alone:
            _reached(dist.all_gather_object, found, mine)
        try:
            raise_first(found)
        except CheckpointError as agreed:
            raise agreed from (None if isinstance(error, CheckpointError) else error)


class ThroughStore:
    """Peers through the c10d store, by a connection of its own. ``name`` must be new, and equal on every rank.

    ``timeout`` in seconds: until a rank that says nothing makes the others give up.
    """

    def __init__(self, name: str, peers: Collective, timeout: float) -> None:
        self.rank, self.world, self._timeout = peers.rank, peers.world, timeout
        self._prefix = f"dscompile/checkpoint/{name}/"
        self._store: Any = default_store().clone() if self.world > 1 else None  # type: ignore[attr-defined]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, None elsewhere; once."""
        if self._store is None:
            return [value]
        self._call("set", f"{self._prefix}{self.rank}", pickle.dumps(value))
        if self.rank != 0:
            return None
        return [self._get(f"{self._prefix}{rank}", f"rank {rank}") for rank in range(self.world)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value; once. Rank 0 stays until the others have it, as it may serve the store."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._call("set", self._prefix + "verdict", pickle.dumps(value))
            deadline = time.monotonic() + 5.0
            while self._call("add", self._prefix + "heard", 0) < self.world - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            for key in ("verdict", "heard", *map(str, range(self.world))):
                self._call("delete_key", self._prefix + key)
            return value
        found = self._get(self._prefix + "verdict", "rank 0")
        self._call("add", self._prefix + "heard", 1)
        return found

    def _get(self, key: str, who: str) -> Any:
        deadline = time.monotonic() + self._timeout
        while not self._call("check", [key]):
            if time.monotonic() > deadline:
                raise CheckpointError(f"{who} has not finished its part of the checkpoint in {self._timeout:g} s.")
            time.sleep(POLL_SECONDS)
        return pickle.loads(self._call("get", key))  # from a peer of this job, as all objects between ranks

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return getattr(self._store, method)(*args)
        except Exception as error:  # a DistStoreError, DistNetworkError or RuntimeError, by the kind of store
            self._lost(error)

    def _lost(self, error: Exception) -> NoReturn:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the ranks lost their store while a checkpoint was written: {reason}") from None


def describe(error: Exception) -> str:
    """An error for other ranks: one of ours speaks for itself."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _reached(collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        collective(*args, **kwargs)
    except RankError:  # the watch knows more
        raise
    except RuntimeError as error:  # also the base of torch.distributed's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"a rank could not be reached to agree on a checkpoint; has it ended? ({reason})"
        ) from None


def raise_first(errors: Sequence[str | None]) -> None:
    """Raise :class:`CheckpointError` for the first of the ranks' errors, if there is one; equal on every rank."""
    wrong = [rank for rank, text in enumerate(errors) if text is not None]
    if not wrong:
        return
    text = errors[wrong[0]]
    if len(wrong) == len(errors):  # a fact about the files, not about one rank
        raise CheckpointError(text)
    ranks = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
    raise CheckpointError(f"on rank {ranks} of {len(errors)}: {text}")
