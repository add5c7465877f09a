"""Private parts of PyTorch. Only this file, ``inductor_compat`` and ``cache_compat`` name any; others import them.

Each helper says which private name it stands on, so that a new PyTorch release is checked in one sitting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._dynamo import exc as dynamo_errors
from torch._dynamo.backends.common import aot_autograd as aot_autograd
from torch._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.functional_export import dynamo_graph_capture_for_export
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._functorch.partitioners import _extract_fwd_bwd_modules as _extract_fwd_bwd_modules
from torch._functorch.partitioners import default_partition as default_partition
from torch._guards import TracingContext as TracingContext
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._guards import tracing as tracing
from torch._library.fake_class_registry import FakeScriptObject
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed import Store, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols
from torch.utils import _pytree
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

pytree = _pytree

# -- fake tensors ----------------------------------------------------------------------------------------------------


TRUNC_NORMAL = torch.nn.init._no_grad_trunc_normal_.__code__
"""The code of ``trunc_normal_``'s rejection loop, by which a frame that runs it is known."""


def fake_mode_of(graph: fx.Graph) -> contextlib.AbstractContextManager[Any]:
    """The fake tensor mode that a traced graph's ``meta["val"]`` tensors belong to, ready to be entered."""
    for node in graph.nodes:
        value = node.meta.get("val")
        for leaf in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(leaf, FakeTensor):
                mode: contextlib.AbstractContextManager[Any] = leaf.fake_mode
                return mode
    return contextlib.nullcontext()


def fake_like(mode: contextlib.AbstractContextManager[Any], value: Any) -> Any:
    """A real tensor (a constant that a graph closed over) as a fake one of ``mode``; anything else as it is."""
    if isinstance(mode, FakeTensorMode) and isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value)
    return value


def fresh_fake(value: Any) -> Any:
    """A fake tensor like ``value`` in a storage of its own; anything that is not a strided fake tensor as it is."""
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def storage_key(value: Any) -> int | None:
    """Identity of the storage behind a (fake) tensor, or None: two values with equal keys share memory.

    Stands on ``UntypedStorage._cdata``. Sparse and opaque tensors have no storage.
    """
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def dispatch_modes() -> list[TorchDispatchMode]:
    """The dispatch modes that are active in this thread, innermost last (``_get_current_dispatch_mode_stack``)."""
    return list(_get_current_dispatch_mode_stack())


def strict_fake_mode() -> FakeTensorMode:
    """A fake mode that never runs a real kernel, and whose storages raise when asked for an address.

    Others run an operator without a fake kernel on zeros, which may draw random numbers, and answer 0 with a warning.
    Stands on ``functorch.config.fake_tensor_allow_unsafe_data_ptr_access``, read when the mode is made.
    """
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return FakeTensorMode(allow_fallback_kernels=False)


def forget_conversions(mode: FakeTensorMode) -> None:
    """Drop the weak references a fake mode keeps of tensors it has seen: ``swap_tensors`` refuses tensors with any.

    Stands on ``FakeTensorConverter.meta_converter`` and its ``tensor_memo``.
    """
    mode.fake_tensor_converter.meta_converter.tensor_memo.clear()


def swap_contents(left: torch.Tensor, right: torch.Tensor) -> None:
    """Exchange class, attributes and data of two tensors: every reference to ``left`` then sees what ``right`` was.

    ``torch.utils.swap_tensors`` does the same but refuses tensors with weak references, which recurrent layers keep
    of their own parameters. Raises ``TypeError`` if the classes' layouts differ. Stands on ``_swap_tensor_impl``.
    """
    left.__class__, right.__class__ = right.__class__, left.__class__
    left.__dict__, right.__dict__ = dict(right.__dict__), dict(left.__dict__)
    torch._C._swap_tensor_impl(left, right)


# -- Dynamo ----------------------------------------------------------------------------------------------------------


def source_names(gm: fx.GraphModule) -> list[str]:
    """Dynamo's source expression of each placeholder (``L['self']._modules['a']._parameters['w']``), "" if unknown."""
    names = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        names.append(str(source.name) if source is not None else "")
    return names


