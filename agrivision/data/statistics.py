"""Exact sums over tiles: the same numbers in whatever order, by however many workers, they are added.

Sums are fractions of Python integers. Those of integer pixels are exact to the last digit; those of
floating-point pixels are exact over the tiles' sums, which are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.labels import Labels, valid_mask
from agrivision.data.schema import BandStatistics
from agrivision.data.tile import Image

_HALF = 16  # bits: products of two halves of a 32-bit number can be added up in 64 bits


@dataclass(frozen=True)
class BandSums:
    """Sums over the valid pixels of one band.

    Attributes:
        total: Σ x.
        squares: Σ x².
        minimum: smallest x; infinity where there is no pixel.
        maximum: largest x; minus infinity where there is no pixel.
    """

    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    minimum: float = math.inf
    maximum: float = -math.inf

    def __add__(self, other: BandSums) -> BandSums:
        return BandSums(
            self.total + other.total,
            self.squares + other.squares,
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
        )


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over some tiles.

    Attributes:
        tiles: number of tiles.
        pixels: valid pixels.
        bands: by band.
        class_pixels: valid pixels by class id; one with two labels counts for both.
        class_tiles: tiles with at least one valid pixel, by class id.
    """

    tiles: int
    pixels: int
    bands: tuple[BandSums, ...]
    class_pixels: tuple[int, ...]
    class_tiles: tuple[int, ...]

    @classmethod
    def none(cls, bands: int, classes: int) -> Sums:
        """The sums over no tile."""
        zeros = (0,) * classes
        empty = (BandSums(),) * bands
        return cls(tiles=0, pixels=0, bands=empty, class_pixels=zeros, class_tiles=zeros)

    @classmethod
    def of(cls, image: Image, labels: Labels, class_pixels: Sequence[int]) -> Sums:
        """The sums over one tile.

        Args:
            image: shape (bands, height, width), any integer type up to 32 bits, or floating point
                that is finite where the labels are valid.
            labels: label sets as bits, shape (height, width).
            class_pixels: valid pixels by class id, which the record has counted.
        """
        valid = valid_mask(labels)
        pixels = int(np.count_nonzero(valid))
        everywhere = pixels == valid.size
        return cls(
            tiles=1,
            pixels=pixels,
            bands=tuple(_band(band.reshape(-1) if everywhere else band[valid]) for band in image),
            class_pixels=tuple(class_pixels),
            class_tiles=tuple(int(count > 0) for count in class_pixels),
        )

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            tiles=self.tiles + other.tiles,
            pixels=self.pixels + other.pixels,
            bands=tuple(a + b for a, b in zip(self.bands, other.bands, strict=True)),
            class_pixels=_add(self.class_pixels, other.class_pixels),
            class_tiles=_add(self.class_tiles, other.class_tiles),
        )

    def to_dict(self) -> dict[str, Any]:
        """The sums as JSON can hold them, without loss."""
        bands = [[str(b.total), str(b.squares), b.minimum, b.maximum] for b in self.bands]
        return {
            "tiles": self.tiles,
            "pixels": self.pixels,
            "bands": bands,
            "class_pixels": self.class_pixels,
            "class_tiles": self.class_tiles,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Sums:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            tiles=int(content["tiles"]),
            pixels=int(content["pixels"]),
            bands=tuple(
                BandSums(Fraction(total), Fraction(squares), float(minimum), float(maximum))
                for total, squares, minimum, maximum in content["bands"]
            ),
            class_pixels=tuple(map(int, content["class_pixels"])),
            class_tiles=tuple(map(int, content["class_tiles"])),
        )


def add_up(sums: Iterable[Sums], *, bands: int, classes: int) -> Sums:
    """The sum of sums; that over no tile where there are none."""
    return sum(sums, start=Sums.none(bands, classes))


def band_statistics(sums: Sums, splits: Sequence[str]) -> BandStatistics:
    """Mean, standard deviation and range of each band over at least one valid pixel.

    The variance is computed from the exact sums, so that nothing cancels, and rounded once.
    """
    n = sums.pixels
    means = [band.total / n for band in sums.bands]
    variances = [band.squares / n - m * m for band, m in zip(sums.bands, means, strict=True)]
    return BandStatistics(
        splits=tuple(splits),
        pixels=n,
        mean=tuple(float(mean) for mean in means),
        # Rounded sums of floating-point pixels can leave a constant band a hair below zero.
        std=tuple(math.sqrt(max(variance, Fraction(0))) for variance in variances),
        minimum=tuple(band.minimum for band in sums.bands),
        maximum=tuple(band.maximum for band in sums.bands),
    )


def _add(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _band(values: NDArray[Any]) -> BandSums:
    if values.size == 0:
        return BandSums()
    if np.issubdtype(values.dtype, np.floating):
        wide = values.astype(np.float64)
        total, squares = Fraction(float(wide.sum())), Fraction(float(np.square(wide).sum()))
    elif values.dtype == np.uint8:
        total, squares = _sums_by_counting(values)
    else:
        total, squares = _sums_by_halves(values)
    return BandSums(total, squares, float(values.min()), float(values.max()))


def _sums_by_counting(values: NDArray[np.uint8]) -> tuple[Fraction, Fraction]:
    counts = np.bincount(values, minlength=256)
    grey = np.arange(256)
    return Fraction(int(counts @ grey)), Fraction(int(counts @ grey**2))


def _sums_by_halves(values: NDArray[Any]) -> tuple[Fraction, Fraction]:
    wide = values.astype(np.int64)
    high, low = wide >> _HALF, wide & ((1 << _HALF) - 1)
    squares = (int(high @ high) << 2 * _HALF) + (int(high @ low) << _HALF + 1) + int(low @ low)
    return Fraction(int(wide.sum())), Fraction(squares)
