"""The buffer pool: right values, memory that does not pass the peak in use, bytes that come back."""

from __future__ import annotations

import copy
import gc
import os
import random
import threading

import pytest
import torch

from dscompile.runtime.pool import ROUNDS, SMALLEST, BufferPool

BIG = SMALLEST // 4  # fp32 elements of one block


def test_small_requests_are_pytorchs() -> None:
    pool = BufferPool(256 * SMALLEST)
    x = pool.empty_strided((4, 4), (4, 1), torch.float32)
    assert x.shape == (4, 4)
    assert pool.use().grown == 0


@pytest.mark.parametrize("stride", [(512, 1), (1, 1024)])
def test_shape_stride_dtype(stride: tuple[int, int]) -> None:
    pool = BufferPool(256 * SMALLEST)
    x = pool.empty_strided((1024, 512), stride, torch.float32)
    assert x.stride() == stride
    assert x.dtype is torch.float32
    x.fill_(3)
    assert float(x.sum()) == 3 * 1024 * 512
    assert x.data_ptr() % 64 == 0


def test_empty_tensors() -> None:
    assert BufferPool(256 * SMALLEST).empty_strided((0, 1 << 30), (1 << 30, 1), torch.float32).numel() == 0


def test_a_dead_tensors_bytes_come_back_but_not_while_a_view_lives() -> None:
    pool = BufferPool(64 * SMALLEST)
    x = pool.empty_strided((BIG,), (1,), torch.float32)
    address = x.data_ptr()
    view = x[3:]
    del x
    other = pool.empty_strided((BIG,), (1,), torch.float32)
    assert other.data_ptr() != address
    del view
    again = pool.empty_strided((BIG,), (1,), torch.float32)
    assert again.data_ptr() == address
    assert pool.use().reused == 1


def test_neighbours_merge_and_blocks_split() -> None:
    pool = BufferPool(64 * SMALLEST)
    parts = [pool.empty_strided((BIG,), (1,), torch.float32) for _ in range(4)]
    last = parts.pop()
    first = parts[0].data_ptr()
    for index in (1, 0, 0):
        parts.pop(index)
    del last
    whole = pool.empty_strided((4 * BIG,), (1,), torch.float32)
    assert whole.data_ptr() == first
    assert pool.use().owned == 4 * SMALLEST


def test_a_repeated_step_needs_no_more_than_its_peak() -> None:
    """The shape of training: saved values live into backward, gradients until the end of the round, the rest briefly.

    The peak is counted by hand: 12 layers save 3 and 2 MiB; backward frees them in turn and leaves 4 MiB of gradients.
    """
    pool = BufferPool(256 * SMALLEST)

    def buffer(mib: int) -> torch.Tensor:
        return pool.empty_strided((mib * BIG,), (1,), torch.float32)

    for _ in range(3):
        saved = []
        for _ in range(12):
            brief = buffer(2)
            saved += [buffer(3), buffer(2)]
            del brief
        gradients = []
        while saved:
            saved.pop()
            brief = buffer(1)
            saved.pop()
            gradients.append(buffer(4))
            del brief
        assert pool.use().used == 12 * 4 * SMALLEST
        gradients.clear()
    use = pool.use()
    assert use.used == 0
    assert use.peak == 62 * SMALLEST
    assert use.owned == use.peak
    assert use.grown < use.reused


def test_owned_pages_go_back_when_no_recent_round_needed_them() -> None:
    pool = BufferPool(64 * SMALLEST)
    pool.empty_strided((9 * BIG,), (1,), torch.float32)
    assert pool.use().owned == 9 * SMALLEST
    for _ in range(ROUNDS - 1):
        pool.empty_strided((2 * BIG,), (1,), torch.float32)
    assert pool.use().owned == 9 * SMALLEST
    pool.empty_strided((2 * BIG,), (1,), torch.float32)
    assert pool.use().owned == 2 * SMALLEST
    pool.release_idle()
    assert pool.use().owned == 0


def test_pages_are_really_returned_and_live_ones_kept() -> None:
    pool = BufferPool(64 * SMALLEST)
    low = pool.empty_strided((BIG + 100,), (1,), torch.float32).fill_(1)
    idle = pool.empty_strided((16 * BIG + 100,), (1,), torch.float32).fill_(2)
    high = pool.empty_strided((BIG,), (1,), torch.float32).fill_(3)
    address = idle.data_ptr()
    del idle
    pool.release_idle()
    fresh = pool.empty_strided((16 * BIG + 100,), (1,), torch.float32)
    assert fresh.data_ptr() == address
    inner = fresh[2048:-2048]  # whole pages only: the system hands out zeroed ones
    assert int(inner.count_nonzero()) == 0
    assert bool((low == 1).all())
    assert bool((high == 3).all())


def test_a_full_arena_leaves_requests_to_pytorch() -> None:
    pool = BufferPool(2 * SMALLEST)
    x = pool.empty_strided((BIG,), (1,), torch.float32)
    y = pool.empty_strided((2 * BIG,), (1,), torch.float32).fill_(7)
    assert float(y.sum()) == 7 * 2 * BIG
    assert pool.use().refused == 1
    assert x.nbytes == pool.use().used


def test_an_arena_that_cannot_be_reserved_refuses_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    pool = BufferPool(1 << 60)
    for _ in range(2):
        assert pool.empty_strided((BIG,), (1,), torch.float32).numel() == BIG
    assert pool.use().refused == 2
    assert len(caplog.records) == 1
    assert "ulimit -v" in caplog.text


def test_threads() -> None:
    pool, failures = BufferPool(256 * SMALLEST), []

    def work(mark: int) -> None:
        rng = random.Random(mark)
        for _ in range(60):
            x = pool.empty_strided((BIG * rng.randint(1, 4),), (1,), torch.float32).fill_(mark)
            if not bool((x == mark).all()):
                failures.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.use().used == 0


def test_a_forked_child_has_its_own_memory() -> None:
    from dscompile.runtime.pool import POOL

    x = POOL.empty_strided((BIG,), (1,), torch.float32).fill_(1)
    with POOL._lock:  # as if another thread were asking for memory while this one forks
        child = os.fork()
        if not child:
            y = POOL.empty_strided((BIG,), (1,), torch.float32)
            os._exit(int(y.data_ptr() == x.data_ptr() or float(x[0]) != 1))
    assert os.waitpid(child, 0)[1] == 0


def test_what_users_do_with_results() -> None:
    pool = BufferPool(64 * SMALLEST)
    x = pool.empty_strided((BIG,), (1,), torch.float32).fill_(3)
    assert not x._is_view()
    array = x.numpy()
    twin = copy.deepcopy(x)
    shared = x.clone().share_memory_()
    del x
    gc.collect()
    other = pool.empty_strided((BIG,), (1,), torch.float32).fill_(4)
    assert array.min() == array.max() == 3
    assert float(twin.sum()) == float(shared.sum()) == 3 * BIG
    assert float(other[0]) == 4


def test_live_tensors_never_share_memory() -> None:
    pool, rng = BufferPool(256 * SMALLEST), random.Random(1)
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
