"""Put kernels and PyTorch's own operators into one function: ``run(args)``, as the runtime executes it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dscompile.codegen.emit import call_text
from dscompile.codegen.tile.fuse import Fused, Group, fuse
from dscompile.codegen.tile.ir import Buffer
from dscompile.codegen.tile.schedule import Hints
from dscompile.codegen.triton_backend import symbols
from dscompile.codegen.triton_backend.body import index_text
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.render import render
from dscompile.program import Step, function_source

_Unit = tuple[list[str], list[str], list[str], str]
"""Lines of the function, what they read and write, and what they stand for."""


@dataclass
class Assembled:
    """A function of kernels and operators.

    Attributes:
        source: Python of ``run(args)``; it calls ``launch_NAME`` for each kernel. kernels: in order of launch.
        fused: the fusion behind it, with every refusal.
    """

    source: str
    kernels: tuple[Kernel, ...]
    fused: Fused = field(repr=False, default_factory=Fused)

    @property
    def bytes(self) -> int:
        """Bytes that the kernels move."""
        return sum(k.bytes for k in self.kernels)

    @property
    def fills(self) -> int:
        """Launches that fill memory before a kernel scatters into it."""
        return sum(len(k.starts) for k in self.kernels)

    @property
    def adds(self) -> bool:
        """Whether any kernel adds in memory, in no fixed order: the last bits of such sums differ from run to run."""
        return any(k.adds for k in self.kernels)


def assemble(module: fx.GraphModule, name: str, hints: Hints | None = None) -> Assembled:
    """Fuse a decomposed graph, render its kernels, and lay out the function that launches them.

    Symbolic sizes are variables of the function and arguments of the kernels.

    Args:
        module: what :mod:`dscompile.codegen.tile.trace` made.
        name: of the kernels.
        hints: examples of symbolic sizes, for costs; default: those that the graph was traced with.

    Raises:
        UnsupportedError: a symbolic size that no input brings, or an operator that source cannot name.
    """
    graph = module.graph
    hints = symbols.hints(graph) if hints is None else hints
    fused = fuse(graph, hints)
    kernels: list[Kernel] = []
    units: list[_Unit] = []
    made: set[str] = set()
    plain = [n for n in graph.nodes if n.op == "call_function"]
    computed = {part.node for item in fused.order if isinstance(item, Group) for part in item.parts}
    loose = [n for n in plain if n not in computed and n not in {i for i in fused.order if isinstance(i, fx.Node)}]
    rendered = {id(g): (tile, chosen) for g, tile, chosen, _ in fused.kernels}
    by_name = {n.name: n for n in graph.nodes}
    needed = _needed_views(loose, fused, graph)
    for item in [*fused.order, None]:
        units += _ready_views(needed, made, by_name)
        if item is None:
            break
        if isinstance(item, fx.Node):
            units.append(_plain(item))
            made.add(item.name)
            continue
        tile, chosen = rendered[id(item)]
        kernel = render(tile, chosen, f"{name}_{len(kernels)}" if len(fused.kernels) > 1 else name, hints)
        kernels.append(kernel)
        lines = [f"{b.name} = {_allocation(b, by_name)}{_filled(kernel, b)}" for b in kernel.writes]
        names = [b.name for b in (*kernel.reads, *kernel.writes)]
        sizes = symbols.names_of(*(size for _, size in kernel.sizes), *kernel.grid)
        names += [f"{s}={s}" for s in sizes]
        lines.append(f"launch_{kernel.name}({', '.join(names)})")
        allocated = symbols.names_of(*(n for b in kernel.writes for n in _shape(b, by_name)))
        reads = [b.name for b in kernel.reads] + list(dict.fromkeys([*sizes, *allocated]))
        units.append((lines, reads, [b.name for b in kernel.writes], kernel.name))
        made.update(b.name for b in kernel.writes)
    outputs = graph.output_node().args[0]
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    expressions = [o.name if isinstance(o, fx.Node) else repr(o) for o in outputs]
    inputs = [n.name for n in graph.find_nodes(op="placeholder")]
    steps = _steps(_bound(units, graph) + units, set(expressions))
    return Assembled(function_source("run", inputs, steps, expressions), tuple(kernels), fused)


def _needed_views(loose: list[fx.Node], fused: Fused, graph: fx.Graph) -> list[fx.Node]:
    """Views and constants that an operator left to PyTorch, or the caller, reads: they run as they stand."""
    wanted: set[fx.Node] = set()
    stack = [n for item in fused.order if isinstance(item, fx.Node) for n in item.all_input_nodes]
    stack += graph.output_node().all_input_nodes
    while stack:
        node = stack.pop()
        if node in loose and node not in wanted:
            wanted.add(node)
            stack += node.all_input_nodes
    return [n for n in loose if n in wanted]


def _ready_views(needed: list[fx.Node], made: set[str], by_name: Mapping[str, fx.Node]) -> list[Any]:
    """Those whose operands exist by now."""
    units = []
    for node in list(needed):
        ready = all(n.name in made or by_name[n.name].op != "call_function" for n in node.all_input_nodes)
        if ready or isinstance(node.meta.get("val"), torch.SymInt):
            units.append(_plain(node))
            made.add(node.name)
            needed.remove(node)
    return units


def _plain(node: fx.Node) -> _Unit:
    """An operator of PyTorch's, or a size that one reads."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return [f"{node.name} = {symbols.text_of(value)}"], symbols.names_of(value), [node.name], "size"
    reads = [n.name for n in node.all_input_nodes]
    return [f"{node.name} = {call_text(node)}"], reads, [node.name], str(node.target)


