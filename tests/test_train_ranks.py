"""``dscompile train`` on several ranks: the losses of one, one report, agreed ends, no rank left behind."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dscompile.engine.checkpoint_files import DirectoryReader
from dscompile.engine.checkpoint_state import stored_model_keys
from dscompile.tools import train
from dscompile.tools.cli import run as command
from dscompile.tools.interrupts import Interrupted, Interrupts
from dscompile.tools.launch import launch
from dscompile.tools.run_dir import MetricsLog, RunDir
from dscompile.tools.training import EMBEDDING_LR

TEXT = argparse.__file__
ROOT = Path(__file__).parent.parent


def options(place, name, *more, ranks=2, steps=4, batch=6, backend="eager"):
    return [
        *("train", "--run-dir", str(place), "--data", TEXT, "--batch", str(batch), "--name", name),
        *("--steps", str(steps), "--backend", backend, *([] if ranks is None else ["--ranks", str(ranks)]), *more),
    ]


def columns(place, name, *names):
    return [[float(row[column]) for column in names] for row in RunDir(place / name).read_metrics()]


def assert_same_run(place, name, reference):
    """Same losses, norms and held-out losses as another run, within the rounding of another order of sums."""
    for (loss, norm), (loss0, norm0) in zip(
        columns(place, name, "loss", "grad_norm"), columns(place, reference, "loss", "grad_norm"), strict=True
    ):
        assert loss == pytest.approx(loss0, rel=1e-5)
        assert norm == pytest.approx(norm0, rel=1e-4)
    last, last0 = (RunDir(place / n).read_metrics()[-1]["held_out_loss"] for n in (name, reference))
    assert float(last) == pytest.approx(float(last0), rel=1e-5)


class Started:
    """A command line in a process of its own, and the ranks that it starts."""

    def __init__(self, *arguments, launcher=(), **environment):
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "dscompile.tools.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
        )

    def children(self):
        pid = self.process.pid
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def wait_for_rows(self, where, count):
        end = time.monotonic() + 120
        while len(where.read_metrics()) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)

    def end(self, timeout):
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


def assert_gone(pids):
    end = time.monotonic() + 5
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.05)


# -- the losses of one rank --------------------------------------------------------------------------------------------


def test_two_ranks_compiled_have_the_losses_of_one_and_one_report(tmp_path, capfd):
    assert command(options(tmp_path, "one", ranks=1, backend="dscompile")) == 0
    capfd.readouterr()
    assert command(options(tmp_path, "two", ranks=None, backend="dscompile")) == 0  # the default: 2 ranks, ZeRO-3
    said = capfd.readouterr()
    assert_same_run(tmp_path, "two", "one")
    settings = RunDir(tmp_path / "two").load()["settings"]
    assert (settings["ranks"], settings["zero"]) == (2, 3)
    for word in ("on 2 ranks (ZeRO-3)", "unigram entropy", "(rank 0)", "(rank 1)", "zero3: proved", "sample"):
        assert said.out.count(word) == 1, said.out
    assert said.err == ""
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_a_run_goes_on_with_another_number_of_ranks_and_another_stage(tmp_path):
    assert command(options(tmp_path, "whole", ranks=1, steps=6)) == 0
    assert command(options(tmp_path, "parts", "--zero", "1", steps=6)) == 0
    assert_same_run(tmp_path, "parts", "whole")
    one, two = (DirectoryReader(RunDir(tmp_path / name).checkpoints / "step_6") for name in ("whole", "parts"))
    # AdamW divides by the gradient's size, so where that is near zero rounding moves a value by a share of a step.
    step = EMBEDDING_LR * RunDir(tmp_path / "whole").load()["settings"]["lr"]
    assert stored_model_keys(two.contents) == stored_model_keys(one.contents) != []
    for name in stored_model_keys(one.contents):
        torch.testing.assert_close(two.tensor(name), one.tensor(name), rtol=0, atol=step / 100)
    resume = ["train", "--run-dir", str(tmp_path), "--steps", "8"]
    assert command([*resume, "--resume", "whole"]) == 0
    assert command([*resume, "--resume", "parts", "--ranks", "3", "--zero", "3"]) == 0  # 3 does not divide the sizes
    assert_same_run(tmp_path, "parts", "whole")


def stop_after_three(request):
    """One rank of a run that gets Ctrl-C as its third step is logged."""
    add = MetricsLog.add

    def wrapped(log, row):
        add(log, row)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "add", wrapped)
        return train._rank(request)


def test_ten_losses_after_a_resume_on_other_ranks_and_stages_are_those_of_the_whole_run(tmp_path):
    assert command(options(tmp_path, "whole", "--zero", "3", steps=13, batch=4)) == 0
    given = {"data": TEXT, "batch": 4, "steps": 13, "backend": "eager", "ranks": 2, "zero": 3}
    assert launch(2, stop_after_three, train.Request(given, tmp_path, "cut", False)) == 130
    whole = columns(tmp_path, "whole", "loss", "lr")
    for stage, ranks in ((1, 2), (0, 1), (3, 4)):
        name = f"stage{stage}_ranks{ranks}"
        shutil.copytree(tmp_path / "cut", tmp_path / name)
        assert RunDir(tmp_path / name).load()["step"] == 3
        resume = ["train", "--resume", name, "--run-dir", str(tmp_path), "--zero", str(stage), "--ranks", str(ranks)]
        assert command(resume) == 0
        found = columns(tmp_path, name, "loss", "lr")
        assert len(found[3:]) == 10
        for mine, theirs in zip(found, whole, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6), name


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whom", ["terminal", "one rank"])
def test_a_signal_keeps_a_checkpoint_of_one_step(tmp_path, whom):
    started, where = Started(*options(tmp_path, "a", steps=100_000)), RunDir(tmp_path / "a")
    started.wait_for_rows(where, 3)
    children = started.children()
    assert len(children) == 2
    if whom == "terminal":  # Ctrl-C: to the launcher, which hands it on, and to the ranks
        number = signal.SIGINT
        os.killpg(started.process.pid, number)
    else:
        number = signal.SIGTERM
        os.kill(max(children), number)
    status, out, err = started.end(timeout=40)
    assert status == 128 + number, err
    assert out.count(f"--resume a --run-dir {tmp_path}") == 1
    assert err == ""
    assert_gone(children)
    state = where.load()
    assert state["step"] == int(where.read_metrics()[-1]["step"]) >= 3
    steps = str(state["step"] + 2)
    assert command(["train", "--resume", "a", "--run-dir", str(tmp_path), "--steps", steps, "--ranks", "1"]) == 0


def assert_ended_quietly(started, number, place, name):
    """Before there is a run, with no word; or, if the ranks had come so far by then, with a whole run at step 0."""
    status, out, err = started.end(timeout=90)
    assert (status, err) == (128 + number, "")
    where = RunDir(place / name)
    if out == "":
        assert not where.path.exists()
        return
    assert re.search(rf"^Stopped after step 0 of .*: dscompile train --resume {name} --run-dir {place}$", out, re.M)
    assert where.load()["step"] == 0


def test_a_signal_to_ranks_that_still_start_is_quiet(tmp_path):
    started = Started(*options(tmp_path, "a", steps=100_000))
    end = time.monotonic() + 60
    while len(started.children()) < 2:
        assert started.process.poll() is None, started.process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    children = started.children()
    os.killpg(started.process.pid, signal.SIGINT)
    assert_ended_quietly(started, signal.SIGINT, tmp_path, "a")
    assert_gone(children)


SIGNAL_BETWEEN_STARTS = """
import os, signal, sys, time
from multiprocessing import util
from dscompile.tools.cli import main

