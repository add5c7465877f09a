"""LayerNorm's gradients on CPU: our one sweep or Inductor's two kernels, as a measurement on this machine says.

Inductor's kernels are never faster than PyTorch's own, which keeps the column sums in a buffer as ours does; so ours is
measured against PyTorch's, which takes no compilation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx

from dscompile.codegen.cpu.choice import Choice, gain
from dscompile.config import Config
from dscompile.norm_ops import norm_kernel
from dscompile.torch_compat import free_symbol_names, no_autocast, no_modes

aten = torch.ops.aten

SMALLEST = 1 << 18
"""Below this many elements there is little to gain, and the kernel is not worth building."""

MOST_ROWS = 4096
"""Longer inputs are measured at this many rows: the ratio no longer changes."""

GAIN = 1.05
"""How much faster the kernel must be for ``auto`` to choose it."""


def choose_norms(module: fx.GraphModule, config: Config) -> list[str]:
    """Replace LayerNorm's backward in a region's module by ours where that is chosen; what was chosen, and why."""
    choices: list[str] = []
    for node in module.graph.find_nodes(op="call_function", target=aten.native_layer_norm_backward.default):
        choice = _choice(node, config.norm_backward)
        shape = list(node.args[1].meta["val"].shape)
        name = "our kernel" if choice.kernel else "Inductor"
        if choice.kernel:
            name += _replace(node)
        choices.append(f"norm backward {shape}: {name} ({choice.reason})")
    module.recompile()
    return choices


def _choice(node: fx.Node, option: str) -> Choice:
    if option == "inductor":
        return Choice(False, "norm_backward='inductor'")
    grad, x, _, mean, rstd, weight, bias, mask = node.args
    if not all(mask) or weight is None or bias is None:  # type: ignore[arg-type]
        return Choice(False, "not all three gradients are wanted")
    values: list[Tensor] = [n.meta["val"] for n in (grad, x, mean, rstd, weight)]  # type: ignore[union-attr]
    if any(v.dtype is not torch.float32 or v.device.type != "cpu" for v in values):
        return Choice(False, "its values are not all fp32 on the CPU")
    if free_symbol_names(values):
        return Choice(False, "its shape is symbolic")
    if not values[1].numel():
        return Choice(False, "it is empty")
    reason = norm_kernel()[1]
    if reason:
        return Choice(False, reason)
    if option == "kernel":
        return Choice(True, "norm_backward='kernel'")
    if values[1].numel() < SMALLEST:
        return Choice(False, f"fewer than {SMALLEST} elements")
    columns = values[4].numel()
    measured = _gain(min(values[1].numel() // columns, MOST_ROWS), columns, torch.get_num_threads())
    return Choice(measured >= GAIN, f"the kernel runs at {measured:.2f} x the speed of PyTorch's")


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

        return gain(theirs, lambda: kernel(grad, x, mean, rstd, weight, residual))
