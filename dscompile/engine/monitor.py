"""Writers of training metrics: CSV files, TensorBoard and Weights & Biases, from the first rank only.

A metric is a tag (``Train/Samples/train_loss``), a number and a step. The packages of TensorBoard and Weights & Biases
are the user's to install; they are imported when their section is enabled, on rank 0 alone.
"""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch.distributed as dist
from torch import Tensor

from dscompile.engine.arguments import check_keys
from dscompile.errors import ConfigError, RunError

JOB_NAME = "DeepSpeedJobName"
"""The job's name if none is given."""


class Writer(Protocol):
    """One place that metrics go to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one step. Raises :class:`RunError` if that fails."""

    def close(self) -> None:
        """Write what is left."""


class CsvWriter:
    """One file a tag, as DeepSpeed lays them out: ``PATH/JOB/tag_with_underscores.csv``, a row a step.

    Rows are handed to the system at once, and appended to what is there, so that a resumed run goes on.
    """

    def __init__(self, path: str | None, job: str) -> None:
        self._folder = Path(path or "~/csv_monitor").expanduser() / job
        self._files: dict[str, TextIO] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"csv_monitor: cannot make {self._folder}: {error.strerror}; set csv_monitor.output_path."
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row to each tag's file."""
        for tag, value in values.items():
            name = f"{tag.replace('/', '_').replace(' ', '_')}.csv"
            try:
                file = self._files.get(tag) or self._open(tag, name)
                csv.writer(file).writerow((step, value))
                file.flush()
            except OSError as error:
                raise RunError(f"csv_monitor: cannot write {self._folder / name}: {error.strerror}.") from None

    def _open(self, tag: str, name: str) -> TextIO:
        file = self._files[tag] = (self._folder / name).open("a", newline="", encoding="utf-8")
        if file.tell() == 0:
            csv.writer(file).writerow(("step", tag.rsplit("/", 1)[-1]))
        return file

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class TensorBoardWriter:
    """Scalars through ``torch.utils.tensorboard``, in ``PATH/JOB``."""

    def __init__(self, path: str | None, job: str) -> None:
        tensorboard = _package("tensorboard", "torch.utils.tensorboard", "pip install tensorboard")
        folder = Path(path or "~/tensorboard").expanduser() / job
        try:
            self._writer = tensorboard.SummaryWriter(log_dir=str(folder))
        except OSError as error:
            raise ConfigError(
                f"tensorboard: cannot write to {folder}: {error.strerror}; set tensorboard.output_path."
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars of one step."""
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        except OSError as error:
            raise RunError(f"tensorboard: cannot write: {error.strerror}.") from None

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases."""

    def __init__(self, *, group: str | None, team: str | None, project: str | None) -> None:
        wandb = _package("wandb", "wandb", "pip install wandb")
        self._run = wandb.init(project=project, group=group, entity=team)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _package(section: str, module: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{section} is enabled, but its package cannot be imported ({error}): {remedy}, or set "
            f"{section}.enabled to false."
        ) from None


_KEYS: Mapping[str, tuple[str, ...]] = {
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "tensorboard": ("enabled", "output_path", "job_name"),
    "wandb": ("enabled", "group", "team", "project"),
}


class Monitor:
    """Sends metrics to every writer. On other ranks than the first it has none, and writing does nothing."""

    def __init__(self, writers: Iterable[Writer] = ()) -> None:
        self._writers = list(writers)

    @classmethod
    def from_config(cls, section: Mapping[str, Mapping[str, Any]], *, rank: int | None = None) -> Monitor:
        """Make the writers that a configuration enables.

        Args:
            section: ``csv_monitor``, ``tensorboard`` and ``wandb`` sections by name, as DeepSpeed's configuration has
                them.
            rank: this rank; by default that of the process group, or of the launcher's environment.

        Raises:
            ConfigError: an unknown section or key, a missing package, or a directory that cannot be written.
        """
        check_keys("monitors", section, tuple(_KEYS))
        for name, values in section.items():
            check_keys(name, values, _KEYS[name])
        enabled = {name: values for name, values in section.items() if values.get("enabled", False)}
        first = (_rank() if rank is None else rank) == 0
        return cls(_make(name, values) for name, values in enabled.items()) if first else cls()

    @property
    def enabled(self) -> bool:
        """Whether anything is written on this rank."""
        return bool(self._writers)

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Write the metrics of one step; tensors of one element become numbers, if anybody wants them.

        Raises:
            RunError: a writer failed.
        """
        if not self._writers:
            return
        numbers = {tag: float(v.detach()) if isinstance(v, Tensor) else float(v) for tag, v in values.items()}
        for writer in self._writers:
            writer.write(step, numbers)

    def write_events(self, events: Iterable[tuple[str, float | Tensor, int]]) -> None:
        """As :meth:`write`, from DeepSpeed's (tag, value, step) triples."""
        by_step: dict[int, dict[str, float | Tensor]] = {}
        for tag, value, step in events:
            by_step.setdefault(step, {})[tag] = value
        for step, values in by_step.items():
            self.write(step, values)

    def close(self) -> None:
        """Write what is left and close every writer."""
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _make(name: str, values: Mapping[str, Any]) -> Writer:
    if name == "wandb":
        project = values.get("project") or "deepspeed"
        return WandbWriter(group=values.get("group"), team=values.get("team"), project=project)
    path, job = values.get("output_path"), values.get("job_name") or JOB_NAME
    return CsvWriter(path, job) if name == "csv_monitor" else TensorBoardWriter(path, job)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
