"""One directory a training run: ``config.json``, ``metrics.csv``, ``checkpoint.pt`` and the compiler's ``graphs/``.

A checkpoint is written under a temporary name, synced and renamed, so at any moment the directory holds one whole
checkpoint: the new one or the one before. It is written once before the first step, so a directory that cannot be
written is found out before minutes of compiling, and every run that exists can be resumed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import torch

from dscompile.artifact import write_whole
from dscompile.errors import RunError, nearest

FORMAT = 1
COLUMNS = ("step", "tokens", "loss", "grad_norm", "lr", "seconds", "tokens_per_s", "peak_mib", "held_out_loss")
_FREE_SPACE = "Free some space, or choose another place with --run-dir."
_REQUIRED = ("settings", "step", "model", "optimizer", "rng", "merges", "corpus")


class RunDir:
    """The files of one run; every method that writes raises :class:`RunError` if it cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name: what ``--resume`` takes."""
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's file."""
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        """The metrics' file: one row a step, see :data:`COLUMNS`."""
        return self.path / "metrics.csv"

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write ``config.json``."""
        write_whole(self.path / "config.json", json.dumps(values, indent=1) + "\n", hint=_FREE_SPACE)

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint, atomically: if this fails, the one before is untouched."""
        temporary = self.checkpoint.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.checkpoint)
            _sync_folder(self.path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kept = f"The checkpoint before it is intact. {_FREE_SPACE}" if self.checkpoint.exists() else _FREE_SPACE
            raise RunError(f"{self.checkpoint}: cannot write the checkpoint: {_reason(error)}. {kept}") from None

    def load(self) -> dict[str, Any]:
        """Read the checkpoint. Raises :class:`RunError` naming the file if it is missing, damaged or foreign."""
        try:
            with self.checkpoint.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise RunError(f"{self.checkpoint}: cannot read the checkpoint: {_reason(error)}.") from None
        try:
            state = torch.load(self.checkpoint, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError):
            raise RunError(f"{self.checkpoint}: the checkpoint is damaged; start a new run.") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT or any(key not in state for key in _REQUIRED):
            raise RunError(f"{self.checkpoint}: not a checkpoint of 'dscompile train' (format {FORMAT}).")
        return cast("dict[str, Any]", state)

    @contextlib.contextmanager
    def log_metrics(self, after_step: int) -> Iterator[MetricsLog]:
        """Append rows to ``metrics.csv``; rows after ``after_step`` (not saved) are dropped first."""
        try:
            kept = io.StringIO(newline="")
            writer = csv.DictWriter(kept, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in self.read_metrics() if int(row["step"]) <= after_step)
            write_whole(self.metrics, kept.getvalue(), hint=_FREE_SPACE)
            file = self.metrics.open("a", newline="", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.metrics}: cannot write: {_reason(error)}. {_FREE_SPACE}") from None
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
            raise RunError(f"{self._path}: cannot write: {_reason(error)}. {_FREE_SPACE}") from None


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
            raise RunError(f"{path}: cannot make the run's directory: {_reason(error)}. {_FREE_SPACE}") from None
        return RunDir(path)
    raise RunError(f"{parent}: a hundred runs started this second; give one a --name.")


def find_run(parent: Path, name: str | None) -> RunDir:
    """The run called ``name``, or the one whose checkpoint is newest. Raises :class:`RunError` if there is none."""
    try:
        found = {file.parent.name: file for file in parent.glob("*/checkpoint.pt")}
        if name is None and found:
            return RunDir(max(found.values(), key=lambda file: file.stat().st_mtime_ns).parent)
    except OSError as error:
        raise RunError(f"{parent}: cannot read: {_reason(error)}.") from None
    if name in found:
        return RunDir(found[name].parent)
    if name is None:
        raise RunError(f"--resume: no run with a checkpoint in {parent}; name the place with --run-dir.")
    raise RunError(f"--resume {name}: no such run with a checkpoint in {parent}.{nearest(name, found)}")


def _sync_folder(path: Path) -> None:
    """Make a rename in ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    """One line: the system's words for an OSError (which torch hides in a RuntimeError), else the message's own."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
