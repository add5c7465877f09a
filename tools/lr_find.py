"""``dscompile lr-find``: a learning-rate range test of the main job's model on its data.

The rate grows from step to step until the loss explodes; where it falls fastest is a good peak rate. The optimizer, its
parameter groups and the clipping are those of ``dscompile train``. Nothing on disk is read but the text and nothing
written but the CSV file, if one is asked for.

Source: Smith, Cyclical Learning Rates for Training Neural Networks (2017), section 3.3; the suggestion (steepest
descent of the smoothed loss over the logarithm of the rate) is Gugger and Howard's, in fastai.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from dscompile.config import Config
from dscompile.engine.schedules import create_schedule
from dscompile.errors import ConfigError, RunError, nearest
from dscompile.tools.data import Batches, load_corpus
from dscompile.tools.gpt import GPT, SIZES
from dscompile.tools.plot import draw
from dscompile.tools.train import BACKENDS, BATCH, MODEL
from dscompile.tools.training import CLIP, parameter_groups

MIN_LR, MAX_LR, STEPS = 1e-5, 1.0, 150
SWEEPS = ("exponential", "linear")
SMOOTHING = 0.9
EXPLODED = 4.0  # times the best smoothed loss
LEAST_STEPS = 10


@dataclass(frozen=True)
class Curve:
    """What a range test measured, one entry a step.

    Attributes:
        rates: learning rates.
        losses: losses before the step at that rate, nats per token.
        exploded: whether the loss exploded at the end, so that larger rates were not tried.
    """

    rates: list[float]
    losses: list[float]
    exploded: bool

    @property
    def smoothed(self) -> list[float]:
        """Losses averaged over the steps before, the older the less, corrected for the start."""
        average, found = 0.0, []
        for step, loss in enumerate(self.losses, 1):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            found.append(average / (1 - SMOOTHING**step))
        return found

    @property
    def lowest(self) -> float:
        """The rate at the lowest smoothed loss."""
        return self.rates[int(np.argmin(self.smoothed))]

    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest, before its lowest point; None if it never falls."""
        smoothed = self.smoothed
        lowest = int(np.argmin(smoothed))
        if lowest < 2:
            return None
        slopes = np.gradient(np.array(smoothed), np.log(np.array(self.rates)))[: lowest + 1]
        steepest = int(np.argmin(slopes))
        return self.rates[steepest] if slopes[steepest] < 0 else None


def lr_find(
    model: Annotated[str, typer.Option(help=f"Size: {', '.join(SIZES)}.")] = MODEL,
    steps: Annotated[int, typer.Option(help="Steps, and so rates, of the test.")] = STEPS,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = BATCH,
    data: Annotated[
        Path | None, typer.Option(help="Text file or directory of text files.", show_default="Python's own library")
    ] = None,
    min_lr: Annotated[float, typer.Option(help="First rate.")] = MIN_LR,
    max_lr: Annotated[float, typer.Option(help="Last rate.")] = MAX_LR,
    sweep: Annotated[
        str, typer.Option(help="How rates grow: exponential, or linear (DeepSpeed's LRRangeTest).")
    ] = SWEEPS[0],
    seed: Annotated[int, typer.Option(help="Seeds weights and batches.")] = 0,
    config: Annotated[Path | None, typer.Option(help="JSON file of dscompile options.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write rates and losses to this file.")] = None,
    backend: Annotated[str, typer.Option(hidden=True, help="dscompile, inductor or eager.")] = BACKENDS[0],
) -> int:
    """Find a learning rate: train for a moment with growing rates, and draw the loss over them.

    Takes the model, data, optimizer and clipping of `dscompile train`; give the value to its --lr.
    """
    _check(model, steps, batch, min_lr, max_lr, sweep, backend, seed)
    options = Config.load(config).model_dump(exclude_defaults=True)
    size = SIZES[model]
    corpus = load_corpus(data, size.vocab)
    batches = Batches(corpus.train, batch=batch, context=size.context, seed=seed)
    torch.manual_seed(seed)
    network: nn.Module = GPT(size)
    compiled: Callable[..., Tensor] = network
    if backend != "eager":
        given = {"summary": False, **options} if backend == "dscompile" else None
        compiled = torch.compile(network, backend=backend, options=given)
    console = Console()
    optimizer = torch.optim.AdamW(parameter_groups(network), lr=min_lr, betas=(0.9, 0.95), fused=True)
    curve = range_test(
        compiled,
        optimizer,
        batches,
        rates(steps, min_lr, max_lr, sweep),
        watch=lambda items: track(items, "range test", console=console, transient=True),
    )
    if csv_file is not None:
        _write(csv_file, curve)
    _report(console, curve, model)
    return 0


