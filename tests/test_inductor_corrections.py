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


def test_the_users_own_inductor_is_left_alone() -> None:
    from torch._inductor.codegen.common import device_codegens, init_backend_registration

    init_backend_registration()
    before = device_codegens["cpu"]
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin() + 1, backend="dscompile", options={"cache": False})(torch.ones(3))
    assert device_codegens["cpu"] is before
