"""Products of integers on AMX tiles: accuracy for operands of all kinds, what is computed again, refused and learnt.

All expected values are fp64's. What needs tiles of integers is skipped on a CPU without them; learning runs everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dscompile.codegen.cpu import gemm_choice, gemm_kernel, gemm_sites
from dscompile.codegen.cpu.builder import GemmBuild
from dscompile.codegen.cpu.builder import gemm_kernel as build
from dscompile.codegen.cpu.gemm_choice import Route, measured
from dscompile.codegen.cpu.gemm_kernel import GemmKernel
from dscompile.codegen.cpu.gemm_sites import PRODUCTS, Site
from dscompile.config import Config

KERNEL = build().kernel
integers = pytest.mark.skipif(KERNEL is None or not KERNEL.integers, reason="no AMX tiles of 8-bit integers")

ROWS, COLUMNS = 160, 144
FORMS = ("nn", "nt", "tn", "tt")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def lying(x: Tensor, transposed: bool) -> Tensor:
    return x.t().contiguous().t() if transposed else x.contiguous()


def product(
    a: Tensor, b: Tensor, site: Site | None = None, bias: Tensor | None = None, alpha: float = 1.0
) -> tuple[Tensor, Site]:
    assert KERNEL is not None
    site = site or Site()
    out = torch.full((a.shape[0], b.shape[1]), float("nan"))
    if not KERNEL.product(a, b, bias, out, alpha, site=site):
        torch.mm(a, b, out=out)
    return out, site


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's error depends on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gemm_sites.pytorch_error.cache_clear()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        gemm_sites.pytorch_error.cache_clear()


def on_one_thread(a: Tensor, b: Tensor) -> Tensor:
    with one_thread():
        return a @ b


def ratios(out: Tensor, a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Our error over PyTorch's: the worst row's, the worst column's (norms), and of the largest elements.

    Rows and columns count alike, whatever their scale: an element's error is taken over the norms of its operands. An
    error of one rounding of the result counts as PyTorch's where that is exact.
    """
    exact = a.double() @ b.double()
    norms = (a.double().norm(dim=1, keepdim=True) * b.double().norm(dim=0)).clamp_min(1e-300)
    mine, theirs, least = ((x / norms).abs() for x in (out - exact, on_one_thread(a, b) - exact, exact * 2**-24))
    rows, columns = (
        float((mine.norm(dim=d) / torch.maximum(theirs.norm(dim=d), least.norm(dim=d)).clamp_min(1e-300)).max())
        for d in (1, 0)
    )
    return rows, columns, float(mine.max() / max(float(theirs.max()), float(least.max()), 1e-300))


def spiked(size: float, a: Tensor) -> Tensor:
    a = a.clone()
    a[torch.arange(len(a)), torch.arange(len(a)) * 7 % a.shape[1]] = size
    return a


def disjoint(k: int) -> tuple[Tensor, Tensor]:
    a, b = normal(ROWS, k), normal(k, COLUMNS, seed=1)
    a[:, 1::2] *= 1e-6
    b[0::2] *= 1e-6
    return a, b


