"""Exact sums over tiles: the same numbers in whatever order, by however many workers, they are added.

Sums are fractions of Python integers. Those of integer pixels are exact to the last digit; those of
floating-point pixels are exact over the tiles' sums, which are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from agrivision.data.indices import indices_of, places, sums_of_index
from agrivision.data.labels import Labels, valid_mask
from agrivision.data.schema import BandStatistics
from agrivision.data.tile import Image

_GREY = np.arange(256)
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
        return cls(
            tiles=1,
            pixels=pixels,
            bands=tuple(_bands(image, valid, pixels)),
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


def channel_moments(
    image: Image, labels: Labels, sums: Sums, bands: Sequence[str]
) -> list[tuple[float, float]]:
    """Sum and sum of squares of each channel over the valid pixels of a tile.

    Channels are the bands, then the indices that they suffice for.

    Args:
        image: shape (bands, height, width), as in `Sums.of`.
        labels: likewise.
        sums: over the tile.
        bands: their names.
    """
    valid = valid_mask(labels)
    names = indices_of(bands)
    of_indices = (
        sums_of_index(image[first], image[second], valid) for first, second in places(names, bands)
    )
    return [*((float(band.total), float(band.squares)) for band in sums.bands), *of_indices]


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


def _bands(image: Image, valid: NDArray[np.bool_], pixels: int) -> Iterator[BandSums]:
    if image.dtype == np.uint8:
        return map(_sums_by_counting, _count(image, valid))
    everywhere = pixels == valid.size
    return (_band(band.reshape(-1) if everywhere else band[valid]) for band in image)


def _count(image: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How often each value is there in the valid pixels of each band, shape (bands, 256).

    Four bands whose values lie beside one another, pixel by pixel, are counted in one go.
    """
    beside = image.transpose(1, 2, 0)
    four = len(image) == 4 and beside.flags.c_contiguous
    planes = [_pillow(beside, "RGBA")] if four else [_pillow(band, "L") for band in image]
    where = _pillow(valid.view(np.uint8), "L")
    return np.array([plane.histogram(where) for plane in planes]).reshape(len(image), 256)


def _pillow(pixels: NDArray[np.uint8], mode: str) -> Pillow.Image:
    """The same memory, where it lies in one piece, as an image whose values Pillow can count."""
    size = pixels.shape[1], pixels.shape[0]
    return Pillow.frombuffer(mode, size, np.ascontiguousarray(pixels), "raw", mode, 0, 1)


def _sums_by_counting(counts: NDArray[np.int64]) -> BandSums:
    present = np.flatnonzero(counts)
    if present.size == 0:
        return BandSums()
    total, squares = counts @ _GREY, counts @ _GREY**2
    least, most = float(present[0]), float(present[-1])
    return BandSums(Fraction(int(total)), Fraction(int(squares)), least, most)


def _band(values: NDArray[Any]) -> BandSums:
    if values.size == 0:
        return BandSums()
    if np.issubdtype(values.dtype, np.floating):
        wide = values.astype(np.float64)
        total, squares = Fraction(float(wide.sum())), Fraction(float(np.square(wide).sum()))
    else:
        total, squares = _sums_by_halves(values)
    return BandSums(total, squares, float(values.min()), float(values.max()))


def _sums_by_halves(values: NDArray[Any]) -> tuple[Fraction, Fraction]:
    wide = values.astype(np.int64)
    high, low = wide >> _HALF, wide & ((1 << _HALF) - 1)
    squares = (int(high @ high) << 2 * _HALF) + (int(high @ low) << _HALF + 1) + int(low @ low)
    return Fraction(int(wide.sum())), Fraction(squares)
