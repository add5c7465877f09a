"""Generated C++ loops fetch large buffers ahead, and compute the same bits as Inductor's own."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dscompile import last_report
from dscompile.codegen.lower import lower_region
from dscompile.codegen.regions import cut
from dscompile.config import Config
from tests.build import trace

FETCH = re.compile(r"__builtin_prefetch\((\w+) \+ (.*) \+ (\d+), ([01]), 2\);")


def fetches(function: Callable[..., Tensor], *inputs: Tensor) -> list[tuple[str, ...]]:
    """Pointer, index, distance in elements and read (0) or write (1) of each fetch in a function's C++."""
    with torch.no_grad():
        graph = trace(function, *inputs)
    (region,) = (r for r in cut(graph, Config.load({"regions": "whole"})) if not r.inline)
    code = lower_region(region, Config.load({}))
    assert code.kind == "inductor", code.reason
    return FETCH.findall(code.source)


def test_reads_and_writes_of_large_buffers_are_fetched_once_each() -> None:
    found = fetches(lambda x, y: (x * y).exp() + x, torch.randn(512, 512), torch.randn(512, 512))
    assert sorted((pointer, ahead, kind) for pointer, _, ahead, kind in found) == [
        ("in_ptr0", "512", "0"),
        ("in_ptr1", "512", "0"),
        ("out_ptr0", "512", "1"),
    ]


def test_the_distance_is_in_bytes() -> None:
    found = fetches(lambda x: x.exp(), torch.randn(1024, 512, dtype=torch.bfloat16))
    assert {ahead for _, _, ahead, _ in found} == {"1024"}


def test_small_buffers_and_vectors_that_every_row_reads_are_not_fetched() -> None:
    assert fetches(lambda x: x.exp(), torch.randn(64, 64)) == []
    found = fetches(lambda x, bias: (x + bias).exp(), torch.randn(512, 512), torch.randn(512))
    assert {pointer for pointer, *_ in found} == {"in_ptr0", "out_ptr0"}


def test_reads_across_the_order_of_memory_are_not_fetched() -> None:
    found = fetches(lambda x: x.sum(0), torch.randn(520, 520))
    assert found == []


CASES: dict[str, Callable[..., Tensor]] = {
    "ragged": lambda x, y: torch.sigmoid(x[:, :517]) * y[:, 3:520],
    "in place of an input": lambda x, y: (x + y).exp().log1p().sin(),
    "a softmax": lambda x, y: (x + y).softmax(-1),
    "transposed": lambda x, y: (x * 2).t() + y.sin(),
    "padded, under a mask": lambda x, y: torch.nn.functional.pad(x.cos(), (3, 5)) * 2,
    "gathered": lambda x, y: x[(y[:, 0] > 0).long()] * y,
    "bool and int64": lambda x, y: ((x > y).long() * 3).sum(-1) + (x > 0).any(-1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_inductor(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(544, 544, generator=generator).to(dtype) for _ in range(2))
    torch._dynamo.reset()
    with torch.no_grad():
        ours = torch.compile(CASES[name], backend="dscompile")(x, y)
        torch._dynamo.reset()
        theirs = torch.compile(CASES[name])(x, y)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert last_report()[-1].fallbacks == []


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_strided_convolution_before_an_encoder_compiles(norm_first: bool) -> None:
    """Its backward sums rows in a transposed tile, which Inductor wants to be one of our vector loops."""
    torch.manual_seed(0)
    front = torch.nn.Conv1d(8, 32, 3, stride=2, padding=1)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=norm_first)
    parameters, x = [*front.parameters(), *layer.parameters()], torch.randn(4, 8, 64)
    probe = torch.randn(4, 32, 32)  # a mean of squares of what is normalised has no gradient

    def encode(x: Tensor) -> Tensor:
        return layer(front(x).transpose(1, 2))

    def gradients(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = (call(x).float() * probe).mean()
        return torch.autograd.grad(loss, parameters)

    torch._dynamo.reset()
    found, theirs = gradients(torch.compile(encode, backend="dscompile")), gradients(encode)
    front.double(), layer.double()
    exact = torch.autograd.grad((encode(x.double()) * probe).mean(), parameters)
    for have, eager, want in zip(found, theirs, exact, strict=True):
        assert (have - want).norm() <= 2 * (eager - want).norm() + 1e-6
    assert all(report.fallbacks == [] for report in last_report()[-2:])
