"""``dscompile train``: one loss curve through interruptions, checkpoints that survive faults, errors of one line."""

from __future__ import annotations

import argparse
import atexit
import errno
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dscompile.engine import checkpoint_directory, checkpoint_saver
from dscompile.engine.checkpoint import save_checkpoint
from dscompile.engine.checkpoint_files import DirectoryReader
from dscompile.engine.checkpoint_state import stored_model_keys
from dscompile.engine.export import load_weights
from dscompile.errors import RunError
from dscompile.report import last_report
from dscompile.tools import run_dir, training
from dscompile.tools.checkpoints import Checkpoints
from dscompile.tools.cli import run as command
from dscompile.tools.data import Batches, load_corpus
from dscompile.tools.gpt import GPT, SIZES
from dscompile.tools.interrupts import Interrupts
from dscompile.tools.run_dir import MetricsLog, RunDir, create_run, find_run
from dscompile.tools.training import Run, Settings, learning_rate

TEXT = argparse.__file__
ROOT = Path(__file__).parent.parent


def options(place, *more, steps=12, backend="eager", ranks=1):
    return [
        *("train", "--run-dir", str(place), "--data", TEXT, "--batch", "2"),
        *("--steps", str(steps), "--backend", backend, "--ranks", str(ranks), *more),
    ]


def losses(place, name):
    return [float(row["loss"]) for row in RunDir(place / name).read_metrics()]


def one_line(capsys, status, *parts):
    """The command failed with ``status`` and said so in one line on stderr that has all ``parts``."""
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.startswith("dscompile: ")
    assert said.count("\n") == 1, said
    for part in parts:
        assert part in said, said
    return said


@pytest.fixture
def interrupt_at(monkeypatch):
    """Raise a signal in this process when the row of a step is logged."""
    add = MetricsLog.add

    def at(step, number=signal.SIGINT):
        def wrapped(self, row):
            add(self, row)
            if row["step"] == step:
                signal.raise_signal(number)

        monkeypatch.setattr(MetricsLog, "add", wrapped)

    yield at
    monkeypatch.undo()


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_files(tmp_path, capsys):
    assert command(options(tmp_path, "--name", "a", steps=40)) == 0
    said = capsys.readouterr().out
    for word in ("unigram entropy", "tokens/s", "peak memory", "sample", "def "):
        assert word in said
    rows = RunDir(tmp_path / "a").read_metrics()
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert list(rows[0]) == list(run_dir.COLUMNS)
    values = losses(tmp_path, "a")
    assert values[0] == pytest.approx(math.log(SIZES["gpt-500k"].vocab), abs=0.1)
    assert min(values[-5:]) < values[0] - 1
    held_out = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert len(held_out) == training.EVALUATIONS
    assert held_out[-1] < held_out[0]
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (written["model"], written["steps"], written["batch"]) == ("gpt-500k", 40, 2)
    state = RunDir(tmp_path / "a").load()
    assert state["step"] == 40
    assert [p.name for p in RunDir(tmp_path / "a").checkpoints.glob("*_*")] == ["step_40"]  # the newest alone is kept
    assert not list(RunDir(tmp_path / "a").checkpoints.glob(".*"))


def test_compiled_run_equals_eager_and_compiles_one_graph(tmp_path, capsys):
    assert command(options(tmp_path, "--name", "eager", steps=3)) == 0
    assert command(options(tmp_path, "--name", "compiled", steps=3, backend="dscompile")) == 0
    assert losses(tmp_path, "compiled") == pytest.approx(losses(tmp_path, "eager"), abs=1e-3)
    reports = last_report()
    assert [report.kind for report in reports] == ["forward", "backward"]  # the held-out losses took the same graph
    assert (tmp_path / "compiled" / "graphs" / "manifest.json").exists()
    said = capsys.readouterr().out
    for word in ("forward", "backward", "proved", "matrix products", "fallbacks"):
        assert word in said


# -- interruption and resumption ---------------------------------------------------------------------------------------


