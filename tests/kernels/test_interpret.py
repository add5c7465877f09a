"""Every kernel, dtype and ragged size in Triton's interpreter against fp64: no GPU is needed, and the numbers count.

All cases of a set run in one process, because starting one takes seconds and a case milliseconds.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.kernels import references
from tests.kernels.gathers import CASES
from tests.kernels.pools import POOLS
from tests.kernels.scatters import SCATTERS
from tests.kernels.sums import SUMS
from tests.kernels.workers import work
from tests.sparse.layouts import LAYOUTS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the extra 'triton' is not installed"
)

ROWS = (
    "bias_gelu", "bias_gelu_backward", "bias_silu", "bias_silu_backward", "layer_norm", "layer_norm_backward",
    "rms_norm", "rms_norm_backward", "softmax", "softmax_backward", "cross_entropy", "cross_entropy_backward",
    "cross_entropy_both", "adamw", "lamb", "unscale", "embedding_norm", "cumulative_softmax", "embedding_backward",
    "batch_norm", "batch_norm_backward", "max_pool", "max_pool_backward", "average_pool", "average_pool_backward",
    "pad_join", "scatter_rows", "index_add", "histogram",
)  # fmt: skip
QUICK = [f"{name}/bf16/5/37" for name in ROWS] + [
    "rotary/bf16/5/24", "layer_norm/f32/1/20", "layer_norm_backward/f16/33/16", "unscale/f32/21/1000",
    "cross_entropy_both/f32/2/17001", "layer_norm/bf16/2/17001", "softmax/f32/2/17000", "rms_norm_backward/f32/300/40",
]  # fmt: skip
WALKED = "2/17001"
SIZES = ("1/1", "1/64", "5/37", "33/16", "64/768", "3/1025", WALKED, "200/100")
FULL = dict.fromkeys(ROWS, SIZES) | {"rotary": ("1/2", "5/24", "16/64"), "histogram": SIZES[1:]} | {
    name: tuple(size for size in SIZES if size != WALKED) for name in ROWS if "pool" in name
}  # fmt: skip
"""Pools have no rows to walk, and a million windows take minutes.

Triton's interpreter has no ``&`` of a scalar's comparison and a block's, which a histogram of one element has.
"""
DTYPES = ("f32", "bf16", "f16")
ROUNDING = 1.0
"""One unit in the last place of the result's type, and 3e-6 of the largest value: see ``interpret.excess``."""


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return work("interpret", QUICK)


@pytest.mark.parametrize("case", QUICK)
def test_a_kernel_is_right(quick: dict[str, Any], case: str) -> None:
    check(quick[case])


def check(errors: Any) -> None:
    assert not isinstance(errors, str), errors
    assert errors
    assert max(errors) <= ROUNDING


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULL)
def test_every_kernel_is_right_at_every_size(name: str, dtype: str) -> None:
    found = work("interpret", [f"{name}/{dtype}/{size}" for size in FULL[name]])
    wrong = {case: e for case, e in found.items() if isinstance(e, str) or not e or max(e) > ROUNDING}
    assert not wrong


def test_the_gradient_of_one_column_is_rounding() -> None:
    """Why ``references.terms`` is there: PyTorch in fp32 is as far off where RMSNorm has one column."""
    (grad, x, _, weight), (wanted, _) = references.case("rms_norm_backward", torch.float32, 1, 1)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(torch.nn.functional.rms_norm(leaf, [1], weight, references.EPS), leaf, grad)
    (size,) = references.terms("rms_norm_backward", [grad, x, x.abs().reciprocal(), weight])
    assert wanted.abs().max() < 1e-5 * size
    assert ((found - wanted) / wanted).abs().max() > 0.01


# -- places that data decide -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gathers() -> dict[str, Any]:
    return work("interpret_gather", GATHERS)


GATHERS = [f"{name}/{dtype}/{size}" for name in CASES for dtype in ("f32", "bf16", "f16")
           for size in ("1/1", "5/37", "3/1025")]  # fmt: skip


@pytest.mark.parametrize("case", GATHERS)
def test_a_gather_is_right_and_fused(gathers: dict[str, Any], case: str) -> None:
    """``index`` by negative numbers, between other dimensions and apart; ``gather``, ``embedding``; int32 and int64."""
    found = gathers[case]
    assert not isinstance(found, str), found
    assert found["left"] == []
    assert found["kernels"] <= (2 if case.startswith("gather") else 1), "an index may be converted by its own kernel"
    assert found["shape"]
    assert found["error"] <= ROUNDING


@pytest.fixture(scope="module")
def sums() -> dict[str, Any]:
    return work("interpret_gather", SUM_CASES)


SUM_CASES = [f"{name}/{dtype}/{size}" for name in SUMS for dtype in ("f32", "bf16", "f16")
             for size in ("1/1", "5/37", "3/1025")]  # fmt: skip


