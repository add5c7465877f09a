"""Where Inductor itself is wrong and dscompile corrects it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_two_threads")
def test_transposed_scatter_on_two_threads_adds_to_the_right_rows() -> None:
    """pytorch/pytorch#191837, seen in Falcon's attention; ``backend="inductor"`` of torch 2.13 fails this test."""

    def select(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return x[:, :, index].squeeze(2).transpose(1, 2) * weight

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 6, 8, generator=generator, requires_grad=True)
    weight = torch.randn(2, 8, 12, generator=generator)
    compiled = torch.compile(select, backend="dscompile", options={"cache": False})
    compiled(x, torch.tensor([4]), weight).sum().backward()
    expected = torch.zeros(2, 12, 6, 8)
    expected[:, :, 4] = weight.transpose(1, 2)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.usefixtures("_two_threads")
def test_a_reader_of_a_scatter_stays_behind_it() -> None:
    """Found by the random programs (seed 1368); ``backend="inductor"`` of torch 2.13 reads the zeros under the scatter.

    The reader shares a loop with a producer of the scattered values, and is fused with it in front of the scatter.
    """

    def scatter_then_read(x: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        top = start.view(2, 2, 2, 3).transpose(1, 2).reshape(4, 6).tanh()
        product = top @ top.t() @ top
        sums = torch.zeros_like(product).scatter_add(1, product.argsort(1), product)
        read = x * 3 + sums
        return top, sums, read, torch.cat([read, top, read * top], 1)

    generator = torch.Generator().manual_seed(0)
    x, start = (torch.randn(4, 6, generator=generator) for _ in range(2))
    compiled = torch.compile(scatter_then_read, backend="dscompile", options={"cache": False})
    for found, expected in zip(compiled(x, start), scatter_then_read(x, start), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.usefixtures("_two_threads")
def test_a_product_does_not_read_what_a_masked_write_puts_in_later(accumulate: bool, rows: bool) -> None:
    """Found by the random programs (1299 and 1389); in ``backend="inductor"`` of torch 2.13 ``transposed`` is wrong."""

    def step(x: Tensor, mask: Tensor, weight: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        y = x + (x @ weight) @ weight.t()
        early = y @ weight
        transposed = y.t() @ other
        masked = y.index_put((mask,), torch.full((), 3.0), accumulate=accumulate)
        return early, transposed, masked

    generator = torch.Generator().manual_seed(0)
    x, weight, other = (torch.randn(*s, generator=generator) for s in ((4, 6), (6, 8), (4, 8)))
    mask = torch.tensor([True, False, True, False]) if rows else x > 0
    compiled = torch.compile(step, backend="dscompile", options={"cache": False})
    expected = step(x, mask, weight, other)
    for found, wanted in zip(compiled(x, mask, weight, other), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_users_own_inductor_is_left_alone() -> None:
    from torch._inductor.codegen.common import device_codegens, init_backend_registration

    init_backend_registration()
    before = device_codegens["cpu"]
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin() + 1, backend="dscompile", options={"cache": False})(torch.ones(3))
    assert device_codegens["cpu"] is before
