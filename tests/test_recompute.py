"""recompute: what backward computes again, the bytes no longer saved, the same bits, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dscompile.config import Config
from dscompile.effects import dropout_scale
from dscompile.errors import PipelineError
from dscompile.graph import Phase, StepGraph, info
from dscompile.manager import Decision, PassContext, parse_pipeline, run_pipeline
from dscompile.passes import with_recompute
from dscompile.split import split
from dscompile.text import print_graph
from dscompile.text_diff import diff_text
from dscompile.text_parse import parse_graph
from dscompile.tools.gpt import GPT, GPTConfig
from dscompile.torch_compat import tensor_bytes
from tests.build import trace

aten = torch.ops.aten
GRAPHS = Path(__file__).with_name("graphs")
BOTH = {"gelu_checkpoint": True, "normalize_invertible": True}


class Mlp(nn.Module):
    """What a transformer's second half saves: the norm's both sides, the activation's both sides."""

    def __init__(self, activation: Any = F.gelu, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(8)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x))
        result: Tensor = x + self.down(self.activation(hidden))
        return result


def run(graph: StepGraph, **policies: bool) -> list[Decision]:
    """The decisions; the manager proves the result bit for bit equal."""
    context = PassContext(Config.load({"recompute": policies}))
    records = run_pipeline(graph, parse_pipeline("canonicalise,recompute"), context)
    assert records[1].verdict == "proved"
    return context.decisions


def saved_bytes(graph: StepGraph) -> int:
    """Bytes of what is saved between the halves, apart from the graph's inputs."""
    names = {p.name for p in graph.placeholders()}
    by_name = {n.name: n for n in graph.nodes}
    return sum(tensor_bytes(by_name[n].meta["val"]) for n in split(graph).saved if n not in names)


def joint(model: nn.Module, x: Tensor) -> StepGraph:
    graph = trace(model, x)
    run_pipeline(graph, parse_pipeline("canonicalise"), PassContext(Config()))
    return graph


ROWS = 6
NARROW, WIDE = 4 * ROWS * 8, 4 * ROWS * 32


@pytest.mark.parametrize(
    ("policies", "fewer"),
    [({"gelu_checkpoint": True}, WIDE), ({"normalize_invertible": True}, NARROW), (BOTH, NARROW + WIDE), ({}, 0)],
)
@pytest.mark.parametrize("activation", [F.gelu, F.silu, lambda v: F.gelu(v, approximate="tanh")])
def test_the_bytes_that_are_no_longer_saved(policies: dict[str, bool], fewer: int, activation: Any) -> None:
    graph = joint(Mlp(activation), torch.randn(ROWS, 8, requires_grad=True))
    before = saved_bytes(graph)
    decisions = run(graph, **policies)
    assert before - saved_bytes(graph) == fewer
    assert sum(d.facts["saved_bytes"] for d in decisions if d.choice == "recomputed") == fewer


def test_before_and_after() -> None:
    """Backward's two products read copies of GELU and norm, nothing else changes."""
    graph = parse_graph((GRAPHS / "recompute.txt").read_text())
    run(graph, **BOTH)
    assert diff_text((GRAPHS / "recompute.after.txt").read_text(), print_graph(graph)) == ""


def test_a_spelt_out_rms_norm_is_a_norm() -> None:
    graph = joint(Mlp(norm=nn.RMSNorm), torch.randn(ROWS, 8, requires_grad=True))
    before = saved_bytes(graph)
    decisions = run(graph, normalize_invertible=True)
    assert before - saved_bytes(graph) >= NARROW
    assert any(d.choice == "recomputed" for d in decisions)


def test_backward_reads_its_own_computation() -> None:
    graph = joint(Mlp(), torch.randn(ROWS, 8, requires_grad=True))
    run(graph, gelu_checkpoint=True)
    first, second = graph.graph.find_nodes(op="call_function", target=aten.gelu.default)
    assert (info(first).phase, info(second).phase) == (Phase.FORWARD, Phase.BACKWARD)
    assert first.args == second.args
    assert all(info(user).phase is Phase.FORWARD for user in first.users)


def test_an_output_whose_input_is_not_saved_stays_with_the_reason() -> None:
    """Without a derivative to its input GELU's input is not saved: computing it again would save as many bytes."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.down(F.gelu(x.sin().detach()))
            return result

    graph = joint(Frozen(), torch.randn(ROWS, 8))
    before = print_graph(graph)
    (decision,) = run(graph, **BOTH)
    assert decision.choice == "saved"
    assert "would have to be saved instead" in decision.reason
    assert print_graph(graph) == before


class Attention(nn.Module):
    """Attention with dropout, as PyTorch's operator or spelt out."""

    def __init__(self, fused: bool, dtype: torch.dtype | None = None, rate: float = 0.25) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fused, self.dtype, self.rate = fused, dtype, rate

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            q, k, v = self.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
            if self.fused:
                mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate)
            else:
                probabilities = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1)
                mixed = F.dropout(probabilities, self.rate) @ v
            result: Tensor = self.out(mixed.transpose(1, 2).reshape(2, 6, 8))
            return result


PROBABILITIES = 2 * 2 * 6 * 6


