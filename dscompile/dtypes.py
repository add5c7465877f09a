"""In which dtypes a distributed model computes: what the ``precision`` section means for parameters, buffers, inputs.

Parameters stay fp32 masters, and each read is the master cast to ``param_dtype`` (:mod:`dscompile.ops`). Floating-point
arguments of the distributed module's own ``forward`` are cast as FSDP2 does (``cast_forward_inputs``); arguments of
submodules, integers and what the model makes itself are not. Buffers keep their dtype, as in FSDP2, unless
``buffer_dtype`` converts them once, as DeepSpeed does by converting the whole module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dscompile.config import PrecisionConfig
from dscompile.torch_compat import pytree

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_dtypes(precision: PrecisionConfig) -> tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]:
    """(compute dtype, dtype in which gradients travel, dtype of accumulated gradients); None: the master's own."""
    compute = None if precision.param_dtype == "fp32" else _DTYPES[precision.param_dtype]
    wire = compute if precision.reduce_dtype is None else _DTYPES[precision.reduce_dtype]
    accumulate = None if precision.grad_dtype is None else _DTYPES[precision.grad_dtype]
    return compute, wire, accumulate


def convert_buffers(model: nn.Module, precision: PrecisionConfig) -> None:
    """Convert floating-point buffers to ``buffer_dtype``, once, if one is given."""
    if precision.buffer_dtype is None:
        return
    dtype = _DTYPES[precision.buffer_dtype]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def cast_inputs(model: nn.Module, precision: PrecisionConfig) -> RemovableHandle | None:
    """Cast floating-point arguments of ``model.forward`` to ``param_dtype`` from now on, unless that is fp32."""
    if precision.param_dtype == "fp32" or not precision.cast_forward_inputs:
        return None
    return model.register_forward_pre_hook(_Cast(_DTYPES[precision.param_dtype]), prepend=True, with_kwargs=True)


class _Cast:
    """A forward pre-hook that pickles and copies with the model."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The arguments with floating-point tensors cast, in nested containers too."""
        return pytree.tree_map(self._cast, (args, kwargs))

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
