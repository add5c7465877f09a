"""A save that dies or fails leaves the checkpoint before it as ``latest``, complete."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dscompile
from dscompile.engine.checkpoint import load_checkpoint, save_checkpoint
from dscompile.engine.checkpoint_files import DirectoryReader
from dscompile.errors import CheckpointError
from tests.engine.checkpoint_runs import Run
from tests.ranks import rank_outcomes, run_ranks

OPERATIONS = ("mkdir", "rename", "replace", "open", "fsync", "rmtree", "write")


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, value)
    return model


def die_before(operation: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kill this process before its nth call into the file system; the names of the calls that were made."""
    made: list[str] = []

    def counted(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(made) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(name)
            return call(*args, **kwargs)

        return wrapper

    from dscompile.engine import checkpoint_directory, checkpoint_files

    for name in ("mkdir", "rename", "replace"):
        monkeypatch.setattr(Path, name, counted(name, getattr(Path, name)))
    for name in ("fsync", "open"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    monkeypatch.setattr(checkpoint_directory.shutil, "rmtree", counted("rmtree", checkpoint_directory.shutil.rmtree))

    class File(checkpoint_files.FileIO):
        def __init__(self, *args: Any) -> None:
            counted("create", lambda: None)()
            super().__init__(*args)

        def write(self, data: Any) -> int:
            half = memoryview(data)[: max(len(data) // 2, 1)]  # so that one may be cut short
            return counted("write", super().write)(half)

    monkeypatch.setattr(checkpoint_files, "FileIO", File)
    return made


def save_in_child(folder: Path, tag: str, operation: int) -> bool:
    """Whether a save in a child process, killed before its nth operation, came to its end."""
    pid = os.fork()
    if pid == 0:
        with pytest.MonkeyPatch.context() as monkeypatch:
            die_before(operation, monkeypatch)
            save_checkpoint(folder, tag, model=model_of(2.0), state={"n": 2})
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("tag", ["new", "old"])
def test_killed_before_any_operation_latest_is_complete(tmp_path: Path, tag: str) -> None:
    found = []
    for operation in range(60):
        folder = tmp_path / str(operation)
        save_checkpoint(folder, "old", model=model_of(1.0), state={"n": 1})
        ended = save_in_child(folder, tag, operation)
        model = model_of(0.0)
        loaded = load_checkpoint(folder, model=model)
        found.append(loaded.state["n"])
        assert torch.equal(model.weight, torch.full((2, 3), float(found[-1])))
        assert loaded.path.name in (tag, "old", ".replaced-old")
        save_checkpoint(folder, tag, model=model_of(3.0))  # and the next save works, and cleans up
        assert {p.name for p in folder.iterdir()} <= {"old", "new", "latest", f".replaced-{tag}"}
        load_checkpoint(folder, model=model)
        assert torch.equal(model.weight, torch.full((2, 3), 3.0))
        if ended:
            break
    else:
        pytest.fail("the save never came to its end")
    assert operation > 12, "the operations are counted"
    assert found == sorted(found)
    assert set(found) == {1, 2}


# -- random moments of a real run ------------------------------------------------------------------------------------

STEPS_A_KILL = 8


def train_and_save(
    rank: int, world: int, folder: str, log: str, steps: int, delay: float | None, victims: tuple[int, ...]
) -> bool:
    """Go on to the last step, saving after each; victims are killed ``delay`` seconds after their first step."""
    run = Run(3)
    if Path(folder, "latest").exists():
        run.load(folder)
    while run.step < steps:
        loss = run.train(1)[0]
        if delay is not None and rank in victims:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            delay = None
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps([run.step, loss]) + "\n")
        run.save(folder, asynchronous=run.step % 2 == 0)
    return True


def kill_and_go_on(tmp_path: Path, kills: int, seed: int) -> None:
    log = tmp_path / "losses"
    steps = STEPS_A_KILL * kills
    expected = run_ranks(uninterrupted, 2, steps)[0]
    generator, killed = random.Random(seed), 0
    for attempt in range(kills + 1):
        last = attempt == kills
        delay = None if last else generator.uniform(0.0, 0.25)
        victims = generator.choice([(0,), (1,), (0, 1)])
        outcomes = rank_outcomes(
            train_and_save, 2, str(tmp_path / "run"), str(log), steps, delay, victims, timeout=60, grace=4
        )
        killed += any(o.exitcode == -signal.SIGKILL for o in outcomes)
        if last:
            assert all(o.ok for o in outcomes), outcomes[0].trace
    assert killed == kills, "a run ended before it was killed: make it longer"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert {step for step, _ in rows} == set(range(1, steps + 1))
    for step, loss in rows:
        assert loss == pytest.approx(expected[step - 1], rel=1e-6)


def uninterrupted(rank: int, world: int, steps: int) -> list[float]:
    return Run(3).train(steps)


def test_killed_at_three_random_moments_the_losses_go_on(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_losses_go_on(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, 20, seed=2)


# -- a disk that is full on one rank -----------------------------------------------------------------------------------


def fails_on_one(rank: int, world: int, folder: str, asynchronous: bool) -> list[str]:
    torch.manual_seed(0)
    model = dscompile.distribute(nn.Linear(64, 64), config={"zero": {"stage": 3}})
    save_checkpoint(folder, "good", model=model)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    texts = []
    try:
        handle = save_checkpoint(folder, "bad", model=model, asynchronous=asynchronous)
        if asynchronous:
            assert handle.wait_ended(20)
            save_checkpoint(folder, "next", model=model)
    except CheckpointError as error:
        texts.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    save_checkpoint(folder, "after", model=model)
    return texts


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_that_cannot_write_fails_all_and_keeps_the_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    texts = run_ranks(fails_on_one, 2, str(tmp_path), asynchronous)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 1
    assert "on rank 1 of 2" in texts[0][0]
    assert "File too large" in texts[0][0]
    assert {p.name for p in tmp_path.iterdir()} == {"good", "after", "latest"}
    assert (tmp_path / "latest").read_text().strip() == "after"


def dies(rank: int, world: int, folder: str) -> tuple[str, float]:
    model = dscompile.distribute(nn.Linear(4, 4), config={"zero": {"stage": 3}})
    save_checkpoint(folder, "good", model=model)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as found:
        save_checkpoint(folder, "bad", model=model)
    return str(found.value), time.monotonic() - start


def test_a_rank_that_died_is_a_named_error_not_a_hang(tmp_path: Path) -> None:
    first, second = rank_outcomes(dies, 2, str(tmp_path), timeout=60, grace=20)
    assert second.exitcode == -signal.SIGKILL
    text, seconds = first.value
    assert "a rank could not be reached" in text
    assert seconds < 5
    assert (tmp_path / "latest").read_text().strip() == "good"


def raises_in_one(rank: int, world: int, folder: str) -> tuple[str, str]:
    model = dscompile.distribute(nn.Linear(4, 4), config={"zero": {"stage": 3}})
    save_checkpoint(folder, "good", model=model)
    if rank == 1:

        def broken(*_: Any) -> None:
            raise ZeroDivisionError("of the user's")

        model.register_state_dict_post_hook(broken)
    texts = []
    for call in (lambda: save_checkpoint(folder, "bad", model=model), lambda: load_checkpoint(folder, model=model)):
        with pytest.raises(CheckpointError) as found:
            call()
        assert rank == 0 or isinstance(found.value.__cause__, ZeroDivisionError)
        texts.append(str(found.value))
    return texts[0], texts[1]


def test_an_error_of_the_models_own_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(raises_in_one, 2, str(tmp_path))
    assert first == second
    assert all(text == "on rank 1 of 2: ZeroDivisionError: of the user's" for text in first)


def grows(rank: int, world: int, folder: str) -> list[float]:
    """The layout changes between saves: on both ranks, then on one alone (which plans again)."""
    model = dscompile.distribute(nn.Sequential(nn.Linear(4, 4)), config={"zero": {"stage": 3}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for number in range(5):
        if number == 2:
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()  # momentum buffers
        if number == 4:
            model.append(dscompile.distribute(nn.Linear(4, 3), config={"zero": {"stage": 3}}))
        if number == 3 and rank == 1:
            model._dscompile_saver.plan = None
        save_checkpoint(folder, "a", model=model, optimizer=optimizer)
        loaded = load_checkpoint(folder, model=model, optimizer=optimizer)
        found.append(len(DirectoryReader(loaded.path).contents.tensors.state_dict_metadata))
    return found


def test_a_plan_is_used_again_until_the_layout_changes(tmp_path: Path) -> None:
    assert run_ranks(grows, 2, str(tmp_path)) == [[2, 2, 4, 4, 6]] * 2


def no_memory(rank: int, world: int, folder: str, asynchronous: bool) -> tuple[str, float]:
    from dscompile.engine import checkpoint_files, checkpoint_save, checkpoint_stage

    model = dscompile.distribute(nn.Linear(4, 4), config={"zero": {"stage": 3}})
    save_checkpoint(folder, "good", model=model)

    def refuse(*_: Any) -> Any:
        raise MemoryError("no room for a copy")

    if rank == 1:
        checkpoint_stage.HostBuffer.take = refuse  # type: ignore[method-assign]
        checkpoint_save.raw = checkpoint_files.raw = refuse
    start = time.monotonic()
    with pytest.raises(CheckpointError) as found:
        save_checkpoint(folder, "bad", model=model, asynchronous=asynchronous).wait()
    return str(found.value), time.monotonic() - start


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_without_memory_fails_all(tmp_path: Path, asynchronous: bool) -> None:
    (first, seconds), (second, _) = run_ranks(no_memory, 2, str(tmp_path), asynchronous)
    assert first == second
    assert "on rank 1 of 2" in first
    assert "no room for a copy" in first
    assert seconds < 5
    assert {p.name for p in tmp_path.iterdir()} == {"good", "latest"}


def test_a_directory_that_cannot_be_made_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file" / "run", "a", model=nn.Linear(1, 1))


@pytest.mark.parametrize("tag", ["", "latest", ".x", "a/b", "../x", "a b", "x" * 300])
def test_tags_that_name_no_folder_are_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(CheckpointError, match="a tag is a folder's name"):
        save_checkpoint(tmp_path, tag, model=nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())


# -- asynchronous ----------------------------------------------------------------------------------------------------


def test_an_asynchronous_save_holds_the_values_of_its_moment(tmp_path: Path) -> None:
    run = Run(None)
    run.train(2)
    expected = run.values()
    handle = run.save(tmp_path, asynchronous=True)
    run.train(3)
    handle.wait()
    run.load(tmp_path)
    found = run.values()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert run.step == 2


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_waits_until_its_values_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    slow_copies(monkeypatch)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    expected = [v.clone() for v in (*model.state_dict().values(), *optimizer.state_dict()["state"][0].values())]
    start = time.perf_counter()
    handle = save_checkpoint(tmp_path, "a", model=model, optimizer=optimizer, asynchronous=True)
    assert not handle.staged()
    model(torch.randn(4, 3)).square().sum().backward()  # BatchNorm's statistics change here
    optimizer.step()
    assert handle.staged()
    assert 0.1 < handle.blocked_seconds <= time.perf_counter() - start
    handle.wait()
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    found = [*model.state_dict().values(), *optimizer.state_dict()["state"][0].values()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_schedule_may_change_a_tensor_learning_rate_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_copies(monkeypatch)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1.0), foreach=False)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    handle = save_checkpoint(tmp_path, "a", model=model, optimizer=optimizer, asynchronous=True)
    schedule.step()
    handle.wait()
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert float(optimizer.param_groups[0]["lr"]) == 1.0


def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies in the background take 50 ms each."""
    from dscompile.engine import checkpoint_stage

    def slow(*args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        copy(*args, **kwargs)

    copy = checkpoint_stage._copy
    monkeypatch.setattr(checkpoint_stage, "_copy", slow)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    run = Run(None)
    first = run.save(tmp_path, "a", asynchronous=True)
    second = run.save(tmp_path, "b", asynchronous=True)
    assert first.done()
    second.wait()
    assert (tmp_path / "latest").read_text().strip() == "b"


def test_a_write_from_elsewhere_during_the_copy_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_copies(monkeypatch)
    run = Run(None)
    handle = run.save(tmp_path, "a", asynchronous=True)
    with torch.no_grad():
        run.model.up.weight.add_(1.0)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"up\.weight was written to while it was being saved"):
        handle.wait()
    with pytest.raises(CheckpointError, match="was written to"):
        run.save(tmp_path, "b")
    run.save(tmp_path, "b")
    handle = run.save(tmp_path, "c", asynchronous=True)
    handle.wait_staged()
    with torch.no_grad():
        run.model.up.weight.add_(1.0)  # type: ignore[union-attr]
    handle.wait()


EXITS = """
import sys, time
from torch import nn
from dscompile.engine import checkpoint_stage
from dscompile.engine.checkpoint import save_checkpoint
copy = checkpoint_stage._copy
checkpoint_stage._copy = lambda *a, **k: (time.sleep(0.3), copy(*a, **k))
save_checkpoint(sys.argv[1], "a", model=nn.Linear(2, 2), asynchronous=True)
"""


def test_a_program_that_ends_completes_its_save(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", EXITS, str(tmp_path)], env=environment, check=True, timeout=120)
    load_checkpoint(tmp_path, model=nn.Linear(2, 2))
    assert {p.name for p in tmp_path.iterdir()} == {"a", "latest"}
