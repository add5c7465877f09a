"""Decompositions that replace Inductor's own where those write memory for nothing, are slow, or are wrong.

A decomposition here gives bit for bit the values of the one it replaces; those of :mod:`.activations` are as accurate,
and :func:`sum_columns` adds in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.codegen import activations
from dscompile.torch_compat import OpOverload

_MEAN = 1  # at::Reduction::Mean


def nll_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """Gradient of ``nll_loss`` (and ``nll_loss2d``) to its log-probabilities, one pointwise expression.

    Inductor's decomposition scatters -1 into a buffer of zeros as large as the log-probabilities, writing and reading
    it from memory. Comparing each class index to the target gives the same values inside whatever kernel reads them.

    Args:
        grad_output: ``[]``, or the target's shape if ``reduction`` is 0.
        self: log-probabilities ``[C]``, ``[N, C]`` or ``[N, C, H, W]``; only the shape and dtype count.
        target: int64 class indices, the same shape without ``C``.
        weight: ``[C]`` or None.
        reduction: 0 none, 1 mean, 2 sum.
        ignore_index: the target value that has no gradient.
        total_weight: ``[]``, the weights summed over the targets.
    """
    chosen, gradients = _chosen(grad_output, self, target, reduction, ignore_index, total_weight)
    if weight is not None:
        shape = [1] * self.dim()
        shape[_channel(self)] = -1
        gradients = gradients * weight.view(shape)
    return chosen * gradients


def _channel(scores: Tensor) -> int:
    """The dimension of classes."""
    return 0 if scores.dim() < 2 else 1


def _chosen(
    grad_output: Tensor, self: Tensor, target: Tensor, reduction: int, ignore_index: int, total_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """-1 at each target's class, else 0; and each target's gradient without weights, 0 where it is ignored."""
    channel = _channel(self)
    if reduction == _MEAN:
        grad_output = grad_output / total_weight
    if self.dim() == 1 and target.dim() > 0:
        target = target[0]
    target = target.unsqueeze(channel)
    shape = [1] * self.dim()
    shape[channel] = self.shape[channel]
    classes = torch.arange(self.shape[channel], device=self.device).view(shape)
    used = target != ignore_index
    chosen = torch.where(torch.where(used, target, 0) == classes, -1.0, 0.0).to(self.dtype)
    if self.dim() > grad_output.dim() > 0:
        grad_output = grad_output.unsqueeze(channel)
    return chosen, torch.where(used, grad_output, 0)


def cross_entropy_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    """Gradient of an unweighted ``nll_loss`` of a log-softmax to that one's input.

    The gradient of ``nll_loss`` sums to minus each target's gradient over classes, exactly, since all others are 0:
    nothing has to be added up. The arguments are those of :func:`nll_loss_backward`; ``self`` is the log-softmax.
    """
    chosen, gradients = _chosen(grad_output, self, target, reduction, ignore_index, total_weight)
    return chosen * gradients + torch.exp(self) * gradients


def join_cross_entropy(module: fx.GraphModule) -> None:
    """Put :func:`cross_entropy_backward` in the place of the two gradients that it joins, in a region's module."""
    aten = torch.ops.aten
    for node in module.graph.find_nodes(op="call_function", target=aten._log_softmax_backward_data.default):
        loss, output, dim, dtype = node.args
        if not isinstance(loss, fx.Node) or loss.target not in _NLL_BACKWARD or list(loss.users) != [node]:
            continue
        value: Tensor = output.meta["val"]
        grad, scores, target, weight, *rest = loss.args
        same = value.dtype is dtype and dtype in (torch.float32, torch.float64)
        if not same or scores is not output or weight is not None or dim % value.dim() != _channel(value):
            continue
        with module.graph.inserting_before(node):
            joined = module.graph.call_function(cross_entropy_backward, (grad, scores, target, *rest))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        module.graph.erase_node(node)
        module.graph.erase_node(loss)
    module.recompile()


_NLL_BACKWARD = (torch.ops.aten.nll_loss_backward.default, torch.ops.aten.nll_loss2d_backward.default)


def index_put(
    self: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Any:  # a Tensor, or NotImplemented
    """``index_put`` of one value under a boolean mask, as a ``where``; any other form is left to Inductor.

    Inductor 2.13 makes the masked form happen in place if ``self`` has no later reader, by giving the buffer's box the
    masked values; an earlier matrix product that reads ``self`` through a transposition then reads them too.

    Args:
        self: ``[*M, *R]``.
        indices: one bool or uint8 mask ``[*M]``, or anything else.
        values: one element, or anything else.
        accumulate: add ``values`` instead of writing them.
        unsafe: indices need no check.
    """
    mask = indices[0]
    masked = len(indices) == 1 and mask is not None and mask.dtype in (torch.bool, torch.uint8)
    if not masked or values.numel() != 1 or values.device != self.device:
        return NotImplemented
    assert mask is not None
    value = values.reshape(())
    shape = (*mask.shape, *[1] * (self.dim() - mask.dim()))
    return torch.where(mask.bool().view(shape), self + value if accumulate else value, self)


_ROWS = 32
"""Rows that are added up at once: as many memory streams as the processor keeps up with."""

_LEAST = (128, 64)
"""Rows and columns below which a sum of columns is left alone."""


def sum_columns(
    self: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:  # a Tensor, or NotImplemented
    """The sum over the rows of an fp32 matrix on CPU, ``[R, C] -> [C]`` (``[1, C]``), in two steps; others are left.

    Inductor sums each group of 8 or 16 columns from the first row to the last: a cache line of each page, at a fifth of
    memory's speed. In groups of rows the lines are fetched ahead; and sums of sums round less.
    """
    least_rows, least_columns = _LEAST
    if self.dim() != 2 or dim not in ([0], [-2]) or self.dtype is not torch.float32 or self.device.type != "cpu":
        return NotImplemented
    rows, columns = self.shape
    if not isinstance(rows, int) or not isinstance(columns, int) or dtype not in (None, torch.float32):
        return NotImplemented
    if rows < least_rows or columns < least_columns or rows % _ROWS or not self.is_contiguous():
        return NotImplemented
    return self.view(rows // _ROWS, _ROWS, columns).sum(1).sum(0, keepdim=keepdim)


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """What to lay over Inductor's table."""
    aten = torch.ops.aten
    return {
        aten.nll_loss_backward.default: nll_loss_backward,
        aten.nll_loss2d_backward.default: nll_loss_backward,
        aten.sum.dim_IntList: sum_columns,
        aten.tanh.default: activations.tanh,
        aten.gelu.default: activations.gelu,
        aten.gelu_backward.default: activations.gelu_backward,
        aten.index_put.default: index_put,
        aten._unsafe_index_put.default: index_put,
    }
