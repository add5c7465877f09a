"""From AOTAutograd's joint (or inference) graph to a StepGraph: which parameter, buffer or input each placeholder is.

Under ``torch.compile`` the inputs are anonymous (``primals_7``). Dynamo knows the Python expression each came from,
and the real objects: the two together give the fully qualified name, the kind, and the other names of a tied
parameter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dscompile.comm import comm_role
from dscompile.effects import is_effect, is_random, shared_operand
from dscompile.graph import INFO, GraphInput, GraphKind, GraphOutput, InputKind, NodeInfo, Phase, Role, StepGraph
from dscompile.placement import spec_of
from dscompile.torch_compat import duplicate_sources, source_names


@dataclass(frozen=True)
class FrameInputs:
    """What each input of one traced frame is, by its index in the frame's argument list.

    ``prefix`` is what the exporter of the step entry puts before every name.
    """

    inputs: tuple[GraphInput, ...]
    unused: tuple[str, ...] = ()
    prefix: str = ""

    def named(self, target: str) -> GraphInput | None:
        """The input that the exporter calls ``target``."""
        fqn = target.removeprefix(self.prefix)
        return next((i for i in self.inputs if i.fqn == fqn), None)


def frame_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> FrameInputs:
    """Name the inputs of a Dynamo frame. Call it inside the backend, while the tracing context is active."""
    ties: dict[str, list[str]] = {}
    for other, kept in duplicate_sources():
        ties.setdefault(kept, []).append(other)
        ties.setdefault(other, []).append(kept)
    named = []
    for source, value in zip(source_names(gm), example_inputs, strict=True):
        spec = spec_of(value) if isinstance(value, torch.Tensor) else None
        if spec is not None:  # the local shard that stands for a parameter
            named.append(GraphInput("", InputKind.PARAMETER, spec.fqn, (), value.requires_grad))
            continue
        kind = _kind(source, value)
        fqn = fqn_of(source)
        aliases = tuple(sorted(fqn_of(other) for other in ties.get(source, ()))) if kind is InputKind.PARAMETER else ()
        trainable = kind is InputKind.PARAMETER and bool(value.requires_grad)
        named.append(GraphInput("", kind, fqn, aliases, trainable))
    return FrameInputs(tuple(named))


def _kind(source: str, value: Any) -> InputKind:
    if isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.Tensor) and "._parameters[" in source):
        return InputKind.PARAMETER
    if isinstance(value, torch.Tensor):
        return InputKind.BUFFER if "._buffers[" in source else InputKind.INPUT
    return InputKind.SYMBOL if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else InputKind.OPAQUE


def fqn_of(source: str) -> str:
    """``L['self']._modules['a']._modules['0']._parameters['w']`` -> ``a.0.w``; other sources keep their last name."""
    keys = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", source)
    if keys:
        return ".".join(keys)
    match = re.search(r"\['([^']+)'\](?!.*\['[^']+'\])", source)
    return match.group(1) if match else source


def from_aot(
    gm: fx.GraphModule, kind: GraphKind, frame: FrameInputs, *, forward_outputs: int | None = None
) -> StepGraph:
    """Build a StepGraph from a graph that AOTAutograd traced, and annotate every node's role, phase and FQN.

    Args:
        gm: a joint or inference graph whose placeholders and outputs carry AOT descriptors (``meta["desc"]``).
        kind: ``JOINT`` or ``INFERENCE``.
        frame: names of the frame's inputs, from :func:`frame_inputs` or the step entry.
        forward_outputs: number of leading outputs that belong to forward (joint graphs).
    """
    inputs = tuple(_graph_input(node, frame) for node in gm.graph.find_nodes(op="placeholder"))
    output = gm.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    descriptors = output.meta.get("desc") or [None] * len(values)
    outputs = tuple(_graph_output(d, v, frame) for d, v in zip(descriptors, values, strict=True))
    graph = StepGraph(
        module=gm,
        kind=kind,
        inputs=inputs,
        outputs=outputs,
        forward_outputs=len(values) if forward_outputs is None else forward_outputs,
        unused=frame.unused,
    )
    annotate_nodes(graph)
    return graph


def _index(descriptor: Any) -> int | None:
    """The frame input that a descriptor talks about, through wrappers for tensor subclasses and synthetic bases."""
    while descriptor is not None:
        if hasattr(descriptor, "idx"):
            return int(descriptor.idx)
        descriptor = getattr(descriptor, "base", None)
    return None


def _graph_input(node: fx.Node, frame: FrameInputs) -> GraphInput:
    descriptor = node.meta.get("desc")
    name = type(descriptor).__name__
    if "Tangent" in name or (descriptor is None and node.name.startswith("tangents")):
        return GraphInput(node.name, InputKind.TANGENT)
    target = getattr(descriptor, "target", None)
    if isinstance(target, str):  # the step entry's ParamAOTInput and BufferAOTInput carry the FQN themselves
        found = frame.named(target)
        if found is not None:
            return GraphInput(node.name, found.kind, found.fqn, found.aliases, found.trainable)
    if not isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt, torch.SymFloat, int, float)):
        return GraphInput(node.name, InputKind.OPAQUE)
    index = _index(descriptor)
    if index is not None and index < len(frame.inputs) and "SyntheticBase" not in name and target is None:
        found = frame.inputs[index]
        return GraphInput(node.name, found.kind, found.fqn, found.aliases, found.trainable)
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
        return GraphInput(node.name, InputKind.SYMBOL)
    return GraphInput(node.name, InputKind.INPUT if isinstance(value, torch.Tensor) else InputKind.OPAQUE)


def _graph_output(descriptor: Any, value: Any, frame: FrameInputs) -> GraphOutput:
    def fqn(of: Any) -> str:
        target = getattr(of, "target", None)
        index = _index(of)
        if isinstance(target, str):
            return target.removeprefix(frame.prefix)
        return frame.inputs[index].fqn if index is not None and index < len(frame.inputs) else ""

    if value is None:
        return GraphOutput("none")
    if hasattr(descriptor, "grad_of"):
        return GraphOutput("gradient", fqn(descriptor.grad_of))
    if hasattr(descriptor, "mutated_input"):
        return GraphOutput("mutation", fqn(descriptor.mutated_input))
    return GraphOutput("output")


# -- roles and phases ------------------------------------------------------------------------------------------------


def annotate_nodes(graph: StepGraph) -> None:
    """Give every node its :class:`NodeInfo`: role by operator, phase by what it depends on, FQN by module.

    In a joint graph a node is backward if it depends on a tangent, or if AOTAutograd traced it while running autograd's
    backward and no forward output needs it.
    """
    tangents = {i.name for i in graph.inputs if i.kind is InputKind.TANGENT}
    by_name = {i.name: i for i in graph.inputs}
    needed = _forward_needed(graph)
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if graph.kind is GraphKind.BACKWARD:
            late.add(node)
        elif graph.kind is GraphKind.JOINT:
            depends = node.name in tangents or any(operand in late for operand in node.all_input_nodes)
            traced_backward = node.meta.get("partitioner_tag") == "is_backward" and node.op != "placeholder"
            traced_backward = traced_backward and role_of(node) is not Role.SYMBOL  # sizes are known in forward
            if depends or (traced_backward and node not in needed) or node.op == "output":
                late.add(node)
        phase = Phase.BACKWARD if node in late else Phase.FORWARD
        source = by_name.get(node.name) if node.op == "placeholder" else None
        fqn = source.fqn if source is not None else module_path(node)
        node.meta[INFO] = NodeInfo(role_of(node), phase, fqn)


def _forward_needed(graph: StepGraph) -> set[fx.Node]:
    stack = [v for v in graph.output_values()[: graph.forward_outputs] if isinstance(v, fx.Node)]
    seen = set(stack)
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return seen


def module_path(node: fx.Node) -> str:
    """The user module a node was traced in, e.g. ``blocks.3.proj``; backward nodes name their forward's module."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    keys = re.sub(r"^L\['[^']*'\]\.?", "", path)
    return re.sub(r"\['?([^'\]]+)'?\]", r".\1", keys).replace("_modules.", "").strip(".")


def role_of(node: fx.Node) -> Role:
    """What a node is for, judged from its operator's schema and its fake value."""
    if node.op == "placeholder":
        return Role.INPUT
    if node.op == "output":
        return Role.OUTPUT
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return Role.SYMBOL
    communication = comm_role(node)
    if communication is not None:
        return communication
    if is_effect(node):
        return Role.EFFECT
    if is_random(node):
        return Role.RANDOM
    return Role.VIEW if shared_operand(node) is not None else Role.COMPUTE
