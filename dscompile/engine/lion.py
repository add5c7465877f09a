"""Lion: a sign update with two averages. PyTorch has none, DeepSpeed does.

Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dscompile.engine.local_parts import local_parts
from dscompile.errors import ConfigError


class Lion(Optimizer):
    """``x = x * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)``, then ``m`` moves with ``beta2``.

    Elementwise, so it runs on shards as it does on whole parameters. Keeps one average a parameter, of its dtype.

    Raises:
        ConfigError: a value outside its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"Lion: lr and weight_decay must not be negative and betas lie in [0, 1); got lr {lr}, "
                f"weight_decay {weight_decay}, betas {tuple(betas)}."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss.

        Raises:
            UnsupportedError: a sparse gradient, or one that is not placed as its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
            for param in cast(list[Tensor], group["params"]):
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                value, grad, average = local_parts("Lion", (param, param.grad, state["exp_avg"]))
                update = average.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
                if decay:
                    value.mul_(1 - lr * decay)
                value.add_(update, alpha=-lr)
                average.mul_(beta2).add_(grad, alpha=1 - beta2)
                torch.autograd.graph.increment_version(param)
        return loss