def duplicate_sources() -> list[tuple[str, str]]:
    """Pairs (other name, graph input's name) of sources that Dynamo found to be one object: tied parameters.

    Stands on the ``DUPLICATE_INPUT`` guards of the active tracing context.
    """
    context = TracingContext.try_get()
    if context is None:
        return []
    pairs = []
    for guard in context.guards_context.dynamo_guards:
        create = guard.create_fn
        if isinstance(create, functools.partial) and create.func.__name__ == "DUPLICATE_INPUT":
            pairs.append((str(guard.name), str(create.keywords["source_b"].name)))
    return pairs


def donated_saved_values() -> tuple[int, ...]:
    """Indices of the backward's inputs that AOTAutograd says nothing else will read, during a backward compile."""
    context = TracingContext.try_get()
    indices = getattr(getattr(context, "fw_metadata", None), "bw_donated_idxs", None)
    return tuple(indices or ())


# -- process groups --------------------------------------------------------------------------------------------------


def register_group(name: str, group: torch.distributed.ProcessGroup) -> None:
    """Let ``_c10d_functional`` operators find ``group`` under ``name``; replaces an earlier group of that name.

    Stands on ``torch._C._distributed_c10d._register_process_group``. ``destroy_process_group`` forgets all names.
    """
    registered: Any = torch._C._distributed_c10d  # its stubs want a private string type for names
    with contextlib.suppress(RuntimeError):  # nothing registered under this name
        if registered._resolve_process_group(name) is group:
            return
        registered._unregister_process_group(name)
    registered._register_process_group(name, group)


def is_registered(name: str) -> bool:
    """Whether a process group is registered under a logical name."""
    try:
        process_group(name)
    except RuntimeError:
        return False
    return True


def mesh_of_groups(device: str, ranks: torch.Tensor, axes: tuple[str, ...], groups: tuple[str, ...]) -> DeviceMesh:
    """A mesh over registered process groups that knows them by their logical names, so that pickles do too.

    Stands on ``DeviceMesh._dim_group_names``.
    """
    found = [process_group(name) for name in groups]
    mesh = DeviceMesh.from_group(found, device, mesh=ranks, mesh_dim_names=axes)
    inner: Any = mesh  # its annotations want a private string type for names
    inner._dim_group_names = list(groups)
    inner._pg_registry = dict(zip(groups, found, strict=True))
    return mesh


def whole_world() -> torch.distributed.ProcessGroup:
    """The default process group."""
    return cast(torch.distributed.ProcessGroup, torch.distributed.group.WORLD)


