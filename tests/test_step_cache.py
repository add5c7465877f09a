"""Whole steps in the compile cache: what hits, what must not, damage, a full disk, and what is not kept."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import dscompile
from dscompile.cache_compat import content_of
from dscompile.errors import UnsupportedError
from dscompile.inductor_compat import NotCacheable
from dscompile.report import REPORTS, GraphReport
from dscompile.step_cache import FOLDER
from dscompile.text import print_graph

ROOT = Path(__file__).parent.parent
OPTIONS = {"regions": "aten", "summary": False}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, for this process and its children."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Model(nn.Module):
    """Tied, frozen, unused, a buffer that forward writes, and a constant."""

    def __init__(self, scale: float = 2.0, power: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.scale = torch.full((7,), scale)
        self.power = power

    def forward(self, ids: Tensor) -> Tensor:
        return (self.head(self.frozen(self.norm(self.embed(ids))).relu()) * self.scale).pow(self.power)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).mean()


def ids(n: int = 6) -> Tensor:
    return torch.arange(n) % 5


def start(
    make: Callable[[], nn.Module] = Model, batch: Tensor | None = None, loss: Any = loss, **options: Any
) -> tuple[GraphReport, Any]:
    """Compile and run a step as a new process would, compare it with eager; its report and the step."""
    torch.compiler.reset()
    REPORTS.clear()
    batch = ids() if batch is None else batch
    model = make()
    reference = copy.deepcopy(model)
    step = dscompile.compile_step(model, loss, batch, config={**OPTIONS, **options})
    for _ in range(2):  # the second call accumulates
        expected = loss(reference, batch)
        expected.backward()
        torch.testing.assert_close(step(batch), expected.detach())
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, b), (_, c) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=name)
    (report,) = REPORTS.all()
    return report, step


def entries(cache_dir: Path) -> list[Path]:
    return sorted(p for p in (cache_dir / FOLDER).rglob("*") if p.is_file())


# -- hits --------------------------------------------------------------------------------------------------------------


def test_a_second_start_loads_the_program_and_its_verdict(cache_dir: Path) -> None:
    first, step = start()
    assert (first.cached, first.verdict, first.not_kept, first.fallbacks) == (False, "proved", "", [])
    found, again = start()
    assert (found.cached, found.verdict, found.not_kept, found.fallbacks) == (True, "proved", "", [])
    assert found.graph != first.graph
    assert [p["call"] for p in found.passes] == [p["call"] for p in first.passes] != []
    assert again.code.program.source() == step.code.program.source()
    assert print_graph(again.graph) == print_graph(step.graph)
    assert again.graph.inputs == step.graph.inputs
    assert len(entries(cache_dir)) == 1


@pytest.mark.slow
def test_compiled_regions_are_loaded_too() -> None:
    assert not start(regions="auto")[0].cached
    assert start(regions="auto")[0].cached


def test_a_loaded_step_still_refuses_other_shapes() -> None:
    start()
    _, step = start()
    with pytest.raises(UnsupportedError, match="compiled for"):
        step(ids(3))


def test_a_program_from_the_cache_dumps_what_its_compilation_dumped(tmp_path: Path) -> None:
    start(dump=str(tmp_path / "cold"))
    assert start(dump=str(tmp_path / "warm"))[0].cached
    folders = [next((tmp_path / name).glob("step*")) for name in ("cold", "warm")]
    cold, warm = ({f.name: f.read_text() for f in folder.iterdir()} for folder in folders)
    assert {"00-traced.txt", "01-canonicalise.txt", "joint.py"} <= set(cold)
    assert cold == warm


# -- what must not hit -------------------------------------------------------------------------------------------------


class Renamed(Model):
    """The same computation with another name of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.other = self.frozen
        del self.frozen

    def forward(self, ids: Tensor) -> Tensor:
        return (self.head(self.other(self.norm(self.embed(ids))).relu()) * self.scale).pow(self.power)


def thawed() -> nn.Module:
    return Model().requires_grad_(True)


def untied() -> nn.Module:
    model = Model()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def double() -> nn.Module:
    model = Model().double()
    model.scale = model.scale.double()
    return model


WEIGHT = torch.ones(7)


def weighted(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) * WEIGHT).mean()


def other_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).sum()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that has the program of a plain ``start()``."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        start()
    return folder


