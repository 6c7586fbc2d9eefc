"""Spectral indices: the same on the disk's side and on the device, and sums of them that are exact."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agrivision import config
from agrivision.data.indices import INDICES, STEPS, indices_of, places, ratio, sums_of_index
from agrivision.data.normalise import Normaliser

BANDS = ("red", "green", "blue", "nir")
PIXELS = arrays.arrays(np.uint8, (2, 5, 7))


def test_the_configuration_knows_the_same_names() -> None:
    assert tuple(INDICES) == config._INDICES


def test_bands_tell_which_indices_there_are() -> None:
    assert indices_of(BANDS) == ("ndvi", "ndwi")
    assert indices_of(("nir", "rededge", "red")) == ("ndvi", "ndre")
    assert indices_of(("red", "green", "blue")) == ()
    assert places(("ndwi", "ndvi"), BANDS) == ((1, 3), (3, 0))
    with pytest.raises(ValueError, match="rededge"):
        places(("ndre",), BANDS)


@given(PIXELS, arrays.arrays(np.bool_, (5, 7)))
def test_sums_of_bytes_are_those_of_the_pixels_one_by_one(
    pixels: np.ndarray, valid: np.ndarray
) -> None:
    total = squares = Fraction(0)
    for a, b in zip(*(band[valid].tolist() for band in pixels), strict=True):
        value = Fraction(round((a - b) / (a + b) * STEPS) if a + b else 0, STEPS)
        total += value
        squares += value**2
    assert sums_of_index(*pixels, valid) == (total, squares)


@given(PIXELS, st.sampled_from([np.uint16, np.int32, np.float32]))
def test_other_types_of_pixels_give_the_same_sums(pixels: np.ndarray, dtype: type) -> None:
    valid = np.ones(pixels.shape[1:], np.bool_)
    assert sums_of_index(*pixels.astype(dtype), valid) == sums_of_index(*pixels, valid)


@given(arrays.arrays(np.float32, (2, 3, 3), elements=st.floats(-2, 2, width=32)))
def test_an_index_stays_between_minus_one_and_one(pixels: np.ndarray) -> None:
    values = ratio(*pixels)
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 1


@given(PIXELS)
def test_the_device_computes_the_same(pixels: np.ndarray) -> None:
    normaliser = Normaliser(mean=(0.0, 0.0), std=(1.0, 1.0), indices=((0, 1),))
    assert normaliser.channels == 3
    seen = normaliser(torch.from_numpy(pixels)[None])
    assert seen.shape == (1, 3, 5, 7)
    assert torch.equal(seen[0, :2], torch.from_numpy(pixels).float())
    assert np.abs(seen[0, 2].numpy() - ratio(*pixels)).max() <= math.ldexp(1, -22)
