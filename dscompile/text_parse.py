"""Reads the canonical text of a graph (see :mod:`dscompile.text`): one scan, recursive descent, exact error positions.

A line is one node; operators that repeat from line to line are resolved once.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from dscompile.errors import nearest
from dscompile.graph import INFO, GraphInput, GraphKind, GraphOutput, InputKind, NodeInfo, Phase, Role, StepGraph
from dscompile.text_build import BuildError, Schema, resolve
from dscompile.text_scan import Scanner
from dscompile.text_values import HEADER, input_info, output_info
from dscompile.torch_compat import FakeTensor, lazy_graph_module

_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NODE = re.compile(r"%([A-Za-z_]\w*)", re.ASCII)
_TARGET = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_KEYWORD = re.compile(r"([A-Za-z_]\w*)=", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\b")
_NAMED_OUTPUT = re.compile(r"%\w+ = ", re.ASCII)
_HEADER = re.compile(re.escape(HEADER) + r" (\w+) forward_outputs=(\d{1,9})", re.ASCII)


def parse_graph(text: str, path: str = "<text>", constants: Mapping[str, str] | None = None) -> StepGraph:
    """Read a graph back: ``print_graph(parse_graph(print_graph(g))) == print_graph(g)``.

    Values are fake tensors of one fresh mode, with the printed shapes, strides, devices and shared storages; symbols
    have their hints and ranges, but not the guards that tracing collected.

    Args:
        text: what :func:`dscompile.text.print_graph` printed, possibly edited.
        path: names the text in error messages.
        constants: ``side_table(graph)["constants"]``, needed only if the graph has large constants.

    Raises:
        TextError: the first fault, with its line and column (both from 1).
    """
    # Everything a parse allocates stays alive, so collections while it runs only cost time (a third at 20,000 nodes).
    collecting = gc.isenabled()
    gc.disable()
    try:
        parser = _Parser(text, path, constants or {})
        # Building a tensor may ask whether sizes are equal; the answer must not become a guard that merges two symbols.
        with parser.builder.symbols.env.suppress_guards():
            return parser.parse()
    finally:
        if collecting:
            gc.enable()


class _Parser(Scanner):
    def __init__(self, text: str, path: str, constants: Mapping[str, str]) -> None:
        super().__init__(text, path, constants)
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.inputs: list[GraphInput] = []
        self.outputs: list[GraphOutput] = []
        self.infos: dict[str, NodeInfo] = {}
        self.targets: dict[str, tuple[Any, Schema | None]] = {}

    # -- lines ---------------------------------------------------------------------------------------------------------

    def parse(self) -> StepGraph:
        kind, forward_outputs = None, 0
        unused: list[str] = []
        done = False
        for number, raw in enumerate(self.lines, 1):
            self.number, self.line, self.pos = number, raw, 0
            if not raw.strip() or raw.startswith("#"):
                continue
            if done:
                self.fail("text after the 'out' line")
            if kind is None:
                kind, forward_outputs = self.header()
                continue
            if raw.startswith("%"):
                self.node_line()
            elif self.accept("in "):
                self.input_line(kind)
            elif self.accept("symbol "):
                self.symbols(0, self.builder.symbols.define, raw)
                continue
            elif self.accept("unused "):
                unused.append(self.name())
            elif self.accept("out "):
                self.output_line(kind)
                done = True
            else:
                self.fail("expected '%name = ...', 'in', 'symbol', 'unused' or 'out'")
            if self.pos != len(self.line):
                self.fail(f"unexpected text {self.line[self.pos : self.pos + 20]!r}")
        if kind is None or not done:
            self.number, self.pos = len("\n".join(self.lines).rstrip("\n").split("\n")) + 1, 0
            self.fail("the text ends without an 'out' line" if kind else f"expected the header '{HEADER} ...'")
        if forward_outputs > len(self.outputs):
            self.number, self.pos = 1, 0
            self.fail(f"forward_outputs={forward_outputs}, but the graph has {len(self.outputs)} outputs")
        module = lazy_graph_module(self.attributes, self.graph)
        return StepGraph(module, kind, tuple(self.inputs), tuple(self.outputs), forward_outputs, tuple(unused))

    def header(self) -> tuple[GraphKind, int]:
        match = _HEADER.fullmatch(self.line)
        if match is None:
            self.fail(f"expected the header '{HEADER} KIND forward_outputs=N'")
        kinds = [k.value for k in GraphKind]
        if match.group(1) not in kinds:
            self.fail(f"unknown kind of graph {match.group(1)!r}.{nearest(match.group(1), kinds)}", match.start(1))
        return GraphKind(match.group(1)), int(match.group(2))

    def new_name(self) -> str:
        start = self.pos
        name = self.match(_NODE, "a node name such as %x").group(1)
        if name in self.nodes:
            self.fail(f"%{name} is defined twice", start)
        return name

    def create(self, name: str, start: int, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            self.fail(f"%{name} cannot name a node (a Python keyword or builtin)", start)
        self.nodes[name] = node
        return node

    def input_line(self, kind: GraphKind) -> None:
        start = self.pos
        name = self.new_name()
        target = self.name() if self.accept(" = ") else name
        self.expect(" : ")
        meta = self.typed(name)
        self.expect(" | ")
        word = self.match(_WORD, "the kind of an input")
        kinds = [k.value for k in InputKind]
        if word.group() not in kinds:
            self.fail(f"unknown kind of input {word.group()!r}.{nearest(word.group(), kinds)}", word.start())
        fqn, aliases = "", []
        if self.accept(" "):
            if not self.line.startswith(("(= ", "trainable", "; "), self.pos):
                fqn = self.name()
                self.accept(" ")
            if self.accept("(= "):
                aliases.append(self.name())
                while self.accept(", "):
                    aliases.append(self.name())
                self.expect(")")
                self.accept(" ")
        trainable = self.accept("trainable")
        what = GraphInput(name, InputKind(word.group()), fqn, tuple(aliases), trainable)
        self.inputs.append(what)
        node = self.create(name, start, "placeholder", target)
        if trainable:
            self.accept(" ")
        node.meta = {**meta, INFO: self.info() if self.accept("; ") else input_info(what, kind)}

    def node_line(self) -> None:
        name = self.new_name()
        self.expect(" = ")
        if self.accept("get_attr "):
            return self.constant_line(name)
        start = self.pos
        if self.line.startswith("!", start):
            self.lost()
        word = self.match(_TARGET, "an operator").group()
        target, schema = self.targets.get(word) or self.resolve(word, start)
        args, kwargs = self.arguments(schema)
        self.expect(" : ")
        meta = self.typed(name)
        self.expect(" | ")
        meta[INFO] = self.info()
        self.create(name, 0, "call_function", target, args, kwargs).meta = meta

    def constant_line(self, name: str) -> None:
        target = self.name()
        self.expect(" : ")
        meta = self.typed(name)
        self.expect(" = ")
        start = self.pos
        like = meta.get("val")
        try:
            if self.accept("fake"):
                value: Any = like
            elif digest := _DIGEST.match(self.line, start):
                self.pos = digest.end()
                value = self.builder.large_constant(like, digest.group(1))
            else:
                elements = self.value()
                if not isinstance(elements, list):
                    self.fail("expected the elements of a constant, sha256:... or fake", start)
                value = self.builder.inline_constant(like, elements)
        except BuildError as error:
            self.fail(str(error), start)
        if self.attributes.setdefault(target, value) is not value:
            self.same_constant(target, value, start)
        self.expect(" | ")
        meta[INFO] = self.info()
        self.create(name, 0, "get_attr", target).meta = meta

    def same_constant(self, target: str, value: Any, start: int) -> None:
        known = self.attributes[target]
        both = isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor)
        if not both or isinstance(value, FakeTensor) or not torch.equal(known, value):
            self.fail(f"the constant {target!r} is defined twice with different data", start)

    def output_line(self, kind: GraphKind) -> None:
        start = self.pos
        name = "output"
        if _NAMED_OUTPUT.match(self.line, start):
            name = self.new_name()
            self.expect(" = ")
        value = self.value()
        self.expect(" |")
        while self.accept(", " if self.outputs else " "):
            if not self.outputs and self.line.startswith("; ", self.pos):
                self.pos -= 1
                break
            word = self.match(_WORD, "the kind of an output").group()
            named = self.line.startswith(" ", self.pos) and not self.line.startswith(" ; ", self.pos)
            self.pos += named
            self.outputs.append(GraphOutput(word, self.name() if named else ""))
        count = len(value) if isinstance(value, (list, tuple)) else 1
        if count != len(self.outputs):
            self.fail(f"{count} output values, but {len(self.outputs)} are described")
        node = self.create(name, start, "output", "output", (value,))
        node.meta = {INFO: self.info() if self.accept(" ; ") else output_info(kind)}

    def info(self) -> NodeInfo:
        rest = self.line[self.pos :]
        known = self.infos.get(rest)
        if known is not None:
            self.pos = len(self.line)
            return known
        phase = self.match(_WORD, "a phase (f or b)")
        if phase.group() not in ("f", "b"):
            self.fail(f"unknown phase {phase.group()!r}: expected f or b", phase.start())
        self.expect(" ")
        role = self.match(_WORD, "a role")
        roles = [r.value for r in Role]
        if role.group() not in roles:
            self.fail(f"unknown role {role.group()!r}.{nearest(role.group(), roles)}", role.start())
        fqn = why = ""
        if self.line.startswith(" ", self.pos) and not self.line.startswith(" why ", self.pos):
            self.pos += 1
            fqn = self.name()
        if self.accept(" why "):
            why = self.string()
        found = NodeInfo(Role(role.group()), Phase(phase.group()), fqn, why)
        if self.pos == len(self.line):
            self.infos[rest] = found
        return found

    # -- calls ---------------------------------------------------------------------------------------------------------

    def resolve(self, word: str, start: int) -> tuple[Any, Schema | None]:
        if word.startswith("higher_order."):
            self.pos = start
            self.lost()
        try:
            target = resolve(word)
        except BuildError as error:
            self.fail(str(error), start)
        found = self.targets[word] = target, Schema.of(target)
        return found

    def arguments(self, schema: Schema | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.expect("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        first = True
        while not self.accept(")"):
            if not first:
                self.expect(", ")
            first = False
            start = self.pos
            keyword = _KEYWORD.match(self.line, start)
            if keyword is None:
                if kwargs:
                    self.fail("a positional argument after a keyword argument")
                if schema is not None and len(args) == len(schema.positional):
                    self.fail(f"too many arguments: the operator takes {len(args)} positional ones")
                args.append(self.value())
                continue
            self.pos = keyword.end()
            name = keyword.group(1)
            if schema is not None and name not in schema.names:
                self.fail(f"the operator has no argument {name!r}.{nearest(name, schema.names)}", start)
            if name in kwargs or (schema is not None and name in schema.positional[: len(args)]):
                self.fail(f"argument {name!r} is given twice", start)
            kwargs[name] = self.value()
        if schema is not None and len(args) < len(schema.required):
            given = {*schema.positional[: len(args)], *kwargs}
            missing = [name for name in schema.required if name not in given]
            if missing:
                self.fail(f"missing argument {missing[0]!r}", self.pos - 1)
        return tuple(args), kwargs
