"""Launch the Evoformer attention kernels for the operators of :mod:`dscompile.evoformer`.

One compiled kernel serves every batch, number of sequences and residues, which are arguments. Nothing here waits for
the GPU. No atomics: the same operands give the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from dscompile.codegen.triton_backend.attention import adjacent_rows, shared_memory
from dscompile.codegen.triton_backend.launch import Launcher
from dscompile.codegen.triton_backend.templates.evoformer import KERNELS, Evoformer, evoformer_kernels, shares

log = logging.getLogger("dscompile")


def no_triton_kernel(q: Tensor, mask: Tensor | None, pair: Tensor | None) -> str:
    """Why attention of these operands does not run in the Triton kernels; "" if it does. No data is read."""
    if importlib.util.find_spec("triton") is None:
        return "the extra 'triton' is not installed"
    of_mask, of_pair = (None if b is None else b.dtype for b in (mask, pair))
    return Evoformer(q.shape[4], q.dtype, 1.0, (0,) * 4, (0,) * 4, of_mask, of_pair).refusal()


@functools.cache
def warn_pieces(reason: str) -> None:
    """Say once a process, for each reason, that Evoformer attention on a GPU runs in PyTorch's operators."""
    log.warning("Evoformer attention on a GPU runs in pieces of PyTorch's operators, many times slower: %s", reason)


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pair: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` as :mod:`dscompile.evoformer` defines them."""
    q, k, v = map(adjacent_rows, (q, k, v))
    biases = _Biases.of(q, mask, pair)
    out, lse = q.new_empty(q.shape), _statistic(q)
    run = _launchers(_use((q, k, v), mask, pair, scale))["forward"]
    run(q, k, v, *biases.tensors, out, lse, **biases.numbers, **_numbers(q=q, k=k, v=v))
    return out, lse


def triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    pair: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask_grad: bool,
    pair_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, mask and pair; those that nobody wants are empty."""
    grad, q, k, v = map(adjacent_rows, (grad, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()  # as the forward made them: then nothing is copied
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = _statistic(q)
    masked = mask is not None and mask_grad
    dmask = _statistic(q) if masked else q.new_empty(0, dtype=torch.float32)
    biases = _Biases.of(q, mask, pair)
    use = _use((q, k, v, grad), mask, pair, scale, mask_grad=masked)
    numbers = biases.numbers | _numbers(q=q, k=k, v=v, grad=grad)
    run = _launchers(use)
    run["backward_q"](q, k, v, grad, out, lse, *biases.tensors, dq, delta, **numbers)
    run["backward_kv"](q, k, v, grad, lse, delta, *biases.tensors, dk, dv, dmask if masked else delta, **numbers)
    if masked:
        assert mask is not None
        dmask = dmask.sum(2).view(mask.shape).to(mask.dtype)
    if pair is None or not pair_grad:
        return dq, dk, dv, dmask, q.new_empty(0, dtype=torch.float32)
    batch, sequences, residues, heads, _ = q.shape
    parts = shares(use, batch, heads, sequences, residues)
    summed = pair.dtype if parts == 1 else torch.float32
    dpair = q.new_empty((parts, batch, 1, heads, residues, residues), dtype=summed)
    alone = _launchers(_use((q, k, v, grad), mask, pair, scale, shared_sum=parts > 1))["backward_pair"]
    alone(q, k, v, grad, lse, delta, *biases.tensors, dpair, shares=parts, **numbers)
    return dq, dk, dv, dmask, dpair[0] if parts == 1 else dpair.sum(0).to(pair.dtype)


@functools.cache
def _launchers(use: Evoformer) -> dict[str, Launcher]:
    kernels = evoformer_kernels(use)
    return {what: Launcher(kernels[what]) for what in KERNELS if what in kernels}


def _use(
    operands: tuple[Tensor, ...],
    mask: Tensor | None,
    pair: Tensor | None,
    scale: float,
    *,
    mask_grad: bool = False,
    shared_sum: bool = False,
) -> Evoformer:
    """What is compiled in for q, k, v and, in backward, the gradient."""
    q = operands[0]
    rows, heads = ([*(x.stride(i) for x in operands), 0][:4] for i in (2, 3))
    use = Evoformer(
        q.shape[4],
        q.dtype,
        float(scale),
        (rows[0], rows[1], rows[2], rows[3]),
        (heads[0], heads[1], heads[2], heads[3]),
        None if mask is None else mask.dtype,
        None if pair is None else pair.dtype,
        mask_grad=mask_grad,
        shared_sum=shared_sum,
        precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        shared=shared_memory(q),
    )
    return dataclasses.replace(use, ragged=any(q.shape[2] % use.tile(what) for what in KERNELS))


@dataclass(frozen=True)
class _Biases:
    """The biases as the kernels read them: without one, q stands for it, and is not read."""

    tensors: tuple[Tensor, Tensor]
    numbers: dict[str, int]

    @staticmethod
    def of(q: Tensor, mask: Tensor | None, pair: Tensor | None) -> _Biases:
        mask, pair = (None if b is None else adjacent_rows(b) for b in (mask, pair))
        batch, sequence = (0, 0) if mask is None else mask.stride()[:2]
        of_pair = (0, 0, 0) if pair is None else (pair.stride(0), pair.stride(2), pair.stride(3))
        names = ("mask_batch", "mask_sequence", "pair_batch", "pair_head", "pair_row")
        numbers = dict(zip(names, (batch, sequence, *of_pair), strict=True))
        return _Biases((q if mask is None else mask, q if pair is None else pair), numbers)


def _statistic(q: Tensor) -> Tensor:
    """Memory for one fp32 value a query: ``[batch, sequences, heads, residues]``."""
    batch, sequences, residues, heads, _ = q.shape
    return q.new_empty((batch, sequences, heads, residues), dtype=torch.float32)


def _numbers(**operands: Tensor) -> dict[str, int]:
    """Sizes and strides, as the kernels call them."""
    batch, sequences, residues, heads, _ = operands["q"].shape
    found = {"batch": batch, "sequences": sequences, "seq": residues, "heads": heads}
    for name, x in operands.items():
        found |= {f"{name}_batch": x.stride(0), f"{name}_sequence": x.stride(1)}
    return found
