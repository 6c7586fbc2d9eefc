"""Rare classes, met more often: which tiles come again within an epoch, and where crops are cut.

Both are pure functions of (seed, epoch, sample) and of what the data set's index counts, so that a run
that goes on, on any number of ranks, meets the same samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agrivision.data.labels import Labels, class_mask
from agrivision.data.order import Stream, generator
from agrivision.data.shards import SplitReader

_ONE = 1 << 16  # repeats are whole multiples of 1 / _ONE: their sums are exact


def class_counts(reader: SplitReader) -> NDArray[np.uint32]:
    """Valid pixels by tile and class of a split, shape (tiles, classes).

    Raises:
        DatasetError: an index cannot be read.
    """
    return np.concatenate([index["pixels"] for index in reader.indexes()])


@dataclass(frozen=True, kw_only=True, eq=False)
class Repeats:
    """How often each tile comes in an epoch: at least once, those of rare classes more often.

    Repeat factors after Gupta, Dollár and Girshick 2019 (LVIS, arXiv:1908.03195): a class that is in a
    share f of the tiles has the factor max(1, sqrt(t / f)), a tile the largest factor of its classes. A
    factor of 1.3 is one sample in each epoch and a second one in three epochs of ten. Every epoch has
    the same number of samples: factors are laid end to end, and the epoch decides where on that line
    the samples are taken, one a unit (systematic sampling).

    Attributes:
        ends: where each tile's factor ends on the line, int64 (tiles,), in 65,536ths.
        seed: of the run.
    """

    ends: NDArray[np.int64]
    seed: int

    @classmethod
    def of(cls, pixels: NDArray[np.uint32], threshold: float, seed: int) -> Repeats:
        """From the valid pixels by tile and class.

        Args:
            pixels: (tiles, classes).
            threshold: t, above 0 and up to 1; classes in a smaller share of the tiles are rare.
            seed: of the run.
        """
        present = pixels > 0
        share = np.maximum(present.mean(0), 1 / len(pixels))
        factor = np.maximum(1.0, np.sqrt(threshold / share))
        largest = np.where(present, factor, 1.0).max(1)
        ends = np.cumsum(np.rint(largest * _ONE).astype(np.int64))
        ends[-1] = -(-ends[-1] // _ONE) * _ONE  # the line ends with a whole sample
        return cls(ends=ends, seed=seed)

    @property
    def size(self) -> int:
        """Samples in an epoch."""
        return int(self.ends[-1]) // _ONE

    @property
    def factors(self) -> NDArray[np.float64]:
        """How often each tile comes in an epoch, on average."""
        return np.diff(self.ends, prepend=0) / _ONE

    def tiles(self, samples: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The tiles of some samples of an epoch, each 0 … size - 1; neighbours stay neighbours."""
        start = int(generator(self.seed, Stream.REPEAT, epoch).integers(_ONE))
        found: NDArray[np.int64] = np.searchsorted((self.ends + start) // _ONE, samples, side="right")
        return found


def repeats_of(reader: SplitReader, threshold: float, seed: int) -> Repeats | None:
    """The repeats of a split's tiles; None where the threshold is 0: each comes once.

    Raises:
        DatasetError: an index cannot be read.
    """
    return Repeats.of(class_counts(reader), threshold, seed) if threshold else None


@dataclass(frozen=True, kw_only=True)
class RareCrops:
    """Chooses a pixel for some of the samples that their crop must hold.

    The class is drawn from those in the tile, a rare one rather than a common one; the pixel from those
    of the class.

    Attributes:
        share: of the samples whose crop is placed so, 0 to 1.
        weights: of each class, positive.
        seed: of the run.
    """

    share: float
    weights: tuple[float, ...]
    seed: int

    @classmethod
    def of(cls, share: float, class_pixels: tuple[int, ...], seed: int) -> RareCrops:
        """With weights that go with the classes' pixel counts ** -0.5."""
        weights = tuple(max(1, pixels) ** -0.5 for pixels in class_pixels)
        return cls(share=share, weights=weights, seed=seed)

    def pixel(
        self, labels: Labels, pixels: NDArray[np.uint32], epoch: int, sample: int
    ) -> tuple[int, int] | None:
        """Row and column of a pixel that the sample's crop must hold; None where it may lie anywhere.

        Args:
            labels: of the whole tile, uint16 (side, side).
            pixels: of each class in it, as the index has them.
            epoch: of the sample.
            sample: its number in the epoch.
        """
        random = generator(self.seed, Stream.CROP, epoch, sample).random(3)
        weights = np.where(pixels > 0, self.weights, 0.0)
        if random[0] >= self.share or not weights.any():
            return None
        ends = np.cumsum(weights)
        class_id = int(np.searchsorted(ends, random[1] * ends[-1], side="right"))
        places = np.flatnonzero(class_mask(labels, min(class_id, len(ends) - 1)))
        if not len(places):  # other labels than were counted: `inspect` names it
            return None
        row, column = divmod(int(places[int(random[2] * len(places))]), labels.shape[1])
        return row, column
