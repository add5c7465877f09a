"""Planted faults around the started refresh of stages 1 and 2: each is caught by the proof or by a named rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from dscompile.comm import REFRESH, START_REFRESH
from dscompile.equivalence import Verdict, prove
from dscompile.graph import StepGraph
from dscompile.verify import baseline, verify
from tests.distributed.planned import Plan, fake_world, plan
from tests.distributed.test_comm_faults import Net, set_argument


def planned() -> Plan:
    with fake_world(4):
        return plan(Net(), torch.zeros(2, 8), stage=1, allgather_bucket_size=72)


def pairs(graph: StepGraph) -> tuple[list[fx.Node], list[fx.Node]]:
    find = graph.graph.find_nodes
    return (
        find(op="call_function", target=START_REFRESH, sort=True),
        find(op="call_function", target=REFRESH, sort=True),
    )


def of_another_bucket(graph: StepGraph) -> None:
    starts, refreshes = pairs(graph)
    set_argument(refreshes[1], 4, starts[0])


def wrong_shards(graph: StepGraph) -> None:
    starts, _ = pairs(graph)
    set_argument(starts[0], 0, list(starts[1].args[0]))


def wrong_group(graph: StepGraph) -> None:
    set_argument(pairs(graph)[0][0], 3, "other")


def wrong_layout(graph: StepGraph) -> None:
    start = pairs(graph)[0][0]
    set_argument(start, 1, [1 - start.args[1][0], *start.args[1][1:]])


@pytest.mark.parametrize(
    "fault", [of_another_bucket, wrong_shards, wrong_group, wrong_layout], ids=lambda f: f.__name__
)
def test_the_proof_catches(fault: Callable[[StepGraph], None]) -> None:
    found = planned()
    assert len(pairs(found.joint)[0]) == 2
    assert prove(found.reference, found.joint).verdict is Verdict.PROVED
    fault(found.joint)
    assert prove(found.reference, found.joint).verdict is not Verdict.PROVED


def never_awaited(graph: StepGraph) -> None:
    set_argument(pairs(graph)[1][0], 4, None)


def read_early(graph: StepGraph) -> None:
    start = pairs(graph)[0][0]
    with graph.graph.inserting_after(start):
        read = graph.graph.call_function(torch.ops.aten.neg.default, (start,))
    read.meta = dict(start.meta)


@pytest.mark.parametrize("fault", [never_awaited, of_another_bucket, read_early], ids=lambda f: f.__name__)
def test_the_rule_of_waits_catches(fault: Callable[[StepGraph], None]) -> None:
    found = planned()
    base = baseline(found.joint)
    fault(found.joint)
    assert "waits" in {violation.rule for violation in verify(found.joint, base, "planted")}
