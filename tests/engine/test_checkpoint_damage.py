"""Damaged, foreign and hostile checkpoints: a named error on every rank within seconds, and nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dscompile
from dscompile.engine.checkpoint import load_checkpoint, save_checkpoint
from dscompile.errors import CheckpointError
from tests.engine.checkpoint_runs import Run
from tests.ranks import run_ranks

SECONDS = 5.0
Damage = tuple[str, str, int]
"""(kind, file, random number)."""


def damages(count: int) -> list[Damage]:
    generator = random.Random(0)
    kinds = ("flip", "cut", "grow", "zero", "gone", "swap", "empty", "folder")
    files = ("rank_00000.bin", "checkpoint.json", "rank_00001.bin")
    return [(kinds[i % len(kinds)], files[i % len(files)], generator.randrange(1 << 30)) for i in range(count)]


def inflict(folder: Path, damage: Damage) -> None:
    kind, name, number = damage
    path = folder / name
    data = bytearray(path.read_bytes())
    at = number % len(data)
    if kind == "flip":
        data[at] ^= 1 << (number % 8)
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += b"\0"
    elif kind == "zero":
        block = slice(at, min(at + 512, len(data)))
        data[block] = bytes(len(data[block]))
        data[at] ^= 255 if data[at] == path.read_bytes()[at] else 0
    elif kind == "swap":
        other = folder / ("rank_00001.bin" if name != "rank_00001.bin" else "rank_00000.bin")
        data = bytearray(other.read_bytes())
    elif kind == "empty":
        data.clear()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(data)


def load_damaged(rank: int, world: int, folder: str, cases: list[Damage]) -> list[str]:
    """What went wrong in each case, "" if it went as it should."""
    run = Run(3)
    run.train(2)
    run.save(folder, "good")
    before = run.values()
    found = []
    for number, case in enumerate(cases):
        bad = Path(folder, f"bad_{number}")
        if rank == 0:
            shutil.copytree(Path(folder, "good"), bad)
            inflict(bad, case)
        dist.barrier()
        start, problem = time.monotonic(), "nothing was raised"
        try:
            run.load(folder, bad.name)
        except CheckpointError as error:
            problem = "" if str(bad) in str(error) else f"the error does not name the file: {error}"
        if time.monotonic() - start > SECONDS:
            problem += " too slow"
        now = run.values()
        if not all(torch.equal(now[k], before[k]) for k in before):
            problem += " a value changed"
        found.append(problem)
    run.load(folder, "good")
    return found


def check_damages(folder: Path, cases: list[Damage]) -> None:
    for found in run_ranks(load_damaged, 2, str(folder), cases, timeout=240):
        wrong = [(case, problem) for case, problem in zip(cases, found, strict=True) if problem]
        assert not wrong


def test_fifteen_damaged_checkpoints(tmp_path: Path) -> None:
    check_damages(tmp_path, damages(15))


@pytest.mark.slow
def test_fifty_damaged_checkpoints(tmp_path: Path) -> None:
    check_damages(tmp_path, damages(50))


@pytest.mark.slow
def test_no_single_bit_of_any_file_can_flip_unnoticed(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path, "a", model=model, state={"x": 1})
    for path in sorted((tmp_path / "a").iterdir()):
        data = path.read_bytes()
        step = 1 if path.suffix == ".bin" else 7
        for bit in range(0, 8 * len(data), step):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                load_checkpoint(tmp_path, model=model)
        path.write_bytes(data)
    load_checkpoint(tmp_path, model=model)


# -- other models, other places ----------------------------------------------------------------------------------------


def errors_of(rank: int, world: int, folder: str, make: Callable[[], nn.Module], tag: str | None) -> tuple[str, bool]:
    model = dscompile.distribute(make(), config={"zero": {"stage": 3}})
    before = {k: v.to_local().clone() for k, v in model.state_dict().items()}
    start = time.monotonic()
    with pytest.raises(CheckpointError) as found:
        load_checkpoint(folder, tag, model=model)
    assert time.monotonic() - start < SECONDS
    same = all(torch.equal(v.to_local(), before[k]) for k, v in model.state_dict().items())
    return str(found.value), same


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))


def deeper() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))


def nothing_alike() -> nn.Module:
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (wider, "0.weight is [5, 4] here and [3, 4] there; 0.bias is [5] here and [3] there; 1.weight is [2, 5] here"),
        (deeper, "2.weight [2, 2] is only in the model; 2.bias [2] is only in the model"),
        (
            nothing_alike,
            "weight [3, 4] is only in the model; bias [3] is only in the model; 0.weight [3, 4] is only in",
        ),
    ],
)
def test_another_model_is_named_by_its_first_differences(tmp_path: Path, make: Any, text: str) -> None:
    save_checkpoint(tmp_path, "a", model=small())
    results = run_ranks(errors_of, 2, str(tmp_path), make, None)
    assert results[0] == results[1]
    assert text in results[0][0]
    assert results[0][1]


@pytest.mark.parametrize(
    ("place", "tag", "text"),
    [
        ("run", "step_2", "has no checkpoint 'step_2'. Did you mean 'step_1'? There is: step_1."),
        ("nowhere", None, "nowhere: cannot read: No such file or directory"),
        ("file", None, "file: cannot read: Not a directory"),
        ("hollow", None, "holds no checkpoint ('latest' is missing)"),
        ("stale", None, "has no checkpoint 'step_9'"),
        ("climbing", None, "a tag is a folder's name"),
        ("binary", None, "a tag is a folder's name"),
    ],
)
def test_nothing_to_load_is_said_on_every_rank(tmp_path: Path, place: str, tag: str | None, text: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "hollow").mkdir()
    for name, latest in (("stale", b"step_9"), ("climbing", b"../run/step_1"), ("binary", b"\xff\x00\x01")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "latest").write_bytes(latest)
    save_checkpoint(tmp_path / "run", "step_1", model=small())
    results = run_ranks(errors_of, 2, str(tmp_path / place), small, tag)
    assert results[0] == results[1]
    assert text in results[0][0]


def unreadable_on_one(rank: int, world: int, folder: str) -> str:
    from dscompile.engine import checkpoint_files

    if rank == 1:

        def refuse(*args: Any) -> Any:
            raise OSError(5, "Input/output error", str(args[0]))

        checkpoint_files.FileIO = refuse  # type: ignore[assignment,misc]
    return errors_of(rank, world, folder, small, None)[0]


def test_a_file_that_one_rank_cannot_read_is_said_on_every_rank(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "a", model=small())
    texts = run_ranks(unreadable_on_one, 2, str(tmp_path))
    assert texts[0] == texts[1]
    assert "on rank 1 of 2" in texts[0]
    assert "Input/output error" in texts[0]


# -- hostile files -----------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['BOMB']}",)


def test_no_file_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exploded = tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(exploded))
    save_checkpoint(tmp_path, "a", model=small())
    for name in ("checkpoint.json", ".metadata", "rank_00000.bin"):
        folder = tmp_path / name.strip(".")
        shutil.copytree(tmp_path / "a", folder)
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        (tmp_path / "latest").write_bytes(pickle.dumps(Bomb()))
        for tag in (folder.name, None):
            try:
                load_checkpoint(tmp_path, tag, model=small())
            except CheckpointError:
                pass
            else:
                assert name == ".metadata"
                assert tag is not None
    assert not exploded.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert exploded.exists(), "the bomb works"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change ``checkpoint.json`` and make its checksum right again."""
    path = folder / "checkpoint.json"
    body = json.loads(path.read_bytes().split(b"\n", 1)[1])
    change(body)
    data = json.dumps(body).encode()
    path.write_bytes(json.dumps({"format": 1, "sha256": hashlib.sha256(data).hexdigest()}).encode() + b"\n" + data)


