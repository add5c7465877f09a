"""``dscompile train``, the main job: a small GPT learns to write Python through ``torch.compile``, on two ranks.

This file is the command: it checks the options, starts the ranks, finds or makes the run and reads the text. The
training itself is :mod:`dscompile.tools.training`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dscompile.config import Config
from dscompile.errors import ConfigError, DscompileError, RunError, nearest
from dscompile.manager import parse_pipeline
from dscompile.tools.cli import reported
from dscompile.tools.data import Batches, load_corpus
from dscompile.tools.gpt import SIZES
from dscompile.tools.interrupts import Interrupts
from dscompile.tools.ranks import Ranks, launched
from dscompile.tools.run_dir import RunDir, create_run, find_run
from dscompile.tools.tokenizer import Tokenizer
from dscompile.tools.training import DEFAULT_PLACE, Run, Settings

MODEL, STEPS, BATCH, SEED = "gpt-500k", 1000, 8, 0
RANKS, ZERO = 2, 3
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
    ranks: Annotated[
        int | None,
        typer.Option(help="Processes; under torchrun, those it started.", show_default=str(RANKS)),
    ] = None,
    zero: Annotated[
        int | None, typer.Option(help="ZeRO stage, 0 to 3: what is sharded over the ranks.", show_default=str(ZERO))
    ] = None,
    backend: Annotated[str | None, typer.Option(hidden=True, help="dscompile, inductor or eager.")] = None,
) -> int:
    """Train a small GPT from scratch on text that every machine has, compiled by dscompile.

    Ctrl-C keeps a checkpoint; `dscompile train --resume NAME` goes on with the same losses, on any number of ranks.
    On many machines: `torchrun ... -m dscompile.tools.cli train ...` on each.
    """
    given: dict[str, Any] = {
        "model": model,
        "steps": steps,
        "batch": batch,
        "seed": seed,
        "lr": lr,
        "data": None if data is None else str(data.resolve()),
        "backend": backend,
        "config": None if config is None else _options(config),
        "ranks": ranks if ranks is not None else launched(),
        "zero": zero,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if resume and name is not None:
        raise ConfigError(f"--name {name}: a resumed run keeps its name; write --resume {name}.")
    if not resume and run is not None:
        raise ConfigError(f"unexpected argument {run!r}: write --resume {run} or --name {run}.")
    request = Request(given, run_dir, run if resume else name, resume)
    if launched() is not None:
        return _train(request, given["ranks"])
    start = request.start()  # so that wrong options are found before any process is started
    if start.settings.ranks == 1:
        return _train(request, 1)
    from dscompile.tools.launch import launch

    return launch(start.settings.ranks, _rank, replace(request, given={**given, "ranks": start.settings.ranks}))


@dataclass(frozen=True, slots=True)
class Start:
    """What a run begins with: its settings and, if it is resumed, its place and what its checkpoint says."""

    settings: Settings
    where: RunDir | None = None
    state: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for; ``name`` is that of the run, None for the newest or a new one."""

    given: Mapping[str, Any]
    place: Path
    name: str | None
    resume: bool

    def start(self) -> Start:
        """Find the run, or take the defaults of a new one. Raises ConfigError or RunError."""
        if not self.resume:
            settings = _new(self.given)
            _check(settings)
            return Start(settings)
        where = find_run(self.place, self.name)
        state = where.load()
        settings = _resumed(where, state, self.given)
        _check(settings)
        if settings.steps <= state["step"]:
            raise RunError(f"--resume {where.name}: all {state['step']} steps are done; give a larger --steps.")
        return Start(settings, where, state)


def _rank(request: Request) -> int:
    """A rank that :func:`dscompile.tools.launch.launch` started."""
    return reported(lambda: _train(request, request.given["ranks"]))


