"""From AOTAutograd's joint (or inference) graph to a StepGraph: which parameter, buffer or input each placeholder is.

Under ``torch.compile`` the inputs are anonymous (``primals_7``). Dynamo knows the Python expression each came from,
and the real objects: the two together give the fully qualified name, the kind, and the other names of a tied
parameter.
"""

from __future__ import annotations

import operator
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
from dscompile.torch_compat import HigherOrderOperator, duplicate_sources, fresh_fake, source_names, storage_key


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
    sources = source_names(gm)
    kinds = [_kind(source, value) for source, value in zip(sources, example_inputs, strict=True)]
    state = {s for s, kind in zip(sources, kinds, strict=True) if kind in (InputKind.PARAMETER, InputKind.BUFFER)}
    several = len({(root, owner) for root, owner, path in map(_parts, state) if path}) > 1
    named = []
    for source, kind, value in zip(sources, kinds, example_inputs, strict=True):
        spec = spec_of(value) if isinstance(value, torch.Tensor) else None
        if spec is not None:  # the local shard that stands for a parameter
            named.append(GraphInput("", InputKind.PARAMETER, spec.fqn, (), value.requires_grad))
            continue
        fqn = fqn_of(source, several_modules=several)
        others = ties.get(source, ()) if source in state else ()
        aliases = tuple(sorted(fqn_of(other, several_modules=several) for other in others))
        trainable = kind is InputKind.PARAMETER and bool(value.requires_grad)
        named.append(GraphInput("", kind, fqn, aliases, trainable))
    return FrameInputs(tuple(named))


def _kind(source: str, value: Any) -> InputKind:
    if isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.Tensor) and "._parameters[" in source):
        return InputKind.PARAMETER
    if isinstance(value, torch.Tensor):
        return InputKind.BUFFER if "._buffers[" in source else InputKind.INPUT
    return InputKind.SYMBOL if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else InputKind.OPAQUE


_ACCESSOR = re.compile(r"""\.(\w+)|\[(?:'([^']*)'|"([^"]*)"|(\w+))\]""")
_TABLES = frozenset({"_modules", "_parameters", "_buffers"})
_CELL = re.compile(r"\.__closure__\[\d+\]\.cell_contents")


def fqn_of(source: str, *, several_modules: bool = False) -> str:
    """``L['self']._modules['a']._modules['0']._parameters['w']`` -> ``a.0.w``: the name inside the user's module.

    What hangs on ``self`` keeps its whole path. A module that a function got from elsewhere (``G['teacher']``) gives
    names inside that module, with its own name in front if the frame has ``several_modules``, as two may have a
    ``weight``. Other sources keep the path from the variable (``L['xs'][0]`` -> ``xs.0``).
    """
    root, owner, path = _parts(source)
    if not root:
        return source
    if root == "self" and (owner or path):
        return ".".join([*owner, *path])
    return ".".join(path if path and not several_modules else [root, *owner, *path])


