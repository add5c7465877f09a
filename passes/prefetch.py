"""Prefetch: launch gathers before the block that needs them, wait for reductions after the block that made them.

A collective that is launched and awaited on the spot leaves the processor idle. Here every gather is launched a number
of blocks early, while earlier blocks compute, as long as the elements gathered ahead fit; and every reduction is
awaited one block late. The order of launches never changes, so it stays the same on every rank.
"""

from __future__ import annotations

import itertools

from torch import fx

from dscompile.comm import LAUNCHES, START_REFRESH, WAIT, c10d, ours
from dscompile.graph import Phase, StepGraph, info
from dscompile.manager import PassContext, graph_pass
from dscompile.passes.markers import Sections


@graph_pass("prefetch", after={"bucket"}, requires={"collectives"}, provides={"prefetched"}, optional=True)
def prefetch(graph: StepGraph, ctx: PassContext, *, window: int = 1, elements: int = 50_000_000) -> None:
    """Launch early, wait late.

    Args:
        graph: after ``bucket``.
        ctx: where the reasons go.
        window: how many blocks early a gather starts.
        elements: most elements gathered ahead of their use (DeepSpeed's ``stage3_prefetch_bucket_size``); 0: off.
    """
    if window < 1 or elements < 1:
        return
    forward, backward = Sections(graph, Phase.FORWARD), Sections(graph, Phase.BACKWARD)
    for sections, phase in ((forward, Phase.FORWARD), (backward, Phase.BACKWARD)):
        if sections.spans:
            _launch_early(graph, ctx, sections, phase, window, elements)
    _refresh_early(graph, ctx, elements)
    if backward.spans:  # blocks are of compute nodes, and only communication was moved
        _wait_late(graph, ctx, backward)


def _launch_early(
    graph: StepGraph, ctx: PassContext, sections: Sections, phase: Phase, window: int, elements: int
) -> None:
    for launch in graph.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor.default, sort=True):
        pack = launch.args[0]
        if info(launch).phase is not phase or pack.target is not ours.pack_shards.default:
            continue
        block = _block_after(sections, launch)
        size = launch.meta["val"].numel()
        if block is None or block == 0:
            ctx.decide(launch, "not prefetched", "nothing of this phase runs before it")
            continue
        if size > elements:
            ctx.decide(launch, "not prefetched", f"{size} elements are more than the {elements} allowed ahead")
            continue
        target = sections.start(max(0, block - window))
        if not all(operand.op == "placeholder" for operand in pack.all_input_nodes):
            ctx.decide(launch, "not prefetched", "its shards are computed in the graph")
            continue
        if not graph.edit("launch early", launch, why=f"{min(window, block)} blocks ahead"):
            return
        target.prepend(pack)
        target.prepend(launch)
        graph.touched.update((pack, launch))
        ctx.decide(launch, "prefetched", f"launched {min(window, block)} blocks before its use", elements=size)


def _refresh_early(graph: StepGraph, ctx: PassContext, elements: int) -> None:
    """Start each refresh of resident parameters before the one ahead of it is awaited: two are in flight at a time."""
    starts = graph.graph.find_nodes(op="call_function", target=START_REFRESH, sort=True)
    if starts:
        ctx.decide(starts[0], "not prefetched", "nothing runs before it")
    for ahead, start in itertools.pairwise(starts):
        size = start.meta["val"].numel()
        if size > elements:
            ctx.decide(start, "not prefetched", f"{size} elements are more than the {elements} allowed ahead")
            continue
        if not all(operand.op == "placeholder" for operand in start.all_input_nodes):
            ctx.decide(start, "not prefetched", "its shards are computed in the graph")
            continue
        if not graph.edit("start early", start, why="before the refresh ahead of it is awaited"):
            return
        (awaited,) = ahead.users
        awaited.prepend(start)
        graph.touched.add(start)
        ctx.decide(start, "prefetched", "while the blocks of the refresh ahead of it compute", elements=size)


def _block_after(sections: Sections, node: fx.Node) -> int | None:
    """The number of the block whose first node comes next after ``node``."""
    current = node.next
    while current.op != "root":
        number = sections.of(current)
        if number is not None:
            return number
        current = current.next
    return None


def _wait_late(graph: StepGraph, ctx: PassContext, sections: Sections) -> None:
    """Move the wait of each reduction, and what unpacks it, behind the next block."""
    for wait in graph.graph.find_nodes(op="call_function", target=WAIT, sort=True):
        launch = wait.args[0]
        if launch.target not in LAUNCHES or launch.args[0].target is not ours.pack_grads.default:
            continue
        block = _block_after(sections, wait)
        if block is None:
            continue  # the last reduction: nothing is left to overlap with
        chain = _chain(wait)
        if any(user is not graph.output_node and user not in chain for node in chain for user in node.users):
            continue
        if not graph.edit("wait late", wait, why="while the next block computes"):
            return
        target = sections.after(block, graph)
        for node in chain:
            target.prepend(node)
        graph.touched.update(chain)
        ctx.decide(wait, "awaited late", "the next block of backward computes meanwhile")


def _chain(wait: fx.Node) -> list[fx.Node]:
    """The wait and everything that unpacks its result, in order."""
    members = {wait}
    chain = [wait]
    current = wait.next
    while current.op == "call_function" and any(operand in members for operand in current.all_input_nodes):
        members.add(current)
        chain.append(current)
        current = current.next
    return chain
