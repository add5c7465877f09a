"""Gradients of LayerNorm and RMSNorm on CPU: our one sweep or Inductor's two kernels, as a measurement here says.

Ours is measured against PyTorch's LayerNorm, which takes no compilation and keeps the column sums in a buffer as ours
does. RMSNorm's, and LayerNorm's of 16 bits, stay with Inductor unless asked for: with our two-step column sums its
kernels were measured at least as fast as ours (figures: docs/cpu_kernels.md).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dscompile.codegen.cpu.choice import Choice, gain
from dscompile.codegen.cpu.rms_norms import RmsNorm, rms_norms
from dscompile.config import Config
from dscompile.norm_ops import norm_kernel, takes
from dscompile.torch_compat import free_symbol_names, no_autocast, no_modes

aten = torch.ops.aten

SMALLEST = 1 << 18
"""Below this many elements there is little to gain, and the kernel is not worth building."""

MOST_ROWS = 4096
"""Longer inputs are measured at this many rows: the ratio no longer changes."""

GAIN = 1.05
"""How much faster the kernel must be for ``auto`` to choose it."""


def choose_norms(module: fx.GraphModule, config: Config) -> list[str]:
    """Replace norms' backwards in a region's module by ours where that is chosen; what was chosen, and why."""
    choices: list[str] = []
    for node in module.graph.find_nodes(op="call_function", target=aten.native_layer_norm_backward.default):
        choice = _layer_norm_choice(node, config.norm_backward)
        shape = list(node.args[1].meta["val"].shape)
        name = "our kernel" if choice.kernel else "Inductor"
        if choice.kernel:
            name += _replace(node)
        choices.append(f"norm backward {shape}: {name} ({choice.reason})")
    for norm in rms_norms(module.graph):
        given = [norm.grad, norm.x, norm.rstd, norm.weight]
        choice = _choice(given, config.norm_backward, rms=True)
        name = "our kernel" if choice.kernel else "Inductor"
        if choice.kernel:
            name += _replace_rms_norm(norm)
        choices.append(f"RMS norm backward {list(norm.x.meta['val'].shape)}: {name} ({choice.reason})")
    module.recompile()
    return choices


def _layer_norm_choice(node: fx.Node, option: str) -> Choice:
    grad, x, _, mean, rstd, weight, bias, mask = node.args
    if option != "inductor" and (not all(mask) or weight is None or bias is None):  # type: ignore[arg-type]
        return Choice(False, "not all three gradients are wanted")
    return _choice([grad, x, mean, rstd, weight], option)


def _choice(given: list[Any], option: str, *, rms: bool = False) -> Choice:
    """``given``: the nodes of gradient, input, statistics and weight."""
    if option == "inductor":
        return Choice(False, "norm_backward='inductor'")
    values: list[Tensor] = [node.meta["val"] for node in given]
    if not takes(v.dtype for v in values) or any(v.device.type != "cpu" for v in values):
        return Choice(False, "its values are not all of 32 or 16 bits on the CPU")
    if free_symbol_names(values):
        return Choice(False, "its shape is symbolic")
    if not values[1].numel():
        return Choice(False, "it is empty")
    reason = norm_kernel()[1]
    if reason:
        return Choice(False, reason)
    if option == "kernel":
        return Choice(True, "norm_backward='kernel'")
    if rms or values[1].dtype is not torch.float32:
        what = "RMSNorm" if rms else "LayerNorm of 16 bits"
        return Choice(False, f"Inductor's kernels for {what}, with our column sums, were measured at least as fast")
    if values[1].numel() < SMALLEST:
        return Choice(False, f"fewer than {SMALLEST} elements")
    columns = values[-1].numel()
    measured = _gain(min(values[1].numel() // columns, MOST_ROWS), columns, torch.get_num_threads())
    return Choice(measured >= GAIN, f"the kernel runs at {measured:.2f} x the speed of PyTorch's LayerNorm")


def _replace(node: fx.Node) -> str:
    """Put our operator in the node's place, with the addition that follows where it can; says so."""
    grad, x, _, mean, rstd, weight, _, _ = node.args
    parts = {user.args[1]: user for user in node.users}
    added = _addition(node, parts.get(0))
    residual = None
    if added is not None:
        residual = next(n for n in added.all_input_nodes if n is not parts[0])
    with node.graph.inserting_before(node):
        target = torch.ops.dscompile.layer_norm_backward.default
        new = node.graph.call_function(target, (grad, x, mean, rstd, weight, residual))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, propagate_meta=False)
    node.graph.erase_node(node)
    if added is None:
        return ""
    added.replace_all_uses_with(parts[0], propagate_meta=False)
    node.graph.erase_node(added)
    return " with the residual's gradient"


