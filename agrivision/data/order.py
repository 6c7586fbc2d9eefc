"""Which sample comes when: pure functions of integers, without rank, process group or state.

A run is a line of samples: epoch after epoch, each a permutation of the training tiles. A cursor on
that line (samples consumed by all ranks together) is everything that a run has to remember. Ranks
only ever divide a batch that is already decided, so a run goes on with another number of ranks and
sees the same samples in the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


class Stream(IntEnum):
    """What random numbers are used for: streams of the same seed never overlap."""

    ORDER = 1
    AUGMENT = 2
    DROPOUT = 3


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


def permuted(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0 … size - 1 sends some positions.

    A Feistel network over the next even number of bits, walked until it lands inside of the range
    (Black and Rogaway 2002): each position costs the same whatever the size, and no array of the
    whole set is needed.

    Args:
        positions: any integers from 0 to size - 1.
        size: number of tiles.
        seed: of the run.
        epoch: each has a permutation of its own.

    Returns:
        An array of the same shape, int64; all positions together give a permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = generator(seed, Stream.ORDER, epoch).integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
    result = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := result >= size).any():  # at most 3 of 4 values lie outside
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The samples of one step, over all ranks.

    Attributes:
        epoch: that all of them belong to.
        cursor: samples consumed before this batch.
        tiles: (batch_size,) int64. The last batch of an epoch is filled up with tiles from the
            epoch's beginning, so that shapes never change and no rank goes without.
        count: how many of them count, the first ones; the others have no weight in the loss.
    """

    epoch: int
    cursor: int
    tiles: NDArray[np.int64]
    count: int

    @property
    def next_cursor(self) -> int:
        """The cursor once this batch is consumed."""
        return self.cursor + self.count


@dataclass(frozen=True, kw_only=True)
class Order:
    """The line of samples of a run.

    Attributes:
        size: tiles in the training split.
        batch_size: samples of a step over all ranks.
        seed: of the run.
    """

    size: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that it takes to see every tile once."""
        return -(-self.size // self.batch_size)

    def steps_left(self, cursor: int, epochs: int) -> int:
        """Steps that it takes from `cursor` to the end of the last of `epochs` epochs."""
        epoch, start = divmod(cursor, self.size)
        this_epoch = -(-(self.size - start) // self.batch_size)
        return this_epoch + (epochs - epoch - 1) * self.steps_per_epoch if epoch < epochs else 0

    def batch(self, cursor: int) -> GlobalBatch:
        """The batch that begins after `cursor` samples."""
        epoch, start = divmod(cursor, self.size)
        count = min(self.batch_size, self.size - start)
        positions = np.arange(start, start + self.batch_size, dtype=np.int64) % self.size
        tiles = permuted(positions, self.size, self.seed, epoch)
        return GlobalBatch(epoch=epoch, cursor=cursor, tiles=tiles, count=count)


def share(total: int, rank: int, size: int) -> slice:
    """A rank's contiguous part of `total` things; parts differ by at most one and leave nothing out."""
    return slice(total * rank // size, total * (rank + 1) // size)
