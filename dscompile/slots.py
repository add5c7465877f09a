"""One slot a sharded parameter: what its DTensor, the graphs that read it and its open accumulation window share.

``_parameters[name]`` holds the ``DTensor`` that users, optimizers and checkpoints see. Graphs and eager reads use a
plain local tensor over the same memory instead, made once, whose gradient autograd hands to the DTensor: a graph input
of a plain tensor costs half as much to trace as a DTensor (measured: 292 parameters, 1.4 against 1.95 times the plain
model's tracing), and the graph holds neither meshes nor desugared subclasses. ``.grad``, hooks and ``requires_grad``
stay the DTensor's own.

A slot goes stale when its parameter is frozen, thawed or replaced. Eager reads notice and renew it; a compiled graph
cannot, so ``Attach`` drops the gradient of a frozen parameter and the optimizer hook refuses a thawed one.

At the end of an accumulation window exactly one reader may add what was accumulated to its own gradient, although
several graphs, eager reads or calls of the model may read the parameter. The first reader takes the accumulator; the
later ones send their gradients to the ``leaf``, and so into the accumulator's memory. Autograd runs backward in
reverse order of creation, so the first reader's reduction comes last and carries them all. The accumulator is offered
as a tensor that only the taker keeps alive: if its graph is dropped without a backward pass, it is offered again.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dscompile.config import Config
from dscompile.ops import REPLICATED, on_take, unshard
from dscompile.placement import Mark, ShardSpec, mark_of, set_mark
from dscompile.torch_compat import local_of, process_group, set_local, static, wrap_like


def attribute_keys(name: str) -> tuple[str, str, str, str, str]:
    """Module attributes behind parameter ``name``: a slot's ``shard``, ``silent``, ``leaf``, ``offered``, ``taken``."""
    return f"_shard_{name}", f"_silent_{name}", f"_leaf_{name}", f"_accumulated_{name}", f"_taken_{name}"


def alias(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that is no view in autograd's eyes: views cost Dynamo another fake tensor each."""
    same = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return static(same.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()))


def window(full: Tensor, spec: ShardSpec, rank: int) -> Tensor:
    """A rank's rows of a resident buffer: the same memory, as a tensor with a storage of its own.

    A DTensor over a view with a storage offset takes the offset over, and then cannot be pickled or deep-copied
    (torch 2.13); and pickling a view would write the whole buffer.
    """
    rows = spec.shard_of(full, rank)
    return torch.from_dlpack(rows) if rows.numel() and rows.device.type != "meta" else rows.clone()


class Attach(torch.autograd.Function):
    """A DTensor parameter as its local tensor. Saves nothing, so one call serves every backward pass."""

    @staticmethod
    def forward(ctx: Any, param: DTensor) -> Tensor:
        """The local tensor, over the same memory."""
        ctx.param = param
        ctx.set_materialize_grads(False)  # inside no_sync there is no gradient, not a zero one
        return alias(local_of(param))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> DTensor | None:
        """The local gradient as the parameter's, in its ``grad_dtype``; none if it was frozen since."""
        if grad is None or not ctx.param.requires_grad:
            return None
        return wrap_like(ctx.param, grad.to(ctx.param.grad_dtype or grad.dtype))


