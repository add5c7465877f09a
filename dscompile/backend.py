"""The ``torch.compile`` backend: one Dynamo frame in, a callable out.

``torch.compile(model, backend="dscompile")`` reaches :func:`dscompile` through the entry point group
``torch_dynamo_backends``. AOTAutograd traces the joint graph and calls back three times: to partition it (passes and
the explicit split happen there), and to compile the forward and the backward graph into programs.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dscompile import cache
from dscompile.cache_files import checked_files
from dscompile.codegen.emit import emit_program
from dscompile.codegen.lower import lower_regions
from dscompile.codegen.regions import cut
from dscompile.config import Config
from dscompile.entry import watched
from dscompile.equivalence import Snapshot, Verdict, prove_split, snapshot
from dscompile.errors import UnsupportedError, VerifyError
from dscompile.graph import GraphKind, InputKind, StepGraph
from dscompile.inductor_compat import OutputCode, SerializableAOTDispatchCompiler, our_cache_key, probe_vector_isa
from dscompile.manager import Numerics, PassContext, PassRecord, parse_pipeline, run_pipeline
from dscompile.params import FrameInputs, frame_inputs, from_aot
from dscompile.program import check_lifetimes
from dscompile.report import GraphReport, announce
from dscompile.runtime.code import ProgramCode, loading_into
from dscompile.runtime.gemm import GemmChoice
from dscompile.sharding import Sharding
from dscompile.source import source_line
from dscompile.split import borrowed, split
from dscompile.torch_compat import aot_autograd, default_partition, donated_saved_values
from dscompile.verify_comm import check_saved, listing

if TYPE_CHECKING:
    from dscompile.artifact import GraphWriter

_COUNTER = itertools.count()


def dscompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo frame. Called by PyTorch; ``options`` are the fields of :class:`~dscompile.config.Config`.

    Raises:
        ConfigError: an unknown option or a wrong type.
        UnsupportedError: a device or ``mode`` that this version does not handle.
        VerifyError: a pass broke a rule.
    """
    inputs = frame_inputs(gm, example_inputs)
    sharding = Sharding.of(inputs, example_inputs)
    config = Config.load(options) if sharding.config is None else sharding.config.updated(options)
    if mode not in (None, "default"):
        raise UnsupportedError(f"backend 'dscompile' has no mode {mode!r}; use options={{...}} instead.")
    check_frame(gm, inputs, example_inputs)
    files = checked_files()
    frame = Frame(config, inputs, f"graph{next(_COUNTER)}", sharding)
    frame.start_probe()
    with (
        our_cache_key(cache.key(config, sharding.key()), regions=config.cache, programs=config.cache),
        loading_into(frame.name, frame.writer),
    ):
        compiled: Callable[..., Any] = aot_autograd(
            fw_compiler=SerializableAOTDispatchCompiler(OutputCode, frame.compile_forward),
            bw_compiler=SerializableAOTDispatchCompiler(OutputCode, frame.compile_backward),
            inference_compiler=SerializableAOTDispatchCompiler(OutputCode, frame.compile_inference),
            partition_fn=frame.partition,
        )(gm, example_inputs)
    if frame.seconds:  # not loaded from the cache
        files.record()
    return watched(compiled, example_inputs)


def check_frame(gm: fx.GraphModule, inputs: FrameInputs, example_inputs: Sequence[Any]) -> None:
    """Raise :class:`UnsupportedError` for devices that this version does not handle and for replaced parameters."""
    _check_devices(inputs, example_inputs)
    _check_replaced(gm, inputs)


def _check_devices(inputs: FrameInputs, example_inputs: Sequence[Any]) -> None:
    for what, value in zip(inputs.inputs, example_inputs, strict=True):
        if isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "cuda", "meta"):
            raise UnsupportedError(
                f"backend 'dscompile' does not support device {value.device} ({what.kind} {what.fqn}); "
                "move model and inputs to 'cpu' (or 'cuda')."
            )


