"""Which regions our kernels take on a GPU, on fake CUDA tensors: no GPU is here, so nothing is launched."""

from __future__ import annotations

import importlib.util
import operator
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dscompile.codegen import gpu, lower
from dscompile.codegen.emit import emit_program
from dscompile.codegen.gpu import choose, on_gpu
from dscompile.codegen.lower import lower_region, lower_regions
from dscompile.codegen.regions import Region, cut, region_module
from dscompile.config import Config
from dscompile.program import check_lifetimes
from dscompile.report import GraphReport
from dscompile.runtime.execute import load_region
from dscompile.torch_compat import FakeTensorMode
from tests.build import Hand

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the extra 'triton' is not installed"
)


def norm_backward(h: Hand, rows: Any = 512) -> list[Any]:
    with torch.device("cuda"):
        grad, x, mean, rstd, weight, bias = (
            h.input("grad", rows, 64), h.input("x", rows, 64), h.input("mean", rows, 1), h.input("rstd", rows, 1),
            h.input("weight", 64), h.input("bias", 64),
        )  # fmt: skip
    result = h.call(aten.native_layer_norm_backward.default, grad, x, [64], mean, rstd, weight, bias, [True] * 3)
    found = []
    for k in range(3):
        node = h.graph.call_function(operator.getitem, (result, k))
        node.meta["val"] = result.meta["val"][k]
        found.append(node)
    return found


