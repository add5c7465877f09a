"""The compiled fp32 matrix products on AMX tiles as Python functions on tensors."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dscompile.codegen.cpu.gemm_sites import MOST_AGAIN, PRODUCTS, SHORTEST, SMALLEST_SIDE, Site, limit

log = logging.getLogger("dscompile")

_NO_MEMORY, _RANGE, _UNEQUAL = 1, 2, 4
"""What the entries return: no memory for packed operands, elements out of range, rows or columns too unequal."""

FEW = 64
"""Fewer rows or columns are computed again by PyTorch's product, which packs less."""

_MATRIX = ("batch", "row", "column")


class _Gemm(ctypes.Structure):
    """``Gemm`` of the C++ source; strides in elements."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "m", "n", "k")),
        *((f"a_{name}", ctypes.c_int64) for name in ("data", *_MATRIX)),
        *((f"b_{name}", ctypes.c_int64) for name in ("data", *_MATRIX)),
        *((f"bias_{name}", ctypes.c_int64) for name in ("data", "row", "column")),
        *((f"c_{name}", ctypes.c_int64) for name in ("data", "batch", "row")),
        ("threads", ctypes.c_int64),
        ("accumulate", ctypes.c_int64),
        ("alpha", ctypes.c_double),
        ("products", ctypes.c_int64),
        ("limit", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("beyond_data", "rows", "columns")),
        ("worst", ctypes.c_double),
    )


@dataclass
class GemmKernel:
    """A loaded library.

    Attributes:
        integers: the machine also has tiles of 8-bit integers.
        refused: how many products' operands left the range that tiles represent; PyTorch's product ran.
        sites: what the integer kernel refused, by call site.
    """

    library: ctypes.CDLL
    integers: bool = False
    refused: int = 0
    sites: dict[int, Site] = field(default_factory=dict)

    @staticmethod
    def load(path: str) -> GemmKernel:
        """Load a built library.

        Raises:
            OSError: it cannot be loaded. NoTiles: the processor, the compiler or the system has none.
        """
        library = ctypes.CDLL(path)
        if not library.gemm_has_tiles():
            raise NoTiles("this processor or system has no AMX tiles of bf16")
        return GemmKernel(library, bool(library.gemm_has_int8()))

    def site(self, number: int) -> Site | None:
        """The call site of this number; None where there are no integer tiles, or the number is negative."""
        return self.sites.setdefault(number, Site()) if self.integers and number >= 0 else None

    def lines(self) -> list[str]:
        """A line for each call site: what runs it now, and what the integer kernel refused there."""
        return [str(site) for site in self.sites.values()]

    def product(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        out: Tensor,
        alpha: float = 1.0,
        accumulate: bool = False,
        site: Site | None = None,
    ) -> bool:
        """``out = alpha * a @ b (+ bias)``, or False where the operands need PyTorch's product.

        ``out`` then holds nothing of use, also where it was to be added to.

        Args:
            a: fp32 ``[m, k]`` or ``[batch, m, k]``, in any layout.
            b: fp32 ``[k, n]`` or ``[batch, k, n]``, in any layout.
            bias: fp32 ``[n]``, ``[1, n]``, ``[m, 1]`` or ``[m, n]``, or None; of two-dimensional products only.
            out: fp32 of the result's shape, rows of adjacent elements.
            alpha: what the product is multiplied with, in fp32.
            accumulate: add to what ``out`` holds; without ``bias``.
            site: multiply integers first, as this call site's operands allow; not where it is added, sums are short
                or sides small.
        """
        if out.dim() == 2:
            a, b, out = a.unsqueeze(0), b.unsqueeze(0), out.unsqueeze(0)
        a, b = _dense(a), _dense(b)
        batch, m, k = a.shape
        n = b.shape[2]
        bias_strides = (0, 0)
        if bias is not None:
            spread = bias.expand(m, n)
            if spread.stride(1) > 1:
                spread = bias = spread.contiguous()
            bias_strides = (spread.stride(0), spread.stride(1))
        problem = _Gemm(
            *(batch, m, n, k, a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride()),
            *(0 if bias is None else bias.data_ptr(), *bias_strides),
            *(out.data_ptr(), *out.stride()[:2], torch.get_num_threads()),
            *(accumulate, alpha),
        )
        if site is not None and not accumulate and k >= SHORTEST and min(m, n) >= SMALLEST_SIDE:
            done = self._multiply_integers(problem, site, a, b, bias, out)
            if done is not None:
                return done
        failed = self.library.gemm_f32(ctypes.byref(problem))
        if failed == _NO_MEMORY:
            raise MemoryError("matrix product on AMX tiles: no memory for packed operands")
        if failed:
            self.refused += 1
            if self.refused == 1:
                log.warning(
                    "a fp32 matrix product [%d, %d] @ [%d, %d] has infinite, huge or tiny elements, which AMX tiles do "
                    "not represent at fp32 accuracy; it and later ones like it run on PyTorch's kernel, slower",
                    *(m, k, k, n),
                )
        return not failed

    def _multiply_integers(
        self, problem: _Gemm, site: Site, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor
    ) -> bool | None:
        """As :meth:`product` (operands have a dimension of batches); None where the tiles of bf16 are to compute it."""
        if not site.shape:
            site.shape = f"[{problem.m}, {problem.k}] @ [{problem.k}, {problem.n}]"
        beyond = torch.empty(problem.m + problem.n, dtype=torch.bool)
        problem.beyond_data, problem.limit = beyond.data_ptr(), limit(problem.k)
        for level in range(site.begin(), len(PRODUCTS)):
            problem.products = PRODUCTS[level]
            failed = self.library.gemm_f32_int8(ctypes.byref(problem))
            if failed == _NO_MEMORY:
                raise MemoryError("matrix product on AMX tiles of integers: no memory for packed operands")
            if failed == _RANGE:
                site.refuse(len(PRODUCTS) - 1)
                return None
            share = problem.rows / problem.m + problem.columns / problem.n
            if not failed or (share <= MOST_AGAIN and problem.batch == 1):
                site.passed(level, share)
                return not failed or self._again(a[0], b[0], bias, out[0], problem.m, beyond, problem.alpha)
            site.refuse(level)
            log.info("%s: errors up to %.1f x the limit", site, problem.worst / max(problem.limit, 1e-30))
        return None

    def _again(
        self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, m: int, beyond: Tensor, alpha: float
    ) -> bool:
        """Compute the rows and columns of ``out`` that are ``beyond``, on the tiles of bf16 where they are many."""
        spread = None if bias is None else bias.expand(out.shape)
        for dim, which in enumerate((beyond[:m], beyond[m:])):
            where = which.nonzero().squeeze(1)
            if not len(where):
                continue
            left, right = (_rows(a, where), b) if dim == 0 else (a, _rows(b.t(), where).t())
            added = None if spread is None else spread.index_select(dim, where)
            part = out.new_empty((len(left), right.shape[1]))
            if len(where) < FEW:
                torch.mm(left, right, out=part)
                part = part if alpha == 1 else part * alpha
                part = part if added is None else part + added
            elif not self.product(left, right, added, part, alpha):
                return False
            out.index_copy_(dim, where, part)
        return True


def _rows(x: Tensor, where: Tensor) -> Tensor:
    """Some rows; ``index_select`` is slow on a matrix that lies transposed."""
    return x.index_select(0, where) if x.stride(1) == 1 else x.t().index_select(1, where).t()


class NoTiles(Exception):  # noqa: N818  (a reason, not an error a user meets)
    """The library is whole, but the machine has no AMX tiles."""


def _dense(x: Tensor) -> Tensor:
    """``[batch, rows, columns]`` with adjacent rows or adjacent columns, as the kernel reads it."""
    rows, columns = x.stride()[1:]
    return x if columns == 1 or rows == 1 else x.contiguous()
