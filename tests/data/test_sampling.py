"""Rare classes: tiles that come again and crops that hold them, the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agrivision.config import AugmentConfig
from agrivision.data.augment import Augment, draw
from agrivision.data.labels import VALID_BIT, class_mask
from agrivision.data.loader import TrainLoader
from agrivision.data.normalise import Normaliser
from agrivision.data.order import Order
from agrivision.data.sampling import RareCrops, Repeats, class_counts
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.world import World

COUNTS = arrays.arrays(
    np.uint32, st.tuples(st.integers(1, 60), st.integers(1, 5)), elements=st.integers(0, 9)
)
THRESHOLDS = st.floats(0.001, 1)


@given(COUNTS, THRESHOLDS, st.integers(0, 20))
def test_an_epoch_holds_every_tile_as_often_as_its_factor_says(
    pixels: np.ndarray, threshold: float, epoch: int
) -> None:
    repeats = Repeats.of(pixels, threshold, seed=3)
    tiles = repeats.tiles(np.arange(repeats.size), epoch)
    times = np.bincount(tiles, minlength=len(pixels))
    assert len(times) == len(pixels)
    assert (times >= 1).all()
    assert (np.diff(tiles) >= 0).all()
    assert (np.abs(times - repeats.factors) < 1 + 1e-9).all()


def test_over_many_epochs_the_mean_is_the_factor() -> None:
    pixels = np.zeros((40, 2), np.uint32)
    pixels[:, 0] = 5
    pixels[:4, 1] = 1
    repeats = Repeats.of(pixels, 0.3, seed=1)
    assert repeats.factors[:4] == pytest.approx([3**0.5] * 4, abs=1e-4)
    assert repeats.factors[4:-1] == pytest.approx([1] * 35)
    epochs = 400
    times = sum(
        np.bincount(repeats.tiles(np.arange(repeats.size), epoch), minlength=40)
        for epoch in range(epochs)
    )
    assert times / epochs == pytest.approx(repeats.factors, abs=0.08)


@given(COUNTS)
def test_without_a_rare_class_all_is_as_ever(pixels: np.ndarray) -> None:
    everywhere = np.ones_like(pixels)
    repeats = Repeats.of(everywhere, 0.9, seed=0)
    assert repeats.size == len(pixels)
    assert repeats.tiles(np.arange(repeats.size), 7).tolist() == list(range(len(pixels)))


@pytest.mark.parametrize("window", [None, 8])
def test_ranks_share_what_one_would_see(dataset: Path, window: int | None) -> None:
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    repeats = Repeats.of(class_counts(reader), 0.9, seed=2)
    assert repeats.size > len(reader)
    order = Order(size=repeats.size, batch_size=6, seed=2, window=window, repeats=repeats)
    seen = []
    cursor = 0
    while cursor < 2 * repeats.size:
        batch = order.batch(cursor)
        whole = order.tiles(batch)
        parts = [order.tiles(batch, order.share(rank, 4)) for rank in range(4)]
        assert np.concatenate(parts).tolist() == whole.tolist()
        seen += whole[: batch.count].tolist()
        cursor = batch.next_cursor
    for epoch in range(2):
        mine = sorted(seen[epoch * repeats.size : (epoch + 1) * repeats.size])
        assert mine == repeats.tiles(np.arange(repeats.size), epoch).tolist()


def crops_of(
    dataset: Path, world: World, cursor: int, threads: int
) -> list[tuple[int, int, tuple[int, int] | None]]:
    """Sample, tile and pixel of each place of a rank's part of a batch."""
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    crops = RareCrops.of(0.7, reader.split.class_pixels, seed=4)
    order = Order(size=len(reader), batch_size=8, seed=4)
    with TrainLoader(reader, order, world, threads=threads, crops=crops) as loader:
        loader.seek(cursor)
        batch = loader.next_batch()
        labels = batch.pixels.labels.numpy().view(np.uint16)
        for place, (row, column) in batch.focus.items():
            assert labels[place, row, column] >> VALID_BIT
        return [
            (sample, tile, batch.focus.get(place))
            for place, (sample, tile) in enumerate(zip(batch.samples, batch.tiles, strict=True))
        ]


def test_crops_are_chosen_alike_by_any_ranks_and_threads(dataset: Path) -> None:
    whole = crops_of(dataset, World(), 8, threads=0)
    assert any(place for *_, place in whole)
    assert any(place is None for *_, place in whole)
    assert crops_of(dataset, World(), 8, threads=3) == whole
    for size in (2, 3):
        parts = [crops_of(dataset, World(rank=rank, size=size), 8, threads=1) for rank in range(size)]
        assert sum(parts, []) == whole


def test_rare_classes_are_chosen_rather_than_common_ones() -> None:
    labels = np.full((8, 8), 1 | 1 << VALID_BIT, np.uint16)
    labels[2, 3] = 2 | 1 << VALID_BIT
    labels[0] &= np.uint16((1 << VALID_BIT) - 1)  # not valid
    counts = np.array([55, 1, 0], np.uint32)
    crops = RareCrops.of(1.0, (1_000_000, 10_000, 100), seed=0)
    chosen = [crops.pixel(labels, counts, 0, sample) for sample in range(1000)]
    rare = sum(place == (2, 3) for place in chosen)
    assert rare == pytest.approx(1000 * 10 / 11, abs=40)  # weights 1 and 10
    assert all(place is not None and place[0] > 0 for place in chosen)
    common = {place for place in chosen if place != (2, 3)}
    assert {row for row, _ in common} == {*range(1, 8)}
    assert RareCrops.of(0.0, (1, 1, 1), seed=0).pixel(labels, counts, 0, 0) is None
    assert crops.pixel(labels, np.zeros(3, np.uint32), 0, 0) is None


@given(
    row=st.integers(0, 19),
    column=st.integers(0, 19),
    crop=st.integers(1, 20),
    sample=st.integers(0, 99),
)
def test_a_crop_holds_the_pixel_that_was_chosen(row: int, column: int, crop: int, sample: int) -> None:
    plane = torch_plane(row, column)
    change = Augment(
        config=AugmentConfig(), normaliser=Normaliser(mean=(0.0,), std=(1.0,)), crop=crop, seed=0
    )
    images, _ = change([plane], plane[..., 0].int(), 0, [sample], focus=[(row, column)])
    assert images.sum() == 1


def torch_plane(row: int, column: int) -> torch.Tensor:
    plane = torch.zeros(1, 20, 20, 1)
    plane[0, row, column] = 1
    return plane


def test_a_sample_that_comes_twice_is_changed_twice() -> None:
    one, other = (draw(AugmentConfig(), 4, 0, 0, sample) for sample in (3, 4))
    assert one != other


def test_the_classes_that_are_counted_are_those_of_the_labels(dataset: Path) -> None:
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    counts = class_counts(reader)
    assert counts.sum(0).tolist() == list(reader.split.class_pixels)
    assert class_mask(np.array([1 << VALID_BIT | 1], np.uint16), 0).all()
