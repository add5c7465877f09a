"""Communication as a program runs it: buffers from the pool, works that are awaited, and the place where a rank waits.

The printed program calls ``comm.NAME(...)`` for the operators of :mod:`dscompile.comm`. They mean what the operators
mean; here a bucket of one contiguous tensor is not copied, and large buffers are reused from step to step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dscompile import bucket_ops
from dscompile.bucket_ops import New
from dscompile.collectives import COLLECTIVES, LOG
from dscompile.shard_layout import ShardLayout, decode, stays_local
from dscompile.torch_compat import group_backend, process_group

ours = torch.ops.dscompile


class Comm:
    """The operators of one program.

    Args:
        at: told the place (module or node) before each wait.
        new: where buffers come from.
    """

    def __init__(self, at: Callable[[str], None], new: New) -> None:
        self._at = at
        self._new = new
        self._works: dict[int, tuple[list[dist.Work], Tensor, Tensor]] = {}

    # -- collectives -------------------------------------------------------------------------------------------------

    def all_gather_into_tensor(self, flat: Tensor, world: int, group: str) -> Tensor:
        """Launch a gather of ``flat`` ``[n]`` into ``[world * n]``.

        gloo's own all-gather copies everything it received once more. Between every two ranks one message each way
        moves the same bytes, and what arrives is in its place.
        """
        out = self._new(flat, (world * flat.numel(),))
        if group_backend(group, flat.device) != "gloo":
            start = functools.partial(dist.all_gather_into_tensor, out, flat, async_op=True)
            works = [start(group=process_group(group))]
            return self._launch("all_gather_into_tensor", world, out, out, flat, works)
        pg, parts = process_group(group), out.view(world, -1)
        rank = pg.rank()
        parts[rank].copy_(flat)
        works = []
        for step in range(1, world):  # every rank talks to another one at a time: no rank is flooded
            to, source = (rank + step) % world, (rank - step) % world
            works.append(pg.send([flat], to, 0))
            works.append(pg.recv([parts[source]], source, 0))
        return self._launch("all_gather_into_tensor", world, out, out, flat, works)

    def all_to_all_single(self, flat: Tensor, receive: list[int], send: list[int], group: str) -> Tensor:
        """Launch an exchange: part ``r`` of ``flat`` goes to rank ``r``."""
        out = self._new(flat, (sum(receive),))
        work = dist.all_to_all_single(out, flat, receive, send, group=process_group(group), async_op=True)
        return self._launch("all_to_all_single", len(send), flat, out, flat, [work])

    def reduce_scatter_tensor(self, flat: Tensor, kind: str, world: int, group: str) -> Tensor:
        """Launch a reduction of ``flat`` ``[world * n]`` to this rank's ``[n]``."""
        return COLLECTIVES.reduce_scatter_tensor(flat, kind, world, group)

    def _launch(
        self, op: str, world: int, payload: Tensor, out: Tensor, flat: Tensor, works: list[dist.Work]
    ) -> Tensor:
        LOG.launched(op, out, payload, world)
        self._works[id(out)] = (works, out, flat)  # both buffers live until the wait
        return out

    def wait_tensor(self, launched: Tensor, place: str) -> Tensor:
        """Wait for a launched collective; ``place`` is what other ranks are told this one waits for."""
        self._at(place)
        found = self._works.pop(id(launched), None)
        if found is None:
            return COLLECTIVES.wait_tensor(launched, place)
        began = LOG.clock()
        for work in found[0]:
            work.wait()
        LOG.finished(launched, began, place)
        return launched

    # -- buffers -----------------------------------------------------------------------------------------------------

    def pack_shards(
        self, shards: Sequence[Tensor], layouts: Sequence[int], world: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """:func:`dscompile.bucket_ops.pack_shards`; a single contiguous shard without padding is its own buffer."""
        alone = _alone(layouts, world)
        if (
            alone is not None
            and dtype in (None, shards[0].dtype)
            and shards[0].is_contiguous()
            and shards[0].numel() == alone.piece_numel
        ):
            return shards[0].detach().view(-1)
        return bucket_ops.pack_shards(shards, layouts, world, dtype, self._new)

    def unpack_params(
        self, gathered: Tensor, layouts: Sequence[int], world: int, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """:func:`dscompile.bucket_ops.unpack_params`; a single evenly cut parameter is the gathered buffer itself."""
        alone = _alone(layouts, world)
        if alone is not None:
            return [gathered.view(alone.shape).to(dtype or gathered.dtype)]
        return bucket_ops.unpack_params(gathered, layouts, world, dtype, self._new)

    def pack_grads(
        self, grads: Sequence[Tensor], layouts: Sequence[int], world: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """:func:`dscompile.bucket_ops.pack_grads`; a single evenly cut contiguous gradient is its own buffer."""
        same = dtype in (None, grads[0].dtype)
        if same and _alone(layouts, world) is not None and grads[0].is_contiguous():
            return grads[0].view(-1)
        return bucket_ops.pack_grads(grads, layouts, world, dtype, self._new)

    def sum_ranks(self, exchanged: Tensor, world: int) -> Tensor:
        """:func:`dscompile.bucket_ops.sum_ranks`."""
        return bucket_ops.sum_ranks(exchanged, world, self._new)

    def unpack_shards(
        self, flat: Tensor, layouts: Sequence[int], world: int, rank: int, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """:func:`dscompile.bucket_ops.unpack_shards`; a single shard without padding is the buffer itself."""
        alone = _alone(layouts, world)
        if alone is not None:
            return [flat.view(alone.local_shape(rank)).to(dtype or flat.dtype)]
        return bucket_ops.unpack_shards(flat, layouts, world, rank, dtype)

    def start_refresh(
        self,
        shards: Sequence[Tensor],
        layouts: Sequence[int],
        world: int,
        group: str,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """:func:`dscompile.bucket_ops.start_refresh`, as this program's other gathers."""
        if bucket_ops.all_fresh(shards, dtype):
            return shards[0].new_empty(0, dtype=dtype)
        return self.all_gather_into_tensor(self.pack_shards(shards, layouts, world, dtype), world, group)

    def refresh(
        self,
        shards: Sequence[Tensor],
        layouts: Sequence[int],
        world: int,
        group: str,
        pending: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """:func:`dscompile.bucket_ops.refresh`."""
        local = stays_local(layouts, world)
        if pending is None and not local:
            pending = self.start_refresh(shards, layouts, world, group, dtype)
        if pending is None or not pending.numel():
            return bucket_ops.refresh(shards, layouts, world, group, pending, dtype)
        gathered = self.wait_tensor(pending, "refresh of resident parameters")
        return bucket_ops.fill_residents(shards, layouts, world, gathered, dtype)

    def unshard(self, shard: Tensor, *rest: object) -> Tensor:
        """A marker that no pass lowered."""
        out: Tensor = ours.unshard(shard, *rest)
        return out

    def reduce_grad(self, grad: Tensor, *rest: object) -> Tensor:
        """A marker that no pass lowered."""
        out: Tensor = ours.reduce_grad(grad, *rest)
        return out


def _alone(layouts: Sequence[int], world: int) -> ShardLayout | None:
    """The layout of a bucket of one tensor whose pieces lie one behind the other in the tensor itself, else None."""
    found = decode(layouts, world)
    return found[0] if len(found) == 1 and found[0].is_consecutive else None