def spikes_that_meet(k: int) -> tuple[Tensor, Tensor]:
    a, b = normal(ROWS, k).abs() * 1e-4, normal(k, COLUMNS, seed=1).abs() * 1e-3
    a[:, k // 3] = b[k // 3] = 1
    return a, b


def logits_gradient(k: int) -> Tensor:
    probabilities = torch.softmax(normal(ROWS, k), 1)
    return probabilities - F.one_hot(torch.arange(ROWS) * 5 % k, k)


def student(rows: int, columns: int) -> Tensor:
    return normal(rows, columns) / (sum(normal(rows, columns, seed=s) ** 2 for s in (3, 4, 5)) / 3) ** 0.5


Make = Callable[[int], tuple[Tensor, Tensor]]


def left(make: Callable[[int], Tensor]) -> Make:
    return lambda k: (make(k), normal(k, COLUMNS, seed=1))


KINDS: dict[str, Make] = {
    "normal": left(lambda k: normal(ROWS, k)),
    "uniform": lambda k: (2 * torch.rand(ROWS, k) - 1, 2 * torch.rand(k, COLUMNS) - 1),
    "positive": lambda k: (torch.rand(ROWS, k), torch.rand(k, COLUMNS)),
    "gelu": left(lambda k: F.gelu(normal(ROWS, k))),
    "relu": left(lambda k: F.relu(normal(ROWS, k))),
    "dropout": left(lambda k: normal(ROWS, k) * (normal(ROWS, k, seed=9) > 1)),
    "softmax": left(lambda k: torch.softmax(2 * normal(ROWS, k), 1)),
    "heavy tails": left(lambda k: student(ROWS, k)),
    "heavy tails, right": lambda k: (normal(ROWS, k), student(k, COLUMNS)),
    "gradient of logits": left(logits_gradient),
    "gradient of logits, transposed": lambda k: (logits_gradient(k).t()[:, :ROWS], normal(ROWS, COLUMNS, seed=1)),
    "one of 10": left(lambda k: spiked(10, normal(ROWS, k))),
    "one of 100": left(lambda k: spiked(100, normal(ROWS, k))),
    "one of 1e4": left(lambda k: spiked(1e4, normal(ROWS, k))),
    "a column of outliers": left(lambda k: normal(ROWS, k) * (1 + 300 * (torch.arange(k) == k // 2))),
    "scales of rows": left(lambda k: normal(ROWS, k) * 10.0 ** torch.linspace(-20, 20, ROWS).unsqueeze(1)),
    "scales of both": lambda k: (
        normal(ROWS, k) * 10.0 ** torch.linspace(-6, 6, ROWS).unsqueeze(1),
        normal(k, COLUMNS, seed=1) * 10.0 ** torch.linspace(-5, 5, COLUMNS),
    ),
    "rows of zeros": left(lambda k: normal(ROWS, k) * (torch.arange(ROWS) % 3 > 0).unsqueeze(1)),
    "disjoint": disjoint,
    "spikes that meet": spikes_that_meet,
    "constant": lambda k: (torch.full((ROWS, k), 0.7), torch.full((k, COLUMNS), 0.3)),
    "two constants": lambda k: (0.7 + 0.3 * (normal(ROWS, k) > 0), 0.7 + 0.3 * (normal(k, COLUMNS, seed=1) > 0)),
    "signs": lambda k: (0.7 * normal(ROWS, k).sign(), 0.3 * normal(k, COLUMNS, seed=1).sign()),
    "whole numbers": lambda k: (normal(ROWS, k).mul(9).round(), normal(k, COLUMNS, seed=1).mul(9).round()),
    "bf16": lambda k: (normal(ROWS, k).bfloat16().float(), normal(k, COLUMNS, seed=1).bfloat16().float()),
    "cancelling": lambda k: (
        torch.cat([normal(ROWS, k // 2), -normal(ROWS, k // 2) + 1e-4 * normal(ROWS, k // 2, seed=2)], 1),
        torch.cat([normal(k // 2, COLUMNS, seed=1)] * 2),
    ),
    "tiny": left(lambda k: normal(ROWS, k) * 1e-12),
}

SPIKED = ("gradient of logits", "one of 1e4", "disjoint", "cancelling")
"""These are refused at sums of 1,000."""


@integers
@pytest.mark.parametrize("k", [256, 512, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_err_at_most_twice_as_much_as_pytorchs(kind: str, k: int) -> None:
    a, b = KINDS[kind](k)
    out, site = product(a, b)
    rows, columns, largest = ratios(out, a, b)
    assert rows <= 2, str(site)
    assert columns <= 3, str(site)
    assert largest <= 2, str(site)


@integers
@pytest.mark.parametrize(
    "kind", ["normal", "uniform", "positive", "gelu", "scales of both", "rows of zeros", "constant"]
)
def test_ordinary_operands_need_six_products_and_nothing_again(kind: str) -> None:
    with one_thread():
        _, site = product(*KINDS[kind](1500))
        assert (site.calls, sum(site.again), site.refused) == ([1, 0], 0, [0, 0])


@integers
@pytest.mark.parametrize("kind", SPIKED)
def test_operands_of_spikes_are_refused(kind: str) -> None:
    _, site = product(*KINDS[kind](1000))
    assert site.refused == [1, 1]


@integers
@pytest.mark.parametrize("powers", [1, 6])
def test_elements_that_grow_along_the_sum(powers: int) -> None:
    """PyTorch errs little where the large elements come last, and more in the other order; we do not depend on it."""
    a, b = normal(ROWS, 512) * 10.0 ** torch.linspace(0, powers, 512), normal(512, COLUMNS, seed=1)
    rows, columns, largest = ratios(product(a, b)[0], a, b)
    assert max(rows, columns) <= 4
    exact = a.double() @ b.double()
    mine, reverse = product(a, b)[0] - exact, a.flip(1) @ b.flip(0) - exact
    assert (mine.norm(dim=1) / reverse.norm(dim=1)).max() <= 2
    assert largest <= 2


@integers
@pytest.mark.parametrize("kind", [kind for kind in SPIKED if kind != "cancelling"])  # there PyTorch errs as much
def test_without_the_guard_the_accuracy_test_would_fail(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: everything is allowed."""
    monkeypatch.setattr(gemm_kernel, "limit", lambda k: float("inf"))
    a, b = KINDS[kind](1000)
    out, site = product(a, b)
    assert site.calls == [1, 0]
    assert ratios(out, a, b)[0] > 2


@integers
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 257, 70), (33, 329, 32), (70, 300, 530), (270, 1100, 40), (37, 1100, 2070)]
)
def test_forms_and_ragged_sizes(shape: tuple[int, int, int], form: str) -> None:
    m, k, n = shape
    a, b = lying(normal(m, k), form[0] == "t"), lying(normal(k, n, seed=1), form[1] == "t")
    rows, columns, largest = ratios(product(a, b)[0], a, b)
    assert max(rows, largest) <= 2
    assert columns <= 3


@integers
@pytest.mark.parametrize("form", FORMS)
def test_forms_by_integers_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tiles of bf16 could hide: no part of the product is theirs."""
    monkeypatch.setattr(gemm_kernel, "limit", lambda k: float("inf"))
    for (m, k, n), products in (((37, 270, 51), 6), ((270, 1100, 2075), 6), ((70, 1100, 300), 8)):
        a, b = lying(normal(m, k), form[0] == "t"), lying(normal(k, n, seed=1), form[1] == "t")
        level = PRODUCTS.index(products)
        out, site = product(a, b, Site(level=level, wait=9))
        assert site.calls[level] == 1
        exact = a.double() @ b.double()
        assert (out - exact).norm() <= (2 if products == 6 else 1.2) * (a @ b - exact).norm()


@integers
@pytest.mark.parametrize("k", [8192, 65536])
def test_long_sums(k: int) -> None:
    a, b = normal(40, k), normal(k, 48, seed=1)
    out, _ = product(a, b)
    rows, columns, largest = ratios(out, a, b)
    assert max(rows, largest) <= 2
    assert columns <= 3


@integers
@pytest.mark.parametrize("bias", ["row", "column", "full"])
@pytest.mark.parametrize("unequal", [0, 5, 30])
def test_bias_and_scale(bias: str, unequal: int) -> None:
    """Also where rows and columns are computed again, by PyTorch or on the tiles of bf16."""
    a, b = normal(500, 700), normal(700, 500, seed=1)
    a[: 3 * unequal] = spiked(1e5, a)[: 3 * unequal]
    b.t()[:unequal] = spiked(1e5, b.t())[:unequal]
    m, n = a.shape[0], b.shape[1]
    value = {"row": normal(n), "column": normal(m, 1), "full": normal(m, n)}[bias]
    out, site = product(a, b, bias=value, alpha=0.37)
    exact = value.double() + 0.37 * (a.double() @ b.double())
    assert (out - exact).abs().max() <= 2 * (torch.addmm(value, a, b, alpha=0.37) - exact).abs().max()
    assert sum(site.again) == pytest.approx(4 * unequal / 500)


@integers
def test_few_unequal_rows_and_columns_are_computed_again_and_no_others() -> None:
    a, b = normal(ROWS, 600), normal(600, COLUMNS, seed=1)
    clean, _ = product(a, b)
    a[3], a[90] = spiked(1e5, a)[3], spiked(1e5, a)[90]
    out, site = product(a, b)
    assert site.calls == [1, 0]
    assert site.again[0] == pytest.approx(2 / ROWS)
    others = [i for i in range(ROWS) if i not in (3, 90)]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[[3, 90]], a[[3, 90]] @ b)


@integers
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 2e30])
@pytest.mark.parametrize("at_left", [True, False])
def test_what_digits_cannot_represent_runs_elsewhere(value: float, at_left: bool) -> None:
    a, b = normal(40, 270), normal(270, 50, seed=1)
    (a if at_left else b)[3, 33] = value
    out, site = product(a, b)
    assert not sum(site.calls)
    torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-4, equal_nan=True)


@integers
def test_batches() -> None:
    assert KERNEL is not None
    a, b, site = normal(3, 100, 700), normal(3, 700, 130, seed=1), Site()
    out = torch.empty(3, 100, 130)
    assert KERNEL.product(a, b, None, out, site=site)
    assert site.calls == [1, 0]
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= 2 * (a @ b - exact).abs().max()
    a[1] = spiked(1e6, a[1])
    assert KERNEL.product(a, b, None, out, site=site)
    assert site.refused == [1, 1]
    torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=0.5)


@integers
def test_the_same_bits_for_any_number_of_threads() -> None:
    a, b = lying(normal(300, 1500), True), normal(1500, 2200, seed=1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append(product(a, b)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], x) for x in results[1:])


@integers
def test_zeros_stay_zero_and_sums_into_what_is_there_are_bf16s() -> None:
    assert KERNEL is not None
    a, b = normal(64, 512) * (torch.arange(64) % 2).unsqueeze(1), normal(512, 64, seed=1)
    assert (product(a, b)[0][::2] == 0).all()
    site, out = Site(), torch.zeros(64, 64)
    assert KERNEL.product(a, b, None, out, accumulate=True, site=site)
    assert not sum(site.calls)


@integers
@pytest.mark.parametrize("regions", ["auto", "whole"])
def test_a_compiled_model_has_gradients_as_accurate_as_eagers(regions: str) -> None:
    """All five products have sums and sides of 256 at least; each is a call site of its own."""
    assert KERNEL is not None
    torch.compiler.reset()  # other tests compile the same forward with other sizes: symbolic ones would be next
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(264, 400), torch.nn.GELU(), torch.nn.Linear(400, 272))
    x = normal(320, 264)

    def gradients(call: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
        model.zero_grad()
        call(at).square().mean().backward()
        return [p.grad.double() for p in model.parameters() if p.grad is not None]

    KERNEL.sites.clear()
    options = {"gemm": "amx_int8", "regions": regions, "cache": False}
    mine = gradients(torch.compile(model, backend="dscompile", options=options), x)
    theirs = gradients(model, x)
    model.double()
    exact = gradients(model, x.double())
    assert len(KERNEL.lines()) == len(KERNEL.sites) == 5
    assert all(sum(site.calls) == 1 for site in KERNEL.sites.values())
    for got, eager, want in zip(mine, theirs, exact, strict=True):
        assert (got - want).norm() <= 2 * (eager - want).norm()


@integers
def test_the_operator_is_registered_right_with_a_site() -> None:
    torch.library.opcheck(torch.ops.dscompile.matmul.default, (normal(64, 300), normal(300, 70), None, 7))


# -- learning --------------------------------------------------------------------------------------------------------


def test_a_refused_site_starts_at_the_next_level_and_tries_again() -> None:
    site = Site()
    assert site.begin() == 0
    site.refuse(0)
    site.passed(1, 0.0)
    starts = []
    for _ in range(gemm_sites.FIRST_WAIT):
        starts.append(site.begin())
        site.refuse(0) if starts[-1] == 0 else site.passed(1, 0.0)
    assert starts == [1] * (gemm_sites.FIRST_WAIT - 1) + [0]
    assert site.patience == 2 * gemm_sites.FIRST_WAIT
    while site.begin():
        site.passed(1, 0.0)
    site.passed(0, 0.0)
    assert site.level == 0
    assert site.refused == [2, 0]
    assert "6 products of digits" in str(site)


def test_a_site_that_computes_much_again_moves_on_and_one_that_seldom_does_stays() -> None:
    often, seldom = Site(), Site()
    for i in range(3 * gemm_sites.RECENT):
        often.passed(often.begin(), 0.1 if often.level == 0 else 0.0)
        seldom.passed(seldom.begin(), 0.02 if i % 4 == 0 else 0.0)
    assert (often.level, seldom.level) == (1, 0)


def test_what_pytorch_errs_is_bounded_by_what_fp32_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's precision of 'medium' makes PyTorch's products bf16; that allows us nothing."""
    honest = gemm_sites.limit(2048)
    assert 1e-7 < honest < gemm_sites.MARGIN * 8 * 2**-24
    monkeypatch.setattr(gemm_sites, "pytorch_error", lambda k: 1e-3)
    assert gemm_sites.limit(2048) <= gemm_sites.MARGIN * 8 * 2**-24


def test_auto_never_takes_the_tiles_of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bits depend on what a site met before: a resumed run would not go on with the same losses."""

    class Exact:
        integers = True

        @staticmethod
        def product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> bool:
            out.copy_(a.double() @ b.double())
            return True

    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(Exact))  # type: ignore[arg-type]
    monkeypatch.setattr(gemm_choice, "gain", lambda *_: 9.0)
    measured.cache_clear()
    route, _ = gemm_choice._choice(gemm_choice.Shape(1, 512, 512, 512, False, False, False), "auto")
    measured.cache_clear()
    assert route is Route.TILES


def test_without_tiles_of_integers_the_option_takes_bf16_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_choice, "gemm_kernel", lambda: GemmBuild(GemmKernel))  # type: ignore[arg-type]
    shape = gemm_choice.Shape(1, 8, 8, 8, False, False, False)
    route, reason = gemm_choice._choice(shape, Config(gemm="amx_int8").gemm)
    assert route is Route.TILES
    assert "no AMX tiles of int8" in reason
