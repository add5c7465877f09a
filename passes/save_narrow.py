"""Save the narrower of two values that say the same: what a cast was made from, not the cast. Bitwise.

Autograd keeps what an operator read. In training with 16 bits that is often a copy widened to fp32, twice the bytes of
the tensor that it was made from; and of an RMSNorm that a model spells out it keeps ``x * rstd`` beside ``x`` and
``rstd``. Backward computes such a value again in the kernel that reads it, from what is saved anyway or is smaller.

A value is computed again if all of these hold:

- casts, views and arithmetic (sums, differences, products, quotients, negation) lead to it, no more than
  :data:`_LONGEST` of them;
- at most one operand is as large as it is, and is no wider: backward does not read more bytes than before;
- fewer bytes are saved, counting operands that have to be saved instead;
- its readers in backward are operators that are fused with what they read, not products: those would need it in memory;
- the step does not write to the memory of an operand, and the caller does not receive the value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from dscompile.effects import shared_operand
from dscompile.graph import Phase, StepGraph, info
from dscompile.manager import PassContext, graph_pass
from dscompile.passes.again import Kept, base_of, bytes_of, call_again, late_readers, rewrite
from dscompile.torch_compat import OpOverload

aten = torch.ops.aten

_ARITHMETIC = frozenset(
    getattr(packet, overload)
    for packet in (aten.add, aten.sub, aten.mul, aten.div)
    for overload in ("Tensor", "Scalar")
) | {aten.neg.default}  # fmt: skip

_FUSED = frozenset({
    aten._to_copy.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    aten.native_layer_norm_backward.default, aten._fused_rms_norm_backward.default,
    aten._softmax_backward_data.default, aten._log_softmax_backward_data.default,
})  # fmt: skip
"""Readers, beside pointwise operators, whose kernels compute what they read, or read 16 bits."""

_LONGEST = 6
"""Most operators of one chain: each is computed again by every kernel that reads the value."""

_SMALL = 8
"""An operand of less than 1/8 of the value's bytes is small: a statistic of each row, a weight."""


@graph_pass("save_narrow", after={"canonicalise", "fuse_loss", "sparse_attention", "recompute"}, optional=True)
def save_narrow(graph: StepGraph, ctx: PassContext) -> None:
    """Let backward widen and scale again what forward has saved narrower anyway."""
    if any("recompute" in node.meta for node in graph.nodes):
        return  # what is saved is PyTorch's choice then
    kept = Kept(graph)
    for value in kept.saved:
        plan = _plan(value, kept)
        if plan is None:
            continue
        size, instead = bytes_of(value), plan.instead
        names = ", ".join(f"%{node.name}" for node in plan.missing)
        if instead >= size:
            ctx.decide(value, "saved", f"{names} would have to be saved instead", bytes=size, instead_bytes=instead)
        elif (reader := _needs_memory(value)) is not None:
            ctx.decide(value, "saved", f"%{reader.name} reads it from memory in backward", bytes=size)
        else:
            why = f"{names} saved instead" if names else "its operands are saved anyway"
            if graph.edit("narrow", value, why=why):
                ctx.decide(value, "computed again", why, saved_bytes=size - instead)
                rewrite(graph, value, plan.chain, call_again)
                kept.swap(value, plan.missing)


@dataclass
class _Plan:
    """How to compute a value again: ``chain``, operands first; ``missing``: what has to be saved instead."""

    chain: list[fx.Node]
    missing: list[fx.Node]

    @property
    def instead(self) -> int:
        """Bytes that have to be saved instead."""
        return sum(map(bytes_of, self.missing))


def _plan(value: fx.Node, kept: Kept) -> _Plan | None:
    """The plan that saves the fewest bytes instead of one saved value, the shortest of them; None if there is none."""
    if not kept.frees(value) or not _is_cheap(value) or value.meta["val"].numel() == 1 or not late_readers(value):
        return None
    best: _Plan | None = None
    chain, leaves = [value], list(value.all_input_nodes)
    while len(chain) <= _LONGEST:
        plan = _allowed(value, chain, leaves, kept)
        if plan is not None and (best is None or plan.instead < best.instead):
            best = plan
        open_ = [n for n in leaves if not kept.has(n) and _is_cheap(n)]
        if not open_:
            break
        chain.append(max(open_))  # the last one in the graph: nothing in the chain is an operand of it
        leaves = [n for n in leaves if n is not chain[-1]]
        leaves += [n for n in chain[-1].all_input_nodes if n not in leaves]
    return best


def _allowed(value: fx.Node, chain: list[fx.Node], leaves: list[fx.Node], kept: Kept) -> _Plan | None:
    """The plan of a chain (``value`` first) that reads ``leaves``, or None if they are too many, or may change."""
    large = [n for n in leaves if _SMALL * bytes_of(n) >= bytes_of(value)]
    if len(large) > 1 or any(_width(n) > _width(value) for n in large):
        return None
    if any(info(n).phase is not Phase.FORWARD for n in leaves):
        return None
    missing = list(dict.fromkeys(base_of(n) for n in leaves if not kept.has(n)))
    if any(n.op != "call_function" or not isinstance(n.meta["val"], torch.Tensor) for n in missing):
        return None
    return _Plan(chain[::-1], missing)


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node is a view, a cast on its device, or arithmetic."""
    if node.op != "call_function":
        return False
    if node.target is aten._to_copy.default:
        operand = node.args[0]
        return isinstance(operand, fx.Node) and operand.meta["val"].device == node.meta["val"].device
    return node.target in _ARITHMETIC or shared_operand(node) is not None


def _needs_memory(value: fx.Node) -> fx.Node | None:
    """A reader in backward that is not fused with what it reads; None if there is none."""
    stack, seen = list(late_readers(value)), set[fx.Node]()
    while stack:
        reader = stack.pop()
        if reader in seen:
            continue
        seen.add(reader)
        if shared_operand(reader) is not None:
            stack += [user for user in reader.users if user.op == "call_function"]
            if any(user.op == "output" for user in reader.users):
                return reader
        elif not (isinstance(reader.target, OpOverload) and _is_fused(reader.target)):
            return reader
    return None


def _is_fused(target: OpOverload) -> bool:
    return target in _FUSED or torch.Tag.pointwise in target.tags


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].element_size())
