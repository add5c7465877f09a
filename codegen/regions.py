"""Cut a forward, backward or inference graph into regions: runs of nodes that are compiled as one.

Boundaries fall between repeated blocks, so a deep model gives many equal regions and few compilations. A region's key
is a hash of its structure (operators, constants, shapes, strides, what is read, returned and donated): equal keys
share code.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from dataclasses import dataclass

import torch
from torch import fx

from dscompile.blocks import blocks, describe_arguments, describe_value
from dscompile.comm import comm_role
from dscompile.config import Config
from dscompile.effects import Root, Storages, constant
from dscompile.graph import EXPLICIT, Role, StepGraph, info
from dscompile.torch_compat import HigherOrderOperator, fake_like, fake_mode_of, free_symbol_names, tensor_bytes


@dataclass
class Region:
    """Nodes compiled together, what they read from outside and what outside reads from them.

    Attributes:
        nodes: in program order.
        inputs: outside nodes that the region reads (values or symbols), in order of first use.
        outputs: nodes of the region that something outside reads.
        donated: positions in ``inputs`` whose memory the region may overwrite.
        key: structural hash; regions with equal keys run the same code.
        inline: nothing but views and symbols: run where it stands, without a compilation.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    donated: tuple[int, ...] = ()
    key: str = ""
    inline: bool = False


def cut(graph: StepGraph, config: Config, *, donatable: frozenset[str] = frozenset()) -> list[Region]:
    """Cut a graph into regions in program order.

    Args:
        graph: forward, backward or inference graph.
        config: ``regions`` chooses the cut, ``donate`` whether dead inputs may be overwritten.
        donatable: names of graph inputs that nothing outside the graph reads once it runs.
    """
    body = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    if not body:
        return []
    compute = [n for n in body if comm_role(n) is None]
    pieces = blocks(compute) if config.regions == "auto" else [(0, len(compute))]
    regions = [_region(graph, nodes) for nodes in _runs(body, compute, pieces)]
    if config.donate:
        _donate(graph, regions, donatable)
    for region in regions:
        region.inline = all(_is_free(n) for n in region.nodes)
        region.key = _key(region)
    return regions


def _runs(body: list[fx.Node], compute: list[fx.Node], pieces: list[tuple[int, int]]) -> list[list[fx.Node]]:
    """Consecutive nodes that one region takes: of one piece, and not across communication, which stands alone."""
    piece_of = {compute[i]: number for number, (start, stop) in enumerate(pieces) for i in range(start, stop)}
    return [list(nodes) for _, nodes in itertools.groupby(body, lambda n: piece_of.get(n, -1))]


def _is_free(node: fx.Node) -> bool:
    return info(node).role in _INLINE


_INLINE = EXPLICIT | {Role.VIEW, Role.SYMBOL}
"""Roles of nodes that run where they stand: they compute nothing that a compiler could improve."""


def _region(graph: StepGraph, nodes: list[fx.Node]) -> Region:
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and (operand.op != "get_attr" or is_constant_tensor(operand)):
                inputs.setdefault(operand)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    _bind_symbols(graph, nodes, inputs)
    return Region(nodes, list(inputs), outputs)


def _bind_symbols(graph: StepGraph, nodes: list[fx.Node], inputs: dict[fx.Node, None]) -> None:
    """Add the graph inputs that define size symbols which the region mentions but does not receive."""
    needed: set[str] = set()
    for node in [*nodes, *inputs]:
        needed |= free_symbol_names(node.meta.get("val"))
    if not needed:
        return
    for node in graph.placeholders():
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) in needed:
            inputs.setdefault(node)


def _donate(graph: StepGraph, regions: list[Region], donatable: frozenset[str]) -> None:
    """Mark the inputs that a region may overwrite: their storage is ours and nothing reads it afterwards."""
    root = Storages(graph).root
    kept = {root(v) for v in graph.output_values() if isinstance(v, fx.Node)}
    kept |= {root(p) for p in graph.placeholders() if p.name not in donatable}
    kept |= {root(n) for n in graph.nodes if n.op == "get_attr"}
    kept |= _seen_by_bodies(graph, root)
    last_use: dict[Root, int] = {}
    for index, region in enumerate(regions):
        for node in region.inputs:
            last_use[root(node)] = index
    for index, region in enumerate(regions):
        roots = [root(node) for node in region.inputs]
        returned = {root(node) for node in region.outputs}
        region.donated = tuple(
            position
            for position, storage in enumerate(roots)
            if storage not in kept
            and storage not in returned
            and roots.count(storage) == 1
            and last_use[storage] == index
            and _owns_storage(region.inputs[position])
        )


def _seen_by_bodies(graph: StepGraph, root: Callable[[fx.Node], Root]) -> set[Root]:
    """Storages that higher-order operators take or return: a body may return its operand, whatever the graph says."""
    found: set[Root] = set()
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            found.update(map(root, [*node.all_input_nodes, *node.users]))
    return found


def _owns_storage(node: fx.Node) -> bool:
    """Whether the value covers its whole storage without overlap, so that the storage can be reused as one buffer."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or free_symbol_names(value):
        return False
    covers = value.storage_offset() == 0 and tensor_bytes(value) == value.untyped_storage().nbytes()
    return covers and all(stride > 0 or size <= 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def _key(region: Region) -> str:
    """SHA-256 of the region's structure."""
    names: dict[fx.Node, str] = {node: f"i{index}" for index, node in enumerate(region.inputs)}
    lines = [f"{name}:{describe_value(node.meta.get('val'))}" for node, name in names.items()]
    for index, node in enumerate(region.nodes):
        names[node] = f"n{index}"
        arguments = describe_arguments(node, lambda n: names.get(n) or f"module:{id(constant(n))}")
        target = "getitem" if node.target is operator.getitem else str(node.target)
        lines.append(f"{names[node]}={target}{arguments}:{describe_value(node.meta.get('val'))}")
    lines.append("out " + ",".join(names[n] for n in region.outputs))
    lines.append(f"donated {region.donated}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_constant_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor that the graph closed over; regions receive it as an input and still share code."""
    return node.op == "get_attr" and isinstance(constant(node), torch.Tensor)


def region_module(region: Region) -> fx.GraphModule:
    """The region as a graph of its own: inputs ``i0, i1, ...`` (donated ones ``d3``), outputs as one tuple."""
    graph = fx.Graph()
    root = torch.nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    graph_mode = fake_mode_of(region.nodes[0].graph)
    for index, node in enumerate(region.inputs):
        prefix = "d" if index in region.donated else "i"
        copies[node] = copy = graph.placeholder(f"{prefix}{index}")
        copy.meta = {"val": fake_like(graph_mode, node.meta.get("val"))}
    for node in region.nodes:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and operand not in copies:  # the body of a higher-order operator
                name = f"module{len(copies)}"
                setattr(root, name, constant(operand))
                copies[operand] = graph.get_attr(name)
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        copy.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "tensor_meta", "original_aten")}
    result = graph.output(tuple(copies[node] for node in region.outputs))
    result.meta["original_output_strides"] = [_strides(node.meta.get("val")) for node in region.outputs]
    return fx.GraphModule(root, graph)


def _strides(value: object) -> tuple[object, ...] | None:
    return tuple(value.stride()) if isinstance(value, torch.Tensor) and value.layout is torch.strided else None
