"""Repeated blocks: found from colours alone, cut where they repeat, never where a tuple would be torn apart."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dscompile.repeats import MIN_PERIOD, segments

INF = float("inf")


def free(position: int) -> float:
    return 0.0


def blocks(colours: Sequence[int], crossing: Callable[[int], float] = free) -> list[tuple[int, ...]]:
    """The pieces as colours."""
    pieces = segments(colours, crossing)
    assert [p[0] for p in pieces] == [0, *(p[1] for p in pieces[:-1])] if pieces else not colours
    assert not pieces or pieces[-1][1] == len(colours)
    assert all(start < stop for start, stop in pieces)
    return [tuple(colours[start:stop]) for start, stop in pieces]


LAYER = list(range(100, 112))
OTHER = list(range(200, 215))
PREFIX, SUFFIX = list(range(10)), list(range(20, 33))


def test_nothing_to_cut() -> None:
    assert segments([], free) == []
    assert segments([1], free) == [(0, 1)]


def test_no_repeats_is_one_piece() -> None:
    assert segments(list(range(50)), free) == [(0, 50)]


def test_blocks_shorter_than_the_minimum_are_left_together() -> None:
    short = list(range(MIN_PERIOD - 1)) * 2
    assert segments(short, free) == [(0, len(short))]


@pytest.mark.parametrize("count", [2, 3, 6, 24])
def test_a_stack_of_layers_with_something_before_and_after(count: int) -> None:
    found = Counter(blocks(PREFIX + LAYER * count + SUFFIX))
    (repeated, times), *rest = found.most_common()
    assert sorted(repeated) == LAYER  # a rotation of the layer
    assert times >= count - 1  # a rotation may lose one
    assert all(n == 1 for _, n in rest)


@pytest.mark.parametrize("count", [2, 6, 24])
def test_the_number_of_different_blocks_does_not_grow(count: int) -> None:
    assert len(set(blocks(PREFIX + LAYER * count + SUFFIX))) == len(set(blocks(PREFIX + LAYER * 2 + SUFFIX)))


def test_an_encoder_and_a_decoder_are_two_stretches() -> None:
    found = Counter(blocks(PREFIX + LAYER * 6 + [50, 51] + OTHER * 4 + SUFFIX))
    repeated = {tuple(sorted(b)): n for b, n in found.items() if n > 1}
    assert repeated.keys() == {tuple(LAYER), tuple(OTHER)}
    assert repeated[tuple(LAYER)] >= 5
    assert repeated[tuple(OTHER)] >= 3


def test_the_boundary_is_where_the_fewest_bytes_cross() -> None:
    """Every layer has one cheap place, at its fourth node."""
    colours = PREFIX + LAYER * 5 + SUFFIX

    def crossing(position: int) -> float:
        return 1.0 if (position - len(PREFIX)) % len(LAYER) == 4 else 1000.0

    repeated, times = Counter(blocks(colours, crossing)).most_common()[0]
    assert repeated == tuple(LAYER[4:] + LAYER[:4])
    assert times == 4


def test_equal_costs_give_the_most_blocks() -> None:
    repeated, times = Counter(blocks(LAYER * 6)).most_common()[0]
    assert repeated == tuple(LAYER)
    assert times == 6


def test_a_forbidden_boundary_is_not_cut() -> None:
    """All but one place of the layer is forbidden."""
    colours = PREFIX + LAYER * 5 + SUFFIX
    allowed = 7

    def crossing(position: int) -> float:
        return 0.0 if (position - len(PREFIX)) % len(LAYER) == allowed else INF

    found = segments(colours, crossing)
    assert len(found) > 3
    assert all(crossing(stop) == 0.0 for _, stop in found[:-1])


def test_no_allowed_boundary_means_one_piece() -> None:
    colours = PREFIX + LAYER * 5 + SUFFIX
    assert segments(colours, lambda position: INF) == [(0, len(colours))]


def test_a_layer_that_repeats_a_part_inside_is_cut_at_the_layer() -> None:
    """The longest saving wins: not the ten equal pairs inside a layer of twenty-three."""
    part = list(range(300, 310))
    layer = [*part, 1, *part, 2, 3]
    repeated, _ = Counter(blocks(layer * 6)).most_common()[0]
    assert sorted(repeated) == sorted(layer)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_repeats_is_cut_and_nothing_is_lost(data: st.DataObject) -> None:
    """A planted stack among noise: pieces tile the range, forbidden places stay whole, and the stack repeats."""
    seed = data.draw(st.integers(0, 2**31))
    rng = random.Random(seed)
    period, count = data.draw(st.integers(MIN_PERIOD, 30)), data.draw(st.integers(2, 12))
    layer = [rng.randrange(1000, 1_000_000) for _ in range(period)]
    before = [rng.randrange(2_000_000, 3_000_000) for _ in range(data.draw(st.integers(0, 40)))]
    after = [rng.randrange(4_000_000, 5_000_000) for _ in range(data.draw(st.integers(0, 40)))]
    colours = before + layer * count + after
    forbidden = {i for i in range(len(colours) + 1) if rng.random() < 0.3}
    crossing = [INF if i in forbidden else rng.random() for i in range(len(colours) + 1)]
    found = segments(colours, crossing.__getitem__)
    pieces = blocks(colours, crossing.__getitem__)
    assert not forbidden & {stop for _, stop in found[:-1]}
    start = len(before)
    cuts = [range(start + o, start + period * count + 1, period) for o in range(period)]
    if count >= 3 and any(forbidden.isdisjoint(c) for c in cuts):  # a boundary exists that is allowed in every layer
        assert Counter(pieces).most_common()[0][1] >= 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=80))
def test_any_sequence_is_tiled(colours: list[int]) -> None:
    blocks(colours)
