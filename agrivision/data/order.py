"""Which sample comes when: pure functions of integers, without rank, process group or state.

A run is a line of samples: epoch after epoch, each a permutation of the training tiles. A cursor on
that line (samples consumed by all ranks together) is everything that a run has to remember. Ranks
only ever divide a batch that is already decided, so a run goes on with another number of ranks and
sees the same samples in the same steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_RUNS = 16  # places of the split that a window takes its tiles from
_LANE = 8  # samples of a batch that walk through the same windows; ranks rarely have fewer


class Stream(IntEnum):
    """What random numbers are used for: streams of the same seed never overlap."""

    ORDER = 1
    AUGMENT = 2
    DROPOUT = 3
    REPEAT = 4
    CROP = 5


def generator(seed: int, stream: Stream, major: int, minor: int = 0) -> np.random.Generator:
    """A generator of its own for one event, for example (epoch, tile) or (step, sample).

    Philox is counter-based (Salmon et al. 2011): the numbers stand in the key and in the upper half
    of the counter, so two events share a sequence only if all four numbers are equal. Nothing is
    added or multiplied, hence nothing collides.

    Args:
        seed: of the run, 0 … 2**63 - 1.
        stream: what the numbers are for.
        major: for example the epoch, 0 … 2**63 - 1.
        minor: for example the tile.
    """
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, minor, major], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def permuted(
    positions: NDArray[np.int64], size: int, seed: int, epoch: int, part: int = 0
) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0 … size - 1 sends some positions.

    A Feistel network over the bits of the range, walked until it lands inside of it (Black and Rogaway
    2002): each position costs the same whatever the size, and no array of the whole set is needed.

    Args:
        positions: any integers from 0 to size - 1.
        size: number of tiles.
        seed: of the run.
        epoch: each has a permutation of its own.
        part: so has each part of an epoch that is permuted by itself.

    Returns:
        An array of the same shape, int64; all positions together give a permutation.
    """
    bits = max(2, (size - 1).bit_length())
    keys = generator(seed, Stream.ORDER, epoch, part).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    result = _feistel(positions.astype(np.uint64), bits, keys)
    while (outside := result >= size).any():  # fewer than half of the values, but of two bits
        result[outside] = _feistel(result[outside], bits, keys)
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """An even number of rounds, so that halves of unequal width are in their places at the end."""
    low = bits // 2
    widths = (bits - low, low)
    left, right = values >> np.uint64(low), values & _mask(low)
    for number, key in enumerate(keys):
        left, right = right, left ^ (_mix(right ^ key) & _mask(widths[number % 2]))
    return (left << np.uint64(low)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def windowed(
    positions: NDArray[np.int64], size: int, window: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    """A permutation of 0 … size - 1 whose neighbouring positions lead to few places of the range.

    The range is cut into runs of neighbours, which are permuted as wholes; then the positions within
    each window of 16 runs are permuted. Both in domains of whole runs, walked like `permuted`.

    Args:
        positions: any integers from 0 to size - 1.
        size: number of tiles.
        window: about how many tiles are mixed with one another.
        seed: of the run.
        epoch: each has a permutation of its own.

    Returns:
        An array of the same shape, int64; all positions together give a permutation.
    """
    run = max(1, window // _RUNS)
    runs = -(-size // run)

    def once(values: NDArray[np.int64]) -> NDArray[np.int64]:
        mixed = _within_windows(values, runs * run, _RUNS * run, seed, epoch)
        return permuted(mixed // run, runs, seed, epoch) * run + mixed % run

    result = once(positions)
    while (outside := result >= size).any():  # of the last run, which may be shorter
        result[outside] = once(result[outside])
    return result


def _within_windows(
    positions: NDArray[np.int64], size: int, window: int, seed: int, epoch: int
) -> NDArray[np.int64]:
    number, inside = np.divmod(positions, window)
    result = np.empty_like(positions)
    for each in np.unique(number).tolist():
        here, start = number == each, each * window
        length = min(window, size - start)
        result[here] = start + permuted(inside[here], length, seed, epoch, each + 1)
    return result


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """What the samples of one step have in common, over all ranks.

    Attributes:
        epoch: that all of them belong to.
        cursor: samples consumed before this batch.
        count: how many of them count, the first ones. The last batch of an epoch is filled up, so that
            shapes never change and no rank goes without; what it is filled with has no weight in the
            loss.
    """

    epoch: int
    cursor: int
    count: int

    @property
    def next_cursor(self) -> int:
        """The cursor once this batch is consumed."""
        return self.cursor + self.count


class Expansion(Protocol):
    """Samples of an epoch that are not simply its tiles."""

    def tiles(self, samples: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The tiles of some samples, each below the order's size."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Some places of a batch.

    Attributes:
        batch: the whole batch.
        samples: numbers in the epoch, which no two of an epoch share.
        tiles: numbers in the split.
    """

    batch: GlobalBatch
    samples: list[int]
    tiles: list[int]


@dataclass(frozen=True, kw_only=True)
class Order:
    """The line of samples of a run.

    With a window, the places of a batch are lanes: each goes along a stretch of its own of the
    permuted split. Ranks have contiguous parts of every batch, so each meets few windows at a time.

    Attributes:
        size: samples in an epoch: the tiles of the training split, or what `repeats` makes of them.
        batch_size: samples of a step over all ranks.
        seed: of the run.
        window: tiles are mixed within windows of about so many; None mixes all of them.
        unit: samples that a rank's part of a batch consists of whole numbers of; the last may be less.
        repeats: which tile a sample is of; None: each tile is one sample, of the same number.
    """

    size: int
    batch_size: int
    seed: int
    window: int | None = None
    unit: int = 1
    repeats: Expansion | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every tile once."""
        return -(-self.size // self.batch_size)

    @property
    def units(self) -> int:
        """In a batch; there can be no more ranks."""
        return -(-self.batch_size // self.unit)

    def steps_left(self, cursor: int, epochs: int) -> int:
        """Steps that it takes from `cursor` to the end of the last of `epochs` epochs."""
        epoch, start = divmod(cursor, self.size)
        this_epoch = -(-(self.size - start) // self.batch_size)
        return this_epoch + (epochs - epoch - 1) * self.steps_per_epoch if epoch < epochs else 0

    def batch(self, cursor: int) -> GlobalBatch:
        """The batch that begins after `cursor` samples."""
        epoch, start = divmod(cursor, self.size)
        return GlobalBatch(epoch=epoch, cursor=cursor, count=min(self.batch_size, self.size - start))

    def share(self, rank: int, ranks: int) -> slice:
        """Which places of every batch a rank has."""
        units = share(self.units, rank, ranks)
        return slice(units.start * self.unit, min(units.stop * self.unit, self.batch_size))

    def tiles(self, batch: GlobalBatch, places: slice | None = None) -> NDArray[np.int64]:
        """Numbers of the tiles at some places of a batch, in the order of the places.

        Costs the same at every position and whatever the size; nothing is kept.

        Args:
            batch: as from `batch`.
            places: which of its samples; None for all.
        """
        samples = self._at(self._positions(batch, places or slice(None)), batch.epoch)
        return self._tiles(samples, batch.epoch)

    def ahead(self, cursor: int, places: slice, steps: int) -> list[Planned]:
        """The next batches, and the tiles at some places of each: as `batch` and `tiles`, at once.

        Numpy takes nearly as long for one step's positions as for those of thirty.

        Args:
            cursor: samples consumed before the first.
            places: which of a batch's samples.
            steps: how many batches.
        """
        batches = [self.batch(cursor)]
        while len(batches) < steps:
            batches.append(self.batch(batches[-1].next_cursor))
        planned: list[Planned] = []
        for epoch, some in itertools.groupby(batches, key=lambda batch: batch.epoch):
            same = list(some)
            positions = np.stack([self._positions(batch, places) for batch in same])
            samples = self._at(positions.reshape(-1), epoch)
            tiles = self._tiles(samples, epoch).reshape(positions.shape)
            planned += [
                Planned(batch=batch, samples=own.tolist(), tiles=theirs.tolist())
                for batch, own, theirs in zip(
                    same, samples.reshape(positions.shape), tiles, strict=True
                )
            ]
        return planned

    def _tiles(self, samples: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        return samples if self.repeats is None else self.repeats.tiles(samples, epoch)

    def _positions(self, batch: GlobalBatch, places: slice) -> NDArray[np.int64]:
        """Positions in the epoch; what fills up its last batch is taken from its beginning."""
        start, stop, _ = places.indices(self.batch_size)
        first = batch.cursor % self.size
        return np.arange(first + start, first + stop, dtype=np.int64) % self.size

    def _at(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Samples at positions of an epoch."""
        if self.window is None:
            return permuted(positions, self.size, self.seed, epoch)
        return windowed(self._in_lanes(positions), self.size, self.window, self.seed, epoch)

    def _in_lanes(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position in the epoch → position on the permuted split, of which each lane has a stretch."""
        step, place = np.divmod(positions, self.batch_size)
        lane, inside = np.divmod(place, _LANE)
        steps, rest = divmod(self.size, self.batch_size)
        before = lane * _LANE
        width = np.minimum(_LANE, self.batch_size - before)
        line: NDArray[np.int64] = steps * before + np.minimum(rest, before) + step * width + inside
        return line


def share(total: int, rank: int, size: int) -> slice:
    """A rank's contiguous part of `total` things; parts differ by at most one and leave nothing out."""
    return slice(total * rank // size, total * (rank + 1) // size)
