"""Which FX nodes are reductions of a table of rows and columns, and over what."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sympy
from torch import fx

from dscompile.codegen.tile.indexing import product
from dscompile.codegen.tile.schedule import PERSISTENT
from dscompile.torch_compat import OpOverload

ONE_PROGRAM = 16384
"""Most elements of a tensor that a single program reduces to a scalar; a larger one takes partial results."""


PIECE = 16
"""Fewest adjacent elements that a row may consist of."""

SMALL = 1 << 18
"""Elements of a tensor that stays in a GPU's second-level cache (1 MiB in fp32; the smallest target has 4)."""


class Along(StrEnum):
    """What a reduction runs over."""

    ROW = "row"
    COLUMN = "column"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Reduction:
    """``how`` over the dimensions ``dims`` of a table of ``rows`` x ``cols``, times ``scale`` and divided by ``count``.

    Over a ``ROW`` one program sees all of it. Over a ``COLUMN``, or over ``ALL`` elements, every program of one kernel
    sees a part, and a second, tiny kernel finishes. ``inner``: see :class:`dscompile.codegen.tile.ir.Space`.
    """

    node: fx.Node
    how: str
    along: Along
    dims: frozenset[int]
    keepdim: bool
    rows: sympy.Expr
    cols: sympy.Expr
    scale: float = 1.0
    count: sympy.Expr = sympy.S.One
    square: bool = False
    root: bool = False
    inner: sympy.Expr | None = None

    @property
    def partial(self) -> bool:
        """Whether it takes two kernels."""
        return self.along is not Along.ROW


_HOW = {"sum": "sum", "mean": "sum", "amax": "max", "amin": "min", "any": "any", "linalg_vector_norm": "sum"}


def reduction(node: fx.Node) -> Reduction | str | None:
    """What a node reduces; None if it is no reduction, a reason if it is one that the language does not have."""
    name = operator_name(node)
    if name not in _HOW:
        return None
    source: Any = node.args[0]
    value = source.meta["val"]
    shape = list(value.shape)
    if name == "linalg_vector_norm" and node_argument(node, 1, "ord", 2) != 2:
        return "only the 2-norm is a tile reduction"
    position = 2 if name == "linalg_vector_norm" else 1
    given = node_argument(node, position, "dim", None)
    dims = [given] if isinstance(given, int) else list(given or range(len(shape)))
    reduced = frozenset(d % max(len(shape), 1) for d in dims)
    keepdim = bool(node_argument(node, position + 1, "keepdim", False))
    kept = [k for k in range(len(shape)) if k not in reduced and shape[k] != 1]
    gone = [k for k in reduced if shape[k] != 1]
    numel = product(shape)
    along, rows, cols = Along.ROW, product([shape[k] for k in kept]), product([shape[k] for k in gone])
    inner: sympy.Expr | None = None
    if not kept and (not numel.is_Integer or int(numel) > ONE_PROGRAM):
        along, rows, cols = Along.ALL, sympy.Integer(1), numel
    elif kept and gone and max(gone) < min(kept):
        along, rows, cols = Along.COLUMN, cols, rows
    elif held_around(shape, reduced):
        inner = product([shape[k] for k in gone if k > max(kept)])
    elif kept and gone and max(kept) > min(gone):
        return "it reduces a dimension between others"
    scale, count = 1.0, sympy.Integer(1)
    if name == "mean":
        count = rows if along is Along.COLUMN else cols
        if count.is_Integer:
            scale = 1.0 / int(count) if int(count) else math.nan
            count = sympy.Integer(1)
    norm = name == "linalg_vector_norm"
    return Reduction(node, _HOW[name], along, reduced, keepdim, rows, cols, scale, count, norm, norm, inner)


def held_around(shape: Sequence[Any], dims: Collection[int]) -> bool:
    """Whether one program holds all that is reduced around kept dimensions: a channel of a batch norm.

    Memory is read in pieces of the trailing dimensions; shorter ones than :data:`PIECE` would waste what is fetched,
    unless all of it stays in cache.
    """
    kept = [k for k in range(len(shape)) if k not in dims and shape[k] != 1]
    gone = [k for k in dims if shape[k] != 1]
    if not kept or not all(isinstance(shape[k], int) for k in gone):
        return False
    before, after = [k for k in gone if k < min(kept)], [k for k in gone if k > max(kept)]
    if not before or not after or len(before) + len(after) < len(gone):
        return False
    pieces = math.prod(shape[k] for k in after)
    numel = math.prod(shape) if all(isinstance(n, int) for n in shape) else SMALL + 1
    return (pieces >= PIECE or numel <= SMALL) and 0 < pieces * math.prod(shape[k] for k in before) <= PERSISTENT


def why_no_scan(node: fx.Node) -> str:
    """Why a ``cumsum`` is none of the tile language ("" if it is): a program holds the row that it adds up."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    if not shape or node_argument(node, 1, "dim", 0) % len(shape) != len(shape) - 1:
        return f"{node.target} over another dimension than the last is not a tile operator"
    if not isinstance(shape[-1], int) or shape[-1] > PERSISTENT:
        return f"{node.target}: a row of {shape[-1]} is not held by one program"
    return ""


def operator_name(node: fx.Node) -> str:
    """``add`` for ``aten.add.Tensor``; "" for anything that is not an operator of aten or prims."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return ""
    namespace, _, name = target._schema.name.partition("::")
    return name if namespace in ("aten", "prims") else ""


def node_argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
