"""How many hectares of a map each class has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.errors import SourceError
from agrivision.maps.areas import Unmeasurable
from agrivision.maps.grid import Grid, grid_of, reading, strips
from agrivision.maps.legend import NODATA, Legend

VALUES = 256  # that a map can hold


@dataclass(frozen=True, kw_only=True)
class ClassHectares:
    """A class of a map.

    Attributes:
        class_id: in the map.
        name: of the class.
        pixels: number.
        hectares: on the ellipsoid; None where nobody knows.
        share: of the pixels that have a class, from 0 to 1; 0 where none has.
    """

    class_id: int
    name: str
    pixels: int
    hectares: float | None
    share: float


def class_hectares(ids: Path, legend: Legend) -> tuple[ClassHectares, ...]:
    """Hectares of each class in a map, which is read once, some rows at a time.

    Args:
        ids: finished map, `STEM.tif`.
        legend: of the map.

    Returns:
        All classes in the order of their ids, those without a pixel too.

    Raises:
        SourceError: the map cannot be read, is none or not of this legend.
    """
    counts, hectares = np.zeros(VALUES, np.int64), np.zeros(VALUES)
    with reading(ids) as dataset:
        grid = grid_of(dataset)
        known = _is_measurable(grid)
        for rows in strips(dataset):
            values = dataset.read(1, window=(rows, (0, dataset.width)))
            counts += np.bincount(values.ravel(), minlength=VALUES)
            if known:
                hectares += summed(values, grid.hectares(rows, (0, dataset.width)))
    check_values(counts, legend, ids)
    whole = max(1, int(counts[: len(legend.classes)].sum()))
    return tuple(
        ClassHectares(
            class_id=class_id,
            name=name,
            pixels=int(counts[class_id]),
            hectares=float(hectares[class_id]) if known else None,
            share=int(counts[class_id]) / whole,
        )
        for class_id, name in enumerate(legend.classes)
    )


def summed(values: NDArray[np.uint8], hectares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hectares by value, from the values of pixels and their hectares."""
    sums: NDArray[Any] = np.bincount(values.ravel(), hectares.ravel(), minlength=VALUES)
    return sums


def check_values(counts: NDArray[Any], legend: Legend, ids: Path) -> None:
    """Check that a map holds no value that is not in its legend.

    Args:
        counts: by value, 0 where the map does not hold it.
        legend: of the map.
        ids: the map.

    Raises:
        SourceError: it does.
    """
    unknown = np.flatnonzero(counts[len(legend.classes) : NODATA])
    if len(unknown):
        raise SourceError(
            f"{ids} holds the value {unknown[0] + len(legend.classes)}, and its classes are 0 to"
            f" {len(legend.classes) - 1}: it is another run's map"
        )


def _is_measurable(grid: Grid) -> bool:
    try:
        return bool(grid.ground)
    except Unmeasurable:
        return False
