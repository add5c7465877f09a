"""Which attentions of a model become sparse, which stay dense, and that each of them is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dscompile.report import REPORTS
from tests.build import trace
from tests.sparse.test_sparse_pass import BIGBIRD, EACH_HEAD, LOCAL, compiled, masked_by_hand, plan, step

SEQ = 75


class Grouped(nn.Module):
    """Grouped-query attention: six heads of queries, ``shared`` of keys and values."""

    def __init__(self, shared: int, *, causal: bool) -> None:
        super().__init__()
        self.shared, self.causal = shared, causal
        self.q, self.kv = nn.Linear(16, 48), nn.Linear(16, 16 * shared)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, 6, 8).transpose(1, 2)
        k, v = self.kv(x).view(batch, seq, 2, self.shared, 8).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return (out * torch.arange(1.0, 7.0).view(6, 1, 1)).square().mean()


@pytest.mark.parametrize(
    ("shared", "causal", "section"), [(3, False, EACH_HEAD), (1, True, BIGBIRD)], ids=["a layout a head", "one head"]
)
def test_grouped_queries_are_rewritten(shared: int, causal: bool, section: dict[str, Any]) -> None:
    model, x = Grouped(shared, causal=causal), torch.randn(2, SEQ, 16)
    found = step(compiled(model, section), model, (x,))
    assert (REPORTS.all()[0].verdict, REPORTS.all()[0].fallbacks) == ("approximate", [])
    with masked_by_hand(section):
        expected = step(model, model, (x,))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


class Two(nn.Module):
    """Queries of one value, keys and values of another, as ``made`` makes them of two inputs of one shape."""

    def __init__(self, made: Callable[..., tuple[Tensor, Tensor]], attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.made, self.attend = made, attend

    def attention(self, one: Tensor, other: Tensor) -> Tensor:
        batch, seq, _ = one.shape
        q = self.q(one).view(batch, seq, 2, 8).transpose(1, 2)
        k, v = self.kv(other).view(batch, seq, 2, 2, 8).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, seq, 16))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(*self.made(self, x, memory)).square().mean()


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.3).softmax(-1), v)


def flat(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads in one dimension, as ``nn.MultiheadAttention`` with ``need_weights`` computes it."""
    scores = torch.bmm(q.flatten(0, 1) * 0.3, k.flatten(0, 1).transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(q)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


MADE: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], bool]] = {
    "one value": (lambda m, x, y: (x, x), False),
    "one value, normalised twice": (lambda m, x, y: (m.first(x), m.second(x)), False),
    "the same to itself, after the other": (lambda m, x, y: ((z := x + m.attention(x, y)), z), False),
    "another value": (lambda m, x, y: (x, y), True),
    "another value, both normalised": (lambda m, x, y: (m.first(x), m.first(y)), True),
    "another value, again": (lambda m, x, y: (x + m.attention(x, y), y), True),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("attend", [sdpa, einsum, flat], ids=["sdpa", "einsum", "flat"])
def test_cross_attention_of_equal_lengths_stays_dense(name: str, attend: Callable[..., Tensor]) -> None:
    made, cross = MADE[name]
    graph = trace(Two(made, attend), torch.randn(2, SEQ, 16), torch.randn(2, SEQ, 16))
    _, decisions = plan(graph, LOCAL)
    last = decisions[-1]
    assert last.choice == ("refused" if cross else "sparse" if attend is sdpa else "masked")
    assert ("made of different values" in last.reason) == cross
    assert last.fallback == (last.choice != "sparse")


@pytest.mark.parametrize("attend", [einsum, flat], ids=["einsum", "flat"])
def test_other_spellings_are_masked(attend: Callable[..., Tensor]) -> None:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)

    written, reference = (Two(lambda m, x, y: (x, x), how) for how in (attend, dense))
    reference.load_state_dict(written.state_dict())
    args = (torch.randn(2, SEQ, 16), torch.zeros(2, SEQ, 16))
    found = step(compiled(written, LOCAL), written, args)
    assert [f.split(":")[1].split()[1] for f in REPORTS.all()[0].fallbacks] == ["masked"]
    with masked_by_hand(LOCAL):
        expected = step(reference, reference, args)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_scores_without_a_dimension_of_heads_need_a_common_layout() -> None:
    model = Two(lambda m, x, y: (x, x), flat)
    _, decisions = plan(trace(model, torch.randn(2, SEQ, 16), torch.zeros(2, SEQ, 16)), EACH_HEAD)
    assert [d.choice for d in decisions] == ["refused"]
    assert "different_layout_per_head is on" in decisions[0].reason


def test_what_pytorch_spells_out_is_not_said_to_be_written_by_the_model() -> None:
    model = Two(lambda m, x, y: (x, x), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    _, decisions = plan(trace(model, torch.randn(2, SEQ, 16), torch.zeros(2, SEQ, 16)), LOCAL)
    assert [d.choice for d in decisions] == ["masked"]
    assert decisions[0].reason.startswith("PyTorch spells this scaled_dot_product_attention out (dropout inside")


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_no_kernel_takes_stays_dense(scale: float) -> None:
    model = Two(lambda m, x, y: (x, x), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale))
    _, decisions = plan(trace(model, torch.randn(2, SEQ, 16), torch.zeros(2, SEQ, 16)), LOCAL)
    assert [d.choice for d in decisions] == ["refused"]
    assert f"the scale {scale} is not positive" in decisions[0].reason


def test_the_fast_path_of_inference_is_told() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, SEQ, 16)
    with torch.no_grad():
        compiled(layer, LOCAL)(x)
    (fallback,) = REPORTS.all()[0].fallbacks
    assert "refused" in fallback
    assert "torch.backends.mha.set_fastpath_enabled(False)" in fallback