def chunk_of(body: dict[str, Any]) -> list[Any]:
    return body["tensors"]["0.weight"][2][0]


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "path": lambda b: b["files"].__setitem__(0, ["../../secret", 10]),
    "absolute": lambda b: b["files"].__setitem__(0, ["/etc/passwd", 10]),
    "huge": lambda b: b["tensors"].__setitem__("0.weight", ["float32", [1 << 40, 4], []]),
    "negative": lambda b: chunk_of(b).__setitem__(3, -8),
    "beyond": lambda b: chunk_of(b).__setitem__(3, 1 << 40),
    "outside": lambda b: chunk_of(b).__setitem__(0, [1, 0]),
    "file": lambda b: chunk_of(b).__setitem__(2, 7),
    "minus file": lambda b: chunk_of(b).__setitem__(2, -1),
    "float": lambda b: chunk_of(b).__setitem__(1, [3.0, 4]),
    "dtype": lambda b: b["tensors"]["0.weight"].__setitem__(0, "object"),
    "twice": lambda b: b["tensors"]["0.weight"][2].append(chunk_of(b)),
    "none": lambda b: b.__setitem__("tensors", None),
    "missing": lambda b: b.pop("state"),
    "tag": lambda b: b.__setitem__("state", {"$eval": "1"}),
    "no tensor": lambda b: b.__setitem__("state", {"$tensor": "nowhere"}),
    "checksum": lambda b: chunk_of(b).__setitem__(5, 1),
    "list": lambda b: b.__setitem__("optimizer", [1, 2]),
    "ties": lambda b: b.__setitem__("ties", 5),
    "rng": lambda b: b.__setitem__("rng", [{"torch": "x"}]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_descriptions_made_by_hand_are_refused(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = small()
    save_checkpoint(tmp_path, "a", model=model, optimizer=torch.optim.SGD(model.parameters()))
    rewrite(tmp_path / "a", CHANGES[name])
    torch.manual_seed(1)
    other = small()
    before = [p.detach().clone() for p in other.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path, model=other, optimizer=torch.optim.SGD(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_deeply_nested_description_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "a", model=small())
    data = b"[" * 200_000
    head = json.dumps({"format": 1, "sha256": hashlib.sha256(data).hexdigest()}).encode()
    (tmp_path / "a" / "checkpoint.json").write_bytes(head + b"\n" + data)
    with pytest.raises(CheckpointError, match="RecursionError"):
        load_checkpoint(tmp_path, model=small())


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "a", model=small())
    path = tmp_path / "a" / "checkpoint.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2', 1))
    with pytest.raises(CheckpointError, match="has format 2; this version of dscompile reads format 1"):
        load_checkpoint(tmp_path, model=small())
