"""The kernels of a training step: functions of :mod:`~dscompile.codegen.triton_backend.functions`, and their arguments.

None is a hand-written kernel: a function is traced, decomposed, fused and rendered. The list is what
``dscompile kernels`` shows and what the tests hold to the bars.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dscompile.codegen.tile.trace import traced
from dscompile.codegen.triton_backend import functions
from dscompile.codegen.triton_backend.assemble import Assembled, assemble


@dataclass(frozen=True)
class Entry:
    """A function and what it is called with: ``make(dtype, rows, cols)`` gives (fake-able) arguments."""

    function: Callable[..., Any]
    make: Callable[[torch.dtype, int, int], tuple[Any, ...]]


def _matrix(*extra: str) -> Callable[[torch.dtype, int, int], tuple[Any, ...]]:
    """``x [rows, cols]`` and: ``x`` another one, ``n`` a row vector, ``s`` a seed; per row ``r`` fp32, ``i`` int64."""

    def make(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
        kinds: dict[str, Callable[[], Tensor]] = {
            "x": lambda: torch.empty(rows, cols, dtype=dtype),
            "n": lambda: torch.empty(cols, dtype=dtype),
            "r": lambda: torch.empty(rows, 1),
            "s": lambda: torch.zeros((), dtype=torch.int64),
            "i": lambda: torch.zeros(rows, dtype=torch.int64),
        }
        return tuple(kinds[e]() for e in ("x", *extra))

    return make


def _flat(*extra: str) -> Callable[[torch.dtype, int, int], tuple[Any, ...]]:
    """``[rows * cols]`` fp32 (``g``: of the dtype) and scalars (``0``)."""

    def make(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
        kinds: dict[str, Callable[[], Tensor]] = {
            "f": lambda: torch.empty(rows * cols),
            "g": lambda: torch.empty(rows * cols, dtype=dtype),
            "0": lambda: torch.empty(()),
        }
        return tuple(kinds[e]() for e in extra)

    return make


def _chunks(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
    table = [torch.empty(rows, cols) for _ in range(4)]
    table[1] = table[1].to(dtype)
    return (*table, torch.zeros(rows, dtype=torch.int64), torch.zeros(2), *(torch.empty(()) for _ in range(3)))


def _classes(*extra: str) -> Callable[[torch.dtype, int, int], tuple[Any, ...]]:
    """Logits and targets (``t``), a scalar (``0``), a value per row (``r``)."""

    def make(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
        kinds: dict[str, Callable[[], Tensor]] = {
            "x": lambda: torch.empty(rows, cols, dtype=dtype),
            "t": lambda: torch.zeros(rows, dtype=torch.int64),
            "0": lambda: torch.empty(()),
            "r": lambda: torch.empty(rows),
        }
        return tuple(kinds[e]() for e in extra)

    return make


def _heads(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
    return torch.empty(2, 3, rows, cols, dtype=dtype), torch.empty(rows, cols), torch.empty(rows, cols)


def _channels(*extra: str) -> Callable[[torch.dtype, int, int], tuple[Any, ...]]:
    """``x [8, rows / 8, H, W]``, where H * W is cols and W 32 if it can be; ``c``: fp32 per channel."""

    def make(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
        channels, width = max(rows // 8, 1), 32 if cols % 32 == 0 else cols
        kinds: dict[str, Callable[[], Tensor]] = {
            "x": lambda: torch.empty(8, channels, cols // width, width, dtype=dtype),
            "c": lambda: torch.empty(channels),
        }
        return tuple(kinds[e]() for e in extra)

    return make


def _images(*extra: str) -> Callable[[torch.dtype, int, int], tuple[Any, ...]]:
    """``x [rows / 64, 1, 64, cols]`` and, of half the height and width: ``y``, and ``i`` int64."""

    def make(dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
        images, half = max(rows // 64, 1), -(-cols // 2)
        kinds: dict[str, Callable[[], Tensor]] = {
            "x": lambda: torch.empty(images, 1, 64, cols, dtype=dtype),
            "y": lambda: torch.empty(images, 1, 32, half, dtype=dtype),
            "i": lambda: torch.zeros(images, 1, 32, half, dtype=torch.int64),
        }
        return tuple(kinds[e]() for e in extra)

    return make


@functools.cache
def entries() -> dict[str, Entry]:
    """Every function by name."""
    return {
        "bias_gelu": Entry(functions.bias_gelu, _matrix("n")),
        "bias_gelu_backward": Entry(functions.bias_gelu_backward, _matrix("x", "n")),
        "bias_silu": Entry(functions.bias_silu, _matrix("n")),
        "bias_silu_backward": Entry(functions.bias_silu_backward, _matrix("x", "n")),
        "bias_dropout_residual": Entry(functions.bias_dropout_residual, _matrix("n", "x", "s")),
        "bias_dropout_residual_backward": Entry(functions.bias_dropout_residual_backward, _matrix("s")),
        "layer_norm": Entry(functions.layer_norm, _matrix("n", "n")),
        "layer_norm_backward": Entry(functions.layer_norm_backward, _matrix("x", "r", "r", "n")),
        "embedding_norm": Entry(functions.embedding_norm, _matrix("i", "x")),
        "embedding_backward": Entry(functions.embedding_backward, _matrix("i")),
        "batch_norm": Entry(functions.batch_norm, _channels("x", *"cccc")),
        "batch_norm_backward": Entry(functions.batch_norm_backward, _channels("x", "x", *"ccc")),
        "max_pool": Entry(functions.max_pool, _images("x")),
        "max_pool_backward": Entry(functions.max_pool_backward, _images("y", "x", "i")),
        "average_pool": Entry(functions.average_pool, _images("x")),
        "average_pool_backward": Entry(functions.average_pool_backward, _images("y", "x")),
        "pad_join": Entry(functions.pad_join, _matrix("x")),
        "scatter_rows": Entry(functions.scatter_rows, _matrix("i")),
        "index_add": Entry(functions.index_add, _matrix("i", "x")),
        "histogram": Entry(functions.histogram, _matrix()),
        "rms_norm": Entry(functions.rms_norm, _matrix("n")),
        "rms_norm_backward": Entry(functions.rms_norm_backward, _matrix("x", "r", "n")),
        "softmax": Entry(functions.softmax, _matrix()),
        "cumulative_softmax": Entry(functions.cumulative_softmax, _matrix()),
        "softmax_backward": Entry(functions.softmax_backward, _matrix("x")),
        "cross_entropy": Entry(functions.cross_entropy, _classes("x", "t")),
        "cross_entropy_backward": Entry(functions.cross_entropy_backward, _classes("0", "x", "t", "r")),
        "cross_entropy_both": Entry(functions.cross_entropy_both, _classes("0", "x", "t")),
        "rotary": Entry(functions.rotary, _heads),
        "adamw": Entry(functions.adamw, _flat("f", "g", "f", "f", "0", "0", "0")),
        "lamb": Entry(functions.lamb, _chunks),
        "unscale": Entry(functions.unscale, _flat("g", "0")),
    }


def example(name: str, dtype: torch.dtype, rows: int, cols: int) -> tuple[Any, ...]:
    """Arguments of an entry, without data (on the ``meta`` device)."""
    with torch.device("meta"):
        return entries()[name].make(dtype, rows, cols)


def generate(name: str, arguments: tuple[Any, ...]) -> Assembled:
    """The kernels of one entry for arguments like these, and the function that launches them."""
    return assemble(traced(entries()[name].function, *arguments), name)
