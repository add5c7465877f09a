"""Gradient accumulation as the engine counts it: where in a window of micro-batches the training is.

Two ways of writing the loop share one count. With ``engine.step()`` after each micro-batch, as DeepSpeed's scripts do,
that call moves the window on. With PyTorch's own loop (``loss.backward()`` for each micro-batch, ``optimizer.step()``
after the last) the next forward pass does. The position decides whether a forward pass is compiled to reduce its
gradients; a wrong guess would cost bytes, never gradients.
"""

from __future__ import annotations

from dscompile.errors import RunError


class Window:
    """Position in a window of ``size`` micro-batches."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._passed = 0
        self._backward_ran = False
        self._forced: bool | None = None

    @property
    def done(self) -> int:
        """Micro-batches of this window whose backward pass has run."""
        return self._passed + self._backward_ran

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-batch is the window's last: its backward pass reduces, a step follows."""
        if self._forced is not None:
            return self._forced
        return self._passed + 1 >= self.size

    @property
    def open(self) -> bool:
        """Whether some micro-batches have run, but not all."""
        return 0 < self.done < self.size and self._forced is not True

    def force(self, boundary: bool | None) -> None:
        """Say whether the current micro-batch is the last one; None: by the count again."""
        self._forced = boundary

    def resize(self, size: int) -> None:
        """Change the number of micro-batches. Raises :class:`RunError` in the middle of a window."""
        if self.open:
            raise RunError(f"the accumulation window is open ({self.done} of {self.size}); change it between steps.")
        self.size = size

    def forward(self) -> None:
        """A forward pass of training begins."""
        if self._backward_ran and self.size > 1 and self.done < self.size:
            self._passed += 1
            self._backward_ran = False

    def backward(self) -> None:
        """A backward pass runs."""
        self._backward_ran = True

    def step(self) -> None:
        """``engine.step()`` ends the current micro-batch."""
        self._backward_ran = False
        self._passed = 0 if self.at_boundary else self._passed + 1

    def check_complete(self) -> None:
        """Raise :class:`RunError` for an optimizer step in the middle of the window."""
        if self._forced is True or self.done >= self.size:
            return
        raise RunError(
            f"optimizer.step() after {self.done} of {self.size} micro-batches: the gradients are those of a part of "
            "the batch. Call engine.step() after each micro-batch, or optimizer.step() after the last."
        )

    def reset(self) -> None:
        """An optimizer step was taken: a new window begins."""
        self._passed, self._backward_ran = 0, False
