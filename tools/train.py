"""``dscompile train``, the main job: a small GPT learns to write Python through ``torch.compile``.

The model is the unchanged single-device one of :mod:`dscompile.tools.gpt`; nothing in the loop knows about the
compiler. A run is a directory that can be resumed at any step with the same losses: batches are a function of (seed,
step), and the checkpoint holds model, optimizer and random state.
"""

from __future__ import annotations

import math
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dscompile.config import Config
from dscompile.errors import ConfigError, RunError, nearest
from dscompile.report import REPORTS
from dscompile.tools.data import Batches, Corpus, held_out_batches, load_corpus
from dscompile.tools.gpt import GPT, SIZES
from dscompile.tools.run_dir import RunDir, create_run, find_run
from dscompile.tools.summary import show_summary
from dscompile.tools.tokenizer import Tokenizer

WARMUP = 0.05  # share of the steps
FINAL_LR = 0.1  # of the peak
CLIP = 1.0
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is: stored in its checkpoint, so that ``--resume`` needs no options."""

    model: str
    steps: int
    batch: int
    seed: int
    lr: float
    data: str | None
    backend: str
    config: dict[str, Any]


def train(
    model: Annotated[str, typer.Option(help=f"Size: {', '.join(SIZES)}.")] = "gpt-1m",
    steps: Annotated[int, typer.Option(help="Optimizer steps in all.")] = 300,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    data: Annotated[Path | None, typer.Option(help="Text file or directory (default: Python's library).")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file of dscompile options.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: model and time).")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run; 'last' for the newest.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds weights, batches and the sample.")] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    run_dir: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    backend: Annotated[str, typer.Option(hidden=True, help="dscompile, inductor or eager.")] = "dscompile",
) -> int:
    """Train a small GPT from scratch on text that every machine has, compiled by dscompile.

    Ctrl-C keeps a checkpoint; `dscompile train --resume NAME` goes on with the same losses.
    """
    console = Console()
    if resume is None:
        _check(model, steps, batch, lr)
        options = Config.load(config).model_dump(exclude_defaults=True)
        place = str(data.resolve()) if data is not None else None
        if data is not None and not data.exists():
            raise RunError(f"--data {data}: no such file or directory.")
        settings = Settings(model, steps, batch, seed, lr, place, backend, options)
        corpus = load_corpus(data, SIZES[model].vocab)
        run = Run(settings, corpus, create_run(run_dir, name, model), None)
    else:
        where = find_run(run_dir, None if resume == "last" else resume)
        state = where.load()
        settings = _settings(where, state["settings"])
        if steps != 300:
            settings = replace(settings, steps=steps)
        tokenizer = Tokenizer([tuple(pair) for pair in state["merges"]])
        source = Path(settings.data) if settings.data is not None else None
        corpus = load_corpus(source, SIZES[settings.model].vocab, tokenizer)
        if corpus.digest != state["corpus"]:
            raise RunError(f"--resume {where.name}: the text has changed since the run began; start a new run.")
        run = Run(settings, corpus, where, state)
    console.print(
        f"[bold]{run.where.path}[/]: {settings.model}, {run.parameters / 1e6:.1f}M parameters, "
        f"{len(corpus.train):,} training tokens from {corpus.files} files, {len(corpus.held_out):,} held out"
    )
    return run.go(console)


def _check(model: str, steps: int, batch: int, lr: float) -> None:
    if model not in SIZES:
        raise ConfigError(f"--model {model!r}: no such size.{nearest(model, SIZES)} Sizes: {', '.join(SIZES)}.")
    for option, value in (("--steps", steps), ("--batch", batch)):
        if value < 1:
            raise ConfigError(f"{option} {value}: must be at least 1.")
    if not lr > 0:
        raise ConfigError(f"--lr {lr}: must be positive.")


def _settings(where: RunDir, values: Mapping[str, Any]) -> Settings:
    try:
        settings = Settings(**values)
    except TypeError:
        raise RunError(f"{where.checkpoint}: the checkpoint was written by another version; start a new run.") from None
    if settings.model not in SIZES:
        raise RunError(f"{where.checkpoint}: unknown model size {settings.model!r}.")
    return settings


class Run:
    """One training run: its model, optimizer, position, and files."""

    def __init__(self, settings: Settings, corpus: Corpus, where: RunDir, state: Mapping[str, Any] | None) -> None:
        self.settings, self.corpus, self.where = settings, corpus, where
        size = SIZES[settings.model]
        torch.manual_seed(settings.seed)
        self.model = GPT(size)
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
        self.batches = Batches(corpus.train, batch=settings.batch, context=size.context, seed=settings.seed)
        self.step = 0
        self.first_step_seconds = 0.0
        self.step_seconds: list[float] = []
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step = int(state["step"])
        self.compiled = self._compile()

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.model.parameters())

    def _compile(self) -> Callable[..., Tensor]:
        backend = self.settings.backend
        if backend == "eager":
            return self.model
        options = None
        if backend == "dscompile":
            options = {"dump": str(self.where.path / "graphs"), "summary": False, **self.settings.config}
        compiled: Callable[..., Tensor] = torch.compile(self.model, backend=backend, options=options)
        return compiled

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "merges": [list(pair) for pair in self.corpus.tokenizer.merges],
            "corpus": self.corpus.digest,
            "fingerprints": {"torch": torch.__version__},
        }

    # -- the loop ------------------------------------------------------------------------------------------------------

    def go(self, console: Console) -> int:
        """Train to the last step, or to Ctrl-C; returns the exit status."""
        REPORTS.clear()
        settings = self.settings
        self.where.write_config({**asdict(settings), "parameters": self.parameters, "torch": torch.__version__})
        self.where.save(self.state())
        start = saved = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        held_out = math.nan
        with (
            self.where.log_metrics(self.step) as log,
            _stop_signal() as stopped,
            Progress(*columns, console=console, transient=not console.is_terminal) as progress,
        ):
            task = progress.add_task("compiling", total=settings.steps, completed=self.step)
            while self.step < settings.steps and not stopped():
                row = self._train_step()
                if self.step % max(settings.steps // 4, 1) == 0 or self.step == settings.steps:
                    row["held_out_loss"] = held_out = self.held_out_loss()
                log.add(row)
                progress.update(task, completed=self.step, description=_describe(row, held_out))
                if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    self.where.save(self.state())
                    saved = time.perf_counter()
        self.where.save(self.state())
        if self.step < settings.steps:
            console.print(f"Stopped after step {self.step}; go on with: dscompile train --resume {self.where.name}")
            return 130
        if math.isnan(held_out):
            held_out = self.held_out_loss()
        seconds = time.perf_counter() - start
        show_summary(
            console,
            run=self.where,
            held_out=held_out,
            unigram=self.corpus.unigram_nats,
            tokens_per_step=settings.batch * SIZES[settings.model].context,
            step_seconds=self.step_seconds,
            first_step=self.first_step_seconds,
            seconds=seconds,
            peak_mib=peak_mib(),
            sample=self.sample(),
        )
        return 0

    def _train_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        inputs, targets = self.batches(self.step)
        rate = learning_rate(self.step, self.settings.steps, self.settings.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compiled(inputs, targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._stop(f"the loss is {value}")
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        if not math.isfinite(norm):
            bad = next(
                n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
            )
            self._stop(f"the gradient of {bad} is not finite")
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        if not self.first_step_seconds:
            self.first_step_seconds = seconds
        else:
            self.step_seconds.append(seconds)
        return {
            "step": self.step,
            "tokens": self.step * inputs.numel(),
            "loss": value,
            "grad_norm": norm,
            "lr": rate,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(inputs.numel() / seconds),
            "peak_mib": round(peak_mib()),
        }

    def _stop(self, what: str) -> None:
        parameter = next((n for n, p in self.model.named_parameters() if not p.isfinite().all()), None)
        also = f"; parameter {parameter} is not finite" if parameter else ""
        raise RunError(
            f"step {self.step + 1}: {what}{also}. The last good checkpoint is kept in {self.where.path}; "
            "try a lower --lr, or look at the data."
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss over all held-out tokens, nats per token."""
        size, total, tokens = SIZES[self.settings.model], 0.0, 0
        for inputs, targets, count in held_out_batches(
            self.corpus.held_out, batch=self.settings.batch, context=size.context
        ):
            total += float(self.compiled(inputs, targets)) * count
            tokens += count
        return total / tokens

    @torch.no_grad()
    def sample(self, length: int = 160, temperature: float = 0.8) -> str:
        """Text that the model writes after ``def``, token by token."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        context = SIZES[self.settings.model].context
        ids = [int(i) for i in self.corpus.tokenizer.encode(b"\ndef ")]
        for _ in range(length):
            logits = self.model(torch.tensor([ids[-context:]]))[0, -1]
            choice = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            ids.append(int(choice))
        return self.corpus.tokenizer.decode(ids).decode(errors="replace")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to :data:`FINAL_LR` of the peak."""
    warmup = max(int(steps * WARMUP), 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * share)))


def peak_mib() -> float:
    """The process's largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _describe(row: Mapping[str, Any], held_out: float) -> str:
    text = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,} tokens/s  peak {row['peak_mib']:,} MiB"
    return text if math.isnan(held_out) else f"{text}  held-out {held_out:.3f}"


@contextmanager
def _stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads between steps; a second one interrupts at once."""
    seen: list[int] = []

    def remember(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
