"""Shares of ranks, positions that continue, and what is refused. The oracle of shares is PyTorch's own sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dscompile.engine.data import Loader, RepeatingLoader, create_loader
from dscompile.errors import ConfigError, UnsupportedError

SAMPLES = 101


class Numbers(torch.utils.data.Dataset[int]):
    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return index


def loader(rank: int = 0, world: int = 2, size: int = 4, samples: int = SAMPLES, **more: Any) -> Loader:
    return create_loader(Numbers(samples), micro_batch_size=size, data_rank=rank, data_world=world, **more)


def indices(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def flat(batches: Any) -> list[int]:
    return [index for batch in indices(batches) for index in batch]


def test_two_ranks_cover_everything_with_one_padded_sample() -> None:
    first, second = flat(loader(0)), flat(loader(1))
    assert len(first) == len(second) == 51
    assert set(first) | set(second) == set(range(SAMPLES))
    assert len(set(first) & set(second)) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("shuffle", [True, False])
def test_shares_are_those_of_torchs_sampler(world: int, epoch: int, shuffle: bool) -> None:
    for rank in range(world):
        sampler = DistributedSampler(Numbers(), num_replicas=world, rank=rank, shuffle=shuffle, seed=3)
        sampler.set_epoch(epoch)
        ours = loader(rank, world, shuffle=shuffle, seed=3)
        ours.set_epoch(epoch)
        assert flat(ours) == list(sampler)


def test_more_ranks_than_samples() -> None:
    shares = [flat(loader(rank, 5, samples=2, shuffle=False)) for rank in range(5)]
    assert shares == [[0], [1], [0], [1], [0]]


def test_peers_of_a_model_parallel_group_get_the_same_batches() -> None:
    assert indices(loader(1)) == indices(loader(1, num_workers=1))


def test_lengths_and_the_last_batch() -> None:
    assert [len(batch) for batch in indices(loader(size=8))] == [8, 8, 8, 8, 8, 8, 3]
    assert len(loader(size=8)) == 7
    assert [len(batch) for batch in indices(loader(size=8, drop_last=True))] == [8] * 6
    assert len(loader(size=8, drop_last=True)) == 6


def test_epochs_differ_and_can_be_chosen() -> None:
    ours = loader()
    first, second = flat(ours), flat(ours)
    assert first != second
    ours.set_epoch(0)
    assert flat(ours) == first
    other = loader()
    other.set_epoch(1)
    assert flat(other) == second


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 5, 13])
def test_a_saved_position_continues_exactly(taken: int, workers: int) -> None:
    whole = loader(1, num_workers=workers)
    whole.set_epoch(2)
    batches = indices(whole) + indices(whole)
    ours = loader(1, num_workers=workers)
    ours.set_epoch(2)
    stream = iter(ours)
    for _ in range(taken):
        next(stream)
    state = ours.state_dict()
    other = loader(1, num_workers=workers)
    other.load_state_dict(state)
    assert other.state_dict() == state
    other.set_epoch(2)  # as a user's loop over epochs does
    assert indices(other) + indices(other) == batches[taken:]


def test_leaving_early_starts_the_epoch_again() -> None:
    ours = loader()
    first = next(iter(ours)).tolist()
    assert next(iter(ours)).tolist() == first


def test_a_position_continues_on_another_number_of_ranks() -> None:
    streams = [loader(rank, 2, size=3, seed=1) for rank in range(2)]
    iterators = [iter(one) for one in streams]
    before = [index for _ in range(5) for it in iterators for index in next(it).tolist()]
    state = streams[0].state_dict()
    assert state == streams[1].state_dict()
    after: list[int] = []
    for rank in range(4):
        ours = loader(rank, 4, size=2, seed=1)
        ours.load_state_dict(state)
        after += flat(ours)
    assert sorted(set(before) | set(after)) == list(range(SAMPLES))
    padding = before[0]  # the first of the order
    assert set(before) & set(after) == {padding}
    assert len(after) == 72  # 71 left, padded to a multiple of 4


def test_repeating_goes_round_and_round() -> None:
    ours = RepeatingLoader(loader(size=20))
    found = [next(ours).tolist() for _ in range(7)]
    once = loader(size=20)
    assert found == (indices(once) + indices(once) + indices(once))[:7]
    assert len(ours) == 3


def test_a_repeating_position_continues() -> None:
    whole = RepeatingLoader(loader(size=20))
    expected = [next(whole).tolist() for _ in range(9)]
    ours = RepeatingLoader(loader(size=20))
    for _ in range(3):  # the last batch of the epoch is handed out, its end not yet noticed
        next(ours)
    other = RepeatingLoader(loader(size=20))
    next(other)
    other.load_state_dict(ours.state_dict())
    assert [next(other).tolist() for _ in range(6)] == expected[3:]


def test_repeating_a_plain_loader_moves_its_sampler() -> None:
    sampler = DistributedSampler(Numbers(6), num_replicas=1, rank=0)
    ours = RepeatingLoader(DataLoader(Numbers(6), batch_size=6, sampler=sampler))
    assert next(ours).tolist() != next(ours).tolist()


def test_repeating_an_empty_loader_ends() -> None:
    with pytest.raises(ConfigError, match="has no batches"):
        next(RepeatingLoader(loader(size=200, drop_last=True)))


def test_the_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    indices(loader())
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_and_tuples() -> None:
    data = TensorDataset(torch.arange(6), torch.arange(6) * 2)
    ours = create_loader(data, micro_batch_size=3, data_rank=0, data_world=1, shuffle=False)
    assert [[part.tolist() for part in batch] for batch in ours] == [[[0, 1, 2], [0, 2, 4]], [[3, 4, 5], [6, 8, 10]]]
    assert list(loader(world=1, size=101, collate_fn=sum)) == [5050]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "arguments", "error", "said"),
    [
        (Endless(), {}, UnsupportedError, "Endless is an IterableDataset"),
        (iter([1]), {}, UnsupportedError, "no __getitem__ and __len__"),
        ([], {}, ConfigError, "list is empty"),
        ([1], {"micro_batch_size": 0}, ConfigError, "micro_batch_size must be a whole number of at least 1, got 0"),
        ([1], {"micro_batch_size": 2.0}, ConfigError, "got 2.0"),
        ([1], {"data_rank": 2}, ConfigError, "data_rank 2 does not exist among 2 rank(s)"),
        ([1], {"num_workers": -1}, ConfigError, "num_workers"),
    ],
)
def test_what_is_refused(dataset: Any, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        create_loader(dataset, **{"micro_batch_size": 1, "data_rank": 0, "data_world": 2, **arguments})
    assert said in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("samples", 99), ("seed", 5), ("shuffle", False)])
def test_a_position_of_other_data_is_refused(key: str, value: Any) -> None:
    ours = loader()
    with pytest.raises(ConfigError, match=f"saved with {key} {value}"):
        ours.load_state_dict({**ours.state_dict(), key: value})