def _check_replaced(gm: fx.GraphModule, inputs: FrameInputs) -> None:
    """Refuse ``parameter.data = ...`` during forward: the new storage cannot be an output of a compiled graph."""
    by_node = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs.inputs, strict=True))
    for node in gm.graph.nodes:
        what = by_node.get(node.args[0]) if node.target is torch.Tensor.set_ else None
        if what is not None:
            raise UnsupportedError(
                f"the model replaces the data of {what.kind} {what.fqn} during forward, at {source_line(node)}; change "
                "it in place (with torch.no_grad(): parameter.copy_(...)), or outside the compiled part."
            )


class Frame:
    """One compilation of one Dynamo frame, from its joint graph to its programs."""

    def __init__(self, config: Config, inputs: FrameInputs, name: str, sharding: Sharding | None = None) -> None:
        self.config = config
        self.sharding = sharding or Sharding()
        self.inputs = inputs
        self.name = name
        self.halves: dict[GraphKind, StepGraph] = {}
        self.borrowed: frozenset[str] = frozenset()
        self.records: list[PassRecord] = []
        self.verdict = ""
        self.reference: Snapshot | None = None
        self.notes: list[str] = []
        self.not_kept = ""
        self.seconds: dict[str, float] = {}
        self.writer = _writer(config, name)
        self.probe: threading.Thread | None = None

    def start_probe(self) -> None:
        """Find out beside the tracing what vector instructions there are."""
        if self.config.regions != "aten":
            self.probe = probe_vector_isa()

    # -- AOTAutograd calls these -------------------------------------------------------------------------------------

    def partition(
        self,
        joint: fx.GraphModule,
        joint_inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Run the pipeline on the joint graph and split it."""
        static = static_lifetime_input_indices or ()
        if not joint_inputs:  # a sub-graph of a higher-order operator: PyTorch's rules, not ours
            return default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs)
        graph = from_aot(joint, GraphKind.JOINT, self.inputs, forward_outputs=num_fwd_outputs)
        self.run_passes(graph)
        start = time.perf_counter()
        halves = split(graph, static_inputs=static)
        self.seconds["split"] = time.perf_counter() - start
        if halves.chosen_by != "save all":
            self.notes.append(f"saved values chosen by {halves.chosen_by}")
        elif self.reference is not None:
            start = time.perf_counter()
            proof = prove_split(self.reference, halves.forward, halves.backward, halves.saved)
            self.seconds["check"] += time.perf_counter() - start
            if proof.verdict is Verdict.DIFFERENT:
                raise VerifyError(proof.explain("split"))
            self._merge(proof.verdict.value)
        if self.config.limit is None:
            check_saved(halves.forward, halves.saved)
        self.borrowed = borrowed(halves.forward, halves.saved)
        self.halves = {GraphKind.FORWARD: halves.forward, GraphKind.BACKWARD: halves.backward}
        return halves.forward.module, halves.backward.module

    def compile_forward(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> OutputCode:
        """Compile the forward half."""
        return self.compile(self._half(GraphKind.FORWARD, module), frozenset())

    def compile_backward(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> OutputCode:
        """Compile the backward half; saved values that nothing else holds may be overwritten."""
        graph = self._half(GraphKind.BACKWARD, module)
        names = [p.name for p in graph.placeholders()]
        return self.compile(graph, frozenset(names[i] for i in donated_saved_values()) - self.borrowed)

    def compile_inference(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> OutputCode:
        """Run the same pipeline on a graph without backward, and compile it."""
        graph = from_aot(module, GraphKind.INFERENCE, self.inputs)
        self.run_passes(graph)
        return self.compile(graph, frozenset())

    # -- steps -------------------------------------------------------------------------------------------------------

    def run_passes(self, graph: StepGraph) -> None:
        """Run the configured pipeline on a traced graph, verified and proved; keeps the records."""
        self.sharding.check(graph)
        calls = parse_pipeline(self._pipeline())
        if self.writer is not None:
            self.writer.traced(graph)
        on_pass = self.writer.after_pass if self.writer is not None else None
        start = time.perf_counter()
        self.reference = snapshot(graph) if self.config.verify != "off" else None
        self.seconds["check"] = time.perf_counter() - start
        context = PassContext(self.config, groups=self.sharding.groups)
        self.records = run_pipeline(graph, calls, context, reference=self.reference, on_pass=on_pass)
        self.reference = context.reference
        self.seconds["passes"] = sum(r.seconds for r in self.records)
        self.seconds["check"] += sum(r.check_seconds for r in self.records)
        for record in self.records:
            self.notes += [f"{d.pass_name}: %{d.node} {d.choice}: {d.reason}" for d in record.decisions if d.fallback]
            proved = record.verdict in (Verdict.PROVED.value, Verdict.UNCHECKED.value)
            self._merge(record.verdict if proved else record.numerics)
        graph.module.recompile()

    def _pipeline(self) -> str:
        """The configured pipeline; the default one of a sharded model is that of its ZeRO stage."""
        from dscompile.passes import with_recompute, with_sparse_attention, zero_pipeline

        stage, text = self.sharding.stage, self.config.pipeline
        if text == "default" and stage is not None:
            text = zero_pipeline(stage, self.config.zero)
        return with_recompute(with_sparse_attention(text, self.config), self.config)

    def _merge(self, verdict: str) -> None:
        """The weakest verdict of a compilation is its verdict."""
        declared = [Numerics.APPROXIMATE.value, Numerics.REASSOCIATES.value]
        weak = [Verdict.DIFFERENT.value, Verdict.UNKNOWN.value, Verdict.UNCHECKED.value]
        order = [*weak, *declared, Verdict.PROVED.value]
        self.verdict = min((v for v in (self.verdict, verdict) if v), key=order.index)

    def _half(self, kind: GraphKind, module: fx.GraphModule) -> StepGraph:
        """AOTAutograd may hand back a copy of a half with adjusted fake values: keep what we know of it."""
        known = self.halves[kind]
        return StepGraph(module, kind, known.inputs, known.outputs, known.forward_outputs, known.unused)

    def compile(self, graph: StepGraph, donatable: frozenset[str]) -> ProgramCode:
        """Cut a graph into regions, compile them, lay out the program, check its lifetimes, and report."""
        start = time.perf_counter()
        regions = cut(graph, self.config, donatable=donatable)
        if self.probe is not None:
            self.probe.join()
        codes = lower_regions(regions, self.config)
        program = emit_program(graph, regions, codes)
        check_lifetimes(program)
        program.facts["collectives"] = listing(graph)
        self.seconds[f"compile {graph.kind}"] = time.perf_counter() - start
        report = GraphReport(
            graph=self.name,
            kind=str(graph.kind),
            passes=[_record(r) for r in self.records] if graph.kind is not GraphKind.BACKWARD else [],
            facts=program.facts,
            seconds={k: v for k, v in self.seconds.items() if "compile" not in k or str(graph.kind) in k},
            gemm=GemmChoice.of(self.config.gemm).reason,
            verdict=self.verdict,
            fallbacks=[reason for code in codes.values() for reason in (code.reason, *code.fallbacks) if reason]
            + self.notes,
            not_kept=self.not_kept or (_not_cacheable(graph) if self.config.cache else ""),
            summary=self.config.summary,
        )
        last = graph.kind is not GraphKind.FORWARD
        code = ProgramCode(program, report, self.config, last=last, not_cacheable=_not_cacheable(graph)).load()
        announce(report)
        code.dump(self.writer)
        if self.writer is not None and graph.kind is not GraphKind.BACKWARD:  # the frame's first program
            code.recording = self.writer.recording()
        return code


def _not_cacheable(graph: StepGraph) -> str:
    """Why a program must not go to AOTAutograd's cache: on a hit it does not make the tokens that order effects."""
    tokens = [i.name for i in graph.inputs if i.kind is InputKind.TOKEN]
    return f"effects are ordered by tokens ({', '.join(tokens)}), which a cached program is not given" if tokens else ""


def _writer(config: Config, name: str) -> GraphWriter | None:
    """Where this graph's texts go, if a dump was asked for."""
    if config.dump is None:
        return None
    from dscompile.artifact import Artifact

    return Artifact(config.dump, config).graph(name)


def _record(record: PassRecord) -> dict[str, Any]:
    return {
        "call": record.call,
        "seconds": record.seconds,
        "check_seconds": record.check_seconds,
        "nodes": [record.nodes_before, record.nodes_after],
        "edits": record.edits,
        "verdict": record.verdict,
        "apart_from": record.apart_from,
        "decisions": len(record.decisions),
    }
