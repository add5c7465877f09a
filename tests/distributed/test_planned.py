"""What the ZeRO passes make of a model: counts, volumes, shapes and text, at worlds that no machine here has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx, nn

from dscompile.comm import LAUNCHES, REDUCE_GRAD, REFRESH, START_REFRESH, c10d
from dscompile.errors import VerifyError
from dscompile.graph import Phase, Role, StepGraph, info
from dscompile.shard_layout import ShardLayout
from dscompile.text import print_graph
from dscompile.tools.gpt import GPT, GPTConfig
from dscompile.verify_comm import check_saved
from tests.distributed.planned import Plan, fake_world, launches, markers, moved, plan

GRAPHS = Path(__file__).parent.parent / "graphs"
STARTS = LAUNCHES | {START_REFRESH}
NOTHING_KEPT = {"stage3_param_persistence_threshold": 0}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, equal blocks, head; the head may be tied to the embedding."""

    def __init__(self, width: int = 16, layers: int = 3, vocabulary: int = 32, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(ids)))


def ids() -> torch.Tensor:
    return torch.zeros(2, 4, dtype=torch.long)


def proved(found: Plan) -> bool:
    return found.verdict == "proved" and all(r.verdict == "proved" for r in found.records)


def read_in_backward(model: nn.Module) -> int:
    """Elements of the parameters that backward of ``Net`` reads: weights of products and of norms, no biases."""
    wanted = ("up.weight", "down.weight", "head.weight", "norm.weight", "norm.bias")
    return sum(p.numel() for n, p in model.named_parameters() if n.endswith(wanted))


@pytest.mark.parametrize("world", [2, 4, 64])
def test_stage_3_moves_what_forward_and_backward_read_and_what_is_trained(world: int) -> None:
    with fake_world(world):
        model = Net(width=64, vocabulary=128)
        elements = sum(p.numel() for p in model.parameters())
        again = read_in_backward(model)
        found = plan(model, ids(), pipeline="canonicalise,merge_ties,zero3,bucket", stage=3)
        assert markers(found.joint) == 0
        assert proved(found)
        exact = (world - 1) / world * (elements + again + elements)
        padding = sum(ShardLayout(tuple(p.shape), 0, world).piece_numel * world - p.numel() for p in model.parameters())
        assert exact <= moved(found.joint) <= exact + 3 * padding


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_stages_0_to_2_move_twice_the_parameters(stage: int) -> None:
    with fake_world(4):
        model = Net(width=64, vocabulary=128)
        elements = sum(p.numel() for p in model.parameters())
        found = plan(model, ids(), stage=stage)
        assert proved(found)
        refreshed = sum(
            full.numel() * 3 / 4 for n in found.joint.nodes if n.target is REFRESH for full in n.meta["val"]
        )
        assert moved(found.joint) + refreshed == 2 * 3 / 4 * elements


def test_one_gather_a_block_and_phase_and_one_reduction_a_block() -> None:
    with fake_world(4):
        found = plan(Net(layers=6), ids(), stage=3, **NOTHING_KEPT)
    kinds = [n.target for n in launches(found.joint, Phase.FORWARD)]
    assert set(kinds) == {c10d.all_gather_into_tensor.default}
    assert len(kinds) <= 6 + 2
    backward = [n.target for n in launches(found.joint, Phase.BACKWARD)]
    assert backward.count(c10d.all_to_all_single.default) <= 6 + 2
    assert backward.count(c10d.all_gather_into_tensor.default) <= 6 + 1


def test_other_libraries_reduce_with_their_own_reduce_scatter() -> None:
    with fake_world(4):
        found = plan(Net(), ids(), library="nccl", stage=3, **NOTHING_KEPT)
    assert proved(found)
    reduced = {n.target for n in launches(found.joint, Phase.BACKWARD)} - {c10d.all_gather_into_tensor.default}
    assert reduced == {c10d.reduce_scatter_tensor.default}


