"""Block-sparse attention as three kernels: forward, gradient of q, gradients of k and v."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from dscompile.codegen.tile.ir import Buffer
from dscompile.codegen.tile.schedule import power
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.templates import attention_text as text
from dscompile.errors import UnsupportedError

BLOCKS = (16, 32, 64, 128)
TILE = 64
"""Most rows of a tile: with 128 the gradients of k and v do not fit the registers of any target but sm_100."""
MAX_DIM = 256
_SHARED = 160 * 1024
"""Bytes of tiles in flight: every CUDA target's opt-in shared memory, with room for the rest."""


@dataclass(frozen=True, slots=True)
class Attention:
    """One use of block-sparse attention.

    Attributes:
        batch, heads, seq, dim: of q, k and v, which are ``[batch, heads, seq, dim]`` and contiguous. block: of the
        layout. listed: blocks of the layout, all heads together. dtype: of q, k, v. causal, padded: masks inside the
        listed blocks. precision: of fp32 products, ``ieee`` or ``tf32`` (rounds operands to 11 bits).
        scale: of the scores; default ``1 / sqrt(dim)``.
    """

    batch: int
    heads: int
    seq: int
    dim: int
    block: int
    listed: int
    dtype: torch.dtype
    causal: bool = False
    padded: bool = False
    precision: str = "ieee"
    scale: float | None = None

    def check(self) -> None:
        """Raise :class:`UnsupportedError` for what no kernel is generated for."""
        if self.block not in BLOCKS:
            raise UnsupportedError(f"sparse attention has blocks of {', '.join(map(str, BLOCKS))}, not {self.block}.")
        if self.dim % 8 or not 8 <= self.dim <= MAX_DIM:
            raise UnsupportedError(f"sparse attention has a head size of 8, 16, ... {MAX_DIM}, not {self.dim}.")
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedError(f"sparse attention is computed in float32, float16 and bfloat16, not {self.dtype}.")
        if self.precision not in ("ieee", "tf32"):
            raise UnsupportedError(f"precision is 'ieee' or 'tf32', not {self.precision!r}.")

    def tile(self, what: str) -> int:
        """Rows and columns of one product in the kernel ``what``.

        fp32 products take more registers: ``ieee`` runs on the ordinary units, ``tf32`` holds 32-bit operands.
        """
        most = TILE
        if self.dtype is torch.float32:
            ordinary = self.precision == "ieee"
            most = (32 if ordinary else 64) if what == "forward" and self.dim <= 64 else (16 if ordinary else 32)
        return min(self.block, most)


def offsets_and_indices(layout: Tensor) -> tuple[Tensor, Tensor]:
    """The listed blocks of every row of a layout ``[heads, rows, cols]``: int32 ``[heads, rows + 1]`` and indices.

    For the columns, pass ``layout.transpose(1, 2)``.
    """
    heads, rows, _ = layout.shape
    used = layout != 0
    counts = used.sum(-1).reshape(-1)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    starts = ends[:-1].reshape(heads, rows)
    offsets = torch.cat([starts, ends[rows::rows].reshape(heads, 1)], 1)
    return offsets.to(torch.int32).contiguous(), used.nonzero()[:, 2].to(torch.int32).contiguous()


