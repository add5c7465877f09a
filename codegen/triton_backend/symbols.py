"""Symbolic sizes of a region: where a program finds their numbers, and examples of them for costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from dscompile.codegen.tile.schedule import Hints
from dscompile.codegen.tile.sizes import size
from dscompile.codegen.triton_backend.body import index_text
from dscompile.errors import UnsupportedError
from dscompile.torch_compat import size_hint


class Source(NamedTuple):
    """How a program gets a symbol's number: Python text, and the input that it reads."""

    text: str
    reads: str


def hints(graph: fx.Graph) -> Hints:
    """The example behind every symbolic size that stands by itself, by which costs are estimated."""
    found: dict[sympy.Symbol, int] = {}
    for _, _, value in _places(graph):
        expr = size(value)
        if expr.is_Symbol:
            found[expr] = size_hint(value)
    return found


def sources(graph: fx.Graph) -> dict[str, Source]:
    """For each symbol, an input of ``graph`` that is it or has a dimension or stride of it."""
    found: dict[str, Source] = {}
    for node, text, value in _places(graph):
        expr = size(value)
        if expr.is_Symbol:
            found.setdefault(expr.name, Source(text, node.name))
    return found


def text_of(value: Any) -> str:
    """A size or stride as Python, with symbols as variables."""
    return index_text(size(value))


def names_of(*values: Any) -> list[str]:
    """The symbols in sizes, strides and expressions."""
    exprs = [v if isinstance(v, sympy.Basic) else size(v) for v in values]
    return sorted({s.name for e in exprs for s in e.free_symbols})


def known(names: set[str], graph: fx.Graph) -> dict[str, Source]:
    """The sources of the symbols ``names``.

    Raises:
        UnsupportedError: no input of the region has one of them.
    """
    found = sources(graph)
    if missing := sorted(names - set(found)):
        raise UnsupportedError(f"no input of the region is, or has a dimension of, the symbolic size {missing[0]}")
    return {name: found[name] for name in sorted(names)}


def _places(graph: fx.Graph) -> Iterator[tuple[fx.Node, str, torch.SymInt]]:
    """Every symbolic number that an input brings: by itself first, then as a dimension."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            yield node, node.name, value
    for node in inputs:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for what, sizes in (("shape[{}]", value.shape), ("stride({})", value.stride())):
            for k, n in enumerate(sizes):
                if isinstance(n, torch.SymInt):
                    yield node, f"{node.name}.{what.format(k)}", n
