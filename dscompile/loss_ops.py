"""Cross-entropy of a projection, in chunks of rows: the logits of a whole batch never exist.

``linear_cross_entropy`` is ``cross_entropy(input @ weight.T + bias, target)``. A chunk's logits become its loss, then
in place its gradient, and with that its part of the gradients of ``input`` and ``weight``, before the next chunk
starts: so the peak is two chunks (one where the compiled kernel runs, ``codegen/cpu/loss_rows.cpp``) and the gradients,
in place of three tensors of all logits. The gradients are those for a loss gradient of 1; backward only scales them. No
product is computed twice, and rows that do not count (masked language models) are not projected at all. Each of the
three products can be told to run on AMX tiles (``tiles``, in the order of :data:`PRODUCTS`) by code generation.

The idea of taking the loss's gradient in forward, chunk by chunk, is that of Liger-Kernel (arXiv:2410.10989); Cut
Cross-Entropy (arXiv:2411.09009) recomputes the logits instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dscompile import gemm_ops
from dscompile.errors import ConfigError
from dscompile.ops import LIBRARY

if TYPE_CHECKING:
    from dscompile.codegen.cpu.loss_kernel import LossKernel

MEAN, SUM = 1, 2
"""``reduction`` as aten counts it."""

CHUNK_BYTES = 31 << 20
"""A chunk's logits: large enough for the matrix products to run at full speed, small beside a batch's, and less than
the 32 MiB from which on the C library maps fresh pages at every step (``mallopt(3)``, ``M_MMAP_THRESHOLD``)."""

PRODUCTS = ("logits", "gradient of the input", "gradient of the weight")
"""The products of a chunk."""

ON_NO_TILES = (False, False, False)

LIBRARY.define(
    "linear_cross_entropy(Tensor input, Tensor weight, Tensor? bias, Tensor target, int reduction, "
    "SymInt ignore_index, bool gradients, bool[3] tiles=False) "
    "-> (Tensor loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(F.linear(input, weight, bias).float(), target)`` without its logits.

    Args:
        input: ``[..., width]``, floating point.
        weight: ``[vocabulary, width]``, of ``input``'s dtype; products run in it, the loss in fp32 (fp64 for fp64).
            Under autocast both, and the bias, are cast as for a linear layer.
        target: ``[...]``, int64 classes, or ``ignore_index`` for rows that do not count.
        bias: ``[vocabulary]``.
        ignore_index: the class of rows that do not count.
        reduction: ``"mean"`` (over the rows that count; NaN if there is none) or ``"sum"``.

    Returns:
        The loss, a scalar in fp32 (fp64).

    Raises:
        ConfigError: an unknown reduction, or shapes or dtypes that do not fit.
        IndexError: on CPUs, a class that does not exist.
    """
    kinds = {"mean": MEAN, "sum": SUM}
    if reduction not in kinds:
        raise ConfigError(f"linear_cross_entropy: reduction must be 'mean' or 'sum', got {reduction!r}.")
    if weight.dim() != 2 or input.shape[-1:] != weight.shape[1:] or target.shape != input.shape[:-1]:
        raise ConfigError(
            f"linear_cross_entropy: input {list(input.shape)} needs a weight [vocabulary, {input.shape[-1]}] and a "
            f"target {list(input.shape[:-1])}; got {list(weight.shape)} and {list(target.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(f"linear_cross_entropy: the bias is {list(bias.shape)}; expected {list(weight.shape[:1])}.")
    if target.dtype.is_floating_point or target.dtype in (torch.bool, torch.uint8):
        raise ConfigError(f"linear_cross_entropy: the target is {target.dtype}; expected classes, int64.")
    input, weight, bias = _cast(input, weight, bias)
    dtypes = [t.dtype for t in (input, weight, bias) if t is not None]
    if len(set(dtypes)) > 1 or not input.dtype.is_floating_point:
        raise ConfigError(
            f"linear_cross_entropy: input, weight and bias are {', '.join(map(str, dtypes))}; they must have one "
            "floating dtype. Cast them, or use autocast."
        )
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    flat = input.reshape(-1, input.shape[-1])
    loss: Tensor = torch.ops.dscompile.linear_cross_entropy.default(
        flat, weight, bias, target.reshape(-1), kinds[reduction], ignore_index, wanted
    )[0]
    return loss


def _cast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast, if it is on, casts those of a linear layer: all but fp64."""
    kind = input.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    narrow = (x if x is None or x.dtype is torch.float64 else x.to(dtype) for x in (input, weight, bias))
    return tuple(narrow)  # type: ignore[return-value]


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the loss of logits of ``dtype`` is computed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def rows_of_chunk(count: int, vocabulary: int, itemsize: int) -> int:
    """How many of ``count`` rows are a chunk, at ``itemsize`` bytes a logit."""
    chunks = max(1, math.ceil(count * vocabulary * itemsize / CHUNK_BYTES))
    return max(1, math.ceil(count / chunks))


class _OutOfRangeError(Exception):
    """A chunk cannot be added to the gradient of the weight on tiles, and what was summed there is lost."""


def _kernel(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    gradients: bool,
    tiles: Sequence[bool] = ON_NO_TILES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        return _loss(input, weight, bias, target, reduction, ignore_index, gradients, tiles)
    except _OutOfRangeError:
        pass  # a further call here would keep the first one's buffers
    return _loss(input, weight, bias, target, reduction, ignore_index, gradients, ON_NO_TILES)


def _loss(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    gradients: bool,
    tiles: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counted = target != ignore_index
    total = int(counted.sum())
    _check_classes(target, counted, weight.shape[0])
    mean = reduction == MEAN
    places = _places(input, counted, total)
    work = _Work(input, weight, bias, gradients, total if places is not None else input.shape[0], tiles)
    work.scale = 1.0 / total if mean and total else 1.0
    losses = torch.zeros((), dtype=torch.float64, device=input.device)
    for start in range(0, work.count, work.rows):
        part = slice(start, start + work.rows)
        if places is None:
            losses += work.chunk(part, target[part], counted[part] if total < input.shape[0] else None)
        else:
            losses += work.chunk(places[part], target[places[part]], None)
    return ((losses / total if mean else losses).to(work.exact), *work.results())


def _places(input: Tensor, counted: Tensor, total: int) -> Tensor | None:
    """Where the rows are that count, int64 ``[total]``, if only these need be projected; None: all are.

    A masked language model counts one row of seven, and the others' gradient is 0: DeepSpeed's BERT projects no others.
    But 0 times infinity is NaN: if a row that does not count is not finite, all are projected, as in PyTorch.
    """
    if total == input.shape[0]:
        return None
    exact = input.sum(1, dtype=loss_dtype(input.dtype))
    if not bool((exact.isfinite() | counted).all()):
        return None
    return counted.nonzero().squeeze(1)


def _check_classes(target: Tensor, counted: Tensor, vocabulary: int) -> None:
    """Raise for a class that does not exist; on an accelerator that is left to its kernels, as in PyTorch."""
    if target.device.type != "cpu":
        return
    wrong = target[counted & ((target < 0) | (target >= vocabulary))]
    if wrong.numel():
        raise IndexError(f"linear_cross_entropy: target {int(wrong[0])} is out of bounds for {vocabulary} classes.")


def _rows_kernel(input: Tensor) -> LossKernel | None:
    """The compiled loss of rows, where it takes logits like ``input``."""
    if input.device.type != "cpu" or input.dtype is torch.float64:
        return None
    from dscompile.codegen.cpu.builder import loss_kernel

    kernel = loss_kernel().kernel
    return kernel if kernel is not None and kernel.takes(input.dtype) else None


class _Work:
    """The buffers of one call: a chunk's logits (and probabilities), and the gradients that grow chunk by chunk."""

    scale = 1.0
    """What the gradients are multiplied with."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradients: bool,
        count: int,
        tiles: Sequence[bool],
    ) -> None:
        """``count`` rows of ``input`` will come in chunks; the others' gradient is 0."""
        self.tiles = tiles
        self.input, self.weight, self.bias, self.count = input, weight, bias, count
        self.exact = loss_dtype(input.dtype)
        vocabulary = weight.shape[0]
        self.rows = rows_of_chunk(count, vocabulary, self.exact.itemsize)
        self.logits = input.new_empty((self.rows, vocabulary))
        self.kernel = _rows_kernel(input)  # needs no probabilities: the gradient takes the place of the logits
        kept = 0 if self.kernel is not None else self.rows
        self.probabilities = torch.empty((kept, vocabulary), dtype=self.exact, device=input.device)
        fresh = torch.empty_like if count == input.shape[0] else torch.zeros_like
        self.grad_input = fresh(input, memory_format=torch.contiguous_format) if gradients else None
        # sums over chunks are kept in the exact dtype: one rounding to 16 bits, as of one product
        self.grad_weight = torch.zeros(weight.shape if gradients else (0,), dtype=self.exact, device=weight.device)
        self.grad_bias = torch.zeros(vocabulary if gradients else 0, dtype=self.exact, device=weight.device)

    def chunk(self, part: slice | Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        """The summed loss of some rows (fp64, scalar); adds their part of the gradients.

        ``part`` says where the rows are in the input; ``counted`` which of them count, None that all do.
        """
        input = self.input[part]
        logits = self.logits[: len(input)]
        self._multiply(self.tiles[0], input, self.weight.t(), self.bias, logits)
        index = target if counted is None else target.where(counted, 0)
        if self.kernel is None:
            losses, gradient = self._loss_and_gradient(logits, index, counted)
        else:
            losses = self.kernel.rows(logits, index, counted, gradient=self.grad_input is not None)
            gradient = logits
        if self.grad_input is not None:
            self._add_gradients(part, input, gradient)
        return losses.sum(dtype=torch.float64)

    def _loss_and_gradient(self, logits: Tensor, index: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each row's loss and, where it is wanted, the gradient of ``logits``, which may lie in their place."""
        probabilities, index = self.probabilities[: len(logits)], index.unsqueeze(1)
        exact = logits.to(self.exact)
        largest, where = exact.max(dim=1, keepdim=True)
        chosen = exact.gather(1, index)
        torch.softmax(exact, 1, out=probabilities)
        # log-sum-exp from the largest probability, which is at least 1 / vocabulary: no underflow, no further pass
        losses = (largest - probabilities.gather(1, where).log() - chosen).squeeze(1)
        if counted is not None:
            losses = losses.where(counted, 0)
        if self.grad_input is not None:
            probabilities.scatter_add_(1, index, torch.full_like(chosen, -1.0))
            if counted is not None:
                probabilities.mul_(counted.unsqueeze(1))
        return losses, probabilities if logits.dtype is self.exact else logits.copy_(probabilities)

    def _add_gradients(self, part: slice | Tensor, input: Tensor, gradient: Tensor) -> None:
        assert self.grad_input is not None
        rows = self.grad_input[part] if isinstance(part, slice) else torch.empty_like(input)
        self._multiply(self.tiles[1], gradient, self.weight, None, rows)
        if self.scale != 1.0:
            rows.mul_(self.scale)
        if isinstance(part, Tensor):
            self.grad_input.index_copy_(0, part, rows)
        if self.tiles[2]:
            if not gemm_ops.add_product(self.grad_weight, gradient.t(), input, self.scale):
                raise _OutOfRangeError
        elif gradient.dtype is self.exact:
            self.grad_weight.addmm_(gradient.t(), input, alpha=self.scale)
        else:
            self.grad_weight.add_(gradient.t() @ input, alpha=self.scale)
        if self.bias is not None:
            self.grad_bias.add_(gradient.sum(0, dtype=self.exact), alpha=self.scale)

    @staticmethod
    def _multiply(on_tiles: bool, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if on_tiles:
            torch.ops.dscompile.matmul.out(a, b, bias, out=out)
        else:
            gemm_ops.plain_product(a, b, bias, out)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of input, weight and bias, in their dtypes; empty where there is none."""
        if self.grad_input is None:
            return self.input.new_empty(0), self.input.new_empty(0), self.input.new_empty(0)
        grad_bias = self.input.new_empty(0) if self.bias is None else self.grad_bias.to(self.bias.dtype)
        return self.grad_input, self.grad_weight.to(self.weight.dtype), grad_bias


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: int,
    ignore_index: Any,
    gradients: bool,
    tiles: Sequence[bool] = ON_NO_TILES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = input.new_empty((), dtype=loss_dtype(input.dtype))
    if not gradients:
        return loss, input.new_empty(0), input.new_empty(0), input.new_empty(0)
    grad_bias = input.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return loss, input.new_empty(input.shape), weight.new_empty(weight.shape), grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.has_bias = inputs[2] is not None
    ctx.ready = inputs[6]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    if not ctx.ready:
        raise RuntimeError("linear_cross_entropy was called without gradients=True; it has no backward.")
    grad_input, grad_weight, grad_bias = ctx.saved_tensors

    def scaled(gradient: Tensor) -> Tensor:
        return gradient * grad_loss.to(gradient.dtype)

    wanted = ctx.needs_input_grad
    return (
        scaled(grad_input) if wanted[0] else None,
        scaled(grad_weight) if wanted[1] else None,
        scaled(grad_bias) if ctx.has_bias and wanted[2] else None,
        *(None,) * 5,
    )


LIBRARY.impl("linear_cross_entropy", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("dscompile::linear_cross_entropy", _fake, lib=LIBRARY)
torch.library.register_autograd("dscompile::linear_cross_entropy", _backward, setup_context=_save, lib=LIBRARY)