def attention_kernels(use: Attention) -> dict[str, Kernel]:
    """``forward``, ``backward_q`` and ``backward_kv``.

    ``delta``, which both backward kernels read, is the sum over ``dim`` of gradient times result, in fp32: a row
    reduction that fusion makes (:func:`delta`).

    Raises:
        UnsupportedError: a block, head size, dtype or precision that there is no kernel for.
    """
    use.check()
    elements = use.batch * use.heads * use.seq
    blocks = -(-use.seq // use.block)
    values = {
        n: Buffer(n, use.dtype, sympy.Integer(elements * use.dim))
        for n in ("q", "k", "v", "grad", "out", "dq", "dk", "dv")
    }
    values |= {n: Buffer(n, torch.float32, sympy.Integer(elements)) for n in ("lse", "delta")}
    values["keep"] = Buffer("keep", torch.int8, sympy.Integer(use.batch * use.seq if use.padded else 1))
    values["offsets"] = Buffer("offsets", torch.int32, sympy.Integer(use.heads * (blocks + 1)))
    values["indices"] = Buffer("indices", torch.int32, sympy.Integer(max(use.listed, 1)))
    listing = ("keep", "offsets", "indices")
    inner = ("q", "k", "v", "grad", "lse", "delta")
    return {
        "forward": _kernel(use, "forward", text.FORWARD, values, ("q", "k", "v", *listing), ("out", "lse")),
        "backward_q": _kernel(use, "backward_q", text.BACKWARD_Q, values, (*inner, *listing), ("dq",)),
        "backward_kv": _kernel(use, "backward_kv", text.BACKWARD_KV, values, (*inner, *listing), ("dk", "dv")),
    }


_TITLES = {
    "forward": "Block-sparse attention, forward: out and the softmax's statistics.",
    "backward_q": "Block-sparse attention, backward: the gradient of q.",
    "backward_kv": "Block-sparse attention, backward: the gradients of k and v, block column by block column.",
}


def _kernel(
    use: Attention, what: str, body: str, values: Mapping[str, Buffer], reads: tuple[str, ...], writes: tuple[str, ...]
) -> Kernel:
    name = f"attention_{what}"
    ideal = sum(int(values[n].bytes) for n in (*reads, *writes))
    moved = ideal + _reread(use, what)
    head = text.HEAD.format(
        title=f"{name}: {_TITLES[what]}",
        moves=moved,
        listed_blocks=use.listed,
        block=use.block,
        listed="query rows" if what == "backward_kv" else "key columns",
        of="column" if what == "backward_kv" else "row",
    )
    tile = use.tile(what)
    tiles = -(-use.seq // use.block) * (use.block // tile)
    return Kernel(
        name,
        head + body.format(name=name),
        tuple(values[n] for n in reads),
        tuple(values[n] for n in writes),
        (("heads", sympy.Integer(use.heads)), ("seq", sympy.Integer(use.seq))),
        {
            "DIM": use.dim, "DIM_BLOCK": max(power(use.dim), 16), "BLOCK": use.block, "TILE": tile,
            "CAUSAL": use.causal, "PADDED": use.padded, "RAGGED": use.seq % use.block != 0, "PRECISION": use.precision,
            "SCALE": 1 / math.sqrt(use.dim) if use.scale is None else use.scale,
        },
        (sympy.Integer(tiles), sympy.Integer(use.batch * use.heads)),
        warps=_warps(use, tile),
        stages=_stages(use, what),
        bytes=moved,
        ideal=ideal,
        nodes=(name,),
        kind="matrix",
    )  # fmt: skip


def _reread(use: Attention, what: str) -> int:
    """Bytes read again: every listed block brings its two tiles, where an ideal kernel reads each tensor once."""
    pair = 2 * use.block * use.dim * use.dtype.itemsize
    once = 2 * use.batch * use.heads * use.seq * use.dim * use.dtype.itemsize
    return max(use.batch * use.listed * (use.block // use.tile(what)) * pair - once, 0)


def _warps(use: Attention, tile: int) -> int:
    """A warp for each 16 rows of a tile; twice that for wide heads, whose accumulators would not fit the registers."""
    if use.dtype is torch.float32:
        return 4
    return tile // 16 * (2 if power(use.dim) > 64 and tile == TILE else 1)


def _stages(use: Attention, what: str) -> int:
    """How many turns' tiles are in flight: three if they fit, fewer for wide heads and fp32."""
    tile = use.tile(what) * max(power(use.dim), 16) * use.dtype.itemsize
    held = tile * (1 if what == "forward" else 2)
    return max(1, min(3, (_SHARED - held) // (2 * tile)))


def delta(grad: Tensor, out: Tensor) -> Tensor:
    """``[batch, heads, seq]`` fp32: what the softmax's backward subtracts from every score's gradient."""
    return (grad.float() * out.float()).sum(-1)
