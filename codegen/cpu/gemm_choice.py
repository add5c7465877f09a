"""fp32 matrix products on CPU: our kernel on AMX tiles or PyTorch's, whichever a measurement here favours."""

from __future__ import annotations

import functools
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dscompile.codegen.cpu.builder import gemm_kernel
from dscompile.codegen.cpu.choice import gain
from dscompile.config import Config
from dscompile.effects import argument
from dscompile.gemm_ops import plain_product
from dscompile.torch_compat import OpOverload, free_symbol_names, no_autocast, no_modes

aten = torch.ops.aten
ours = torch.ops.dscompile

PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
"""What can be replaced."""

SMALLEST = 2**27
"""Below so many multiplications (512 cubed) the gain is small, and not worth building the kernel for."""

LONGEST = 1024
"""Longer sides are measured at this length: the ratio changes little beyond."""

CHECKED = 256
"""Sides of at most this length are compared with fp64."""

GAIN = 1.1
"""How much faster the kernel must be for ``auto`` to choose it."""

ACCURACY = 2.0
"""The kernel's largest error may be this many times that of PyTorch's product (against fp64)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A class of products: sides (at most :data:`LONGEST`), and whether an operand lies transposed."""

    batch: int
    m: int
    k: int
    n: int
    a_transposed: bool
    b_transposed: bool
    bias: bool

    def __str__(self) -> str:
        """As ``[512, 64]^T @ [64, 512] + bias``."""
        left = f"[{self.k}, {self.m}]^T" if self.a_transposed else f"[{self.m}, {self.k}]"
        right = f"[{self.n}, {self.k}]^T" if self.b_transposed else f"[{self.k}, {self.n}]"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}{left} @ {right}{' + bias' if self.bias else ''}"


def choose_gemm(module: fx.GraphModule, config: Config) -> list[str]:
    """Replace PyTorch's fp32 products in a region's module by ours where that is chosen.

    Returns:
        One line for each class of products: how many there are, what runs them, and why.
    """
    lines: Counter[str] = Counter()
    for node in list(module.graph.nodes):
        if node.target not in PRODUCTS or (values := _values(node)) is None:
            continue
        a, b, bias = values
        shape = _shape(a, b, bias)
        kernel, reason = _choice(node, shape, config.gemm)
        lines[f"{shape or 'symbolic'}: {'AMX tiles' if kernel else 'PyTorch'} ({reason})"] += 1
        if kernel:
            _replace(node)
    module.recompile()
    return [f"{count} x {line}" for line, count in lines.items()]


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    if node.target is aten.addmm.default:
        return argument(node, 1, "mat1"), argument(node, 2, "mat2"), argument(node, 0, "self")
    return argument(node, 0, "self"), argument(node, 1, "mat2"), None


def _values(node: fx.Node) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The operands' fake values; None where this is no fp32 product on CPU."""
    a, b, bias = _operands(node)
    values = [a.meta["val"], b.meta["val"], *([] if bias is None else [bias.meta["val"]])]
    if any(x.dtype is not torch.float32 or x.device.type != "cpu" for x in values):
        return None
    return values[0], values[1], values[2] if bias is not None else None


def _shape(a: Tensor, b: Tensor, bias: Tensor | None) -> Shape | None:
    """The class of a product; None if its shape is symbolic."""
    if free_symbol_names((a, b)):
        return None
    batch = a.shape[0] if a.dim() == 3 else 1
    m, k, n = (min(int(side), LONGEST) for side in (a.shape[-2], a.shape[-1], b.shape[-1]))
    a_transposed, b_transposed = (bool(x.stride(-1) != 1 and x.stride(-2) == 1) for x in (a, b))
    return Shape(min(int(batch), 64), m, k, n, a_transposed, b_transposed, bias is not None)


def _choice(node: fx.Node, shape: Shape | None, option: str) -> tuple[bool, str]:
    """(whether our kernel runs a product, why)."""
    if option in ("default", "onednn"):
        return False, f"gemm={option!r}"
    if any(argument(node, i, name, 1) != 1 for i, name in ((3, "beta"), (4, "alpha"))):
        return False, "it is scaled"
    if option == "auto" and shape is None:
        return False, "its shape is symbolic"
    if option == "auto" and shape is not None and shape.batch * shape.m * shape.k * shape.n < SMALLEST:
        return False, "small"
    if reason := gemm_kernel().reason:
        return False, reason
    if option == "amx" or shape is None:
        return True, "gemm='amx'"
    return measured(shape, torch.get_num_threads())


def _replace(node: fx.Node) -> None:
    """Put our operator in the place of PyTorch's."""
    target: OpOverload = ours.matmul.default
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, _operands(node))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


@functools.cache
def measured(shape: Shape, threads: int) -> tuple[bool, str]:
    """Whether the kernel is fp32-accurate and faster for a class; ``threads`` is part of what was measured."""
    kernel = gemm_kernel().kernel
    assert kernel is not None, "the caller saw one"
    with no_modes(), torch.no_grad(), no_autocast():
        a, b, bias, out = _example(shape, CHECKED)
        exact = torch.matmul(a.double(), b.double()) + (0 if bias is None else bias.double())
        if not kernel.product(a, b, bias, out):
            return False, "the kernel refused the probe"
        error = float((out - exact).abs().max())
        theirs = float((plain_product(a, b, bias, out) - exact).abs().max())
        if error > ACCURACY * max(theirs, 1e-30):
            return False, f"not fp32-accurate here: error {error / max(theirs, 1e-30):.1f} x PyTorch's"
        a, b, bias, out = _example(shape, LONGEST)
        # CPU seconds: both use all threads alike, and wall time would vary with whatever else the machine does
        plain, tiles = (lambda: plain_product(a, b, bias, out)), (lambda: kernel.product(a, b, bias, out))
        faster = gain(plain, tiles, time.process_time)
    return faster >= GAIN, f"the kernel runs at {faster:.2f} x PyTorch's speed"


def _example(shape: Shape, longest: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Random operands of a class with sides of at most ``longest``, and where the result goes."""
    generator = torch.Generator().manual_seed(0)
    batch, m, k, n = (min(side, longest) for side in (shape.batch, shape.m, shape.k, shape.n))
    one = shape.batch == 1

    def operand(rows: int, columns: int, transposed: bool) -> Tensor:
        size = (batch, columns, rows) if transposed else (batch, rows, columns)
        x = torch.randn(size, generator=generator)
        x = x.mT if transposed else x
        return x[0] if one else x

    bias = torch.randn(n, generator=generator) if shape.bias else None
    out = torch.empty((m, n) if one else (batch, m, n))
    return operand(m, k, shape.a_transposed), operand(k, n, shape.b_transposed), bias, out
