"""The private parts of PyTorch's compile cache that our own entries are keyed and guarded by.

The third file that may name private parts of PyTorch, beside :mod:`dscompile.torch_compat` and
:mod:`dscompile.inductor_compat`. Each helper says which private name it stands on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache, autograd_cache_key
from torch._functorch._aot_autograd.schemas import AOTConfig
from torch._inductor import config as inductor_config
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.experimental.symbolic_shapes import has_guarding_hint

from dscompile.inductor_compat import NotCacheable
from dscompile.torch_compat import TracingContext, storage_key

_OF_PYTORCH = (
    *("aten", "prim", "prims", "inductor", "higher_order", "profiler", "rngprims", "quantized"),
    *("quantized_decomposed", "mkldnn", "mkl", "onednn", "c10d", "c10d_functional", "_c10d_functional"),
    *("_c10d_functional_autograd", "_dtensor", "symm_mem", "fsdp", "dscompile"),
)
"""Namespaces of operators whose gradients and shapes come with PyTorch's version, or with our source."""


def captured_key(gm: fx.GraphModule, inputs: Sequence[Any], more: Sequence[str]) -> str:
    """SHA-256 of a graph that Dynamo captured, of its real inputs' metadata, and of PyTorch's whole state.

    Call it while the graph is compiled (inside a backend) and our cache key is set
    (:func:`dscompile.inductor_compat.our_cache_key`). Stands on ``autograd_cache_key``: the graph's code and
    constants' metadata, shapes, strides, dtypes, devices, ``requires_grad``, grad mode, autocast, threads, and the
    configuration of functorch and Inductor. Added here: which inputs share memory, and what constants hold.

    Args:
        gm: the captured graph.
        inputs: its arguments, tensors among them real.
        more: whatever else the program depends on.

    Raises:
        NotCacheable: nothing can be said that another process could rely on; the message says why.
    """
    _refuse_foreign_operators(gm)
    symbols = [value for value in inputs if isinstance(value, torch.SymInt)]
    if not all(map(has_guarding_hint, symbols)):
        raise NotCacheable("a size of its inputs follows from data")
    config = AOTConfig(
        fw_compiler=None,
        bw_compiler=None,
        partition_fn=None,
        decompositions=None,
        num_params_buffers=0,
        aot_id=0,
        keep_inference_input_mutations=False,
        dynamic_shapes=bool(symbols),
    )
    try:
        key, _ = autograd_cache_key(gm, inputs, config)
    except NotCacheable as error:
        raise NotCacheable(" ".join(str(error).split())) from error  # several lines
    except Exception as error:  # as AOTAutograd does: whatever cannot be hashed is not kept
        raise NotCacheable(f"{type(error).__name__}: {error}") from error
    parts = [key, repr(_sharing(inputs)), *_constants(gm), *more]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _refuse_foreign_operators(gm: fx.GraphModule) -> None:
    """A custom operator's gradient is traced into the program, and nothing tells one version of it from the next."""
    marked = inductor_config.unsafe_marked_cacheable_functions
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if not isinstance(node.target, (OpOverload, OpOverloadPacket)):
                continue
            packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
            name = packet._qualified_op_name.replace("::", ".")
            if name.partition(".")[0] not in _OF_PYTORCH and f"torch.ops.{name}" not in marked:
                raise NotCacheable(
                    f"nothing tells one version of the operator {name} from another (give its version in "
                    f"torch._inductor.config.unsafe_marked_cacheable_functions['torch.ops.{name}'])"
                )


def _sharing(inputs: Sequence[Any]) -> list[int]:
    """For each input the first one with the same memory."""
    seen: dict[int, int] = {}
    found = []
    for index, value in enumerate(inputs):
        key = storage_key(value)
        found.append(index if key is None else seen.setdefault(key, index))
    return found


def _constants(gm: fx.GraphModule) -> Iterator[str]:
    """Name and content of every tensor that the graph holds itself, but parameters and buffers, which are inputs."""
    for prefix, module in gm.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{prefix}.{name} {content_of(value)}"


def content_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements. Raises :class:`NotCacheable` for one whose elements cannot be read (sparse)."""
    try:
        with torch.no_grad():
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise NotCacheable(f"a constant of layout {tensor.layout} on {tensor.device} cannot be hashed") from error


def guards_of(inputs: Sequence[Any]) -> str:
    """What tracing found out that sizes must obey, as an expression for :func:`guards_hold`; "" for fixed sizes.

    Raises:
        NotCacheable: tracing found out more, about inputs that overlap in memory.

    Stands on ``AOTAutogradCache.generate_guards_expression``'s two calls of ``ShapeEnv``, and on
    ``GuardsContext.aotautograd_guards``.
    """
    context = TracingContext.try_get()
    if context is not None and context.guards_context.aotautograd_guards:
        raise NotCacheable("its inputs overlap in memory in a way that each call must look at")
    symbols = AOTAutogradCache._filter_backed_symints(inputs)
    env = AOTAutogradCache._get_shape_env()
    if env is None or not symbols:
        return ""
    return env.produce_guards_expression(placeholders=symbols, guards=env.get_pruned_guards(symbols)) or ""


def guards_hold(expression: str, inputs: Sequence[Any]) -> bool:
    """Whether sizes obey what :func:`guards_of` wrote; if so, they become guards of what is compiled now.

    Stands on ``ShapeEnv.evaluate_guards_expression``, asked about example values first, which adds no guards.
    """
    if not expression:
        return True
    symbols = AOTAutogradCache._filter_backed_symints(inputs)
    env = AOTAutogradCache._get_shape_env()
    if env is None or not env.evaluate_guards_expression(expression, [s.node.hint for s in symbols]):
        return False
    return bool(env.evaluate_guards_expression(expression, symbols))
