"""The compiled attention kernels as Python functions on tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscompile.attention_gathered import Blocks, lse_like, result_like
from dscompile.errors import UnsupportedError

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Dtypes that the kernels take, with the suffix of their entries."""


_INVALID = 2
"""What an entry returns for a layout that would read outside the tensors."""


class _View(ctypes.Structure):
    """``View`` of the C++ source: a ``[batch, heads, seq, size]`` tensor; strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64))


class _Problem(ctypes.Structure):
    """``Problem`` of the C++ source."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "seq_q", "seq_k", "size", "block", "layout_heads")),
        *((name, ctypes.c_void_p) for name in ("row_ptr", "col_idx", "t_row_ptr", "t_col_idx", "key_padding")),
        *((name, ctypes.c_int64) for name in ("nnz", "t_nnz", "causal", "threads")),
        ("scale", ctypes.c_double),
    )


@dataclass(frozen=True)
class AttentionKernels:
    """Forward and backward of a loaded library; see :mod:`dscompile.attention_ops` for what they compute."""

    library: ctypes.CDLL
    tiles: bool

    @staticmethod
    def load(path: str, *, tiles: bool = True) -> AttentionKernels:
        """Load a built library; ``tiles``: on AMX tiles, where library and system have them."""
        library = ctypes.CDLL(path)
        return AttentionKernels(library, tiles and bool(library.attention_has_tiles()))

    def lacks(self, dtype: torch.dtype) -> str:
        """Why this library has no kernel for a dtype of ``NAMES``; "" if it has one."""
        if dtype is torch.float16 and not self.library.attention_has_fp16():
            return "the C++ compiler that built the kernel has no fp16 type (GCC has one from version 12, Clang 15)"
        return ""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """``(out, lse)``."""
        q, k, v = map(_rows, (q, k, v))
        out, lse = result_like(q), lse_like(q)
        if not k.shape[2] or not q.numel():
            return out.zero_(), lse.fill_(-torch.inf)
        problem, held = _problem(q, k, blocks)
        views = [ctypes.byref(_view(x)) for x in (q, k, v, out)]
        self._call("forward", q.dtype, ctypes.byref(problem), *views, _data(lse), int(self.tiles))
        del held
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: Blocks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of ``q``, ``k`` and ``v``."""
        grad_out, q, k, v, out = map(_rows, (grad_out, q, k, v, out))
        lse = lse.transpose(1, 2).contiguous()
        dq, dk, dv = result_like(q), result_like(k), result_like(v)
        if not k.numel() or not q.numel():
            return dq.zero_(), dk.zero_(), dv.zero_()
        problem, held = _problem(q, k, blocks)
        views = [ctypes.byref(_view(x)) for x in (grad_out, q, k, v, out)]
        grads = [ctypes.byref(_view(x)) for x in (dq, dk, dv)]
        self._call("backward", q.dtype, ctypes.byref(problem), *views, _data(lse), *grads, int(self.tiles))
        del held
        return dq, dk, dv

    def _call(self, direction: str, dtype: torch.dtype, *arguments: Any) -> None:
        failed = getattr(self.library, f"attention_{direction}_{NAMES[dtype]}")(*arguments)
        if failed == _INVALID:
            name = "t_" if direction == "backward" else ""
            raise UnsupportedError(
                f"block-sparse attention {direction}: {name}row_ptr must ascend inside {name}col_idx, and each row's "
                "columns must ascend inside the sequence's blocks."
            )
        if failed:
            raise MemoryError(f"block-sparse attention {direction}: no memory for scratch buffers")


def _rows(x: Tensor) -> Tensor:
    """``x`` with the elements of each row adjacent, as the kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view(x: Tensor) -> _View:
    return _View(x.data_ptr(), *x.stride()[:3])


def _data(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _problem(q: Tensor, k: Tensor, blocks: Blocks) -> tuple[_Problem, list[Tensor | None]]:
    """The description of a call, and the tensors that must outlive it."""
    indices = (blocks.row_ptr, blocks.col_idx, blocks.t_row_ptr, blocks.t_col_idx, blocks.key_padding_mask)
    held = [None if x is None else x.contiguous() for x in indices]
    shared = 1 if blocks.row_ptr is None else blocks.row_ptr.shape[0]
    batch, heads, seq, size = q.shape
    problem = _Problem(
        *(batch, heads, seq, k.shape[2], size, blocks.block, shared),
        *map(_data, held),
        *(0 if x is None else x.numel() for x in (blocks.col_idx, blocks.t_col_idx)),
        *(int(blocks.causal), torch.get_num_threads(), blocks.scale),
    )
    return problem, held
