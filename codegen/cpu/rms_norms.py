"""Finds the gradients of RMSNorm in a region, where they are elementwise operators and sums, not one operator.

Autograd differentiates ``x * rsqrt(mean(x**2) + eps) * weight`` operator by operator, so the gradient of the input is

    grad * weight * rstd  -  sum(grad * weight * x) / 2 * rstd**3 / columns * 2 * x

and that of the weight a sum down the columns of ``grad * (x * rstd)``. Every module that computes RMSNorm in this way
is found, whatever its name, with casts between 16 and 32 bits anywhere on the way: the kernel computes in fp32 and
rounds what it returns. A model that computes it otherwise keeps Inductor's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.detach.default, aten.alias.default)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """One RMSNorm's gradients in a graph.

    Attributes:
        grad, x, rstd, weight: what they are computed from: ``[..., n]``, ``[..., n]``, ``[..., 1]``, ``[n]``; of 16
            bits where they were widened from these.
        normal: what the weight's gradient multiplies ``grad`` by; None if it is ``x * rstd``, computed here.
        residual: another gradient that the input's is added to, known before; or None.
        dx: the node of the input's gradient, ``residual`` included, which has its dtype.
        dweight: the sum over all but the last dimension, which keeps these as ones or not.
    """

    grad: fx.Node
    x: fx.Node
    rstd: fx.Node
    weight: fx.Node
    normal: fx.Node | None
    residual: fx.Node | None
    dx: fx.Node
    dweight: fx.Node


def rms_norms(graph: fx.Graph) -> Iterator[RmsNorm]:
    """All of a region's, in order. Each may be replaced before the next is looked for."""
    for cube in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
        norm = _match(cube)
        if norm is not None and not _depends(norm):
            yield norm


def _depends(norm: RmsNorm) -> bool:
    """Whether something that the norm's gradients are computed from is computed from one of these."""
    first = min(norm.dx, norm.dweight)
    stack = [n for n in (norm.grad, norm.x, norm.rstd, norm.weight, norm.normal) if n is not None]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or node < first:
            continue
        if node in (norm.dx, norm.dweight):
            return True
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False


def _match(cube: fx.Node) -> RmsNorm | None:
    """The norm whose ``rstd**3`` this is; None if it is something else."""
    if cube.args[1] != 3 or len(cube.users) != 1:
        return None
    rstd = _through(cube.args[0])
    (product,) = cube.users
    half = _other(product, cube)
    if half is None or half.target is not aten.mul.Scalar or half.args[1] != -0.5 or len(half.users) != 1:
        return None
    along = half.args[0]
    if not isinstance(along, fx.Node) or not _sums(along, last=True) or len(along.users) != 1:
        return None
    inner = along.args[0]
    second = _second_term(product)
    if second is None or not isinstance(inner, fx.Node) or len(inner.users) != 1:
        return None
    term, x = second
    wide = _other(inner, x)
    scaled = _uncast(wide)
    if wide is None or len(wide.users) != 2 or scaled is None or scaled.target is not aten.mul.Tensor:
        return None
    weights = [n for n in scaled.all_input_nodes if _shape(n) == _shape(x)[-1:]]
    if len(weights) != 1 or len(_shape(x)) < 2:
        return None
    grad = _other(scaled, weights[0])
    (first,) = [user for user in wide.users if user is not inner]
    if grad is None or _other(first, wide) not in (rstd, cube.args[0]) or _shape(grad) != _shape(x):
        return None
    if _shape(rstd) != (*_shape(x)[:-1], 1):
        return None
    sums = _input_gradient(first, term)
    weighted = _weight_gradient(grad, scaled, _shape(x))
    if sums is None or weighted is None:
        return None
    dweight, normal = weighted
    product = _uncast(normal, shared=True)
    computed = product.target is aten.mul.Tensor and {_through(n) for n in product.args} == {_through(x), rstd}
    dx, x, residual = _narrowed(*sums, x)
    return RmsNorm(_narrow(grad), x, rstd, weights[0], None if computed else _narrow(normal), residual, dx, dweight)


