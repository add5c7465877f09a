"""From a function or a region to the graph that fusion reads: functional, decomposed, fake values at its nodes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from dscompile.codegen.tile.counting import histc
from dscompile.codegen.tile.norms import sum_between, var_mean
from dscompile.codegen.tile.pooling import poolings
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
        **poolings(),
        aten.var_mean.correction: var_mean,
        aten.histc.default: histc,
        aten.roll.default: roll,
        aten.repeat.default: repeat,
        aten.scatter.value: scatter_value,
        aten.sum.dim_IntList: sum_between,
    }


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


def roll(x: torch.Tensor, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Any:
    """``roll`` as two ends that change places, in each dimension."""
    if not dims:
        flat = [shifts[0]] if isinstance(shifts, (list, tuple)) else [shifts]
        return roll(x.reshape(-1), flat, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        length = x.shape[dim]
        start = (length - shift) % length if length else 0
        if start:
            x = torch.cat((torch.narrow(x, dim, start, length - start), torch.narrow(x, dim, 0, start)), dim)
    return x.clone()


def repeat(x: torch.Tensor, times: Sequence[Any]) -> torch.Tensor:
    """``repeat`` as a view in which the repeated dimensions have no stride, written out."""
    new = len(times) - x.dim()
    split, whole = list(x.shape[:0]), []
    for k, often in enumerate(times):
        size = 1 if k < new else x.shape[k - new]
        split += [often, size]
        whole.append(often * size)
    shape = [1] * (2 * new)
    for size in x.shape:
        shape += [1, size]
    return x.reshape(shape).expand(split).reshape(whole).clone()


def tidy(module: fx.GraphModule, names: Sequence[str] = ()) -> fx.GraphModule:
    """Drop what nothing reads; placeholders get the names that a user knows, casts those of what they cast."""
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
    _name_casts(graph)
    graph.lint()
    module.recompile()
    return module


_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _name_casts(graph: fx.Graph) -> None:
    """``_to_copy_3`` of ``x`` becomes ``x_fp32``."""
    taken = {n.name for n in graph.nodes}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default):
        source = node.args[0]
        dtype = node.meta["val"].dtype
        wanted = f"{source.meta.get(_CAST_OF, source.name)}_{_SHORT.get(dtype, str(dtype).removeprefix('torch.'))}"
        node.meta[_CAST_OF] = source.meta.get(_CAST_OF, source.name)
        node.name = next(n for k in itertools.count() if (n := f"{wanted}_{k}" if k else wanted) not in taken)
        taken.add(node.name)


_CAST_OF = "cast_of"
"""Key of a cast's ``meta``: the name of what it, or a row of casts, was made from."""
