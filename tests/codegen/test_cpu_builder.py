"""The builder of the CPU kernels: what it does without a compiler, with a bad one, and when builds meet or die."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dscompile.attention_gathered import Blocks
from dscompile.codegen.cpu.builder import attention_kernels, build_kernels

REAL = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++") or ""
PATH = os.environ["PATH"]


def compiler(folder: Path, body: str) -> dict[str, str]:
    """An environment whose compiler is a script; ``"$@"`` are the arguments it gets, ``$REAL`` is a real compiler."""
    script = folder / "cxx"
    script.write_text(f'#!/bin/sh\nREAL={REAL}\n[ "$1" = --version ] && echo script && exit 0\n{body}\n')
    script.chmod(0o755)
    return {"CXX": str(script), "PATH": PATH}


def test_no_compiler(tmp_path: Path) -> None:
    build = build_kernels(tmp_path, {"PATH": str(tmp_path)})
    assert build.kernels is None
    assert "no C++ compiler found (tried g++, clang++, c++)" in build.reason
    assert "'CXX'" not in build.reason
    assert "tried nope" in build_kernels(tmp_path, {"CXX": "nope -O", "PATH": PATH}).reason


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('echo "x.cpp:1: error: out of ideas" >&2; exit 3', ["failed (3)", "out of ideas"]),
        ("kill -9 $$", ["killed by signal 9"]),
        ("exit 0", ["succeeded, and wrote nothing"]),
        ('eval out=\\${$#}; echo junk > "$out"', ["attention-"]),  # says it succeeded; what it wrote cannot be loaded
    ],
    ids=["fails", "killed", "nothing", "junk"],
)
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(tmp_path: Path, body: str, words: list[str]) -> None:
    cache = tmp_path / "cache"
    build = build_kernels(cache, compiler(tmp_path, body))
    assert build.kernels is None
    assert all(word in build.reason for word in words), build.reason
    assert not [p for p in cache.iterdir() if p.suffix == ".tmp"]
    if "junk" not in body:
        assert not list(cache.glob("*.so"))


def test_a_compiler_that_hangs_is_ended_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler driver runs the compiler proper as its child, which would go on working for nobody."""
    monkeypatch.setattr("dscompile.codegen.cpu.builder.TIMEOUT", 0.5)
    child = tmp_path / "child"
    build = build_kernels(tmp_path / "cache", compiler(tmp_path, f"sleep 60 & echo $! > {child}; wait"))
    assert build.kernels is None
    assert "did not finish in 0.5 s" in build.reason
    deadline = time.monotonic() + 5
    while is_running(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(int(child.read_text()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_compiler_that_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    build = build_kernels(tmp_path, {"CXX": "g++ '-O2", "PATH": PATH})
    assert build.kernels is None
    assert build.reason == 'CXX is "g++ \'-O2", which is no command: No closing quotation'


def test_a_cache_that_cannot_be_written_is_a_reason_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    build = build_kernels(tmp_path / "file" / "cache", compiler(tmp_path, 'exec $REAL "$@"'))
    assert build.kernels is None
    assert build.reason.startswith(f"{tmp_path}/file/cache/attention-")
    assert build.reason.endswith("be written (Not a directory); set TORCHINDUCTOR_CACHE_DIR to a folder that can")


def test_a_broken_library_is_built_again(tmp_path: Path) -> None:
    environment = compiler(tmp_path, '[ -e "$0.good" ] && exec $REAL "$@"; eval out=\\${$#}; echo junk > "$out"')
    assert build_kernels(tmp_path / "cache", environment).kernels is None
    (tmp_path / "cxx.good").touch()
    assert build_kernels(tmp_path / "cache", environment).kernels is not None


BUILD = """
import sys
from pathlib import Path
from dscompile.codegen.cpu.builder import build_kernels
build = build_kernels(Path(sys.argv[1]), {"CXX": sys.argv[2], "PATH": sys.argv[3]})
assert build.kernels is not None, build.reason
"""


def test_builds_that_meet_and_a_build_that_is_killed(tmp_path: Path) -> None:
    """A first builder is killed while it compiles; two more start at once: one compiles, both load."""
    count = tmp_path / "count"
    environment = compiler(tmp_path, f'echo x >> {count}; [ -e {tmp_path}/slow ] && sleep 60; exec $REAL "$@"')
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", BUILD, str(cache), environment["CXX"], PATH]
    (tmp_path / "slow").touch()
    first = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not count.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, 9)
    first.wait()
    (tmp_path / "slow").unlink()
    (cache / ".stale").touch()
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert count.read_text().count("x") == 2, "the killed build and one other"
    assert len(list(cache.glob("*.so"))) == 1
    assert not list(cache.glob(".*.tmp"))


def test_without_kernels_attention_is_gathered_and_the_report_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import dscompile.attention_ops
    from dscompile.codegen.cpu import builder, choice

    failed = builder.Build(None, "no C++ compiler found (for this test)")
    monkeypatch.setattr(builder, "attention_kernels", lambda: failed)
    monkeypatch.setattr(choice, "attention_kernels", lambda: failed)

    def attend(x: torch.Tensor) -> torch.Tensor:
        sparse, _ = torch.ops.dscompile.block_sparse_attention.default(
            x, x, x, None, None, None, None, 16, True, None, 0.25
        )
        return sparse + torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch.compiler.reset()
    x = torch.randn(1, 1, 130, 16)
    found = torch.compile(attend, backend="dscompile", options={"cache": False, "attention": "kernel"})(x)
    torch.testing.assert_close(found, 2 * torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))
    report = dscompile.last_report()[-1]
    assert report.fallbacks == [
        "attention forward [1, 1, 130, 16] float32: gathered attention (no C++ compiler found (for this test))"
    ]
    assert "PyTorch (no C++ compiler found (for this test))" in report.facts["attention"][0]
    assert "FALLBACK" in report.line()


def test_the_kernels_of_this_machine_are_built_once() -> None:
    build = attention_kernels()
    assert build.kernels is not None, build.reason
    assert attention_kernels() is build
    q = torch.randn(1, 1, 16, 8)
    out, _ = build.kernels.forward(q, q, q, Blocks(None, None, None, None, 16, False, None, 1.0))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=1.0))
