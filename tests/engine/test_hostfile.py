"""DeepSpeed's hostfile as torchrun commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from dscompile.engine.hostfile import read_hostfile, select, torchrun_commands
from dscompile.errors import ConfigError
from dscompile.tools.cli import run

HOSTS = {"worker-0": (0, 1, 2, 3), "worker-1": (0, 1, 2, 3)}


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\nworker-0 slots=4\n\nworker-1   slots=4  # the other\n")
    assert read_hostfile(path) == HOSTS


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("worker-0 slots=4\nworker-1\n", ":2: expected 'host slots=N', got 'worker-1'"),
        ("worker-0 slots=four\n", ":1: expected"),
        ("worker-0 slots=4\n\nworker-0 slots=2\n", ":3: host 'worker-0' stands twice"),
        ("worker-0 slots=0\n", ":1: host 'worker-0' has no slots"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hostfile(write(tmp_path, text))
    assert says in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the hostfile"):
        read_hostfile(tmp_path / "absent")


def test_include_and_exclude_select() -> None:
    assert select(HOSTS) == HOSTS
    assert select(HOSTS, include="worker-1:0,2") == {"worker-1": (0, 2)}
    assert select(HOSTS, include="worker-1@worker-0:3") == {"worker-0": (3,), "worker-1": (0, 1, 2, 3)}
    assert select(HOSTS, exclude="worker-0") == {"worker-1": (0, 1, 2, 3)}
    assert select(HOSTS, exclude="worker-0:0,1@worker-1:2,3") == {"worker-0": (2, 3), "worker-1": (0, 1)}


@pytest.mark.parametrize(
    ("include", "exclude", "says"),
    [
        ("worker-0", "worker-1", "exclude each other"),
        ("worker-3", "", r"no host 'worker-3' in the hostfile\. Did you mean 'worker-"),
        ("worker-0:7", "", "has no slot '7'; it has 0 to 3"),
        ("worker-0:a", "", "has no slot 'a'"),
        ("worker-0@worker-0:1", "", "stands twice"),
        ("", "worker-0@worker-1", "nothing is left"),
    ],
)
def test_a_wrong_selection_is_named(include: str, exclude: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        select(HOSTS, include, exclude)


def test_each_host_gets_its_command() -> None:
    commands = torchrun_commands({"a": (0, 1), "b": (2, 3)}, ["train.py", "--name", "two words"], port=1234)
    common = "--master-addr=a --master-port=1234 train.py --name 'two words'"
    assert commands == {
        "a": f"torchrun --nnodes=2 --node-rank=0 --nproc-per-node=2 {common}",
        "b": f"CUDA_VISIBLE_DEVICES=2,3 torchrun --nnodes=2 --node-rank=1 --nproc-per-node=2 {common}",
    }
    with pytest.raises(ConfigError, match="a has 2 slots and b has 1"):
        torchrun_commands({"a": (0, 1), "b": (0,)}, ["train.py"])


def test_the_command_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "one slots=2\ntwo slots=2\n")
    assert run(["hostfile", str(path), "--include", "two", "--", "train.py", "--deepspeed_config", "c.json"]) == 0
    expected = "torchrun --nnodes=1 --node-rank=0 --nproc-per-node=2 --master-addr=two --master-port=29500"
    assert capsys.readouterr().out == f"two: {expected} train.py --deepspeed_config c.json\n"
    assert run(["hostfile", str(path), "--include", "three", "--", "train.py"]) == 2
    assert "no host 'three'" in capsys.readouterr().err
