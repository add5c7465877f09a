"""PyTorch's operator database: forward and backward equal eager.

A sample runs always, every operator under ``-m slow``. No operator is excepted: what eager runs must run.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("expecttest")  # torch.testing._internal wants it

from operators import EagerFailureError, check, operators

ALL = operators()
FAST_EVERY = 23
COMPILED_EVERY = 97
"""The fast sample takes every so-many-th operator, by name, with PyTorch's kernels and compiled."""

RISKY = (
    "linalg.cholesky", "linalg.inv", "sort", "split.list_args", "unbind", "nn.functional.dropout", "bernoulli", "svd",
    "combinations", "fft.rfft", "complex", "masked_select", "nonzero", "index_put", "to_sparse", "sparse.mm.reduce",
    "as_strided", "resize_", "max.reduction_with_dim", "nn.functional.batch_norm", "nn.functional.ctc_loss", "item",
    "empty_like", "randn",
)  # fmt: skip
"""Several outputs, lists, draws, effects, complex and sparse values, views, sizes from data: always in the sample."""


def _check(name: str, options: dict[str, object], samples: int, **settings: object) -> None:
    try:
        check(name, ALL[name], samples, "dscompile", {"summary": False, **options}, **settings)
    except EagerFailureError as error:
        pytest.skip(f"eager does not run it: {error}")


def _fast() -> list[str]:
    return sorted({*list(ALL)[::FAST_EVERY], *RISKY})


def test_the_names_of_the_list_exist() -> None:
    assert set(RISKY) <= set(ALL)


@pytest.mark.parametrize("name", _fast())
def test_with_pytorchs_kernels(name: str) -> None:
    _check(name, {"regions": "aten"}, samples=1)


@pytest.mark.parametrize("name", list(ALL)[::COMPILED_EVERY])
def test_compiled(name: str) -> None:
    _check(name, {}, samples=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_operator_with_pytorchs_kernels(name: str) -> None:
    _check(name, {"regions": "aten"}, samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_operator_compiled(name: str) -> None:
    _check(name, {}, samples=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_operator_without_a_graph_break_at_sizes_from_data(name: str) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        _check(name, {"regions": "aten"}, samples=1)
