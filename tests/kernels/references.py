"""What each kernel of the library must give, in fp64, from PyTorch's own functions and its autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Data = list[Tensor]
EPS = 1e-5


def gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def random(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def _norm_inputs(dtype: torch.dtype, rows: int, cols: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return random((rows, cols), dtype, g) * 3 + 1, random((cols,), dtype, g), random((cols,), dtype, g)


def _layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.layer_norm(x, [x.shape[-1]], w, b, EPS)


def _rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return functional.rms_norm(x, [x.shape[-1]], w, EPS)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    mean = wide.mean(-1, keepdim=True)
    return mean, (wide.var(-1, correction=0, keepdim=True) + EPS).rsqrt()


def case(name: str, dtype: torch.dtype, rows: int, cols: int) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments of a kernel function, and its results in fp64."""
    g = torch.Generator().manual_seed(rows * 1000 + cols)
    x, w, b = _norm_inputs(dtype, rows, cols, g)
    grad = random((rows, cols), dtype, g)
    X, W, B, G = (t.double() for t in (x, w, b, grad))
    mean, rstd = _statistics(x)
    if name in ("bias_gelu", "bias_silu"):
        act = functional.gelu if name == "bias_gelu" else functional.silu
        return [x, b], [act(X + B)]
    if name in ("bias_gelu_backward", "bias_silu_backward"):
        act = functional.gelu if name == "bias_gelu_backward" else functional.silu
        return [grad, x, b], list(gradients(lambda a, c: act(a + c), G, X, B))
    if name == "layer_norm":
        return [x, w, b], [_layer_norm(X, W, B), mean, rstd]
    if name == "layer_norm_backward":
        return [grad, x, mean.float(), rstd.float(), w], list(gradients(_layer_norm, G, X, W, B))
    if name == "rms_norm":
        return [x, w], [_rms_norm(X, W), (X.square().mean(-1, keepdim=True) + EPS).rsqrt()]
    if name == "rms_norm_backward":
        stat = (X.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return [grad, x, stat.float(), w], list(gradients(_rms_norm, G, X, W))
    if name == "embedding_norm":
        ids = torch.randint(rows, (rows,), generator=g)
        return [x, ids, grad], [functional.layer_norm(G[ids] + X, [cols], eps=EPS)]
    if name == "embedding_backward":
        ids = torch.randint(rows, (rows,), generator=g)
        return [grad, ids], list(gradients(lambda t: t[ids], G, torch.zeros(4096, cols, dtype=torch.float64)))
    if name.startswith("batch_norm"):
        return _batch_norm(name, dtype, rows, cols, g)
    if name.startswith("average_pool"):
        return _average_pool(name, dtype, rows, cols, g)
    if name.startswith("max_pool"):
        return _max_pool(name, dtype, rows, cols, g)
    if name in ("scatter_rows", "index_add", "pad_join", "histogram"):
        return _moved(name, x, grad, g)
    if name == "softmax":
        return [x], [torch.softmax(X, -1)]
    if name == "cumulative_softmax":
        return [x], [torch.softmax(X, -1).cumsum(-1)]
    if name == "softmax_backward":
        y = torch.softmax(x.float(), -1).to(dtype)
        Y = y.double()
        return [grad, y], [(G - (G * Y).sum(-1, keepdim=True)) * Y]
    if name.startswith("cross_entropy"):
        return _cross_entropy(name, x, g)
    if name == "rotary":
        return _rotary(dtype, rows, cols, g)
    if name == "adamw":
        return _adamw(dtype, rows * cols, g)
    if name == "lamb":
        return _lamb(dtype, rows, cols, g)
    if name == "unscale":
        flat = random((rows * cols,), dtype, g)
        if rows == 1:
            flat[cols // 2] = torch.inf
        scaled = flat.double() * 0.125
        bad = torch.tensor(rows == 1)
        return [flat, torch.tensor(0.125)], [scaled, torch.linalg.vector_norm(scaled), bad]
    raise KeyError(name)


def _cross_entropy(name: str, x: Tensor, g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    target = torch.randint(x.shape[1], (x.shape[0],), generator=g)
    if x.shape[0] > 1:
        target[1] = -100
    leaf = x.double().requires_grad_()
    losses = functional.cross_entropy(leaf, target, reduction="none")
    (slope,) = torch.autograd.grad(losses.sum() * 0.25, leaf)
    total = leaf.detach().logsumexp(-1)
    scale = torch.tensor(0.25)
    if name == "cross_entropy":
        return [x, target], [losses.detach(), total]
    if name == "cross_entropy_backward":
        return [scale, x, target, total.float()], [slope]
    return [scale, x, target], [losses.detach(), slope]


def _batch_norm(name: str, dtype: torch.dtype, rows: int, cols: int, g: torch.Generator) -> tuple[Data, Data]:
    channels, width = max(rows // 8, 1), 32 if cols % 32 == 0 else cols
    x, grad = (random((8, channels, cols // width, width), dtype, g) + shift for shift in (1, 0))
    weight, bias, mean, variance = (random((channels,), torch.float32, g) for _ in range(4))
    running = [mean.double(), variance.double().abs()]

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.batch_norm(x, *running, w, b, True, 0.1, EPS)

    leaves = [t.double() for t in (x, weight, bias)]
    wide = leaves[0].transpose(0, 1).flatten(1)
    middle, rstd = wide.mean(1), (wide.var(1, correction=0) + EPS).rsqrt()
    if name == "batch_norm_backward":
        return [grad, x, weight, middle.float(), rstd.float()], list(gradients(norm, grad.double(), *leaves))
    y = norm(*leaves).relu()  # which updates the running statistics
    return [x, weight, bias, mean, variance.abs()], [y, middle, rstd, *running]


def _max_pool(name: str, dtype: torch.dtype, rows: int, cols: int, g: torch.Generator) -> tuple[Data, Data]:
    x = random((max(rows // 64, 1), 1, 64, cols), dtype, g)
    leaf = x.double().requires_grad_()
    y, places = functional.max_pool2d(leaf, 3, 2, 1, return_indices=True)
    if name == "max_pool":
        return [x], [y.detach(), places]
    grad = random(y.shape, dtype, g)
    return [grad, x, places], list(torch.autograd.grad(y, leaf, grad.double()))


def _average_pool(name: str, dtype: torch.dtype, rows: int, cols: int, g: torch.Generator) -> tuple[Data, Data]:
    """Of an even width."""
    x = random((max(rows // 64, 1), 1, 64, cols + cols % 2), dtype, g)
    leaf = x.double().requires_grad_()
    y = leaf.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    if name == "average_pool":
        return [x], [y.detach()]
    grad = random(y.shape, dtype, g)
    return [grad, x], list(torch.autograd.grad(y, leaf, grad.double()))


def _moved(name: str, x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Data, Data]:
    """Row by row; counts are PyTorch's."""
    rows, cols = x.shape
    if name == "histogram":
        return [x], [torch.histc(x.double(), 16, -4, 4)]
    if name == "pad_join":
        wanted = torch.zeros(2 * rows, cols + 16, dtype=torch.float64)
        wanted[:rows, 16:], wanted[rows:, 16:] = x, torch.stack(list(y)[::-1])
        return [x, y], [wanted]
    places = torch.randperm(rows, generator=g) if name == "scatter_rows" else torch.randint(rows, (rows,), generator=g)
    wanted = torch.zeros(rows, cols).double() if name == "scatter_rows" else x.double()
    for row, place in zip(x if name == "scatter_rows" else y, places.tolist(), strict=True):
        wanted[place] += row.double()
    return ([x, places] if name == "scatter_rows" else [x, places, y]), [wanted]


def _rotary(dtype: torch.dtype, rows: int, cols: int, g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """As a rotation of pairs, which is what the embedding means."""
    x = random((2, 3, rows, cols), dtype, g)
    angles = torch.rand(rows, cols // 2, generator=g) * 6
    both = torch.cat([angles, angles], -1)
    pairs = torch.complex(x.double()[..., : cols // 2], x.double()[..., cols // 2 :])
    turned = pairs * torch.polar(torch.ones_like(angles).double(), angles.double())
    return [x, both.cos(), both.sin()], [torch.cat([turned.real, turned.imag], -1)]


def _moments(dtype: torch.dtype, shape: Any, g: torch.Generator) -> list[Tensor]:
    p, m = random(shape, torch.float32, g), random(shape, torch.float32, g) * 0.1
    return [p, random(shape, dtype, g), m, torch.rand(shape, generator=g) + 0.01]


def _adamw(dtype: torch.dtype, n: int, g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """PyTorch's own optimizer, in fp64, three steps in."""
    p, grad, m, v = _moments(dtype, (n,), g)
    parameter = torch.nn.Parameter(p.double())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    parameter.grad = grad.double()
    optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    optimizer.step()
    state = optimizer.state[parameter]
    scalars = [torch.tensor(1e-3), torch.tensor(1 - 0.9**3), torch.tensor(1 - 0.999**3)]
    return [p, grad, m, v, *scalars], [parameter.detach(), state["exp_avg"], state["exp_avg_sq"], parameter.detach()]


def _lamb(dtype: torch.dtype, chunks: int, size: int, g: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Parameter by parameter; the second one is the last chunk, and all zeros if there is another chunk."""
    p, grad, m, v = _moments(dtype, (chunks, size), g)
    segment = torch.zeros(chunks, dtype=torch.int64)
    if chunks > 1:
        segment[-1] = 1
        p[-1] = 0
    arguments = [p, grad, m, v, segment, torch.zeros(2), torch.tensor(1e-2), torch.tensor(0.1), torch.tensor(0.001)]
    P, G, M, V = (t.double() for t in (p, grad, m, v))
    M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
    update = (M / 0.1) / ((V / 0.001).sqrt() + 1e-6) + 0.01 * P
    for which in range(2):
        rows = segment == which
        top, bottom = P[rows].norm(), update[rows].norm()
        ratio = top / bottom if top > 0 and bottom > 0 else 1.0
        P[rows] = P[rows] - 1e-2 * ratio * update[rows]
    return arguments, [P, M, V, P]


def terms(name: str, arguments: list[Tensor]) -> list[float]:
    """Of each result that may be much smaller than what it is made from: the size of that; else nothing.

    RMSNorm of one column returns the sign of x: its gradient is 0 but for epsilon, and what fp32 leaves of it is the
    rounding of two equal terms, in PyTorch's own kernels too (``test_the_gradient_of_one_column_is_rounding``). A batch
    norm's gradient to the bias is a sum of both signs: of one channel it may be near 0, and no other result is there
    to measure it by. Sums on the way are as large as the norm of what is added up.
    """
    if name == "rms_norm_backward" and arguments[1].shape[-1] == 1:
        grad, _, rstd, weight = (a.double() for a in arguments)
        return [float((grad * rstd * weight).abs().max())]
    if name == "batch_norm_backward":
        return [0.0, 0.0, float(arguments[0].double().transpose(0, 1).flatten(1).norm(dim=1).max())]
    return []
