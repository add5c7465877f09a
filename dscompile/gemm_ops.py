"""fp32 matrix products on AMX tiles as an operator: ``dscompile::matmul``.

``matmul(a, b, bias)`` is ``a @ b (+ bias)``: fp32 ``[m, k] @ [k, n]`` or ``[batch, m, k] @ [batch, k, n]``, in any
layout; ``bias`` (two-dimensional products only) can be expanded to ``[m, n]``. The result is contiguous. On CPU it runs
our C++ kernels at fp32 accuracy: with ``site``, a number of the call site that is not negative, the one that multiplies
integers (``codegen/cpu/gemm_int8.h``); without, or where that refuses, the one of bf16 (``codegen/cpu/gemm_amx.h``);
where there is none, or the operands leave the range that bf16 tiles represent, PyTorch's product. It has no derivative:
code generation puts it in the place of PyTorch's products after differentiation. :func:`add_product` is the kernel for
operators that sum products.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

log = logging.getLogger("dscompile")

aten = torch.ops.aten

_LIBRARY = torch.library.Library("dscompile", "FRAGMENT")
_LIBRARY.define("matmul(Tensor a, Tensor b, Tensor? bias, int site=-1) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("matmul.out(Tensor a, Tensor b, Tensor? bias, int site=-1, *, Tensor(a!) out) -> Tensor(a!)")


def plain_product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """PyTorch's product into ``out``."""
    if a.dim() == 3:
        return aten.bmm.out(a, b, out=out)  # type: ignore[no-any-return]
    if bias is None:
        return aten.mm.out(a, b, out=out)  # type: ignore[no-any-return]
    return aten.addmm.out(bias, a, b, out=out)  # type: ignore[no-any-return]


def _empty(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _fake(a: Tensor, b: Tensor, bias: Tensor | None, site: int = -1) -> Tensor:
    return _empty(a, b)


def _plain(a: Tensor, b: Tensor, bias: Tensor | None, site: int = -1) -> Tensor:
    return plain_product(a, b, bias, _empty(a, b))


def _out_cpu(a: Tensor, b: Tensor, bias: Tensor | None, site: int = -1, *, out: Tensor) -> Tensor:
    from dscompile.codegen.cpu.builder import gemm_kernel

    built = gemm_kernel()
    kernel = built.kernel
    if kernel is None:
        _warn(built.reason)
    elif not (a.shape[-1] and out.numel() and out.stride(-1) == 1):
        pass
    elif kernel.product(a, b, bias, out, site=kernel.site(site)):
        return out
    return plain_product(a, b, bias, out)


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> bool:
    """``out += alpha * a @ b`` on AMX tiles.

    Args:
        out: fp32 ``[m, n]``, contiguous.
        a: fp32 ``[m, k]``, in any layout.
        b: fp32 ``[k, n]``, in any layout.
        alpha: what the product is multiplied with.

    Returns:
        False where the operands leave the tiles' range, or there is no kernel: ``out`` then holds nothing of use.
    """
    from dscompile.codegen.cpu.builder import gemm_kernel

    built = gemm_kernel()
    if built.kernel is None:
        _warn(built.reason)
        return False
    return not (a.numel() and b.numel()) or built.kernel.product(a, b, None, out, alpha, accumulate=True)


@functools.cache
def _warn(reason: str) -> None:
    """Say once that a program made where there was a kernel runs without it."""
    log.warning("fp32 matrix products chosen to run on AMX tiles run on PyTorch's kernel, slower: %s", reason)


def _cpu(a: Tensor, b: Tensor, bias: Tensor | None, site: int = -1) -> Tensor:
    return _out_cpu(a, b, bias, site, out=_empty(a, b))


_LIBRARY.impl("matmul", _plain, "CompositeExplicitAutograd")
_LIBRARY.impl("matmul", _cpu, "CPU")
_LIBRARY.impl("matmul.out", _out_cpu, "CPU")
torch.library.register_fake("dscompile::matmul", _fake, lib=_LIBRARY)