def _parts(source: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(variable, how the outermost module hangs on it, the path inside that module) of a Dynamo source expression."""
    text = _CELL.sub("", source)
    start = re.match(r"[LG]\['([^']+)'\]", text)
    if start is None:
        return "", (), ()
    owner: list[str] = []
    path: list[str] = []
    names = owner
    for attribute, quoted, double_quoted, index in _ACCESSOR.findall(text[start.end() :]):
        if attribute in _TABLES:
            names = path
        elif attribute != "_orig_mod":  # a compiled submodule's parameters keep the names they had before
            names.append(attribute or quoted or double_quoted or index)
    return start.group(1), tuple(owner), tuple(path)


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
    _own_values(gm.graph)
    output = gm.graph.output_node()
    values = [None if _is_update_tangent(v, frame) else v for v in output.args[0]]  # type: ignore[union-attr]
    output.args = (tuple(values),)
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
    annotate_nodes(graph, prefix=frame.prefix)
    return graph


def _own_values(graph: fx.Graph) -> None:
    """Give every result of a higher-order operator a fake value in a storage of its own.

    PyTorch answers the second call of one nested region with the fake values of the first. Everything that tells values
    apart by their fake tensors, tracing above all, would take the two calls for one.
    """
    seen: set[int | None] = {None}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            if isinstance(source.target, HigherOrderOperator):
                node.meta["val"] = source.meta["val"][node.args[1]]
        elif isinstance(node.target, HigherOrderOperator) and isinstance(value, (list, tuple)):
            node.meta["val"] = type(value)(fresh_fake(v) if storage_key(v) in seen else v for v in value)
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            seen.add(storage_key(leaf))


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
    if "Token" in name:  # orders effects; its number counts tokens, not the frame's inputs
        return GraphInput(node.name, InputKind.TOKEN)
    target = getattr(descriptor, "target", None)
    if isinstance(target, str):  # the step entry's ParamAOTInput and BufferAOTInput carry the FQN themselves
        found = frame.named(target)
        if found is not None:
            return GraphInput(node.name, found.kind, found.fqn, found.aliases, found.trainable)
    if not isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt, torch.SymFloat, int, float)):
        return GraphInput(node.name, InputKind.OPAQUE)
    index = _index(descriptor)
    batch = f"batch[{index}]" if frame.prefix and index is not None else ""  # the exporter counts the batch alone
    if index is not None and index < len(frame.inputs) and "SyntheticBase" not in name and target is None and not batch:
        found = frame.inputs[index]
        return GraphInput(node.name, found.kind, found.fqn, found.aliases, found.trainable)
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, int, float)):
        return GraphInput(node.name, InputKind.SYMBOL, batch)
    return GraphInput(node.name, InputKind.INPUT if isinstance(value, torch.Tensor) else InputKind.OPAQUE, batch)


def _is_update_tangent(value: Any, frame: FrameInputs) -> bool:
    """Whether a gradient is nothing but the tangent of a parameter's updated value.

    A parameter can only be updated under ``no_grad``, so that tangent is zero, and eager leaves ``.grad`` at None.
    """
    updated = getattr(getattr(value, "meta", {}).get("desc"), "output", None)  # a tangent's descriptor has it
    index = _index(getattr(updated, "mutated_input", None))
    return index is not None and index < len(frame.inputs) and frame.inputs[index].kind is InputKind.PARAMETER


def _graph_output(descriptor: Any, value: Any, frame: FrameInputs) -> GraphOutput:
    def fqn(of: Any) -> str:
        target = getattr(of, "target", None)
        index = _index(of)
        if isinstance(target, str):
            return target.removeprefix(frame.prefix)
        if frame.prefix and index is not None:
            return f"batch[{index}]"
        return frame.inputs[index].fqn if index is not None and index < len(frame.inputs) else ""

    if value is None:
        return GraphOutput("none")
    if hasattr(descriptor, "grad_of"):
        return GraphOutput("gradient", fqn(descriptor.grad_of))
    if hasattr(descriptor, "mutated_input"):
        return GraphOutput("mutation", fqn(descriptor.mutated_input))
    return GraphOutput("output")


# -- roles and phases ------------------------------------------------------------------------------------------------


_BACKWARD_TAGS = frozenset({"is_backward", "must_be_in_backward"})
"""What AOTAutograd writes on nodes of autograd's backward; the second on writes to inputs that backward makes."""


def annotate_nodes(graph: StepGraph, *, prefix: str = "") -> None:
    """Give every node its :class:`NodeInfo`: role by operator, phase by what it depends on, FQN by module.

    In a joint graph a node is backward if it depends on a tangent, or if AOTAutograd traced it while running autograd's
    backward and no forward output needs it. ``prefix`` is what an exporter put before every module's name.
    """
    tangents = {i.name for i in graph.inputs if i.kind is InputKind.TANGENT}
    by_name = {i.name: i for i in graph.inputs}
    needed = _forward_needed(graph)
    roots = {root.group(1) for path in map(_raw_path, graph.nodes) if (root := _ROOT.match(path))}
    late: set[fx.Node] = set()
    for node in graph.nodes:
        if graph.kind is GraphKind.BACKWARD:
            late.add(node)
        elif graph.kind is GraphKind.JOINT:
            depends = node.name in tangents or any(operand in late for operand in node.all_input_nodes)
            traced_backward = node.meta.get("partitioner_tag") in _BACKWARD_TAGS and node.op != "placeholder"
            traced_backward = traced_backward and role_of(node) is not Role.SYMBOL  # sizes are known in forward
            if depends or (traced_backward and node not in needed) or node.op == "output":
                late.add(node)
        phase = Phase.BACKWARD if node in late else Phase.FORWARD
        source = by_name.get(node.name) if node.op == "placeholder" else None
        fqn = source.fqn if source is not None else module_path(node, several_modules=len(roots) > 1)
        fqn = f"{fqn}.".removeprefix(prefix).removesuffix(".") if prefix else fqn
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


_ROOT = re.compile(r"^[LG]\['([^']*)'\]\.?")


def module_path(node: fx.Node, *, several_modules: bool = False) -> str:
    """The user module a node was traced in, e.g. ``blocks.3.proj``; backward nodes name their forward's module.

    With ``several_modules`` the outermost module's own name comes first, as in the names of its parameters.
    """
    path = _raw_path(node)
    root = _ROOT.match(path)
    if root is None:
        return path
    keys = re.sub(r"""\[(["']?)(.*?)\1\]""", r".\2", path[root.end() :])
    keys = re.sub(r"(^|\.)_modules\.", r"\1", keys).strip(".")
    return f"{root.group(1)}.{keys}".strip(".") if several_modules and root.group(1) != "self" else keys


def _raw_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


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
