"""Writers: what is in the files, that packages are the user's, and that only rank 0 writes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dscompile.engine.monitor import Monitor
from dscompile.errors import ConfigError, RunError


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def section(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job", **more}}


def test_a_row_a_step_with_loss_rate_and_scale(tmp_path: Path) -> None:
    with Monitor.from_config(section(tmp_path), rank=0) as monitor:
        for step in range(1, 4):
            values = {"Train/Samples/train_loss": torch.tensor(0.5 / step), "Train/Samples/lr": 0.1 * step}
            monitor.write(step, {**values, "Train/Samples/loss_scale": 2.0**step})
    folder = tmp_path / "job"
    assert rows(folder / "Train_Samples_train_loss.csv") == [
        ["step", "train_loss"],
        ["1", "0.5"],
        ["2", "0.25"],
        ["3", str(float(torch.tensor(0.5 / 3)))],
    ]
    assert rows(folder / "Train_Samples_lr.csv")[1:] == [["1", "0.1"], ["2", "0.2"], ["3", str(0.1 * 3)]]
    assert rows(folder / "Train_Samples_loss_scale.csv")[1:] == [["1", "2.0"], ["2", "4.0"], ["3", "8.0"]]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        with Monitor.from_config(section(tmp_path), rank=0) as monitor:
            monitor.write(step, {"loss": step})
    assert rows(tmp_path / "job" / "loss.csv") == [["step", "loss"], ["1", "1.0"], ["2", "2.0"]]


def test_rows_are_there_before_the_end(tmp_path: Path) -> None:
    monitor = Monitor.from_config(section(tmp_path), rank=0)
    monitor.write(1, {"loss": 1.0})
    assert rows(tmp_path / "job" / "loss.csv")[1:] == [["1", "1.0"]]
    monitor.close()


def test_deepspeeds_events(tmp_path: Path) -> None:
    with Monitor.from_config(section(tmp_path), rank=0) as monitor:
        monitor.write_events([("loss", 1.0, 1), ("lr", 0.1, 1), ("loss", 0.5, 2)])
    assert rows(tmp_path / "job" / "loss.csv")[1:] == [["1", "1.0"], ["2", "0.5"]]


def test_only_the_first_rank_writes_and_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**section(tmp_path / "none"), "wandb": {"enabled": True}, "tensorboard": {"enabled": True}}
    monitor = Monitor.from_config(asked, rank=1)
    monitor.write(1, {"loss": 1.0})
    assert not monitor.enabled
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("RANK", "3")  # not initialised: the launcher's variable
    assert not Monitor.from_config(section(tmp_path / "none")).enabled


def test_nothing_is_enabled_by_default(tmp_path: Path) -> None:
    assert not Monitor.from_config({"csv_monitor": {"output_path": str(tmp_path)}, "wandb": {}}, rank=0).enabled
    assert list(tmp_path.iterdir()) == []


STUB = """
calls = []
class Run:
    def log(self, values, step): calls.append(("log", values, step))
    def finish(self): calls.append(("finish",))
def init(**given):
    calls.append(("init", given))
    return Run()
"""


def test_weights_and_biases_through_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text(STUB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with Monitor.from_config({"wandb": {"enabled": True, "team": "ours", "group": "g"}}, rank=0) as monitor:
        monitor.write(3, {"loss": torch.tensor(0.5), "lr": 0.1})
    assert sys.modules["wandb"].calls == [
        ("init", {"project": "deepspeed", "group": "g", "entity": "ours"}),
        ("log", {"loss": 0.5, "lr": 0.1}, 3),
        ("finish",),
    ]
    monkeypatch.delitem(sys.modules, "wandb")


TENSORBOARD = """
calls = []
class SummaryWriter:
    def __init__(self, log_dir): calls.append(("open", log_dir))
    def add_scalar(self, *given): calls.append(given)
    def close(self): calls.append(("close",))
"""


def test_tensorboard_through_torchs_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("torch.utils.tensorboard")
    exec(TENSORBOARD, module.__dict__)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    given = {"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    with Monitor.from_config(given, rank=0) as monitor:
        monitor.write(3, {"loss": 0.5})
    assert module.calls == [("open", str(tmp_path / "job")), ("loss", 0.5, 3), ("close",)]


def test_tensorboards_own_reader_finds_what_was_written(tmp_path: Path) -> None:
    """Where the package is installed, which the project does not ask for."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = {"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    with Monitor.from_config(given, rank=0) as monitor:
        monitor.write(3, {"Train/loss": 0.5, "Train/lr": 1e-3})
        monitor.write(4, {"Train/loss": 0.25})
    found = reader.EventAccumulator(str(tmp_path / "job"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("Train/loss")] == [(3, 0.5), (4, 0.25)]
    assert [(e.step, e.value) for e in found.Scalars("Train/lr")] == [(3, pytest.approx(1e-3))]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_the_remedy(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what an import of a missing module meets
    with pytest.raises(ConfigError, match=rf"{name} is enabled.*pip install {name}.*{name}\.enabled"):
        Monitor.from_config({name: {"enabled": True}}, rank=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"csv_monitr": {}}, "'csv_monitr'. Did you mean 'csv_monitor'"),
        ({"csv_monitor": {"output": "x"}}, "'output'. Did you mean 'output_path'"),
        ({"comet": {"enabled": True}}, "unknown parameter 'comet'"),
    ],
)
def test_unknown_keys_are_errors_on_every_rank(given: dict[str, Any], said: str) -> None:
    for rank in (0, 1):
        with pytest.raises(ConfigError) as caught:
            Monitor.from_config(given, rank=rank)
        assert said in str(caught.value)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make .*output_path"):
        Monitor.from_config(section(tmp_path / "file"), rank=0)
    monitor = Monitor.from_config(section(tmp_path), rank=0)
    (tmp_path / "job" / "loss.csv").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*loss\.csv: Is a directory"):
        monitor.write(1, {"loss": 1.0})
