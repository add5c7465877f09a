"""The CPU attention kernels against masked dense attention in fp64, written out here."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dscompile.attention_ops
from dscompile.attention_gathered import Blocks, gathered_backward, gathered_forward
from dscompile.codegen.cpu.builder import attention_kernels, build_kernels
from dscompile.codegen.cpu.kernels import AttentionKernels
from dscompile.errors import UnsupportedError

assert dscompile.attention_ops  # registers the operators
OP = torch.ops.dscompile.block_sparse_attention.default


def csr(layout: Tensor) -> tuple[Tensor, Tensor]:
    """``[heads, rows, columns]`` bool as CSR with absolute offsets."""
    ends = layout.sum(-1).flatten().cumsum(0)
    starts = ends - layout.sum(-1).flatten()
    pointers = torch.cat([starts.view(layout.shape[:2]), ends.view(layout.shape[:2])[:, -1:]], 1)
    return pointers.int(), layout.nonzero()[:, 2].int()


def visible(layout: Tensor, block: int, q: Tensor, k: Tensor, causal: bool, padding: Tensor | None) -> Tensor:
    """Which key each query sees: bool ``[batch, heads, seq_q, seq_k]``."""
    rows, columns = q.shape[2], k.shape[2]
    seen = layout.repeat_interleave(block, 1).repeat_interleave(block, 2)[None, :, :rows, :columns]
    seen = seen.expand(q.shape[0], q.shape[1], -1, -1).clone()
    if causal:
        seen &= torch.arange(columns) <= torch.arange(rows)[:, None]
    if padding is not None:
        seen &= ~padding[:, None, None, :]
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked attention in the tensors' dtype, with scores in memory."""
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    lse = total.squeeze(-1).log() + top.squeeze(-1)
    return weights / total.clamp(min=1e-300) @ v, lse


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype, *, heads_inside: bool = False) -> list[Tensor]:
    """q, k, v and the gradient of the output; ``heads_inside`` lays heads between sequence and elements."""
    batch, heads, rows, columns, size = shape
    generator = torch.Generator().manual_seed(0)
    made = []
    for seq in (rows, columns, columns, rows):
        if heads_inside:
            made.append(torch.randn(batch, seq, heads, size, generator=generator).transpose(1, 2).to(dtype))
        else:
            made.append(torch.randn(batch, heads, seq, size, generator=generator).to(dtype))
    return made


