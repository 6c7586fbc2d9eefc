"""How large a pixel of a raster is on the ground."""

from __future__ import annotations

import math
from typing import Any

from agrivision.data.parts import geodata

_EQUATOR, _POLE = 6_378_137.0, 6_356_752.314245  # metres, radii of WGS 84


def pixel_size(dataset: Any) -> tuple[float, float] | None:
    """Width and height of the pixel in the middle of a raster, in metres on the ellipsoid.

    Args:
        dataset: of rasterio; its coordinates are needed, not its pixels.

    Returns:
        None where the raster has no coordinate system, or one that leads nowhere on the Earth's face.
    """
    crs = dataset.crs
    if crs is None or not (crs.is_geographic or crs.is_projected) or dataset.transform.is_identity:
        return None
    a, b, c, d, e, f = tuple(dataset.transform)[:6]
    column, row = dataset.width / 2, dataset.height / 2
    x, y = a * column + b * row + c, d * column + e * row + f
    rasterio = geodata()
    from rasterio._err import CPLE_BaseError  # noqa: PLC0415 - as late as `geodata`

    try:
        longitudes, latitudes = rasterio.warp.transform(
            crs, "EPSG:4326", [x, x + a, x + b], [y, y + d, y + e]
        )
    except (rasterio.errors.RasterioError, CPLE_BaseError, ValueError):
        return None
    if not all(map(math.isfinite, (*longitudes, *latitudes))):
        return None
    places = list(zip(longitudes, latitudes, strict=True))
    across, down = (_distance(places[0], place) for place in places[1:])
    return (across, down) if across * down > 0 else None


def _distance(one: tuple[float, float], two: tuple[float, float]) -> float:
    """Metres between two places (longitude, latitude in degrees) that are a pixel apart.

    By the ellipsoid's radii of curvature there: exact for a distance that goes to zero.
    """
    latitude = math.radians((one[1] + two[1]) / 2)
    square = 1 - (_POLE / _EQUATOR) ** 2
    root = math.sqrt(1 - square * math.sin(latitude) ** 2)
    north = math.radians(two[1] - one[1]) * _EQUATOR * (1 - square) / root**3
    turn = (two[0] - one[0] + 180) % 360 - 180  # across the antimeridian
    east = math.radians(turn) * _EQUATOR / root * math.cos(latitude)
    return math.hypot(north, east)