def test_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, capsys, interrupt_at):
    assert command(options(tmp_path, "--name", "whole")) == 0
    interrupt_at(5)
    assert command(options(tmp_path, "--name", "cut")) == 130
    assert f"dscompile train --resume cut --run-dir {tmp_path}" in capsys.readouterr().out
    assert RunDir(tmp_path / "cut").load()["step"] == 5
    interrupt_at(7, signal.SIGTERM)
    torch.manual_seed(99)  # nothing of the process may matter
    assert command(["train", "--resume", "cut", "--run-dir", str(tmp_path)]) == 143
    interrupt_at(None)
    assert command(["train", "--resume", "--run-dir", str(tmp_path)]) == 0  # no name: the newest
    whole, cut = (RunDir(tmp_path / name).read_metrics() for name in ("whole", "cut"))
    for column in ("step", "tokens", "lr", "loss", "grad_norm"):  # as text: bit for bit
        assert [row[column] for row in cut] == [row[column] for row in whole]
    assert cut[-1]["held_out_loss"] == whole[-1]["held_out_loss"]


def test_what_to_type_is_short_in_the_default_place(tmp_path, capsys, interrupt_at, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupt_at(2)
    arguments = ["train", "--data", TEXT, "--batch", "2", "--backend", "eager", "--ranks", "1", "--name", "a"]
    assert command(arguments) == 130
    assert capsys.readouterr().out.endswith("dscompile train --resume a\n")


def test_steps_after_the_checkpoint_are_done_again_not_twice_in_the_metrics(tmp_path):
    assert command(options(tmp_path, "--name", "a", steps=6)) == 0
    where = RunDir(tmp_path / "a")
    with where.metrics.open("a") as file:
        file.write("7,7,1.5,1,1,1,1,1,\n8,8,1")  # a crash: one step too many, one cut short
    assert command(["train", "--resume", "a", "--run-dir", str(tmp_path), "--steps", "8"]) == 0
    assert [int(row["step"]) for row in where.read_metrics()] == list(range(1, 9))
    assert where.read_metrics()[6]["loss"] != "1.5"


def test_compiled_run_resumes_bit_for_bit(tmp_path, interrupt_at):
    arguments = {"steps": 6, "backend": "dscompile"}
    assert command(options(tmp_path, "--name", "whole", **arguments)) == 0
    interrupt_at(3)
    assert command(options(tmp_path, "--name", "cut", **arguments)) == 130
    interrupt_at(None)
    torch.compiler.reset()  # as a new process would
    assert command(["train", "--resume", "cut", "--run-dir", str(tmp_path)]) == 0
    whole, cut = (RunDir(tmp_path / name).read_metrics() for name in ("whole", "cut"))
    for column in ("loss", "grad_norm", "held_out_loss"):
        assert [row[column] for row in cut] == [row[column] for row in whole]
    assert [report.cached for report in last_report()] == [True, True]  # dumps and all
    assert (tmp_path / "cut" / "graphs" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_signal_at_any_moment_leaves_nothing_or_a_run_to_resume(tmp_path, share):
    arguments = options(tmp_path / "runs", "--name", "a", steps=20)
    call = [sys.executable, "-m", "dscompile.tools.cli", *arguments]
    start = time.monotonic()
    subprocess.run([*call, "--run-dir", str(tmp_path / "timing")], cwd=ROOT, check=True, capture_output=True)
    whole = time.monotonic() - start
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    time.sleep(whole * share)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, 130, -signal.SIGINT), err  # the last: before Python itself had started
    assert process.returncode < 0 or "Traceback" not in err
    if (tmp_path / "runs" / "a").exists():
        state = RunDir(tmp_path / "runs" / "a").load()
        if state["step"] < 20:
            assert command(["train", "--resume", "a", "--run-dir", str(tmp_path / "runs")]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_from_outside_keeps_a_checkpoint(tmp_path, number):
    arguments = options(tmp_path, "--name", "a", steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "dscompile.tools.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        where, deadline = RunDir(tmp_path / "a"), time.monotonic() + 120
        while len(where.read_metrics()) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "--resume a" in out
    assert "Traceback" not in err
    assert where.load()["step"] == int(where.read_metrics()[-1]["step"]) >= 3


def test_signal_while_compiling_breaks_off_at_once(tmp_path, monkeypatch):
    def compiling(inputs, targets):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on compiling")

    monkeypatch.setattr(Run, "_compile", lambda self: compiling)
    assert command(options(tmp_path, "--name", "a")) == 130
    monkeypatch.undo()
    assert RunDir(tmp_path / "a").load()["step"] == 0
    assert command(["train", "--resume", "a", "--run-dir", str(tmp_path)]) == 0
    assert len(losses(tmp_path, "a")) == 12


def test_second_signal_does_not_wait_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.caught == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--lr", "0.1"], ["--lr 0.1", "start a new run"]),
        (["--model", "gpt-1m"], ["--model gpt-1m", "gpt-500k"]),
        (["--name", "b"], ["--name b"]),
        ([], ["all 2 steps are done", "--steps"]),
    ],
)
def test_resume_refuses_what_would_be_another_run(tmp_path, capsys, more, parts):
    assert command(options(tmp_path, "--name", "a", steps=2)) == 0
    capsys.readouterr()
    one_line(capsys, command(["train", "--resume", "a", "--run-dir", str(tmp_path), *more]), *parts)


def test_resume_refuses_a_changed_text(tmp_path, capsys):
    text = tmp_path / "text.py"
    text.write_bytes(Path(TEXT).read_bytes())
    place = ["--run-dir", str(tmp_path / "runs")]
    arguments = options(tmp_path / "runs", "--name", "a", "--data", str(text), steps=2)
    assert command(arguments) == 0
    text.write_bytes(Path(TEXT).read_bytes().replace(b"parser", b"parcel", 1))
    capsys.readouterr()
    one_line(capsys, command(["train", "--resume", "a", "--steps", "4", *place]), "the text has changed")


def test_resume_names_the_nearest_run(tmp_path, capsys):
    one_line(capsys, command(["train", "--resume", "--run-dir", str(tmp_path)]), "no run with a checkpoint")
    save_step(create_run(tmp_path, "monday", "gpt-500k"), 0)
    one_line(capsys, command(["train", "--resume", "munday", "--run-dir", str(tmp_path)]), "Did you mean 'monday'?")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """Let no file of this process grow past a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_step(where, step, size=3):
    """Save a step of a tiny model in place of a run's."""
    model = torch.nn.Linear(size, 1)
    checkpoints = Checkpoints(where, model, torch.optim.AdamW(model.parameters()), first=True)
    checkpoints.save(step, {"settings": {}, "merges": [], "corpus": ""}, asynchronous=False)


def test_full_disk_leaves_the_checkpoint_before(tmp_path, small_disk):
    where = create_run(tmp_path, "a", "gpt-500k")
    save_step(where, 1)
    small_disk(20_000)
    with pytest.raises(RunError, match=r"step_2: cannot write the checkpoint: File too large.*before is intact"):
        save_step(where, 2, size=100_000)
    assert where.load()["step"] == 1
    assert sorted(p.name for p in where.checkpoints.iterdir()) == ["latest", "step_1"]


def test_disk_that_fills_during_training_is_one_line(tmp_path, capsys, monkeypatch):
    synced, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 6:  # of the first checkpoint: data, description, two folders, ``latest``, its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    status = command(options(tmp_path, "--name", "a", steps=3))
    monkeypatch.undo()
    one_line(capsys, status, "No space left on device", "What was there before is intact", "--run-dir")
    assert RunDir(tmp_path / "a").load()["step"] == 0
    assert command(["train", "--resume", "a", "--run-dir", str(tmp_path)]) == 0


def test_metrics_that_cannot_be_written_are_one_line(tmp_path, capsys, monkeypatch):
    def create(parent, name, model):
        where = create_run(parent, name, model)
        real = where.path / "config.json"
        assert real.parent.is_dir()
        return where

    opened = Path.open

    def full(self, mode="r", *args, **kwargs):
        if self.name == "metrics.csv" and "a" in mode:
            return opened(Path("/dev/full"), "w", *args, **kwargs)
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    status = command(options(tmp_path, "--name", "a"))
    monkeypatch.undo()
    one_line(capsys, status, "metrics.csv", "No space left on device")
    assert RunDir(tmp_path / "a").load()["step"] == 0


def test_unwritable_place_is_one_line_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    one_line(capsys, command(options(tmp_path / "file" / "runs")), "cannot make the run's directory", "Not a directory")


@pytest.mark.parametrize("name", ["checkpoint.json", "rank_00000.bin"])
@pytest.mark.parametrize("damage", ["cut", "head", "empty", "garbage", "flipped"])
def test_damaged_checkpoint_is_one_line_that_names_the_file(tmp_path, capsys, damage, name):
    assert command(options(tmp_path, "--name", "a", steps=2)) == 0
    file = RunDir(tmp_path / "a").checkpoints / "step_2" / name
    content = file.read_bytes()
    broken = {
        "cut": content[: len(content) // 2],
        "head": content[:100],
        "empty": b"",
        "garbage": b"hello world, this is no checkpoint",
        "flipped": b"".join(bytes([b ^ 0xFF]) for b in content[:4000]) + content[4000:],
    }
    file.write_bytes(broken[damage])
    capsys.readouterr()
    status = command(["train", "--resume", "a", "--run-dir", str(tmp_path), "--steps", "4"])
    one_line(capsys, status, str(file), "damaged")


def test_checkpoint_of_another_program_or_model_is_one_line(tmp_path, capsys):
    assert command(options(tmp_path, "--name", "a", steps=2)) == 0
    where, resume = RunDir(tmp_path / "a"), ["train", "--resume", "a", "--run-dir", str(tmp_path), "--steps", "4"]
    kept = where.load()
    save_checkpoint(where.checkpoints, "foreign", model=torch.nn.Linear(2, 1), state={"epoch": 1})
    capsys.readouterr()
    one_line(capsys, command(resume), str(where.checkpoints), "not a checkpoint of 'dscompile train'")
    save_checkpoint(where.checkpoints, "foreign", model=torch.nn.Linear(2, 1), state=kept)
    one_line(capsys, command(resume), str(where.checkpoints), "another model")


def test_checkpoint_of_the_former_format_is_named_with_the_way_out(tmp_path, capsys):
    where = create_run(tmp_path, "old", "gpt-500k")
    torch.manual_seed(0)
    weights = GPT(SIZES["gpt-500k"]).state_dict()
    torch.save({"format": 1, "step": 3, "model": weights}, where.path / "checkpoint.pt")
    for name in ([], ["old"]):
        said = one_line(capsys, command(["train", "--resume", *name, "--run-dir", str(tmp_path)]), "checkpoint.pt")
        assert 'load_weights(model, file, key="model")' in said
    torch.manual_seed(1)
    model = GPT(SIZES["gpt-500k"])
    assert load_weights(model, where.path / "checkpoint.pt", key="model") == []  # what the message says works
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_asynchronous_saves_end_before_the_run_does_and_their_errors_are_its(tmp_path, capsys, caplog, monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda call, *_: at_exit.append(call))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)  # a save before every step
    assert command(options(tmp_path, "--name", "a", steps=4)) == 0
    assert RunDir(tmp_path / "a").load()["step"] == 4
    assert not list(RunDir(tmp_path / "a").checkpoints.glob(".*"))
    monkeypatch.setattr(checkpoint_directory, "commit", refuse(checkpoint_directory.commit, "step_2"))
    assert command(options(tmp_path, "--name", "b", steps=4)) == 2
    assert "step_2: cannot write the checkpoint: No space left on device" in capsys.readouterr().err
    assert RunDir(tmp_path / "b").load()["step"] == 1
    ours = [call for call in at_exit if call.__module__ == checkpoint_saver.__name__]
    for call in ours:
        call()
    assert ours
    assert "step_2" not in caplog.text  # said once: not by the interpreter's exit too


def refuse(commit, tag):
    def refused(temporary, name):
        if name == tag:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return commit(temporary, name)

    return refused


def test_newest_run_is_the_one_saved_last(tmp_path):
    for age, name in ((30, "new"), (60, "old")):
        where = create_run(tmp_path, name, "gpt-500k")
        save_step(where, 1)
        os.utime(where.checkpoints / "latest", (time.time() - age, time.time() - age))
    assert find_run(tmp_path, None).name == "new"
    assert create_run(tmp_path, None, "m").name != create_run(tmp_path, None, "m").name


# -- numbers that are not finite ---------------------------------------------------------------------------------------


def test_learning_rate_too_high_stops_and_keeps_a_good_checkpoint(tmp_path, capsys):
    status = command(options(tmp_path, "--name", "a", "--lr", "1e30", steps=30))
    said = one_line(capsys, status, "step ", "nan", "first gradient that is not finite: ", "lower --lr")
    assert "tokens.weight" in said or "blocks." in said or "positions.weight" in said
    state = RunDir(tmp_path / "a").load()
    assert state["step"] == 0
    reader = DirectoryReader(RunDir(tmp_path / "a").checkpoints / "step_0")
    names = stored_model_keys(reader.contents)
    assert "tokens.weight" in names
    assert all(reader.tensor(name).isfinite().all() for name in names)


@pytest.fixture
def small_run(tmp_path):
    settings = Settings("gpt-500k", 4, 2, 0, 1e-3, TEXT, "eager", {})
    corpus = load_corpus(Path(TEXT), 512)
    batches = Batches(corpus.train, batch=2, context=64, seed=0)
    return Run(settings, corpus, batches, create_run(tmp_path, "a", "gpt-500k"))


def test_gradient_that_is_not_finite_names_its_parameter(small_run):
    small_run.model.blocks[1].up.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: value.clone() for name, value in small_run.model.state_dict().items()}
    with Interrupts() as interrupts, pytest.raises(RunError, match=r"step 1: .*gradient .*: blocks\.1\.up\.weight"):
        small_run._train_step(interrupts)
    assert all(torch.equal(value, before[name]) for name, value in small_run.model.state_dict().items())


