"""Kernels built for GPUs that are not here: registers, spills, shared memory, widths, matrix instructions."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dscompile.codegen.triton_backend.bars import EXCEPTIONS
from dscompile.codegen.triton_backend.library import entries, example, generate
from dscompile.codegen.triton_backend.targets import TARGETS, find_target, launch_options
from dscompile.errors import UnsupportedError
from tests.kernels.workers import ROOT, work

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the extra 'triton' is not installed"
)

QUICK = [
    "layer_norm/bf16/8192/1024@sm_90", "layer_norm_backward/bf16/8192/1024@gfx942", "adamw/bf16/8192/1024@sm_100",
    "rms_norm_backward/bf16/8192/1024@sm_80", "attention/bf16/64/64/-@sm_90",
    "evoformer/bf16/32/mb@sm_90",
    *(f"{name}/bf16/8192/1024@{target}" for name in (
        "embedding_norm", "cumulative_softmax", "embedding_backward", "batch_norm", "batch_norm_backward", "max_pool",
        "max_pool_backward",
    ) for target in TARGETS),
]  # fmt: skip
CONTROL = ["!bias_gelu/bf16/8192/1024@sm_90", "!attention/bf16/64/64/-@sm_90", "!evoformer/bf16/32/mb@sm_90"]
SIZES = {
    "rotary": "1024/64",
    "cross_entropy": "1024/50304",
    "cross_entropy_both": "1024/50304",
    "cross_entropy_backward": "1024/50304",
}
FULL = [f"{name}/{dtype}/{SIZES.get(name, '8192/1024')}" for name in entries() for dtype in ("bf16", "f32")]
ATTENTION = [f"attention/{case}" for case in (
    "bf16/16/64/c", "bf16/32/64/-", "bf16/64/64/c", "bf16/128/64/-", "bf16/64/128/c", "bf16/128/128/-", "f16/64/64/-",
    "f32/64/64/-", "f32/64/64/t",
)]  # fmt: skip
EVOFORMER = [f"evoformer/{case}" for case in (
    "bf16/8/mb", "bf16/16/mb", "bf16/32/mb", "bf16/32/-", "bf16/32/m", "bf16/32/b", "bf16/64/mb", "bf16/128/mb",
    "bf16/128/m", "f16/24/mb", "f16/64/mb", "f32/32/mb", "f32/64/mb", "f32/64/mbt", "f32/128/mb",
)]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work("aot_builds", [str(tmp_path_factory.mktemp("built")), *QUICK, *CONTROL])


@needs_triton
@pytest.mark.parametrize("case", QUICK)
def test_a_kernel_reaches_every_bar(built: dict[str, Any], case: str) -> None:
    check(built[case])


def check(kernels: Any) -> None:
    assert not isinstance(kernels, str), kernels
    assert kernels
    assert {name: k["faults"] for name, k in kernels.items() if k["faults"]} == {}


def test_indices_are_asserted_on_cuda_only() -> None:
    """Without ``debug`` Triton drops ``device_assert``; for AMD it would make every access of the kernel narrow."""
    checked, plain = (generate(n, example(n, torch.float32, 8, 64)).kernels[0] for n in ("embedding_norm", "softmax"))
    assert "tl.device_assert(" in checked.source
    assert launch_options(checked, "cuda", 32)["debug"] is True
    assert launch_options(checked, "cuda", 32)["sanitize_overflow"] is False
    assert "debug" not in launch_options(checked, "hip", 64)
    assert "debug" not in launch_options(plain, "cuda", 32)


@needs_triton
def test_the_registers_of_attention_leave_room_for_two_programs(built: dict[str, Any]) -> None:
    """The figures of a hand-written kernel (kernels.md, section 8), for blocks of 64 and heads of 64 without a mask."""
    found = {name: k["registers"] for name, k in built["attention/bf16/64/64/-@sm_90"].items()}
    most = {"attention_forward": 128, "attention_backward_q": 128, "attention_backward_kv": 184}
    assert found.keys() == most.keys()
    assert all(found[name] <= most[name] for name in most), found


@needs_triton
@pytest.mark.parametrize("case", CONTROL)
def test_without_the_promise_of_alignment_the_bars_fail(built: dict[str, Any], case: str) -> None:
    """The negative control: bars that this does not fail would see nothing."""
    kernels = built[case]
    assert not isinstance(kernels, str), kernels
    for name, kernel in kernels.items():
        assert any(fault.startswith("S5") for fault in kernel["faults"]), name


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("cases", [FULL, ATTENTION, EVOFORMER], ids=["library", "attention", "evoformer"])
def test_every_kernel_reaches_every_bar(cases: list[str], target: str, tmp_path: Path) -> None:
    found = work("aot_builds", [str(tmp_path), *(f"{case}@{target}" for case in cases)])
    assert len(found) == len(cases)
    assert {case: k for case, k in found.items() if isinstance(k, str)} == {}
    assert {f"{c} {n}": k["faults"] for c, ks in found.items() for n, k in ks.items() if k["faults"]} == {}


def test_every_exception_has_a_reason_and_known_targets() -> None:
    for exception in EXCEPTIONS:
        assert exception.reason
        assert set(exception.targets) <= set(TARGETS)
        assert exception.bar in {"S4", "S5", "S7", "S8"}, (
            "spills, shared memory and matrix instructions have no exception"
        )


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'sm_91'.*Did you mean 'sm_90'.*sm_80, sm_90, sm_100, gfx942"):
        find_target("sm_91")


# -- bad input ---------------------------------------------------------------------------------------------------------

BUILD = """
import sys
from pathlib import Path
import torch
from dscompile.codegen.triton_backend.aot import build
from dscompile.codegen.triton_backend.library import example, generate
from dscompile.codegen.triton_backend.targets import find_target
kernel = generate("softmax", example("softmax", torch.bfloat16, 64, 256)).kernels[0]
print(build(kernel, find_target("sm_90"), folder=Path(sys.argv[1])).figures.registers)
"""


def assembler(tmp_path: Path, body: str) -> dict[str, str]:
    """The environment of a process whose ptxas is a script: ``body``, then the real one."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    real = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    script = tmp_path / "ptxas"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} "$@"\n{body}\nexec {real} "$@"\n')
    script.chmod(0o755)
    extra = {"TRITON_PTXAS_PATH": str(script), "TRITON_CACHE_DIR": str(tmp_path / "triton"), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **extra}


@needs_triton
def test_an_assembler_that_fails_is_named_and_the_next_build_is_whole(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.touch()
    environment = assembler(tmp_path, f'[ -e {bad} ] && {{ echo "ptxas fatal: no space left" >&2; exit 1; }}')
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(tmp_path / "built")]
    failed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    last = failed.stderr.strip().splitlines()[-1]
    assert "RunError: kernel 'softmax' cannot be built for sm_90: " in last
    assert "fatal: no space left" in last
    assert "softmax.py" in last
    bad.unlink()
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert 0 < int(again.stdout) <= 80


@needs_triton
def test_a_build_that_is_killed_leaves_nothing_that_the_next_one_waits_for(tmp_path: Path) -> None:
    slow, begun = tmp_path / "slow", tmp_path / "begun"
    slow.touch()
    environment = assembler(tmp_path, f"touch {begun}; [ -e {slow} ] && sleep 120")
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(tmp_path / "built")]
    first = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not begun.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, 9)
    first.wait()
    assert begun.exists(), "it was killed while it assembled"
    slow.unlink()
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert 0 < int(again.stdout) <= 80, again.stderr
