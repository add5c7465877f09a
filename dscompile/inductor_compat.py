"""The private parts of PyTorch that compile and cache: TorchInductor and AOTAutograd's cache.

With :mod:`dscompile.torch_compat`, :mod:`dscompile.cache_compat` and :mod:`dscompile.cpp_compat` the only files that
name private parts of PyTorch.
Apart, because loading Inductor takes seconds and memory that a process pays only when it compiles. Each helper says
which private name it stands on.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from filelock import Timeout
from torch import fx
from torch._C._dynamo import guards as _guards
from torch._dynamo.backends.common import aot_autograd as aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._functorch.aot_autograd import SerializableAOTDispatchCompiler as SerializableAOTDispatchCompiler
from torch._functorch.partitioners import _extract_fwd_bwd_modules as _extract_fwd_bwd_modules
from torch._functorch.partitioners import default_partition as default_partition
from torch._guards import TracingContext as TracingContext
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._guards import tracing as tracing
from torch._inductor import config as inductor_config
from torch._inductor import inductor_prims as inductor_prims  # registers its operators
from torch._inductor import ir as inductor_ir
from torch._inductor.codecache import CppCodeCache, FxGraphCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.fx_passes.replace_random import replace_random_passes
from torch._inductor.lowering import register_lowering
from torch._inductor.output_code import CompiledFxGraph, CompiledFxGraphConstants
from torch._inductor.output_code import OutputCode as OutputCode
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
from torch.utils._filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from dscompile import gemm_ops as gemm_ops  # registers its operator
from dscompile.cpp_compat import corrected_cpu_codegen
from dscompile.torch_compat import no_autocast


def uniform(shape: list[int], seed: torch.Tensor) -> torch.Tensor:
    """Uniform fp32 numbers in [0, 1) that are a function of ``seed`` (int64 ``[]``) and the place.

    Stands on the operator ``prims.inductor_random``, which Inductor and our kernels draw with the same generator.
    """
    drawn: torch.Tensor = torch.ops.prims.inductor_random.default(shape, seed, "rand")
    return drawn


class InductorFailure(Exception):  # noqa: N818  (a fallback's reason, not an error a user meets)
    """TorchInductor could not compile a region; the message is its first line.

    ``passing`` says that the machine's state was the reason (a full disk, a missing compiler), not the region.
    """

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


@register_lowering(torch.ops.dscompile.matmul.default, type_promotion_kind=None)
def _lower_matmul(a: Any, b: Any, bias: Any, site: int = -1) -> Any:
    """``dscompile::matmul`` into a buffer that Inductor plans, as its own products. Stands on ``ExternKernelOut``."""
    inputs = [inductor_ir.ExternKernel.realize_input(x) for x in (a, b, bias) if x is not None]
    size = [*a.get_size()[:-1], b.get_size()[-1]]
    node = inductor_ir.ExternKernelOut(
        inductor_ir.FixedLayout(device=a.get_device(), dtype=a.get_dtype(), size=size),
        inputs,
        constant_args=(site,) if bias is not None else (None, site),
        python_kernel_name="torch.ops.dscompile.matmul.out",
        op_overload=torch.ops.dscompile.matmul.out,
    )
    return inductor_ir.TensorBox.create(node)


def inductor_compile(
    module: fx.GraphModule,
    *,
    donated: Sequence[int],
    fused_rng: bool,
    decompositions: Mapping[OpOverload, Callable[..., Any]],
) -> CompiledFxGraph:
    """Decompose a region's module and compile it with TorchInductor.

    Args:
        module: placeholders carry fake values; outputs are one tuple; ``meta["original_output_strides"]`` on the output
            node says which strides later regions rely on.
        donated: positions of inputs whose memory may be overwritten.
        fused_rng: draw random numbers inside kernels instead of with PyTorch's own generator calls.
        decompositions: take precedence over Inductor's own.

    Raises:
        InductorFailure: whatever went wrong, in one line.

    Stands on ``compile_fx_inner``, ``select_decomp_table``, ``V.set_fake_mode`` and ``DonatedBuffer`` (through
    ``fw_metadata.bw_donated_idxs``).
    """
    output = module.graph.output_node()
    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    options = {"fallback_random": not fused_rng, "keep_output_stride": True}  # both choose decompositions too
    try:
        with torch.no_grad(), no_autocast(), inductor_config.patch(options), corrected_cpu_codegen():
            decomposed = _decompose(module, inputs, {**select_decomp_table(), **decompositions})
            result = decomposed.graph.output_node()
            result.meta["original_output_strides"] = output.meta["original_output_strides"]
            result.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
            if fused_rng:
                with V.set_fake_mode(detect_fake_mode(inputs) or FakeTensorMode()):
                    replace_random_passes(decomposed)
            context = TracingContext(detect_fake_mode(inputs))
            context.fw_metadata = SimpleNamespace(bw_donated_idxs=list(donated), static_input_indices=[])  # type: ignore[assignment]
            with tracing(context):
                return cast(CompiledFxGraph, compile_fx_inner(decomposed, inputs, is_backward=bool(donated)))
    except Exception as error:
        passing = _passing_reason(error)
        raise InductorFailure(passing or _first_line(error), passing=bool(passing)) from error


@dataclass(frozen=True)
class TritonFigures:
    """What TorchInductor makes of a region: Triton kernels, bytes that they move, and other operators that it calls."""

    kernels: int
    bytes: int
    others: tuple[str, ...]
    source: str


def triton_kernels(module: fx.GraphModule, decompositions: Mapping[OpOverload, Callable[..., Any]]) -> TritonFigures:
    """TorchInductor's Triton kernels for a region's module.

    Generated only, for CPU tensors and without a GPU: its scheduler and its Triton code do not ask for one. Triton must
    have an active driver that names a target.

    Stands on ``GraphLowering``, ``post_grad_passes``, the option ``cpu_backend``, ``metrics.generated_kernel_count``
    and ``get_read_write_buffers_sizes`` of a scheduled node.
    """
    from torch._inductor import metrics
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with torch.no_grad(), no_autocast(), inductor_config.patch(cpu_backend="triton"), V.set_fake_mode(mode):
        decomposed = _decompose(module, inputs, {**select_decomp_table(), **decompositions})
        post_grad_passes(decomposed, is_inference=True)
        graph = GraphLowering(decomposed, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
        handlers = (V.set_graph_handler(graph), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()))
        with contextlib.ExitStack() as stack:
            for handler in handlers:
                stack.enter_context(handler)
            graph.run(*inputs)
            before = metrics.generated_kernel_count
            source, _ = graph.codegen()
            nodes = graph.scheduler.nodes
            moved = sum(n.get_read_write_buffers_sizes() for n in nodes if not n.is_extern())
            called = [getattr(n.node, "python_kernel_name", None) for n in nodes if n.is_extern()]
            others = tuple(str(name) for name in called if name)  # a result among several has no name
            return TritonFigures(metrics.generated_kernel_count - before, int(moved), others, source.value)


def _decompose(module: fx.GraphModule, inputs: list[Any], table: dict[Any, Callable[..., Any]]) -> fx.GraphModule:
    """Trace a module again with decompositions, keeping placeholder names (they are part of cache keys)."""
    mode = detect_fake_mode(inputs) or contextlib.nullcontext()
    run = fx.Interpreter(module).run
    with mode, fx.traceback.preserve_node_meta():
        traced: fx.GraphModule = make_fx(run, decomposition_table=table)(*inputs)
        if any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in traced.graph.nodes):
            traced = make_fx(functionalize(run), decomposition_table=table)(*inputs)
    for new, old in zip(
        traced.graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder"), strict=True
    ):
        new.target = old.target
        new.name = old.name
    result = traced.graph.output_node()
    if isinstance(result.args[0], fx.Node):  # a single output: keep the tuple convention
        result.args = ((result.args[0],),)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _passing_reason(error: BaseException) -> str:
    """Why a later try may succeed where this one failed, or "".

    Stands on ``InductorError.inner_exception``, ``InvalidCxxCompiler``, and on compilers quoting the system's words.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, (OSError, InvalidCxxCompiler)):
            return _first_line(current)
        current = getattr(current, "inner_exception", None) or current.__cause__ or current.__context__
    words = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)]
    found = [word for word in (*words, "Killed signal") if word in str(error)]
    return f"{_first_line(error)}: {found[0]}" if found else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def load_artifact(artifact: CompiledFxGraph) -> Callable[[list[Any]], Any]:
    """The boxed callable of a compiled region, reloading it from disk if it was just unpickled.

    Stands on ``FxGraphCache.cache_hit_post_compile``, which writes the Python wrapper and finds or rebuilds its
    kernels.
    """
    if artifact.current_callable is None:
        probe_vector_isa().join()
        loaded, _ = FxGraphCache.cache_hit_post_compile(artifact, {}, CompiledFxGraphConstants())
        if loaded is None or loaded.current_callable is None:
            raise RuntimeError("a cached region could not be loaded")
        artifact = loaded
    call = artifact.current_callable
    assert call is not None
    return call