def test_finite_gradients_whose_norm_overflows_stop_too(small_run):
    small_run.model.head.weight.register_hook(lambda grad: torch.full_like(grad, 1e30))
    with Interrupts() as interrupts, pytest.raises(RunError, match="norm inf"):
        small_run._train_step(interrupts)


def test_loss_that_is_not_finite_names_the_parameter_that_is_not(small_run):
    with torch.no_grad():
        small_run.model.blocks[0].norm2.bias[3] = math.nan
    with (
        Interrupts() as interrupts,
        pytest.raises(RunError, match=r"loss is nan.*parameter .*: blocks\.0\.norm2\.bias"),
    ):
        small_run._train_step(interrupts)


def test_state_that_gives_no_finite_loss_is_not_saved(small_run):
    small_run._save()
    with Interrupts() as interrupts:
        small_run._train_step(interrupts)
    with torch.no_grad():
        small_run.model.head.weight.fill_(math.inf)
    with pytest.raises(RunError, match="checkpoint of step 0"):
        small_run._save()
    assert small_run.where.load()["step"] == 0


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--model", "gpt-500"], ["--model 'gpt-500'", "Did you mean 'gpt-500k'?"]),
        (["--batch", "0"], ["--batch 0"]),
        (["--batch", "-3"], ["--batch -3"]),
        (["--batch", "100000"], ["too little text", "smaller --batch"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--lr", "nan"], ["--lr nan"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--lr", "fast"], ["--lr", "number"]),
        (["--backend", "inducter"], ["Did you mean 'inductor'?"]),
        (["--name", "a/b"], ["--name 'a/b'"]),
        (["--config", "/nowhere.json"], ["/nowhere.json"]),
        (["stray"], ["--resume stray"]),
        (["--setps", "3"], ["--setps"]),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(tmp_path, capsys, more, parts):
    one_line(capsys, command([*options(tmp_path), *more]), *parts)
    assert not list(tmp_path.iterdir())


