"""Loss scaling, and the end of a backward pass: unscale, measure, check and clip all gradients in one sweep.

::

    scaler = LossScaler.for_stage(3)                       # DeepSpeed's fp16 section, by its keys
    (loss * scaler.scale).backward()
    report = finish_gradients(model.parameters(), scale=scaler.scale, max_norm=1.0)
    if not scaler.update(report.overflow):                 # the same answer on every rank
        optimizer.step()
    optimizer.zero_grad()

DeepSpeed has two rules for a dynamic scale, and the same JSON gives two traces (read from its release 0.19.8,
``runtime/fp16/fused_optimizer.py`` and ``runtime/fp16/loss_scaler.py``; written anew here):

- ``"fused"``, at stage 0: every overflow halves the scale, which never falls below the minimum; ``hysteresis`` is
  ignored.
- ``"zero"``, at stages 1 to 3: the first ``hysteresis - 1`` overflows only skip the step; the next ones halve, and one
  at the minimum is an error. The allowance is restored when the scale grows, or, with ``consecutive_hysteresis``, by
  every step without overflow.

Both double after ``window`` further steps since the first one without overflow: at the step numbered ``window + 1`` of
a clean series, then every ``window`` steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dscompile.errors import ConfigError, RunError, UnsupportedError
from dscompile.ops import REPLICATED
from dscompile.placement import spec_of
from dscompile.torch_compat import local_of, process_group

_LOG = logging.getLogger(__name__)
_FACTOR = 2.0

Rule = Literal["fused", "zero"]


class LossScaler:
    """A loss scale that follows one of DeepSpeed's two rules, or stays as it is.

    Every rank has its own and feeds it the same overflows (:attr:`GradientReport.overflow`), so all stay equal.

    Args:
        rule: see the module's text.
        loss_scale: above 0, a static scale: an overflow still skips the step. 0: dynamic.
        initial_scale_power: the first dynamic scale is 2 to this power.
        loss_scale_window: steps without overflow between two doublings.
        hysteresis: overflows until the scale falls (rule ``"zero"``).
        consecutive_hysteresis: whether each step without overflow restores the allowance (rule ``"zero"``).
        min_loss_scale: the dynamic scale never falls below it.

    Raises:
        ConfigError: a value that no scale can have.
    """

    def __init__(
        self,
        rule: Rule = "zero",
        *,
        loss_scale: float = 0.0,
        initial_scale_power: int = 16,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
        min_loss_scale: float = 1.0,
    ) -> None:
        if rule not in ("fused", "zero"):
            raise ConfigError(f"loss scale rule {rule!r}: expected 'fused' (stage 0) or 'zero' (stages 1 to 3).")
        if not (math.isfinite(loss_scale) and loss_scale >= 0):
            raise ConfigError(f"fp16.loss_scale: {loss_scale!r} is no scale; use a positive number, or 0 for dynamic.")
        for key, value in (("loss_scale_window", loss_scale_window), ("hysteresis", hysteresis)):
            if value < 1:
                raise ConfigError(f"fp16.{key}: must be at least 1, got {value!r}.")
        if not (math.isfinite(min_loss_scale) and min_loss_scale > 0):
            raise ConfigError(f"fp16.min_loss_scale: must be a positive number, got {min_loss_scale!r}.")
        self.rule = rule
        self.dynamic = loss_scale == 0
        self.scale = float(loss_scale) if loss_scale else 2.0**initial_scale_power
        self._window = loss_scale_window
        self._hysteresis = hysteresis
        self._consecutive = consecutive_hysteresis
        self._min = float(min_loss_scale)
        self._left = hysteresis
        self._step = 0
        self._last_overflow = -1

    @classmethod
    def for_stage(cls, stage: int, **options: Any) -> LossScaler:
        """The scaler that DeepSpeed uses at a ZeRO stage; ``options`` are keys of its ``fp16`` section."""
        return cls("fused" if stage == 0 else "zero", **options)

    def update(self, overflow: bool) -> bool:
        """Take note of one step's gradients; returns whether the optimizer step must be skipped.

        Raises:
            RunError: rule ``"zero"``, an overflow at the minimum scale: the gradients themselves are not finite.
        """
        if self.dynamic:
            if overflow:
                self._shrink()
                self._last_overflow = self._step
            else:
                self._grow()
        if overflow:
            _LOG.info("gradients overflowed at step %d: step skipped, loss scale now %g", self._step, self.scale)
        self._step += 1
        return overflow

    def _shrink(self) -> None:
        if self.rule == "zero" and self._left > 1:
            self._left -= 1
            return
        if self.scale == self._min:
            text = f"gradients overflowed at the minimum loss scale of {self._min:g} (step {self._step})"
            if self.rule == "zero":
                raise RunError(
                    f"{text}: they are infinite or NaN whatever the scale. Lower the learning rate, look for a NaN in "
                    "the data, train in bf16, or lower fp16.min_loss_scale."
                )
            _LOG.warning("%s; every such step is skipped", text)
        self.scale = max(self.scale / _FACTOR, self._min)

    def _grow(self) -> None:
        if self._consecutive:
            self._left = self._hysteresis
        clean = self._step - self._last_overflow - 1
        if clean > 0 and clean % self._window == 0:
            self._left = self._hysteresis
            self.scale *= _FACTOR

    def state_dict(self) -> dict[str, Any]:
        """The position in the trace; the options are the configuration's."""
        return {
            "rule": self.rule,
            "dynamic": self.dynamic,
            "scale": self.scale,
            "hysteresis_left": self._left,
            "step": self._step,
            "last_overflow": self._last_overflow,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position. A static scale stays the configured one.

        A dynamic scale goes on from a position saved under the other rule too (the stage may change between runs).

        Raises:
            RunError: the state lacks an entry or holds a scale that is none.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise RunError(f"loss scaler state: no entry {missing[0]!r}; it was not saved by LossScaler.state_dict().")
        scale = float(state["scale"])
        if not (math.isfinite(scale) and scale > 0):
            raise RunError(f"loss scaler state: scale {scale!r} is not a positive number.")
        self._step, self._last_overflow = int(state["step"]), int(state["last_overflow"])
        if self.dynamic and state["dynamic"]:
            self.scale = max(scale, self._min)
            self._left = min(int(state["hysteresis_left"]), self._hysteresis)


# -- gradients -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientReport:
    """What one sweep over the gradients found; equal on every rank.

    Attributes:
        norm: L2 norm of all unscaled gradients before clipping, over all shards, each replicated parameter once.
        overflow: whether any gradient on any rank is infinite or NaN. The gradients are untouched then: skip the step.
        clip_coefficient: what clipping multiplies the unscaled gradients by; 1.0 if nothing is clipped.
        factor: what the gradients were multiplied by, unscaled and clipped; 1.0 after an overflow.
    """

    norm: float
    overflow: bool
    clip_coefficient: float
    factor: float = 1.0


def finish_gradients(
    parameters: Iterable[Tensor],
    *,
    scale: float = 1.0,
    max_norm: float = 0.0,
    group: dist.ProcessGroup | None = None,
    in_place: bool = True,
) -> GradientReport:
    """Unscale and clip every ``.grad`` in place, and say whether the step must be skipped. A collective.

    Gradients are read once, for the norm, whose finiteness is that of the elements; two numbers are summed over ranks;
    then each gradient is multiplied by ``clip_coefficient / scale``, if that is not 1.

    Args:
        parameters: parameters, of which those without a gradient are passed over. Every rank gives the same ones.
        scale: what the loss was multiplied by.
        max_norm: clip the global norm to it: gradients are multiplied by ``max_norm / (norm + 1e-6)`` if that is below
            1 (torch's and DeepSpeed's formula); 0: no clipping.
        in_place: False: leave the gradients as they are, for an optimizer that multiplies them by the report's
            ``factor`` as it reads them.
        group: the ranks that agree; by default those the parameters are sharded over. Plain parameters belong to no
            group: without ``group`` nothing is sent for them.

    Raises:
        ConfigError: a ``scale`` or ``max_norm`` that is none.
        UnsupportedError: sparse gradients, or parameters sharded over different groups without ``group``.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"scale: {scale!r} is not a positive number.")
    if not max_norm >= 0:
        raise ConfigError(f"max_norm: {max_norm!r} is no norm; use a positive number, or 0 for no clipping.")
    everything = list({id(p): p for p in parameters}.values())
    group = group if group is not None else _group_of(everything)
    first = group is None or group.rank() == 0
    held, counted = [], []
    for parameter in everything:
        gradient = _local_gradient(parameter)
        if gradient is not None:
            held.append(gradient)
            counted.append(first or _is_cut(parameter))
    squares, bad = _measure(held, counted, group, next((_local(p).device for p in everything), torch.device("cpu")))
    norm = math.sqrt(squares) / scale if squares >= 0 else math.nan
    if bad or not math.isfinite(norm):
        return GradientReport(norm if not math.isfinite(norm) else math.inf, True, 1.0)
    coefficient = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    factor = coefficient / scale
    if factor != 1.0 and in_place:
        with torch.no_grad():
            for gradient in held:
                gradient.mul_(factor)
    return GradientReport(norm, False, coefficient, factor)


def _measure(
    gradients: list[Tensor], counted: list[bool], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[float, bool]:
    """(sum of squares over ranks, whether any rank found a value that is not finite), by one all-reduce."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    if gradients:
        norms = torch.stack([_norm(g) for g in gradients])
        if not bool(norms.isfinite().all()):  # the square of a large fp32 number is no overflow of the gradient
            norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
        totals[0] = norms[torch.tensor(counted, device=device)].square().sum()
        totals[1] = (~norms.isfinite()).sum()
    if group is not None and group.size() > 1:
        dist.all_reduce(totals, group=group)
    squares, bad = totals.tolist()
    return squares, bad > 0


_PIECE = 4096


def _norm(gradient: Tensor) -> Tensor:
    """L2 norm, float64: pieces in fp32, added in float64.

    On CPU (torch 2.13, 10 million fp32 elements) that takes a tenth of the time of a sum in float64 and is right to
    1e-8; a sum in fp32 alone is as fast and wrong by 4e-4.
    """
    flat = gradient.reshape(-1)
    whole = flat.numel() // _PIECE * _PIECE
    pieces = torch.linalg.vector_norm(flat[:whole].view(-1, _PIECE), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)
    squares: Tensor = pieces.double().square().sum() + rest.square()
    return squares.sqrt()


def _local(tensor: Tensor) -> Tensor:
    return local_of(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def _local_gradient(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout is not torch.strided:
        spec = spec_of(parameter)
        name = spec.fqn if spec is not None else f"a parameter of shape {tuple(parameter.shape)}"
        raise UnsupportedError(f"{name} has a {gradient.layout} gradient; use dense ones (sparse=False in embeddings).")
    return _local(gradient)


def _is_cut(parameter: Tensor) -> bool:
    """Whether each rank holds another part of a parameter, so that squares add up over ranks."""
    spec = spec_of(parameter)
    if spec is not None:
        return spec.dim != REPLICATED
    return isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements)


def _group_of(parameters: list[Tensor]) -> dist.ProcessGroup | None:
    """The one group that the parameters are distributed over, or None for plain ones."""
    names = sorted({spec.group for p in parameters if (spec := spec_of(p)) is not None})
    meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor) and spec_of(p) is None}
    if len(names) + len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
        raise UnsupportedError(
            "the parameters are sharded over several process groups; pass group= with the ranks that hold them."
        )
    if names:
        return process_group(names[0])
    return next(iter(meshes)).get_group() if meshes else None
