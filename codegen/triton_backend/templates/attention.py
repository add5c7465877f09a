"""Block-sparse attention as three kernels: forward, gradient of q, gradients of k and v."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from dscompile.codegen.tile.indexing import Div
from dscompile.codegen.tile.ir import Buffer
from dscompile.codegen.tile.schedule import power
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.templates import attention_text as text
from dscompile.errors import UnsupportedError

BLOCKS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 64
"""Most rows of a tile: with 128 the gradients of k and v do not fit the registers of any target but sm_100."""
MAX_DIM = 256
MOST_REGISTERS = 255
"""Of a CUDA thread."""
SHARED = 160 * 1024
"""Bytes of tiles in flight: the opt-in shared memory of every CUDA target, with room for the rest."""


@dataclass(frozen=True, slots=True)
class Attention:
    """What is decided when a kernel of block-sparse attention is compiled.

    Attributes:
        dim: head size. block: of the layout. dtype: of q, k, v. scale: of the scores. causal, padded: masks inside the
        listed blocks. ragged: the sequence is not whole blocks. precision: of fp32 products, ``ieee`` or ``tf32``
        (rounds operands to 11 bits). rows: elements between two rows of q, k, v and (in backward) the gradient.
        shared: bytes of shared memory for tiles in flight.
    """

    dim: int
    block: int
    dtype: torch.dtype
    scale: float
    rows: tuple[int, int, int, int]
    causal: bool = False
    padded: bool = False
    ragged: bool = False
    precision: str = "ieee"
    shared: int = SHARED

    def refusal(self) -> str:
        """Why no kernel is generated for it ("" if one is)."""
        if self.block not in BLOCKS:
            return f"the Triton kernels take blocks of {', '.join(map(str, BLOCKS))}, not {self.block}"
        if self.dim % 8 or not 8 <= self.dim <= MAX_DIM:
            return f"the Triton kernels take a head size of 8, 16, ... {MAX_DIM}, not {self.dim}"
        if self.dtype not in DTYPES:
            return f"the Triton kernels take {', '.join(map(str, DTYPES))}, not {self.dtype}"
        if self.precision not in ("ieee", "tf32"):
            return f"the precision of products is 'ieee' or 'tf32', not {self.precision!r}"
        return ""

    def tile(self, what: str) -> int:
        """Rows and columns of one product in the kernel ``what``.

        fp32 products take more registers: ``ieee`` runs on the ordinary units, ``tf32`` holds 32-bit operands.
        """
        most = TILE
        if self.dtype is torch.float32:
            ordinary = self.precision == "ieee"
            most = (32 if ordinary else 64) if what == "forward" and self.dim <= 64 else (16 if ordinary else 32)
        return min(self.block, most)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one call: of q ``[batch, heads, seq, dim]`` and of the layout, ``listed`` blocks over all heads."""

    batch: int
    heads: int
    seq: int
    listed: int
    layout_heads: int

    def numbers(self, dim: int) -> dict[str, int]:
        """The run-time integers of the kernels, for q, k, v and grad that lie ``[batch, seq, heads, dim]``."""
        strides = {"batch": self.seq * self.heads * dim, "head": dim}
        found = {f"{name}_{of}": stride for name in ("q", "k", "v", "grad") for of, stride in strides.items()}
        return found | {
            "batch": self.batch, "heads": self.heads, "seq": self.seq, "listed": self.listed,
            "layout_heads": self.layout_heads,
        }  # fmt: skip


BATCH, HEADS, SEQ, LISTED, LAYOUT_HEADS = (
    sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "heads", "seq", "listed", "layout_heads")
)
KERNELS = ("forward", "backward_q", "backward_kv")
_LISTING = ("padding", "offsets", "indices")
_OPERANDS = {
    "forward": (("q", "k", "v", *_LISTING), ("out", "lse")),
    "backward_q": (("q", "k", "v", "grad", "out", "lse", *_LISTING), ("dq", "delta")),
    "backward_kv": (("q", "k", "v", "grad", "lse", "delta", *_LISTING), ("dk", "dv")),
}
_BODIES = {"forward": text.FORWARD, "backward_q": text.BACKWARD_Q, "backward_kv": text.BACKWARD_KV}
_TITLES = {
    "forward": "Block-sparse attention, forward: out and the softmax's statistics.",
    "backward_q": "Block-sparse attention, backward: the gradient of q, and what the softmax's backward subtracts.",
    "backward_kv": "Block-sparse attention, backward: the gradients of k and v, block column by block column.",
}
_STATISTICS = {
    "forward": "",
    "backward_q": "\n    out [batch, seq, heads, dim]; lse float32 [batch, heads, seq];",
    "backward_kv": "\n    lse and delta float32 [batch, heads, seq];",
}
_RESULTS = {
    "forward": "out [batch, seq, heads, dim] {dtype}; lse float32 [batch, heads, seq], a natural logarithm",
    "backward_q": "dq [batch, seq, heads, dim] {dtype}; delta float32 [batch, heads, seq]",
    "backward_kv": "dk, dv [batch, seq, heads, dim] {dtype}",
}
_COMPUTES = {
    "forward": "out = softmax(SCALE * q k^T over the visible keys) v; lse = log(sum of exp of the scores)",
    "backward_q": "delta = sum(grad * out); dq = SCALE * (p * (grad v^T - delta)) k, p recomputed from lse",
    "backward_kv": "dv = p^T grad; dk = SCALE * (p * (grad v^T - delta))^T q, p recomputed from lse",
}


