"""Every rule about communication, executed: all ranks in one process, against plain PyTorch on the whole tensors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dscompile import bucket_ops
from dscompile.bucket_ops import new_empty
from dscompile.comm import ROLES, UNSHARD
from dscompile.comm_terms import COMM_RULES
from dscompile.equivalence import snapshot
from dscompile.runtime.comm import Comm
from dscompile.shard_layout import REPLICATED, ShardLayout, encode
from tests.build import Hand

WORLDS = [2, 3, 5]


def cases(seed: int, world: int, count: int = 6) -> list[tuple[tuple[int, ...], int]]:
    """Random shapes with a dimension to cut; some smaller than the world, so that ranks stay empty."""
    draw = random.Random(seed * 10 + world)
    found = []
    for _ in range(count):
        shape = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 3)))
        found.append((shape, draw.randrange(len(shape))))
    return found


def pieces(full: Tensor, dim: int, world: int) -> list[Tensor]:
    """What ``torch.chunk`` gives each rank; empty tensors for ranks past the end."""
    parts = list(torch.chunk(full, world, dim))
    shape = list(full.shape)
    shape[dim] = 0
    return parts + [full.new_empty(shape) for _ in range(world - len(parts))]


def mean_in_order(grads: list[Tensor]) -> Tensor:
    total = grads[0] + grads[1]
    for grad in grads[2:]:
        total = total + grad
    return total * (1.0 / len(grads))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_packed_gathered_unpacked_bucket_is_the_parameters(world: int, seed: int) -> None:
    shapes = cases(seed, world)
    layouts = encode([ShardLayout(shape, dim, world) for shape, dim in shapes])
    fulls = [torch.randn(shape) for shape, _ in shapes]
    flats = []
    for rank in range(world):
        shards = [pieces(full, dim, world)[rank] for full, (_, dim) in zip(fulls, shapes, strict=True)]
        flats.append(bucket_ops.pack_shards(shards, layouts, world))
    for found, full in zip(bucket_ops.unpack_params(torch.cat(flats), layouts, world), fulls, strict=True):
        assert torch.equal(found, full)


def exchanged(flats: list[Tensor], rank: int) -> Tensor:
    """What ``all_to_all_single`` delivers to a rank."""
    return torch.cat([flat.view(len(flats), -1)[rank] for flat in flats])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_reduced_bucket_is_the_mean_in_the_order_of_ranks(world: int, seed: int) -> None:
    shapes = cases(seed, world)
    layouts = encode([ShardLayout(shape, dim, world) for shape, dim in shapes])
    grads = [[torch.randn(shape) for shape, _ in shapes] for _ in range(world)]
    flats = [bucket_ops.pack_grads(mine, layouts, world) for mine in grads]
    for rank in range(world):
        reduced = bucket_ops.sum_ranks(exchanged(flats, rank), world)
        for index, (_, dim) in enumerate(shapes):
            expected = pieces(mean_in_order([mine[index] for mine in grads]), dim, world)[rank]
            found = bucket_ops.unpack_shards(reduced, layouts, world, rank)[index]
            assert torch.equal(found, expected)
            assert found.is_contiguous()


@pytest.mark.parametrize("world", WORLDS)
def test_replicated_gradients_are_reduced_in_pieces_and_gathered_whole(world: int) -> None:
    shapes = [(), (3,), (4, 5), (2, 1, 7)]
    layouts = encode([ShardLayout(shape, REPLICATED, world) for shape in shapes])
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(world)]
    flats = [bucket_ops.pack_grads(mine, layouts, world) for mine in grads]
    whole = torch.cat([bucket_ops.sum_ranks(exchanged(flats, rank), world) for rank in range(world)])
    for index, found in enumerate(bucket_ops.unpack_params(whole, layouts, world)):
        assert torch.equal(found, mean_in_order([mine[index] for mine in grads]))


@pytest.mark.parametrize(("shape", "dim"), [((6, 4), 0), ((5, 4), 0), ((4, 6), 1), ((1,), 0)])
def test_a_program_copies_nothing_it_need_not_and_means_the_same(shape: tuple[int, ...], dim: int) -> None:
    world = 2
    layout = ShardLayout(shape, dim, world)
    layouts, full = encode([layout]), torch.randn(shape)
    comm = Comm(lambda place: None, new_empty)
    shards = [part.contiguous() for part in pieces(full, dim, world)]
    flats = [comm.pack_shards([shard], layouts, world) for shard in shards]
    assert all(torch.equal(f, bucket_ops.pack_shards([s], layouts, world)) for f, s in zip(flats, shards, strict=True))
    (found,) = comm.unpack_params(torch.cat(flats), layouts, world)
    assert torch.equal(found, full)
    consecutive = dim == 0 and shape[0] % world == 0
    assert (flats[0].data_ptr() == shards[0].data_ptr()) is consecutive
    grad = torch.randn(shape)
    flat = comm.pack_grads([grad], layouts, world)
    assert torch.equal(flat, bucket_ops.pack_grads([grad], layouts, world))
    assert (flat.data_ptr() == grad.data_ptr()) is consecutive
    for rank in range(world):
        part = flat.view(world, -1)[rank].clone()
        expected = bucket_ops.unpack_shards(part, layouts, world, rank)
        assert torch.equal(comm.unpack_shards(part, layouts, world, rank)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seed", range(2))
def test_a_cast_commutes_with_a_gather(world: int, seed: int, dtype: torch.dtype) -> None:
    shapes = cases(seed, world)
    layouts = encode([ShardLayout(shape, dim, world) for shape, dim in shapes])
    fulls = [torch.randn(shape) for shape, _ in shapes]
    shards = [[pieces(f, dim, world)[r] for f, (_, dim) in zip(fulls, shapes, strict=True)] for r in range(world)]
    flats = [bucket_ops.pack_shards(mine, layouts, world, dtype) for mine in shards]
    cast_first = [bucket_ops.pack_shards([s.to(dtype) for s in mine], layouts, world) for mine in shards]
    assert all(torch.equal(one, other) for one, other in zip(flats, cast_first, strict=True))
    for found, full in zip(bucket_ops.unpack_params(torch.cat(flats), layouts, world), fulls, strict=True):
        assert found.dtype is dtype
        assert torch.equal(found, full.to(dtype))


def test_a_cast_before_in_or_after_a_gather_is_one_term() -> None:
    h, low, copy = Hand(), torch.bfloat16, torch.ops.aten._to_copy.default
    x = h.input("x", 2, 6)
    tail = (None, None, 0, 4, 2, "dp")
    inside = h.call(UNSHARD, x, *tail, low)
    before = h.call(UNSHARD, h.call(copy, x, dtype=low), *tail)
    after = h.call(copy, h.call(UNSHARD, x, *tail), dtype=low)
    half = h.call(UNSHARD, x, *tail, torch.float16)
    terms = snapshot(h.done([inside, before, after, half])).outputs
    assert terms[0] is terms[1] is terms[2]
    assert terms[3] is not terms[0]
    replicated = (None, None, REPLICATED, 0, 2, "dp")
    h = Hand()
    x = h.input("x", 2, 6)
    outputs = [h.call(UNSHARD, x, *replicated, low), h.call(copy, x, dtype=low), h.call(UNSHARD, x, *replicated)]
    terms = snapshot(h.done(outputs)).outputs
    assert terms[0] is terms[1]
    assert terms[2] is not terms[1]


def mean_rounded_once(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    total = grads[0].to(dtype).float()
    for grad in grads[1:]:
        total = total + grad.to(dtype).float()
    return (total * (1.0 / len(grads))).to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", WORLDS)
def test_a_typed_reduction_sums_in_fp32_and_rounds_once(world: int, dtype: torch.dtype) -> None:
    shapes = [*cases(0, world), ((3, 2), REPLICATED)]
    for given in (shapes[:-1], shapes[-1:]):
        layouts = encode([ShardLayout(shape, dim, world) for shape, dim in given])
        grads = [[torch.randn(shape) for shape, _ in given] for _ in range(world)]
        flats = [bucket_ops.pack_grads(mine, layouts, world, dtype) for mine in grads]
        parts = [bucket_ops.sum_ranks(exchanged(flats, rank), world) for rank in range(world)]
        assert {part.dtype for part in parts} == {dtype}
        means = [mean_rounded_once([mine[i] for mine in grads], dtype) for i in range(len(given))]
        if given[0][1] == REPLICATED:
            founds = bucket_ops.unpack_params(torch.cat(parts), layouts, world, torch.float32)
            assert all(torch.equal(found, mean) for found, mean in zip(founds, means, strict=True))
            continue
        for rank in range(world):
            founds = bucket_ops.unpack_shards(parts[rank], layouts, world, rank, torch.float32)
            for found, mean, (_, dim) in zip(founds, means, given, strict=True):
                assert found.dtype is torch.float32
                assert torch.equal(found, pieces(mean, dim, world)[rank])


@pytest.mark.parametrize(("shape", "dim"), [((6, 4), 0), ((5, 4), 0), ((4, 6), 1)])
def test_a_program_with_casts_means_the_same(shape: tuple[int, ...], dim: int) -> None:
    world, low, high = 2, torch.bfloat16, torch.float32
    layouts, full = encode([ShardLayout(shape, dim, world)]), torch.randn(shape)
    comm = Comm(lambda place: None, new_empty)
    for shard in pieces(full, dim, world):
        expected = bucket_ops.pack_shards([shard], layouts, world, low)
        assert torch.equal(comm.pack_shards([shard], layouts, world, low), expected)
    flat = comm.pack_grads([full], layouts, world, low)
    assert torch.equal(flat, bucket_ops.pack_grads([full], layouts, world, low))
    for rank in range(world):
        part = flat.view(world, -1)[rank].clone()
        (found,) = comm.unpack_shards(part, layouts, world, rank, high)
        assert torch.equal(found, pieces(full.to(low).float(), dim, world)[rank])
        assert found.dtype is high


def test_every_communication_operator_has_a_rule_or_a_reason() -> None:
    without = {str(t) for t in ROLES if t not in COMM_RULES}
    assert without == {"_c10d_functional.all_reduce.default"}  # no pass emits it; unknown terms equal nothing
    assert UNSHARD in COMM_RULES
