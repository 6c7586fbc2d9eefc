"""A map of class ids → polygons with hectares, for a GIS."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray

from agrivision.errors import BadInput, SourceError
from agrivision.maps.areas import SQUARE_METRES, Unmeasurable
from agrivision.maps.geojson import write_geojson
from agrivision.maps.geopackage import write_geopackage
from agrivision.maps.grid import Grid, grid_of, reading
from agrivision.maps.hectares import VALUES, check_values
from agrivision.maps.layer import VectorLayer
from agrivision.maps.legend import NODATA, Legend
from agrivision.maps.sieve import changed, merged
from agrivision.maps.style import polygon_style
from agrivision.maps.tracing import Outlines, pixels, sums, trace, with_nodes

LAYER = "anomalies"
BACKGROUND = 0  # class id of what is no anomaly
_SURE = 255  # value of a confidence layer that stands for a probability of 1


@dataclass(frozen=True, kw_only=True)
class PolygonOptions:
    """What becomes a polygon, and how fine it is.

    Attributes:
        include: ids of the classes that become polygons; None takes all but the background.
        sieve: areas of fewer square metres on the ellipsoid become a part of their largest neighbour; 0
            leaves all.
        sieve_pixels: the same by the number of pixels.
        simplify: outlines may move by about so much, in units of the scene's coordinate system (the
            square root of the area that a vertex may cut off); neighbours keep one line. 0 leaves them
            along the pixels.
    """

    include: tuple[int, ...] | None = None
    sieve: float = 0.0
    sieve_pixels: int = 0
    simplify: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInput: one of them cannot be.
        """
        for name in ("sieve", "sieve_pixels", "simplify"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise BadInput(f"polygons.{name} is {value}: 0 or a positive number belongs there")
        if self.sieve and self.sieve_pixels:
            raise BadInput("polygons.sieve and polygons.sieve_pixels say the same: give one of them")


@dataclass(frozen=True, kw_only=True)
class PolygonSummary:
    """What was written.

    Attributes:
        polygons: number.
        hectares: sum; None where nobody knows.
        why_no_hectares: in words where nobody knows, else empty.
    """

    polygons: int
    hectares: float | None
    why_no_hectares: str


def write_polygons(
    ids: Path,
    legend: Legend,
    scene: str,
    *,
    geopackage: Path | None = None,
    geojson: Path | None = None,
    confidence: Path | None = None,
    options: PolygonOptions | None = None,
) -> PolygonSummary:
    """Write the areas of a map as polygons, one layer of the same polygons in each file.

    Pixels of one class that touch by their sides are one polygon. Each has the columns class_id, class,
    hectares (on the ellipsoid, of the polygon as it is written), confidence (mean over its pixels, 0 to
    1) and scene; a number that nobody knows is null. Memory grows with the outlines, not with the map.

    Args:
        ids: finished map, `STEM.tif`.
        legend: of the map.
        scene: name for the last column.
        geopackage: `STEM.gpkg`, in the map's coordinate system, with its style inside; or None.
        geojson: `STEM.geojson`, in degrees; or None.
        confidence: `STEM.confidence.tif` of the same scene, or None.
        options: which polygons; absent, all but the background's, along the pixels.

    Raises:
        SourceError: a map cannot be read, is none or not of this legend; or square metres or degrees
            are asked for where nobody knows them.
        BadInput: a class to be included is none.
        StorageError, NotWritable: the disk refused.
    """
    options = options or PolygonOptions()
    skip = _left_out(legend, options)
    with reading(ids) as dataset:
        grid = grid_of(dataset)
        beside = (geopackage or geojson or ids).with_name(f".{ids.stem}.{os.getpid()}.part.tif")
        with _sieved(dataset, grid, options, beside) as sieved:
            outlines = with_nodes(trace(rasterio.band(sieved, 1), skip))
    check_values(np.bincount(outlines.values, minlength=VALUES), legend, ids)
    polygons = outlines.polygons(grid.world(outlines.vertices))
    if options.simplify:
        polygons = shapely.coverage_simplify(polygons, options.simplify)
    hectares, why_not = _hectares(grid, polygons)
    layer = VectorLayer(
        name=LAYER,
        polygons=shapely.orient_polygons(polygons),
        class_ids=outlines.values,
        classes=legend.classes,
        hectares=hectares,
        confidence=_confidence(outlines, confidence, grid),
        scene=scene,
    )
    if geopackage is not None:
        write_geopackage(geopackage, layer, grid.crs, polygon_style(legend))
    if geojson is not None:
        write_geojson(geojson, layer, grid)
    total = None if why_not else float(np.nansum(hectares))
    return PolygonSummary(polygons=len(polygons), hectares=total, why_no_hectares=why_not)


def _left_out(legend: Legend, options: PolygonOptions) -> frozenset[int]:
    """Values of a map that become no polygons."""
    classes = frozenset(range(len(legend.classes)))
    wanted = classes - {BACKGROUND} if options.include is None else frozenset(options.include)
    if not wanted <= classes:
        raise BadInput(
            f"polygons.include has {min(wanted - classes)}: the classes are 0 to {max(classes)}"
        )
    return (classes - wanted) | {NODATA}


@contextmanager
def _sieved(dataset: Any, grid: Grid, options: PolygonOptions, beside: Path) -> Iterator[Any]:
    """The map without its small areas."""
    if not options.sieve and not options.sieve_pixels:
        yield dataset
        return
    outlines = with_nodes(trace(rasterio.band(dataset, 1), [NODATA]))
    if options.sieve:
        sizes: NDArray[Any] = grid.ground.areas(outlines.polygons(grid.world(outlines.vertices)))
    else:
        sizes = pixels(outlines)
    values = merged(outlines, sizes, options.sieve or options.sieve_pixels)
    if np.array_equal(values, outlines.values):
        yield dataset
        return
    with changed(dataset, outlines, values, beside) as copy:
        del outlines, values
        yield copy


def _hectares(grid: Grid, polygons: NDArray[Any]) -> tuple[NDArray[np.float64], str]:
    """Hectares of each polygon, or NaN and why nobody knows them."""
    try:
        return grid.ground.areas(polygons) / SQUARE_METRES, ""
    except Unmeasurable as error:
        return np.full(len(polygons), np.nan), str(error)


def _confidence(outlines: Outlines, path: Path | None, grid: Grid) -> NDArray[np.float64]:
    """Mean confidence of each area, from 0 to 1; NaN where nobody knows."""
    if path is None:
        return np.full(len(outlines.values), np.nan)
    with reading(path) as dataset:
        if (dataset.height, dataset.width) != (grid.height, grid.width):
            raise SourceError(f"{path} has another size than the map that it belongs to")
        total, known = sums(outlines, rasterio.band(dataset, 1))
    mean = np.full(len(total), np.nan)
    np.divide(total, known * _SURE, out=mean, where=known > 0)
    return mean
