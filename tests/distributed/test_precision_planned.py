"""Planned graphs that compute in 16 bits: proved, with half the bytes on the wire, and cast where nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from dscompile.comm import LAUNCHES, REFRESH, START_REFRESH, ours
from dscompile.equivalence import Verdict, prove
from dscompile.errors import VerifyError
from dscompile.graph import StepGraph
from dscompile.manager import Numerics
from dscompile.sharding import Sharding
from tests.distributed.planned import Plan, fake_world, launches, markers, plan


class Net(nn.Module):
    """Blocks of layers, an embedding, a scalar, a frozen and a tied parameter."""

    def __init__(self, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(ids)) * self.scale + self.frozen)


def ids() -> torch.Tensor:
    return torch.zeros(2, 4, dtype=torch.long)


def sent(graph: StepGraph) -> tuple[float, set[torch.dtype]]:
    """(bytes that one rank of a step transmits, dtypes on the wire), refreshes of resident copies included."""
    total, dtypes = 0.0, set()
    for node in graph.nodes:
        if node.target in LAUNCHES:
            value, operand = node.meta["val"], node.args[0].meta["val"]
            elements, world = max(value.numel(), operand.numel()), 4
            total += elements * value.element_size() * (world - 1) / world
            dtypes.add(value.dtype)
        elif node.target is START_REFRESH:
            value = node.meta["val"]
            total += value.numel() * value.element_size() * 3 / 4
            dtypes.add(value.dtype)
    return total, dtypes


def planned(stage: int, name: str, library: str = "gloo", reduce: str | None = None, **options: Any) -> Plan:
    with fake_world(4):
        precision = {"param_dtype": name, "reduce_dtype": reduce}
        return plan(Net(), ids(), library=library, precision=precision, stage=stage, **options)


def assert_proved(found: Plan) -> None:
    """Every pass is proved but the one that says it reassociates (a tied parameter's gradients are added first)."""
    verdicts = {r.call.split("(")[0]: r.verdict for r in found.records}
    reassociates = {"merge_ties"}
    assert {n for n, v in verdicts.items() if v != Verdict.PROVED.value} <= reassociates
    assert found.verdict in (Verdict.PROVED.value, Numerics.REASSOCIATES.value)


@pytest.mark.parametrize("library", ["gloo", "nccl"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_half_the_bytes_are_sent(stage: int, library: str) -> None:
    found, plain = planned(stage, "bf16", library), planned(stage, "fp32", library)
    assert_proved(found)
    assert markers(found.joint) == markers(plain.joint) if stage == 3 else markers(found.joint) == 0
    (bytes16, dtypes), (bytes32, plain_dtypes) = sent(found.joint), sent(plain.joint)
    assert dtypes == {torch.bfloat16}
    assert plain_dtypes == {torch.float32}
    assert bytes16 == bytes32 / 2
    assert len(launches(found.joint)) == len(launches(plain.joint))


@pytest.mark.parametrize("stage", [0, 3])
def test_gradients_may_travel_in_another_type(stage: int) -> None:
    found = planned(stage, "bf16", reduce="fp32")
    assert_proved(found)
    reduced = {n.meta["val"].dtype for n in found.joint.nodes if n.target is ours.pack_grads.default}
    assert reduced == {torch.float32}
    found = planned(stage, "fp32", reduce="bf16")
    assert_proved(found)
    assert {n.meta["val"].dtype for n in found.joint.nodes if n.target is ours.pack_grads.default} == {torch.bfloat16}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gradients_arrive_in_the_masters_type(stage: int) -> None:
    found = planned(stage, "bf16")
    values = [v.meta["val"] for v in found.joint.output_values()[found.joint.forward_outputs :] if v is not None]
    assert values
    assert {v.dtype for v in values if isinstance(v, torch.Tensor)} == {torch.float32}


def test_casts_happen_while_packing() -> None:
    """No pass leaves a cast of a master or of a gradient in the graph: the buffers are filled and emptied with it."""
    found = planned(3, "bf16", stage3_param_persistence_threshold=0)
    for node in found.joint.nodes:
        if node.target is ours.pack_shards.default:
            assert all(operand.op == "placeholder" for operand in node.all_input_nodes)
            assert node.meta["val"].dtype is torch.bfloat16
    casts = found.joint.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)
    assert not [n for n in casts if any(_is_parameter(o) for o in n.all_input_nodes)]


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["val"].dtype is torch.float32


# -- planted faults ----------------------------------------------------------------------------------------------------


def retyped(target: object, index: int, dtype: torch.dtype | None) -> Callable[[StepGraph], None]:
    """Give the first call of an operator another dtype as its argument ``index``."""

    def fault(graph: StepGraph) -> None:
        node = graph.graph.find_nodes(op="call_function", target=target, sort=True)[0]
        assert node.args[index] in (torch.bfloat16, torch.float32)
        node.args = (*node.args[:index], dtype, *node.args[index + 1 :])

    return fault


FAULTS = {
    "gathered in fp16": (3, retyped(ours.pack_shards.default, 3, torch.float16)),
    "gathered in fp32": (3, retyped(ours.pack_shards.default, 3, None)),
    "reduced in fp32": (3, retyped(ours.pack_grads.default, 3, torch.float32)),
    "reduced in fp16": (2, retyped(ours.pack_grads.default, 3, torch.float16)),
    "gradients left in bf16": (3, retyped(ours.unpack_shards.default, 4, None)),
    "whole gradients left in bf16": (0, retyped(ours.unpack_params.default, 3, None)),
    "copies gathered in fp16": (1, retyped(START_REFRESH, 4, torch.float16)),
    "copies in fp16": (1, retyped(REFRESH, 5, torch.float16)),
    "copies of replicated parameters in fp16": (0, retyped(REFRESH, 5, torch.float16)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_proof_catches(name: str) -> None:
    stage, fault = FAULTS[name]
    found = planned(stage, "bf16")
    assert found.reference is not None
    assert prove(found.reference, found.joint).verdict is Verdict.PROVED
    fault(found.joint)
    assert prove(found.reference, found.joint).verdict is not Verdict.PROVED


def test_a_wrong_dtype_in_the_placement_table_is_named() -> None:
    with fake_world(4):
        traced = plan(Net(), ids(), pipeline="canonicalise,zero3", precision={"param_dtype": "bf16"}, stage=3)
    specs = dict(traced.sharding.specs)
    name = "blocks.1.0.weight"
    specs[name] = replace(specs[name], wire=torch.float32)
    with pytest.raises(VerifyError, match=r"placement.*blocks\.1\.0\.weight"):
        Sharding(specs).check(traced.joint)
