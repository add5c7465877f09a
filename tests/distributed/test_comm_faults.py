"""Planted faults in planned graphs: each is caught by a named check."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from dscompile.comm import WAIT, c10d, ours
from dscompile.equivalence import Verdict, prove
from dscompile.errors import VerifyError
from dscompile.graph import StepGraph
from dscompile.sharding import Sharding
from dscompile.verify import baseline, verify
from dscompile.verify_comm import listing
from tests.distributed.planned import Plan, fake_world, launches, plan

Fault = Callable[[StepGraph], None]


class Net(nn.Module):
    """Two equal linear layers, so that parameters can be taken for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def planned() -> Callable[..., Plan]:
    def make(library: str = "gloo", **zero: int) -> Plan:
        zero.setdefault("stage3_param_persistence_threshold", 0)
        with fake_world(4):
            return plan(Net(), torch.zeros(2, 8), library=library, stage=3, **zero)

    return make


def first(graph: StepGraph, target: object) -> fx.Node:
    return graph.graph.find_nodes(op="call_function", target=target, sort=True)[0]


def set_argument(node: fx.Node, index: int, value: object) -> None:
    args = list(node.args)
    args[index] = value
    node.args = tuple(args)


def swap_order_in_bucket(graph: StepGraph) -> None:
    pack = first(graph, ours.pack_shards.default)
    shards = list(pack.args[0])
    twins = [i for i, s in enumerate(shards) if s.meta["val"].shape == shards[0].meta["val"].shape]
    shards[twins[0]], shards[twins[1]] = shards[twins[1]], shards[twins[0]]
    set_argument(pack, 0, shards)


def wrong_parameter(graph: StepGraph) -> None:
    pack = first(graph, ours.pack_shards.default)
    shards = list(pack.args[0])
    shards[0] = next(s for s in shards[1:] if s.meta["val"].shape == shards[0].meta["val"].shape)
    set_argument(pack, 0, shards)


def wrong_layout(graph: StepGraph) -> None:
    unpack = first(graph, ours.unpack_params.default)
    layouts = list(unpack.args[1])
    layouts[0] = 1 - layouts[0] if layouts[1] == 2 else layouts[0]
    layouts[-1] += 0
    set_argument(unpack, 1, [*layouts[:-1], layouts[-1] + 4])


def wrong_world(graph: StepGraph) -> None:
    set_argument(first(graph, c10d.all_gather_into_tensor.default), 1, 2)


def wrong_gather_group(graph: StepGraph) -> None:
    set_argument(first(graph, c10d.all_gather_into_tensor.default), 2, "tp")


def wrong_reduce_group(graph: StepGraph) -> None:
    set_argument(first(graph, c10d.all_to_all_single.default), 3, "tp")


def wrong_sizes(graph: StepGraph) -> None:
    node = first(graph, c10d.all_to_all_single.default)
    sizes = list(node.args[1])
    set_argument(node, 1, [sizes[0] + 1, sizes[1] - 1, *sizes[2:]])


def gradients_swapped(graph: StepGraph) -> None:
    unpack = first(graph, ours.unpack_shards.default)
    takes = [u for u in unpack.users if u.target is operator.getitem]
    one = takes[0]
    other = next(t for t in takes[1:] if t.meta["val"].shape == one.meta["val"].shape)
    one.args, other.args = other.args, one.args


def wrong_rank(graph: StepGraph) -> None:
    set_argument(first(graph, ours.sum_ranks.default), 1, 2)


def wait_removed(graph: StepGraph) -> None:
    wait = first(graph, WAIT)
    wait.replace_all_uses_with(wait.args[0])
    graph.graph.erase_node(wait)


