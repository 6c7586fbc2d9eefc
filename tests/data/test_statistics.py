"""Sums that are computed the fast way are those of Python's integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import simplejpeg
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agrivision.data.labels import VALID_BIT, class_pixels, compress
from agrivision.data.parts import decode_jpeg_for_four
from agrivision.data.statistics import Sums
from agrivision.errors import DatasetError
from tests.data import av

shapes = st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20))
dtypes = st.sampled_from([np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
images = st.tuples(shapes, dtypes).flatmap(lambda drawn: hnp.arrays(drawn[1], drawn[0]))
orders = st.sampled_from([(0, 1, 2), (1, 2, 0), (1, 0, 2), (2, 1, 0)])


def in_memory(image: np.ndarray, order: tuple[int, int, int]) -> np.ndarray:
    """The same image, its axes in this order from the widest stride to the narrowest."""
    return np.ascontiguousarray(image.transpose(order)).transpose(np.argsort(order))


@given(images, orders, st.data())
def test_sums_are_exact_whatever_the_memory_looks_like(image, order, data):
    valid = data.draw(
        st.one_of(
            hnp.arrays(np.bool_, image.shape[1:]),
            st.booleans().map(lambda value: np.full(image.shape[1:], value)),
        )
    )
    labels = valid.astype(np.uint16) << VALID_BIT
    sums = Sums.of(in_memory(image, order), labels, [])
    assert sums.pixels == valid.sum()
    for band, of_band in zip(image, sums.bands, strict=True):
        values = band[valid].tolist()
        assert of_band.total == sum(values)
        assert of_band.squares == sum(value * value for value in values)
        assert of_band.minimum == min(values, default=math.inf)
        assert of_band.maximum == max(values, default=-math.inf)


def test_the_brightest_tile_of_the_usual_kind():
    image = np.full((4, 512, 512), 255, np.uint8)
    labels = np.full((512, 512), 1 << VALID_BIT, np.uint16)
    for order in ((0, 1, 2), (1, 2, 0)):
        for band in Sums.of(in_memory(image, order), labels, []).bands:
            assert (band.total, band.squares) == (255 * 512**2, 255**2 * 512**2)


def counted(labels: np.ndarray, classes: int) -> list[int]:
    valid = labels >> VALID_BIT == 1
    return [int(np.sum(valid & (labels >> class_id & 1 == 1))) for class_id in range(classes)]


label_sets = st.one_of(
    hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=30)),
    hnp.arrays(np.uint16, (40, 40), fill=st.sampled_from([0, 1, 0x8001, 0xFFFF])),
)


@given(label_sets, st.integers(0, 15))
def test_pixels_of_a_class_in_noise_and_in_fields(labels, classes):
    assert class_pixels(labels, classes).tolist() == counted(labels, classes)


@pytest.mark.parametrize("step", [1, 2, 7, 8, 9, 64])
def test_pixels_of_a_class_in_runs_of_any_length(step):
    labels = (np.arange(64 * 64) // step * 40503 % 65536).astype(np.uint16).reshape(64, 64)
    assert class_pixels(labels, 15).tolist() == counted(labels, 15)


def test_a_compressor_that_was_used_gives_the_same_bytes():
    generator = np.random.default_rng(0)
    for _ in range(5):
        labels = generator.integers(0, 1 << 16, (33, 33)).astype(np.uint16)
        fresh = zstandard.ZstdCompressor(level=3, write_content_size=True)
        assert compress(labels) == fresh.compress(labels.tobytes())
        assert compress(labels[:, ::2]) == fresh.compress(labels[:, ::2].tobytes())


def test_three_bands_beside_room_for_a_fourth():
    content = av.jpeg("field", 3)
    four = np.empty((av.SIZE, av.SIZE, 4), np.uint8)
    decode_jpeg_for_four(content, four)
    np.testing.assert_array_equal(four[..., :3], simplejpeg.decode_jpeg(content))
    with pytest.raises(DatasetError, match="not a whole JPEG"):
        decode_jpeg_for_four(content[:-40], four)
    with pytest.raises(DatasetError, match="with 1 band where"):
        decode_jpeg_for_four(av.jpeg("field", 1), four)
    with pytest.raises(DatasetError, match="64 x 64 pixels with 3 bands where 64 x 32 pixels"):
        decode_jpeg_for_four(content, four[:32])