def unflattened(mesh: DeviceMesh, axis: str, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """A mesh with one axis split into several. Stands on ``DeviceMesh._unflatten``."""
    return mesh._unflatten(axis, sizes, names)


def process_group(name: str) -> torch.distributed.ProcessGroup:
    """The process group registered under a logical name.

    Raises ``RuntimeError`` if there is none. Stands on ``_resolve_process_group``.
    """
    registered: Any = torch._C._distributed_c10d
    return cast(torch.distributed.ProcessGroup, registered._resolve_process_group(name))


def group_backend(name: str, device: torch.device) -> str:
    """``"gloo"``, ``"nccl"``, ``"fake"``, ...: what carries a group's collectives on ``device``."""
    return str(process_group(name)._get_backend(device).name())


# -- distributed tensors -----------------------------------------------------------------------------------------------


def local_of(tensor: DTensor) -> torch.Tensor:
    """The local shard itself: unlike ``to_local()``, the same object every time, without autograd.

    Stands on ``DTensor._local_tensor``.
    """
    return tensor._local_tensor


def set_local(tensor: DTensor, local: torch.Tensor) -> None:
    """Move a DTensor's local shard into other memory of the same shape. Stands on ``DTensor._local_tensor``."""
    tensor._local_tensor = local


def static(tensor: torch.Tensor) -> torch.Tensor:
    """Say that a graph input's sizes never change: another model's parameter, cut otherwise, is no dynamic shape.

    Stands on ``torch._dynamo.mark_static``.
    """
    torch._dynamo.mark_static(tensor)
    return tensor


def never_a_frame(*functions: Any) -> None:
    """Let ``torch.compile`` begin at none of these functions, nor at what they call; it still traces through them.

    Else Dynamo compiles our own code that runs eagerly after a graph break. Stands on ``set_code_exec_strategy``.
    """
    for function in functions:
        set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


def wrap_like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """A local value as a DTensor placed like ``tensor``, of the local value's dtype.

    Differentiable if gradients are being recorded. Stands on ``DTensor._spec`` and its ``tensor_meta``.
    """
    if torch.is_grad_enabled() and local.requires_grad:
        return DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    spec = tensor._spec
    if spec.tensor_meta is not None and spec.tensor_meta.dtype != local.dtype:
        spec = dataclasses.replace(spec, tensor_meta=spec.tensor_meta._replace(dtype=local.dtype))
    return DTensor(local, spec, requires_grad=False)


def without_torch_function() -> contextlib.AbstractContextManager[Any]:
    """Run functions on tensor subclasses as if they were plain tensors."""
    context: contextlib.AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def has_hooks(tensor: torch.Tensor) -> bool:
    """Whether someone registered a gradient hook. Stands on ``_backward_hooks`` and ``_post_accumulate_grad_hooks``."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def has_call_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of this module, not of those in it, runs hooks. Stands on four dictionaries of ``nn.Module``."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


# -- splitting and sizes ---------------------------------------------------------------------------------------------


def extract_forward_backward(
    module: fx.GraphModule,
    saved: list[fx.Node],
    symbols: list[fx.Node],
    forward_outputs: int,
    static_inputs: list[fx.Node],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a joint graph into forward and backward modules in AOTAutograd's calling convention.

    Stands on ``_extract_fwd_bwd_modules``; ``saved`` and ``symbols`` must include placeholders that backward reads.
    """
    forward, backward = _extract_fwd_bwd_modules(
        module,
        list(saved),
        list(symbols),
        num_fwd_outputs=forward_outputs,
        static_lifetime_input_nodes=OrderedSet(static_inputs),
    )
    forward.graph.eliminate_dead_code()
    backward.graph.eliminate_dead_code()
    return forward, backward


def is_opaque(node: fx.Node) -> bool:
    """Whether a node's value is neither tensor, number, symbol nor a collection of those (a mesh, an effect token)."""
    value = node.meta.get("val")
    return isinstance(value, (torch.ScriptObject, FakeScriptObject))


def free_symbol_names(value: Any) -> set[str]:
    """Names of the size symbols that a fake value mentions."""
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, list, tuple)):
        return {str(symbol) for symbol in free_symbols(value)}
    return set()


def unbacked_symbol_names(value: Any) -> set[str]:
    """Names of the size symbols of a fake value that data decide, as after ``nonzero``."""
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, list, tuple)):
        return {str(symbol) for symbol in free_unbacked_symbols(value)}
    return set()


def tensor_bytes(value: Any) -> int:
    """Bytes of a (fake) tensor's elements; symbolic sizes count at their hint. Everything else is 0."""
    if not isinstance(value, torch.Tensor):
        return 0
    elements = 1
    for size in value.shape:
        elements *= size if isinstance(size, int) else size_hint(size)
    return elements * value.element_size()


