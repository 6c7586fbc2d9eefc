"""Polygons → GeoJSON as RFC 7946 wants it, and valid.

Longitudes and latitudes of WGS 84, outer rings counterclockwise, polygons across the antimeridian cut
in two. Without a coordinate system nobody knows longitudes: the coordinates are then the scene's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from agrivision.errors import SourceError
from agrivision.maps.areas import Nowhere, transformer
from agrivision.maps.grid import Grid
from agrivision.maps.layer import Row, VectorLayer
from agrivision.storage import replacing

WGS84 = CRS.from_epsg(4326)
_DIGITS = 9  # of a degree: a tenth of a millimetre
_SOME = 10_000  # polygons at a time


class NoLongitudes(SourceError):
    """Polygons that GeoJSON cannot express."""


def write_geojson(target: Path, layer: VectorLayer, grid: Grid) -> None:
    """Write polygons as a collection of features.

    Args:
        target: file.
        layer: polygons in the grid's coordinate system, and what is known of them.
        grid: of the map.

    Raises:
        NoLongitudes: a pole lies in the scene, or it has places without longitude and latitude.
        StorageError, NotWritable: the disk refused.
    """
    with replacing(target) as file:
        file.write(
            f'{{"type":"FeatureCollection","name":{json.dumps(layer.name)},"features":['.encode()
        )
        comma = "\n"
        for text, row in zip(_geometries(target, layer.polygons, grid), layer.rows(), strict=True):
            file.write(f'{comma}{{"type":"Feature","properties":{_properties(row)},'.encode())
            file.write(f'"geometry":{text}}}'.encode())
            comma = ",\n"
        file.write(b"\n]}\n")


def _properties(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _geometries(target: Path, polygons: NDArray[Any], grid: Grid) -> Iterator[str]:
    if grid.crs is None:
        yield from map(str, shapely.to_geojson(polygons).tolist())
        return
    place, pole = transformer(grid.crs, WGS84), _pole(grid)
    if pole:
        raise NoLongitudes(
            f"cannot write {target}: the {pole} pole lies in the scene, and GeoJSON knows no polygon"
            " around it; take the GeoPackage"
        )
    try:
        middle = place(grid.world(np.array([[grid.width / 2, grid.height / 2]])))[0, 0]
        for start in range(0, len(polygons), _SOME):
            some = shapely.transform(
                polygons[start : start + _SOME], lambda vertices: _near(place(vertices), middle)
            )
            for polygon in shapely.orient_polygons(some):
                yield str(shapely.to_geojson(_within_the_world(polygon)))
    except Nowhere as error:
        raise NoLongitudes(
            f"cannot write {target}: places of the scene have no longitude and latitude ({error}); take"
            " the GeoPackage"
        ) from None


def _near(vertices: NDArray[np.float64], middle: float) -> NDArray[np.float64]:
    """Longitudes within half a turn of the scene's middle, so that no edge goes around the world."""
    turns = np.round((vertices[:, 0] - middle) / 360 * (1 - 1e-12))  # not at half a turn
    return np.column_stack([vertices[:, 0] - 360 * turns, vertices[:, 1]]).round(_DIGITS)


def _within_the_world(polygon: Any) -> Any:
    """The same, cut at the antimeridian where it goes beyond (RFC 7946, section 3.1.9)."""
    left, _, right, _ = polygon.bounds
    if left >= -180 and right <= 180:
        return polygon
    parts = []
    for turn in (-1, 0, 1):
        part = shapely.intersection(polygon, shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90))
        moved = shapely.transform(part, lambda vertices, turn=turn: vertices - (360 * turn, 0))
        parts += [
            one for one in shapely.get_parts(moved) if one.geom_type == "Polygon" and not one.is_empty
        ]
    return parts[0] if len(parts) == 1 else shapely.orient_polygons(shapely.multipolygons(parts))


def _pole(grid: Grid) -> str:
    """Which pole lies inside the scene, if any; in degrees it is a line along the edge at most."""
    if grid.crs.is_geographic:
        return ""
    for name, latitude in (("north", 90.0), ("south", -90.0)):
        try:
            place = transformer(WGS84, grid.crs)(np.array([[0.0, latitude]]))
        except Nowhere:  # the projection does not know that pole
            continue
        column, row = grid.pixels(place)[0]
        if 0 <= column <= grid.width and 0 <= row <= grid.height:
            return name
    return ""