def _narrowed(dx: fx.Node, residual: fx.Node | None, x: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """``(dx, x, residual)``, of 16 bits where they are, with the addition that follows the rounding."""
    if residual is not None or len(dx.users) != 1:
        return dx, x, residual
    (cast,) = dx.users
    if _cast_of(cast) is not dx or _dtype(cast).itemsize >= _dtype(dx).itemsize:
        return dx, x, None
    source = _narrow(x)
    added = None if len(cast.users) != 1 else _other(next(iter(cast.users)), cast, aten.add.Tensor)
    if added is None or _shape(added) != _shape(cast) or _dtype(added) is not _dtype(cast):
        return cast, source, None
    return next(iter(cast.users)), source, added


def _second_term(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``product / columns * 2 * x``, and ``x``."""
    node, columns = product, None
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.div.Scalar and columns is None:
            columns = user.args[1]
        elif user.target not in _VIEWS:
            break
        node = user
    doubled = None if len(node.users) != 1 else _other(next(iter(node.users)), node)
    if doubled is None or doubled.target is not aten.mul.Scalar or doubled.args[1] != 2:
        return None
    power = doubled.args[0]
    if isinstance(power, fx.Node) and power.target is aten.pow.Tensor_Scalar and power.args[1] == 1:
        power = power.args[0]
    if not isinstance(power, fx.Node) or columns != (_shape(power) or (None,))[-1] or _shape(node) != _shape(power):
        return None
    return next(iter(node.users)), power


def _input_gradient(first: fx.Node, term: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """The node that adds both terms, and what was added to the first before."""
    if len(first.users) != 1 or len(term.users) != 1:
        return None
    (total,) = term.users
    before = _other(total, term, aten.add.Tensor)
    if before is first:
        return total, None
    residual = None if before is None or len(before.users) != 1 else _other(before, first, aten.add.Tensor)
    return None if residual is None or _shape(residual) != _shape(first) else (total, residual)


def _weight_gradient(grad: fx.Node, scaled: fx.Node, shape: tuple[Any, ...]) -> tuple[fx.Node, fx.Node] | None:
    """The sum down the columns of ``grad * normal``, and ``normal``."""
    found = []
    for user in grad.users:
        normal = _other(user, grad)
        if user is scaled or normal is None or _shape(normal) != shape or len(user.users) != 1:
            continue
        (down,) = user.users
        if _sums(down, last=False):
            found.append((down, normal))
    return found[0] if len(found) == 1 else None


def _sums(node: fx.Node, *, last: bool) -> bool:
    """Whether a node sums over the last dimension, keeping it, or over all others."""
    if node.target is not aten.sum.dim_IntList or node.kwargs:
        return False
    dims, rank = node.args[1], len(_shape(node.args[0]))
    if not dims or not rank:  # None and [] are all dimensions
        return False
    over = sorted(d % rank for d in dims)  # type: ignore[union-attr, operator]
    return over == ([rank - 1] if last else list(range(rank - 1))) and (not last or node.args[2:] == (True,))


def _other(node: fx.Node, one: fx.Node, target: Any = aten.mul.Tensor) -> fx.Node | None:
    """The other operand of a product or sum of two different nodes."""
    if node.target is not target or node.kwargs or one not in node.args:
        return None
    others = [n for n in node.args if isinstance(n, fx.Node) and n is not one]
    return others[0] if len(others) == 1 else None


def _cast_of(node: Any) -> fx.Node | None:
    """What a node casts from one of the kernel's dtypes to another; None if it does something else."""
    if not isinstance(node, fx.Node) or node.target is not aten._to_copy.default:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    one, two = source.meta["val"], node.meta["val"]
    return source if {one.dtype, two.dtype} <= {*_FLOATS} and one.device == two.device else None


def _uncast(node: Any, *, shared: bool = False) -> Any:
    """What a node casts, perhaps several times; ``shared``: even if others read a value on the way."""
    while (source := _cast_of(node)) is not None and (shared or len(source.users) == 1):
        node = source
    return node


def _narrow(node: fx.Node) -> fx.Node:
    """The value of 16 bits that a node widens, or the node."""
    source = _cast_of(node)
    return (
        source if source is not None and source.meta["val"].dtype.itemsize < node.meta["val"].dtype.itemsize else node
    )


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _through(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in (aten.detach.default, aten.alias.default):
        node = node.args[0]
    return node


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()
