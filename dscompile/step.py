"""The *step* entry: a model and its loss as one joint graph, without Dynamo frames and autograd in between.

``torch.compile`` sees one frame at a time and returns to Python before backward. Here the whole step, forward and
backward, is exported at once: every parameter is an input by name (tied, frozen and unused ones included), and one
program runs it all.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from dscompile.backend import Frame
from dscompile.cache_compat import content_of
from dscompile.cache_files import checked_files
from dscompile.config import Config
from dscompile.errors import UnsupportedError
from dscompile.graph import GraphInput, GraphKind, GraphOutput, InputKind, StepGraph
from dscompile.params import FrameInputs, from_aot
from dscompile.sharded import slots_in
from dscompile.step_cache import GraphText, caching, look_up
from dscompile.step_frame import StepFrame
from dscompile.torch_compat import TracingContext, bare_copy, captured_inputs, captured_step, joint_of_captured, tracing

Loss = Callable[..., Tensor]
"""``loss(model, *batch) -> scalar tensor``."""

_PREFIX = "model."
_COUNTER = itertools.count()


class _Step(nn.Module):
    """Model and loss as one module, which is what the exporter takes."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *batch: Any) -> Tensor:
        return self.loss(self.model, *batch)


def trace_step(model: nn.Module, loss: Loss, *batch: Any) -> StepGraph:
    """Trace one training step of ``loss(model, *batch)`` to a joint StepGraph.

    Args:
        model: any module; it is not changed.
        loss: returns a scalar tensor.
        batch: example inputs; their shapes are those of the graph.

    Raises:
        UnsupportedError: the step cannot be captured as one graph, the loss is not a scalar, or the model is
            distributed.
    """
    captured, context = _capture(model, loss, batch)
    with contextlib.ExitStack() as stack, tracing(context):
        graph, _ = _trace(stack, model, captured, batch)
    return graph


def _capture(model: nn.Module, loss: Loss, batch: Sequence[Any]) -> tuple[fx.GraphModule, TracingContext]:
    """The step's forward pass as one graph, and the context to go on in."""
    placed = slots_in(model)
    if placed:  # the exporter would take the shards for constants, and the gradients would be none
        raise UnsupportedError(
            f"trace_step does not take distributed models ({placed[0].spec.fqn} is placed at stage "
            f"{placed[0].spec.stage}): compile_step does, and its result has the graph."
        )
    with _refusing():
        return captured_step(_Step(model, loss), tuple(batch))


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """What PyTorch raises while it traces, as an :class:`UnsupportedError` that says what to do."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedError(
            f"the step cannot be captured as one graph: {reason}. "
            'Use torch.compile(model, backend="dscompile"), which allows graph breaks.'
        ) from error


def _trace(
    stack: contextlib.ExitStack, model: nn.Module, captured: fx.GraphModule, batch: Sequence[Any]
) -> tuple[StepGraph, tuple[str, ...]]:
    """The joint graph and the exporter's names of its state inputs, in order; ``stack`` keeps its fakes alive."""
    with _refusing():
        joint, names = joint_of_captured(stack, captured, tuple(batch))
    outputs = joint.graph.output_node()
    forward = sum(not hasattr(d, "grad_of") and d is not None for d in outputs.meta["desc"])
    value = list(outputs.args[0])[forward - 1]  # type: ignore[arg-type]
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(fake, Tensor) or fake.ndim != 0:
        shape = tuple(fake.shape) if isinstance(fake, Tensor) else type(value).__name__
        raise UnsupportedError(f"the loss must be a scalar tensor, got {shape}; reduce it with .mean() or .sum().")
    known = _inputs(model)
    unused = tuple(
        found.fqn
        for node, found in zip(joint.graph.find_nodes(op="placeholder"), _ordered(known, names), strict=False)
        if not node.users
    )
    graph = from_aot(joint, GraphKind.JOINT, FrameInputs(known, unused, _PREFIX), forward_outputs=forward)
    return graph, names