CHANGES: dict[str, dict[str, Any]] = {
    "code": {"make": lambda: Model(power=3)},
    "constant": {"make": lambda: Model(scale=3.0)},
    "name": {"make": Renamed},
    "thawed": {"make": thawed},
    "untied": {"make": untied},
    "dtype": {"make": double},
    "mode": {"make": lambda: Model().eval()},
    "loss": {"loss": other_loss},
    "shape": {"batch": ids(5)},
    "ids": {"batch": ids().int()},
    "config": {"donate": False},
    "pipeline": {"pipeline": "canonicalise"},
    "verify": {"verify": "end"},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_step_is_compiled(filled: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(filled))
    assert not start(**CHANGES[changed])[0].cached
    assert start(**CHANGES[changed])[0].cached


def test_a_tensor_outside_of_the_model_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    start(loss=weighted)
    assert start(loss=weighted)[0].cached
    monkeypatch.setattr(sys.modules[__name__], "WEIGHT", torch.full((7,), 2.0))
    assert not start(loss=weighted)[0].cached


def test_another_number_of_threads_is_compiled() -> None:
    before = torch.get_num_threads()
    start()
    try:
        torch.set_num_threads(before + 1)
        assert not start()[0].cached
    finally:
        torch.set_num_threads(before)


def test_the_cache_is_off(cache_dir: Path) -> None:
    assert start(cache=False)[0].not_kept == ""
    assert not start(cache=False)[0].cached
    assert entries(cache_dir) == []


# -- damage ------------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_entry_is_removed_built_again_and_counted(cache_dir: Path, tmp_path: Path, damage: str) -> None:
    start()
    (path,) = entries(cache_dir)
    content = path.read_bytes()
    middle = len(content) // 2
    broken = {
        "cut": content[:middle],
        "flip": content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :],
        "empty": b"",
        "foreign": pickle.dumps(Trap(tmp_path / "trap")),
    }
    path.write_bytes(broken[damage])
    report, _ = start()
    assert not report.cached
    assert report.fallbacks == ["1 damaged program(s) removed from the compile cache"]
    assert not (tmp_path / "trap").exists()
    assert start()[0].fallbacks == []
    assert start()[0].cached


def test_a_program_that_cannot_be_loaded_is_built_again(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    load = dscompile.runtime.code.ProgramCode.load

    def fail(self: Any) -> Any:
        monkeypatch.setattr(dscompile.runtime.code.ProgramCode, "load", load)
        raise OSError("a library is gone")

    monkeypatch.setattr(dscompile.runtime.code.ProgramCode, "load", fail)
    report, _ = start()
    assert (report.cached, len(report.fallbacks)) == (False, 1)
    assert start()[0].cached


def test_a_cache_that_cannot_be_written_is_reported(cache_dir: Path) -> None:
    cache_dir.mkdir()
    (cache_dir / FOLDER).write_text("no folder")
    report, _ = start()
    assert "cannot write" in report.not_kept
    assert "not kept in the cache" in report.line()
    assert not start()[0].cached


def test_files_being_written_are_no_entries(cache_dir: Path) -> None:
    start()
    (path,) = entries(cache_dir)
    path.rename(path.with_name(f".{path.name}.1.tmp"))
    report, _ = start()
    assert (report.cached, report.fallbacks) == (False, [])


# -- what cannot be kept -----------------------------------------------------------------------------------------------


@torch.library.custom_op("step_cache_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda ctx, g: 2 * g)


def custom(model: nn.Module, ids: Tensor) -> Tensor:
    return twice(model(ids)).mean()


def test_a_custom_operator_is_not_kept_until_its_version_is_named(cache_dir: Path) -> None:
    report, _ = start(loss=custom)
    assert "step_cache_test.twice" in report.not_kept
    assert entries(cache_dir) == []
    name = "torch.ops.step_cache_test.twice"
    with inductor_config.patch(unsafe_marked_cacheable_functions={name: "1"}):
        assert start(loss=custom)[0].not_kept == ""
        assert start(loss=custom)[0].cached
    with inductor_config.patch(unsafe_marked_cacheable_functions={name: "2"}):
        assert not start(loss=custom)[0].cached


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 3 * gradients[0]


def test_what_pytorch_does_not_hash_is_not_kept(cache_dir: Path) -> None:
    report, _ = start(loss=lambda model, ids: Triple.apply(model(ids)).mean())
    assert "autograd_function_apply" in report.not_kept
    assert "\n" not in report.not_kept
    assert "not kept in the cache: Unsupported" in report.line()
    assert entries(cache_dir) == []


def test_constants_are_told_apart_by_content_in_every_type() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int64):
        ones, zeros = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
        assert content_of(ones) == content_of(ones.t().contiguous().t()) != content_of(zeros)
    assert content_of(torch.tensor(1.0)) != content_of(torch.tensor(2.0))
    assert content_of(torch.empty(0)) == content_of(torch.empty(0))
    with pytest.raises(NotCacheable, match="sparse_coo"):
        content_of(torch.ones(7).to_sparse())


# -- processes ---------------------------------------------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    from tests.test_step_cache import start
    report, _ = start(regions="auto")
    print("right", report.cached, len(report.fallbacks))
    """
)


@pytest.mark.slow
def test_three_processes_at_once() -> None:
    for cached in (False, True):
        command = [sys.executable, "-c", SCRIPT]
        running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        for process in running:
            out, _ = process.communicate(timeout=300)
            assert (process.returncode, out.strip()) == (0, f"right {cached} 0")
