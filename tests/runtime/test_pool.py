"""The buffer pool: right values, memory that never passes the peak in use, blocks that come back."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from dscompile.runtime.pool import SMALLEST, BufferPool

BIG = SMALLEST // 4  # fp32 elements of one block


def test_small_requests_are_pytorchs() -> None:
    pool = BufferPool()
    x = pool.empty_strided((4, 4), (4, 1), torch.float32)
    assert x.shape == (4, 4)
    assert pool.use().allocated == 0


@pytest.mark.parametrize("stride", [(512, 1), (1, 1024)])
def test_shape_stride_dtype(stride: tuple[int, int]) -> None:
    pool = BufferPool()
    x = pool.empty_strided((1024, 512), stride, torch.float32)
    assert x.stride() == stride
    assert x.dtype is torch.float32
    x.fill_(3)
    assert float(x.sum()) == 3 * 1024 * 512
    assert x.data_ptr() % 64 == 0


def test_empty_tensors() -> None:
    assert BufferPool().empty_strided((0, 1 << 30), (1 << 30, 1), torch.float32).numel() == 0


def test_a_dead_tensors_block_comes_back_but_not_while_a_view_lives() -> None:
    pool = BufferPool()
    x = pool.empty_strided((BIG,), (1,), torch.float32)
    address = x.data_ptr()
    view = x[3:]
    del x
    assert pool.use().idle == 0
    other = pool.empty_strided((BIG,), (1,), torch.float32)
    assert other.data_ptr() != address
    del view
    again = pool.empty_strided((BIG,), (1,), torch.float32)
    assert again.data_ptr() == address
    assert pool.use().reused == 1


def test_owned_memory_never_passes_the_peak_in_use() -> None:
    pool, rng = BufferPool(), random.Random(0)
    alive: list[torch.Tensor] = []
    for _ in range(300):
        if alive and rng.random() < 0.5:
            alive.pop(rng.randrange(len(alive)))
        else:
            size = BIG * rng.randint(1, 9)
            tensor = pool.empty_strided((size,), (1,), torch.float32)
            tensor.fill_(float(len(alive)))
            alive.append(tensor)
        use = pool.use()
        assert use.used + use.idle <= use.peak
    assert pool.use().reused > 0
    alive.clear()
    del tensor
    gc.collect()
    assert pool.use().used == 0
    pool.release_idle()
    assert pool.use().idle == 0


def test_live_tensors_never_share_memory() -> None:
    pool, rng = BufferPool(), random.Random(1)
    alive: dict[int, torch.Tensor] = {}
    for step in range(120):
        if alive and rng.random() < 0.5:
            key = rng.choice(list(alive))
            assert bool((alive.pop(key) == key).all())
        else:
            alive[step] = pool.empty_strided((BIG * rng.randint(1, 3),), (1,), torch.float32).fill_(step)
    for key, tensor in alive.items():
        assert bool((tensor == key).all())


def test_training_with_the_pool_equals_eager() -> None:
    from dscompile.runtime.pool import POOL

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 512))
    x = torch.randn(512, 512)
    before = POOL.use()
    compiled = torch.compile(model, backend="dscompile", options={"buffers": "on", "summary": False})
    for _ in range(3):
        found = torch.autograd.grad(compiled(x).square().mean(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        for have, want in zip(found, expected, strict=True):
            torch.testing.assert_close(have, want)
    assert POOL.use().reused > before.reused