def attention_kernels(use: Attention, sizes: Sizes | None = None) -> dict[str, Kernel]:
    """``forward``, ``backward_q`` and ``backward_kv``, in the order in which they are launched.

    Args:
        use: what is compiled in.
        sizes: numbers to build ahead of time for. Without, the sizes are symbols, and one kernel serves them all.

    Raises:
        UnsupportedError: a block, head size, dtype or precision that there is no kernel for.
    """
    if reason := use.refusal():
        raise UnsupportedError(f"sparse attention: {reason}.")
    return {what: _kernel(use, what, sizes) for what in KERNELS}


def _buffers(use: Attention) -> dict[str, Buffer]:
    elements = BATCH * HEADS * SEQ
    found = {
        n: Buffer(n, use.dtype, elements * use.dim) for n in ("q", "k", "v", "grad", "out", "dq", "dk", "dv")
    }  # fmt: skip
    found |= {n: Buffer(n, torch.float32, elements) for n in ("lse", "delta")}
    found["padding"] = Buffer("padding", torch.uint8, BATCH * SEQ if use.padded else sympy.Integer(1))
    found["offsets"] = Buffer("offsets", torch.int32, LAYOUT_HEADS * (Div(SEQ + use.block - 1, use.block) + 1))
    found["indices"] = Buffer("indices", torch.int32, LISTED)
    return found


def _kernel(use: Attention, what: str, sizes: Sizes | None) -> Kernel:
    name = f"attention_{what}"
    values = _buffers(use)
    reads, writes = _OPERANDS[what]
    operands = [n for n in ("q", "k", "v", "grad") if n in reads]
    tile = use.tile(what)
    parts = use.block // tile
    per_head = [values[n].bytes for n in (*reads, *writes) if n not in _LISTING]
    ideal = sympy.Add(*per_head)
    streamed = ("q", "grad") if what == "backward_kv" else ("k", "v")
    pair = 2 * use.block * use.dim * use.dtype.itemsize
    moved = ideal - sum(values[n].bytes for n in streamed) + BATCH * LISTED * parts * pair
    head = text.HEAD.format(
        title=f"{name}: {_TITLES[what]}",
        operands=", ".join(operands),
        dtype=str(use.dtype).removeprefix("torch."),
        rows=", ".join(f"{n.upper()}_ROW" for n in operands),
        statistics=_STATISTICS[what],
        results=_RESULTS[what].format(dtype=str(use.dtype).removeprefix("torch.")),
        nodes=_COMPUTES[what],
        moves=moved,
        ideal=ideal,
        listed="query rows" if what == "backward_kv" else "key columns",
        of="column" if what == "backward_kv" else "row",
    )
    strides = [f"{n}_{of}" for n in operands for of in ("batch", "head")]
    names = ("heads", "layout_heads", "seq", *strides)
    tiles = Div(SEQ + use.block - 1, sympy.Integer(use.block)) * parts
    numbers = {} if sizes is None else sizes.numbers(use.dim)
    known = {sympy.Symbol(n, integer=True, positive=True): sympy.Integer(v) for n, v in numbers.items()}

    def at(expr: sympy.Expr) -> sympy.Expr:
        return expr.xreplace(known)

    return Kernel(
        name,
        head + text.LOAD + _BODIES[what].format(name=name),
        tuple(Buffer(n, values[n].dtype, at(values[n].numel)) for n in reads),
        tuple(Buffer(n, values[n].dtype, at(values[n].numel)) for n in writes),
        tuple((n, at(sympy.Symbol(n, integer=True, positive=True))) for n in names),
        {
            "DIM": use.dim, "DIM_BLOCK": max(power(use.dim), 16), "BLOCK": use.block, "TILE": tile,
            "CAUSAL": use.causal, "PADDED": use.padded, "RAGGED": use.ragged, "PRECISION": use.precision,
            "SCALE": use.scale, **dict(zip(("Q_ROW", "K_ROW", "V_ROW", "GRAD_ROW"), use.rows, strict=True)),
        },
        (at(BATCH * HEADS * tiles),),
        warps=_warps(use, tile),
        stages=_stages(use, what),
        bytes=0 if sizes is None else int(at(moved)),
        ideal=0 if sizes is None else int(at(ideal)),
        nodes=(name,),
        kind="matrix",
        registers=_registers(use, what),
    )  # fmt: skip


def _warps(use: Attention, tile: int) -> int:
    """A warp for each 16 rows of a tile; twice that for wide heads, whose accumulators would not fit the registers."""
    if use.dtype is torch.float32:
        return 4
    return tile // 16 * (2 if power(use.dim) > 64 and tile == TILE else 1)


def _registers(use: Attention, what: str) -> int:
    """All that there are, where ptxas left to itself was seen to spill a few for one program more."""
    ordinary = use.dtype is torch.float32 and use.precision == "ieee"
    return MOST_REGISTERS if ordinary or (what == "backward_kv" and use.tile(what) < TILE) else 0


def _stages(use: Attention, what: str) -> int:
    """How many turns' tiles are in flight: three if they fit, fewer for wide heads and fp32."""
    tile = use.tile(what) * max(power(use.dim), 16) * use.dtype.itemsize
    held = tile * (1 if what == "forward" else 2)
    return max(1, min(3, (use.shared - held) // (2 * tile)))
