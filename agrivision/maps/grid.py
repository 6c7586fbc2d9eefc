"""Where the pixels of a map lie, and how many hectares each has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import Affine
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.transform import GCPTransformer

from agrivision.data.sources.rasters import opened
from agrivision.data.sources.source import Flaw
from agrivision.errors import SourceError
from agrivision.maps.areas import SQUARE_METRES, Ground, ground_of

_CELL = 2000.0  # metres; over such a distance the size of a pixel changes as good as linearly
_CELLS = 128  # along a side at most
_STRIP = 1 << 22  # pixels

Span = tuple[int, int]  # of rows or columns, end excluded


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The pixels of a raster.

    With ground control points instead of a transform, pixels lie where GDAL's polynomial through the
    points puts them, as they do in QGIS. A raster that has neither lies in a plane of pixels with its
    rows downwards from 0, where QGIS shows it too.

    Attributes:
        height: rows.
        width: columns.
        crs: of rasterio, or None.
        transform: of rasterio's, from column and row to x and y.
        points: ground control points of rasterio's, or none.
    """

    height: int
    width: int
    crs: Any
    transform: Any
    points: tuple[Any, ...] = ()

    def world(self, places: NDArray[Any]) -> NDArray[np.float64]:
        """Columns and rows (n, 2), counted from the outer corner of the first pixel → x and y."""
        columns, rows = places[:, 0].astype(np.float64), places[:, 1].astype(np.float64)
        if self.points:
            if not len(places):
                return places.astype(np.float64)
            with GCPTransformer(self.points) as transformer:
                return np.column_stack(transformer.xy(rows, columns, offset="ul"))
        a, b, c, d, e, f = tuple(self.transform)[:6]
        return np.column_stack([a * columns + b * rows + c, d * columns + e * rows + f])

    def pixels(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """The other way round: x and y (n, 2) → columns and rows."""
        if self.points:
            if not len(places):
                return places
            with GCPTransformer(self.points) as transformer:
                # np.positive leaves fractions of a pixel as they are
                rows, columns = transformer.rowcol(places[:, 0], places[:, 1], op=np.positive)
            return np.column_stack([columns, rows])
        a, b, c, d, e, f = tuple(~self.transform)[:6]
        x, y = places[:, 0], places[:, 1]
        return np.column_stack([a * x + b * y + c, d * x + e * y + f])

    @cached_property
    def ground(self) -> Ground:
        """What measures polygons on it.

        Raises:
            Unmeasurable: nobody knows hectares there.
        """
        right, low = self.width, self.height
        middle, half = right / 2, low / 2
        corners = [
            (0, 0),
            (middle, 0),
            (right, 0),
            (right, half),
            (right, low),
            (middle, low),
            (0, low),
        ]
        return ground_of(self.crs, self.world(np.array([*corners, (0, half)])))

    @cached_property
    def _cells(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Middles of cells, rows and columns in pixels, and the hectares of a pixel in each cell."""
        whole = self._measure([0, self.height], [0, self.width])
        side = float(np.sqrt(whole[0, 0] * SQUARE_METRES)) or 1.0
        rows, columns = (_cuts(length, side) for length in (self.height, self.width))
        hectares = self._measure(rows, columns)
        return (rows[1:] + rows[:-1]) / 2, (columns[1:] + columns[:-1]) / 2, hectares

    def _measure(self, rows: Any, columns: Any) -> NDArray[np.float64]:
        """Hectares of a pixel, as the mean over each of the cells between these rows and columns."""
        rows, columns = np.asarray(rows), np.asarray(columns)
        top, left = (axis.ravel() for axis in np.meshgrid(rows[:-1], columns[:-1], indexing="ij"))
        low, right = (axis.ravel() for axis in np.meshgrid(rows[1:], columns[1:], indexing="ij"))
        boxes = shapely.transform(shapely.box(left, top, right, low), self.world)
        hectares: NDArray[np.float64] = self.ground.areas(boxes) / ((low - top) * (right - left))
        return hectares.reshape(len(rows) - 1, len(columns) - 1) / SQUARE_METRES

    def hectares(self, rows: Span, columns: Span) -> NDArray[np.float64]:
        """Hectares of each pixel of a window.

        Returns:
            float64 (height, width) of the window.

        Raises:
            Unmeasurable: nobody knows hectares there.
        """
        middles, across, hectares = self._cells
        some = _between(hectares, middles, np.arange(*rows) + 0.5)
        return _between(some.T, across, np.arange(*columns) + 0.5).T


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """Open a finished map with rasterio; what GDAL refuses of it within the block is one line.

    Raises:
        SourceError: it cannot be read, or is no map: one band of uint8.
    """
    try:
        with opened(path) as dataset:
            if dataset.count != 1 or dataset.dtypes[0] != "uint8":
                raise SourceError(f"{path} is no map: one band of uint8 belongs there")
            yield dataset
    except Flaw as flaw:
        raise SourceError(str(flaw)) from None
    except RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise SourceError(f"{path}: cannot be read ({reason})") from None


def strips(dataset: Any) -> Iterator[Span]:
    """Rows of a raster, some at a time, from the top down: about four megapixels."""
    step = max(1, _STRIP // dataset.width)
    for top in range(0, dataset.height, step):
        yield top, min(top + step, dataset.height)


def grid_of(dataset: Any) -> Grid:
    """The grid of an open raster of rasterio."""
    points, system = dataset.gcps
    placed = not dataset.transform.is_identity
    if not placed and _is_solvable(points):
        return Grid(
            height=dataset.height,
            width=dataset.width,
            crs=system or None,
            transform=dataset.transform,
            points=tuple(points),
        )
    down = Affine(1, 0, 0, 0, -1, 0)
    transform = dataset.transform if placed else down
    crs = dataset.crs if placed else None  # that alone does not say where
    return Grid(height=dataset.height, width=dataset.width, crs=crs or None, transform=transform)


def _is_solvable(points: list[Any]) -> bool:
    """Whether a polynomial goes through ground control points: not with too few, or on one line."""
    try:
        with GCPTransformer(points):
            return bool(points)
    except (RasterioError, CPLE_BaseError, ValueError):
        return False


def _cuts(length: int, side: float) -> NDArray[np.int64]:
    count = min(length, _CELLS, max(1, round(length * side / _CELL)))
    return np.linspace(0, length, count + 1).round().astype(np.int64)


def _between(
    values: NDArray[np.float64], places: NDArray[np.float64], wanted: NDArray[Any]
) -> NDArray[np.float64]:
    """Values at the wanted places along the first axis, linearly from those at the places around."""
    if len(places) == 1:
        return np.repeat(values, len(wanted), axis=0)
    after = np.searchsorted(places, wanted).clip(1, len(places) - 1)
    share = ((wanted - places[after - 1]) / (places[after] - places[after - 1]))[:, None]
    between: NDArray[np.float64] = values[after - 1] * (1 - share) + values[after] * share
    return between