def _inputs(model: nn.Module) -> tuple[GraphInput, ...]:
    """Every parameter and buffer under the exporter's name, with the other names of tied ones."""
    names: dict[int, list[str]] = {}
    tensors: dict[str, tuple[InputKind, Tensor]] = {}
    for kind, items in (
        (InputKind.PARAMETER, model.named_parameters(remove_duplicate=False)),
        (InputKind.BUFFER, model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in items:
            names.setdefault(id(tensor), []).append(name)
            tensors[name] = (kind, tensor)
    return tuple(
        GraphInput("", kind, name, tuple(n for n in names[id(t)] if n != name), t.requires_grad)
        for name, (kind, t) in tensors.items()
    )


def _ordered(known: Sequence[GraphInput], names: Sequence[str]) -> list[GraphInput]:
    by_name = {i.fqn: i for i in known}
    return [by_name[name.removeprefix(_PREFIX)] for name in names]


@dataclass(frozen=True, slots=True)
class Layout:
    """What a program's inputs and outputs are.

    Attributes:
        names: the exporter's names of the state inputs, in order.
        outputs: what each output is.
    """

    names: tuple[str, ...]
    outputs: tuple[GraphOutput, ...]


class CompiledStep:
    """A compiled training step: call it with a batch; it returns the loss and accumulates into ``.grad``.

    Attributes:
        code: the program that runs.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: Sequence[Any], config: Config) -> None:
        frame = Frame(config, FrameInputs(()), f"step{next(_COUNTER)}")
        self._model = model
        self._graph: StepGraph | None = None
        self._text: GraphText | None = None
        captured, context = _capture(model, loss, batch)
        files = checked_files()
        with tracing(context), caching(frame):
            inputs = captured_inputs(captured, tuple(batch))
            names = functools.partial(_names, model, batch, captured, inputs)
            found = look_up(frame, bare_copy(captured), inputs, names)
            if found.kept is not None:
                self.code, self._layout, self._text = found.kept.code, found.kept.more, found.kept.text
            else:
                frame.start_probe()
                with contextlib.ExitStack() as stack:
                    self._graph, state = _trace(stack, model, captured, batch)
                    frame.run_passes(self._graph)
                    self.code = frame.compile(self._graph, frozenset())
                self._layout = Layout(state, self._graph.outputs)
                found.store(self.code, self._graph, self._layout)
                files.record()
        self._shapes = [_shape(b) for b in batch]

    @property
    def graph(self) -> StepGraph:
        """The joint StepGraph after its passes; that of a program from the cache is read from its text."""
        if self._graph is None:
            assert self._text is not None
            self._graph = self._text.graph()
        return self._graph

    def __call__(self, *batch: Any) -> Tensor:
        """Run forward and backward on a batch of the traced shapes; returns the detached loss.

        Raises:
            UnsupportedError: the batch has other shapes or types than the traced one.
        """
        if [_shape(b) for b in batch] != self._shapes:
            raise UnsupportedError(f"this step was compiled for {self._shapes}, got {[_shape(b) for b in batch]}.")
        tensors: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        tensors.update(self._model.named_buffers(remove_duplicate=False))
        state = [tensors[name.removeprefix(_PREFIX)] for name in self._layout.names]
        tensors.update({f"batch[{i}]": value for i, value in enumerate(batch) if isinstance(value, Tensor)})
        with torch.no_grad():
            results = self.code([*(t.detach() for t in state), *map(_detached, batch), torch.ones(())])
            loss: Tensor | None = None
            for output, value in zip(self._layout.outputs, results, strict=True):
                name = output.of
                if output.kind == "mutation":
                    tensors[name].copy_(value)
                elif output.kind == "gradient" and value is not None:
                    parameter = tensors[name]
                    parameter.grad = value if parameter.grad is None else parameter.grad + value
                elif output.kind == "output":
                    loss = value
        assert loss is not None
        return loss


def _names(model: nn.Module, batch: Sequence[Any], captured: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
    """Where the inputs of a captured graph come from, what those hold that the program keeps, and what its own are."""
    arguments = {id(value) for value in (*model.parameters(), *model.buffers(), *batch)}
    found = [repr(_inputs(model))]
    for node, value in zip(captured.graph.find_nodes(op="placeholder"), inputs, strict=True):
        constant = isinstance(value, Tensor) and id(value) not in arguments
        found.append(f"{node.target} {content_of(value) if constant else ''}")
    return found


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def compile_step(
    model: nn.Module,
    loss: Loss,
    *batch: Any,
    config: Config | dict[str, Any] | str | Path | None = None,
) -> CompiledStep | StepFrame:
    """Compile ``loss(model, *batch)`` and its gradients into one program.

    Args:
        model: any module. A distributed one gives a :class:`~dscompile.step_frame.StepFrame`, which obeys ``no_sync``
            and compiles again for other shapes; ``config`` then changes the options of ``distribute``.
        loss: ``loss(model, *batch) -> scalar tensor``.
        batch: example inputs with the shapes of every later batch.
        config: as for :meth:`Config.load`.

    Raises:
        UnsupportedError: as :func:`trace_step` does.
    """
    placed = slots_in(model)
    if not placed:
        return CompiledStep(model, loss, batch, Config.load(config))
    options = Config.load(config).model_dump(exclude_unset=True)
    frame = StepFrame(model, loss, placed[0].config.updated(options))
    frame.compile(*batch)
    return frame
