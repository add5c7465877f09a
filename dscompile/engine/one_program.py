"""``train_batch`` through the step entry: each micro-batch's forward and backward pass as one program.

Where a model cannot be one program, it runs as frames, on every rank alike: before a program runs for the first time,
all ranks compile theirs and agree that all could, and that the programs meet each other. A rank never falls back alone,
since the others would wait for it. Errors that are no refusals, a failed proof above all, are raised on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dscompile.engine.ds_config import EngineConfig
from dscompile.engine.outputs import call_with, loss_in
from dscompile.errors import RankError, RunError, ShardingError, UnsupportedError
from dscompile.report import GraphReport, announce
from dscompile.runtime.agree import signature
from dscompile.runtime.guarded import watch_of
from dscompile.runtime.watch import Watch
from dscompile.step_frame import StepFrame
from dscompile.world import DATA

LossFunction = Callable[[Any, Any], Tensor]

SWITCHED_OFF = "step_entry is off"
HOOKS = "the engine has module hooks, which see its forward pass"

MOST_PROGRAMS = 16
"""So many for one engine, and each step seems to need its own: a model that counts in Python, for instance."""

_BROKEN, _REFUSED, _HOOKED, _ABLE = range(4)
"""What a rank says when all agree; the least of them decides."""


def _loss(model: nn.Module, loss_fn: LossFunction | None, batch: Any) -> Tensor:
    """The loss of one micro-batch, as :meth:`WholeSteps.train_batch` says."""
    if loss_fn is None:
        return loss_in(call_with(model, batch))
    inputs, labels = batch
    return loss_in(loss_fn(model(inputs), labels))


class OneProgram:
    """The programs of an engine's micro-batches, and why there are none, if so.

    Attributes:
        refused: why micro-batches run as frames for good; ``""`` if they need not.
        reason: why the last one ran as frames; ``""`` if it ran as one program.
        runs: micro-batches that ran as one program.
        fallbacks: micro-batches that ran as frames, for whatever reason.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, world: int, device: torch.device) -> None:
        self.reason, self.runs, self.fallbacks = "", 0, 0
        self.refused = _why_not(config)
        self._world, self._device, self._config = world, device, config.compiler
        self._frame = StepFrame(model, _loss, config.compiler)
        self._agreed: set[Any] = set()
        self._reported: set[str] = {SWITCHED_OFF}  # the user's own wish is no news

    def run(
        self, loss_fn: LossFunction | None, batch: Any, *, hooked: bool, local: bool, scale: float, share: int
    ) -> Tensor | None:
        """Forward and backward of one micro-batch.

        Args:
            loss_fn: of the model's outputs and the labels, or None where the model returns its loss.
            batch: one micro-batch.
            hooked: whether there are hooks that want to see the engine's forward pass. As long as there are, on every
                rank, micro-batches run as frames.
            local: whether gradients are accumulated without reducing them. The caller opens ``no_sync``.
            scale: what gradients are multiplied by.
            share: what they are divided by.

        Returns:
            the loss, detached; None if nothing ran, because the micro-batch must run as frames.

        Raises:
            RankError: another rank failed to compile, or came to something else.
            RunError: this rank's later micro-batch cannot be one program, when the other ranks' may be.
            Exception: compilation failed for another reason than that the step cannot be one program.
        """
        reason = self._why_frames(loss_fn, batch, hooked, local)
        if not reason:
            try:
                loss = self._whole(loss_fn, batch, scale, share)
            except UnsupportedError as error:
                if self._frame.started:  # gradients may have been delivered: running frames would add them again
                    raise
                reason = self.refused = str(error)
            else:
                self.reason = ""
                self.runs += 1
                return loss
        self._count(reason)
        return None

    @property
    def too_many(self) -> bool:
        """Whether this rank has compiled so many programs that frames are better, which need fewer and may stop."""
        return not self.refused and self._frame.programs >= MOST_PROGRAMS

    def give_up(self) -> None:
        """Run frames from the next window on; on every rank, as all of them know that one had too many programs."""
        self.refused = self.refused or (
            f"a rank has compiled {MOST_PROGRAMS} programs, one for each new shape or number that the model depends on"
        )

    def _why_frames(self, loss_fn: LossFunction | None, batch: Any, hooked: bool, local: bool) -> str:
        """Why a micro-batch must run as frames; a collective where the answer is not known yet."""
        kind = getattr(loss_fn, "__code__", type(loss_fn)), local, hooked
        if not self.refused and kind not in self._agreed:
            self.refused = self._agree(loss_fn, batch, hooked)
            self._agreed.add(kind)
        return self.refused or (HOOKS if hooked else "")

    def _whole(self, loss_fn: LossFunction | None, batch: Any, scale: float, share: int) -> Tensor:
        """Run a micro-batch as one program. Alone, this process may meet a refusal for a new shape; a rank may not."""
        try:
            return self._frame(loss_fn, batch, scale=scale, share=share)
        except UnsupportedError as error:
            if self._world == 1 or self._frame.started:
                raise
            alone = RunError(
                f"train_batch: {error} It was one program before, and other ranks may still run theirs, so this "
                'rank cannot run it otherwise alone. Set "step_entry": false in the section "dscompile".'
            )
            self._tell(alone)
            raise alone from error
        except ShardingError:  # the same on every rank, and may be mended
            raise
        except Exception as error:
            if not self._frame.started:  # else its watch knows
                self._tell(error)
            raise

    def _agree(self, loss_fn: LossFunction | None, batch: Any, hooked: bool) -> str:
        """Compile, and find out whether every rank could; the reason to run as frames, if any. A collective."""
        state, mine, reason = _ABLE, 0, ""
        broken: Exception | None = None
        try:
            if hooked:
                state = _HOOKED
            else:
                code = self._frame.compile(loss_fn, batch)
                mine = int(signature(code.program.facts["collectives"])[:15] or "0", 16)
        except UnsupportedError as error:
            state, reason = _REFUSED, str(error)
        except Exception as error:  # raised below, when the other ranks know of it
            state, broken = _BROKEN, error
        (least, first), (most, last) = self._extremes(state, mine)
        if broken is not None:
            raise broken
        if least == _BROKEN:
            raise RankError(
                "train_batch: another rank failed to compile its forward and backward pass; its own error says why.",
                kind="raised",
            )
        if least == _REFUSED:
            return reason or "another rank's step cannot be one program (its own report says why)"
        if least != most:
            return "some ranks' engines have module hooks and others' have none"
        if first != last:
            return "the ranks' programs have different collectives; do they have the same loss and the same batches?"
        return ""

    def _extremes(self, *values: int) -> tuple[list[int], list[int]]:
        """The least and the greatest of each value over the ranks.

        Raises:
            RankError: another rank runs a program instead.
        """
        if self._world == 1:
            return list(values), list(values)
        both = torch.tensor([*values, *(-v for v in values)], device=self._device)
        watch = self._watch()
        with watch.call(_MEETING, "train_batch") if watch is not None else contextlib.nullcontext():
            dist.all_reduce(both, op=dist.ReduceOp.MIN)
        found = both.tolist()
        return found[: len(values)], [-v for v in found[len(values) :]]

    def _watch(self) -> Watch | None:
        return watch_of(DATA, self._config.rank_timeout)

    def _tell(self, error: Exception) -> None:
        """Let the ranks that wait in their programs know that this one does not come."""
        if self._world > 1 and (watch := self._watch()) is not None:
            watch.failed(error)

    def _count(self, reason: str) -> None:
        """Count a micro-batch that must run as frames, and report the reason once."""
        self.reason = reason
        self.fallbacks += 1
        if reason not in self._reported:
            self._reported.add(reason)
            summary = self._config.summary
            announce(GraphReport("train_batch", "runs as frames", fallbacks=[reason], summary=summary))


_MEETING = signature(["train_batch: all ranks agree whether a micro-batch runs as one program"])


def _why_not(config: EngineConfig) -> str:
    """Why an engine's micro-batches run as frames whatever the model; ``""`` if they need not."""
    if not config.compiler.step_entry:
        return SWITCHED_OFF
    if config.autocast is not None:
        return "autocast covers the model and not the loss"
    if config.logging.breakdown:
        return "wall_clock_breakdown times forward and backward apart"
    return ""
