"""Whole steps of an engine: a window of micro-batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dscompile.engine.answers import Answers
from dscompile.engine.data import Loader, RepeatingLoader
from dscompile.engine.one_program import OneProgram
from dscompile.engine.outputs import call_with, loss_in, moved
from dscompile.engine.window import Window
from dscompile.errors import RunError


class WholeSteps(Answers):
    """Training and evaluation by windows, over what a micro-batch's methods do."""

    module: nn.Module
    window: Window
    training_dataloader: Loader | None
    one_program: OneProgram

    def __init__(self) -> None:
        super().__init__()
        self._repeating: Iterator[Any] | None = None
        self._too_many: Tensor | None = None

    def backward(self, loss: Tensor) -> Tensor:
        """Backward of one micro-batch's loss."""
        raise NotImplementedError

    def step(self) -> None:
        """End a micro-batch."""
        raise NotImplementedError

    def train_batch(
        self, data_iter: Iterator[Any] | None = None, loss_fn: Callable[[Any, Any], Tensor] | None = None
    ) -> Tensor:
        """One optimizer step on the next micro-batches: forward, backward and step for each of a window's.

        Args:
            data_iter: yields micro-batches: a mapping or sequence of the model's arguments, or its one argument; by
                default the training loader, again and again.
            loss_fn: then micro-batches are (inputs, labels) and the loss is ``loss_fn(model(inputs), labels)``; by
                default the model's attribute ``loss_fn``, or the model returns the loss.

        Returns:
            the mean loss over micro-batches and ranks, detached.

        Raises:
            RunError: in the middle of a window, no data, or an iterator that ends too early.
        """
        if self.window.done:
            raise RunError(
                f"train_batch() after {self.window.done} of {self.window.size} micro-batches of a window; finish it "
                "with engine.step()."
            )
        if self._too_many is not None and self._too_many:  # of the last window, so that no device is waited for
            self.one_program.give_up()
        self.module.train()
        total = torch.zeros((), device=self.device)
        loss_fn = self._loss_function(loss_fn)
        for batch in self._micro_batches(data_iter, pairs=loss_fn is not None):
            loss = self._as_one_program(batch, loss_fn)
            if loss is None:
                loss = self._loss_of(batch, loss_fn)
                self.backward(loss)
            self.step()
            total += loss.detach().float() / self.window.size
        found = self._mean(total, torch.full_like(total, self.one_program.too_many))
        self._too_many = found[1]
        return found[0]

    def _as_one_program(self, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor | None:
        """Forward and backward of a micro-batch at once; None, and nothing ran, where that cannot be."""
        raise NotImplementedError

    @torch.no_grad()
    def eval_batch(
        self, data_iter: Iterator[Any] | None = None, loss_fn: Callable[[Any, Any], Tensor] | None = None
    ) -> Tensor:
        """The mean loss of a window of micro-batches, over ranks, in evaluation mode; see :meth:`train_batch`."""
        training = self.module.training
        self.module.eval()
        try:
            total = torch.zeros((), device=self.device)
            loss_fn = self._loss_function(loss_fn)
            for batch in self._micro_batches(data_iter, pairs=loss_fn is not None):
                total += self._loss_of(batch, loss_fn).float() / self.window.size
        finally:
            self.module.train(training)
        return self._mean(total)[0]

    def _loss_function(self, given: Callable[[Any, Any], Tensor] | None) -> Callable[[Any, Any], Tensor] | None:
        return given if given is not None else getattr(self.module, "loss_fn", None)

    def _loss_of(self, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None) -> Tensor:
        """A micro-batch's loss through the engine's forward pass."""
        if loss_fn is None:
            return loss_in(call_with(self, batch))
        inputs, labels = batch
        return loss_in(loss_fn(self(inputs), labels))

    def _micro_batches(self, data_iter: Iterator[Any] | None, *, pairs: bool) -> Iterator[Any]:
        """A window's micro-batches, on the device; ``pairs``: each must be (inputs, labels)."""
        source = self._batches() if data_iter is None else data_iter
        if not hasattr(source, "__next__"):
            raise RunError(
                f"data_iter: {type(source).__name__} is no iterator, so it would begin anew; pass iter(...)."
            )
        for index in range(self.window.size):
            try:
                batch = next(source)
            except StopIteration:
                raise RunError(
                    f"the data ended after {index} of {self.window.size} micro-batches; give an iterator that repeats "
                    "(dscompile.RepeatingLoader), or stop one step earlier."
                ) from None
            if pairs and not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise RunError(f"with a loss_fn a micro-batch is a pair (inputs, labels), got {_kind(batch)}.")
            yield moved(batch, self.device)

    def _batches(self) -> Iterator[Any]:
        if self.training_dataloader is None:
            raise RunError("no data: pass data_iter=, or training_data= to initialize().")
        if self._repeating is None:
            self._repeating = iter(RepeatingLoader(self.training_dataloader))
        return self._repeating

    def _mean(self, *values: Tensor) -> Tensor:
        """The mean of scalars over the ranks, by one collective."""
        together = torch.stack(values)
        if self.world_size > 1:
            dist.all_reduce(together)
        return together / self.world_size


def _kind(batch: Any) -> str:
    """What a micro-batch is, for a message."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    return f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