def _bound(units: list[_Unit], graph: fx.Graph) -> list[_Unit]:
    """A line for each symbolic size that the units mention."""
    values = {n.name for n in graph.nodes} | {name for _, _, writes, _ in units for name in writes}
    mentioned = {name for _, reads, _, _ in units for name in reads} - values
    found = symbols.known(mentioned, graph)
    return [([f"{name} = {source.text}"], [source.reads], [name], "size") for name, source in found.items()]


def _steps(units: list[_Unit], kept: set[str]) -> list[Step]:
    """Drop every value after its last use."""
    last = {name: i for i, (_, reads, writes, _) in enumerate(units) for name in (*reads, *writes)}
    steps = []
    for i, (lines, reads, writes, what) in enumerate(units):
        dying = [n for n in dict.fromkeys((*reads, *writes)) if last[n] == i and n not in kept]
        text = "\n".join([*lines, *([f"del {', '.join(dying)}"] if dying else [])])
        steps.append(Step(text, what, tuple(reads), tuple(writes), tuple(dying)))
    return steps


def _allocation(buffer: Buffer, by_name: Mapping[str, fx.Node]) -> str:
    node = by_name.get(buffer.name)
    device = next(v.device for n in by_name.values() if isinstance(v := n.meta.get("val"), torch.Tensor))
    if node is None:
        shape, strides = f"({index_text(buffer.numel)},)", "(1,)"
    else:
        value = node.meta["val"]
        device = value.device
        shape, strides = (f"({''.join(f'{symbols.text_of(s)}, ' for s in t)})" for t in (value.shape, value.stride()))
    return f"torch.empty_strided({shape}, {strides}, dtype={buffer.dtype}, device={str(device)!r})"


def _filled(kernel: Kernel, buffer: Buffer) -> str:
    """What a buffer holds before a kernel scatters into it."""
    return f".fill_({kernel.starts[buffer.name]!r})" if buffer.name in kernel.starts else ""


def _shape(buffer: Buffer, by_name: Mapping[str, fx.Node]) -> tuple[Any, ...]:
    """Sizes and strides of a buffer that is allocated."""
    node = by_name.get(buffer.name)
    return (buffer.numel,) if node is None else (*node.meta["val"].shape, *node.meta["val"].stride())


def bind(assembled: Assembled, launcher: Callable[[Kernel], Callable[..., None]]) -> Callable[[list[Any]], Any]:
    """The function, with each kernel made launchable by ``launcher``."""
    scope: dict[str, Any] = {"torch": torch, "operator": operator}
    scope |= {f"launch_{kernel.name}": launcher(kernel) for kernel in assembled.kernels}
    exec(compile(assembled.source, "<dscompile kernels>", "exec"), scope)
    function: Callable[[list[Any]], Any] = scope["run"]
    return function
