"""Which library runs fp32 products: the decision for every measurement, and that the user's setting comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dscompile.runtime import gemm
from dscompile.runtime.gemm import GemmChoice, with_gemm


@pytest.fixture(autouse=True)
def _setting() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


def measured(monkeypatch: pytest.MonkeyPatch, accurate: bool, gain: float, error: float = 1.0) -> None:
    monkeypatch.setattr(gemm, "_probe", lambda: (accurate, gain, error))


@pytest.mark.parametrize(
    ("option", "accurate", "gain", "onednn"),
    [
        ("auto", True, 2.0, True),
        ("auto", True, gemm.GAIN, True),
        ("auto", True, 1.1, False),  # accurate, but not worth it
        ("auto", False, 2.0, False),  # fast because it rounds
        ("auto", False, 0.0, False),  # no AVX-512
        ("onednn", True, 1.1, True),  # the user asked
        ("onednn", False, 2.0, False),  # but never at bf16 accuracy
        ("onednn", False, 0.0, False),
        ("default", True, 5.0, False),
    ],
)
def test_decision(monkeypatch: pytest.MonkeyPatch, option: str, accurate: bool, gain: float, onednn: bool) -> None:
    measured(monkeypatch, accurate, gain)
    choice = GemmChoice.of(option)
    assert choice.onednn is onednn
    assert choice.reason


def test_the_reason_has_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, True, 1.7)
    assert "1.70 x" in GemmChoice.of("auto").reason
    measured(monkeypatch, False, 1.7, error=512.0)
    assert "512 x" in GemmChoice.of("auto").reason


def test_default_does_not_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> tuple[bool, float, float]:
        raise AssertionError

    monkeypatch.setattr(gemm, "_probe", never)
    assert not GemmChoice.of("default").onednn


def test_amx_is_never_accurate_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneDNN may use its tiles for shapes that the probe did not try, so a good measurement does not count."""
    monkeypatch.setattr(gemm, "_has_bf16_units", lambda: True)
    assert not gemm._measure()[0]


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", False),
        ("processor\t: 0\n", True),  # unknown counts as there
    ],
)
def test_amx_is_read_from_the_cpus_flags(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, units: bool
) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(gemm, "CPUINFO", str(path))
    assert gemm._has_bf16_units() is units


def test_an_unreadable_cpuinfo_counts_as_amx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gemm, "CPUINFO", str(tmp_path / "absent"))
    assert gemm._has_bf16_units()


@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="the switch selects nothing here")
def test_what_is_chosen_is_fp32_accurate() -> None:
    """Whatever the probe says on this machine, products under its choice have fp32's error, not bf16's."""
    choice = GemmChoice.of("onednn")
    generator = torch.Generator().manual_seed(1)
    for rows, inner, columns in ((64, 96, 128), (33, 257, 65), (256, 256, 256)):
        a, b = (torch.randn(s, generator=generator) for s in ((rows, inner), (inner, columns)))
        exact = a.double() @ b.double()
        (found,) = with_gemm(lambda args: (args[0] @ args[1],), choice)([a, b])
        assert float((found - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("user", ["none", "ieee"])
def test_the_users_setting_is_restored(user: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = user
    inside: list[str] = []

    def run(args: list[int]) -> int:
        inside.append(torch.backends.mkldnn.matmul.fp32_precision)
        if args[0]:
            raise RuntimeError("a kernel failed")
        return 7

    wrapped = with_gemm(run, GemmChoice(True, "test"))
    assert wrapped([0]) == 7
    assert torch.backends.mkldnn.matmul.fp32_precision == user
    with pytest.raises(RuntimeError, match="a kernel failed"):
        wrapped([1])
    assert torch.backends.mkldnn.matmul.fp32_precision == user
    assert inside == ["bf16", "bf16"]


def test_the_default_library_leaves_the_setting_alone() -> None:
    def run(args: list[int]) -> str:
        return torch.backends.mkldnn.matmul.fp32_precision

    assert with_gemm(run, GemmChoice(False, "test")) is run


def test_eager_code_between_forward_and_backward_does_not_see_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, True, 2.0)
    seen: list[str] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return x.clone()

        @staticmethod
        def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return g

    torch.compiler.reset()
    model = nn.Linear(4, 4)
    compiled = torch.compile(model, backend="dscompile", options={"regions": "aten", "summary": False, "cache": False})
    user = torch.backends.mkldnn.matmul.fp32_precision
    Spy.apply(compiled(torch.randn(2, 4))).sum().backward()
    assert seen == [user, user]
    assert model.weight.grad is not None
