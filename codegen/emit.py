"""Emit: turn nodes and regions into the lines of a Program.

Every value is dropped at its last use. A region's dying inputs are dropped from the caller before the call, so that
the region holds the only reference and can free or overwrite them while it runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from dscompile.codegen.regions import Region, is_constant_tensor
from dscompile.comm import ROLES, WAIT
from dscompile.effects import constant, shared_operand
from dscompile.errors import UnsupportedError
from dscompile.graph import StepGraph
from dscompile.program import Program, RegionCode, Step, function_source
from dscompile.source import module_of, source_line
from dscompile.torch_compat import HigherOrderOperator, OpOverload, tensor_bytes

_MODULES = frozenset({"operator", "_operator", "math", "torch", "builtins"})
"""Modules whose functions a program may call: those that the runtime's namespace defines."""


def emit_program(graph: StepGraph, regions: Sequence[Region], codes: dict[str, RegionCode]) -> Program:
    """Lay out a program: one line for a compiled region, one line a node for inline ones."""
    outputs = [_expression(value) for value in graph.output_values()]
    kept = {value.name for value in graph.output_values() if isinstance(value, fx.Node)}
    constants = {n.name: constant(n) for n in graph.nodes if is_constant_tensor(n)}
    last_use: dict[str, int] = {}
    units: list[tuple[Region, fx.Node | None]] = []
    for region in regions:
        units += [(region, node) for node in region.nodes] if region.inline else [(region, None)]
    for index, (region, node) in enumerate(units):
        for read in node.all_input_nodes if node is not None else region.inputs:
            last_use[read.name] = index
    names: dict[str, str] = {}
    calls: dict[str, str] = {}
    steps = []
    for index, (region, node) in enumerate(units):
        if node is not None:
            dead = _dead([node.name], last_use, kept) + _dying(node.all_input_nodes, last_use, index, kept)
            steps.append(_node_step(node, dead))
            continue
        name = names.setdefault(region.key, f"region_{len(names)}")
        calls[name] = region.key
        dying = _dying(region.inputs, last_use, index, kept)
        steps.append(_region_step(name, region, dying))
    program = Program(
        name=str(graph.kind),
        inputs=tuple(p.name for p in graph.placeholders()),
        steps=steps,
        outputs=tuple(outputs),
        calls=calls,
        codes={key: codes[key] for key in calls.values()},
        constants=constants,
        labels={n.name: label(n) for r in regions if not r.inline for n in r.outputs},
    )
    program.facts = _facts(graph, regions, program)
    return program


def label(node: fx.Node) -> str:
    """``blocks.0.proj at model.py:12 in forward: ...``: where a value comes from, in the user's words."""
    module, line = module_of(node), source_line(node)
    return f"{module} at {line}" if module and line else module or line


def emit_aten(module: fx.GraphModule) -> str:
    """Source of ``run(args)`` that calls PyTorch's own kernel for each node of a region's module.

    Raises:
        UnsupportedError: a node that Python source cannot name.
    """
    return function_source("run", *_aten_body(module))


def _aten_body(module: fx.GraphModule) -> tuple[list[str], list[Step], list[str]]:
    """The inputs, steps and outputs of a graph, node by node; the branches and bodies it calls are defined first."""
    body = [n for n in module.graph.nodes if n.op == "call_function"]
    result: Any = module.graph.output_node().args[0]
    values = [result] if isinstance(result, fx.Node) else result
    kept = {v.name for v in values if isinstance(v, fx.Node)}
    last_use = {read.name: index for index, node in enumerate(body) for read in node.all_input_nodes}
    steps = [_definition(node) for node in module.graph.find_nodes(op="get_attr")]
    steps += [
        _node_step(n, _dead([n.name], last_use, kept) + _dying(n.all_input_nodes, last_use, i, kept))
        for i, n in enumerate(body)
    ]
    inputs = [p.name for p in module.graph.find_nodes(op="placeholder")]
    return inputs, steps, [_expression(v) for v in values]


def _definition(node: fx.Node) -> Step:
    """The graph that a higher-order operator is called with, as a function; names inside are its own."""
    module = constant(node)
    if not isinstance(module, fx.GraphModule):
        raise UnsupportedError(f"constant {node.name!r} inside a region cannot be printed as source")
    inputs, steps, outputs = _aten_body(module)
    lines = [line for step in steps for line in step.text.splitlines()]
    single = isinstance(module.graph.output_node().args[0], fx.Node)  # a loop's condition returns no tuple
    lines.append(
        f"return {outputs[0]}" if single else f"return ({', '.join(outputs)}{',' if len(outputs) == 1 else ''})"
    )
    text = "\n    ".join([f"def {node.name}({', '.join(inputs)}):", *lines])
    return Step(text, "def", (), (node.name,), ())


