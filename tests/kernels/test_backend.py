"""Around the kernels: the cache, launching, the command, and what a user is told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dscompile
from dscompile import attention_ops, evoformer
from dscompile.codegen.cpu.choice import choose_attention
from dscompile.codegen.regions import cut, region_module
from dscompile.codegen.triton_backend import attention, cache
from dscompile.codegen.triton_backend import evoformer as launching
from dscompile.codegen.triton_backend.aot import Build
from dscompile.codegen.triton_backend.bars import judge
from dscompile.codegen.triton_backend.inspect import Figures
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.library import example, generate
from dscompile.codegen.triton_backend.targets import TARGETS, launch_options
from dscompile.codegen.triton_backend.templates.attention import Attention, Sizes, attention_kernels
from dscompile.codegen.triton_backend.templates.evoformer import Evoformer, evoformer_kernels, shares
from dscompile.codegen.triton_backend.templates.evoformer import Sizes as Alignment
from dscompile.config import Config
from dscompile.errors import UnsupportedError
from dscompile.sparsity import BigBirdSparsityConfig
from dscompile.tools.cli import run
from tests.build import Hand

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


# -- attention ---------------------------------------------------------------------------------------------------------


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
    use = dataclasses.replace(Attention(16, 16, torch.float32, 0.25, (16,) * 4), **changes)  # type: ignore[arg-type]
    assert says in use.refusal()
    with pytest.raises(UnsupportedError, match=says.replace(".", r"\.")):
        attention_kernels(use)


def test_one_source_and_one_build_serve_every_size() -> None:
    """The sizes of a call are arguments: neither the source nor what is compiled in knows them."""
    use = Attention(64, 64, torch.bfloat16, 0.125, (512,) * 4)
    symbolic = attention_kernels(use)
    for sizes in (Sizes(1, 8, 128, 10, 1), Sizes(4, 8, 4096, 512, 8)):
        for what, kernel in attention_kernels(use, sizes).items():
            assert kernel.source == symbolic[what].source
            assert kernel.constants == symbolic[what].constants
    names = [name for name, _ in symbolic["forward"].sizes]
    assert names == ["heads", "layout_heads", "seq", "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head"]


def layout(heads: int = 2, blocks: int = 3, block: int = 16, dtype: torch.dtype = torch.float32) -> list[Any]:
    """q, k, v on fake GPUs, and the operator's other arguments."""
    q = torch.empty(2, heads, blocks * block, 16, dtype=dtype, device="cuda")
    rows, columns = torch.empty(1, blocks + 1, dtype=torch.int32, device="cuda"), q.new_empty(9, dtype=torch.int32)
    return [q, q, q, rows, columns, rows, columns, block, False, None, 0.25]


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, ""),
        ({"block": 48}, "blocks of 16, 32, 64, 128, not 48"),
        ({"dtype": torch.float64}, "not torch.float64"),
    ],
)
def test_attention_that_runs_gathered_on_a_gpu_is_counted_with_its_reason(arguments: Any, says: str) -> None:
    h = Hand()
    with h.mode:
        operands = layout(**arguments)
    inputs = [
        h.input(f"x{i}", *x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for i, x in enumerate(operands)
    ]
    for node, value in zip(inputs, operands, strict=True):
        if isinstance(node, torch.fx.Node):
            node.meta["val"] = value
    result = h.call(torch.ops.dscompile.block_sparse_attention.default, *inputs)
    out = h.graph.call_function(operator.getitem, (result, 0))
    out.meta["val"] = result.meta["val"][0]
    (region,) = cut(h.done([out]), Config(regions="whole"))
    choices, missing = choose_attention(region_module(region), Config())
    assert choices == []
    assert says in "".join(missing)
    assert bool(missing) is bool(says)


def test_a_fallback_on_a_gpu_is_warned_of_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    attention.warn_gathered.cache_clear()
    q = torch.randn(1, 2, 96, 16)
    rows, columns = torch.tensor([[0, 2, 4]], dtype=torch.int32), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    index = (rows, columns, rows, columns, 48, False, None, 0.25)
    for _ in range(2):
        out, lse = attention_ops._forward_gpu(q, q, q, *index)
        attention_ops._backward_gpu(out, q, q, q, out, lse, *index)
    dense = torch.nn.functional.scaled_dot_product_attention(q, q, q, scale=0.25)
    torch.testing.assert_close(out, dense)
    (record,) = [r for r in caplog.records if "many times slower" in r.getMessage()]
    assert "blocks of 16, 32, 64, 128, not 48" in record.getMessage()


# -- Evoformer attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dim": 20}, "a head size of 8, 16, ... 128, not 20"),
        ({"dim": 136}, "not 136"),
        ({"dtype": torch.float64}, "q, k, v: torch.float64"),
        ({"mask": torch.float64}, "the mask: torch.float64"),
        ({"pair": torch.float64}, "the pair bias: torch.float64"),
        ({"precision": "bf16x3"}, "not 'bf16x3'"),
    ],
)
def test_an_evoformer_attention_without_a_kernel_is_refused(changes: dict[str, object], says: str) -> None:
    use = dataclasses.replace(Evoformer(16, torch.float32, 0.25, (64,) * 4, (16,) * 4), **changes)  # type: ignore[arg-type]
    assert says in use.refusal()
    with pytest.raises(UnsupportedError, match=re.escape(says)):
        evoformer_kernels(use)


