"""``dscompile train``, the main job: a small GPT learns to write Python through ``torch.compile``.

This file is the command: it checks the options, finds or makes the run and reads the text. The training itself is
:mod:`dscompile.tools.training`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dscompile.config import Config
from dscompile.errors import ConfigError, DscompileError, RunError, nearest
from dscompile.manager import parse_pipeline
from dscompile.tools.data import Batches, load_corpus
from dscompile.tools.gpt import SIZES
from dscompile.tools.interrupts import Interrupts
from dscompile.tools.run_dir import RunDir, create_run, find_run
from dscompile.tools.tokenizer import Tokenizer
from dscompile.tools.training import DEFAULT_PLACE, Run, Settings

MODEL, STEPS, BATCH, SEED = "gpt-500k", 1000, 8, 0
BACKENDS = ("dscompile", "inductor", "eager")
LR_TIMES_WIDTH = 0.5  # wider models need smaller steps; measured at width 128


def train(
    run: Annotated[str | None, typer.Argument(metavar="[NAME]", help="With --resume: which run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with run NAME, or with the newest.")] = False,
    model: Annotated[str | None, typer.Option(help=f"Size: {', '.join(SIZES)}.", show_default=MODEL)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all.", show_default=str(STEPS))] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step.", show_default=str(BATCH))] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text file or directory of text files.", show_default="Python's own library")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of dscompile options.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="model and time")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seeds weights, batches and the sample.", show_default=str(SEED))
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default=f"{LR_TIMES_WIDTH} / width")
    ] = None,
    run_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = DEFAULT_PLACE,
    backend: Annotated[str | None, typer.Option(hidden=True, help="dscompile, inductor or eager.")] = None,
) -> int:
    """Train a small GPT from scratch on text that every machine has, compiled by dscompile.

    Ctrl-C keeps a checkpoint; `dscompile train --resume NAME` goes on with the same losses.
    """
    console = Console()
    given: dict[str, Any] = {
        "model": model,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "lr": lr,
        "data": None if data is None else str(data.resolve()),
        "backend": backend,
        "config": None if config is None else _options(config),
    }
    given = {key: value for key, value in given.items() if value is not None}
    state = None
    if resume:
        if name is not None:
            raise ConfigError(f"--name {name}: a resumed run keeps its name; write --resume {name}.")
        where = find_run(run_dir, run)
        state = where.load()
        settings = _resumed(where, state, given)
        _check(settings)
        if settings.steps <= state["step"]:
            raise RunError(f"--resume {where.name}: all {state['step']} steps are done; give a larger --steps.")
    else:
        if run is not None:
            raise ConfigError(f"unexpected argument {run!r}: write --resume {run} or --name {run}.")
        settings = _new(given)
        _check(settings)
    size = SIZES[settings.model]
    source = None if settings.data is None else Path(settings.data)
    tokenizer = None if state is None else Tokenizer([(a, b) for a, b in state["merges"]])
    corpus = load_corpus(source, size.vocab, tokenizer)
    if state is not None and corpus.digest != state["corpus"]:
        raise RunError(f"--resume {where.name}: the text has changed since the run began; start a new run.")
    batches = Batches(corpus.train, batch=settings.batch, context=size.context, seed=settings.seed)
    with Interrupts() as interrupts:  # before the run's directory exists: from then on there is a checkpoint to keep
        if state is None:
            where = create_run(run_dir, name, settings.model)
        task = Run(settings, corpus, batches, where, state)
        console.print(
            f"{where.path}: {settings.model}, {task.parameters / 1e6:.1f}M parameters, {len(corpus.train):,} training "
            f"tokens from {corpus.files} files, {len(corpus.held_out):,} held out from {corpus.held_out_files}",
            markup=False,
            soft_wrap=True,
        )
        if state is not None:
            console.print(f"going on after step {task.step} of {settings.steps}")
        try:
            return task.go(console, interrupts)
        except Exception as error:
            if (ours := _ours(error)) is None:
                raise
            raise ours from None


def _options(file: Path) -> dict[str, Any]:
    """The options in a JSON file that differ from the defaults; a wrong pipeline is found now, not when compiling."""
    loaded = Config.load(file)
    parse_pipeline(loaded.pipeline)
    return loaded.model_dump(exclude_defaults=True)


def _new(given: Mapping[str, Any]) -> Settings:
    """Settings of a new run: what was given, and the defaults."""
    defaults: dict[str, Any] = {
        "model": MODEL,
        "steps": STEPS,
        "batch": BATCH,
        "seed": SEED,
        "data": None,
        "backend": BACKENDS[0],
        "config": {},
    }
    values = {**defaults, **given}
    if "lr" not in values:
        size = SIZES.get(values["model"])
        values["lr"] = LR_TIMES_WIDTH / size.width if size is not None else math.nan
    return Settings(**values)


def _resumed(where: RunDir, state: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Settings of the run in ``where``. Only the number of steps may be given anew: any other would be another run."""
    try:
        settings = Settings(**state["settings"])
    except TypeError:
        raise RunError(f"{where.checkpoint}: the checkpoint was written by another version; start a new run.") from None
    for key, value in given.items():
        if key != "steps" and value != asdict(settings)[key]:
            raise ConfigError(
                f"--{key} {value}: the run {where.name} has {asdict(settings)[key]}; "
                "leave the option out, or start a new run."
            )
    return replace(settings, steps=given.get("steps", settings.steps))


def _check(settings: Settings) -> None:
    if settings.model not in SIZES:
        raise ConfigError(
            f"--model {settings.model!r}: no such size.{nearest(settings.model, SIZES)} Sizes: {', '.join(SIZES)}."
        )
    if settings.backend not in BACKENDS:
        raise ConfigError(f"--backend {settings.backend!r}: unknown.{nearest(settings.backend, BACKENDS)}")
    for option, value, least in (
        ("--steps", settings.steps, 1),
        ("--batch", settings.batch, 1),
        ("--seed", settings.seed, 0),
    ):
        if value < least:
            raise ConfigError(f"{option} {value}: must be at least {least}.")
    if not 0 < settings.lr < math.inf:
        raise ConfigError(f"--lr {settings.lr}: must be positive and finite.")


def _ours(error: BaseException | None) -> DscompileError | None:
    """The error of ours that Dynamo wrapped in one of its own, if there is one."""
    while error is not None and not isinstance(error, DscompileError):
        error = error.__cause__ or error.__context__
    return error
