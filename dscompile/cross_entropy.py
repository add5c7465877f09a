"""Cross-entropy fused with the output projection: the logits of all tokens never exist at once.

``dscompile::linear_cross_entropy`` computes the loss of a few tokens at a time, and its backward computes their logits
again (after Wijmans et al., "Cut your losses in large-vocabulary language models", 2024, in plain PyTorch): four matrix
products for three, against memory that grows with tokens times vocabulary. Autocast does not reach inside: cast first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dscompile.errors import UnsupportedError

LOGITS = 1 << 23
"""Most logits that exist at once (32 MiB in fp32), if one token does not need more."""

_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, int ignore_index) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor lse, "
    "int ignore_index) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias), target)`` without the logits of all tokens.

    Args:
        hidden: ``[..., size]``, floating.
        weight: ``[vocabulary, size]``, the dtype of ``hidden``.
        target: int64 ``[...]``, class indices.
        bias: ``[vocabulary]`` or None.
        ignore_index: the target value that has no loss and no gradient.
        reduction: ``"mean"`` over the tokens that are not ignored (NaN if there are none, as in PyTorch), ``"sum"``, or
            ``"none"``.

    Returns:
        The loss, in fp32 (fp64 for fp64): ``[]``, or the shape of ``target`` for ``"none"``.

    Raises:
        UnsupportedError: shapes or dtypes that do not fit, or another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UnsupportedError(f"linear_cross_entropy: reduction {reduction!r}; expected 'mean', 'sum' or 'none'.")
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise UnsupportedError(
            f"linear_cross_entropy: target is {target.dtype} {list(target.shape)}; hidden {list(hidden.shape)} needs "
            f"torch.int64 {list(hidden.shape[:-1])}."
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.dtype != hidden.dtype:
        raise UnsupportedError(
            f"linear_cross_entropy: weight is {weight.dtype} {list(weight.shape)}; hidden is {hidden.dtype} with "
            f"{hidden.shape[-1]} elements. Expected [vocabulary, {hidden.shape[-1]}] in one dtype; cast them."
        )
    flat = target.reshape(-1)
    losses, _ = torch.ops.dscompile.linear_cross_entropy.default(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, flat, ignore_index
    )
    result: Tensor = losses
    if reduction == "none":
        return result.view(target.shape)
    return result.sum() if reduction == "sum" else result.sum() / (flat != ignore_index).sum()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, LOGITS // max(1, vocabulary))
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = (hidden @ weight.T).to(_wide(hidden))
    return logits if bias is None else logits.add_(bias)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    losses, lse = (hidden.new_empty(target.shape, dtype=_wide(hidden)) for _ in range(2))
    ignored = target == ignore_index
    classes = target.masked_fill(ignored, 0).unsqueeze(1)
    for part in _chunks(target.shape[0], weight.shape[0]):
        logits = _logits(hidden[part], weight, bias)
        chosen = logits.gather(1, classes[part]).squeeze(1)
        top = logits.amax(1, keepdim=True)
        lse[part] = logits.sub_(top).exp_().sum(1).log_().add_(top.squeeze(1))
        losses[part] = lse[part] - chosen
    return losses.masked_fill_(ignored, 0), lse


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    ignored = target == ignore_index
    classes = target.masked_fill(ignored, 0).unsqueeze(1)
    scale = grad.masked_fill(ignored, 0).unsqueeze(1)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=_wide(weight))
    d_bias = weight.new_zeros(0 if bias is None else weight.shape[0], dtype=_wide(weight))
    for part in _chunks(target.shape[0], weight.shape[0]):
        logits = _logits(hidden[part], weight, bias).sub_(lse[part].unsqueeze(1)).exp_()
        logits.scatter_add_(1, classes[part], logits.new_full((logits.shape[0], 1), -1.0)).mul_(scale[part])
        narrow = logits.to(hidden.dtype)
        d_hidden[part] = narrow @ weight
        if d_weight.dtype == hidden.dtype:
            d_weight.addmm_(narrow.T, hidden[part])
        else:
            d_weight += narrow.T @ hidden[part]
        if bias is not None:
            d_bias += logits.sum(0)
    return d_hidden, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


_LIBRARY.impl("linear_cross_entropy", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_cross_entropy_backward", _backward, "CompositeExplicitAutograd")


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(target.shape, dtype=_wide(hidden)), hidden.new_empty(target.shape, dtype=_wide(hidden))


def _backward_fake(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0, dtype=_wide(weight)) if bias is None else torch.empty_like(bias)
    return torch.empty_like(hidden), torch.empty_like(weight), d_bias


torch.library.register_fake("dscompile::linear_cross_entropy", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("dscompile::linear_cross_entropy_backward", _backward_fake, lib=_LIBRARY)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, target, ctx.ignore_index = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, bias, target, output[1])


def _derivative(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    bias = ctx.saved_tensors[2]
    d_hidden, d_weight, d_bias = torch.ops.dscompile.linear_cross_entropy_backward.default(
        grad, *ctx.saved_tensors, ctx.ignore_index
    )
    return d_hidden, d_weight, None if bias is None else d_bias, None, None


torch.library.register_autograd("dscompile::linear_cross_entropy", _derivative, setup_context=_setup, lib=_LIBRARY)
