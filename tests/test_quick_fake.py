"""The short way to the fake results of our operators gives what PyTorch's general way gives, and leaves it the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dscompile import ops
from dscompile.quick_fake import quick_empty
from dscompile.shard_layout import ShardLayout, encode
from dscompile.torch_compat import FakeTensor, FakeTensorMode, storage_key

WORLD = 2
LAYOUTS = encode([ShardLayout((5, 3), 0, WORLD), ShardLayout((4, 7), 1, WORLD), ShardLayout((6,), 0, WORLD)])
PADDED = 9 + 16 + 3
BUCKETS: dict[str, Callable[[Tensor, tuple[Any, ...]], list[Tensor]]] = {
    "unpack_params": lambda x, rest: torch.ops.dscompile.unpack_params.default(x, LAYOUTS, WORLD, *rest),
    "unpack_shards": lambda x, rest: torch.ops.dscompile.unpack_shards.default(x, LAYOUTS, WORLD, 1, *rest),
}
SHAPES = {"unpack_params": [(5, 3), (4, 7), (6,)], "unpack_shards": [(2, 3), (4, 3), (3,)]}


@pytest.mark.parametrize("given", [(), (torch.bfloat16,), (None,)], ids=str)
@pytest.mark.parametrize("name", BUCKETS)
def test_the_items_of_a_bucket(name: str, given: tuple[Any, ...]) -> None:
    """Shapes worked out by hand: of five rows the second rank holds two, of seven columns three."""
    with FakeTensorMode() as mode:
        flat = torch.empty(WORLD * PADDED, dtype=torch.float16)
        found = BUCKETS[name](flat, given)
    assert [tuple(t.shape) for t in found] == SHAPES[name]
    assert {t.dtype for t in found} == {given[0] if given and given[0] else torch.float16}
    assert all(type(t) is FakeTensor and t.fake_mode is mode and t.is_contiguous() for t in found)
    assert all(t.device == flat.device and not t.requires_grad for t in found)
    assert len({storage_key(t) for t in (*found, flat)}) == 4, "each in memory of its own"


@pytest.mark.parametrize("name", BUCKETS)
def test_the_items_are_those_of_the_kernel(name: str) -> None:
    flat = torch.arange(float((WORLD if name == "unpack_params" else 1) * PADDED))
    real = BUCKETS[name](flat, (torch.bfloat16,))
    with FakeTensorMode() as mode:
        fake = BUCKETS[name](mode.from_tensor(flat), (torch.bfloat16,))
    assert [(t.shape, t.stride(), t.dtype, t.device) for t in fake] == [
        (t.shape, t.stride(), t.dtype, t.device) for t in real
    ]


def test_the_general_way_is_left_what_it_must_do() -> None:
    """None for another mode's tensor, a tensor that is not fake and a size that is no number."""
    with FakeTensorMode() as one:
        value = torch.empty(3)
    with FakeTensorMode() as other:
        assert quick_empty(other, value, (2,), None) is None
    assert quick_empty(one, torch.empty(3), (2,), None) is None
    assert quick_empty(one, value, (torch.tensor(2),), None) is None
    found = quick_empty(one, value, (2, 4), torch.int8)
    assert found is not None
    assert (found.shape, found.dtype) == ((2, 4), torch.int8)


def test_symbolic_sizes_of_a_marker() -> None:
    """The general way keeps the symbol; the short way would have to guess a number."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    shard = mode.from_tensor(torch.empty(2, 3))
    with mode:
        size = env.create_unbacked_symint()
        found = ops.unshard(shard, 0, size, WORLD, "group")
    assert not isinstance(found.shape[0], int)
    assert found.shape[1] == 3
