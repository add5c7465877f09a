"""Gradient accumulation as the engine counts it: where in a window of micro-batches the training is.

Two ways of writing the loop are counted. With ``engine.step()`` after each micro-batch, as in DeepSpeed's scripts,
those calls count, however many backward passes each micro-batch has. With PyTorch's own loop (``loss.backward()`` for
each micro-batch, ``optimizer.step()`` after the last) backward passes count. Before its forward pass a micro-batch's
place is a guess in the second case; it decides only when gradients are reduced: a wrong guess costs bytes, never
gradients.
"""

from __future__ import annotations

from dscompile.errors import RunError


class Window:
    """Position in a window of ``size`` micro-batches."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._stepped = 0
        self._guessed = 0
        self._ran = False
        self._plain = False
        self._kinds: set[bool] = set()
        self._forced: bool | None = None

    @property
    def done(self) -> int:
        """Micro-batches of this window whose backward pass has run."""
        return max(self._stepped, self._guessed) + self._ran

    @property
    def at_boundary(self) -> bool:
        """Whether the current micro-batch seems to be the window's last: its backward pass reduces."""
        if self._forced is not None:
            return self._forced
        return max(self._stepped, self._guessed) + 1 >= self.size

    @property
    def step_is_due(self) -> bool:
        """Whether ``engine.step()`` must update the parameters now."""
        return self._stepped + 1 >= self.size if self._forced is None else self._forced

    @property
    def open(self) -> bool:
        """Whether some micro-batches have run, but not all."""
        return 0 < self.done < self.size and self._forced is not True

    def force(self, boundary: bool | None) -> None:
        """Say whether the current micro-batch is the last one; None: by the count again."""
        self._forced = boundary

    def resize(self, size: int) -> None:
        """Change the number of micro-batches. Raises :class:`RunError` in the middle of a window."""
        if self.done:
            raise RunError(f"the accumulation window is open ({self.done} of {self.size}); change it between steps.")
        self.size = size

    def forward(self) -> None:
        """A forward pass of training begins: without an ``engine.step()`` since, the next micro-batch's."""
        if self._ran and self._plain and self.done < self.size:
            self._guessed = self.done
            self._ran = False

    def backward(self, *, plain: bool) -> None:
        """A backward pass runs; ``plain``: not by ``engine.backward``, so that perhaps no ``engine.step()`` follows."""
        self._ran, self._plain = True, plain
        self._kinds.add(plain)

    @property
    def divisor(self) -> int:
        """What the window's gradients are still to be divided by: ``engine.backward`` has divided the loss already.

        Raises:
            RunError: both kinds of backward passes ran in a window of several micro-batches.
        """
        if self.size > 1 and len(self._kinds) > 1:
            raise RunError(
                "engine.backward(loss) and loss.backward() in one accumulation window: the first divides the loss by "
                "the number of micro-batches, the second does not; use one of them."
            )
        return self.size if True in self._kinds else 1

    def step(self) -> None:
        """``engine.step()`` ends a micro-batch that is not the last one."""
        self._stepped += 1
        self._guessed, self._ran = self._stepped, False

    def check_complete(self) -> None:
        """Raise :class:`RunError` for a plain optimizer step in the middle of the window."""
        if self._forced is True or self.size == 1 or self.done >= self.size:
            return
        raise RunError(
            f"optimizer.step() after {self.done} of {self.size} micro-batches: the gradients are those of a part of "
            "the batch. Call engine.step() after each micro-batch, or optimizer.step() after the last."
        )

    def reset(self) -> None:
        """An optimizer step was taken: a new window begins."""
        self._stepped, self._guessed, self._ran = 0, 0, False
        self._kinds.clear()