def rates(steps: int, low: float, high: float, sweep: str) -> list[float]:
    """The rate of each step, from ``low`` to ``high``."""
    if sweep == "exponential":
        return [low * (high / low) ** (n / (steps - 1)) for n in range(steps)]
    probe = torch.optim.SGD([torch.zeros(1)], lr=low)
    schedule = create_schedule(
        "LRRangeTest",
        probe,
        {
            "lr_range_test_min_lr": low,
            "lr_range_test_step_size": 1,
            "lr_range_test_step_rate": (high / low - 1) / (steps - 1),
        },
    )
    found = []
    for _ in range(steps):
        found.append(float(schedule.get_last_lr()[0]))
        schedule.step()
    return found


def range_test(
    step_of: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    values: Sequence[float],
    *,
    watch: Callable[[Sequence[float]], Any] = lambda items: items,
) -> Curve:
    """Train one step at each rate, until the smoothed loss is :data:`EXPLODED` times its best or not finite.

    Args:
        step_of: inputs and targets to the loss.
        optimizer: its groups may have an ``lr_scale``.
        batches: inputs and targets of a step.
        values: the rates.
        watch: wraps the iteration, for a progress bar.

    Raises:
        RunError: the loss is not finite before the first step.
    """
    tried: list[float] = []
    losses: list[float] = []
    exploded = False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for n, rate in enumerate(watch(values)):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        loss = step_of(*batches(n))
        value = float(loss.detach())
        if not math.isfinite(value):
            if not losses:
                raise RunError(f"the loss is {value} before the first step; look at the data.")
            exploded = True
            break
        tried.append(rate)
        losses.append(value)
        smoothed = Curve(tried, losses, False).smoothed
        if smoothed[-1] > EXPLODED * min(smoothed):
            exploded = True
            break
        loss.backward()
        nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Curve(tried, losses, exploded)


def _report(console: Console, curve: Curve, model: str) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(draw(curve.rates, curve.smoothed, x_label="learning rate", y_label="smoothed loss"))
    end = f"the loss exploded at {curve.rates[-1]:.2g}" if curve.exploded else "the loss did not explode"
    steps = f"{len(curve.rates)} steps from {curve.rates[0]:.2g} to {curve.rates[-1]:.2g}"
    say(f"{steps}: {end}, lowest at {curve.lowest:.2g}.")
    found = curve.suggestion()
    if found is None:
        say("The loss never fell: there is nothing to suggest. Try more --steps, or rates around a smaller --min-lr.")
        return
    say(f"Suggested peak rate: {found:.2g} (steepest descent). dscompile train --model {model} --lr {found:.2g}")


def _write(path: Path, curve: Curve) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "lr", "loss", "smoothed_loss"))
            rows = zip(curve.rates, curve.losses, curve.smoothed, strict=True)
            writer.writerows((n, *row) for n, row in enumerate(rows))
    except OSError as error:
        raise RunError(f"--csv {path}: cannot write: {error.strerror}.") from None


def _check(model: str, steps: int, batch: int, low: float, high: float, sweep: str, backend: str, seed: int) -> None:
    choices = (("--model", model, tuple(SIZES)), ("--sweep", sweep, SWEEPS), ("--backend", backend, BACKENDS))
    for option, value, known in choices:
        if value not in known:
            raise ConfigError(f"{option} {value!r}: unknown.{nearest(value, known)} Known: {', '.join(known)}.")
    for option, number, least in (("--steps", steps, LEAST_STEPS), ("--batch", batch, 1), ("--seed", seed, 0)):
        if number < least:
            raise ConfigError(f"{option} {number}: must be at least {least}.")
    if not 0 < low < math.inf:
        raise ConfigError(f"--min-lr {low}: must be positive and finite.")
    if not low < high < math.inf:
        raise ConfigError(f"--max-lr {high}: must be finite and larger than --min-lr {low}.")