def test_caps_are_in_elements() -> None:
    with fake_world(2):
        found = plan(Net(), ids(), stage=3, allgather_bucket_size=600, reduce_bucket_size=600)
    for node in launches(found.joint):
        several = len(node.args[0].args[0]) > 1
        assert not several or node.meta["val"].numel() <= 600 + 2 * 8  # padding of a few small members


def test_a_large_consecutive_tensor_travels_alone() -> None:
    with fake_world(2):
        found = plan(Net(width=16, vocabulary=32768), ids(), stage=3)
    alone = [n for n in launches(found.joint, Phase.FORWARD) if n.meta["val"].numel() >= 500_000]
    assert alone
    assert all(len(n.args[0].args[0]) == 1 for n in alone)


def test_a_tied_parameter_is_gathered_once_a_phase_and_reduced_once() -> None:
    with fake_world(2):
        model = Net(tied=True)
        found = plan(model, ids(), stage=3, **NOTHING_KEPT)
    names = [i.name for i in found.joint.inputs if i.fqn == "embedding.weight"]
    assert len(names) == 1
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        packs = [n.args[0] for n in launches(found.joint, phase) if n.target is c10d.all_gather_into_tensor.default]
        assert sum([s.name for s in pack.args[0]].count(names[0]) for pack in packs) <= 1
    assert not found.joint.graph.find_nodes(op="call_function", target=REDUCE_GRAD)
    reduced = [n for n in launches(found.joint) if n.target is c10d.all_to_all_single.default]
    assert sum(len(n.args[0].args[0]) for n in reduced) == len(list(model.parameters()))
    assert found.verdict == "reassociates"


def test_frozen_parameters_are_gathered_and_never_reduced() -> None:
    with fake_world(2):
        model = Net()
        model.blocks[1].requires_grad_(False)
        found = plan(model, ids(), stage=3, **NOTHING_KEPT)
        trained = sum(p.requires_grad for p in model.parameters())
    assert proved(found)
    reduced = [n for n in launches(found.joint) if n.target is c10d.all_to_all_single.default]
    assert sum(len(n.args[0].args[0]) for n in reduced) == trained


def test_what_is_kept_has_a_reason_and_a_budget() -> None:
    with fake_world(2):
        none = plan(Net(), ids(), stage=3, **NOTHING_KEPT)
    with fake_world(2):
        all_kept = plan(Net(), ids(), stage=3, keep_elements=10**9, **NOTHING_KEPT)
    backward = [n.target for n in launches(all_kept.joint, Phase.BACKWARD)]
    assert c10d.all_gather_into_tensor.default not in backward
    assert moved(all_kept.joint) < moved(none.joint)
    decisions = [d for r in none.records for d in r.decisions if d.pass_name == "selective_unshard"]
    assert {d.choice for d in decisions} == {"kept", "gathered again"}
    assert all(d.reason for d in decisions)


def test_gathered_values_saved_without_a_reason_are_an_error() -> None:
    with fake_world(2):
        found = plan(Net(), ids(), stage=3, keep_elements=10**9, **NOTHING_KEPT)
    forward = next(iter(found.halves.values()))
    from dscompile.graph import annotate

    saved = [o.of for o in forward.outputs if o.kind == "saved"]
    check_saved(forward, saved)  # each has its reason
    for node in forward.nodes:
        if node.op == "call_function":
            annotate(node, why="")
    with pytest.raises(VerifyError, match="saved_gathered"):
        check_saved(forward, saved)


def test_prefetch_launches_earlier_and_waits_later() -> None:
    with fake_world(2):
        plain = plan(Net(layers=5), ids(), stage=3, overlap_comm=False, **NOTHING_KEPT)
    with fake_world(2):
        ahead = plan(Net(layers=5), ids(), stage=3, **NOTHING_KEPT)
    assert _distance(ahead) > _distance(plain)
    assert len(launches(plain.joint)) == len(launches(ahead.joint))
    assert moved(plain.joint) == moved(ahead.joint)


