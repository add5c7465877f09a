"""A process of its own, like ``interpret_attention``: ``dscompile.evoformer_attention`` on the Triton kernels, against
the formula in fp64.

``python -m tests.kernels.interpret_evoformer CASE...``, a case is ``dtype/sequences/residues/heads/dim/flags``: flags
of ``m``ask, pair ``b``ias, ``h``idden keys (-inf) with a sequence that sees nothing, ``w``ide biases (fp32), ``t``:
operands that are slices of one tensor and a bias with heads innermost, ``s``cale, ``n``o gradients of the biases,
``g``: inside a graph that dscompile compiles, ``u``: a sum over sequences that is shared unevenly, ``r``: twice, for
the same bits, or ``-``. Errors are of out, dq, dk, dv and of the biases' gradients, over the largest value of each.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

import dscompile
from dscompile import evoformer
from dscompile.codegen.triton_backend import evoformer as launching
from dscompile.codegen.triton_backend.templates import evoformer as evoformer_templates
from dscompile.codegen.triton_backend.templates.evoformer import PROGRAMS
from tests.kernels.interpret import DTYPES, main

BATCH = 2
SMALL = 0.1
"""Results whose largest value is less are compared with this: of one residue all gradients but dv are 0."""


def by_hand(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor], scale: float) -> Tensor:
    scores = torch.einsum("bnqhd,bnkhd->bnhqk", q, k) * scale
    for bias in biases:
        scores = scores + bias
    hidden = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bnhqk,bnkhd->bnqhd", weights, v)


def call(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor | None], scale: float | None) -> Tensor:
    return dscompile.evoformer_attention(q, k, v, biases, scale=scale)


def in_a_graph() -> Callable[..., Tensor]:
    options = {"regions": "aten", "cache": False, "summary": False}
    return torch.compile(call, backend="dscompile", fullgraph=True, options=options)


def run(case: str) -> list[float]:
    kind, *numbers, flags = case.split("/")
    sequences, residues, heads, dim = map(int, numbers)
    dtype = DTYPES[kind]
    g = torch.Generator().manual_seed(residues + dim)
    if "t" in flags:
        wide = torch.randn(BATCH, sequences, residues, 4 * heads * dim, generator=g).to(dtype)
        q, k, v, grad = (x.unflatten(-1, (heads, dim)) for x in wide.chunk(4, -1))
    else:
        q, k, v, grad = (torch.randn(BATCH, sequences, residues, heads, dim, generator=g).to(dtype) for _ in range(4))
    of_bias = torch.float32 if "w" in flags else dtype
    mask = torch.randn(BATCH, sequences, 1, 1, residues, generator=g).to(of_bias)
    if "h" in flags:
        mask[1, :, ..., -residues // 3 :] = -torch.inf
        mask[0, 0] = -torch.inf
    pair = torch.randn(BATCH, 1, residues, residues, heads, generator=g).to(of_bias).movedim(-1, 2)
    pair = pair if "t" in flags else pair.contiguous()
    biases = [mask if "m" in flags else None, pair if "b" in flags else None]
    scale = 0.3 if "s" in flags else dim**-0.5

    def results(double: bool) -> list[Tensor]:
        leaves = [(x.double() if double else x).detach().requires_grad_() for x in (q, k, v)]
        given = [None if b is None else (b.double() if double else b).detach() for b in biases]
        wanted = [b.requires_grad_() for b in given if b is not None and "n" not in flags]
        if double:
            out = by_hand(*leaves, [b for b in given if b is not None], scale)
        else:
            out = attend(*leaves, given, 0.3 if "s" in flags else None)
        return [out.detach(), *torch.autograd.grad(out, [*leaves, *wanted], grad.to(out.dtype))]

    attend = in_a_graph() if "g" in flags else call
    before = launching._launchers.cache_info()
    few = 16 if "u" in flags else PROGRAMS  # enough programs for a launch: with 16, tests stay small
    with mock.patch.object(evoformer_templates, "PROGRAMS", few):
        found = results(double=False)
    after = launching._launchers.cache_info()
    assert after.hits + after.misses > before.hits + before.misses, "the kernels ran"
    again = results(double=False) if "r" in flags else found
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits on every run"
    errors = [
        (f.double() - w).abs().max() / w.abs().max().clamp_min(SMALL)
        for f, w in zip(found, results(double=True), strict=True)
    ]
    return [float(torch.nan_to_num(e, nan=torch.inf)) for e in errors]


def gpu_for_cpu() -> torch.library.Library:
    """The operator's implementation for GPUs on CPU tensors; for as long as the result lives."""
    library = torch.library.Library("dscompile", "IMPL")
    library.impl("evoformer_attention", evoformer._forward_gpu, "CPU", allow_override=True)
    library.impl("evoformer_attention_backward", evoformer._backward_gpu, "CPU", allow_override=True)
    return library


if __name__ == "__main__":
    held = gpu_for_cpu()
    main(sys.argv[1:], run)