def size_hint(size: Any) -> int:
    """The example value behind a symbolic size (1 if it has none)."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else 1


def no_autocast() -> contextlib.AbstractContextManager[Any]:
    """A context without autocast: a traced graph already holds the casts that the user's autocast made.

    Stands on ``torch._C._DisableAutocast``.
    """
    context: contextlib.AbstractContextManager[Any] = torch._C._DisableAutocast()
    return context


def autocast_is_on() -> bool:
    """Whether autocast is on for any device. Stands on ``torch._C._is_any_autocast_enabled``."""
    return bool(torch._C._is_any_autocast_enabled())


# -- canonical text --------------------------------------------------------------------------------------------------


def symbol_functions() -> dict[str, type]:
    """The sympy functions that symbolic sizes are built of (``FloorDiv``, ``Mod``, ``Max``, ...), by class name."""
    from torch.utils._sympy import functions

    return {
        c.__name__: c for c in vars(functions).values() if isinstance(c, type) and c.__module__ == functions.__name__
    }


def restore_symbol(env: ShapeEnv, symbol: Any, hint: Any, lower: Any, upper: Any, *, size_like: bool) -> None:
    """Make ``symbol`` known to ``env`` with its hint (None: unbacked) and range; a bound of None is infinite.

    Raises ``ValueError`` for an empty range. Stands on ``ShapeEnv._update_var_to_range``, ``ValueRanges`` and
    ``int_oo``.
    """
    from torch._dynamo.source import ConstantSource
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    infinity = int_oo if symbol.is_integer else sympy.oo
    low, high = -infinity if lower is None else lower, infinity if upper is None else upper
    if not low <= high:
        raise ValueError(f"the range [{low}, {high}] is empty")
    env._update_var_to_range(symbol, ValueRanges(low, high))
    if hint is not None:
        env.backed_var_to_val[symbol] = sympy.sympify(hint)
        env.var_to_sources[symbol] = [ConstantSource(symbol.name)]
        env.symbol_guard_counter[symbol] = 0  # create_symbol's bookkeeping: the first guard on the symbol counts here
    if size_like:
        env.size_like.add(symbol)


def symbol_facts(env: ShapeEnv, symbol: Any) -> tuple[Any, Any, Any, bool]:
    """(hint or None, lower or None, upper or None, size-like) of a symbol: what :func:`restore_symbol` takes back."""
    from torch.utils._sympy.numbers import int_oo

    unbounded = (int_oo, -int_oo, sympy.oo, -sympy.oo)  # int_oo.is_finite is True, so it cannot be asked
    hint = env.backed_var_to_val.get(symbol)
    bounds = env.var_to_range.get(symbol)
    low, high = (None, None) if bounds is None else (bounds.lower, bounds.upper)
    return (
        hint,
        None if low in unbounded else low,
        None if high in unbounded else high,
        symbol in env.size_like,
    )


def symbolic_value(env: ShapeEnv, expr: Any, kind: type) -> Any:
    """A SymInt, SymFloat or SymBool (``kind`` is ``int``, ``float`` or ``bool``) of a sympy expression."""
    wrapper: Any = {int: torch.SymInt, float: torch.SymFloat, bool: torch.SymBool}[kind]
    return wrapper(SymNode(expr, env, kind, None))


def lazy_graph_module(root: dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule whose Python code is generated when it is first called, not now (seconds at 20,000 nodes)."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def operator_names() -> list[str]:
    """Every registered operator as ``namespace.name``, for "did you mean"."""
    names = {name.partition(".")[0].replace("::", ".") for name in torch._C._dispatch_get_all_op_names()}
    return sorted(names)


def symbolic_expression(size: Any) -> Any:
    """The sympy expression of a symbolic size (public objects all the way: ``SymInt.node.expr``)."""
    return size.node.expr


def is_backed(size: Any) -> bool:
    """Whether a symbolic size follows from input shapes, and not from data (``nonzero``, ``item``)."""
    return not free_unbacked_symbols(size)


@contextlib.contextmanager
def without_guards(graph: fx.Graph) -> Iterator[None]:
    """Recompute fake values without adding guards to the graph's symbolic shapes.

    Stands on ``ShapeEnv.suppress_guards`` and ``FakeTensorMode.shape_env``.
    """
    shape_env = next((m.shape_env for n in graph.nodes if (m := getattr(n.meta.get("val"), "fake_mode", None))), None)
    with shape_env.suppress_guards() if shape_env is not None else contextlib.nullcontext():
        yield


def no_modes() -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors are real even while a trace with fake tensors is going on."""
    context: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return context