def cache_directory() -> str:
    """Where Inductor and AOTAutograd keep compiled code and programs."""
    return cache_dir()


@functools.cache
def probe_vector_isa() -> threading.Thread:
    """Find out on a thread, once a process, which vector instructions the C++ compiler and this CPU have; join it.

    At its first kernel Inductor loads a test library for each instruction set, in processes of their own, and builds
    them first in an empty cache directory: about 1 s and 7 s, which a second core spends while the graph is traced. A
    failure is left for Inductor to meet again, and to report. Stands on ``valid_vec_isa_list``.
    """

    def probe() -> None:
        with contextlib.suppress(Exception):
            valid_vec_isa_list()

    thread = threading.Thread(target=probe, name="dscompile-vector-isa", daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def try_build_lock(root: Path, key: str) -> Iterator[bool]:
    """Hold the lock under which Inductor builds the library ``key`` in ``root``; yields False if a build has it.

    Stands on ``CppCodeCache`` locking ``locks/KEY.lock`` with ``torch.utils._filelock.FileLock``.
    """
    if not (root / "locks" / f"{key}.lock").exists():
        yield True
        return
    try:
        lock = FileLock(root / "locks" / f"{key}.lock", timeout=0).acquire()
    except (Timeout, OSError):
        yield False
        return
    with lock:
        yield True


def load_cpp_library(source: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Build a C++ library for this CPU, or find it in Inductor's cache, and load it.

    ``flags`` come after Inductor's, which leave loops alone (its own are vectorised already) and keep ``errno``.

    Stands on ``CppCodeCache.load``: its flags, its lock, its place on disk. Raises Inductor's error if the build fails.
    """
    library: ctypes.CDLL = CppCodeCache.load(source, needs_vec_isa=True, extra_flags=tuple(flags))
    return library


def unloaded(artifact: CompiledFxGraph) -> CompiledFxGraph:
    """A copy of a compiled region that can be pickled."""
    bare = copy.copy(artifact)
    bare.prepare_for_serialization()
    return bare


NotCacheable = BypassAOTAutogradCache
"""Raised while a program is stored: AOTAutograd leaves it out of its cache and goes on."""


class _KeyOnly(CustomPartitionerFn):
    """Carries our cache key into PyTorch's: the hash of every compiled graph includes its partitioner's ``uuid``."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        raise AssertionError("dscompile hands AOTAutograd its own partition function")

    def uuid(self) -> str:
        return self.key


@contextlib.contextmanager
def our_cache_key(key: str, *, regions: bool, programs: bool) -> Iterator[None]:
    """While AOTAutograd runs: add ``key`` to its cache key, store whole programs, and compile backward right away.

    Args:
        key: hash of everything of ours that a compiled program depends on.
        regions: use Inductor's cache of compiled regions.
        programs: use AOTAutograd's cache of whole programs; off, every start traces and runs the passes again.

    Stands on ``bundled_autograd_cache`` (an entry holds the ``OutputCode`` itself), ``custom_partitioner_fn.uuid`` and
    ``force_non_lazy_backward_lowering`` (the entry is complete before the first backward).
    """
    functorch = {
        "bundled_autograd_cache": True,
        "force_non_lazy_backward_lowering": True,
        "enable_autograd_cache": programs,
    }
    inductor = {"custom_partitioner_fn": _KeyOnly(key), "fx_graph_cache": regions}
    with functorch_config.patch(functorch), inductor_config.patch(inductor):
        yield


def empty_strided_cpu(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What generated wrappers call for a CPU buffer: ``torch.empty_strided`` past the dispatcher.

    Stands on ``torch._C._dynamo.guards._empty_strided_cpu``.
    """
    tensor: torch.Tensor = _guards._empty_strided_cpu(size, stride, dtype)  # type: ignore[attr-defined]
    return tensor


def reinterpret(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """A tensor on the same storage that autograd does not take for a view.

    Stands on ``torch._C._dynamo.guards._reinterpret_tensor``.
    """
    other: torch.Tensor = _guards._reinterpret_tensor(tensor, size, stride)  # type: ignore[attr-defined]
    return other


def set_allocator(call: Callable[[list[Any]], Any], allocate: Callable[..., torch.Tensor]) -> bool:
    """Let a compiled region's generated wrapper take its CPU buffers from ``allocate(size, stride, dtype)``.

    Stands on the wrapper's module-level name ``empty_strided_cpu``; returns False if this wrapper has none.
    """
    namespace = getattr(getattr(call, "__func__", call), "__globals__", {})
    if "empty_strided_cpu" not in namespace:
        return False
    namespace["empty_strided_cpu"] = allocate
    return True
