"""The ``sparse_attention`` pass on what a GPU's attention is in a graph. Fake tensors: nothing runs on a device."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

import dscompile.attention_ops  # noqa: F401  registers the operators
from dscompile.config import Config
from dscompile.graph import InputKind, StepGraph
from dscompile.manager import Decision, PassContext, PassRecord, parse_pipeline, run_pipeline
from tests.build import Hand

aten = torch.ops.aten
LOCAL = {"mode": "local_sliding_window", "attention": "bidirectional"}
SPARSE = torch.ops.dscompile.block_sparse_attention.default
SPARSE_BACKWARD = torch.ops.dscompile.block_sparse_attention_backward.default
KINDS = ("flash", "efficient", "cudnn")


def part(h: Hand, node: fx.Node, index: int) -> fx.Node:
    made = h.graph.call_function(operator.getitem, (node, index))
    made.meta["val"] = node.meta["val"][index]
    return made


def attention(
    kind: str,
    *,
    causal: bool = False,
    mask: str = "",
    bias_gradient: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> StepGraph:
    """Forward and backward of one attention of 64 tokens in 16 bits, as PyTorch's operators for CUDA spell it."""
    h = Hand()
    with torch.device("cuda"):
        q, k, v = (h.input(name, 1, 2, 64, 8, dtype=dtype) for name in "qkv")
        seen = h.input("m", 1, 1, 1, 64, dtype=torch.bool) if mask == "padding" else None
        tangent = h.input("tangent", 1, 2, 64, 8, dtype=dtype, kind=InputKind.TANGENT)
    if mask == "causal":
        index = h.call(aten.arange.default, 64, device=torch.device("cuda"))
        seen = h.call(aten.le.Tensor, index, h.call(aten.unsqueeze.default, index, 1))
    bias = None
    if seen is not None:
        zero, hidden = (
            h.call(aten.scalar_tensor.default, x, dtype=dtype, device=torch.device("cuda")) for x in (0.0, -torch.inf)
        )
        bias = h.call(aten.expand.default, h.call(aten.where.self, seen, zero, hidden), [1, 2, 64, 64])
    forward = getattr(aten, f"_scaled_dot_product_{kind}_attention").default
    backward = getattr(aten, f"_scaled_dot_product_{kind}_attention_backward").default
    head = (q, k, v) if kind == "flash" else (q, k, v, bias, True)
    made = h.call(forward, *head, 0.0, causal)
    result = {i: part(h, made, i) for i, value in enumerate(made.meta["val"]) if isinstance(value, torch.Tensor)}
    out, lse = result[0], result[1]
    if kind == "flash":
        rest: tuple[Any, ...] = (out, lse, None, None, 64, 64, 0.0, causal, result[6], result[7])
    elif kind == "efficient":
        rest = (bias, out, lse, result[2], result[3], 0.0, [True, True, True, bias_gradient], causal)
    else:
        rest = (out, lse, result[6], result[7], bias, None, None, 64, 64, 0.0, causal)
    back = h.call(backward, tangent, q, k, v, *rest)
    gradients = [part(h, back, i) for i in range(4 if bias_gradient else 3)]
    return h.done([out, *gradients], forward_outputs=1)


def plan(graph: StepGraph) -> tuple[list[PassRecord], list[Decision]]:
    ctx = PassContext(Config.load({"sparse_attention": LOCAL}))
    records = run_pipeline(graph, parse_pipeline("canonicalise,sparse_attention,merge_ties"), ctx)
    return records, [d for d in ctx.decisions if d.pass_name == "sparse_attention"]


def targets(graph: StepGraph) -> list[str]:
    return [str(n.target) for n in graph.nodes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_both_halves_become_the_block_sparse_operator(kind: str, causal: bool, dtype: torch.dtype) -> None:
    graph = attention(kind, causal=causal, dtype=dtype)
    records, decisions = plan(graph)
    assert [(d.choice, d.facts["causal"], d.facts["padding"]) for d in decisions] == [("sparse", causal, 0)]
    assert not any("scaled_dot_product" in target for target in targets(graph))
    (forward,) = graph.graph.find_nodes(op="call_function", target=SPARSE)
    (backward,) = graph.graph.find_nodes(op="call_function", target=SPARSE_BACKWARD)
    assert [n.name for n in forward.args[:3]] == ["q", "k", "v"]
    assert [n.name for n in backward.args[:4]] == ["tangent", "q", "k", "v"]
    for place, result in ((4, 0), (5, 1)):
        read = backward.args[place]
        while read.target is not operator.getitem:
            read = read.args[0]
        assert read.args == (forward, result)
    assert {n.meta["val"].device.type for n in graph.nodes if n.op == "get_attr"} == {"cuda"}
    assert records[2].verdict == "proved", "later passes are proved against the sparse meaning"
    outputs = [n.meta["val"] for n in graph.output_node.args[0]]
    assert [(v.shape, v.dtype, v.device.type) for v in outputs] == [((1, 2, 64, 8), dtype, "cuda")] * 4


@pytest.mark.parametrize("kind", ["efficient", "cudnn"])
@pytest.mark.parametrize("mask", ["padding", "causal"])
def test_masks_are_understood(kind: str, mask: str) -> None:
    graph = attention(kind, mask=mask)
    _, decisions = plan(graph)
    expected = ("sparse", mask == "causal", int(mask == "padding"))
    assert [(d.choice, d.facts["causal"], d.facts["padding"]) for d in decisions] == [expected]
    assert not any("scaled_dot_product" in target for target in targets(graph))


def test_a_wanted_gradient_of_the_mask_keeps_it_dense() -> None:
    graph = attention("efficient", mask="padding", bias_gradient=True)
    _, (decision,) = plan(graph)
    assert (decision.choice, decision.reason, decision.fallback) == (
        "refused",
        "the gradient of its mask is wanted",
        True,
    )
    assert any("scaled_dot_product_efficient" in target for target in targets(graph))
