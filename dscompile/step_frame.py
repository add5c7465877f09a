"""A whole training step as one Dynamo frame and one program: forward, backward and the delivery of gradients.

Under plain ``torch.compile`` a frame ends before backward. Here the frame is ``loss(model, *batch)``, its joint graph
is not split, and one program runs it all. Dynamo keeps what it knows how to keep: which tensors are read (a distributed
model's shards, its accumulators), and guards, so that each variant of gradient accumulation (plain, inside
``no_sync``, boundary) is a program of its own, chosen as for frames. Gradients go through autograd's own edges from
the inputs to their parameters: hooks, accumulation and frozen parameters are autograd's affair, as with frames.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dscompile.backend import Frame, check_frame
from dscompile.cache_files import checked_files
from dscompile.config import Config
from dscompile.entry import watched
from dscompile.errors import DscompileError, UnsupportedError
from dscompile.graph import GraphKind, InputKind, StepGraph
from dscompile.params import frame_inputs, from_aot
from dscompile.runtime.code import ProgramCode
from dscompile.sharding import Sharding
from dscompile.step_cache import GraphText, caching, look_up
from dscompile.torch_compat import behind, is_refusal, joint_of, source_names

_COUNTER = itertools.count()
_MOST_PROGRAMS = 64
"""A step may have (shapes, variants of accumulation, numbers that Dynamo guards); Dynamo's own limit is 8."""


class _Compiled(Exception):  # noqa: N818 - no error: it ends a call after compilation
    """A call that was only to compile reached the program."""

    def __init__(self, code: ProgramCode) -> None:
        super().__init__()
        self.code = code