@pytest.mark.parametrize("case", SUM_CASES)
def test_sums_that_share_a_kernel_and_running_sums_are_right(sums: dict[str, Any], case: str) -> None:
    """A batch norm's gradients in evaluation and training, sums that one program ends, ``cumsum`` in every place."""
    found = sums[case]
    assert not isinstance(found, str), found
    assert found["left"] == []
    assert found["kernels"] <= (3 if case.startswith("batch_norm_training") else 2)
    assert found["shape"]
    columns = int(case.rsplit("/")[-1]) if case.startswith("cumsum") and "/f32/" in case else 0
    assert found["error"] <= ROUNDING + columns * 2.0**-24 / 3e-6, "the interpreter adds one after another, in fp32"


# -- images, and places that are stored to ---------------------------------------------------------------------------

IMAGES = ("f32/3/6/10", "bf16/1/4/12", "f16/2/6/34")
PICTURES = [f"{name}/{IMAGES[k % 3]}" for k, name in enumerate((*POOLS, *SCATTERS))] + [
    "batch_norm/f32/3/66/90", "batch_norm/bf16/20/30/29", "batch_norm/f32/2/2/2", "max_3_2_1/f16/1/7/9",
    "average_2/f16/1/7/9", "average_without_padding/f32/2/3/5", "embedding/f32/9/5/70", "max_edges/bf16/2/5/5",
    "pad_view/f32/1/3/67",
]  # fmt: skip
PICTURES_FULL = [f"{name}/{size}" for name in (*POOLS, *SCATTERS) for size in ("1/2/2", "3/6/10", "5/4/34", "2/20/66")]
EMPTY = [f"{n}/f32/0/6/10" for n in ("max_2", "average_2", "pad", "embedding", "index_put_negative", "flip")]


@pytest.fixture(scope="module")
def pictures() -> dict[str, Any]:
    return work("interpret_pool", [*PICTURES, *EMPTY])


@pytest.mark.parametrize("case", PICTURES)
def test_pools_norms_moves_and_scatters_are_right(pictures: dict[str, Any], case: str) -> None:
    """Windows that overlap, tie, hang over the edge or hold NaN; places that are negative, repeated or all the same."""
    check_picture(pictures[case])


def check_picture(found: Any) -> None:
    assert not isinstance(found, str), found
    assert found["left"] == []
    assert found["shape"]
    assert max(found["error"]) <= ROUNDING


