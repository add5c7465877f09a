"""One directory a training run: ``config.json``, ``metrics.csv``, ``checkpoints/`` and the compiler's ``graphs/``.

Checkpoints are the engine's (:mod:`dscompile.engine.checkpoint`): ``checkpoints/latest`` names the newest complete one.
The first is written before the first step, so a directory that cannot be written is found out before minutes of
compiling, and every run that exists can be resumed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dscompile.artifact import write_whole
from dscompile.engine.checkpoint import read_state
from dscompile.engine.checkpoint_directory import LATEST
from dscompile.errors import RunError, nearest

COLUMNS = ("step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_s", "peak_mib", "held_out_loss")
FREE_SPACE = "Free some space, or choose another place with --run-dir."
_FORMER = "checkpoint.pt"
_REQUIRED = ("settings", "step", "merges", "corpus")


class RunDir:
    """The files of one run; every method that writes raises :class:`RunError` if it cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name: what ``--resume`` takes."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """The directory of its checkpoints: what ``load_checkpoint`` and ``dscompile export`` take."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics' file: one row a step, see :data:`COLUMNS`."""
        return self.path / "metrics.csv"

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        write_whole(self.path / "config.json", json.dumps(values, indent=1) + "\n", hint=FREE_SPACE)

    def load(self) -> dict[str, Any]:
        """What the newest checkpoint keeps beside model and optimizer: settings, step, tokeniser, digest of the text.

        Raises:
            CheckpointError: it is missing, unreadable or damaged; names the file.
            RunError: it is of another program, or in the format of an earlier version.
        """
        former = self.path / _FORMER
        if former.exists() and not (self.checkpoints / LATEST).exists():
            raise RunError(
                f"{former}: one file, the format of 'dscompile train' before it used the engine's checkpoints "
                "(a directory 'checkpoints'); this version cannot resume it. Start a new run, or take its weights by "
                'dscompile.engine.export.load_weights(model, file, key="model").'
            )
        state = read_state(self.checkpoints)
        if any(key not in state for key in _REQUIRED):
            raise RunError(f"{self.checkpoints}: not a checkpoint of 'dscompile train'.")
        return state

    def remove_all_but(self, tag: str) -> None:
        """Remove the checkpoints other than ``tag``, which is complete; what cannot be removed stays."""
        for path in self.checkpoints.glob("step_*"):
            if path.name != tag:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def log_metrics(self, after_step: int) -> Iterator[MetricsLog]:
        """Append rows to ``metrics.csv``; rows after ``after_step`` (not saved) are dropped first."""
        try:
            kept = io.StringIO(newline="")
            writer = csv.DictWriter(kept, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in self.read_metrics() if int(row["step"]) <= after_step)
            write_whole(self.metrics, kept.getvalue(), hint=FREE_SPACE)
            file = self.metrics.open("a", newline="", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot write: {_reason(error)}. {FREE_SPACE}") from None
        with file:
            yield MetricsLog(self.metrics, file)

    def read_metrics(self) -> list[dict[str, str]]:
        """Rows of ``metrics.csv`` as written; a last row that a crash cut short is left out."""
        if not self.metrics.exists():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]


class MetricsLog:
    """Writes one row a step, each handed to the system (or an error) before the next step."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._writer = csv.DictWriter(file, COLUMNS)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row; columns it lacks stay empty."""
        try:
            self._writer.writerow(row)
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # else what is buffered fails once more
                self._file.close()
            raise RunError(f"{self._path}: cannot write: {_reason(error)}. {FREE_SPACE}") from None


def create_run(parent: Path, name: str | None, model: str) -> RunDir:
    """Make the directory of a new run; without a name it is called after the model and the time.

    Raises:
        RunError: a name that exists or is no file name, or a place that cannot be written.
    """
    if name is not None and (not name or name != Path(name).name or name.startswith(".")):
        raise RunError(f"--name {name!r}: not a plain name; use --run-dir to choose the place.")
    stamp = f"{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(100):
        path = parent / (name or (stamp if attempt == 0 else f"{stamp}-{attempt + 1}"))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if name is None and path.is_dir():
                continue
            raise RunError(
                f"{path}: exists already; use 'dscompile train --resume {path.name}' or give another --name."
            ) from None
        except OSError as error:
            raise RunError(f"{path}: cannot make the run's directory: {_reason(error)}. {FREE_SPACE}") from None
        return RunDir(path)
    raise RunError(f"{parent}: a hundred runs started this second; give one a --name.")


def find_run(parent: Path, name: str | None) -> RunDir:
    """The run called ``name``, or the one whose checkpoint is newest. Raises :class:`RunError` if there is none."""
    try:
        saved = [*parent.glob(f"*/{_FORMER}"), *parent.glob(f"*/checkpoints/{LATEST}")]
        found = {file.relative_to(parent).parts[0]: file.stat().st_mtime_ns for file in saved}
    except OSError as error:
        raise RunError(f"{parent}: cannot read: {_reason(error)}.") from None
    if name is None and found:
        return RunDir(parent / max(found, key=lambda run: found[run]))
    if name in found:
        return RunDir(parent / name)
    if name is None:
        raise RunError(f"--resume: no run with a checkpoint in {parent}; name the place with --run-dir.")
    raise RunError(f"--resume {name}: no such run with a checkpoint in {parent}.{nearest(name, found)}")


def _reason(error: OSError) -> str:
    """The system's words for an error."""
    return error.strerror or str(error) or type(error).__name__
