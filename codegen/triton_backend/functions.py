"""What the library's kernels compute: a training step's fused operators, each a few lines of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dscompile.inductor_compat import uniform

EPS = 1e-5


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)``; x ``[..., N]``, bias ``[N]``."""
    return functional.gelu(x + bias)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`bias_gelu` to x and bias, in one pass over x."""
    dx = torch.ops.aten.gelu_backward(grad.float(), (x + bias).float())
    return dx.to(x.dtype), dx.sum(list(range(x.dim() - 1))).to(bias.dtype)


def bias_silu(x: Tensor, bias: Tensor) -> Tensor:
    """``silu(x + bias)``."""
    return functional.silu(x + bias)


def bias_silu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`bias_silu` to x and bias, in one pass over x."""
    z = (x + bias).float()
    gate = torch.sigmoid(z)
    dx = grad.float() * gate * (1 + z * (1 - gate))
    return dx.to(x.dtype), dx.sum(list(range(x.dim() - 1))).to(bias.dtype)


def bias_dropout_residual(x: Tensor, bias: Tensor, residual: Tensor, seed: Tensor, p: float = 0.1) -> Tensor:
    """``dropout(x + bias, p) + residual``; the mask is drawn again in backward from ``seed`` (int64 ``[]``)."""
    keep = uniform(list(x.shape), seed) >= p
    return torch.where(keep, (x + bias) * (1 / (1 - p)), 0.0) + residual


def bias_dropout_residual_backward(grad: Tensor, seed: Tensor, p: float = 0.1) -> tuple[Tensor, Tensor]:
    """Gradients to x and bias; that to the residual is ``grad``."""
    keep = uniform(list(grad.shape), seed) >= p
    dx = torch.where(keep, grad.float() * (1 / (1 - p)), 0.0)
    return dx.to(grad.dtype), dx.sum(list(range(grad.dim() - 1))).to(grad.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised ``[..., N]``, and mean and 1 / deviation of each row in fp32 for backward."""
    wide = x.float()
    variance, mean = torch.var_mean(wide, [-1], correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + EPS)
    return ((wide - mean) * rstd * weight + bias).to(x.dtype), mean, rstd


def layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients to x, weight and bias in one pass: every program keeps its columns' sums, a tiny kernel adds them."""
    wide, dy = x.float(), grad.float()
    normal = (wide - mean) * rstd
    scaled = dy * weight
    along = (scaled * normal).mean(-1, keepdim=True)
    dx = rstd * (scaled - scaled.mean(-1, keepdim=True) - normal * along)
    rows = list(range(x.dim() - 1))
    return dx.to(x.dtype), (dy * normal).sum(rows).to(weight.dtype), dy.sum(rows).to(weight.dtype)


def embedding_norm(x: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    """``layer_norm(table[ids] + x)`` without weights; x ``[T, N]``, ids int64 ``[T]``, table ``[V, N]``."""
    return functional.layer_norm(functional.embedding(ids, table) + x, [x.shape[-1]], eps=EPS)


def cumulative_softmax(x: Tensor) -> Tensor:
    """Running sum of ``softmax(x)`` over each row, fp32: of sorted logits, what nucleus sampling compares."""
    return torch.softmax(x.float(), -1).cumsum(-1)


VOCABULARY = 4096


def embedding_backward(grad: Tensor, ids: Tensor, vocabulary: int = VOCABULARY) -> Tensor:
    """Gradient of an embedding's table, ``[vocabulary, N]``; grad ``[T, N]``, ids int64 ``[T]``.

    Rows are added where ids are equal: atomically, in no fixed order, in fp32.
    """
    found: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, vocabulary, -1, False)
    return found


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_variance: Tensor
) -> tuple[Tensor, ...]:
    """Batch norm in training over ``[N, C, H, W]``, and ReLU: result, mean, 1 / deviation, new running statistics.

    Weight, bias and statistics are fp32 ``[C]``.
    """
    y, *statistics = torch.ops.aten._native_batch_norm_legit_functional(
        x, weight, bias, running_mean, running_variance, True, 0.1, EPS
    )
    return (functional.relu(y), *statistics)


def batch_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a batch norm in training to x, weight and bias."""
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, mean, mean, rstd, True, EPS, [True, True, True]
    )
    return found


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of windows of 3 x 3 at every second place, as behind a ResNet's first convolution, and where they are."""
    found: tuple[Tensor, Tensor] = torch.ops.aten.max_pool2d_with_indices(x, [3, 3], [2, 2], [1, 1])
    return found


def max_pool_backward(grad: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """Gradient of :func:`max_pool`."""
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    found: Tensor = backward(grad, x, [3, 3], [2, 2], [1, 1], [1, 1], False, places)
    return found


def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised ``[..., N]``, and 1 / root mean square of each row in fp32 for backward."""
    wide = x.float()
    rstd = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS)
    return (wide * rstd * weight).to(x.dtype), rstd


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to x and weight in one pass."""
    wide, dy = x.float(), grad.float()
    normal = wide * rstd
    scaled = dy * weight
    dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy * normal).sum(list(range(x.dim() - 1))).to(weight.dtype)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    return torch.softmax(x, -1)