def _dying(nodes: Iterable[fx.Node], last_use: dict[str, int], index: int, kept: set[str]) -> list[str]:
    names = dict.fromkeys(n.name for n in nodes if n.op != "get_attr")
    return [name for name in names if last_use[name] == index and name not in kept]


def _dead(names: list[str], last_use: dict[str, int], kept: set[str]) -> list[str]:
    return [name for name in names if name not in last_use and name not in kept]


def _region_step(name: str, region: Region, dying: list[str]) -> Step:
    reads = [n.name for n in region.inputs]
    writes = [n.name for n in region.outputs]
    result = f"{', '.join(writes)}, = " if writes else ""
    if not dying:
        return Step(f"{result}{name}([{', '.join(reads)}])", name, tuple(reads), tuple(writes), ())
    text = f"args = [{', '.join(reads)}]\ndel {', '.join(dying)}\n{result}{name}(args)"
    return Step(text, name, tuple(reads), tuple(writes), tuple(dying))


def _node_step(node: fx.Node, dying: list[str]) -> Step:
    text = f"{node.name} = {call_text(node)}"
    if dying:
        text += f"\ndel {', '.join(dying)}"
    reads = tuple(dict.fromkeys(n.name for n in node.all_input_nodes))
    return Step(text, str(node.target), reads, (node.name,), tuple(dying))


def call_text(node: fx.Node) -> str:
    """A node as a Python call, with names that the runtime's namespace defines (``torch``, ``operator``, ``math``)."""
    arguments = [_expression(a) for a in node.args] + [f"{k}={_expression(v)}" for k, v in node.kwargs.items()]
    if node.target is WAIT:  # other ranks are told where this one stands
        arguments.append(repr(module_of(node) or node.name))
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: object) -> str:
    if isinstance(target, OpOverload):
        namespace, name = target._schema.name.split("::")
        if target in ROLES:
            return f"comm.{name}"
        return f"torch.ops.{namespace}.{name}.{target._overloadname}"
    if isinstance(target, HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in _MODULES and name:
        return f"{module.removeprefix('_')}.{name}" if module != "builtins" else name
    raise UnsupportedError(f"operator {target!r} cannot be printed as a call")


def _expression(value: object) -> str:
    """A constant or node as Python source."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else f"float({str(value)!r})"
    if isinstance(value, complex):
        return f"complex({_expression(value.real)}, {_expression(value.imag)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(_expression, value))
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' if len(value) == 1 else ''})"
    if isinstance(value, (OpOverload, HigherOrderOperator)):  # what a higher-order operator calls
        return _target(value)
    if isinstance(value, slice):
        return f"slice({_expression(value.start)}, {_expression(value.stop)}, {_expression(value.step)})"
    if value is Ellipsis:
        return "..."
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        return int.__repr__(value) if isinstance(value, int) else str.__repr__(value)  # an enum's member too
    if value is None or isinstance(value, (bool, torch.dtype, torch.layout, torch.memory_format)):
        return repr(value)
    raise UnsupportedError(f"constant {value!r} of type {type(value).__name__} cannot be printed as source")


def _facts(graph: StepGraph, regions: Sequence[Region], program: Program) -> dict[str, Any]:
    """Figures of a program: nodes, regions, and how many non-GEMM bytes are computed inside compiled regions.

    A view computes none, wherever it stands.
    """
    compiled = {key for key, code in program.codes.items() if code.kind in ("inductor", "triton")}
    inside = total = 0
    for region in regions:
        made = sum(_bytes(n) for n in region.nodes if not _is_gemm(n))
        total += made
        inside += made if region.key in compiled else 0
    return {
        "nodes": len(graph.graph.nodes),
        "regions": sum(not r.inline for r in regions),
        "compiled_regions": len(compiled),
        "triton_regions": sum(code.kind == "triton" for code in program.codes.values()),
        "choices": sorted({code.choice for code in program.codes.values() if code.choice}),
        "aten_regions": sum(r.key not in compiled and not r.inline for r in regions),
        "inline_nodes": sum(len(r.nodes) for r in regions if r.inline),
        "donated_inputs": sum(len(r.donated) for r in regions),
        "bytes": total,
        "bytes_compiled": inside,
        "attention": list(dict.fromkeys(choice for code in program.codes.values() for choice in code.attention)),
        "products": list(dict.fromkeys(line for code in program.codes.values() for line in code.products)),
    }


_GEMMS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"})


def _is_gemm(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.name in _GEMMS


def _bytes(node: fx.Node) -> int:
    """Bytes that a node writes; the parts of an operator of several results count at the operator."""
    if shared_operand(node) is not None or node.target is operator.getitem:
        return 0
    value = node.meta.get("val")
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else tensor_bytes(value)