def _train(request: Request, world: int) -> int:
    """One rank of the run, from its options to its exit status."""
    with Ranks(world, Config.load(request.given.get("config")).rank_timeout) as ranks:
        try:
            return _run(request, ranks)
        except Exception as error:
            if (ours := _ours(error)) is None:
                raise
            raise ours from None


def _run(request: Request, ranks: Ranks) -> int:
    start = ranks.share(request.start)
    settings, where, state = start.settings, start.where, start.state
    size = SIZES[settings.model]
    source = None if settings.data is None else Path(settings.data)
    tokenizer = None if state is None else Tokenizer([(a, b) for a, b in state["merges"]])
    corpus = load_corpus(source, size.vocab, tokenizer)
    if state is not None and where is not None and corpus.digest != state["corpus"]:
        raise RunError(f"--resume {where.name}: the text has changed since the run began; start a new run.")
    ranks.same("the text", corpus.digest)
    batches = Batches(corpus.train, batch=settings.batch, context=size.context, seed=settings.seed)
    console = Console(quiet=not ranks.first)
    # Before the run's directory exists: from then on there is a checkpoint to keep.
    with Interrupts(patient=ranks.world > 1) as interrupts:
        if where is None:
            where = ranks.share(lambda: create_run(request.place, request.name, settings.model))
        task = Run(settings, corpus, batches, where, ranks, resume=state is not None)
        over = f" on {ranks.world} ranks (ZeRO-{settings.zero})" if ranks.world > 1 else ""
        console.print(
            f"{where.path}: {settings.model}, {task.parameters / 1e6:.1f}M parameters{over}, {len(corpus.train):,} "
            f"training tokens from {corpus.files} files, {len(corpus.held_out):,} held out from "
            f"{corpus.held_out_files}",
            markup=False,
            soft_wrap=True,
        )
        if state is not None:
            console.print(f"going on after step {task.step} of {settings.steps}")
        return task.go(console, interrupts)


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
        "ranks": RANKS,
    }
    values = {**defaults, **given}
    stage = values["config"].get("zero", {}).get("stage")
    if stage is not None and values.setdefault("zero", stage) != stage:
        raise ConfigError(f"--zero {values['zero']}: --config asks for stage {stage}; leave one of them out.")
    values.setdefault("zero", ZERO)
    if "lr" not in values:
        size = SIZES.get(values["model"])
        values["lr"] = LR_TIMES_WIDTH / size.width if size is not None else math.nan
    return Settings(**values)


def _resumed(where: RunDir, state: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Settings of the run in ``where``. Steps, ranks and stage may be given anew: any other would be another run."""
    try:
        settings = Settings(**state["settings"])
    except TypeError:
        raise RunError(f"{where.checkpoints}: another version wrote the checkpoint; start a new run.") from None
    for key, value in given.items():
        if key not in ("steps", "ranks", "zero") and value != asdict(settings)[key]:
            raise ConfigError(
                f"--{key} {value}: the run {where.name} has {asdict(settings)[key]}; "
                "leave the option out, or start a new run."
            )
    return replace(settings, **{key: given[key] for key in ("steps", "ranks", "zero") if key in given})


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
        ("--ranks", settings.ranks, 1),
    ):
        if value < least:
            raise ConfigError(f"{option} {value}: must be at least {least}.")
    if settings.zero not in range(4):
        raise ConfigError(f"--zero {settings.zero}: no such stage; 0, 1, 2 or 3.")
    if settings.batch % settings.ranks:
        raise ConfigError(
            f"--batch {settings.batch}: does not split evenly over {settings.ranks} ranks; give a multiple, "
            "or --ranks 1."
        )
    if not 0 < settings.lr < math.inf:
        raise ConfigError(f"--lr {settings.lr}: must be positive and finite.")


def _ours(error: BaseException | None) -> DscompileError | None:
    """The error of ours that Dynamo wrapped in one of its own, if there is one."""
    while error is not None and not isinstance(error, DscompileError):
        error = error.__cause__ or error.__context__
    return error
