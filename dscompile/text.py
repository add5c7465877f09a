"""The canonical text of a StepGraph: printed, hashed, compared, and (:func:`parse_graph`) read back exactly.

The artifact of a run, ``dscompile opt``, ``dscompile diff``, and tests that show a graph before and after a pass all
stand on this text. One node a line::

    dscompile graph v1 joint forward_outputs=1
    symbol s58 = 4 in [2, 1024] positive
    in %primals_1 : f32[48, 48]{48, 1}@cpu | parameter layers.0.weight (= head.weight) trainable
    %t = aten.t.default(%primals_1) : f32[48, 48]{1, 48}@cpu ~%primals_1 | f view layers.0
    out [%t] | output

``%`` is a node, ``!`` a dtype, layout or float without a literal, ``@`` a device, ``{}`` strides, ``+8`` a storage
offset, ``&64`` the bytes of a storage that is larger than its first value needs, and ``~%x`` says that the value lies
in the storage of ``%x`` (so liveness survives a round trip). What is not part of the program's meaning (source lines,
AOT descriptors, the data of large constants) is in :func:`side_table`. Lines that start with ``#`` are comments.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import sympy
import torch
from torch import fx

from dscompile.graph import INFO, GraphInput, NodeInfo, StepGraph, info
from dscompile.source import source_line
from dscompile.text_diff import diff_text as diff_text
from dscompile.text_parse import parse_graph as parse_graph
from dscompile.text_symbols import expr_of, expr_text, size_text, symbol_line
from dscompile.text_values import (
    DTYPE_NAMES,
    HEADER,
    Opaque,
    constant_bytes,
    constant_text,
    extent,
    input_info,
    name_text,
    output_info,
    symbolic_text,
    target_text,
    value_text,
)
from dscompile.torch_compat import ShapeEnv, storage_key


def print_graph(graph: StepGraph) -> str:
    """The canonical text of ``graph``, ending in a newline. Equal programs have equal text, whoever traced them."""
    return _Printer(graph).text()


def digest(graph: StepGraph) -> str:
    """SHA-256 of the canonical text, in hexadecimal."""
    return text_digest(print_graph(graph))


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def constant_of(graph: StepGraph, node: fx.Node) -> Any:
    """The object that a ``get_attr`` node names, or None if the module lacks it."""
    value: Any = graph.module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


class _Printer:
    """Prints nodes in program order, and gathers the storages and symbols it meets on the way."""

    def __init__(self, graph: StepGraph) -> None:
        self.graph = graph
        self.holders: dict[int, str] = {}
        self.symbols: dict[Any, ShapeEnv] = {}
        self.memo: dict[Any, str] = {}

    def text(self) -> str:
        graph = self.graph
        inputs = {i.name: i for i in graph.inputs}
        placeholders = [n.name for n in graph.placeholders()]
        assert placeholders == [i.name for i in graph.inputs], "StepGraph.inputs must list the placeholders in order"
        body = [self._line(node, inputs) for node in graph.nodes]
        head = [f"{HEADER} {graph.kind.value} forward_outputs={graph.forward_outputs}"]
        head += [symbol_line(env, symbol) for symbol, env in self.symbols.items()]
        head += [f"unused {name_text(name)}" for name in graph.unused]
        return "\n".join([*head, *body, ""])

    def _line(self, node: fx.Node, inputs: dict[str, GraphInput]) -> str:
        if node.op == "output":
            return self._output(node)
        if node.op == "placeholder":
            return self._input(node, inputs[node.name])
        if node.op == "get_attr":
            name = name_text(str(node.target))
            constant = constant_of(self.graph, node)
            node_type = self._value(node.meta.get("val", constant), "%" + node.name)
            call = f"get_attr {name} : {node_type} = {constant_text(constant)}"
        else:
            args = [value_text(a) for a in node.args] + [f"{k}={value_text(v)}" for k, v in node.kwargs.items()]
            call = f"{target_text(node)}({', '.join(args)}) : {self._type(node)}"
            for operand in (*node.args, *node.kwargs.values()):
                self._note_symbols(operand)
        return f"%{node.name} = {call} | {_info_text(info(node))}"

    def _input(self, node: fx.Node, what: GraphInput) -> str:
        target = "" if node.target == node.name else f" = {name_text(str(node.target))}"
        words = [what.kind.value]
        if what.fqn:
            words.append(name_text(what.fqn))
        if what.aliases:
            words.append(f"(= {', '.join(map(name_text, what.aliases))})")
        if what.trainable:
            words.append("trainable")
        meaning = _unless_default(node, input_info(what, self.graph.kind))
        return f"in %{node.name}{target} : {self._type(node)} | {' '.join(words)}{meaning}"

    def _output(self, node: fx.Node) -> str:
        name = "" if node.name == "output" else f" %{node.name} ="
        kinds = [o.kind + (f" {name_text(o.of)}" if o.of else "") for o in self.graph.outputs]
        self._note_symbols(node.args[0])
        what = f" {', '.join(kinds)}" if kinds else ""
        return f"out{name} {value_text(node.args[0])} |{what}{_unless_default(node, output_info(self.graph.kind))}"

    def _type(self, node: fx.Node) -> str:
        return self._value(node.meta["val"], "%" + node.name) if "val" in node.meta else "?"

    def _value(self, value: Any, where: str) -> str:
        """Text of a ``meta["val"]``; ``where`` is how a later alias refers to this value's storage."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, where)
        if value is None:
            return "None"
        if isinstance(value, (list, tuple)):
            parts = ", ".join(self._value(v, f"{where}.{i}") for i, v in enumerate(value))
            return f"[{parts}]" if isinstance(value, list) else f"({parts}{',' if len(value) == 1 else ''})"
        self._note_symbols(value)
        symbolic = symbolic_text(value)
        if symbolic is not None:
            return symbolic
        if type(value) in (int, float, bool):
            return f"{type(value).__name__}({value_text(value)})"
        return f"!opaque({value_text(value.type_name if isinstance(value, Opaque) else type(value).__name__)})"

    def _tensor(self, value: torch.Tensor, where: str) -> str:
        if value.layout is not torch.strided or (value.dtype.is_complex and (value.is_conj() or value.is_neg())):
            layout = str(value.layout).removeprefix("torch.")
            return f'!opaque("tensor {DTYPE_NAMES[value.dtype]} {layout} {value.device}")'
        size, stride, offset = tuple(value.shape), value.stride(), value.storage_offset()
        static = all(type(n) is int for n in (*size, *stride, offset))
        key = (value.dtype, size, stride, offset, value.device) if static else None
        text = self.memo.get(key) if key is not None else None
        if text is None:
            for n in (*size, *stride, offset):
                self._note_symbols(n)
            dims, steps = ", ".join(map(size_text, size)), ", ".join(map(size_text, stride))
            shift = size_text(offset)
            shift = "" if shift == "0" else f"+{shift}" if shift.isdigit() else f"+{{{shift}}}"
            text = f"{DTYPE_NAMES[value.dtype]}[{dims}]{{{steps}}}{shift}@{value.device}"
            if key is not None:
                self.memo[key] = text
        storage = storage_key(value)
        if storage is None:
            return text
        holder = self.holders.setdefault(storage, where)
        if holder != where:
            return f"{text} ~{holder}"
        have = value.untyped_storage().nbytes()
        if static and type(have) is int:
            need = extent(size, stride, offset) * value.dtype.itemsize
            return text if have == need else f"{text} &{have}"
        exprs = [tuple(map(expr_of, group)) for group in (size, stride)]
        symbolic = extent(exprs[0], exprs[1], expr_of(offset)) * value.dtype.itemsize
        if sympy.expand(expr_of(have) - symbolic) == 0:
            return text
        self._note_symbols(have)
        return f"{text} &{{{size_text(have)}}}"

    def _note_symbols(self, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for part in value:
                self._note_symbols(part)
        elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            for symbol in sorted(expr_of(value).free_symbols, key=lambda s: str(s.name)):
                self.symbols.setdefault(symbol, value.node.shape_env)


def _info_text(what: NodeInfo) -> str:
    fqn = f" {name_text(what.fqn)}" if what.fqn else ""
    why = f" why {value_text(what.why)}" if what.why else ""
    return f"{what.phase.value} {what.role.value}{fqn}{why}"


def _unless_default(node: fx.Node, default: NodeInfo) -> str:
    return f" ; {_info_text(info(node))}" if INFO in node.meta and info(node) != default else ""


# -- the side table ----------------------------------------------------------------------------------------------------


def side_table(graph: StepGraph) -> dict[str, Any]:
    """What the text leaves out, ready for JSON.

    ``nodes`` maps a node's name to its user ``source`` line, ``fqn``, ``bytes`` (an int, or the text of a symbolic
    expression) and AOT descriptor ``desc``; ``constants`` maps a digest to base64 data of larger constants.
    """
    nodes, constants = {}, {}
    for node in graph.nodes:
        entry: dict[str, Any] = {
            "source": source_line(node),
            "fqn": info(node).fqn,
            "bytes": _bytes(node.meta.get("val")),
            "desc": _description(node.meta.get("desc")),
        }
        entry = {key: value for key, value in entry.items() if value not in ("", None, 0)}
        if entry:
            nodes[node.name] = entry
        if node.op == "get_attr":
            value = constant_of(graph, node)
            text = constant_text(value)
            if text.startswith("sha256:"):
                constants[text.removeprefix("sha256:")] = base64.b64encode(constant_bytes(value)).decode()
    return {"version": 1, "nodes": nodes, "constants": constants}


def _bytes(value: Any) -> int | str:
    parts = value if isinstance(value, (list, tuple)) else (value,)
    total = sum(map(_size, parts), sympy.Integer(0))
    return int(total) if total.is_Integer else expr_text(total)


def _size(value: Any) -> Any:
    known = isinstance(value, torch.Tensor) and storage_key(value) is not None
    return expr_of(value.numel()) * value.dtype.itemsize if known else sympy.Integer(0)


def _description(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_description(v) for v in value]
    return None if value is None else str(value)
