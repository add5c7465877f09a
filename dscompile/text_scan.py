"""The words, values and types of one line of graph text, read where they stand.

:class:`Scanner` holds a position in a line; its methods read one thing each and leave the position behind it, so an
error's column is simply the position. :mod:`dscompile.text_parse` builds lines and graphs on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import fx

from dscompile.errors import TextError, nearest
from dscompile.text_build import Builder, BuildError, dtype_of
from dscompile.text_symbols import SymbolError
from dscompile.text_values import PLAIN_NAME, WORDS, Opaque
from dscompile.torch_compat import FakeTensor

_NODE = re.compile(r"%([A-Za-z_]\w*)", re.ASCII)
_NUMBER = re.compile(r"-?\d+(\.\d*)?(?:[eE][-+]?\d+)?", re.ASCII)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SPECIAL = re.compile(r"!(-?[A-Za-z_]\w*)", re.ASCII)
_DEVICE = re.compile(r"@([a-z]\w*(?::\d+)?)", re.ASCII)
_TENSOR = re.compile(r"([A-Za-z]\w*)\[([^]]*)\]\{([^}]*)\}(?:\+(?:(\d+)|\{([^}]*)\}))?@([a-z]\w*(?::\d+)?)", re.ASCII)
_ALIAS = re.compile(r" ~%([A-Za-z_]\w*)((?:\.\d+)*)", re.ASCII)
_BYTES = re.compile(r" &(?:(\d+)|\{([^}]*)\})", re.ASCII)
_SYMBOLIC = re.compile(r"Sym(Int|Float|Bool)\(", re.ASCII)
_LOST = re.compile(r"!lost\(|= higher_order\.")
_KINDS = {"Int": int, "Float": float, "Bool": bool}
_LITERALS: dict[str, Any] = {"None": None, "True": True, "False": False}
_MAX_DEPTH = 60
_MAX_DIGITS = 4000


class Scanner:
    """A position in a text, the nodes defined above it, and readers of what may stand there.

    Every reader raises :class:`~dscompile.errors.TextError` at the exact line and column of what it cannot read.
    """

    def __init__(self, text: str, path: str, constants: Mapping[str, str]) -> None:
        """Stand before the first line of ``text``."""
        self.lines = text.split("\n")
        self.path = path
        self.builder = Builder(constants)
        self.nodes: dict[str, fx.Node] = {}
        self.tensor_types: dict[str, tuple[torch.dtype, Any, Any, Any, str]] = {}
        self.line = ""
        self.number = 0
        self.pos = 0
        self.depth = 0

    # -- errors and words ----------------------------------------------------------------------------------------------

    def fail(self, message: str, pos: int | None = None) -> NoReturn:
        """Raise a :class:`TextError` at the position, or at column ``pos`` (from 0)."""
        column = (self.pos if pos is None else pos) + 1
        raise TextError(message, line=self.number, column=column, path=self.path)

    def expect(self, word: str) -> None:
        """Step over ``word``, which must stand here."""
        if not self.line.startswith(word, self.pos):
            found = repr(self.line[self.pos : self.pos + 12]) if self.pos < len(self.line) else "the end of the line"
            self.fail(f"expected {word.strip()!r}, found {found}")
        self.pos += len(word)

    def accept(self, word: str) -> bool:
        """Step over ``word`` if it stands here."""
        if self.line.startswith(word, self.pos):
            self.pos += len(word)
            return True
        return False

    def match(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        """Step over what ``pattern`` matches, which must stand here."""
        found = pattern.match(self.line, self.pos)
        if found is None:
            self.fail(f"expected {what}")
        self.pos = found.end()
        return found

    def name(self) -> str:
        """A plain or quoted name."""
        if self.line.startswith('"', self.pos):
            return self.string()
        return self.match(PLAIN_NAME, "a name").group()

    def string(self) -> str:
        """A quoted string, in JSON's spelling."""
        start = self.pos
        try:
            return str(json.loads(self.match(_STRING, "a string").group()))
        except json.JSONDecodeError:
            self.fail("not a valid string", start)

    def symbols(self, start: int, make: Any, *args: Any) -> Any:
        """Call a reader of symbolic sizes on text that begins at column ``start``."""
        try:
            return make(*args)
        except SymbolError as error:
            self.fail(str(error), start + error.offset)

    # -- values --------------------------------------------------------------------------------------------------------

    def value(self) -> Any:
        """One argument, at any depth."""
        char = self.line[self.pos : self.pos + 1]
        if char == "%":
            return self.operand()
        if char == "-" or char.isdigit():
            return self.numeral()
        if char in ("[", "(", "{"):
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                self.fail("nested too deeply")
            found = self.mapping() if char == "{" else self.sequence(char)
            self.depth -= 1
            return found
        if char == '"':
            return self.string()
        if char == "@":
            return self.device(self.match(_DEVICE, "a device"))
        if char == "!":
            return self.special()
        if self.accept("..."):
            return Ellipsis
        word = self.match(_WORD, "a value")
        if word.group() in _LITERALS:
            return _LITERALS[word.group()]
        if word.group() == "slice":
            self.expect("(")
            parts = [self.value()]
            for _ in range(2):
                self.expect(", ")
                parts.append(self.value())
            self.expect(")")
            return slice(*parts)
        self.pos = word.start()
        if _SYMBOLIC.match(self.line, self.pos):
            return self.symbolic()
        self.fail(f"unknown value {word.group()!r} (a node is written %{word.group()})")

    def operand(self) -> fx.Node:
        """A node that is defined above."""
        match = self.match(_NODE, "a node name such as %x")
        node = self.nodes.get(match.group(1))
        if node is None:
            name = match.group(1)
            self.fail(f"%{name} is not defined above this line.{nearest(name, self.nodes)}", match.start())
        return node

    def numeral(self) -> int | float:
        """An int, or a float if there is a point or an exponent."""
        match = self.match(_NUMBER, "a number")
        word = match.group()
        if len(word) > _MAX_DIGITS:
            self.fail("this number is too long", match.start())
        return int(word) if word.lstrip("-").isdigit() else float(word)

    def sequence(self, opening: str) -> list[Any] | tuple[Any, ...]:
        """``[a, b]``, ``(a, b)``, ``(a,)``, ``()`` or ``[]``."""
        closing = "]" if opening == "[" else ")"
        start = self.pos
        self.pos += 1
        parts: list[Any] = []
        comma = False
        while not self.accept(closing):
            if parts and not comma:
                self.expect(", ")
            parts.append(self.value())
            comma = opening == "(" and len(parts) == 1 and self.accept(",")
            if comma and not self.line.startswith(")", self.pos):
                self.expect(" ")
        if opening == "[":
            return parts
        if len(parts) == 1 and not comma:
            self.fail("a tuple of one is written (x,)", start)
        return tuple(parts)

    def mapping(self) -> dict[Any, Any]:
        """``{"a": 1, "b": %x}``."""
        self.pos += 1
        parts: dict[Any, Any] = {}
        while not self.accept("}"):
            if parts:
                self.expect(", ")
            start = self.pos
            key = self.value()
            if not isinstance(key, (str, int, float, bool, type(None))) or key in parts:
                self.fail("a key must be a string or number, and given once", start)
            self.expect(": ")
            parts[key] = self.value()
        return parts

    def special(self) -> Any:
        """``!f32``, ``!nan``, ``!complex(1.0, 2.0)``."""
        match = self.match(_SPECIAL, "a word such as !f32")
        word = match.group(1)
        if word == "lost":
            self.pos = match.start()
            self.lost()
        if word == "complex":
            self.expect("(")
            real = self.value()
            self.expect(", ")
            imaginary = self.value()
            self.expect(")")
            if type(real) is not float or type(imaginary) is not float:
                self.fail("the parts of !complex must be floats", match.start())
            return complex(real, imaginary)
        if word not in WORDS:
            self.fail(f"unknown word '!{word}'.{nearest(word, WORDS)}", match.start())
        return WORDS[word]

    def symbolic(self) -> Any:
        """``SymInt(s0)``, ``SymFloat(...)``, ``SymBool(...)``."""
        match = self.match(_SYMBOLIC, "SymInt(...)")
        start, depth = match.end(), 1
        while depth and self.pos < len(self.line):
            depth += {"(": 1, ")": -1}.get(self.line[self.pos], 0)
            self.pos += 1
        if depth:
            self.fail("expected ')'")
        text = self.line[start : self.pos - 1]
        return self.symbols(start, self.builder.symbols.number, text, _KINDS[match.group(1)])

    def device(self, match: re.Match[str]) -> torch.device:
        """The device that a match of ``@cpu`` names."""
        try:
            return torch.device(match.group(1))
        except RuntimeError:
            self.fail(f"unknown device {match.group(1)!r}", match.start())

    def lost(self) -> NoReturn:
        """Refuse a graph that holds something text cannot rebuild, and say how many."""
        count = sum(bool(_LOST.search(line)) for line in self.lines)
        self.fail(
            f"this graph holds {count} value(s) that text cannot rebuild (higher-order operators, Python objects); "
            "this is the first. It can be read and compared, but not run from text"
        )

    # -- types ---------------------------------------------------------------------------------------------------------

    def typed(self, name: str) -> dict[str, Any]:
        """The metadata that a type says: empty for ``?`` (no value is known)."""
        return {} if self.accept("?") else {"val": self.type(name, [])}

    def type(self, name: str, above: list[Any]) -> Any:
        """The fake value that a type describes. ``above``: the tuples it stands in, for ``~%name.0``."""
        char = self.line[self.pos : self.pos + 1]
        if char in ("(", "["):
            return self.tuple_type(name, above)
        tensor = _TENSOR.match(self.line, self.pos)
        if tensor is not None:
            return self.tensor(tensor, name, above)
        if _SYMBOLIC.match(self.line, self.pos):
            return self.symbolic()
        start = self.pos
        if self.accept("!opaque("):
            kind = self.string()
            self.expect(")")
            return Opaque(kind)
        word = self.match(_WORD, "a type").group()
        if word == "None":
            return None
        if word not in ("int", "float", "bool"):
            shape = self.line.startswith("[", self.pos)
            kind = f"expected DTYPE[SIZES]{{STRIDES}}@DEVICE after {word!r}" if shape else f"unknown type {word!r}"
            self.fail(kind, start)
        self.expect("(")
        value = self.value()
        self.expect(")")
        if type(value).__name__ != word:
            self.fail(f"expected a value of type {word}", start)
        return value

    def tuple_type(self, name: str, above: list[Any]) -> Any:
        """The types of several values: ``(f32[4]{1}@cpu, None)``."""
        opening = self.line[self.pos]
        self.pos += 1
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.fail("nested too deeply")
        closing = ")" if opening == "(" else "]"
        parts: list[Any] = []
        while not self.accept(closing):
            if parts:
                self.expect(", ")
            parts.append(self.type(name, [*above, parts]))
            if opening == "(" and len(parts) == 1:
                self.pos += self.line.startswith(",)", self.pos)
        self.depth -= 1
        return parts if opening == "[" else tuple(parts)

    def tensor(self, match: re.Match[str], name: str, above: list[Any]) -> FakeTensor:
        """``f32[8, 4]{4, 1}+8@cpu`` with ``~%x`` or ``&64``."""
        start, self.pos = self.pos, match.end()
        try:
            known = self.tensor_types.get(match.group())
            if known is None:
                known = self.tensor_types[match.group()] = self.tensor_type(match)
            dtype, size, stride, shift, device = known
            base = self.alias(name, above)
            nbytes = None
            if base is None and (given := _BYTES.match(self.line, self.pos)):
                self.pos = given.end()
                group = 1 if given.group(1) is not None else 2
                nbytes = self.size(given.group(group), given.start(group))
            return self.builder.tensor(dtype, size, stride, shift, device, base, nbytes)
        except BuildError as error:
            self.fail(str(error), start)

    def tensor_type(self, match: re.Match[str]) -> tuple[torch.dtype, Any, Any, Any, str]:
        """(dtype, sizes, strides, offset, device) of a tensor type, without its storage."""
        name, sizes, strides, offset, symbolic_offset, device = match.groups()
        dtype = dtype_of(name)
        size = self.sizes(sizes, match.start(2))
        stride = self.sizes(strides, match.start(3))
        shift = self.size(offset or "0", match.start(4))
        if symbolic_offset is not None:
            shift = self.size(symbolic_offset, match.start(5))
        return dtype, size, stride, shift, device

    def alias(self, name: str, above: list[Any]) -> FakeTensor | None:
        """The tensor whose storage ``~%x.0`` names, or None if nothing is named."""
        match = _ALIAS.match(self.line, self.pos)
        if match is None:
            return None
        self.pos = match.end()
        holder, path = match.group(1), [int(p) for p in match.group(2).split(".")[1:] if len(p) < 9]
        value: Any
        if holder == name and above:
            value = above[0]
        else:
            node = self.nodes.get(holder)
            if node is None:
                self.fail(f"%{holder} is not defined above this line.{nearest(holder, self.nodes)}", match.start() + 2)
            value = node.meta.get("val")
        for index in path:
            value = value[index] if isinstance(value, (list, tuple)) and index < len(value) else None
        if not isinstance(value, FakeTensor):
            self.fail(f"~%{holder}{match.group(2)} does not name a tensor", match.start() + 1)
        return value

    def sizes(self, text: str, start: int) -> tuple[Any, ...]:
        """Comma-separated sizes, the first at column ``start``."""
        if not text:
            return ()
        parts = _split_sizes(text) if "(" in text else text.split(", ")
        found = []
        for part in parts:
            found.append(
                int(part) if part.isdecimal() and part.isascii() and len(part) < 19 else self.size(part, start)
            )
            start += len(part) + 2
        return tuple(found)

    def size(self, text: str, start: int) -> Any:
        """One size, at column ``start``."""
        return self.symbols(start, self.builder.symbols.size, text)


def _split_sizes(text: str) -> list[str]:
    """Split at the ``", "`` that stand outside parentheses."""
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0 and text.startswith(", ", i):
            parts.append(text[begin:i])
            begin = i + 2
    return [*parts, text[begin:]]
