"""Adam and AdamW on CPUs for 16-bit training: PyTorch's classes and states, with one sweep of C++ for the update.

PyTorch's refuse a gradient of 16 bits for a parameter of 32, so a whole fp32 gradient must be held beside the masters.
These take it as it was reduced, unscale and clip it while they read it, and write the 16-bit copy that the model reads,
where a rank holds all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from dscompile.engine.adam_kernel import AdamKernel, Hyper, Row, adam_kernel, fits
from dscompile.engine.local_parts import local_parts
from dscompile.errors import UnsupportedError
from dscompile.ops import REPLICATED
from dscompile.placement import mark_of
from dscompile.resident import set_fresh


class HostStep(torch.optim.Adam):
    """Adam's step by the kernel of :mod:`dscompile.engine.adam_kernel`.

    Attributes:
        gradient_factor: what the next step multiplies every gradient by; 1 again after it.
        stands_for: the class of PyTorch's whose states these are, as checkpoints name it.
    """

    gradient_factor: float = 1.0
    stands_for: str = "Adam"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's loss.

        Raises:
            UnsupportedError: a sparse gradient, one that is not placed as its parameter, tensors that the kernel cannot
                take (not contiguous, not fp32, not on a CPU), or a group that asks for another algorithm.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kernel = adam_kernel()
        if kernel is None:
            raise UnsupportedError("HostAdam: its C++ kernel could not be built; use torch.optim.AdamW.")
        factor, self.gradient_factor = self.gradient_factor, 1.0
        for group in self.param_groups:
            self._update(kernel, group, factor)
        return loss

    def _update(self, kernel: AdamKernel, group: dict[str, Any], factor: float) -> None:
        other = next((key for key in ("amsgrad", "maximize", "capturable", "differentiable") if group[key]), None)
        if other is not None:
            raise UnsupportedError(f"HostAdam has no {other}; use torch.optim.AdamW.")
        decay, decoupled = float(group["weight_decay"]), bool(group["decoupled_weight_decay"])
        beta1, beta2 = group["betas"]
        hyper = Hyper(float(beta1), float(beta2), float(group["eps"]), decay, decoupled or not decay)
        held = [param for param in cast(list[Tensor], group["params"]) if param.grad is not None]
        if not held:
            return
        rows = [self._row(param, float(group["lr"]), hyper) for param in held]
        kernel.step(rows, hyper, factor)
        for param, row in zip(held, rows, strict=True):  # written unseen by any version counter
            torch.autograd.graph.increment_version(param)
            if row.copy is not None:
                torch.autograd.graph.increment_version(row.copy)
                set_fresh(param)

    def _row(self, param: Tensor, rate: float, hyper: Hyper) -> Row:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["step"] += 1
        step = float(state["step"])
        tensors = (param, cast(Tensor, param.grad), state["exp_avg"], state["exp_avg_sq"])
        value, grad, average, square = local_parts("HostAdam", tensors)
        row = Row(
            (value, grad.contiguous(), average, square),
            _copy_of(param),
            rate / (1 - hyper.beta1**step),
            1 / math.sqrt(1 - hyper.beta2**step),
            1 - rate * hyper.decay,
        )
        if not fits(row):
            raise UnsupportedError(
                f"HostAdam: a parameter of shape {tuple(param.shape)}, {param.dtype}, with a gradient of {grad.dtype}: "
                'it takes contiguous fp32 parameters on CPUs; choose PyTorch\'s kernel with "fused": true.'
            )
        return row


def keep_reduced_gradients(optimizer: HostStep, accumulation: int) -> None:
    """Let autograd leave gradients in the dtype in which ranks reduced them, where that loses nothing.

    It would where several are added after their reduction (``reduce_micro_batches``), and on one rank, which adds up
    micro-batches in fp32 and reduces nothing.

    Args:
        optimizer: of masters that ``distribute`` placed.
        accumulation: micro-batches a step.
    """
    for param in (p for group in optimizer.param_groups for p in group["params"]):
        mark = mark_of(param)
        if mark is None or mark.spec.wire not in (torch.bfloat16, torch.float16) or not param.requires_grad:
            continue
        lossless = accumulation == 1 or (mark.spec.world > 1 and not mark.config.zero.reduce_micro_batches)
        param.grad_dtype = mark.spec.wire if lossless else param.dtype


def _copy_of(param: Tensor) -> Tensor | None:
    """The 16-bit copy that the model reads, if it exists and this rank's master is all of it."""
    mark = mark_of(param)
    if mark is None or not mark.spec.keeps_copy or (mark.spec.dim != REPLICATED and mark.spec.world > 1):
        return None
    return mark.copy if mark.copy is not None and mark.copy.is_contiguous() else None


class HostAdam(HostStep):
    """``torch.optim.Adam`` by the kernel."""


class HostAdamW(HostStep, torch.optim.AdamW):
    """``torch.optim.AdamW`` by the kernel."""

    stands_for = "AdamW"
