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
from typing import Any

import torch
from torch import fx

from dscompile.effects import dropout_scale, shared_operand
from dscompile.graph import Phase, Role, StepGraph, annotate, info
from dscompile.manager import PassContext, graph_pass
from dscompile.split import saved_for_backward
from dscompile.torch_compat import OpOverload, tensor_bytes

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
    kept = _Kept(graph)
    for value in kept.saved:
        plan = _plan(value, kept, policies)
        if plan is None:
            continue
        size = _bytes(value)
        if plan.missing:
            names = ", ".join(f"%{node.name}" for node in plan.missing)
            ctx.decide(value, "saved", f"to compute it again, {names} would have to be saved instead", bytes=size)
        elif graph.edit("recompute", value, why=f"{plan.policy}: its operands are saved anyway"):
            ctx.decide(value, "recomputed", f"{plan.policy}: its operands are saved anyway", saved_bytes=size)
            _rewrite(graph, value, plan)


class _Kept:
    """What backward has at hand without the rewrite: graph inputs, and values saved for it."""

    def __init__(self, graph: StepGraph) -> None:
        self.saved = saved_for_backward(graph)[0]
        self._outputs = {v for v in graph.output_values() if isinstance(v, fx.Node)}
        self._at_hand = set(self.saved)

    def has(self, node: fx.Node) -> bool:
        """Whether backward has ``node`` or what it views."""
        while (base := shared_operand(node)) is not None:
            node = base
        return node.op in ("placeholder", "get_attr") or node in self._at_hand or info(node).role is Role.SYMBOL

    def frees(self, node: fx.Node) -> bool:
        """Whether dropping ``node`` frees its bytes: what the caller receives, or passed in, stays anyway."""
        return node.op == "call_function" and node not in self._outputs


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


def _plan(value: fx.Node, kept: _Kept, policies: set[str]) -> _Plan | None:
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


def _rewrite(graph: StepGraph, value: fx.Node, plan: _Plan) -> None:
    """Let every backward node that reads ``value``, or a view of it, read a computation in backward."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    forms = _forms(value)
    late = sorted(
        {u for form in forms for u in form.users if info(u).phase is Phase.BACKWARD and u.op == "call_function"},
        key=order.__getitem__,
    )
    copies: dict[fx.Node, fx.Node] = {}
    for node in plan.chain:
        copies[node] = _again(graph, late[0], node, copies)
    for form in sorted(forms - {value}, key=order.__getitem__):
        if any(info(user).phase is Phase.BACKWARD for user in _forms_users(form, forms)):
            copies[form] = _again(graph, late[0], form, copies)
    for reader in late:
        for operand in reader.all_input_nodes:
            if operand in copies and operand in forms:
                reader.replace_input_with(operand, copies[operand])
                graph.touched.add(reader)
    for form in forms & copies.keys():
        graph.refresh_views(copies[form])


def _again(graph: StepGraph, before: fx.Node, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """``node`` a second time, in backward, before ``before``."""
    operands = _dropped(node)
    if operands is not None:
        given, mask = (copies.get(n, n) for n in operands)
        kept = _insert(graph, before, aten.mul.Tensor, (given, mask), {}, node)
        _, rate, train = node.args[0].args  # type: ignore[union-attr]
        scale = dropout_scale(rate, train, node.meta["val"].dtype)
        return _insert(graph, before, aten.mul.Scalar, (kept, scale), {}, node)
    args = fx.map_arg(node.args, lambda n: copies.get(n, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: copies.get(n, n))
    return _insert(graph, before, node.target, args, dict(kwargs), node)


def _insert(
    graph: StepGraph, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node
) -> fx.Node:
    copy = graph.insert_call(before, target, args, kwargs, like=like)
    annotate(copy, phase=Phase.BACKWARD, role=info(like).role)
    return copy


def _forms(value: fx.Node) -> set[fx.Node]:
    """A value and its forward views, which are not saved but taken again."""
    found, stack = {value}, [value]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user not in found and info(user).phase is Phase.FORWARD and shared_operand(user) is current:
                found.add(user)
                stack.append(user)
    return found


def _forms_users(form: fx.Node, forms: set[fx.Node]) -> list[fx.Node]:
    """The users of a view and of the views of it."""
    found: list[fx.Node] = []
    stack = [form]
    while stack:
        for user in stack.pop().users:
            if user in forms:
                stack.append(user)
            else:
                found.append(user)
    return found


def _bytes(node: fx.Node) -> int:
    return tensor_bytes(node.meta["val"])
