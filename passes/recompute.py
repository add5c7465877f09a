"""Recompute cheap activations in backward instead of saving them: outputs of GELU, norms, attention's dropout. Bitwise.

DeepSpeed's transformer kernels drop the output of GELU (``gelu_checkpoint``), one side of a LayerNorm
(``normalize_invertible``) and what dropout left of attention's probabilities (``attn_dropout_checkpoint``), for BERT's
memory. Here that is a rewrite of the joint graph: a backward node that reads such an output reads a second computation
of it, from operands that are saved anyway, so the output itself need not be. Dropout is not drawn again: its mask is
saved, a byte for each probability, because its own backward reads it.

DeepSpeed's invertible norm keeps the output and divides by the weight to get the input back, which loses accuracy and
fails where a weight is 0. One side is as large as the other: here the *input* is kept and the output computed again,
the same bytes for the same bits, whatever the weight.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from dscompile.effects import dropout_scale, shared_operand
from dscompile.graph import Phase, StepGraph, info
from dscompile.manager import PassContext, graph_pass
from dscompile.passes.again import Kept, bytes_of, call_again, insert, rewrite
from dscompile.torch_compat import OpOverload

aten = torch.ops.aten

GELU = "gelu_checkpoint"
NORM = "normalize_invertible"
DROPOUT = "attn_dropout_checkpoint"

_POLICIES: dict[OpOverload, str] = {
    aten.gelu.default: GELU,
    aten.silu.default: GELU,
    aten.native_layer_norm.default: NORM,
    aten._fused_rms_norm.default: NORM,
}
"""The operators that a policy computes again, beside :data:`DROPOUT`'s."""

_SOFTMAXES = (aten._softmax.default, aten._safe_softmax.default)


@graph_pass("recompute", after={"canonicalise", "fuse_loss", "sparse_attention"}, optional=True)
def recompute(graph: StepGraph, ctx: PassContext) -> None:
    """Let backward compute the outputs that the ``recompute`` section names, if that saves bytes."""
    section = ctx.config.recompute
    policies = {name for name in (GELU, NORM, DROPOUT) if section is not None and getattr(section, name)}
    if not policies or not any(info(n).phase is Phase.BACKWARD for n in graph.nodes if n.op == "call_function"):
        return
    kept = Kept(graph)
    for value in kept.saved:
        plan = _plan(value, kept, policies)
        if plan is None:
            continue
        size = bytes_of(value)
        if plan.missing:
            names = ", ".join(f"%{node.name}" for node in plan.missing)
            ctx.decide(value, "saved", f"to compute it again, {names} would have to be saved instead", bytes=size)
        elif graph.edit("recompute", value, why=f"{plan.policy}: its operands are saved anyway"):
            ctx.decide(value, "recomputed", f"{plan.policy}: its operands are saved anyway", saved_bytes=size)
            rewrite(graph, value, plan.chain, _again)


@dataclass
class _Plan:
    """How to compute one saved value again.

    Attributes:
        policy: the option that asks for it.
        chain: the nodes to compute, operands first.
        missing: operands that backward does not have.
    """

    policy: str
    chain: list[fx.Node] = field(default_factory=list)
    missing: list[fx.Node] = field(default_factory=list)


def _plan(value: fx.Node, kept: Kept, policies: set[str]) -> _Plan | None:
    """The plan for one saved value; None if no policy speaks of it."""
    if not kept.frees(value):
        return None
    plan = _Plan("")
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if node is not value and kept.has(node):
            return
        policy = _policy(node)
        if policy not in policies and not _is_cast_or_view(node):
            plan.missing.append(node)
            return
        plan.policy = plan.policy or (policy or "")
        for operand in _dropped(node) or node.all_input_nodes:
            visit(operand)
        plan.chain.append(node)

    visit(value)
    return plan if plan.policy else None


def _policy(node: fx.Node) -> str | None:
    """The policy that computes ``node`` again; a part of an operator's results counts with the operator."""
    if node.target is operator.getitem:
        if _dropped(node):
            return DROPOUT
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        # a norm's statistics are what its backward starts from, and small
        return _named(source.target) if node.args[1] == 0 else None
    if _scales_norm(node):
        return NORM
    return _named(node.target)


def _dropped(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Probabilities and mask, if ``node`` is what dropout left of an attention's probabilities; else None.

    On CPUs alone: other kernels round the scale in their own way.
    """
    if node.target is not operator.getitem or node.args[1] != 0:
        return None
    draw = node.args[0]
    if not isinstance(draw, fx.Node) or draw.target is not aten.native_dropout.default:
        return None
    if len(draw.args) != 3 or dropout_scale(draw.args[1], draw.args[2], node.meta["val"].dtype) is None:
        return None
    given = draw.args[0]
    mask = next((user for user in draw.users if user.target is operator.getitem and user.args[1] == 1), None)
    if not isinstance(given, fx.Node) or mask is None or given.meta["val"].device.type != "cpu":
        return None
    return (given, mask) if _through(given).target in _SOFTMAXES else None


def _named(target: object) -> str | None:
    return _POLICIES.get(target) if isinstance(target, OpOverload) else None


def _scales_norm(node: fx.Node) -> bool:
    """Whether a product is ``x * rsqrt(..)`` of a norm that the model spells out, or that times its weight."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return False
    one, other = map(_through, node.all_input_nodes)
    if aten.rsqrt.default in (one.target, other.target):
        return True
    weighted = one if other.op == "placeholder" else other if one.op == "placeholder" else None
    return weighted is not None and _scales_norm(weighted)


def _through(node: fx.Node) -> fx.Node:
    while _is_cast_or_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_cast_or_view(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default or shared_operand(node) is not None


def _again(graph: StepGraph, before: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` a second time, in backward, before ``before``."""
    operands = _dropped(node)
    if operands is None:
        return call_again(graph, before, node, copies)
    given, mask = (copies.get(n, n) for n in operands)
    kept = insert(graph, before, aten.mul.Tensor, (given, mask), {}, node)
    _, rate, train = node.args[0].args  # type: ignore[union-attr]
    scale = dropout_scale(rate, train, node.meta["val"].dtype)
    return insert(graph, before, aten.mul.Scalar, (kept, scale), {}, node)
