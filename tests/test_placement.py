"""Where parameters go: the cut dimension, the rows of each rank, the markers' kernels and derivatives on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dscompile import ops
from dscompile.config import Config
from dscompile.errors import ConfigError
from dscompile.placement import ShardSpec, choose_layout


@pytest.mark.parametrize(
    ("shape", "world", "stage", "dim"),
    [
        ((768, 3072), 1024, 3, 1),  # 0 would leave 256 ranks empty
        ((768, 2304), 1024, 3, 0),  # torch.chunk leaves 256 ranks empty along either
        ((50257, 768), 64, 3, 1),  # 768 divides by 64, 50257 does not
        ((768, 768), 64, 3, 0),
        ((1, 6, 3, 3), 3, 3, 1),
        ((3,), 1024, 3, 0),
        ((50257, 768), 64, 2, 0),  # no rank empty either way: whole rows
        ((768, 3072), 1024, 1, 1),
        ((768, 768), 64, 0, -1),
        ((), 2, 3, -1),
        ((0, 4), 2, 3, -1),
    ],
)
def test_cut_dimension(shape: tuple[int, ...], world: int, stage: int, dim: int) -> None:
    assert choose_layout(shape, world, stage).dim == dim


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_those_of_torch_chunk(size: int, world: int, dim: int) -> None:
    full = torch.randn((3, size) if dim else (size, 3))
    spec = ShardSpec("w", tuple(full.shape), dim, world, "dp", 3)
    chunks = list(full.chunk(world, dim))
    for rank in range(world):
        want = chunks[rank] if rank < len(chunks) else full.narrow(dim, 0, 0)
        assert torch.equal(spec.shard_of(full, rank), want)
        assert spec.local_shape(rank) == tuple(want.shape)


def test_derivatives_on_one_rank() -> None:
    """One rank needs no process group. Accumulated gradients are not part of the function, so no finite differences."""
    shard = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ops.unshard(s, 0, 4, 1, "none"), (shard,))
    assert torch.autograd.gradcheck(lambda g: ops.reduce_grad(g, 0, 4, 1, "none"), (shard,))
    assert torch.autograd.gradgradcheck(lambda s: ops.unshard(s, 0, 4, 1, "none").square(), (shard,))


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_operators_are_registered_rightly(dim: int) -> None:
    size = 0 if dim < 0 else 4
    for shard in (torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)):
        for extra in ((None, None), (None, torch.randn(4, 4)), (torch.zeros(4, 4, requires_grad=True), None)):
            torch.library.opcheck(torch.ops.dscompile.unshard.default, (shard, *extra, dim, size, 1, "none"))
    torch.library.opcheck(torch.ops.dscompile.reduce_grad.default, (shard, dim, size, 1, "none"))


def test_accumulated_gradient_joins_once() -> None:
    shard, accumulated = torch.zeros(2, requires_grad=True), torch.tensor([10.0, 20.0])

    def read() -> Tensor:
        return ops.unshard(shard, 0, 2, 1, "none", accumulated=accumulated)

    (read() + 2 * read()).sum().backward()
    assert shard.grad is not None
    assert shard.grad.tolist() == [13.0, 23.0]


def test_leaf_takes_the_gradient() -> None:
    shard, leaf = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    (3 * ops.unshard(shard, 0, 2, 1, "none", leaf=leaf)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [3.0, 3.0]
    assert shard.grad is None


def test_zero_section_of_the_configuration() -> None:
    assert Config.load({"zero": {"stage": 2, "reduce_bucket_size": 5e8}}).zero.reduce_bucket_size == 500_000_000
    assert Config.load({"zero": {"stage": 2}}).digest() != Config.load({}).digest()
    for bad, message in (
        ({"zero": {"reduce_bucket_sise": 1}}, r"'zero\.reduce_bucket_sise'. Did you mean 'zero\.reduce_bucket_size'"),
        ({"zero": {"reduce_bucket_size": 1.5}}, "valid integer"),
        ({"zero": {"stage": 7}}, "0, 1, 2 or 3"),
        ({"zero": 3}, "zero"),
    ):
        with pytest.raises(ConfigError, match=message):
            Config.load(bad)