def test_one_source_and_one_build_serve_every_alignment() -> None:
    use = Evoformer(32, torch.bfloat16, 0.125, (128,) * 4, (32,) * 4, pair=torch.bfloat16)
    symbolic = evoformer_kernels(use)
    for sizes in (Alignment(1, 8, 64, 4), Alignment(2, 128, 384, 8)):
        for what, kernel in evoformer_kernels(use, sizes).items():
            assert kernel.source == symbolic[what].source
            assert kernel.constants == symbolic[what].constants


@pytest.mark.parametrize(
    ("alignment", "parts"),
    [((1, 4, 128, 64), 64), ((1, 8, 100, 256), 2), ((1, 8, 1, 256), 1), ((2, 8, 512, 512), 1), ((1, 4, 6, 128), 6)],
)
def test_a_sum_over_sequences_is_shared_where_few_programs_run(alignment: tuple[int, ...], parts: int) -> None:
    """[batch, heads, sequences, residues]; programs are tiles of 64 x 64 pairs of a head: 256 of them are enough."""
    use = Evoformer(32, torch.bfloat16, 0.125, (128,) * 4, (32,) * 4, pair=torch.bfloat16)
    assert shares(use, *alignment) == parts


@needs_triton
@pytest.mark.parametrize(
    ("size", "dtype", "says"),
    [(16, torch.bfloat16, ""), (12, torch.bfloat16, "not 12"), (16, torch.float64, "float64")],
)
def test_evoformer_attention_in_pieces_on_a_gpu_is_counted_with_its_reason(
    size: int, dtype: torch.dtype, says: str
) -> None:
    h = Hand()
    with torch.device("cuda"):
        q, k, v = (h.input(name, 1, 4, 32, 2, size, dtype=dtype) for name in "qkv")
        pair = h.input("pair", 1, 1, 2, 32, 32, dtype=dtype)
    made = h.call(torch.ops.dscompile.evoformer_attention.default, q, k, v, None, pair, 0.25, 1)
    out, lse = (h.graph.call_function(operator.getitem, (made, i)) for i in range(2))
    out.meta["val"], lse.meta["val"] = made.meta["val"]
    backward = torch.ops.dscompile.evoformer_attention_backward.default
    grads = h.call(backward, out, q, k, v, None, pair, out, lse, 0.25, 1, False, True)
    dq = h.graph.call_function(operator.getitem, (grads, 0))
    dq.meta["val"] = grads.meta["val"][0]
    (region,) = cut(h.done([out, dq]), Config(regions="whole"))
    choices, missing = choose_attention(region_module(region), Config())
    assert choices == []
    assert len(missing) == (2 if says else 0)
    assert all(says in text and text.startswith("Evoformer attention") for text in missing)


