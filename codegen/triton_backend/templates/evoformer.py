"""Evoformer attention as four kernels: forward, gradient of q, gradients of k, v and mask, and of the pair bias."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import sympy
import torch

from dscompile.codegen.tile.indexing import Div
from dscompile.codegen.tile.ir import Buffer
from dscompile.codegen.tile.schedule import power
from dscompile.codegen.triton_backend.kernel import Kernel
from dscompile.codegen.triton_backend.templates import attention_text
from dscompile.codegen.triton_backend.templates import evoformer_text as text
from dscompile.codegen.triton_backend.templates.attention import DTYPES, MOST_REGISTERS, SHARED, TILE
from dscompile.errors import UnsupportedError

MAX_DIM = 128
PROGRAMS = 256
"""Programs of the pair bias's kernel below which its walk over the sequences is shared: twice what a large GPU runs."""


@dataclass(frozen=True, slots=True)
class Evoformer:
    """What is decided when a kernel of Evoformer attention is compiled.

    Attributes:
        dim: head size. dtype: of q, k, v. scale: of the products. rows, heads: elements between two rows, and between
        two heads, of q, k, v and (in backward) the gradient. mask, pair: dtypes of the biases, None for none.
        mask_grad: whether the gradient of the mask is wanted. shared_sum: the pair bias's gradient comes out in parts,
        in fp32. ragged: the sequence is not whole tiles of every kernel. precision: of fp32 products, ``ieee`` or
        ``tf32``. shared: bytes of shared memory for tiles in flight.
    """

    dim: int
    dtype: torch.dtype
    scale: float
    rows: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    mask: torch.dtype | None = None
    pair: torch.dtype | None = None
    mask_grad: bool = False
    shared_sum: bool = False
    ragged: bool = False
    precision: str = "ieee"
    shared: int = SHARED

    def refusal(self) -> str:
        """Why no kernel is generated for it ("" if one is)."""
        if self.dim % 8 or not 8 <= self.dim <= MAX_DIM:
            return f"the Triton kernels take a head size of 8, 16, ... {MAX_DIM}, not {self.dim}"
        for name, dtype in (("q, k, v", self.dtype), ("the mask", self.mask), ("the pair bias", self.pair)):
            if dtype is not None and dtype not in DTYPES:
                return f"the Triton kernels take {', '.join(map(str, DTYPES))}; {name}: {dtype}"
        if self.precision not in ("ieee", "tf32"):
            return f"the precision of products is 'ieee' or 'tf32', not {self.precision!r}"
        return ""

    def tile(self, what: str) -> int:
        """Queries of a program of the kernel ``what`` (keys, for dk and dv); fp32 products take more registers."""
        if self.dtype is not torch.float32:
            return TILE
        ordinary = self.precision == "ieee"
        if what == "forward" and self.dim <= 64:
            return 32 if ordinary else 64
        return 16 if ordinary else 32

    def step(self, what: str) -> int:
        """The other side of its products: less where 64 would spill on sm_80, whose operands all lie in registers."""
        most, wide = TILE, power(self.dim)
        if what == "backward_kv" and self.pair is not None:
            most = TILE // 4 if wide == 64 else TILE // 2  # above 64 there are eight warps
        elif what == "backward_pair" and wide > 64:
            most = TILE // 2
        return min(self.tile(what), most)


