"""Small helpers for tests: StepGraphs traced from models or written by hand, inputs for them, and an interpreter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dscompile.config import Config
from dscompile.effects import constant, execution_order
from dscompile.graph import GraphInput, GraphKind, GraphOutput, InputKind, StepGraph
from dscompile.manager import REGISTRY, PassContext, graph_pass, parse_pipeline, run_pipeline
from dscompile.params import annotate_nodes, frame_inputs, from_aot
from dscompile.torch_compat import FakeTensorMode, aot_autograd, size_hint

aten = torch.ops.aten


# -- from a model ------------------------------------------------------------------------------------------------------


class _TracedError(Exception):
    """Thrown to stop a compilation once its joint graph is known."""


def trace(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, keep_mutations: bool = False) -> StepGraph:
    """The joint (or, without gradients, inference) graph that AOTAutograd makes of ``fn(*args)``."""
    found: list[StepGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        frame = frame_inputs(gm, example_inputs)

        def joint(module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
            found.append(from_aot(module, GraphKind.JOINT, frame, forward_outputs=num_fwd_outputs))
            raise _TracedError

        def inference(module: fx.GraphModule, inputs: Any) -> Any:
            found.append(from_aot(module, GraphKind.INFERENCE, frame))
            raise _TracedError

        compiler = aot_autograd(
            fw_compiler=inference,
            inference_compiler=inference,
            partition_fn=joint,
            keep_inference_input_mutations=keep_mutations,
        )
        return compiler(gm, example_inputs)

    torch.compiler.reset()
    try:
        torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    except Exception:
        if not found:
            raise
    return found[0]


class Norm(nn.Module):
    """BatchNorm, views, and a buffer that the model itself updates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        y = self.norm(self.linear(x)).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        return (y * self.count).float().contiguous()


class Drops(nn.Module):
    """Two dropouts of one shape and two equal linear layers: material for swapped draws and swapped gradients."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.dropout(self.first(x), self.p)
        b = nn.functional.dropout(self.second(x * 2.0), self.p)
        return (a + b).to(torch.bfloat16).to(torch.float32)


class Noise(nn.Module):
    """Draws that depend on inputs only: both halves of a split could make them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noisy = nn.functional.dropout(x, 0.5) * self.weight + torch.rand_like(x)
        return noisy + torch.randn(4, 8) * torch.randint(0, 3, (8,)), torch.bernoulli(x.sigmoid())


class Tied(nn.Module):
    """An embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(ids)))


class Repeats(nn.Module):
    """The same subexpression twice, operators that change nothing, dead code, and typed constants."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.exp(x * self.weight).clone().view(x.shape)
        b = torch.exp(x * self.weight).detach()
        torch.sin(x).cos()
        return a + b.expand(x.shape), torch.exp(x * self.weight) * 1.0


# -- by hand -----------------------------------------------------------------------------------------------------------


class Hand:
    """Writes a graph one call at a time: ``x = h.input("x", 4); y = h.call(aten.sin.default, x); h.done([y])``."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.inputs: list[GraphInput] = []

    def input(
        self, name: str, *shape: int, dtype: torch.dtype = torch.float32, kind: InputKind = InputKind.INPUT
    ) -> fx.Node:
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        self.inputs.append(GraphInput(name, kind, fqn=f"model.{name}"))
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        operands, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta["val"] = target(*operands, **named)
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        node.meta["nn_module_stack"] = {"hand": ("L['self']._modules['model']", "Hand")}
        node.meta["stack_trace"] = f'  File "{__file__}", line {caller.f_lineno}, in forward\n    {target}'  # type: ignore[union-attr]
        return node

    def done(self, outputs: Sequence[Any], *, forward_outputs: int | None = None) -> StepGraph:
        """A joint graph if an input is a tangent, else an inference graph."""
        self.graph.output(tuple(outputs))
        joint = any(i.kind is InputKind.TANGENT for i in self.inputs)
        graph = StepGraph(
            module=fx.GraphModule(nn.Module(), self.graph),
            kind=GraphKind.JOINT if joint else GraphKind.INFERENCE,
            inputs=tuple(self.inputs),
            outputs=tuple(GraphOutput("output" if o is not None else "none") for o in outputs),
            forward_outputs=len(outputs) if forward_outputs is None else forward_outputs,
        )
        annotate_nodes(graph)
        return graph


# -- running -----------------------------------------------------------------------------------------------------------


def random_inputs(graph: StepGraph, seed: int = 0) -> dict[str, Any]:
    """A value for every placeholder: random floats, zeros and ones for integers, hints for symbols."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    for node in graph.placeholders():
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            made[node.name] = size_hint(value)
            continue
        shape, strides = [size_hint(s) for s in value.shape], [size_hint(s) for s in value.stride()]
        data = torch.empty_strided(shape, strides, dtype=value.dtype)
        if value.dtype.is_floating_point:
            data.copy_(torch.randn(shape, generator=generator).abs() + 0.1)  # variances are inputs too
        else:
            data.copy_(torch.randint(0, 2, shape, generator=generator))
        made[node.name] = data
    return made


@dataclass
class Ran:
    """What running a graph gave: outputs, the inputs as they are afterwards, and the next random number."""

    outputs: list[Any]
    inputs: dict[str, Any]
    next_draw: float


def execute(graph: StepGraph, inputs: dict[str, Any], seed: int | None = 0) -> Ran:
    """Run every node with PyTorch's own kernels in execution order, on copies of ``inputs``.

    ``seed=None`` goes on with the random numbers of the run before.
    """
    copies = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if seed is not None:
        torch.manual_seed(seed)
    env: dict[fx.Node, Any] = {}
    forward, backward = execution_order(graph)
    with torch.no_grad():
        for node in forward + backward:
            if node.op == "placeholder":
                env[node] = copies[node.name]
            elif node.op == "get_attr":
                env[node] = constant(node)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
    outputs = [env[v] if isinstance(v, fx.Node) else v for v in graph.output_values()]
    state = torch.get_rng_state()
    next_draw = torch.rand(()).item()
    torch.set_rng_state(state)
    return Ran(outputs, copies, next_draw)


def assert_same_run(left: Ran, right: Ran) -> None:
    """Bitwise equal outputs, written inputs and random state; NaN equals NaN."""
    assert len(left.outputs) == len(right.outputs)
    pairs = [*zip(left.outputs, right.outputs, strict=True)]
    pairs += [(left.inputs[k], right.inputs[k]) for k in left.inputs]
    for a, b in pairs:
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b
    assert left.next_draw == right.next_draw


@contextmanager
def temporary_pass(function: Callable[..., None], name: str = "planted", **contract: Any) -> Iterator[str]:
    """Register ``function`` as a pass for the length of a ``with`` block."""
    graph_pass(name, **contract)(function)
    try:
        yield name
    finally:
        del REGISTRY[name]


def run_pass(graph: StepGraph, function: Callable[[StepGraph], None], **contract: Any) -> list[Any]:
    """Run ``function(graph)`` as the only pass of a pipeline, verified and proved; returns the records."""

    def planted(graph: StepGraph, ctx: PassContext) -> None:
        function(graph)

    with temporary_pass(planted, **contract) as name:
        return run_pipeline(graph, parse_pipeline(name), PassContext(Config()))
