"""Pixels of a scene on a coarser or finer grid over the same ground, whatever says where it has data.

GDAL's warper takes one of nodata values, mask and alpha, and does not know what the training calls
empty: it would mix that with the pixels beside it. Here a pixel is the mean of those with data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Span = tuple[int, int]  # of rows or columns, end excluded
Read = Callable[[tuple[Span, Span]], tuple[NDArray[Any], NDArray[np.bool_]]]

_SIDE = 2048  # pixels of the finer grid that are read at a time
_HALF = 0.5 - 1e-9  # of a pixel has to have data, or it has none


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Which pixels of a line make those of another line over the same ground.

    Attributes:
        indexes: in the first line, int64 (taps, pixels of the second).
        weights: of their values, float64 of that shape.
        cover: of whether they have data.
    """

    indexes: NDArray[np.int64]
    weights: NDArray[np.float64]
    cover: NDArray[np.float64]

    @classmethod
    def of(cls, source: int, target: int, span: Span) -> Taps:
        """By area where the second line is coarser, else linearly between the two nearest.

        Args:
            source: pixels of the first line.
            target: pixels of the second.
            span: those of the second that are wanted.
        """
        places = np.arange(*span)
        if source >= target:
            low, high = places * source / target, (places + 1) * source / target
            most = math.ceil(source / target) + 1
            indexes = np.floor(low).astype(np.int64) + np.arange(most)[:, None]
            weights = (np.minimum(indexes + 1, high) - np.maximum(indexes, low)).clip(0)
            weights = weights * target / source
            return cls(indexes=indexes.clip(0, source - 1), weights=weights, cover=weights)
        middle = (places + 0.5) * source / target - 0.5
        indexes = np.floor(middle).astype(np.int64) + np.arange(2)[:, None]
        share = middle - indexes[0]
        return cls(
            indexes=indexes.clip(0, source - 1),
            weights=np.stack([1 - share, share]),
            cover=np.stack([share < 1 / 2, share >= 1 / 2]).astype(np.float64),
        )

    @property
    def reach(self) -> Span:
        """What of the first line is needed."""
        return int(self.indexes.min()), int(self.indexes.max()) + 1


def resampled(
    read: Read, source: tuple[int, int], target: tuple[int, int], inside: tuple[Span, Span]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read a window of a grid through another one.

    Args:
        read: pixels (bands, rows, columns) of the grid that there is, and where they have data.
        source: its height and width.
        target: height and width of the grid that is wanted.
        inside: rows and columns that are wanted, of the latter.

    Returns:
        Pixels of the same type, and where they have data: where half of a larger pixel has, or the
        nearest of smaller ones.
    """
    pieces = []
    steps = [max(1, min(_SIDE, _SIDE * t // s)) for s, t in zip(source, target, strict=True)]
    for rows in _spans(inside[0], steps[0]):
        down = Taps.of(source[0], target[0], rows)
        across = [Taps.of(source[1], target[1], columns) for columns in _spans(inside[1], steps[1])]
        pieces.append([_piece(read, down, each) for each in across])
    found = np.concatenate([np.concatenate([p for p, _ in row], axis=2) for row in pieces], axis=1)
    return found, np.concatenate([np.concatenate([v for _, v in row], axis=1) for row in pieces])


def _spans(span: Span, step: int) -> list[Span]:
    return [(start, min(start + step, span[1])) for start in range(span[0], span[1], step)]


def _piece(read: Read, down: Taps, across: Taps) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    found, valid = read((down.reach, across.reach))
    sums = _mixed(np.where(valid, found, 0), down, across, cover=False)
    weights = _mixed(valid[None], down, across, cover=False)
    there = (_mixed(valid[None], down, across, cover=True) >= _HALF) & (weights > 0)
    means = np.divide(sums, weights, out=np.zeros_like(sums), where=there)
    if np.issubdtype(found.dtype, np.integer):
        means = np.rint(means)
    return means.astype(found.dtype), there[0]


def _mixed(values: NDArray[Any], down: Taps, across: Taps, *, cover: bool) -> NDArray[np.float64]:
    """(bands, rows, columns) of one grid → of the other."""
    rows, columns = (taps.indexes - taps.reach[0] for taps in (down, across))
    by_row, by_column = (taps.cover if cover else taps.weights for taps in (down, across))
    tall = np.zeros((values.shape[0], rows.shape[1], values.shape[2]))
    for indexes, weights in zip(rows, by_row, strict=True):
        tall += values[:, indexes] * weights[:, None]
    whole = np.zeros((*tall.shape[:2], columns.shape[1]))
    for indexes, weights in zip(columns, by_column, strict=True):
        whole += tall[:, :, indexes] * weights
    return whole
