"""What each value of a parameter of the post-processing would change, counted exactly.

A factor decides pixel by pixel: a class wins a pixel from some factor on, so that one look at each
pixel counts for all factors of the grid. A least area decides area by area: areas with their neighbours
and label sets are found once, and what becomes of them is then decided without looking at a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agrivision.inference.recorded import RecordedTile, Spill
from agrivision.maps.specks import Areas, Survey

# Factors 1/4 … 4, four to an octave, and the place of 1 among them.
FACTORS = tuple(2 ** (step / 4) for step in range(-8, 9))
UNCHANGED = FACTORS.index(1.0)
AREAS = (0, *(16 << step for step in range(9)))  # pixels, 16 … 4096
_TOGETHER = 1 << 18  # areas that are decided at once

Numbers = NDArray[np.int64]
AreasFound = tuple[Areas, Numbers, Numbers]  # see `areas_of`


def weights(places: Sequence[int]) -> NDArray[np.float32]:
    """The factors at some places of the grid, as probabilities are multiplied by them."""
    return np.array([FACTORS[place] for place in places], np.float32)


def first_wins(
    tile: RecordedTile, places: Sequence[int], class_id: int, kinds: NDArray[np.uint16], count: int
) -> Numbers:
    """From which factor on a class wins the pixels of a tile on which factors decide.

    Args:
        tile: recorded.
        places: of the factors of all classes in the grid.
        class_id: the class whose factor is looked for.
        kinds: number of each label set.
        count: of these numbers.

    Returns:
        int64 (len(FACTORS) + 1, classes, count): pixels by the first place of the grid at which the
        class wins (the last row: at none), the class that has it before, and the number of the label
        set.
    """
    classes = len(places)
    products = tile.probabilities * weights(places)[:, None]
    products[class_id] = -1
    rival = products.argmax(0) if products.size else np.zeros(0, np.int64)
    most = products[rival, np.arange(len(rival))]
    own, first = tile.probabilities[class_id], np.zeros(len(rival), np.int64)
    for factor in weights(range(len(FACTORS))):
        product = own * factor
        first += ~((product > most) | ((product == most) & (class_id < rival)))
    sets = kinds[tile.sets.ravel()[tile.places]]
    shape = (len(FACTORS) + 1, classes, count)
    cells = np.ravel_multi_index((first, rival, sets), shape)
    found: Numbers = np.bincount(cells, minlength=math.prod(shape)).astype(np.int64)
    return found.reshape(shape)


def at_each_factor(settled: Numbers, wins: Numbers, class_id: int) -> Numbers:
    """Pixels by class and label set at each factor of the grid.

    Args:
        settled: int64 (classes, sets), the pixels that no factor changes.
        wins: as from `first_wins`.
        class_id: of the same class.

    Returns:
        int64 (len(FACTORS), classes, sets).
    """
    won = wins.cumsum(0)[:-1]
    found: Numbers = settled + wins.sum(0) - won
    found[:, class_id] += won.sum(1)
    return found


class AreaCounts:
    """The areas of some tiles, and the label sets of their pixels.

    Args:
        spill: where they are kept.
        classes: number of classes.
        count: of numbers of label sets.

    Attributes:
        settled: int64 (classes, count), pixels of areas that no bound of the grid removes.
    """

    def __init__(self, spill: Spill, classes: int, count: int) -> None:
        self._spill, self._classes, self._count = spill, classes, count
        self.settled = np.zeros((classes, count), np.int64)
        self._waiting: list[tuple[Areas, Numbers]] = []
        self._numbers: list[int] = []

    @property
    def groups(self) -> range:
        """Of the areas that are decided at once; once all tiles were added."""
        return range(len(self._numbers))

    def add(self, found: AreasFound) -> None:
        """Take what `areas_of` found in a tile."""
        areas, pixels, settled = found
        self.settled += settled
        self._waiting.append((areas, pixels))
        if sum(len(each.values) for each, _ in self._waiting) >= _TOGETHER:
            self.close()

    def close(self) -> None:
        """No more tiles come."""
        if not self._waiting:
            return
        starts = np.cumsum([0, *(len(areas.values) for areas, _ in self._waiting)])
        pixels = [
            each + np.array([start, 0, 0])
            for (_, each), start in zip(self._waiting, starts, strict=False)
        ]
        areas = Areas.joined([each for each, _ in self._waiting])
        arrays = {**vars(areas), "pixels": np.concatenate(pixels)}
        self._numbers.append(self._spill.put(arrays))
        self._waiting.clear()

    def at_each_bound(self, group: int, places: Sequence[int], class_id: int | None) -> Numbers:
        """Pixels of a group by class and label set, with each bound of the grid for a class.

        Args:
            group: its number.
            places: of the bounds of all classes in the grid.
            class_id: the class whose bound is looked for; None for all classes together.

        Returns:
            int64 (len(AREAS), classes, sets), without those that are settled.
        """
        arrays = self._spill.get(self._numbers[group])
        pixels = arrays.pop("pixels")
        areas = Areas(**arrays)
        bounds = [AREAS[place] for place in places]
        found = []
        for bound in AREAS:
            if class_id is None:
                bounds = [bound] * self._classes
            else:
                bounds[class_id] = bound
            ids = areas.without_specks(bounds)[pixels[:, 0]].astype(np.int64)
            # Sums of whole numbers, which float64 holds exactly.
            counts = np.bincount(
                ids * self._count + pixels[:, 1], pixels[:, 2], minlength=self._classes * self._count
            )
            found.append(counts.astype(np.int64).reshape(self._classes, self._count))
        return np.stack(found)


def areas_of(
    ids: NDArray[np.uint8],
    sets: NDArray[np.uint16],
    kinds: NDArray[np.uint16],
    classes: int,
    count: int,
) -> AreasFound:
    """The areas of a tile.

    Args:
        ids: (height, width), `NODATA` where there is no data.
        sets: (height, width), the bits of the label sets.
        kinds: number of each label set, 0 for the empty one.
        classes: number of classes.
        count: of the numbers of label sets.

    Returns:
        The areas; int64 (n, 3) rows of an area that may go, the number of a label set, and how many
        pixels have both; and int64 (classes, count) pixels of the others.
    """
    survey = Survey()
    labels = survey.add(ids)
    areas, numbers = survey.areas()
    labels = numbers[labels]
    may_go = ~areas.stays & (areas.sizes < AREAS[-1])
    here, sets = may_go[labels], kinds[sets].astype(np.int64)
    keys, pixels = np.unique(labels[here] * count + sets[here], return_counts=True)
    there = ~here & (sets > 0)  # which leaves out what has no data
    settled = np.bincount(ids[there] * np.int64(count) + sets[there], minlength=classes * count)
    rows = np.column_stack([keys // count, keys % count, pixels]).astype(np.int64)
    return areas, rows, settled.reshape(classes, count)
