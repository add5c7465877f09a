"""One training run of ``dscompile train``: model, optimizer, position and files, and the loop over them.

The model is the unchanged single-device one of :mod:`dscompile.tools.gpt`; nothing in the loop knows about the
compiler. On several ranks each trains on its rows of the same batches, so the losses are those of one rank; the first
rank prints and writes the files. Every forward pass, the held-out ones too, has one shape and runs with gradients
enabled, so that one training graph is all that is ever compiled. A resumed run has the same losses: batches and
learning rates are functions of (seed, step), so the step is the position of both; the checkpoint is the engine's and
loads on any number of ranks, at any stage.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dscompile.config import Config
from dscompile.errors import DscompileError, RankError, RunError
from dscompile.reads import gathered
from dscompile.report import REPORTS
from dscompile.tools.checkpoints import Checkpoints
from dscompile.tools.data import IGNORED_TARGET, Batches, Corpus, held_out_batches
from dscompile.tools.gpt import GPT, SIZES
from dscompile.tools.interrupts import Interrupted, Interrupts
from dscompile.tools.ranks import Ranks
from dscompile.tools.run_dir import MetricsLog, RunDir
from dscompile.tools.summary import show_summary

WARMUP = 0.05  # share of the steps
FINAL_LR = 0.05  # of the peak
EMBEDDING_LR = 10.0  # times the others': an embedding row gets a gradient only where its token occurs
WEIGHT_DECAY = 0.1
CLIP = 1.0
EVALUATIONS = 4
CHECKPOINT_SECONDS = 30.0
DEFAULT_PLACE = Path("runs")


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
    ranks: int = 1
    zero: int = 3

    def compiler(self) -> Config:
        """The compiler's options."""
        zero = {**self.config.get("zero", {}), "stage": self.zero}
        return Config.load({"summary": False, **self.config, "zero": zero})