def _distance(found: Plan) -> int:
    """Compute nodes between launches and their waits, summed."""
    order = {n: i for i, n in enumerate(found.joint.nodes)}
    return sum(order[next(iter(n.users))] - order[n] for n in launches(found.joint))


def test_no_rank_is_empty_for_large_weights_at_1024_ranks() -> None:
    for rank in (0, 511, 1023):
        with fake_world(1024, rank):
            model = nn.Sequential(nn.Linear(2048, 1024, bias=False), nn.Linear(1024, 4096, bias=False))
            found = plan(model, torch.zeros(2, 2048), stage=3, **NOTHING_KEPT)
            assert proved(found)
            shapes = [tuple(p.to_local().shape) for p in model.parameters()]
            assert shapes == [(1, 2048), (4, 1024)]
            assert len(launches(found.joint, Phase.FORWARD)) == 2


@pytest.mark.parametrize("stage", [1, 3])
def test_a_tiny_models_planned_graph(stage: int, request: pytest.FixtureRequest) -> None:
    with fake_world(4):
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))
        found = plan(model, torch.zeros(2, 8), stage=stage, **NOTHING_KEPT)
    text = print_graph(found.joint)
    path = GRAPHS / f"zero{stage}.planned.txt"
    if not path.exists():
        path.write_text(text)
        pytest.fail(f"{path} was written; read it and commit it")
    assert text == path.read_text()


@pytest.mark.slow
def test_every_pass_is_proved_at_80_layers() -> None:
    with fake_world(8):
        found = plan(Net(width=8, layers=80), ids(), stage=3, **NOTHING_KEPT)
    assert [r.verdict for r in found.records] == ["proved"] * len(found.records)
    assert found.verdict == "proved"


@pytest.mark.parametrize("stage", [1, 2])
def test_resident_parameters_are_refreshed_while_blocks_compute(stage: int) -> None:
    """Each bucket but the first is in flight while the blocks that read the one before it compute."""
    cap = 4 * 1024
    with fake_world(2):
        found = plan(Net(layers=6), ids(), stage=stage, allgather_bucket_size=cap)
    assert proved(found)
    starts = found.joint.graph.find_nodes(op="call_function", target=START_REFRESH, sort=True)
    assert len(starts) > 2
    assert all(s.meta["val"].numel() <= cap + 64 for s in starts)
    assert between(found.joint, starts[0]) == 0
    assert all(between(found.joint, start) > 5 for start in starts[1:])
    text = print_graph(found.joint)
    assert text.count("dscompile.start_refresh.default(") == len(starts)


def between(graph: StepGraph, launch: fx.Node) -> int:
    """Compute nodes between a launch and its wait."""
    (wait,) = launch.users
    count, node = 0, launch.next
    while node is not wait:
        count += info(node).role is Role.COMPUTE
        node = node.next
    return count


def test_every_collective_overlaps_what_dependencies_allow() -> None:
    """A7 d on a 4-layer GPT: only what opens a phase, and what closes backward, has nothing to run beside it."""
    size = GPTConfig(vocab=32, layers=4, width=16, heads=2, context=8)
    tokens = torch.zeros(2, 8, dtype=torch.long)
    for stage in (2, 3):
        with fake_world(2):
            found = plan(GPT(size), tokens, stage=stage, allgather_bucket_size=4096, **NOTHING_KEPT)
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            pairs = [n for n in found.joint.nodes if n.target in STARTS and info(n).phase is phase]
            idle = [n for n in pairs if not between(found.joint, n)]
            compute = [n for n in found.joint.nodes if info(n).phase is phase and info(n).role is Role.COMPUTE]
            order = {n: i for i, n in enumerate(found.joint.nodes)}
            for node in idle:  # its wait comes before any compute of the phase, or its launch after all of it
                (wait,) = node.users
                early = order[wait] < order[compute[len(compute) // (2 * size.layers)]]
                late = order[node] > order[compute[-1]]
                assert early or late, f"stage {stage}: {node.format_node()}"
            assert len(pairs) - len(idle) >= size.layers - 1
