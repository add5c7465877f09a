"""fp32 matrix products on CPU: our kernels on AMX tiles or PyTorch's, whichever a measurement here favours."""

from __future__ import annotations

import enum
import functools
import time
import zlib
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dscompile.codegen.cpu.builder import gemm_kernel
from dscompile.codegen.cpu.choice import gain
from dscompile.codegen.cpu.gemm_kernel import GemmKernel
from dscompile.config import Config
from dscompile.effects import argument
from dscompile.gemm_ops import plain_product
from dscompile.loss_ops import PRODUCTS as LOSS_PRODUCTS
from dscompile.loss_ops import rows_of_chunk
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
"""How much faster a kernel must be than PyTorch's product for ``auto`` to choose it."""

ACCURACY = 2.0
"""The kernel's largest error may be this many times that of PyTorch's product (against fp64)."""


class Route(enum.Enum):
    """What runs a product, as the report names it."""

    PYTORCH = "PyTorch"
    TILES = "AMX tiles"
    INTEGERS = "AMX tiles of int8"


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
        if node.target is ours.linear_cross_entropy.default:
            lines.update(_choose_loss(node, config.gemm))
        if node.target not in PRODUCTS or (values := _values(node)) is None:
            continue
        a, b, bias = values
        shape = _shape(a, b, bias)
        scaled = any(argument(node, i, name, 1) != 1 for i, name in ((3, "beta"), (4, "alpha")))
        route, reason = (Route.PYTORCH, "it is scaled") if scaled else _choice(shape, config.gemm)
        lines[f"{shape or 'symbolic'}: {route.value} ({reason})"] += 1
        if route is not Route.PYTORCH:
            _replace(node, _site(node) if route is Route.INTEGERS else -1)
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


def _choose_loss(node: fx.Node, option: str) -> list[str]:
    """Tell the fused loss which of its products run on our kernel; a line for each (fp32 on CPU only)."""
    x, weight = (argument(node, i, name).meta["val"] for i, name in ((0, "input"), (1, "weight")))
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return []
    shapes: list[Shape | None] = [None] * 3
    if not free_symbol_names((x, weight)):
        (vocabulary, width), rows = weight.shape, rows_of_chunk(x.shape[0], weight.shape[0], x.itemsize)
        chunk = torch.empty(rows, width, device="meta")
        gradient = torch.empty(rows, vocabulary, device="meta")
        bias = argument(node, 2, "bias")
        shapes = [
            _shape(chunk, weight.t(), None if bias is None else bias.meta["val"]),
            _shape(gradient, weight, None),
            _shape(gradient.t(), chunk, None),
        ]
    needed = len(shapes) if argument(node, 6, "gradients") else 1
    choices = [_choice(shape, option, integers=False) for shape in shapes[:needed]]
    tiles = [route is Route.TILES for route, _ in choices] + [False] * (len(shapes) - needed)
    node.kwargs = {**node.kwargs, "tiles": tiles}
    return [
        f"{shape or 'symbolic'}, {name} in the fused loss: {route.value} ({reason})"
        for name, shape, (route, reason) in zip(LOSS_PRODUCTS, shapes, choices, strict=False)
    ]


def _choice(shape: Shape | None, option: str, integers: bool = True) -> tuple[Route, str]:
    """(what runs a product, why). ``integers``: the kernel of integers can be told to."""
    if option in ("default", "onednn"):
        return Route.PYTORCH, f"gemm={option!r}"
    if option == "auto" and shape is None:
        return Route.PYTORCH, "its shape is symbolic"
    if option == "auto" and shape is not None and shape.batch * shape.m * shape.k * shape.n < SMALLEST:
        return Route.PYTORCH, "small"
    build = gemm_kernel()
    if build.kernel is None:
        return Route.PYTORCH, build.reason
    if option == "amx_int8" and integers:
        if build.kernel.integers:
            return Route.INTEGERS, "gemm='amx_int8'"
        return Route.TILES, "gemm='amx_int8', but this processor has no AMX tiles of int8"
    if option != "auto" or shape is None:
        return Route.TILES, f"gemm={option!r}"
    return measured(shape, torch.get_num_threads())


def _site(node: fx.Node) -> int:
    """A number for a call site, the same in every process."""
    return zlib.crc32(f"{node.graph}{node.name}".encode())


def _replace(node: fx.Node, site: int) -> None:
    """Put our operator in the place of PyTorch's."""
    target: OpOverload = ours.matmul.default
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, (*_operands(node), site))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


@functools.cache
def measured(shape: Shape, threads: int) -> tuple[Route, str]:
    """Whether the tiles are fp32-accurate and faster for a class; ``threads`` is part of what was measured.

    The tiles of int8, faster still, are not chosen here: their bits depend on what a site met before, so a resumed run
    would not go on with the same losses, and they are exact by norms of rows and columns, not by elements.
    """
    kernel = gemm_kernel().kernel
    assert kernel is not None, "the caller saw one"
    with no_modes(), torch.no_grad(), no_autocast():
        faster, reason = _speed(kernel, shape)
    return Route.TILES if faster >= GAIN else Route.PYTORCH, reason


def _speed(kernel: GemmKernel, shape: Shape) -> tuple[float, str]:
    """(the kernel's speed over PyTorch's, or 0 where it is not accurate; the same in words)."""
    a, b, bias, out = _example(shape, CHECKED)
    exact = torch.matmul(a.double(), b.double()) + (0 if bias is None else bias.double())
    if not kernel.product(a, b, bias, out):
        return 0.0, "the kernel refused the probe"
    error = float((out - exact).abs().max())
    theirs = float((plain_product(a, b, bias, out) - exact).abs().max())
    if error > ACCURACY * max(theirs, 1e-30):
        return 0.0, f"not fp32-accurate here: error {error / max(theirs, 1e-30):.1f} x PyTorch's"
    a, b, bias, out = _example(shape, LONGEST)
    # CPU seconds: both use all threads alike, and wall time would vary with whatever else the machine does
    plain, tiles = (lambda: plain_product(a, b, bias, out)), (lambda: kernel.product(a, b, bias, out))
    faster = gain(plain, tiles, time.process_time)
    return faster, f"the kernel runs at {faster:.2f} x PyTorch's speed"


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