def shares(use: Evoformer, batch: int, heads: int, sequences: int, seq: int) -> int:
    """Into how many parts the sum over sequences is cut: by the sizes alone, so that results do not hang on the GPU."""
    tile, step = use.tile("backward_pair"), use.step("backward_pair")
    programs = batch * heads * -(-seq // tile) * -(-seq // step)
    return max(1, min(sequences, PROGRAMS // max(1, programs)))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one call: of q ``[batch, sequences, seq, heads, dim]``, and the parts of the pair bias's gradient."""

    batch: int
    sequences: int
    seq: int
    heads: int
    shares: int = 1

    def numbers(self, dim: int) -> dict[str, int]:
        """The run-time integers of the kernels, for contiguous tensors."""
        row = self.heads * dim
        strides = {"batch": self.sequences * self.seq * row, "sequence": self.seq * row}
        found = {f"{name}_{of}": stride for name in ("q", "k", "v", "grad") for of, stride in strides.items()}
        return found | {
            "batch": self.batch, "sequences": self.sequences, "seq": self.seq, "heads": self.heads,
            "shares": self.shares, "mask_batch": self.sequences * self.seq, "mask_sequence": self.seq,
            "pair_batch": self.heads * self.seq**2, "pair_head": self.seq**2, "pair_row": self.seq,
        }  # fmt: skip


def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


BATCH, SEQUENCES, SEQ, HEADS, SHARES = map(_symbol, ("batch", "sequences", "seq", "heads", "shares"))
KERNELS = ("forward", "backward_q", "backward_kv", "backward_pair")
_BIASES = ("mask", "pair")
_OPERANDS = {
    "forward": (("q", "k", "v", *_BIASES), ("out", "lse")),
    "backward_q": (("q", "k", "v", "grad", "out", "lse", *_BIASES), ("dq", "delta")),
    "backward_kv": (("q", "k", "v", "grad", "lse", "delta", *_BIASES), ("dk", "dv", "dmask")),
    "backward_pair": (("q", "k", "v", "grad", "lse", "delta", *_BIASES), ("dpair",)),
}
_BODIES = {
    "forward": attention_text.STORE + text.FORWARD,
    "backward_q": attention_text.STORE + text.BACKWARD_Q,
    "backward_kv": attention_text.ROWS + attention_text.STORE + text.BACKWARD_KV,
    "backward_pair": attention_text.ROWS + text.BACKWARD_PAIR,
}
_TITLES = {
    "forward": "Evoformer attention, forward: out and the softmax's statistics.",
    "backward_q": "Evoformer attention, backward: the gradient of q, and what the softmax's backward subtracts.",
    "backward_kv": "Evoformer attention, backward: the gradients of k and v, and each head's share of the mask's.",
    "backward_pair": "Evoformer attention, backward: the gradient of the pair bias, a sum over sequences.",
}
_STATISTICS = {
    "forward": "",
    "backward_q": "\n    out [batch, sequences, seq, heads, dim]; lse float32 [batch, sequences, heads, seq];",
    "backward_kv": "\n    lse and delta float32 [batch, sequences, heads, seq];",
    "backward_pair": "\n    lse and delta float32 [batch, sequences, heads, seq];",
}
_RESULTS = {
    "forward": "out [batch, sequences, seq, heads, dim] {dtype};\n    "
    "lse float32 [batch, sequences, heads, seq], a natural logarithm",
    "backward_q": "dq [batch, sequences, seq, heads, dim] {dtype}; delta float32 [batch, sequences, heads, seq]",
    "backward_kv": "dk, dv [batch, sequences, seq, heads, dim] {dtype};\n    "
    "dmask float32 [batch, sequences, heads, seq] if MASK_GRAD, to be summed over heads",
    "backward_pair": "dpair {pair} [shares, batch, heads, seq, seq], to be summed over shares",
}
_COMPUTES = {
    "forward": "out = softmax(SCALE * q k^T + mask + pair) v; lse = log(sum of exp of the scores)",
    "backward_q": "delta = sum(grad * out); dq = SCALE * (p * (grad v^T - delta)) k, p recomputed from lse",
    "backward_kv": "dv = p^T grad; ds = p * (grad v^T - delta); dk = SCALE * ds^T q; dmask = sum of ds over queries",
    "backward_pair": "dpair = sum over a share of the sequences of p * (grad v^T - delta), p recomputed from lse",
}


def evoformer_kernels(use: Evoformer, sizes: Sizes | None = None) -> dict[str, Kernel]:
    """The kernels by name, in the order in which they are launched; ``backward_pair`` only with a pair bias.

    Args:
        use: what is compiled in.
        sizes: numbers to build ahead of time for. Without, the sizes are symbols, and one kernel serves them all.

    Raises:
        UnsupportedError: a head size, dtype or precision that there is no kernel for.
    """
    if reason := use.refusal():
        raise UnsupportedError(f"evoformer attention: {reason}.")
    return {what: _kernel(use, what, sizes) for what in KERNELS if what != "backward_pair" or use.pair is not None}


def _buffers(use: Evoformer) -> dict[str, Buffer]:
    """A bias that is not there is a pointer to something else; a gradient that nobody wants has one element."""
    values, statistics = BATCH * SEQUENCES * SEQ * HEADS * use.dim, BATCH * SEQUENCES * HEADS * SEQ
    pair, one = BATCH * HEADS * SEQ * SEQ, sympy.Integer(1)
    found = {n: Buffer(n, use.dtype, values) for n in ("q", "k", "v", "grad", "out", "dq", "dk", "dv")}
    found |= {n: Buffer(n, torch.float32, statistics) for n in ("lse", "delta")}
    found["mask"] = Buffer("mask", use.mask or use.dtype, BATCH * SEQUENCES * SEQ if use.mask else one)
    found["pair"] = Buffer("pair", use.pair or use.dtype, pair if use.pair else one)
    found["dmask"] = Buffer("dmask", torch.float32, statistics if use.mask_grad else one)
    summed = torch.float32 if use.shared_sum else use.pair or use.dtype
    found["dpair"] = Buffer("dpair", summed, SHARES * pair)
    return found


def _tiles(side: int) -> sympy.Expr:
    return Div(SEQ + side - 1, sympy.Integer(side))


def _again(use: Evoformer, what: str, values: dict[str, Buffer]) -> sympy.Expr:
    """Bytes that programs read after another one did: the other side's rows, and the biases."""
    tiles, steps = _tiles(use.tile(what)), _tiles(use.step(what))
    if what == "backward_pair":
        queries, keys = (sum(values[n].bytes for n in names) for names in (("q", "grad"), ("k", "v")))
        return (steps - 1) * queries + (tiles - 1) * keys
    streamed = ("q", "grad") if what == "backward_kv" else ("k", "v")
    again = (tiles - 1) * sum(values[n].bytes for n in streamed)
    return again if use.pair is None else again + (SEQUENCES - 1) * values["pair"].bytes


def _traffic(once: sympy.Expr, again: sympy.Expr) -> str:
    """Both in words, over as many lines as they take."""
    text = f"every input and output once, {once} bytes; and, read by several programs, again {again}"
    return textwrap.fill(text, 112, subsequent_indent="    ", break_long_words=False)


def _kernel(use: Evoformer, what: str, sizes: Sizes | None) -> Kernel:
    name = f"evoformer_{what}"
    values = _buffers(use)
    reads, writes = _OPERANDS[what]
    operands = [n for n in ("q", "k", "v", "grad") if n in reads]
    tile = use.tile(what)
    ideal = sympy.Add(*(values[n].bytes for n in (*reads, *writes)))
    again = _again(use, what, values)
    dtypes = {"dtype": _short(use.dtype), "pair": _short(values["dpair"].dtype)}
    head = text.HEAD.format(
        title=f"{name}: {_TITLES[what]}",
        operands=", ".join(operands),
        dtype=dtypes["dtype"],
        rows=", ".join(f"{n.upper()}_ROW" for n in operands),
        heads=", ".join(f"{n.upper()}_HEAD" for n in operands),
        statistics=_STATISTICS[what],
        results=_RESULTS[what].format(**dtypes),
        nodes=_COMPUTES[what],
        moves=_traffic(ideal, again),
    )
    strides = [f"{n}_{of}" for n in operands for of in ("batch", "sequence")]
    biases = ["mask_batch", "mask_sequence", "pair_batch", "pair_head", "pair_row"]
    names = [*(["shares"] if what == "backward_pair" else []), "heads", "sequences", "seq", *strides, *biases]
    programs = _tiles(tile) * (SHARES * _tiles(use.step(what)) if what == "backward_pair" else SEQUENCES)
    numbers = {} if sizes is None else sizes.numbers(use.dim)
    known = {_symbol(n): sympy.Integer(v) for n, v in numbers.items()}

    def at(expr: sympy.Expr) -> sympy.Expr:
        return expr.xreplace(known)

    return Kernel(
        name,
        head + attention_text.LOAD + _BODIES[what].format(name=name),
        tuple(Buffer(n, values[n].dtype, at(values[n].numel)) for n in reads),
        tuple(Buffer(n, values[n].dtype, at(values[n].numel)) for n in writes),
        tuple((n, at(_symbol(n))) for n in names),
        {
            "DIM": use.dim, "DIM_BLOCK": max(power(use.dim), 16), "TILE": tile, "STEP": use.step(what),
            "MASKED": use.mask is not None, "PAIRED": use.pair is not None, "MASK_GRAD": use.mask_grad,
            "RAGGED": use.ragged, "PRECISION": use.precision, "SCALE": use.scale,
            **dict(zip(("Q_ROW", "K_ROW", "V_ROW", "GRAD_ROW"), use.rows, strict=True)),
            **dict(zip(("Q_HEAD", "K_HEAD", "V_HEAD", "GRAD_HEAD"), use.heads, strict=True)),
        },
        (at(BATCH * HEADS * programs),),
        warps=_warps(use, tile),
        stages=_stages(use, what),
        bytes=0 if sizes is None else int(at(ideal + again)),
        ideal=0 if sizes is None else int(at(ideal)),
        nodes=(name,),
        kind="matrix",
        registers=_registers(use, tile),
    )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _warps(use: Evoformer, tile: int) -> int:
    """A warp for each 16 rows of a tile; twice that for wide heads, whose accumulators would not fit the registers."""
    if use.dtype is torch.float32:
        return 4
    return tile // 16 * (2 if power(use.dim) > 64 else 1)


def _registers(use: Evoformer, tile: int) -> int:
    """All that there are, where ptxas left to itself spills some for one program more; eight warps must share them."""
    return MOST_REGISTERS if _warps(use, tile) == 4 else 0


def _stages(use: Evoformer, what: str) -> int:
    """How many turns' tiles are in flight: three if they fit, fewer for wide heads and fp32."""
    row = max(power(use.dim), 16) * use.dtype.itemsize
    tile, step = use.tile(what), use.step(what)
    if what == "backward_pair":
        return max(1, min(3, use.shared // (2 * (tile + step) * row)))
    bias = 0 if use.pair is None else tile * step * use.pair.itemsize
    held = tile * row * (1 if what == "forward" else 2)
    return max(1, min(3, (use.shared - held) // (2 * step * row + bias)))