start = util.spawnv_passfds

def start_and_signal(path, arguments, handles):
    pid = start(path, arguments, handles)
    if "resource_tracker" not in str(arguments):  # a rank, which has not been told yet what it is
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        time.sleep(0.5)
    return pid

util.spawnv_passfds = start_and_signal
sys.argv[:3] = ["dscompile"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_ranks_are_started_waits_until_they_can_end_quietly(tmp_path, number):
    arguments, launcher = options(tmp_path, "a", steps=100_000), ("-c", SIGNAL_BETWEEN_STARTS)
    started = Started(*arguments, launcher=launcher, SIGNAL=number.name)
    assert_ended_quietly(started, number, tmp_path, "a")


def test_a_rank_that_is_killed_ends_the_others_with_a_named_error(tmp_path):
    started, where = Started(*options(tmp_path, "a", steps=100_000)), RunDir(tmp_path / "a")
    started.wait_for_rows(where, 3)
    children = started.children()
    os.kill(max(children), signal.SIGKILL)
    began = time.monotonic()
    status, _, err = started.end(timeout=40)
    assert time.monotonic() - began < 30
    assert status not in (0, 130, 143)
    assert "Traceback" not in err
    assert "dscompile: rank 1 has died: process " in err
    assert_gone(children)
    assert where.load()["step"] == 0
    assert [p.name for p in where.checkpoints.glob("step_*")] == ["step_0"]


def test_a_launcher_that_is_killed_takes_its_ranks_with_it(tmp_path):
    started, where = Started(*options(tmp_path, "a", steps=100_000)), RunDir(tmp_path / "a")
    started.wait_for_rows(where, 3)
    children = started.children()
    started.process.kill()
    started.end(timeout=40)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.1)
    where.load()