class Run:
    """One training run, from its first step or with ``resume`` from the newest checkpoint; ``ranks`` is entered."""

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        batches: Batches,
        where: RunDir,
        ranks: Ranks | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.settings, self.corpus, self.batches, self.where = settings, corpus, batches, where
        self.ranks = ranks or Ranks(1)
        torch.manual_seed(settings.seed)
        self.model: nn.Module = GPT(SIZES[settings.model])
        self.model = self.ranks.shard(self.model, settings.compiler())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=settings.lr, betas=(0.9, 0.95), fused=True)
        self.step = 0
        self.first_step_seconds = 0.0
        self.step_seconds: list[float] = []
        self._checkpoints = Checkpoints(where, self.model, self.optimizer, first=self.ranks.first)
        if resume:
            self.step = self._checkpoints.load()
        self._stopped: int | None = None
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
            # The stage is known from the parameters; every rank has the same graphs but for its own number.
            options = {"dump": str(self.where.path / "graphs"), "summary": False, **self.settings.config}
            options.pop("zero", None)
            if not self.ranks.first:
                del options["dump"]
        compiled: Callable[..., Tensor] = torch.compile(self.model, backend=backend, options=options)
        return compiled

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside step, model, optimizer and random state."""
        return {
            "settings": asdict(self.settings),
            "merges": [list(pair) for pair in self.corpus.tokenizer.merges],
            "corpus": self.corpus.digest,
        }

    # -- the loop ------------------------------------------------------------------------------------------------------

    def go(self, console: Console, interrupts: Interrupts) -> int:
        """Train to the last step, or to a signal; returns the exit status (128 + the signal's number).

        Raises:
            RunError: a loss or gradient that is not finite, or a file that cannot be written.
        """
        REPORTS.clear()
        settings, start, held_out = self.settings, time.perf_counter(), math.nan
        if self.ranks.first:
            self.where.write_config({**asdict(settings), "parameters": self.parameters, "torch": torch.__version__})
        self._save()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            self.where.log_metrics(self.step) if self.ranks.first else nullcontext() as log,
            Progress(*columns, console=console, transient=not console.is_terminal) as progress,
        ):
            task = progress.add_task("compiling", total=settings.steps, completed=self.step)
            try:
                held_out = self._loop(log, interrupts, progress, task)
            except Exception as error:
                self._broken_off(self.ranks.named(error), interrupts)
            except Interrupted:
                self._stopped = interrupts.caught
            if self._stopped is not None and not self.first_step_seconds:
                self.optimizer.zero_grad(set_to_none=True)  # compiling broke off: nothing else has changed since
            self._save()
        if self._stopped is not None and self.step < settings.steps:
            parent = self.where.path.parent
            place = "" if parent == DEFAULT_PLACE else f" --run-dir {parent}"
            console.print(
                f"Stopped after step {self.step} of {settings.steps}, checkpoint kept. Go on with: "
                f"dscompile train --resume {self.where.name}{place}",
                soft_wrap=True,
                markup=False,
            )
            return 128 + self._stopped
        peaks, sample = self.ranks.all(peak_mib()), self.sample()
        show_summary(
            console,
            run=self.where,
            held_out=held_out,
            unigram=self.corpus.unigram_nats,
            tokens_per_step=settings.batch * SIZES[settings.model].context,
            step_seconds=self.step_seconds,
            first_step=self.first_step_seconds,
            seconds=time.perf_counter() - start,
            peaks_mib=peaks,
            sample=sample,
        )
        return 0

    def _broken_off(self, error: Exception, interrupts: Interrupts) -> None:
        """Raise ``error``, unless another rank heard the signal of this one while it compiled, and is gone already."""
        gone = isinstance(error, RankError) and error.kind in ("left", "unknown")
        if not gone or interrupts.caught is None or self.first_step_seconds:
            raise error
        self._stopped = interrupts.caught

    def _agree(self, interrupts: Interrupts, save: bool) -> bool:
        """Take note of a signal to any rank, in step with the others; returns whether to save."""
        signals = (signal.SIGTERM, signal.SIGINT)
        *heard, saves = self.ranks.sum(*(interrupts.caught == number for number in signals), save)
        self._stopped = next((number for number, count in zip(signals, heard, strict=True) if count), None)
        return saves > 0

    def _loop(self, log: MetricsLog | None, interrupts: Interrupts, progress: Progress, task: TaskID) -> float:
        """Train until the end or a signal; returns the last held-out loss (not a number if there was none)."""
        settings = self.settings
        held_out, saved = math.nan, time.perf_counter()
        while self.step < settings.steps:
            if self._agree(interrupts, save=time.perf_counter() - saved > CHECKPOINT_SECONDS):
                self._save(asynchronous=True)
                saved = time.perf_counter()
            if self._stopped is not None:
                break
            row = self._train_step(interrupts)
            if self.step % math.ceil(settings.steps / EVALUATIONS) == 0 or self.step == settings.steps:
                row["held_out_loss"] = held_out = self.held_out_loss()
                share = held_out / self.corpus.unigram_nats
                progress.console.print(
                    f"step {self.step}: loss {row['loss']:.3f}, held-out {held_out:.3f} ({share:.2f} of unigram), "
                    f"{row['tokens_per_s']:,} tokens/s, peak {row['peak_mib']:,} MiB"
                )
            if log is not None:
                log.add(row)
            progress.update(
                task,
                completed=self.step,
                description=f"loss {row['loss']:.3f}  {row['tokens_per_s']:,} tokens/s  peak {row['peak_mib']:,} MiB",
            )
        return held_out

    def _train_step(self, interrupts: Interrupts) -> dict[str, Any]:
        start = time.perf_counter()
        inputs, targets = self.batches(self.step)
        rate = learning_rate(self.step, self.settings.steps, self.settings.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        # The first step compiles, for up to a minute: a signal need not wait for its end.
        with nullcontext() if self.first_step_seconds else interrupts.at_once():
            loss = self.compiled(self.ranks.part(inputs), self.ranks.part(targets))
            loss.backward()
        value = self._mean(loss)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(self.ranks.whole(total))
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._stop(f"the loss is {value}, the gradients' norm {norm}")
        nn.utils.clip_grads_with_norm_(self.model.parameters(), CLIP, total)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        if self.first_step_seconds:
            self.step_seconds.append(seconds)
        else:
            self.first_step_seconds = seconds
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

    def _save(self, *, asynchronous: bool = False) -> None:
        """Write the checkpoint, unless this step's is there or the model no longer gives a finite loss."""
        if self._checkpoints.has(self.step):
            self._checkpoints.settle()
            return
        if self.first_step_seconds:
            value = self._mean(self.compiled(*map(self.ranks.part, self.batches(self.step))))
            if not math.isfinite(value):
                self._stop(f"the loss is {value}")
        self._checkpoints.save(self.step, self.state(), asynchronous=asynchronous)

    def _mean(self, loss: Tensor) -> float:
        """The mean over ranks, which have equally many tokens."""
        return self.ranks.sum(float(loss.detach()))[0] / self.ranks.world

    def _stop(self, what: str) -> NoReturn:
        named = [
            f"; {kind} that is not finite: {name}"
            for kind, values in (
                ("first parameter", ((n, p) for n, p in self.model.named_parameters())),
                ("first gradient", ((n, p.grad) for n, p in self.model.named_parameters())),
            )
            if (name := next((n for n, v in values if v is not None and not self._finite(v)), None))
        ]
        with suppress(DscompileError):  # one under way that fails leaves the one before: that is what is named then
            self._checkpoints.settle()
        raise RunError(
            f"step {self.step + 1}: {what}{''.join(named)}. The checkpoint of step {self._checkpoints.kept} is kept in "
            f"{self.where.path}; start a new run with a lower --lr than {self.settings.lr:g}, or look at the data."
        )

    def _finite(self, value: Tensor) -> bool:
        return bool(self.ranks.whole(value.detach()).isfinite().all())

    def held_out_loss(self) -> float:
        """Mean loss over all held-out tokens, nats per token."""
        # Not under no_grad: that would compile a second graph. GPT has no dropout, so training mode changes nothing.
        context, mine = SIZES[self.settings.model].context, 0.0
        for inputs, targets, _ in held_out_batches(self.corpus.held_out, batch=self.settings.batch, context=context):
            part = self.ranks.part(targets)
            loss = float(self.compiled(self.ranks.part(inputs), part).detach())
            if count := int((part != IGNORED_TARGET).sum()):  # else the loss is 0 / 0
                mine += loss * count
        total, tokens = self.ranks.sum(mine)[0], len(self.corpus.held_out) - 1
        if not math.isfinite(total):
            self._stop(f"the held-out loss is {total / tokens}")
        return total / tokens

    @torch.no_grad()
    def sample(self, length: int = 160, temperature: float = 0.7) -> str:
        """Text that the model writes after ``def``, token by token, by the eager model (its shapes grow).

        Every rank must call it; the first one writes.
        """
        generator = torch.Generator().manual_seed(self.settings.seed)
        context, tokenizer = SIZES[self.settings.model].context, self.corpus.tokenizer
        ids = [int(i) for i in tokenizer.encode(b"\ndef ")]
        with gathered(self.model):
            for _ in range(length if self.ranks.first else 0):
                logits = self.model(torch.tensor([ids[-context:]]))[0, -1, : tokenizer.vocab]
                ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
        return tokenizer.decode(ids).decode(errors="replace").replace("\0", "\n")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; embeddings do not and learn faster; vectors do neither."""
    # Not m.weight: reading a sharded parameter as an attribute gives its full value.
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    tables = [p for p in model.parameters() if id(p) in embeddings]
    rest = [p for p in model.parameters() if id(p) not in embeddings]
    return [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": tables, "weight_decay": 0.0, "lr_scale": EMBEDDING_LR},
    ]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to :data:`FINAL_LR` of the peak."""
    warmup = max(int(steps * WARMUP), 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * share)))


def peak_mib() -> float:
    """The process's largest resident size so far, MiB."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)