@pytest.mark.parametrize(
    ("fused", "dtype", "size"),  # autocast's softmax is fp32, and so is all of PyTorch's operator
    [(False, None, 4), (True, None, 4), (False, torch.bfloat16, 2), (True, torch.bfloat16, 4)],
)
def test_what_dropout_leaves_of_attention_is_computed_again(fused: bool, dtype: torch.dtype | None, size: int) -> None:
    """On CPUs PyTorch's operator with dropout saves probabilities, mask and their product, as attention spelt out."""
    graph = joint(Attention(fused, dtype), torch.randn(2, 6, 8))
    before = saved_bytes(graph)
    (decision,) = run(graph, attn_dropout_checkpoint=True)
    assert decision.choice == "recomputed"
    assert decision.facts["saved_bytes"] == before - saved_bytes(graph) == size * PROBABILITIES
    assert len(graph.graph.find_nodes(op="call_function", target=aten.native_dropout.default)) == 1


def test_dropout_before_and_after() -> None:
    """Backward's product reads probabilities times mask times scale; nothing is drawn twice."""
    graph = parse_graph((GRAPHS / "recompute_dropout.txt").read_text())
    run(graph, attn_dropout_checkpoint=True)
    assert diff_text((GRAPHS / "recompute_dropout.after.txt").read_text(), print_graph(graph)) == ""


def test_other_dropout_and_other_policies_are_left() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(F.dropout(x.sin(), 0.25))
            return result

    assert run(joint(Hidden(), torch.randn(ROWS, 8)), attn_dropout_checkpoint=True) == []
    assert run(joint(Attention(False), torch.randn(2, 6, 8)), **BOTH) == []
    everything = joint(Attention(False, rate=1.0), torch.randn(2, 6, 8))  # whose scale is no 1 / (1 - p)
    assert run(everything, attn_dropout_checkpoint=True) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [0.1, 0.25, 1 / 3, 0.9])
def test_dropout_is_mask_times_scale_in_bits(rate: float, dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, mask = aten.native_dropout.default(x, rate, True)
    scale = dropout_scale(rate, True, dtype)
    assert scale == pytest.approx(1 / (1 - rate), rel=2.0**-8)
    assert torch.equal(aten.mul.Scalar(aten.mul.Tensor(x, mask), scale), out)


@pytest.mark.parametrize("regions", [pytest.param("auto", marks=pytest.mark.slow), "aten"])
def test_attention_learns_the_same_with_the_same_draws(regions: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(True), Attention(False)), torch.randn(2, 6, 8)

    def step(options: dict[str, Any]) -> list[Tensor]:
        torch.compiler.reset()
        compiled = torch.compile(model, backend="dscompile", options={"summary": False, "regions": regions, **options})
        torch.manual_seed(1)
        return list(torch.autograd.grad(compiled(x).square().sum(), model.parameters()))

    plain, again = step({}), step({"recompute": {"attn_dropout_checkpoint": True}})
    tolerance = 0.0 if regions == "aten" else 1e-6
    torch.testing.assert_close(again, plain, rtol=tolerance, atol=tolerance)
    if regions == "aten":  # which draws as eager does
        torch.manual_seed(1)
        eager = list(torch.autograd.grad(model(x).square().sum(), model.parameters()))
        torch.testing.assert_close(again, eager, rtol=1e-5, atol=1e-6)


def test_what_the_caller_receives_stays_saved() -> None:
    class Returned(Mlp):
        def forward(self, x: Tensor) -> Any:
            hidden = self.activation(self.up(x))
            return hidden, self.down(hidden)

    graph = joint(Returned(), torch.randn(ROWS, 8))
    assert run(graph, **BOTH) == []


def test_what_the_step_writes_to_is_no_operand() -> None:
    """Backward would read the new contents of the buffer (autograd's version counter raises)."""

    class Updates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(ROWS, 8))
            self.down = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(F.gelu(self.state)) + x
            self.state.add_(1)
            return y

    graph = joint(Updates(), torch.randn(ROWS, 8))
    (decision,) = run(graph, **BOTH)
    assert decision.choice == "saved"


def test_no_section_or_no_policy_changes_nothing() -> None:
    graph = joint(Mlp(), torch.randn(ROWS, 8, requires_grad=True))
    before = print_graph(graph)
    assert run(graph) == []
    assert print_graph(graph) == before


def test_the_section_puts_the_pass_into_named_pipelines_only() -> None:
    asked = Config.load({"recompute": BOTH})
    assert with_recompute("default", asked) == "canonicalise,fuse_loss,recompute,save_narrow"
    assert with_recompute("default", Config()) == "canonicalise,fuse_loss,save_narrow"
    assert with_recompute("canonicalise,recompute", asked) == "canonicalise,recompute"
    with pytest.raises(PipelineError, match="lacks 'recompute'"):
        with_recompute("canonicalise", Config.load({"recompute": BOTH, "pipeline": "canonicalise"}))


@pytest.mark.parametrize("regions", ["auto", "aten"])
def test_a_gpt_learns_the_same(regions: str) -> None:
    """Loss and gradients of the compiled model with and without the policies: equal in bits with PyTorch's kernels."""
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))

    def step(options: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(0)
        torch.compiler.reset()
        model = GPT(GPTConfig(vocab=64, layers=2, width=16, heads=2, context=8))
        compiled = torch.compile(model, backend="dscompile", options={"summary": False, "regions": regions, **options})
        loss = compiled(ids[:, :-1], ids[:, 1:])
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain, again = step({}), step({"recompute": BOTH})
    tolerance = 0.0 if regions == "aten" else 1e-6
    torch.testing.assert_close(again, plain, rtol=tolerance, atol=tolerance)