def test_an_error_that_all_ranks_have_is_said_once(tmp_path, capfd):
    status = command(options(tmp_path, "a", "--lr", "1e30", steps=30))
    said = capfd.readouterr().err
    assert status == 2
    assert said.count("lower --lr") == 1
    assert "first gradient that is not finite: " in said
    assert said.count("\n") == 1, said
    assert RunDir(tmp_path / "a").load()["step"] == 0


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--batch", "5"], ["--batch 5", "2 ranks", "--ranks 1"]),
        (["--ranks", "0"], ["--ranks 0"]),
        (["--zero", "4"], ["--zero 4"]),
    ],
)
def test_wrong_options_are_found_before_any_rank_is_started(tmp_path, capfd, monkeypatch, more, parts):
    monkeypatch.setattr("dscompile.tools.launch.launch", None)
    assert command([*options(tmp_path, "a"), *more]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    for part in parts:
        assert part in said


def test_the_stage_of_the_config_file_and_of_the_option_must_agree(tmp_path, capfd):
    file = tmp_path / "options.json"
    file.write_text('{"zero": {"stage": 1}}')
    assert command([*options(tmp_path, "a", "--config", str(file), "--zero", "3")]) == 2
    assert "asks for stage 1" in capfd.readouterr().err
    assert command([*options(tmp_path, "a", "--config", str(file), ranks=1, steps=1)]) == 0
    assert RunDir(tmp_path / "a").load()["settings"]["zero"] == 1


def test_a_patient_rank_survives_the_second_signal():
    with Interrupts(patient=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.caught == signal.SIGINT
        with pytest.raises(Interrupted), interrupts.at_once():
            raise AssertionError("the signal came before the block")


# -- under torchrun ----------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(*more):
    return ("-m", "torch.distributed.run", *more)


def test_two_machines_with_one_rank_each(tmp_path):
    assert command(options(tmp_path, "one", ranks=1)) == 0
    port = free_port()
    nodes = [
        Started(
            *options(tmp_path / f"node{node}", "a", ranks=None),
            launcher=(
                *torchrun("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            ),
        )
        for node in (0, 1)
    ]
    results = [node.end(timeout=120) for node in nodes]
    assert [status for status, _, _ in results] == [0, 0], results
    assert "on 2 ranks (ZeRO-3)" in results[0][1]
    assert results[1][1] == ""
    (tmp_path / "node0" / "a").rename(tmp_path / "a")
    assert_same_run(tmp_path, "a", "one")
    assert not (tmp_path / "node1").exists()


def test_another_number_of_ranks_than_torchrun_started_is_an_error_on_every_rank(tmp_path):
    launcher = torchrun("--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    status, _, err = Started(*options(tmp_path, "a", ranks=3), launcher=launcher).end(timeout=60)
    assert status != 0
    assert "rank 0: --ranks 3, but 2 ranks were launched" in err
    assert "rank 1: --ranks 3, but 2 ranks were launched" in err
    assert not list(tmp_path.iterdir())
