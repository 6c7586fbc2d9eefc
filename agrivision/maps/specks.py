"""Areas of a map that are too small for their class become a part of what surrounds them.

Each takes the class of its largest neighbour that stays; one that has only small neighbours waits until
one of these has a class. An area that touches the edge of the map, or pixels without data, is cut there
and may be larger than what is seen of it: it stays. Pixels touch by their sides, as in polygons.

This is about pixels, and each class has its own bound; `sieve` is about polygons and square metres.
GDAL's sieve knows one bound for all classes and no edges, and what each bound would change, by which
bounds are chosen, cannot be had from it.

A map is looked at strip by strip. Areas are numbered by their first pixels, row by row, so that what
becomes of them does not depend on the strips.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.maps.legend import NODATA

_VALUES = 256  # of a byte

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Areas:
    """The areas of a map, in the order of their first pixels.

    Attributes:
        values: uint8 by area, its class id, or `NODATA`.
        sizes: int64 by area, its pixels.
        stays: bool by area, whether it is cut, or no data.
        areas: int64, an area that may go, once for each of its neighbours, in order.
        neighbours: int64, these neighbours, the largest of an area first.
    """

    values: NDArray[np.uint8]
    sizes: Numbers
    stays: NDArray[np.bool_]
    areas: Numbers
    neighbours: Numbers

    @classmethod
    def joined(cls, parts: Sequence[Areas]) -> Areas:
        """The areas of several maps, as if they stood far apart on one."""
        starts = np.cumsum([0, *(len(part.values) for part in parts)])[:-1]
        pairs = list(zip(parts, starts, strict=True))
        return cls(
            values=np.concatenate([part.values for part in parts]),
            sizes=np.concatenate([part.sizes for part in parts]),
            stays=np.concatenate([part.stays for part in parts]),
            areas=np.concatenate([part.areas + start for part, start in pairs]),
            neighbours=np.concatenate([part.neighbours + start for part, start in pairs]),
        )

    def without_specks(self, least: Sequence[int]) -> NDArray[np.uint8]:
        """The class of each area once the small ones are gone.

        Args:
            least: pixels that an area must have to stay, by class id.

        Returns:
            uint8 by area; none of the areas that then touch one another in a class is small, but for
            those that no area surrounds that stays.
        """
        bounds = np.zeros(_VALUES, np.int64)
        bounds[: len(least)] = least
        values = self.values.copy()
        known = self.stays | (self.sizes >= bounds[self.values])
        areas, neighbours = self.areas, self.neighbours
        while True:
            left = ~known[areas]
            areas, neighbours = areas[left], neighbours[left]
            ready = known[neighbours]
            found, first = np.unique(areas[ready], return_index=True)
            if not len(found):
                return values
            values[found] = values[neighbours[ready][first]]
            known[found] = True


@dataclass(frozen=True)
class _Strip:
    """Some rows of a map.

    Attributes:
        labels: int64 (rows, columns), the area of each pixel, in the order of their first pixels.
        values: uint8 by area.
        sizes: int64 by area.
        pairs: int64 (n, 2), areas that touch, of different values.
    """

    labels: Numbers
    values: NDArray[np.uint8]
    sizes: Numbers
    pairs: Numbers


class Survey:
    """Finds the areas of a map that comes strip by strip, from the top down."""

    def __init__(self) -> None:
        self._count = 0
        self._values: list[NDArray[np.uint8]] = []
        self._sizes: list[Numbers] = []
        self._pairs: list[Numbers] = []
        self._same: list[Numbers] = []
        self._cut: list[Numbers] = []
        self._below: tuple[NDArray[np.uint8], Numbers] | None = None

    def add(self, ids: NDArray[np.uint8]) -> Numbers:
        """Take the next rows.

        Args:
            ids: (rows, columns) class ids, `NODATA` where there is no data.

        Returns:
            (rows, columns), for `areas` to say which area a pixel belongs to.
        """
        strip = _look(ids)
        labels = strip.labels + self._count
        if self._below is None:
            self._cut.append(np.unique(labels[0]))
        else:
            above, numbers = self._below
            pairs = np.column_stack([numbers, labels[0]])
            alike = above == ids[0]
            self._same.append(_unique(pairs[alike]))
            self._pairs.append(_unique(pairs[~alike]))
        self._cut.append(np.unique(labels[:, [0, -1]]))
        self._values.append(strip.values)
        self._sizes.append(strip.sizes)
        self._pairs.append(strip.pairs + self._count)
        self._count += len(strip.values)
        self._below = ids[-1].copy(), labels[-1]
        return labels

    def areas(self) -> tuple[Areas, Numbers]:
        """What was found, once all rows are there.

        Returns:
            The areas, and the area of each number that `add` gave.
        """
        assert self._below is not None
        same = np.concatenate([np.empty((0, 2), np.int64), *self._same])
        roots, numbers = np.unique(_roots(self._count, same), return_inverse=True)
        values = np.concatenate(self._values)[roots]
        sizes = np.zeros(len(roots), np.int64)
        np.add.at(sizes, numbers, np.concatenate(self._sizes))
        stays = values == NODATA
        stays[numbers[np.concatenate([*self._cut, np.unique(self._below[1])])]] = True
        pairs = numbers[np.concatenate(self._pairs)]
        for one, other in ((0, 1), (1, 0)):
            stays[pairs[values[pairs[:, one]] == NODATA, other]] = True
        pairs = np.concatenate([pairs, pairs[:, ::-1]])
        pairs = _unique(pairs[~stays[pairs[:, 0]]])
        order = np.lexsort((pairs[:, 1], -sizes[pairs[:, 1]], pairs[:, 0]))
        areas, neighbours = np.ascontiguousarray(pairs[order].T)
        found = Areas(values=values, sizes=sizes, stays=stays, areas=areas, neighbours=neighbours)
        return found, numbers


def without_specks(ids: NDArray[np.uint8], least: Sequence[int]) -> NDArray[np.uint8]:
    """A map without its small areas.

    Args:
        ids: (rows, columns) class ids, `NODATA` where there is no data.
        least: pixels that an area must have to stay, by class id.

    Returns:
        The same where there is nothing to remove.
    """
    if not ids.size or not any(least):
        return ids
    survey = Survey()
    labels = survey.add(ids)
    areas, numbers = survey.areas()
    return areas.without_specks(least)[numbers][labels]


def strips_without_specks(
    strips: Iterable[NDArray[np.uint8]], again: Iterable[NDArray[np.uint8]], least: Sequence[int]
) -> Iterable[NDArray[np.uint8]]:
    """The same for a map that is larger than memory, in strips of any heights.

    Args:
        strips: rows of the map, from the top down.
        again: the same strips; each is taken when the one before has been given back.
        least: pixels that an area must have to stay, by class id.

    Yields:
        The strips without small areas.
    """
    survey = Survey()
    for strip in strips:
        survey.add(strip)
    areas, numbers = survey.areas()
    values = areas.without_specks(least)[numbers]
    start = 0
    for strip in again:
        found = _look(strip)
        yield values[start + found.labels]
        start += len(found.values)


def _look(ids: NDArray[np.uint8]) -> _Strip:
    """The areas within some rows: runs of equal pixels, joined where two rows touch."""
    begins = np.ones(ids.shape, np.bool_)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    runs = (np.cumsum(begins) - 1).reshape(ids.shape)
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=ids.size)
    alike = ids[1:] == ids[:-1]
    first = begins[1:] | begins[:-1]  # two runs of two rows meet once
    joins = np.column_stack([runs[:-1][alike & first], runs[1:][alike & first]])
    roots, labels = np.unique(_roots(len(starts), joins), return_inverse=True)
    sizes = np.zeros(len(roots), np.int64)
    np.add.at(sizes, labels, lengths)
    differ = ~alike & first
    inner = begins[:, 1:]
    pairs = np.concatenate(
        [
            np.column_stack([runs[:-1][differ], runs[1:][differ]]),
            np.column_stack([runs[:, :-1][inner], runs[:, 1:][inner]]),
        ]
    )
    return _Strip(labels[runs], ids.ravel()[starts[roots]], sizes, _unique(labels[pairs]))


def _unique(pairs: Numbers) -> Numbers:
    """Each pair once, in order."""
    if not len(pairs):
        return pairs
    base = int(pairs.max()) + 1
    keys = np.unique(pairs[:, 0] * base + pairs[:, 1])
    return np.column_stack([keys // base, keys % base])


def _roots(count: int, joins: NDArray[Any]) -> Numbers:
    """The smallest number that each number is joined with, directly or by way of others.

    Args:
        count: of the numbers, from 0.
        joins: (n, 2), numbers that belong together.
    """
    roots = np.arange(count)
    left = joins
    while len(left):
        left = roots[left]
        left = left[left[:, 0] != left[:, 1]]
        # Each root is hung below a smaller one, so that there are no circles; the next round joins
        # what another pair of the same root was to be joined with.
        roots[left.max(1)] = left.min(1) if len(left) else 0
        while not np.array_equal(shorter := roots[roots], roots):
            roots = shorter
    return roots
