"""The compiled cross-entropy of rows of logits as a Python function on tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class LossKernel:
    """A loaded library."""

    library: ctypes.CDLL

    @staticmethod
    def load(path: str) -> LossKernel:
        """Load a built library.

        Raises:
            OSError: it cannot be loaded. AttributeError: it has no entries.
        """
        library = ctypes.CDLL(path)
        assert library.loss_rows_f32
        return LossKernel(library)

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there is an entry for logits of this dtype (fp16 needs a compiler that has the type)."""
        return dtype in _NAMES and hasattr(self.library, f"loss_rows_{_NAMES[dtype]}")

    def rows(self, logits: Tensor, target: Tensor, counted: Tensor | None, *, gradient: bool) -> Tensor:
        """The loss of each row, fp64 ``[rows]``, 0 where it does not count.

        Args:
            logits: ``[rows, classes]``, contiguous, of a dtype that :meth:`takes`; with ``gradient`` they become the
                loss's gradient (softmax less one-hot; 0 in rows that do not count).
            target: int64 ``[rows]``, classes that exist, also in rows that do not count.
            counted: bool ``[rows]``, or None: all rows count.
            gradient: whether the gradient is wanted.
        """
        rows, classes = logits.shape
        losses = torch.empty(rows, dtype=torch.float64)
        target = target.contiguous()
        counted = None if counted is None else counted.contiguous()
        getattr(self.library, f"loss_rows_{_NAMES[logits.dtype]}")(
            *(ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(rows), ctypes.c_int64(classes)),
            ctypes.c_void_p(target.data_ptr()),
            ctypes.c_void_p(None if counted is None else counted.data_ptr()),
            *(int(gradient), ctypes.c_void_p(losses.data_ptr()), ctypes.c_int64(torch.get_num_threads())),
        )
        return losses
