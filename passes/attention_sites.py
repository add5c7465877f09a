"""The attentions of a graph that are ``scaled_dot_product_attention``: where they are, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.attention_ops import DTYPES, HEAD_STEP
from dscompile.effects import argument
from dscompile.passes.attention_mask import Mask, UnknownMaskError, understand
from dscompile.passes.attention_sources import CROSS, Sources
from dscompile.torch_compat import OpOverload

aten = torch.ops.aten

BACKWARDS: dict[OpOverload, OpOverload] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    ),
    aten._scaled_dot_product_flash_attention.default: aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention.default: aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention.default: aten._scaled_dot_product_cudnn_attention_backward.default,
}
"""What ``scaled_dot_product_attention`` becomes on CPUs and GPUs. All begin with q, k, v, and return output and
logsumexp first; their backwards begin with the gradient, q, k, v and return those three gradients first."""

_FUSED = ("transformer_encoder_layer_fwd", "native_multi_head_attention")
_OTHERS = ("scaled_dot_product", "efficient_attention", "flash_attention", "flex_attention", *_FUSED)


class RefusedError(Exception):
    """Why an attention stays dense."""


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of the model: its two halves and what they say."""

    forward: fx.Node
    backward: fx.Node | None
    heads: int
    seq: int | torch.SymInt
    mask: Mask
    scale: float


def is_attention(node: fx.Node) -> bool:
    """Whether a node is the forward of an attention operator, one known here or not."""
    name = str(getattr(node.target, "__name__", node.target))
    return node.op == "call_function" and any(part in name for part in _OTHERS) and "backward" not in name


def read(node: fx.Node, sources: Sources) -> Site:
    """What an attention node says; raises :class:`RefusedError` for what the block-sparse operator cannot say."""
    if node.target not in BACKWARDS:
        name = str(node.target) if isinstance(node.target, OpOverload) else str(getattr(node.target, "__name__", ""))
        if any(part in name for part in _FUSED):
            raise RefusedError(
                f"{name}, PyTorch's fast path of inference, hides its attention; call "
                "torch.backends.mha.set_fastpath_enabled(False) before the model is compiled"
            )
        raise RefusedError(f"{name} is not known here; known is scaled_dot_product_attention")
    q, k, v = (operand.meta["val"] for operand in node.args[:3])  # type: ignore[union-attr]
    shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
    if q.shape[2:] != k.shape[2:] or k.shape[1:] != v.shape[1:]:
        raise RefusedError(f"not the attention of a sequence to itself: q, k, v are {shapes}")
    if not all(type(size) is int for size in (q.shape[1], q.shape[3], k.shape[1])):
        raise RefusedError(f"heads or head size are symbolic ({list(q.shape)}); compile with dynamic=False")
    if q.shape[1] % k.shape[1]:
        raise RefusedError(f"the heads of k and v do not divide those of q: q, k, v are {shapes}")
    if sources.cross(*node.args[:2]):  # type: ignore[arg-type]
        raise RefusedError(CROSS)
    if q.dtype not in DTYPES:
        raise RefusedError(f"dtype {q.dtype}")
    if q.shape[3] % HEAD_STEP:
        raise RefusedError(f"head size {q.shape[3]} is no multiple of {HEAD_STEP}")
    if named(node, "dropout_p", 0.0) != 0:
        raise RefusedError("dropout inside attention")
    mask = _mask(node, q.shape[2])
    given = node.kwargs.get("scale")
    scale = q.shape[3] ** -0.5 if given is None else float(given)  # type: ignore[arg-type]
    if not scale > 0:
        raise RefusedError(f"the scale {scale} is not positive; scale the queries instead")
    return Site(node, _backward_of(node), q.shape[1], q.shape[2], mask, scale)


def _mask(node: fx.Node, seq: int | torch.SymInt) -> Mask:
    causal = bool(named(node, "is_causal", False))
    given = named(node, "attn_mask") or named(node, "attn_bias")
    if not isinstance(given, fx.Node):
        return Mask(causal, ())
    try:
        found = understand(given, seq)
    except UnknownMaskError as error:
        raise RefusedError(str(error)) from None
    return Mask(causal or found.causal, found.padding)


def named(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an attention operator by its name, in whatever place the operator has it."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return argument(node, names.index(name), name, default) if name in names else default


def _backward_of(node: fx.Node) -> fx.Node | None:
    """The backward that belongs to a forward: the one reader of all that it keeps for it, the logsumexp first."""
    readers = {reader for result in node.users if result.args[1] != 0 for reader in result.users}
    if not readers:
        return None
    (first, *more) = readers
    if more or first.target is not BACKWARDS[node.target]:  # type: ignore[index]
        raise RefusedError("the logsumexp of the attention is read by something else than one backward")
    if [_base(a) for a in first.args[1:4]] != [_base(a) for a in node.args[:3]]:
        raise RefusedError("its backward reads other operands than its forward")
    if any(result.args[1] == 3 and result.users for result in first.users):
        raise RefusedError("the gradient of its mask is wanted")
    return first


def _base(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in (aten.detach.default, aten.alias.default):
        value = value.args[0]
    return value
