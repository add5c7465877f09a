"""The helper that runs ranks: results, tensors, exceptions with their traceback, deaths and hangs."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailureError, rank_outcomes, run_ranks


def total(rank: int, world: int, scale: float) -> torch.Tensor:
    x = torch.full((3,), float(rank)) * scale
    dist.all_reduce(x)
    assert torch.get_num_threads() == 1
    return x


def rank_one_raises(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("planted")
    dist.barrier()


def rank_one_dies(rank: int, world: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # another thread may be the first to notice


def rank_one_sleeps(rank: int, world: int) -> int:
    if rank == 1:
        time.sleep(60)
    return rank


def test_results_in_rank_order() -> None:
    for value in run_ranks(total, 3, 2.0):
        torch.testing.assert_close(value, torch.full((3,), 6.0))


def test_store_on_rank_zero() -> None:
    assert len(run_ranks(total, 2, 1.0, store="rank0")) == 2


def test_exception_has_the_ranks_traceback() -> None:
    with pytest.raises(RankFailureError, match=r"rank_one_raises(.|\n)*KeyError: 'planted'") as caught:
        run_ranks(rank_one_raises, 2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_death_and_hang() -> None:
    dead = rank_outcomes(rank_one_dies, 2)
    assert [o.exitcode for o in dead] == [0, -9]
    began = time.monotonic()
    zero, one = rank_outcomes(rank_one_sleeps, 2, timeout=8)  # starting a rank takes seconds
    assert (zero.value, zero.ok) == (0, True)
    assert one.timed_out
    assert "rank_one_sleeps" in one.stderr
    assert time.monotonic() - began < 20