def region(*, device: str = "cuda", what: str = "norm") -> Region:
    h = Hand()
    if what == "norm":
        outputs = norm_backward(h)
    else:
        with torch.device(device):
            x = h.input("x", 64, 64)
        outputs = [h.call(getattr(aten, what).default, x)]
    (found,) = cut(h.done(outputs), Config(regions="whole"))
    return found


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Inductor cannot compile for a GPU that is not there: it is replaced by a record of what it was asked."""
    asked: list[Any] = []

    def compile_(module: Any, **_: Any) -> Any:
        asked.append(module)
        return SimpleNamespace(source_code="# Inductor's")

    monkeypatch.setattr(lower, "inductor_compile", compile_)
    return asked


def test_a_norm_backward_is_ours_because_it_reads_its_operands_once(inductor: list[Any]) -> None:
    code = lower_region(region(), Config())
    assert (code.kind, inductor) == ("triton", [])
    assert len(code.artifact.kernels) == 2
    # grad, x and dx; mean, rstd and weight; partial sums of 512 / 16 programs, written and read; dw and db
    once = 4 * (3 * 512 * 64 + 2 * 512 + 64 + 2 * 2 * 32 * 64 + 2 * 64)
    assert sum(k.bytes for k in code.artifact.kernels) == once
    assert f"move {once} bytes, Inductor's about " in code.choice
    assert int(code.choice.split("about ")[1].split()[0]) >= once + 4 * 2 * 512 * 64, (
        "its column sums read x and grad again"
    )


def test_a_pointwise_region_is_inductors(inductor: list[Any]) -> None:
    code = lower_region(region(what="sin"), Config())
    assert (code.kind, len(inductor)) == ("inductor", 1)
    assert code.choice == "our 1 kernel move 32768 bytes, Inductor's about 32768"


def test_the_option_turns_ours_off(inductor: list[Any]) -> None:
    code = lower_region(region(), Config(kernels="inductor"))
    assert (code.kind, code.choice) == ("inductor", "")


def test_a_cpu_region_is_never_ours() -> None:
    assert not on_gpu(region(device="cpu", what="sin"))
    assert on_gpu(region())


def test_without_triton_it_is_inductors_and_said(inductor: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    code = lower_region(region(), Config())
    assert (code.kind, code.choice) == ("inductor", "the extra 'triton' is not installed")


def test_a_region_that_writes_to_its_operand_is_inductors() -> None:
    h = Hand()
    with torch.device("cuda"):
        p = h.input("p", 64, 64)
    h.call(aten.add_.Tensor, p, 1.0)
    (found,) = cut(h.done([p]), Config(regions="whole"))
    choice = choose(region_module(found), found.key)
    assert choice.assembled is None
    assert "writes to its operand" in choice.why


def test_both_kinds_mix_in_one_program_and_the_report_says_so(
    inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    h = Hand()
    outputs = norm_backward(h)
    graph = h.done([h.call(aten.sin.default, outputs[0]), outputs[1]])
    (whole,) = cut(graph, Config(regions="whole"))
    split = [Region(whole.nodes[:-1], whole.inputs, [whole.nodes[1], whole.nodes[2]], key="a")]
    split.append(Region(whole.nodes[-1:], [whole.nodes[1]], [whole.nodes[-1]], key="b"))
    codes = lower_regions(split, Config())
    assert {k: c.kind for k, c in codes.items()} == {"a": "triton", "b": "inductor"}
    program = emit_program(graph, split, codes)
    check_lifetimes(program)
    assert program.facts["triton_regions"] == 1
    assert program.facts["compiled_regions"] == 2
    assert len(program.facts["choices"]) == 2
    line = GraphReport("g", "inference", facts=program.facts).line()
    assert "2 compiled" in line
    assert "1 of them with our Triton kernels" in line


def test_the_runtime_binds_the_launchers_of_a_region_loaded_from_disk(
    inductor: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is launched: the launchers are replaced by a record of what they were called with."""
    code = pickle.loads(pickle.dumps(lower_region(region(), Config())))
    launched: list[tuple[str, int]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __call__(self, *tensors: torch.Tensor) -> None:
            launched.append((self.kernel.name, len(tensors)))
            assert [t.dtype for t in tensors] == [b.dtype for b in (*self.kernel.reads, *self.kernel.writes)]

    monkeypatch.setattr("dscompile.codegen.triton_backend.launch.Launcher", Recorded)
    with torch.device("meta"):
        arguments = [torch.empty(512, 64), torch.empty(512, 64), torch.empty(512, 1), torch.empty(512, 1),
                     torch.empty(64), torch.empty(64)]  # fmt: skip
    code.source = code.source.replace("'cuda:0'", "'meta'")
    dx, dw, db = load_region(code)(arguments)
    assert (dx.shape, dw.shape, db.shape) == ((512, 64), (64,), (64,))
    assert [n for _, n in launched] == [8, 4]


# -- symbolic sizes ----------------------------------------------------------------------------------------------------


def symbolic(rows: Any, mode: FakeTensorMode) -> Region:
    """A norm's backward over a symbolic number of rows."""
    h = Hand()
    h.mode = mode
    (found,) = cut(h.done(norm_backward(h, rows)), Config(regions="whole"))
    return found


def test_sizes_are_arguments_of_the_kernels_and_read_off_the_inputs() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    rows = mode.from_tensor(torch.empty(4096, 2)).shape[0]
    found = symbolic(rows, mode)
    choice = choose(region_module(found), found.key)
    assert choice.assembled is not None, choice.why
    name = str(rows)
    assert f"    {name} = i0.shape[0]" in choice.assembled.source
    assert f"({name}, 64, )" in choice.assembled.source
    assert f"{name}={name})" in choice.assembled.source
    first, finish = choice.assembled.kernels
    assert [(n, str(size)) for n, size in first.sizes] == [("rows", name)]
    assert "4096" not in first.source.partition("import")[2], "only the header's estimate knows the example"
    assert [(n, int(size)) for n, size in finish.sizes] == [("rows", 128)], "partial results are as many for every size"


def test_a_size_that_data_decide_is_inductors() -> None:
    env = ShapeEnv()
    found = symbolic(env.create_unbacked_symint(), FakeTensorMode(shape_env=env))
    choice = choose(region_module(found), found.key)
    assert choice.assembled is None
    assert "has a size that data decide (u0)" in choice.why