def _replace_rms_norm(norm: RmsNorm) -> str:
    """Put our operator where the first of both gradients is needed, with the residual's where it is known by then."""
    graph, place = norm.dx.graph, min(norm.dx, norm.dweight)
    _move_before(place, [norm.grad, norm.x, norm.rstd, norm.weight, norm.normal])
    taken = norm.residual if norm.residual is not None and norm.residual < place else None
    value, wanted = norm.dx.meta["val"], norm.dweight.meta["val"]
    with graph.inserting_before(place):
        target = torch.ops.dscompile.rms_norm_backward.default
        given = (norm.grad, norm.x, norm.rstd, norm.weight, norm.normal, taken)
        both = graph.call_function(target, given, {"dtype": value.dtype})
        dx, dweight = (graph.call_function(operator.getitem, (both, part)) for part in range(2))
        down = graph.call_function(aten.view.default, (dweight, list(wanted.shape)))
        dweight.meta["val"] = norm.weight.meta["val"].float()
        down.meta["val"] = wanted.float()
        if wanted.dtype is not torch.float32:
            down = graph.call_function(aten._to_copy.default, (down,), {"dtype": wanted.dtype})
            down.meta["val"] = wanted
    both.meta["val"], dx.meta["val"] = (value, dweight.meta["val"]), value
    if norm.residual is not None and taken is None:
        with graph.inserting_before(norm.dx):
            dx = graph.call_function(aten.add.Tensor, (norm.residual, dx))
            dx.meta["val"] = value
    norm.dx.replace_all_uses_with(dx, propagate_meta=False)
    norm.dweight.replace_all_uses_with(down, propagate_meta=False)
    unused = [norm.dx, norm.dweight]
    while unused:  # what is above them up to the operator's operands, which it uses: products and sums, all pure
        node = unused.pop()
        if not node.users and node.op == "call_function":
            operands = node.all_input_nodes
            graph.erase_node(node)
            unused += [n for n in operands if n not in unused]
    return " with the residual's gradient" if taken is not None else ""


def _move_before(place: fx.Node, nodes: Sequence[fx.Node | None]) -> None:
    """Move nodes, and what they need, before ``place``, on which they do not depend: views that come late."""
    for node in nodes:
        if node is not None and place < node:
            _move_before(place, node.all_input_nodes)
            place.prepend(node)


def _addition(node: fx.Node, dx: fx.Node | None) -> fx.Node | None:
    """The addition of another gradient of the same shape, known before the norm's, to the norm's; or None."""
    if dx is None or len(dx.users) != 1:
        return None
    (user,) = dx.users
    if user.target is not aten.add.Tensor or user.kwargs or len(user.all_input_nodes) != 2:
        return None
    (other,) = [n for n in user.all_input_nodes if n is not dx]
    one, two = dx.meta["val"], other.meta["val"]
    same = isinstance(two, Tensor) and one.shape == two.shape and one.dtype is two.dtype and one.device == two.device
    return user if same and other < node else None


@functools.cache
def _gain(rows: int, columns: int, threads: int) -> float:
    """The kernel's speed over PyTorch's, with a residual added; ``threads`` is part of what was measured."""
    kernel = norm_kernel()[0]
    assert kernel is not None, "norm_kernel() gave no reason against it"
    generator = torch.Generator().manual_seed(0)
    with no_modes(), torch.no_grad(), no_autocast():
        grad, x, residual = (torch.randn(rows, columns, generator=generator) for _ in range(3))
        mean, rstd, weight = torch.zeros(rows, 1), torch.ones(rows, 1), torch.ones(columns)

        def theirs() -> Tensor:
            arguments = (grad, x, [columns], mean, rstd, weight, weight, [True, True, True])
            total: Tensor = aten.native_layer_norm_backward.default(*arguments)[0] + residual
            return total

        return gain(theirs, lambda: kernel.layer_norm(grad, x, mean, rstd, weight, residual))
