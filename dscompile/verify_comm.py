"""Rules about communication: waits, buffers in flight, the order of collectives, and what may be saved for backward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from dscompile.comm import LAUNCHES, REDUCE_GRAD, REFRESH, START_REFRESH, UNSHARD, WAIT, comm_role
from dscompile.effects import execution_order, written
from dscompile.errors import VerifyError
from dscompile.graph import StepGraph, info
from dscompile.shard_layout import REPLICATED, stays_local
from dscompile.source import describe
from dscompile.torch_compat import tensor_bytes
from dscompile.verify import Check


def waits(check: Check) -> None:
    """Every collective is awaited exactly once, and nothing else reads what it delivers."""
    for node in check.graph.nodes:
        if node.op != "call_function" or node.target not in _STARTS:
            continue
        waiting = REFRESH if node.target is START_REFRESH else WAIT
        awaited = [user for user in node.users if user.target is waiting]
        early = [user for user in node.users if user.target is not waiting]
        if early:
            check.report("waits", f"%{early[0].name} reads %{node.name}, which was not awaited.", node, early[0])
        if len(awaited) != 1:
            check.report("waits", f"%{node.name} is awaited {len(awaited)} times, must be once.", node, *awaited)


def in_flight(check: Check) -> None:
    """Nothing writes to a buffer that a collective is still reading or filling."""
    if not any(map(written, check.facts.effects)):
        return
    forward, backward = execution_order(check.graph)
    root = check.facts.storages.root
    busy: dict[object, fx.Node] = {}
    for node in [*forward, *backward]:
        if node.op == "call_function" and node.target in _STARTS:
            busy[root(node)] = node
            busy.update({root(operand): node for operand in node.all_input_nodes})
        elif node.target in (WAIT, REFRESH):
            done = node.all_input_nodes
            busy = {where: launch for where, launch in busy.items() if launch not in done}
        for operand in written(node):
            launch = busy.get(root(operand))
            if launch is not None:
                text = f"%{node.name} writes to %{operand.name} while %{launch.name} is in flight."
                check.report("in_flight", text, node, launch)


def check_saved(forward: StepGraph, saved: Iterable[str]) -> None:
    """No gathered parameter, nor anything derived only from gathered ones, crosses to backward without a reason.

    Raises:
        VerifyError: rule ``saved_gathered``, naming the value, its module, and its bytes.
    """
    names = set(saved)
    gathered: set[fx.Node] = set()
    for node in forward.nodes:
        if node.op != "call_function":
            continue
        if comm_role(node) is not None:
            if node.target is UNSHARD and (node.args[3] == REPLICATED or node.args[5] == 1):
                continue  # nothing is gathered
            if node.target not in (REFRESH, START_REFRESH) and all(
                o.target is not REFRESH for o in node.all_input_nodes
            ):
                gathered.add(node)
        elif node.all_input_nodes and all(operand in gathered for operand in node.all_input_nodes):
            gathered.add(node)
        if node in gathered and node.name in names and not info(node).why:
            size = tensor_bytes(node.meta.get("val"))
            raise VerifyError(
                f"rule saved_gathered: %{node.name} ({size} bytes) holds gathered parameters only and is saved for "
                f"backward without a reason; stage 3 gathers again.\n  {describe(node)}"
            )


def listing(graph: StepGraph) -> list[str]:
    """The collectives of a program in execution order, as text that is equal on every rank: operator, group, elements
    of the whole payload, and the module or parameter it is for.
    """
    forward, backward = execution_order(graph)
    lines = []
    for node in [*forward, *backward]:
        if node.op != "call_function" or (node.target not in _STARTS and node.target not in _MARKERS):
            continue
        if node.target is REFRESH and (_waits(node) or stays_local(node.args[1], node.args[2])):  # type: ignore[arg-type]
            continue  # waits for what was started, or sends nothing
        group = next(a for a in reversed(node.args) if isinstance(a, str))  # dtypes may follow it
        whole = node.args[0] if node.target is REDUCE_GRAD else node
        value = whole.meta["val"]  # type: ignore[union-attr]
        elements = sum(v.numel() for v in value) if isinstance(value, (list, tuple)) else _whole(node)
        name = str(node.target).removeprefix("_c10d_functional.").removesuffix(".default")
        lines.append(f"{name} {group} {elements} {info(node).fqn}")
    return lines


def _waits(refresh: fx.Node) -> bool:
    return len(refresh.args) > 4 and refresh.args[4] is not None


_MARKERS = frozenset({REFRESH, REDUCE_GRAD, UNSHARD})
_STARTS = LAUNCHES | {START_REFRESH}


def _whole(node: fx.Node) -> int:
    """Elements of a collective's payload over all ranks: the larger of what goes in and what comes out."""
    if node.target is START_REFRESH:
        return int(node.meta["val"].numel())
    sizes = [node.meta["val"].numel(), node.args[0].meta["val"].numel()]  # type: ignore[union-attr]
    return int(max(sizes))