@pytest.mark.parametrize("case", EMPTY)
def test_what_has_no_elements_is_left_to_pytorch(pictures: dict[str, Any], case: str) -> None:
    found = pictures[case]
    assert not isinstance(found, str), found
    assert found["shape"]
    assert max(found["error"]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools_norms_moves_and_scatters_are_right_at_every_size(dtype: str) -> None:
    cases = ["/".join((name, dtype, size)) for name, _, size in (case.partition("/") for case in PICTURES_FULL)]
    for found in work("interpret_pool", cases).values():
        check_picture(found)


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_draws_the_same_mask_in_backward() -> None:
    """Figures of one mask: the share of kept elements, and forward and backward of the same seed and of another."""
    found = work("interpret_dropout", ["7", "8"])
    for figures in found.values():
        assert figures["error"] <= ROUNDING
        assert figures["mask differs"] == 0
        assert abs(figures["dropped"] - 0.1) < 0.02  # 8,192 draws: six standard deviations
    assert found["7"]["mask"] != found["8"]["mask"]


# -- attention ---------------------------------------------------------------------------------------------------------

ATTENTION = [
    "dense/f32/16/40/16/-", "fixed/bf16/16/64/24/c", "fixed per head/f16/16/80/8/p", "variable/bf16/16/64/16/cp",
    "bigbird/f32/16/85/16/cpst", "longformer/bf16/16/90/40/pt", "window/f16/16/64/16/c", "random/f32/16/50/24/ch",
    "random/bf16/32/80/40/cp", "random/f32/128/200/16/p", "random/f16/64/128/64/cs", "random/bf16/16/33/8/ph",
]  # fmt: skip
ATTENTION_FULL = {
    f"{block}/{seq}/{dim}": [f"random/{{}}/{block}/{seq}/{dim}/{masks}" for masks in ("-", "c", "p", "cp")]
    for block, seq in ((16, 96), (32, 77), (64, 128), (128, 200)) for dim in (8, 64, 72)
} | {
    layout: [f"{layout}/{{}}/16/{seq}/16/{masks}{scale}" for seq in (64, 50) for masks in ("h", "ct", "p", "cp")
             for scale in ("", "s")] for layout in LAYOUTS
}  # fmt: skip
TOLERANCE = {"f32": 5e-6, "f16": 4e-3, "bf16": 3e-2}
"""Of the largest value: probabilities and slopes pass through the dtype before the second product, as in SDPA."""


@pytest.fixture(scope="module")
def attention() -> dict[str, Any]:
    return work("interpret_attention", ATTENTION)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_right(attention: dict[str, Any], case: str) -> None:
    errors = attention[case]
    assert not isinstance(errors, str), errors
    assert len(errors) == 4
    assert max(errors) <= TOLERANCE[case.split("/")[1]]


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("layout", ATTENTION_FULL)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_is_right_for_every_block_size_and_mask(layout: str, dtype: str) -> None:
    found = work("interpret_attention", [case.format(dtype) for case in ATTENTION_FULL[layout]])
    wrong = {c: e for c, e in found.items() if isinstance(e, str) or max(e) > TOLERANCE[c.split("/")[1]]}
    assert not wrong


EVOFORMER = [
    "f32/2/36/1/16/-", "f32/2/36/1/16/m", "f32/3/20/1/8/bu", "f32/2/20/2/16/mbhr", "bf16/2/70/1/24/mbt",
    "bf16/1/65/1/128/mb", "f16/2/64/1/8/mbsw", "f16/2/33/2/64/mbn", "f16/1/128/1/32/mbhr", "f32/1/1/1/8/mb",
    "f32/1/17/1/8/mbg",
]  # fmt: skip
EVOFORMER_FULL = [f"2/{residues}/2/{{}}/{flags}" for residues in (64, 77) for flags in ("-", "m", "b", "mbh", "mbtw")]


@pytest.fixture(scope="module")
def evoformer() -> dict[str, Any]:
    return work("interpret_evoformer", EVOFORMER)


def evoformer_count(case: str) -> int:
    """Results of a case: out, three gradients, and one for each bias that has one."""
    flags = case.split("/")[-1]
    return 4 + (0 if "n" in flags else ("m" in flags) + ("b" in flags))


@pytest.mark.parametrize("case", EVOFORMER)
def test_evoformer_attention_is_right(evoformer: dict[str, Any], case: str) -> None:
    errors = evoformer[case]
    assert not isinstance(errors, str), errors
    assert len(errors) == evoformer_count(case)
    assert max(errors) <= TOLERANCE[case.split("/")[0]]


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("dim", [8, 24, 32, 64, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_evoformer_attention_is_right_for_every_head_size_and_bias(dtype: str, dim: int) -> None:
    found = work("interpret_evoformer", [f"{dtype}/{case.format(dim)}" for case in EVOFORMER_FULL])
    assert {c: e for c, e in found.items() if isinstance(e, str)} == {}
    assert all(len(errors) == evoformer_count(c) for c, errors in found.items())
    assert {c: e for c, e in found.items() if max(e) > TOLERANCE[dtype]} == {}


# -- whole graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regions() -> dict[str, Any]:
    return work("interpret_region", ["block", "llama"])


@pytest.mark.parametrize("model", ["block", "llama"])
def test_a_models_joint_graph_is_right_with_kernels_and_operators_mixed(regions: dict[str, Any], model: str) -> None:
    found = regions[model]
    assert not isinstance(found, str), found
    assert max(found["errors"]) < 1e-5, "fp32, against PyTorch's own kernels"
    assert found["strides"]
    assert all(name.startswith(("%addmm", "%bmm", "%mm")) for name in found["left"]), (
        "only products are left to PyTorch"
    )
    assert found["kernels"] <= {"block": 13, "llama": 8}[model]


@pytest.mark.parametrize(
    "case", [pytest.param("block-long", marks=pytest.mark.slow), pytest.param("mean-long", marks=pytest.mark.slow),
             "llama-dynamic"]
)  # fmt: skip
def test_one_choice_serves_every_batch_and_sequence(case: str) -> None:
    """Traced at 2 x 9; a sequence of 1100 is longer than a block of a walked row, one of 2 shorter than everything."""
    (found,) = work("interpret_region", [case]).values()
    assert not isinstance(found, str), found
    assert set(found["errors"]) == {"2 x 9", "3 x 17", "5 x 2"} | ({"2 x 1100"} if case.endswith("long") else set())
    assert all(max(errors) < 5e-6 for errors in found["errors"].values()), found["errors"]
    assert found["strides"]
    assert len(found["kernels"]) <= {"block": 11, "llama": 4, "mean": 18}[case.partition("-")[0]]


def test_a_compiled_module_with_symbolic_sizes_is_ours_and_compiled_once() -> None:
    (found,) = work("interpret_models", ["llama-dynamic"]).values()
    assert not isinstance(found, str), found
    assert found["not ours"] == []
    assert found["choices"] == 2, "forward and backward, once for the three sizes"
    assert max(found["errors"].values()) < 5e-6


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "resnet", "mixtral"])
def test_whole_models_train_on_our_kernels(name: str) -> None:
    figures = work("interpret_models", [name])[name]
    assert not isinstance(figures, str), figures
    assert figures["error"] < 1e-4
    assert figures["kernels"] >= 10
    assert not any("retraced" in why for why in figures["not ours"]), figures["not ours"]


# -- the shim ----------------------------------------------------------------------------------------------------------


def test_without_the_shim_the_interpreter_is_wrong_in_bf16() -> None:
    """Why the shim is there. If this fails, Triton was mended: remove the shim."""
    found = work("interpret_without_shim", ["layer_norm/bf16/5/64", "attention"])
    assert max(found["layer_norm/bf16/5/64"]) > ROUNDING
    assert max(found["attention"]) > TOLERANCE["bf16"]
