"""Sizes and shapes of a graph's values, as sympy."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape as sympy sizes."""
    return tuple(size(s) for s in node.meta["val"].shape)


def size(value: Any) -> sympy.Expr:
    """A size or stride as sympy: a number, or the expression of a symbolic one."""
    if isinstance(value, torch.SymInt):
        return value.node.expr.xreplace({s: symbol(s.name) for s in value.node.expr.free_symbols})
    return sympy.Integer(int(value))


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a graph's symbolic size."""
    return sympy.Symbol(name, integer=True, positive=True)