# -- the step entry --------------------------------------------------------------------------------------------------


def captured_step(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[fx.GraphModule, TracingContext]:
    """A module's forward pass as one graph whose inputs keep their names, and the context to go on tracing in.

    Stands on ``dynamo_graph_capture_for_export`` and the two entries of its result's ``meta``.
    """
    captured = dynamo_graph_capture_for_export(module)(*args)
    return captured, captured.meta.get("tracing_context") or TracingContext(captured.meta["fake_mode"])


def joint_of_captured(
    stack: contextlib.ExitStack, captured: fx.GraphModule, args: tuple[Any, ...]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The joint graph of a captured step; also the names of its parameter and buffer inputs, in order.

    Call it in the step's context. Stands on ``aot_export_joint_with_descriptors``; ``stack`` must stay open while the
    graph's fake values are used.
    """
    joint = aot_export_joint_with_descriptors(stack, captured, args)
    return joint.graph_module, (*joint.params_spec, *joint.buffers_spec)


def captured_inputs(captured: fx.GraphModule, args: tuple[Any, ...]) -> list[Any]:
    """The real value of every input of a captured graph, found as the graph itself finds them.

    Stands on ``_dynamo_bytecode_flatten``, which the captured module's ``forward`` begins with.
    """
    flatten: Any = captured._dynamo_bytecode_flatten
    return list(flatten(*args))


def bare_copy(captured: fx.GraphModule) -> fx.GraphModule:
    """A captured graph without what capturing hung on it, and with what it reads: the same in every process."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(captured.graph, {}))
    return fx.GraphModule(captured, graph)


def joint_of(stack: contextlib.ExitStack, gm: fx.GraphModule, args: tuple[Any, ...]) -> fx.GraphModule:
    """The joint graph of a Dynamo frame; call it inside a backend. ``stack`` stays open while fake values are used."""
    joint: fx.GraphModule = aot_export_joint_with_descriptors(stack, gm, args).graph_module
    return joint


_REFUSALS = (
    dynamo_errors.Unsupported,
    dynamo_errors.UserError,
    dynamo_errors.UncapturedHigherOrderOpError,
    dynamo_errors.FailOnRecompileLimitHit,
)


def is_refusal(error: BaseException) -> bool:
    """Whether Dynamo says that it cannot capture a function whole (``fullgraph=True``), and not that it is broken."""
    return isinstance(error, _REFUSALS)


def behind(error: BaseException) -> BaseException | None:
    """What a backend raised inside Dynamo's wrapper, else the error's cause. Stands on ``BackendCompilerFailed``."""
    if isinstance(error, dynamo_errors.BackendCompilerFailed):
        return cast(BaseException, error.inner_exception)
    return error.__cause__


# -- ranks -----------------------------------------------------------------------------------------------------------


def default_store() -> Store:
    """The c10d store of the default process group. Stands on ``distributed_c10d._get_default_store``."""
    store: Store = distributed_c10d._get_default_store()
    return store


def kernel_cache_directory() -> str:
    """Where our own compiled kernels are kept: a folder in Inductor's cache directory.

    Stands on ``torch._inductor.runtime.cache_dir_utils.cache_dir``.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return os.path.join(cache_dir(), "cpu_kernels")


# -- decompositions --------------------------------------------------------------------------------------------------


def tile_decompositions() -> dict[OpOverload, Any]:
    """PyTorch's decompositions into core aten, and of the norms and softmaxes too: what tiles are built from.

    Stands on ``torch._decomp``.
    """
    aten = torch.ops.aten
    more = [
        aten.native_layer_norm.default,
        aten._softmax.default,
        aten._log_softmax.default,
        aten.native_dropout_backward.default,
        aten.gelu_backward.default,
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit.no_stats,
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit_no_training.default,
    ]
    table = {**core_aten_decompositions(), **get_decompositions(more)}
    # Written out, attention has other strides than the operator gives, and what reads it no longer fits.
    return {op: f for op, f in table.items() if "scaled_dot_product" not in str(op)}
