"""The checkpoints of a ``dscompile train`` run: the engine's, the newest one kept, errors in the command's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dscompile.engine.checkpoint import SaveHandle, load_checkpoint, save_checkpoint
from dscompile.errors import CheckpointError, RunError
from dscompile.tools.run_dir import FREE_SPACE, RunDir


class Checkpoints:
    """Saves and loads one run's model and optimizer. Every rank calls every method; rank 0 removes what is replaced.

    Attributes:
        kept: the step of the newest checkpoint that is known to be complete; None if there is none.
    """

    def __init__(self, where: RunDir, model: nn.Module, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        self.kept: int | None = None
        self._where, self._model, self._optimizer, self._first = where, model, optimizer, first
        self._pending: tuple[int, SaveHandle] | None = None
        self._begun: int | None = None

    def load(self) -> int:
        """Load the newest one, at this number of ranks and ZeRO stage; returns its step.

        Raises:
            CheckpointError: on every rank: a damaged file, or another model. Nothing was changed.
        """
        loaded = load_checkpoint(self._where.checkpoints.absolute(), model=self._model, optimizer=self._optimizer)
        return int(loaded.state["step"])

    def has(self, step: int) -> bool:
        """Whether a save of this step was begun by this process."""
        return self._begun == step

    def save(self, step: int, state: Mapping[str, Any], *, asynchronous: bool) -> None:
        """Save a step. ``asynchronous`` returns at once; an error is raised by the next call then.

        Raises:
            RunError: on every rank: this save, or the one before, could not be written; the last complete one is kept.
        """
        self.settle()
        try:
            handle = save_checkpoint(
                # Rank 0's path counts, so it must not depend on where another rank was started.
                self._where.checkpoints.absolute(),
                f"step_{step}",
                model=self._model,
                optimizer=self._optimizer,
                state={**state, "step": step},
                asynchronous=asynchronous,
            )
        except CheckpointError as error:
            raise _unwritten(error) from error
        self._begun, self._pending = step, (step, handle)
        if not asynchronous:
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way, if there is one, and remove what it replaces. Raises as :meth:`save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, handle = pending
        try:
            handle.wait()
        except CheckpointError as error:
            raise _unwritten(error) from error
        self.kept = step
        if self._first:
            self._where.remove_all_but(handle.path.name)


def _unwritten(error: CheckpointError) -> RunError:
    return RunError(f"{error} {FREE_SPACE}")
