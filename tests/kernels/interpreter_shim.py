"""The one file of the project that patches another package: Triton 3.7.1's interpreter, in a test process of its own.

Its bf16 is stored as uint16. ``tl.dot`` multiplies those bits as numbers, and the conversion from fp32 cuts bits off
instead of rounding to nearest even: both silently. Neither happens on a device. The shim makes the interpreter do what
a device does; it is never imported by the package or by the process that runs pytest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def round_to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """fp32 -> bf16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16)


def widen(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bf16 bits -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Patch the interpreter of this process."""
    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bf16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return widen(data).view(np.uint32)
        return convert(data, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        x, y = (widen(t.data) if t.dtype.scalar == tl.bfloat16 else t.data.astype(np.float32) for t in (a, b))
        return interpreter.TensorHandle(np.matmul(x, y, dtype=np.float32) + d.data, d.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
