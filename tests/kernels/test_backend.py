"""Around the kernels: the cache, launching, the command, and what a user is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dscompile.codegen.triton_backend import cache
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.library import example, generate
from dscompile.codegen.triton_backend.targets import TARGETS, launch_options
from dscompile.codegen.triton_backend.templates.attention import Attention, offsets_and_indices
from dscompile.errors import UnsupportedError
from dscompile.tools.cli import run

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the extra is not installed")


def kernel(name: str = "bias_gelu") -> Kernel:
    return generate(name, example(name, torch.bfloat16, 64, 64)).kernels[0]


def test_importing_the_backend_imports_no_triton() -> None:
    """PyTorch itself imports Triton where it is installed, so it is hidden: any import of it fails."""
    code = "import sys; sys.modules['triton'] = None\n"
    code += "import dscompile.codegen.gpu, dscompile.codegen.triton_backend.aot, dscompile.tools.kernels\n"
    code += "import dscompile.codegen.triton_backend.launch"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_source_file_is_whole_again_after_damage(tmp_path: Path) -> None:
    one = kernel()
    path = cache.source_file(one, tmp_path)
    assert path.read_text() == one.source
    path.write_text(one.source[:100])
    assert cache.source_file(one, tmp_path).read_text() == one.source


@needs_triton
def test_the_key_of_a_build_changes_with_everything_that_decides_it() -> None:
    one = kernel()
    others = [
        dataclasses.replace(one, source=one.source + "#"),
        dataclasses.replace(one, warps=8),
        dataclasses.replace(one, constants={"BLOCK": 512}),
        dataclasses.replace(one, sizes=((one.sizes[0][0], one.sizes[0][1] + 1),)),
    ]
    keys = [cache.build_key(k, "sm_90", "") for k in (one, *others)]
    keys += [cache.build_key(one, "sm_80", ""), cache.build_key(one, "sm_90", "unaligned")]
    assert len(set(keys)) == len(keys)
    assert cache.build_key(kernel(), "sm_90", "") == keys[0]


def test_damaged_figures_are_not_believed(tmp_path: Path) -> None:
    cache.save_figures("k", {"registers": 32}, tmp_path)
    assert cache.load_figures("k", tmp_path) == {"registers": 32}
    (path,) = (tmp_path / "built").iterdir()
    path.write_text(path.read_text().replace("32", "31"))
    assert cache.load_figures("k", tmp_path) is None
    path.write_text("{")
    assert cache.load_figures("k", tmp_path) is None
    assert cache.load_figures("other", tmp_path) is None


@needs_triton
def test_a_cpu_tensor_without_the_interpreter_is_an_error_that_says_so() -> None:
    code = (
        "import torch; from dscompile.codegen.triton_backend.library import *\n"
        "from dscompile.codegen.triton_backend.launch import Launcher\n"
        "x = torch.zeros(4, 8); k = generate('softmax', (x,)).kernels[0]; Launcher(k)(x, x)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "kernel 'softmax' runs on a GPU, but a tensor is on 'cpu'; set TRITON_INTERPRET=1" in done.stderr


def test_row_kernels_have_as_many_threads_on_every_target() -> None:
    one = kernel()
    threads = {launch_options(one, t.backend, t.warp)["num_warps"] * t.warp for t in TARGETS.values()}
    assert threads == {128}


# -- attention's arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block": 48}, "blocks of 16, 32, 64, 128, not 48"),
        ({"dim": 20}, "a head size of 8, 16, ... 256, not 20"),
        ({"dim": 264}, "not 264"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"precision": "bf16x3"}, "not 'bf16x3'"),
    ],
)
def test_an_attention_without_a_kernel_is_refused(changes: dict[str, object], says: str) -> None:
    use = dataclasses.replace(Attention(1, 2, 64, 16, 16, 8, torch.float32), **changes)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=says.replace(".", r"\.")):
        use.check()


def test_the_listing_of_a_layout() -> None:
    layout = torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 1, 1]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]]])
    offsets, indices = offsets_and_indices(layout)
    assert offsets.tolist() == [[0, 2, 2, 5], [5, 6, 7, 7]]
    assert indices.tolist() == [0, 2, 0, 1, 2, 1, 0]
    assert offsets.dtype == indices.dtype == torch.int32


# -- the command -------------------------------------------------------------------------------------------------------


@needs_triton
def test_the_command_lists_figures_and_writes_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["kernels", "softmax", "--target", "gfx942", "--rows", "64", "--cols", "256", "--json"]
    assert run([*arguments, "--source", str(tmp_path)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["kernel"], entry["target"], entry["faults"]) == ("softmax", "gfx942", [])
    assert entry["bytes"] == entry["ideal"] == 2 * 64 * 256 * 2
    assert 0 < entry["registers"] <= 80
    assert "@triton.jit" in (tmp_path / "softmax.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--target", "sm_91"],
            "no kernels are built for target 'sm_91'. Did you mean 'sm_90'? Known targets: sm_80, ",
        ),
        (["softmaks"], "no kernel 'softmaks'. Did you mean 'softmax'?"),
        (["softmax", "--dtype", "f64"], "no kernels are generated for dtype 'f64'; choose one of bf16, f16, f32."),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["kernels", *arguments]) == 2
    assert says in capsys.readouterr().err
