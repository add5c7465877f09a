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
    return {**tile_decompositions(), aten.var_mean.correction: var_mean}


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
