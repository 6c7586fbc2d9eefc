"""The order of samples: permutations, free of rank and world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision.data.order import Order, Stream, generator, permuted, share, windowed


@given(size=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


@given(size=st.integers(2, 10**12), position=st.integers(0, 10**12), seed=st.integers(0, 2**63 - 1))
def test_one_position_alone_is_where_it_is_among_others(size: int, position: int, seed: int) -> None:
    position %= size
    some = np.array([position, (position + 1) % size, 0])
    together = permuted(some, size, seed, 3)
    assert permuted(some[:1], size, seed, 3)[0] == together[0]
    assert together.min() >= 0 and together.max() < size


def test_epochs_and_seeds_differ() -> None:
    positions = np.arange(1000)
    orders = [permuted(positions, 1000, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for first in range(len(orders)):
        for second in range(first):
            # Two random permutations agree in one place on average.
            assert (orders[first] == orders[second]).sum() < 12


def test_every_tile_is_equally_likely_at_every_position() -> None:
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), permuted(np.arange(8), 8, 5, epoch)] += 1
    expected = 4000 / 8
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 95  # 49 degrees of freedom: p = 1e-4


@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 64),
    window=st.none() | st.integers(2, 400),
    unit=st.integers(1, 9),
    worlds=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
def test_every_tile_once_an_epoch_on_changing_worlds(
    size: int, batch_size: int, window: int | None, unit: int, worlds: list[int]
) -> None:
    order = Order(size=size, batch_size=batch_size, seed=1, window=window, unit=unit)
    cursor = 0
    for epoch in range(2):
        seen: list[int] = []
        for step in range(order.steps_per_epoch):
            batch = order.batch(cursor)
            world = worlds[step % len(worlds)]
            tiles = order.tiles(batch)
            parts = [order.tiles(batch, order.share(rank, world)) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), tiles)
            assert len(tiles) == batch_size and batch.epoch == epoch
            seen += tiles[: batch.count].tolist()
            done = epoch * order.steps_per_epoch + step
            assert order.steps_left(cursor, 2) == 2 * order.steps_per_epoch - done
            cursor = batch.next_cursor
        assert sorted(seen) == list(range(size))
    assert cursor == 2 * size
    assert order.steps_left(cursor, 2) == order.steps_left(cursor, 1) == 0


@given(
    size=st.integers(1, 900),
    window=st.integers(2, 1000),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_windows_make_a_permutation(size: int, window: int, seed: int, epoch: int) -> None:
    order = windowed(np.arange(size), size, window, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))
    position = seed % size
    assert windowed(np.array([position]), size, window, seed, epoch)[0] == order[position]


@settings(max_examples=30)
@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 64),
    window=st.none() | st.integers(2, 400),
    cursor=st.integers(0, 1000),
    steps=st.integers(1, 40),
)
def test_what_is_planned_ahead_is_what_comes(
    size: int, batch_size: int, window: int | None, cursor: int, steps: int
) -> None:
    order = Order(size=size, batch_size=batch_size, seed=1, window=window)
    places = order.share(batch_size // 2, batch_size)
    planned = order.ahead(cursor, places, steps)
    assert len(planned) == steps
    for each in planned:
        assert each.batch == order.batch(cursor)
        assert each.tiles == each.samples == order.tiles(each.batch, places).tolist()
        cursor = each.batch.next_cursor


def test_a_rank_reads_few_places_of_a_large_split_at_a_time() -> None:
    window, ranks, per_rank, steps = 4096, 64, 16, 100
    shard = window // 16
    order = Order(size=10_000_000, batch_size=ranks * per_rank, seed=2, window=window)
    everywhere = Order(size=order.size, batch_size=order.batch_size, seed=2)
    for rank in (0, 17, 63):
        places = order.share(rank, ranks)
        batches = [order.batch(step * order.batch_size) for step in range(steps)]
        read = np.concatenate([order.tiles(batch, places) for batch in batches])
        assert len(set((read // shard).tolist())) <= 2 * 2 * 16  # two lanes, each in one window or two
        others = np.concatenate([everywhere.tiles(batch, places) for batch in batches])
        assert len(set((others // shard).tolist())) > 1000


def test_a_window_mixes_all_of_its_places() -> None:
    """Sixteen tiles in a row come from sixteen places nearly as often as independent draws would."""
    order = Order(size=100_000, batch_size=8, seed=4, window=1600)
    found = [
        len(set((order.tiles(order.batch(step * 8)) // 100).tolist())) for step in range(0, 12_000, 7)
    ]
    expected = 16 * (1 - (15 / 16) ** 8)
    assert np.mean(found) == pytest.approx(expected, abs=0.1)


@given(
    units=st.integers(1, 40), unit=st.integers(1, 9), less=st.integers(0, 8), ranks=st.integers(1, 40)
)
def test_ranks_have_whole_units(units: int, unit: int, less: int, ranks: int) -> None:
    batch_size = max(units * unit - less, 1)
    order = Order(size=1000, batch_size=batch_size, seed=0, unit=unit)
    shares = [order.share(rank, ranks) for rank in range(ranks)]
    assert [place for one in shares for place in range(batch_size)[one]] == list(range(batch_size))
    assert all(one.start % unit == 0 for one in shares)


@given(total=st.integers(0, 1000), size=st.integers(1, 50))
def test_shares_are_even_and_complete(total: int, size: int) -> None:
    parts = [list(range(total))[share(total, rank, size)] for rank in range(size)]
    assert sum(parts, []) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_generators_of_different_events_never_meet() -> None:
    events = [
        (seed, stream, a, b)
        for seed in (0, 1)
        for stream in Stream
        for a in (0, 1, 2)
        for b in (0, 1, 2)
    ]
    draws = [tuple(generator(*event).integers(2**63, size=4).tolist()) for event in events]
    assert len(set(draws)) == len(events)
    # What `seed + epoch` would have confused.
    assert generator(0, Stream.AUGMENT, 1, 2).random() != generator(0, Stream.AUGMENT, 2, 1).random()


def test_a_generator_is_the_same_every_time() -> None:
    assert generator(7, Stream.ORDER, 3).random() == generator(7, Stream.ORDER, 3).random()


@pytest.mark.parametrize("size", [100_000_000, 2**40])
def test_huge_sets_need_no_array(size: int) -> None:
    positions = np.arange(size - 1000, size)
    order = permuted(positions, size, 0, 0)
    assert len(set(order.tolist())) == 1000
    assert 0 <= order.min() < order.max() < size