def test_wrong_data_and_config_are_one_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a few words\n")
    missing = ["train", "--run-dir", str(tmp_path / "runs"), "--ranks", "1", "--data", str(tmp_path / "test.txt")]
    one_line(capsys, command(missing), "no such file", "Did you mean 'text.txt'?")
    one_line(capsys, command([*missing[:-1], str(tmp_path / "text.txt")]), "too little text")
    (tmp_path / "options.json").write_text('{"verfy": "each"}')
    config = ["--config", str(tmp_path / "options.json")]
    one_line(capsys, command([*options(tmp_path), *config]), "Did you mean 'verify'?")
    (tmp_path / "options.json").write_text('{"pipeline": "canonicalize"}')
    one_line(capsys, command([*options(tmp_path / "none"), *config]), "Did you mean 'canonicalise'?")
    assert not (tmp_path / "none").exists()


def test_name_that_exists_is_one_line(tmp_path, capsys):
    create_run(tmp_path, "a", "gpt-500k")
    one_line(capsys, command(options(tmp_path, "--name", "a")), "exists already", "--resume a")


def test_config_file_reaches_the_compiler_and_the_checkpoint(tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"regions": "aten", "cache": false}')
    arguments = options(tmp_path, "--name", "a", "--config", str(file), steps=1, backend="dscompile")
    assert command(arguments) == 0
    assert RunDir(tmp_path / "a").load()["settings"]["config"] == {"regions": "aten", "cache": False}
    assert {report.facts["compiled_regions"] for report in last_report()} == {0}


def test_error_inside_the_compiler_is_one_line(tmp_path, capsys):
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"dump": str(file / "under_a_file")}))
    status = command(options(tmp_path, "--name", "a", "--config", str(file), backend="dscompile"))
    one_line(capsys, status, "under_a_file")


def test_learning_rate_warms_up_and_comes_down():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(training.FINAL_LR, abs=0.01)