def test_evoformer_attention_without_a_kernel_is_warned_of_once_and_right(caplog: pytest.LogCaptureFixture) -> None:
    launching.warn_pieces.cache_clear()
    q, k, v, grad = (torch.randn(1, 2, 8, 2, 12) for _ in range(4))
    pair = torch.randn(1, 1, 2, 8, 8)
    out, lse = evoformer._forward_gpu(q, k, v, None, pair, 0.25, 1 << 20)
    found = evoformer._backward_gpu(grad, q, k, v, None, pair, out, lse, 0.25, 1 << 20, False, True)
    leaves = [x.requires_grad_() for x in (q, k, v, pair)]
    scores = torch.einsum("bnqhd,bnkhd->bnhqk", q, k) * 0.25 + pair
    expected = torch.einsum("bnhqk,bnkhd->bnqhd", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close([found[i] for i in (0, 1, 2, 4)], list(torch.autograd.grad(expected, leaves, grad)))
    (record,) = [r for r in caplog.records if "many times slower" in r.getMessage()]
    assert "not 12" in record.getMessage()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("residues", [128, 77])
def test_evoformer_attention_on_a_gpu_is_that_of_the_cpu(dtype: torch.dtype, residues: int) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(1, 6, residues, 4, 32).to(device, dtype).requires_grad_() for _ in range(4))
        mask = torch.randn(1, 6, 1, 1, residues).to(device, dtype).requires_grad_()
        pair = torch.randn(1, 1, 4, residues, residues).to(device, dtype).requires_grad_()
        out = dscompile.evoformer_attention(q, k, v, [mask, pair])
        results.append([t.cpu() for t in (out, *torch.autograd.grad(out, (q, k, v, mask, pair), grad))])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=1e-4 if dtype is torch.float32 else 3e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seq", [256, 231])
def test_attention_on_a_gpu_is_that_of_the_cpu(dtype: torch.dtype, seq: int) -> None:
    """The same call on both devices, forward and backward: launched by Triton's driver, not interpreted."""
    pattern = BigBirdSparsityConfig(2, 32).make_layout(256)
    padding = torch.zeros(2, seq, dtype=torch.bool)
    padding[1, -40:] = True
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(2, 2, seq, 64).to(device, dtype).requires_grad_() for _ in range(4))
        out = dscompile.sparse_attention(
            q, k, v, pattern.to(device), 32, causal=True, key_padding_mask=padding.to(device)
        )
        results.append([t.cpu() for t in (out, *torch.autograd.grad(out, (q, k, v), grad))])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=2e-2 if dtype is torch.bfloat16 else 1e-4, rtol=2e-2)


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


@needs_triton
def test_a_bar_that_is_not_asked_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """A scatter fills, reads and writes; twice the bytes of anything else are a fault."""
    arguments = ["kernels", "embedding_backward", "--cols", "256"]
    assert run([*arguments, "--json"]) == 0
    scatters, rounds = json.loads(capsys.readouterr().out)
    assert scatters["faults"] == rounds["faults"] == rounds["excused"] == []
    assert scatters["excused"][0].startswith("S8: ")
    assert run(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "-S8 what it stores to is filled first, and adding reads it: embedding_backward_0 on sm_90" in printed
    one = kernel("softmax")
    doubled = dataclasses.replace(one, bytes=2 * one.ideal)
    figures = Figures(20, 0, 0, 0, 1, 0, 1, 0, 0, {})
    for target in TARGETS.values():
        assert judge(Build(one, target, figures)).faults == ()
        assert judge(Build(doubled, target, figures)).faults == (
            f"S8: {2 * one.ideal} bytes, {one.ideal} are the least",
        )


@needs_triton
def test_the_table_shows_whole_names_in_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["kernels", "bias_dropout_residual_backward", "attention"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 100
    for name in ("bias_dropout_residual_backward_1 ", "attention_backward_kv ", "16 HGMMA"):
        assert name in printed


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