class Slot:
    """State of one parameter. Modules own their slots; a tied parameter's slot is owned by several.

    Attributes:
        param: the DTensor parameter.
        spec: its placement.
        shard: what graphs read.
        silent: what they read inside ``no_sync``. Autograd runs a parameter's hooks even if its gradient turns out to
            be none, so inside there must be no edge to the parameter at all.
        leaf: takes the unreduced gradient inside ``no_sync``: full shape, no memory (all strides are 0) until it has
            a gradient.
        accumulated: that gradient, until it is reduced.
        offered: the same memory for the reader that will reduce it; None once one has taken it.
        taken: a reader has, and its backward pass has not run: others add to ``leaf``.
        owners: the modules that hold the parameter, and its name there.
        full: the gathered value while a ``gathered`` context is open.
        writable: that context writes ``full`` back.
        reads: eager reads so far, each of which gathered.
        fresh: version of ``param`` when its resident copy was last gathered (:mod:`dscompile.resident`), else None.
    """

    def __init__(self, param: DTensor, spec: ShardSpec, config: Config) -> None:
        self.spec = spec
        self.config = config
        self.owners: list[tuple[weakref.ref[nn.Module], str]] = []
        self.leaf: Tensor | None = None
        self.accumulated: Tensor | None = None
        self.offered: Tensor | None = None
        self.taken = False
        self._handed: weakref.ref[Tensor] | None = None
        self._joining = False
        self.full: Tensor | None = None
        self.writable = False
        self.reads = 0
        self.fresh: int | None = None
        self._hooked = False
        self._watched: DTensor | None = None
        self.renew(param)

    def renew(self, param: DTensor | None = None) -> None:
        """Make the graph's tensor anew, after the parameter was replaced, moved, frozen or thawed."""
        if param is not None:
            self._hooked = False
            self.param = param
            self.rank = process_group(self.spec.group).rank()
        param = self.param
        self._local = local_of(param)
        resident = self._resident()
        self._expect_writes(resident)
        if param.requires_grad:
            with torch.enable_grad():
                self.shard: Tensor = static(Attach.apply(param))  # type: ignore[no-untyped-call]
        else:
            self.shard = alias(self._local)
        known = mark_of(param)
        mark = Mark(self.spec, self.config, resident, weakref.ref(self), known.copy if known is not None else None)
        set_mark(param, mark)
        set_mark(self.shard, mark)
        if not param.requires_grad:
            self.leaf = None
        self.silent = alias(self._local)
        set_mark(self.silent, mark)
        self.publish()

    def _expect_writes(self, resident: Tensor | None) -> None:
        """A resident copy is stale from its first gradient on: an optimizer step follows."""
        self.fresh = None
        kept = resident is not None or self.spec.keeps_copy
        if kept and self.param.requires_grad and self._watched is not self.param:
            self._watched = self.param
            stale = weakref.WeakMethod(self._set_stale)
            self.param.register_post_accumulate_grad_hook(lambda _: (m := stale()) and m())

    def _set_stale(self) -> None:
        self.fresh = None

    def _resident(self) -> Tensor | None:
        """At stages 1 and 2 the shard must be a view of a full buffer: the one it already lies in, or a new one.

        Not if the model computes in another dtype: then the full value is a copy.
        """
        if self.spec.stage not in (1, 2) or self.spec.dim == REPLICATED or self.spec.dtype is not None:
            return None
        known = mark_of(self.param)
        if known is not None and known.resident is not None:
            rows = self.spec.shard_of(known.resident, self.rank)
            if rows.data_ptr() == self._local.data_ptr() and rows.dtype == self._local.dtype:
                return known.resident
        full = self._local.new_empty(self.spec.shape)
        local = window(full, self.spec, self.rank)
        local.copy_(self._local)
        set_local(self.param, local)
        self._local = local
        return full

    def release(self) -> None:
        """Let go of the parameter, which is about to be swapped with a converted one; :meth:`renew` must follow."""
        del self.shard, self.silent
        for reference, name in self.owners:
            if (module := reference()) is not None:
                for key in attribute_keys(name):
                    module.__dict__.pop(key, None)

    def shard_from(self, full: Tensor) -> DTensor:
        """One rank's part of a full value, as a DTensor like the parameter. Every rank has the same ``full``."""
        local = self.spec.shard_of(full, self.rank).to(self._local.device)
        return wrap_like(self.param, local.detach())

    @property
    def moved(self) -> bool:
        """Whether the parameter has other memory than the graph's tensor."""
        return self._local is not local_of(self.param)

    @property
    def stale(self) -> bool:
        """Whether the parameter was moved, frozen or thawed since the graph's tensor was made."""
        return self.moved or self.shard.requires_grad != self.param.requires_grad

    def own(self, module: nn.Module, name: str) -> None:
        """Let a module read the parameter through this slot."""
        if all(m() is not module or n != name for m, n in self.owners):
            self.owners.append((weakref.ref(module), name))
        self.publish()

    def publish(self) -> None:
        """Put the graph's inputs where the modules' properties find them."""
        for reference, name in self.owners:
            module = reference()
            if module is not None:
                values = (self.shard, self.silent, self.leaf, self.offered, self.taken)
                module.__dict__.update(zip(attribute_keys(name), values, strict=True))

    def gather(self, *, to_leaf: bool = False, boundary: bool = False, master: bool = False) -> Tensor:
        """The full value, by a collective, with autograd as the accumulation window wants it.

        In the compute dtype, or in the ``master``'s.
        """
        spec = self.spec
        to_leaf = to_leaf or (boundary and self.taken)
        return unshard(
            self.silent if to_leaf else self.shard,
            spec.dim,
            spec.size,
            spec.world,
            spec.group,
            self.leaf if to_leaf else None,
            self.offered if boundary else None,
            None if master else spec.dtype,
            spec.wire,
            spec.tile_argument,
        )

    # -- accumulation ------------------------------------------------------------------------------------------------

    def open_window(self) -> None:
        """Prepare to accumulate without reducing. A frozen parameter has nothing to accumulate."""
        if self.stale:
            self.renew()
        if not self.param.requires_grad:
            return
        if self.leaf is None:
            strides = (0,) * len(self.spec.shape)
            dtype = self.spec.accumulate or self.shard.dtype
            leaf = torch.empty_strided(self.spec.shape, strides, dtype=dtype, device=self.shard.device)
            self.leaf = static(leaf.requires_grad_())
            accumulated = weakref.WeakMethod(self._accumulated)
            self.leaf.register_post_accumulate_grad_hook(lambda leaf: (m := accumulated()) and m(leaf))
        if not self._hooked:
            self._hooked = True
            reduced = weakref.WeakMethod(self._reduced)
            self.param.register_post_accumulate_grad_hook(lambda _: (m := reduced()) and m())
        self.publish()

    def _accumulated(self, leaf: Tensor) -> None:
        grad = self.accumulated = leaf.grad
        handed = self._handed() if self._handed is not None else None
        if grad is not None and handed is not None and handed.data_ptr() != grad.data_ptr():
            alias(handed).copy_(grad.detach())  # autograd adds out of place under create_graph
        self._offer()

    def _offer(self) -> None:
        """Let the next reader outside ``no_sync`` have what was accumulated, unless one has it."""
        self.offered = None
        if self.accumulated is not None and not self.taken:
            self.offered = alias(self.accumulated.detach())
            take = weakref.WeakMethod(self.take)
            on_take(self.offered, lambda: (m := take()) and m())
        self.publish()

    def take(self) -> None:
        """A reader that will reduce what was accumulated begins."""
        if self.offered is None:
            return
        me = weakref.ref(self)

        def returned(gone: weakref.ref[Tensor]) -> None:
            if (slot := me()) is not None:
                slot._returned(gone)

        self._handed = weakref.ref(self.offered, returned)
        self.offered, self.taken, self._joining = None, True, True
        self.publish()

    def _returned(self, gone: weakref.ref[Tensor]) -> None:
        """Nothing holds the accumulator that was handed out: the taker is done, or was dropped."""
        if gone is self._handed:
            self._handed, self.taken = None, False
            self._offer()

    def _reduced(self) -> None:
        """The parameter got a gradient: if a reader took what was accumulated, that included it."""
        if self._joining:
            self.close_window()

    def close_window(self) -> None:
        """Forget what was accumulated."""
        handed = self._handed() if self._handed is not None else None
        if handed is not None:
            alias(handed).zero_()  # a second backward pass through a retained graph must not add it again
        self.accumulated = self.offered = self._handed = None
        self.taken = self._joining = False
        if self.leaf is not None:
            self.leaf.grad = None
        self.publish()


def slot_of(tensor: Tensor) -> Slot | None:
    """The slot of a parameter, if a module that holds it is alive."""
    mark = mark_of(tensor)
    return mark.slot() if mark is not None and mark.slot is not None else None