def random_layout(heads: int, rows: int, columns: int, density: float = 0.5) -> Tensor:
    """A layout in which query block 1 sees nothing and key block 1 is seen by nothing."""
    layout = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(1)) < density
    layout[:, 0, 0] = True
    if rows > 2 and columns > 2:
        layout[:, 1] = False
        layout[:, :, 1] = False
    return layout


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value."""
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


@pytest.fixture(scope="module")
def library() -> AttentionKernels:
    build = attention_kernels()
    assert build.kernels is not None, build.reason
    return build.kernels


@pytest.fixture(params=["vector", "tiles"])
def kernels(request: pytest.FixtureRequest, library: AttentionKernels) -> AttentionKernels:
    """Both code paths; the second only where the CPU has AMX."""
    if request.param == "tiles" and not library.library.attention_has_tiles():
        pytest.skip("this CPU has no AMX tiles")
    return AttentionKernels(library.library, request.param == "tiles")


# The error of fp32 attention is a few ulp of sums of `size` products; bf16 rounds probabilities and results to 2^-8.
# fp16 has 2^-11; on AMX tiles its products leave out what is below 2^-16.
TOLERANCE = {torch.float32: 6e-6, torch.bfloat16: 1.5e-2, torch.float16: 1e-3}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

SHAPES = [  # batch, heads, queries, keys, head size, block
    (2, 3, 100, 100, 24, 16),
    (1, 2, 200, 130, 64, 64),
    (2, 2, 97, 97, 40, 32),
    (1, 1, 300, 300, 128, 128),
    (1, 2, 190, 250, 72, 80),
    (1, 5, 70, 70, 8, 48),
    (1, 2, 128, 128, 64, 16),
    (1, 2, 7, 5, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("causal", "padded"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_are_those_of_masked_dense_attention(
    kernels: AttentionKernels, shape: tuple[int, ...], causal: bool, padded: bool, dtype: torch.dtype
) -> None:
    batch, heads, rows, columns, size, block = shape
    q, k, v, grad = tensors((batch, heads, rows, columns, size), dtype, heads_inside=block % 32 == 0)
    layout = random_layout(heads if block != 64 else 1, -(-rows // block), -(-columns // block))
    padding = torch.rand(batch, columns, generator=torch.Generator().manual_seed(2)) < 0.2 if padded else None
    blocks = Blocks(*csr(layout), *csr(layout.mT), block, causal, padding, size**-0.5)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    seen = visible(layout, block, q, k, causal, padding)
    out, lse = dense(*exact, seen, size**-0.5)
    grads = torch.autograd.grad(out, exact, grad.double())

    found, found_lse = kernels.forward(q, k, v, blocks)
    found_grads = kernels.backward(grad, q, k, v, found, found_lse, blocks)
    some = seen.any(-1)
    assert error(found, out.detach()) < TOLERANCE[dtype]
    assert (found_lse[~some] == -torch.inf).all()
    assert torch.allclose(found_lse[some].double(), lse[some].detach(), atol=2e-5 if dtype == torch.float32 else 1e-4)
    assert found.dtype == dtype
    for mine, wanted in zip(found_grads, grads, strict=True):
        assert error(mine, wanted) < TOLERANCE[dtype]
    assert not found[~some].any(), "a query that sees nothing has output 0"
    assert not found_grads[0][~some].any(), "and gradient 0"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_no_layout_is_dense_attention(kernels: AttentionKernels, dtype: torch.dtype, causal: bool) -> None:
    q, k, v, grad = tensors((2, 2, 150, 150, 64), dtype)
    blocks = Blocks(None, None, None, None, 64, causal, None, 0.125)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    reference = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=causal)
    grads = torch.autograd.grad(reference, exact, grad.double())
    out, lse = kernels.forward(q, k, v, blocks)
    assert error(out, reference.detach()) < TOLERANCE[dtype]
    for mine, wanted in zip(kernels.backward(grad, q, k, v, out, lse, blocks), grads, strict=True):
        assert error(mine, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_errors_are_at_most_twice_those_of_pytorch(kernels: AttentionKernels, dtype: torch.dtype, size: int) -> None:
    """fp32 on AMX tiles is the case in point: single bf16 products would be 10,000 times worse."""
    q, k, v, grad = tensors((1, 2, 512, 512, size), dtype)
    blocks = Blocks(None, None, None, None, 64, True, None, size**-0.5)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    reference = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True)
    wanted = [reference.detach(), *torch.autograd.grad(reference, exact, grad.double())]
    theirs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*theirs, is_causal=True)
    eager = [out.detach(), *torch.autograd.grad(out, theirs, grad)]
    found, lse = kernels.forward(q, k, v, blocks)
    ours = [found, *kernels.backward(grad, q, k, v, found, lse, blocks)]

    def mean_error(x: Tensor, y: Tensor) -> float:
        return float((x.double() - y).square().mean().sqrt())

    for mine, other, value in zip(ours, eager, wanted, strict=True):
        assert mean_error(mine, value) <= 2 * mean_error(other, value)


@pytest.mark.parametrize(("heads", "threads"), [(1, 4), (3, 2), (2, 2), (5, 4)])
def test_any_number_of_threads_gives_the_same_to_rounding(kernels: AttentionKernels, heads: int, threads: int) -> None:
    q, k, v, grad = tensors((1, heads, 260, 260, 32), torch.float32)
    layout = random_layout(heads, 9, 9)
    blocks = Blocks(*csr(layout), *csr(layout.mT), 32, True, None, 0.2)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            out, lse = kernels.forward(q, k, v, blocks)
            results.append((out, lse, *kernels.backward(grad, q, k, v, out, lse, blocks)))
            again = kernels.backward(grad, q, k, v, out, lse, blocks)
            assert all(torch.equal(x, y) for x, y in zip(results[-1][2:], again, strict=True)), "not reproducible"
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.allclose(one, many, atol=1e-5)


def test_nothing_of_hidden_keys_leaks(kernels: AttentionKernels) -> None:
    """Key blocks outside the layout hold NaN: they must not be multiplied with zeros."""
    for block in (16, 48, 64):
        q, k, v, grad = tensors((1, 1, 192, 192, 32), torch.float32)
        layout = torch.eye(192 // block, dtype=torch.bool)[None]
        layout[0, :, 1] = False
        layout[0, 1, 0] = True
        k[:, :, block : 2 * block] = torch.nan
        v[:, :, block : 2 * block] = torch.nan
        blocks = Blocks(*csr(layout), *csr(layout.mT), block, False, None, 0.2)
        out, lse = kernels.forward(q, k, v, blocks)
        grads = kernels.backward(grad, q, k, v, out, lse, blocks)
        assert not any(x.isnan().any() for x in (out, lse, *grads)), block


def test_nan_is_not_lost(kernels: AttentionKernels) -> None:
    q, k, v, _ = tensors((1, 1, 64, 64, 32), torch.float32)
    blocks = Blocks(None, None, None, None, 64, False, None, 0.2)
    q[0, 0, 3] = torch.nan
    out, lse = kernels.forward(q, k, v, blocks)
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert not out[0, 0, :3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gathered_attention_gives_the_same(dtype: torch.dtype) -> None:
    q, k, v, grad = tensors((2, 3, 100, 100, 24), dtype)
    layout = random_layout(3, 7, 7)
    padding = torch.rand(2, 100, generator=torch.Generator().manual_seed(2)) < 0.2
    blocks = Blocks(*csr(layout), *csr(layout.mT), 16, True, padding, 0.3)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    seen = visible(layout, 16, q, k, True, padding)
    out, _ = dense(*exact, seen, 0.3)
    grads = torch.autograd.grad(out, exact, grad.double())
    found, lse = gathered_forward(q, k, v, blocks)
    tolerance = {torch.float64: 1e-12, **TOLERANCE}[dtype]
    assert error(found, out.detach()) < tolerance
    for mine, wanted in zip(gathered_backward(grad, q, k, v, found, lse, blocks), grads, strict=True):
        assert error(mine, wanted) < tolerance


def test_a_library_without_fp16_says_so() -> None:
    class Old:
        attention_has_fp16 = staticmethod(lambda: 0)

    old = AttentionKernels(Old(), tiles=False)  # type: ignore[arg-type]
    assert "no fp16 type (GCC has one from version 12" in old.lacks(torch.float16)
    assert old.lacks(torch.bfloat16) == old.lacks(torch.float32) == ""


@pytest.mark.slow
def test_a_compiler_without_fp16_builds_the_rest(tmp_path: Path) -> None:
    build = build_kernels(tmp_path, os.environ | {"CXX": "g++ -U__FLT16_MAX__"})
    assert build.kernels is not None, build.reason
    assert build.kernels.lacks(torch.float16)
    q, k, v, _ = tensors((1, 1, 64, 64, 16), torch.bfloat16)
    out, _ = build.kernels.forward(q, k, v, Blocks(None, None, None, None, 64, False, None, 0.25))
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.25)
    assert error(out, wanted) < TOLERANCE[torch.bfloat16]


def test_the_operator_differentiates_and_traces() -> None:
    q, k, v, grad = tensors((1, 2, 64, 64, 16), torch.float64)
    layout = random_layout(2, 4, 4)
    arguments = (*csr(layout), *csr(layout.mT), 16, True, None, 0.25)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: OP(*x, *arguments)[0], leaves)
    torch.library.opcheck(OP, (*leaves, *arguments))
    out, lse = OP(*leaves, *arguments)
    assert not lse.requires_grad
    assert out.transpose(1, 2).is_contiguous()
    out.backward(grad)


def test_dscompile_proves_a_graph_with_the_operator() -> None:
    q, k, v, _ = tensors((1, 2, 64, 64, 16), torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def attend(*x: Tensor) -> Tensor:
        return OP(*x, None, None, None, None, 32, True, None, 0.25)[0] * 2

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="dscompile")
    expected, found = attend(*leaves), compiled(*leaves)
    assert torch.equal(expected, found)
    for mine, wanted in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert torch.equal(mine, wanted)
    assert dscompile.last_report()[-1].verdict == "proved"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 12}, "multiple of 8"),
        ({"block": 24}, "block 24"),
        ({"dtype": torch.int32}, "dtype"),
        ({"scale": 0.0}, "not positive"),
        ({"mask": torch.zeros(1, 32)}, "key_padding_mask"),
        ({"pointers": torch.zeros(1, 9, dtype=torch.int32)}, "row_ptr has shape"),
        ({"pointers": torch.zeros(1, 3)}, "int32"),
    ],
)
def test_what_it_cannot_compute_is_an_error_that_says_so(change: dict[str, object], message: str) -> None:
    q = torch.zeros(1, 2, 32, change.get("size", 16), dtype=change.get("dtype", torch.float32))  # type: ignore[arg-type]
    pointers = change.get("pointers")
    columns = None if pointers is None else torch.zeros(0, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=message):
        OP(
            q,
            q,
            q,
            pointers,
            columns,
            None,
            None,
            change.get("block", 16),
            False,
            change.get("mask"),
            change.get("scale", 1.0),
        )


def causal_model(x: Tensor, weight: Tensor) -> Tensor:
    """One attention layer of 2 heads of 32 as models write it."""
    batch, seq, _ = x.shape
    q, k, v = ((x @ weight).view(batch, seq, 3, 2, 32).permute(2, 0, 3, 1, 4)).unbind(0)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("option", ["auto", "kernel", "aten"])
def test_dense_attention_takes_the_chosen_kernel_and_the_report_says_which(option: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 160, 64, generator=generator)
    weight = (torch.randn(64, 192, generator=generator) / 8).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(causal_model, backend="dscompile", options={"attention": option, "cache": False})
    expected, found = causal_model(x, weight), compiled(x, weight)
    wanted, mine = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    reports = dscompile.last_report()[-2:]
    assert [r.verdict for r in reports] == ["proved", "proved"]
    assert not any(r.fallbacks for r in reports)
    choices = [choice for r in reports for choice in r.facts["attention"]]
    assert [c.split(" (")[0].rpartition(":")[0] for c in choices] == [
        "attention forward [1, 2, 160, 32] float32",
        "attention backward [1, 2, 160, 32] float32",
    ]
    if option != "auto":
        who = {"kernel": "our kernel", "aten": "PyTorch"}[option]
        assert all(f": {who} (attention='{option}')" in c for c in choices)
    else:
        assert all("x PyTorch's speed" in c for c in choices)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dropout_p": 0.5}, "drops out"),
        ({"attn_mask": torch.zeros(130, 130)}, "has a mask"),
        ({"scale": -1.0}, "does not take"),
    ],
)
def test_what_the_kernel_cannot_do_stays_with_pytorch(arguments: dict[str, object], reason: str) -> None:
    def attend(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, **arguments)  # type: ignore[arg-type]

    torch.compiler.reset()
    x = torch.randn(1, 1, 130, 16)
    torch.compile(attend, backend="dscompile", options={"attention": "kernel", "cache": False})(x)
    (choice,) = dscompile.last_report()[-1].facts["attention"] or [f"not one operator: {reason}"]
    assert reason in choice


@pytest.mark.parametrize(
    ("pointers", "columns"),
    [
        ([0, 1, 3], [0, 0, 2]),
        ([0, 1, 3], [0, 1, 1]),
        ([0, 2, 1], [0, 1, 1]),
        ([0, 1, 4], [0, 0, 1]),
        ([0, 1, 2], [-1, 0]),
    ],
    ids=["past the end", "twice", "descending", "past the list", "negative"],
)
def test_a_layout_that_would_read_outside_is_refused(
    kernels: AttentionKernels, pointers: list[int], columns: list[int]
) -> None:
    q, k, v, grad = tensors((1, 1, 32, 32, 16), torch.float32)
    bad = torch.tensor([pointers], dtype=torch.int32), torch.tensor(columns, dtype=torch.int32)
    good = csr(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match=r"forward: row_ptr must ascend"):
        kernels.forward(q, k, v, Blocks(*bad, *good, 16, False, None, 1.0))
    out, lse = kernels.forward(q, k, v, Blocks(*good, *bad, 16, False, None, 1.0))
    with pytest.raises(UnsupportedError, match=r"backward: t_row_ptr must ascend"):
        kernels.backward(grad, q, k, v, out, lse, Blocks(*good, *bad, 16, False, None, 1.0))


def test_a_backward_without_its_transposed_layout_is_refused() -> None:
    q, k, v, _ = tensors((1, 1, 32, 32, 16), torch.float32)
    out, _ = OP(q.requires_grad_(), k, v, *csr(torch.eye(2, dtype=torch.bool)[None]), None, None, 16, False, None, 1.0)
    with pytest.raises(UnsupportedError, match="backward needs row_ptr and t_row_ptr"):
        out.sum().backward()
