"""Square metres on the ellipsoid, whatever the coordinate system a polygon is drawn in.

A polygon's edges are straight in its own coordinate system. They are cut into short ones, and the
vertices taken into an equal-area projection of the same ellipsoid, in which the area is that of the
ground: cylindrical for degrees, where parallels and meridians stay straight, no pole is too near and
the antimeridian is a line like any other; azimuthal about the scene's middle for all else (Snyder, Map
Projections, USGS Professional Paper 1395, chapters 10 and 24).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import warp
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError

from agrivision.errors import SourceError

SQUARE_METRES = 10_000  # of a hectare
_EDGE = 100.0  # metres, of the longest edge: bent by the projection it errs by 10⁻⁶ of a field's area
_RADIUS = 6_378_137.0  # metres, of the equator; here a rough measure
_EDGES = 4096  # along a scene at most, however large it is
_MOST_VERTICES = 1 << 20  # taken into the projection at a time
_ELLIPSOID = re.compile(r'(?:SPHEROID|ELLIPSOID)\["(?:[^"]|"")*",\s*([0-9.eE+]+),\s*([0-9.eE+]+)')

Place = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # (vertices, 2) of x and y → the same


class Nowhere(ValueError):
    """A vertex has no place in another coordinate system."""


class Unmeasurable(SourceError):
    """A scene of which nobody can say how many hectares it has."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Measures polygons of one coordinate system.

    Attributes:
        crs: of rasterio; that of the polygons.
        plane: of rasterio; the equal-area projection.
        edge: longest edge, in units of `crs`.
        quarter: latitude of the north pole in units of `crs`, or infinity where it has no latitudes.
    """

    crs: Any
    plane: Any
    edge: float
    quarter: float

    def areas(self, polygons: NDArray[Any]) -> NDArray[np.float64]:
        """Square metres of each polygon; those of simple polygons, so valid ones.

        Args:
            polygons: of shapely, in `crs`.

        Returns:
            float64 of the same length; NaN where a polygon reaches beyond what the coordinate system
            can express.
        """
        areas = np.empty(len(polygons))
        counts = shapely.get_num_coordinates(polygons).cumsum()
        start = 0
        while start < len(polygons):
            done = counts[start - 1] if start else 0
            end = max(start + 1, int(np.searchsorted(counts, done + _MOST_VERTICES, "right")))
            areas[start:end] = self._areas(polygons[start:end])
            start = end
        return areas

    def _areas(self, polygons: NDArray[Any]) -> NDArray[np.float64]:
        short = shapely.segmentize(polygons, self.edge)
        try:
            flat = shapely.transform(short, self._project)
        except Nowhere:  # one of them: which?
            if len(polygons) == 1:
                return np.full(1, np.nan)
            return np.concatenate([self._areas(polygons[i : i + 1]) for i in range(len(polygons))])
        areas: NDArray[np.float64] = shapely.area(flat)
        return np.where(np.isfinite(areas), areas, np.nan)

    def _project(self, vertices: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = vertices[:, 0], np.clip(vertices[:, 1], -self.quarter, self.quarter)
        return transformer(self.crs, self.plane)(np.column_stack([x, y]))


def ground_of(crs: Any, corners: NDArray[np.float64]) -> Ground:
    """What measures polygons in and around a scene.

    Args:
        crs: of rasterio, or None.
        corners: (n, 2), x and y of the corners of the scene.

    Raises:
        Unmeasurable: there is no coordinate system, it is not one of the Earth's surface (a building
            site's, say), or the scene is more than half of the Earth in one that is not of degrees.
    """
    if crs is None:
        raise Unmeasurable(
            "without a coordinate system nobody knows hectares: assign it with gdal_edit"
        )
    text = _text(crs)
    ellipsoid = _ELLIPSOID.search(text)
    if ellipsoid is None or not (crs.is_geographic or crs.is_projected):
        raise Unmeasurable(
            f"nobody knows hectares in the system {crs}: its coordinates are not on the Earth's surface"
        )
    major, flattening = ellipsoid.groups()
    shape = f"+a={major} +rf={flattening}" if float(flattening) else f"+R={major}"
    unit = crs.units_factor[1]  # in radians or metres
    in_degrees = crs.is_geographic and "DERIVINGCONVERSION" not in text
    size = float(np.ptp(corners, axis=0).max())
    middle = (corners.min(0) + corners.max(0))[None] / 2
    try:
        longitude, latitude = transformer(crs, _system(f"+proj=longlat {shape}"))(middle)[0].tolist()
        kind = f"+proj=cea +lon_0={longitude!r} +over" if in_degrees else ""
        kind = kind or f"+proj=laea +lon_0={longitude!r} +lat_0={latitude!r}"
        plane = _system(f"{kind} {shape}")
        ground = Ground(
            crs=crs,
            plane=plane,
            edge=max(longest_edge(crs), size / _EDGES),
            quarter=math.pi / 2 / unit if in_degrees else math.inf,
        )
        whole = in_degrees or _is_near(ground, corners, float(major))
    except (RasterioError, Nowhere):
        whole = False
    if not whole:
        raise Unmeasurable(
            f"nobody knows hectares of a scene that leads beyond its system {crs}, or over more than"
            " half of the Earth: reproject it to degrees"
        )
    return ground


def longest_edge(crs: Any) -> float:
    """How long an edge may be before it is cut for another coordinate system, in units of its own."""
    return float((_EDGE / _RADIUS if crs.is_geographic else _EDGE) / crs.units_factor[1])


def transformer(source: Any, target: Any) -> Place:
    """What takes vertices (n, 2) of one coordinate system of rasterio into another.

    It raises Nowhere where one of them has no place there.
    """

    def place(vertices: NDArray[np.float64]) -> NDArray[np.float64]:
        if not len(vertices):
            return vertices
        try:
            places = np.column_stack(warp.transform(source, target, vertices[:, 0], vertices[:, 1]))
        except (RasterioError, CPLE_BaseError) as error:
            raise Nowhere(" ".join(str(error.__cause__ or error).split())) from None
        if not np.isfinite(places).all():
            raise Nowhere(f"{source} leads beyond {target}")
        return places

    return place


def _is_near(ground: Ground, corners: NDArray[np.float64], radius: float) -> bool:
    """Whether a scene lies within the hemisphere about its middle."""
    flat = ground._project(corners)
    return bool((np.hypot(flat[:, 0], flat[:, 1]) < math.sqrt(2) * radius).all())


def _system(text: str) -> Any:
    return CRS.from_string(f"{text} +no_defs")


def _text(crs: Any) -> str:
    """WKT of the first version, or of the second where the first cannot say it."""
    try:
        return str(crs.to_wkt())
    except CRSError:
        return str(crs.to_wkt(version="WKT2_2019"))
