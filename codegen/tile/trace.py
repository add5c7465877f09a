"""From a function or a region to the graph that fusion reads: functional, decomposed, fake values at its nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from dscompile.torch_compat import OpOverload, fake_mode_of, tile_decompositions


def traced(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """Trace ``function`` on tensors like ``args`` (real or fake; no data is read) and decompose it.

    Placeholders are called after the function's own parameters, so that kernels read well.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount] if hasattr(function, "__code__") else ()

    def run(*args: Any) -> Any:
        return functionalize(function)(*args)

    graph: fx.GraphModule = make_fx(run, decomposition_table=table(), tracing_mode="fake")(*args)
    return tidy(graph, names)


def decomposed(module: fx.GraphModule) -> fx.GraphModule:
    """A region's module, whose placeholders carry fake values, as fusion reads it."""
    inputs = module.graph.find_nodes(op="placeholder")
    mode = fake_mode_of(module.graph)

    def run(*args: Any) -> Any:
        return functionalize(module)(*args)

    with mode:
        graph: fx.GraphModule = make_fx(run, decomposition_table=table())(*(n.meta["val"] for n in inputs))
    return tidy(graph, [n.name for n in inputs])


def table() -> dict[OpOverload, Callable[..., Any]]:
    """How operators become smaller ones."""
    aten = torch.ops.aten
    return {
        **tile_decompositions(),
        aten.var_mean.correction: var_mean,
        aten.slice_scatter.default: slice_scatter,
        aten.scatter.value: scatter_value,
        aten.sum.dim_IntList: sum_between,
    }


UNROLLED = 16
"""Most elements of a dimension between others that are added one by one."""


def slice_scatter(
    x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """``x`` with ``source`` in the place of a slice: the two ends and ``source``, one after the other."""
    length = x.shape[dim]
    if step != 1 or not all(v is None or isinstance(v, int) for v in (length, start, end)):
        return NotImplemented
    first, last, _ = slice(start, end).indices(length)
    ends = (torch.narrow(x, dim, 0, first), source, torch.narrow(x, dim, last, length - last))
    parts = [part for part in ends if part.shape[dim] != 0]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].clone()


def scatter_value(x: torch.Tensor, dim: int, index: torch.Tensor, value: float) -> Any:
    """``x`` with one element of each line along ``dim`` set, as a comparison: the gradient of a loss by class.

    A place outside sets nothing, as in TorchInductor's form of it; the loss's forward has checked it.
    """
    d = dim % x.dim() if x.dim() else 0
    lines = x.dim() == index.dim() > 0 and index.shape[d] == 1
    if not lines or any(x.shape[k] != index.shape[k] for k in range(x.dim()) if k != d):
        return NotImplemented
    shape = [1] * x.dim()
    shape[d] = x.shape[d]
    places = torch.arange(x.shape[d], device=x.device).view(shape)
    return torch.where(places == index, torch.full((), value, dtype=x.dtype, device=x.device), x)


def sum_between(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """A sum over dimensions between which, or around which, others are kept, in steps that kernels have.

    A short dimension is added up element by element; of leading and trailing ones (a batch norm's) the trailing ones go
    first. In fp32, rounded once.
    """
    result = dtype or x.dtype
    dims = sorted(d % x.dim() for d in dim or ()) if x.dim() else []
    if not (result.is_floating_point and x.dtype in (torch.float32, torch.float16, torch.bfloat16)):
        return NotImplemented
    wide = [d for d in dims if x.shape[d] != 1]
    kept = [d for d in range(x.dim()) if d not in dims and x.shape[d] != 1]
    if not wide or not kept or max(wide) < min(kept) or min(wide) > max(kept):
        return NotImplemented
    inner = [d for d in wide if d > max(kept)]
    if inner and all(d < min(kept) for d in wide if d not in inner):
        outer = [d for d in wide if d not in inner]
        found = x.sum(inner, keepdim=True, dtype=torch.float32)
        found = (
            _added_up(found, outer[0]) if len(outer) == 1 and _short(x, outer[0]) else found.sum(outer, keepdim=True)
        )
    elif len(wide) == 1 and _short(x, wide[0]):
        found = _added_up(x, wide[0])
    else:
        return NotImplemented
    return (found if keepdim else found.squeeze(dims)).to(result)


def var_mean(
    x: torch.Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean in two steps that a kernel makes in one: about the mean, in fp32."""
    dims = list(range(x.dim())) if dim is None else list(dim)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    count = 1
    for d in dims:
        count *= x.shape[d]
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    variance = (centred * centred).sum(dims, keepdim=keepdim) / (count - (1 if correction is None else correction))
    mean = mean if keepdim else mean.squeeze(dims)
    return variance.to(x.dtype), mean.to(x.dtype)


def _short(x: torch.Tensor, dim: int) -> bool:
    return isinstance(x.shape[dim], int) and x.shape[dim] <= UNROLLED


def _added_up(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over a short dimension, which is kept, as additions: a kernel of its readers takes them in."""
    parts = [part.float() for part in torch.split(x, 1, dim)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def tidy(module: fx.GraphModule, names: Sequence[str] = ()) -> fx.GraphModule:
    """Drop what nothing reads, and give placeholders the names that a user knows."""
    graph = module.graph
    graph.eliminate_dead_code()
    inputs = graph.find_nodes(op="placeholder")
    wanted = list(names)[: len(inputs)]
    taken = {n.name for n in graph.nodes} | set(wanted)
    for node in graph.nodes:
        if node.name in wanted:
            number = next(k for k in itertools.count(1) if f"{node.name}_{k}" not in taken)
            node.name = f"{node.name}_{number}"
            taken.add(node.name)
    for node, name in zip(inputs, wanted, strict=False):
        node.name = node.target = name
    graph.lint()
    module.recompile()
    return module
