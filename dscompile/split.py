"""The explicit split: a planned joint graph becomes a forward and a backward graph, and what is saved is said.

Backward needs some forward values. Each is saved, except that a view is never saved: its base is, and the view is
taken again in backward, where it costs nothing and lets equal layers look equal. User checkpointing
(``torch.utils.checkpoint``) and opaque values are handed to PyTorch's own default partitioner, which knows their
rules; the result says so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from dscompile.effects import Storages, shared_operand, written
from dscompile.graph import GraphInput, GraphKind, GraphOutput, InputKind, Phase, Role, StepGraph, annotate, info
from dscompile.torch_compat import default_partition, extract_forward_backward, is_opaque


@dataclass(frozen=True)
class Split:
    """The two halves, the names of the values saved between them, and who chose what to save."""

    forward: StepGraph
    backward: StepGraph
    saved: tuple[str, ...]
    chosen_by: str


def split(graph: StepGraph, *, static_inputs: Sequence[int] = ()) -> Split:
    """Split a joint graph into forward and backward. The joint graph is not changed.

    Args:
        graph: a joint graph after its passes; every node's phase is annotated.
        static_inputs: indices of inputs whose memory stays in place from step to step (parameters).
    """
    assert graph.kind is GraphKind.JOINT
    reason = _needs_torch_partitioner(graph)
    if reason:
        _save_reads_of_mutated(graph)
        forward, backward = default_partition(
            graph.module,
            [],
            num_fwd_outputs=graph.forward_outputs,
            static_lifetime_input_indices=list(static_inputs),
        )
    else:
        values, symbols = saved_for_backward(graph)
        forward, backward = extract_forward_backward(
            graph.module, values, symbols, graph.forward_outputs, [graph.placeholders()[i] for i in static_inputs]
        )
        _erase_unused(forward, Phase.BACKWARD)
        _erase_unused(backward, Phase.FORWARD)
    for half in (forward, backward):
        for node in half.graph.find_nodes(op="placeholder"):
            node.meta = dict(node.meta)  # extraction hands over the joint node's own dictionary
    fw, bw = _as_forward(graph, forward), _as_backward(graph, backward)
    _sink_independent(bw)
    saved = tuple(i.name for i in bw.inputs if i.kind not in (InputKind.TANGENT, InputKind.TOKEN))
    return Split(fw, bw, saved, reason or "save all")


def borrowed(forward: StepGraph, saved: Iterable[str]) -> frozenset[str]:
    """The saved values that live in memory of forward's inputs: backward must not overwrite them.

    AOTAutograd tells aliases by fake storages, so it takes a resident parameter, which ``refresh`` returns, for a value
    that only backward holds.
    """
    names, storages = set(saved), Storages(forward)
    inputs = {storages.root(p) for p in forward.placeholders()}
    return frozenset(n.name for n in forward.nodes if n.name in names and storages.root(n) in inputs)


def _erase_unused(module: fx.GraphModule, phase: Phase) -> None:
    """Erase the other half's nodes that nothing reads.

    Extraction copies every node whose inputs a half has, and dead-code removal keeps draws and asserts: a forward draw
    from a saved tensor would be drawn a second time in backward.
    """
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and not node.users and info(node).phase is phase:
            module.graph.erase_node(node)
    module.recompile()


def _needs_torch_partitioner(graph: StepGraph) -> str:
    for node in graph.nodes:
        if "recompute" in node.meta:
            return "torch default partitioner (user checkpointing)"
        if is_opaque(node) and (node.op != "placeholder" or any(user.op != "output" for user in node.users)):
            return "torch default partitioner (opaque values)"
    return ""


def _save_reads_of_mutated(graph: StepGraph) -> None:
    """Save what checkpointed code computes from inputs that are overwritten after forward (BatchNorm's statistics).

    Computing it again in backward would read the new contents; autograd's version check forbids it.
    """
    storages = Storages(graph)
    descriptors = graph.output_node.meta.get("desc") or []
    overwritten = [d.mutated_input for d in descriptors if hasattr(d, "mutated_input")]
    mutated = {storages.root(p) for p in graph.placeholders() if p.meta.get("desc") in overwritten}
    for node in graph.nodes:
        if "recompute" in node.meta and any(storages.root(operand) in mutated for operand in node.all_input_nodes):
            for kept in (node, *(u for u in node.users if u.target is operator.getitem)):
                kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def saved_for_backward(graph: StepGraph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The forward values (tensors, then symbols) that backward reads, each in program order.

    A view is replaced by the value whose storage it shows, so that one storage is saved once.
    """
    wanted: set[fx.Node] = set()
    outputs = graph.output_values()
    late = [n for n in graph.nodes if info(n).phase is Phase.BACKWARD and n.op != "output"]
    reads = [operand for node in late for operand in node.all_input_nodes]
    reads += [v for v in outputs[graph.forward_outputs :] if isinstance(v, fx.Node)]
    for operand in reads:
        if info(operand).phase is Phase.FORWARD:
            wanted.update(_roots(operand))
    ordered = [n for n in graph.nodes if n in wanted and n.op != "get_attr"]
    symbols = [n for n in ordered if info(n).role is Role.SYMBOL or _is_symbol_input(graph, n)]
    known = set(symbols)
    return [n for n in ordered if n not in known], symbols


def _is_symbol_input(graph: StepGraph, node: fx.Node) -> bool:
    source = graph.input_of(node)
    return source is not None and source.kind is InputKind.SYMBOL


def _roots(node: fx.Node) -> list[fx.Node]:
    """The base of a chain of views and the symbols the chain uses, or the node itself."""
    found: list[fx.Node] = []
    while (base := shared_operand(node)) is not None:
        others = [o for o in node.all_input_nodes if o is not base and not _is_list_of_views(o)]
        if any(info(o).role is not Role.SYMBOL and o.op != "placeholder" for o in others):
            break
        found += others
        node = base
    return [*found, node]


def _is_list_of_views(node: fx.Node) -> bool:
    """Whether a node is ``split`` or the like, whose results are taken by getitem."""
    return isinstance(node.meta.get("val"), (list, tuple)) and shared_operand(node) is not None


def _as_forward(joint: StepGraph, module: fx.GraphModule) -> StepGraph:
    names = {i.name: i for i in joint.inputs}
    inputs = tuple(names[n.name] for n in module.graph.find_nodes(op="placeholder"))
    values = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    extra = [GraphOutput("saved", v.name if isinstance(v, fx.Node) else "") for v in values[joint.forward_outputs :]]
    outputs = (*joint.outputs[: joint.forward_outputs], *extra)
    return StepGraph(module, GraphKind.FORWARD, inputs, outputs, len(values), joint.unused)


def _as_backward(joint: StepGraph, module: fx.GraphModule) -> StepGraph:
    names = {i.name: i for i in joint.inputs}
    inputs = []
    for node in module.graph.find_nodes(op="placeholder"):
        source = names.get(node.name)
        if source is None:
            source = GraphInput(node.name, InputKind.SAVED, info(node).fqn)
        inputs.append(source)
    for node in module.graph.nodes:
        annotate(node, phase=Phase.BACKWARD)
        if node.op == "placeholder":
            annotate(node, role=Role.INPUT)
    values = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = joint.outputs[joint.forward_outputs :]
    assert len(outputs) == len(values)
    return StepGraph(module, GraphKind.BACKWARD, tuple(inputs), outputs, len(values))


def _sink_independent(graph: StepGraph) -> None:
    """Move each node that depends on no tangent to just before its first user: it then lives as short as it can.

    What reads a storage that backward writes to stays: it may not pass the write.
    """
    tangents = {i.name for i in graph.inputs if i.kind is InputKind.TANGENT}
    storages = Storages(graph)
    mutated = {storages.root(operand) for node in graph.nodes for operand in written(node)}
    dependent: set[fx.Node] = set()
    movable: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in tangents or any(operand in dependent for operand in node.all_input_nodes):
            dependent.add(node)
        elif mutated and any(storages.root(n) in mutated for n in (node, *node.all_input_nodes)):
            continue
        elif node.op == "call_function" and info(node).role in (Role.COMPUTE, Role.VIEW) and node.users:
            movable.add(node)
    output = graph.output_node
    for node in [n for n in graph.nodes if n.op == "call_function" and n not in movable] + [output]:
        for needed in _unplaced(node, movable):
            output.prepend(needed)
        if node is not output:
            output.prepend(node)


def _unplaced(node: fx.Node, movable: set[fx.Node]) -> list[fx.Node]:
    """The movable nodes that ``node`` needs, operands first; each is taken out of ``movable``."""
    found: list[fx.Node] = []
    stack: list[tuple[fx.Node, bool]] = [(o, False) for o in reversed(node.all_input_nodes)]
    while stack:
        current, expanded = stack.pop()
        if current not in movable:
            continue
        if expanded:
            movable.discard(current)
            found.append(current)
            continue
        stack.append((current, True))
        stack += [(o, False) for o in reversed(current.all_input_nodes)]
    return found