def reduced_twice(graph: StepGraph) -> None:
    total = first(graph, ours.sum_ranks.default)
    with graph.graph.inserting_after(total):
        again = graph.graph.call_function(torch.ops.aten.mul.Tensor, (total, 0.25))
    again.meta = dict(total.meta)
    total.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def reduction_missing(graph: StepGraph) -> None:
    """Rank 0's own part of its own gradients, as if there were no other rank."""
    total = first(graph, ours.sum_ranks.default)
    pack = first(graph, ours.pack_grads.default)
    with graph.graph.inserting_before(total):
        part = graph.graph.call_function(torch.ops.aten.slice.Tensor, (pack, 0, 0, total.meta["val"].numel()))
    part.meta = dict(total.meta)
    total.replace_all_uses_with(part)


FAULTS = [
    swap_order_in_bucket,
    wrong_parameter,
    wrong_layout,
    wrong_world,
    wrong_gather_group,
    wrong_reduce_group,
    wrong_sizes,
    gradients_swapped,
    wrong_rank,
    wait_removed,
    reduced_twice,
    reduction_missing,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_proof_catches(fault: Fault, planned: Callable[..., Plan]) -> None:
    found = planned()
    assert found.reference is not None
    assert prove(found.reference, found.joint).verdict is Verdict.PROVED
    fault(found.joint)
    proof = prove(found.reference, found.joint)
    assert proof.verdict is not Verdict.PROVED
    assert "equivalence: pass 'planted'" in proof.explain("planted")


def test_a_sum_where_the_mean_was_meant(planned: Callable[..., Plan]) -> None:
    found = planned("nccl")
    set_argument(first(found.joint, c10d.reduce_scatter_tensor.default), 1, "sum")
    assert prove(found.reference, found.joint).verdict is not Verdict.PROVED


def broken_rules(graph: StepGraph, fault: Fault) -> set[str]:
    base = baseline(graph)
    fault(graph)
    return {violation.rule for violation in verify(graph, base, "planted")}


def awaited_twice(graph: StepGraph) -> None:
    wait = first(graph, WAIT)
    with graph.graph.inserting_after(wait):
        again = graph.graph.call_function(WAIT, wait.args)
    again.meta = dict(wait.meta)
    next(iter(wait.users)).replace_input_with(wait, again)


def write_in_flight(graph: StepGraph) -> None:
    launch = first(graph, c10d.all_gather_into_tensor.default)
    flat = launch.args[0]
    with graph.graph.inserting_after(launch):
        write = graph.graph.call_function(torch.ops.aten.copy_.default, (flat, flat))
    write.meta = dict(flat.meta)


def item_recorded_as_another(graph: StepGraph) -> None:
    one, *others = [u for u in first(graph, ours.unpack_params.default).users if u.target is operator.getitem]
    one.meta["val"] = next(o.meta["val"] for o in others if o.meta["val"].shape != one.meta["val"].shape)


def item_beyond_the_bucket(graph: StepGraph) -> None:
    set_argument(next(iter(first(graph, ours.unpack_shards.default).users)), 1, 99)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (awaited_twice, "waits"),
        (wait_removed, "waits"),
        (write_in_flight, "in_flight"),
        (item_recorded_as_another, "metadata"),
        (item_beyond_the_bucket, "metadata"),
    ],
)
def test_the_verifier_catches(fault: Fault, rule: str, planned: Callable[..., Plan]) -> None:
    assert rule in broken_rules(planned().joint, fault)


def test_a_wrong_placement_table_is_named(planned: Callable[..., Plan]) -> None:
    with fake_world(4):
        traced = plan(Net(), torch.zeros(2, 8), pipeline="canonicalise,zero3", stage=3)
    specs = dict(traced.sharding.specs)
    name = "second.weight"
    specs[name] = replace(specs[name], dim=1)
    with pytest.raises(VerifyError, match=r"placement.*second\.weight"):
        Sharding(specs).check(traced.joint)


def test_ranks_that_order_collectives_differently_have_different_listings(planned: Callable[..., Plan]) -> None:
    mine, theirs = (planned(allgather_bucket_size=10).joint for _ in range(2))
    assert listing(mine) == listing(theirs)
    one, other = [n for n in launches(theirs) if n.target is c10d.all_gather_into_tensor.default][:2]
    chain = [other.args[0], other]
    for node in chain:
        one.args[0].prepend(node)
    assert listing(mine) != listing(theirs)
