"""Parameters that a script took from the model before it was distributed, and those that replaced them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dscompile.errors import ConfigError, ShardingError


class Replaced:
    """Finds what became of a parameter. Make it before ``distribute()``, ask it afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = dict(model.named_parameters(remove_duplicate=False))  # keeps them alive, so ids stay theirs
        self._names = {id(p): name for name, p in self._before.items()}

    def of(self, parameter: Tensor, where: str) -> nn.Parameter:
        """The model's parameter in the place of ``parameter``. Raises :class:`ConfigError` for one it never had."""
        name = self._names.get(id(parameter))
        if name is None:
            raise ConfigError(
                f"{where} has a parameter of shape {tuple(parameter.shape)} that is not the model's; pass parameters "
                "of the model that is given to initialize()."
            )
        return self._model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]]  # type: ignore[return-value]

    def groups(self, given: Iterable[Any], where: str) -> list[Any]:
        """Parameters, or groups of them, with each replaced."""
        result: list[Any] = []
        for item in given:
            if isinstance(item, dict):
                held = item.get("params", ())
                held = [held] if isinstance(held, Tensor) else list(held)
                result.append({**item, "params": [self.of(p, where) for p in held]})
            else:
                result.append(self.of(item, where))
        return result

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer that was made before update the new parameters.

        Raises:
            ShardingError: it has taken steps: its state has the old parameters' shapes.
        """
        if optimizer.state:
            raise ShardingError(
                f"the {type(optimizer).__name__} has taken steps before initialize(), and its state would be lost; "
                "make a new one, or load a checkpoint into the engine."
            )
        for group in optimizer.param_groups:
            group["params"] = [self.of(p, "the optimizer") for p in group["params"]]