def softmax_backward(grad: Tensor, y: Tensor) -> Tensor:
    """Gradient of softmax from its result."""
    inner = grad.float() * y
    return (inner - y * inner.sum(-1, keepdim=True)).to(y.dtype)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row ``[rows]`` (0 where the target is -100), and the logarithm of the sum, one read of the logits.

    Logits ``[rows, classes]``, target int64 ``[rows]``. Neither probabilities nor a one-hot tensor exist in memory.
    """
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)
    total = torch.log((wide - top).exp().sum(-1)) + top.squeeze(-1)
    chosen = torch.arange(logits.shape[-1], device=logits.device) == target.unsqueeze(-1)
    picked = torch.where(chosen, wide, 0.0).sum(-1)
    return torch.where(target == IGNORED, 0.0, total - picked), total


def cross_entropy_backward(scale: Tensor, logits: Tensor, target: Tensor, total: Tensor) -> Tensor:
    """Gradient to the logits, from ``scale`` (fp32 ``[]``: the loss's gradient over the number of counted rows)."""
    chosen = torch.arange(logits.shape[-1], device=logits.device) == target.unsqueeze(-1)
    probability = torch.exp(logits.float() - total.unsqueeze(-1))
    factor = torch.where(target == IGNORED, 0.0, scale).unsqueeze(-1)
    return (torch.where(chosen, probability - 1.0, probability) * factor).to(logits.dtype)


def cross_entropy_both(scale: Tensor, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient in one kernel: the logits are read twice and the gradient written once."""
    loss, total = cross_entropy(logits, target)
    return loss, cross_entropy_backward(scale, logits, target, total)


IGNORED = -100


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of x ``[batch, heads, seq, dim]`` by tables ``[seq, dim]`` (Su and others, 2021)."""
    half = x.shape[-1] // 2
    rotated = torch.cat([-x[..., half:], x[..., :half]], -1)
    return (x * cosine + rotated * sine).to(x.dtype)


def adamw(
    master: Tensor, grad: Tensor, first: Tensor, second: Tensor, rate: Tensor, correct1: Tensor, correct2: Tensor
) -> tuple[Tensor, ...]:
    """AdamW (Loshchilov and Hutter, 2019) over flat fp32 shards ``[n]``; returns master, both moments, a bf16 copy.

    ``rate``, ``correct1 = 1 - beta1**step`` and ``correct2 = 1 - beta2**step`` are fp32 ``[]``. The results may be
    written over the operands: an element is read before it is written, by the same thread.
    """
    beta1, beta2, decay, epsilon = 0.9, 0.999, 0.01, 1e-8
    wide = grad.float()
    first = beta1 * first + (1 - beta1) * wide
    second = beta2 * second + (1 - beta2) * wide * wide
    step = (first / correct1) / (torch.sqrt(second / correct2) + epsilon)
    master = master * (1 - rate * decay) - rate * step
    return master, first, second, master.to(torch.bfloat16)


def lamb(
    master: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    segment: Tensor,
    norms: Tensor,
    rate: Tensor,
    correct1: Tensor,
    correct2: Tensor,
) -> tuple[Tensor, ...]:
    """LAMB (You and others, 2020) over a flat shard cut into chunks; returns master, both moments, a bf16 copy.

    The shard is ``[chunks, size]``, every parameter padded to whole chunks with zeros; ``segment`` int64 ``[chunks]``
    says which parameter a chunk is of, ``norms`` is zeros ``[parameters]``. Squares are added up in each chunk, then
    over the chunks of a parameter.
    """
    beta1, beta2, decay, epsilon = 0.9, 0.999, 0.01, 1e-6
    wide = grad.float()
    first = beta1 * first + (1 - beta1) * wide
    second = beta2 * second + (1 - beta2) * wide * wide
    update = (first / correct1) / (torch.sqrt(second / correct2) + epsilon) + decay * master
    weight_norm = torch.sqrt(norms.index_add(0, segment, (master * master).sum(-1)))
    update_norm = torch.sqrt(norms.index_add(0, segment, (update * update).sum(-1)))
    usable = (weight_norm > 0) & (update_norm > 0)
    ratio = torch.where(usable, weight_norm / update_norm, 1.0)[segment]
    master = master - rate * ratio.unsqueeze(-1) * update
    return master, first, second, master.to(torch.bfloat16)


def unscale(grad: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A flat gradient times ``inverse`` (fp32 ``[]``), its 2-norm, and whether any element is not finite."""
    wide = grad.float() * inverse
    bad = torch.logical_not(torch.isfinite(wide)).any()
    return wide, torch.sqrt((wide * wide).sum()), bad


def pad_join(x: Tensor, y: Tensor) -> Tensor:
    """x, and y with its rows in the opposite order, below each other, with 16 zeros before each row."""
    return torch.cat([functional.pad(t, [16, 0]) for t in (x, y.flip(0))])


def average_pool(x: Tensor) -> Tensor:
    """Means of windows of 2 x 2."""
    return functional.avg_pool2d(x, 2)


def average_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of :func:`average_pool`; of x only the shape counts."""
    backward = torch.ops.aten.avg_pool2d_backward
    found: Tensor = backward(grad, x, [2, 2], [2, 2], [0, 0], False, True, None)
    return found


def scatter_rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x at their places (int64, each once) of a table of zeros: tokens sent to their experts."""
    return torch.zeros_like(x).index_put([places], x)


def index_add(x: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """``x`` with rows added at places that repeat (int64): tokens that come back from their experts.

    Added atomically, in no fixed order, in fp32.
    """
    return x.index_add(0, places, rows)


def histogram(x: Tensor) -> Tensor:
    """How many elements lie in each of 16 equal parts of [-4, 4]; fp32 ``[16]``."""
    return torch.histc(x.float(), 16, -4, 4)