class StepFrame:
    """``loss(model, *batch)`` with its backward pass, compiled at the first call and for new shapes.

    Attributes:
        code: the program compiled last, or loaded from the cache; None before.
        started: whether the last call got as far as running a program.
        programs: how many were compiled or loaded.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], config: Config) -> None:
        self._model, self._config = model, config
        self.code: ProgramCode | None = None
        self._graph: StepGraph | None = None
        self._text: GraphText | None = None
        self._only_compile = False
        self._scale, self._share = 1.0, 1
        self.started = False
        self.programs = 0

        def step(model: nn.Module, *batch: Any) -> Tensor:
            return loss(model, *batch)

        # All of these share one code object, and so would share one limit; frames may run past theirs, ranks may not.
        own: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": _MOST_PROGRAMS}
        self._step = torch.compile(step, backend=self._backend, fullgraph=True, **own)

    @property
    def graph(self) -> StepGraph | None:
        """The joint graph compiled last, after its passes; None before. A program from the cache has its text read."""
        if self._graph is None and self._text is not None:
            self._graph = self._text.graph()
        return self._graph

    def compile(self, *batch: Any) -> ProgramCode:
        """The program for such a batch, which is compiled if it was not before. Nothing runs.

        Raises:
            UnsupportedError: the step cannot be one program; the message says why.
            Exception: any other error of compilation, as it is (a pass that broke a rule, for instance).
        """
        self._only_compile = True
        try:
            self._step(self._model, *batch)
        except _Compiled as reached:
            return reached.code
        except Exception as error:
            if (refusal := _refusal(error)) is not None:
                raise refusal from error
            raise
        finally:
            self._only_compile = False
        raise UnsupportedError("the step computes nothing that could be compiled: its loss reads no tensor.")

    def __call__(self, *batch: Any, scale: float = 1.0, share: int = 1) -> Tensor:
        """Run forward and backward; gradients add up in ``.grad`` (inside ``no_sync``: in the accumulators).

        Args:
            batch: as ``loss`` takes it.
            scale: what the gradients are multiplied by (a loss scale).
            share: what they are divided by (the micro-batches of a window).

        Returns:
            the loss, detached, neither scaled nor divided.

        Raises:
            UnsupportedError: the step cannot be one program. Nothing ran, so it can be run another way.
            Exception: any other error of compilation or of the program, as it is.
        """
        self._scale, self._share, self.started = scale, share, False
        try:
            return self._step(self._model, *batch)
        except Exception as error:
            if not self.started and (refusal := _refusal(error)) is not None:
                raise refusal from error
            raise

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile the frame: called by Dynamo, with the real inputs."""
        inputs = frame_inputs(gm, example_inputs)
        check_frame(gm, inputs, example_inputs)
        sharding = Sharding.of(inputs, example_inputs)
        files = checked_files()
        frame = Frame(self._config, inputs, f"step{next(_COUNTER)}", sharding)
        with caching(frame):
            found = look_up(frame, gm, example_inputs, lambda: source_names(gm))
            if found.kept is not None:
                code, deliver = found.kept.code, found.kept.more
                self._graph, self._text = None, found.kept.text
            else:
                frame.start_probe()
                self._graph, code = self._compile(frame, gm, tuple(example_inputs))
                deliver = Delivery.of(self._graph)
                found.store(code, self._graph, deliver)
                files.record()
        self.code = code
        self.programs += 1
        run = watched(self._runner(deliver, code), example_inputs)

        def start(*args: Any) -> Any:
            if self._only_compile:  # before anything takes an accumulator
                raise _Compiled(code)
            self.started = True
            return run(*args)

        return start

    def _compile(self, frame: Frame, gm: fx.GraphModule, args: tuple[Any, ...]) -> tuple[StepGraph, ProgramCode]:
        """Trace forward and backward together, and make a program of them."""
        with contextlib.ExitStack() as stack:
            joint = _joint(stack, gm, args)
            forward = sum(not hasattr(d, "grad_of") and d is not None for d in joint.graph.output_node().meta["desc"])
            graph = from_aot(joint, GraphKind.JOINT, frame.inputs, forward_outputs=forward)
            _check(graph)
            frame.run_passes(graph)
            return graph, frame.compile(graph, frozenset())

    def _runner(self, deliver: Delivery, code: ProgramCode) -> Callable[..., Any]:
        """What Dynamo calls in the frame's place: the program, then its effects on inputs and parameters."""

        def run(*args: Any) -> tuple[Any, ...]:
            assert len(args) == deliver.inputs
            # As autograd would for ``(loss / share).float() * scale``: the scale is rounded first.
            tangent = torch.full((), self._scale, device=deliver.device).to(deliver.dtype) / self._share
            with torch.no_grad():
                results = code([*args, tangent])
                outputs: list[Any] = []
                receivers: list[Tensor] = []
                gradients: list[Tensor] = []
                for (kind, index), value in zip(deliver.places, results, strict=True):
                    if kind == "mutation":
                        args[index].copy_(value)
                    elif kind == "gradient":
                        receivers.append(args[index])
                        gradients.append(value)
                    elif kind == "output":
                        outputs.append(value)
            del results
            torch.autograd.backward(receivers, gradients)
            return tuple(outputs)

        return run


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where the results of a step's program go.

    Attributes:
        places: for each output what it is for, and the input that it goes to (-1: none).
        inputs: how many inputs there are beside the loss's tangent.
        dtype: of that tangent.
        device: of that tangent.
    """

    places: tuple[tuple[str, int], ...]
    inputs: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(graph: StepGraph) -> Delivery:
        """Read it off the descriptors of a joint graph."""
        places = tuple((kind, _index(descriptor)) for kind, descriptor in _effects(graph))
        tangents = [n.meta["val"] for n in graph.placeholders() if graph.input_of(n).kind is InputKind.TANGENT]  # type: ignore[union-attr]
        plain = len(graph.inputs) - len(tangents)
        return Delivery(places, plain, tangents[0].dtype, tangents[0].device)


def _effects(graph: StepGraph) -> list[tuple[str, Any]]:
    """What each output of the graph is for, and the descriptor of the input it goes to."""
    descriptors = graph.output_node.meta["desc"]
    found = []
    for output, descriptor in zip(graph.outputs, descriptors, strict=True):
        of = getattr(descriptor, "grad_of", None) or getattr(descriptor, "mutated_input", None)
        found.append((output.kind, of))
    return found


def _index(descriptor: Any) -> int:
    return int(descriptor.idx) if hasattr(descriptor, "idx") else -1


def _check(graph: StepGraph) -> None:
    """Raise :class:`UnsupportedError` for steps that one program would run wrongly, or worse than frames do."""
    tangents = [i for i in graph.inputs if i.kind is InputKind.TANGENT]
    if len(tangents) != 1:
        raise UnsupportedError(
            f"the step has {len(tangents)} differentiable results, not the loss alone (the model keeps activations)."
        )
    loss = next(n for n in graph.placeholders() if n.name == tangents[0].name).meta["val"]
    if loss.numel() != 1 or loss.ndim:
        raise UnsupportedError(f"the loss must be a scalar tensor, got {tuple(loss.shape)}; reduce it with .mean().")
    if any("recompute" in node.meta for node in graph.nodes):
        raise UnsupportedError("the model checkpoints activations, whose memory only separate programs give back.")
    if any(i.kind in (InputKind.TOKEN, InputKind.OPAQUE) for i in graph.inputs):
        raise UnsupportedError("the step has ordered effects or inputs that are no tensors.")
    effects = _effects(graph)
    if any(kind in ("mutation", "gradient") and not _plain(of) for kind, of in effects):
        raise UnsupportedError("inputs share memory in a way that one program does not keep.")
    if not any(kind == "gradient" for kind, _ in effects):
        raise UnsupportedError("nothing in the step requires a gradient.")


def _plain(descriptor: Any) -> bool:
    return type(descriptor).__name__ == "PlainAOTInput"


def _joint(stack: contextlib.ExitStack, gm: fx.GraphModule, args: tuple[Any, ...]) -> fx.GraphModule:
    """The frame's joint graph. That AOTAutograd cannot trace one is a refusal: nothing was proved or changed yet."""
    try:
        return joint_of(stack, gm, args)
    except DscompileError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(f"forward and backward cannot be traced together: {_first_line(error)}") from error


def _refusal(error: Exception) -> UnsupportedError | None:
    """The error as one that lets the step run as frames; None for every other error, a failed proof above all."""
    reason: BaseException | None = error if is_refusal(error) else None
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DscompileError) and not isinstance(seen, UnsupportedError):
            return None
        if isinstance(seen, UnsupportedError):
            reason = seen
        seen = behind(seen)
    return None if reason is None else UnsupportedError(f"the step cannot be one program: {_first_line(reason)}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
