from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import shapely
from rasterio import Affine
from rasterio.crs import CRS

from agrivision.maps.areas import Ground, Unmeasurable, ground_of, transformer
from agrivision.maps.grid import Grid

MAJOR, FLATTENING = 6_378_137.0, 1 / 298.257223563
SQUARE_KILOMETRE = 1e6


def zone(latitude: float) -> float:
    """Square metres between the equator and a parallel, per radian of longitude: closed form."""
    e2 = FLATTENING * (2 - FLATTENING)
    e, s = math.sqrt(e2), math.sin(math.radians(latitude))
    return MAJOR**2 * (1 - e2) / 2 * (s / (1 - e2 * s * s) + math.atanh(e * s) / e)


def ground(crs: str, polygon: Any) -> Ground:
    return ground_of(CRS.from_string(crs), shapely.get_coordinates(polygon.envelope))


def area(crs: str, polygon: Any) -> float:
    return float(ground(crs, polygon).areas(np.array([polygon]))[0])


@pytest.mark.parametrize(
    ("west", "south", "east", "north"),
    [
        (10, 47, 10.01, 47.01),
        (10, 0, 12, 3),
        (-100, 80, -99, 89.9),
        (179.5, -20, 180.5, -19),
        (-180, -90, 180, 90),
        (0, 89, 360, 90),
        (350, -1, 370, 1),
    ],
)
def test_degrees_between_parallels_and_meridians_are_exact(west, south, east, north) -> None:
    exact = (zone(north) - zone(south)) * math.radians(east - west)
    assert area("EPSG:4326", shapely.box(west, south, east, north)) == pytest.approx(exact, rel=1e-9)


def square_on_the_ground(latitude: float, longitude: float) -> Any:
    """A square of one kilometre's side in an equal-area plane about its middle: its area is known."""
    text = f"+proj=laea +lat_0={latitude} +lon_0={longitude} +datum=WGS84"
    return CRS.from_string(text), shapely.box(-500, -500, 500, 500)


@pytest.mark.parametrize(("latitude", "longitude"), [(0.3, 15.2), (47, 16.9), (-33.9, 12.5), (70, 15)])
@pytest.mark.parametrize(
    "crs", ["EPSG:32633", "EPSG:3857", "EPSG:4326", "EPSG:3035", "EPSG:4258", "EPSG:25833"]
)
def test_a_known_square_has_its_hectares_in_any_projection(crs, latitude, longitude) -> None:
    plane, square = square_on_the_ground(latitude, longitude)
    system = CRS.from_string(crs)
    there = shapely.transform(shapely.segmentize(square, 10), transformer(plane, system))
    assert area(crs, there) == pytest.approx(SQUARE_KILOMETRE, rel=2e-6)


def test_another_ellipsoid_is_measured_as_itself() -> None:
    bessel = "EPSG:2056"  # Switzerland; its ellipsoid is smaller by 10⁻⁴
    plane, square = square_on_the_ground(47, 8)
    there = shapely.transform(
        shapely.segmentize(square, 10), transformer(plane, CRS.from_string(bessel))
    )
    assert area(bessel, there) == pytest.approx(SQUARE_KILOMETRE, rel=5e-5)


def test_the_plain_areas_of_the_same_square_would_not_do() -> None:
    plane, square = square_on_the_ground(47, 16.9)
    there = shapely.transform(square, transformer(plane, CRS.from_epsg(3857)))
    assert there.area > 2 * SQUARE_KILOMETRE


def test_units_of_feet_are_feet() -> None:
    feet = "EPSG:2225"  # California zone 1
    plane, square = square_on_the_ground(40, -122)
    there = shapely.transform(shapely.segmentize(square, 10), transformer(plane, CRS.from_string(feet)))
    assert area(feet, there) == pytest.approx(SQUARE_KILOMETRE, rel=2e-6)


def test_a_cap_about_the_pole_is_measured_in_a_polar_projection() -> None:
    turns = np.radians(np.linspace(0, 360, 3601))
    circle = np.column_stack([np.degrees(turns) - 180, np.full(len(turns), -85.0)])
    there = transformer(CRS.from_epsg(4326), CRS.from_epsg(3031))(circle)
    exact = (zone(90) - zone(85)) * 2 * math.pi
    assert area("EPSG:3031", shapely.Polygon(there)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["site",UNIT["metre",1]]', "EPSG:4978"])
def test_nobody_knows_hectares_without_a_place_on_the_earth(crs) -> None:
    system = None if crs is None else CRS.from_user_input(crs)
    with pytest.raises(Unmeasurable, match="nobody knows hectares"):
        ground_of(system, np.array([[0.0, 0.0], [1.0, 1.0]]))


def test_more_than_half_of_the_earth_in_metres_is_one_line() -> None:
    world = np.array([[-2.0e7, -2.0e7], [2.0e7, 2.0e7]])
    with pytest.raises(Unmeasurable, match="half of the Earth"):
        ground_of(CRS.from_epsg(3857), world)


@pytest.mark.parametrize(
    ("crs", "transform", "shape"),
    [
        ("EPSG:32633", Affine(10, 0, 400_000, 0, -10, 5_600_000), (700, 900)),
        ("EPSG:32633", Affine(0.05, 0.01, 400_000, 0.01, -0.05, 5_600_000), (70, 90)),
        ("EPSG:4326", Affine(0.01, 0, 14, 0, -0.01, 70), (300, 400)),
        ("EPSG:3857", Affine(200, 30, 1_500_000, 20, -200, 8_000_000), (700, 900)),
        ("EPSG:4326", Affine(5, 0, -180, 0, -5, 90), (36, 72)),
    ],
)
def test_pixels_add_up_to_the_scene_and_any_part_of_it(crs, transform, shape) -> None:
    height, width = shape
    grid = Grid(height=height, width=width, crs=CRS.from_string(crs), transform=transform)
    whole = grid.hectares((0, height), (0, width))
    assert whole.shape == shape
    for rows, columns in (
        ((0, height), (0, width)),
        ((5, 20), (7, 11)),
        ((height - 1, height), (0, 1)),
    ):
        box = shapely.box(columns[0], rows[0], columns[1], rows[1])
        measured = grid.ground.areas(np.array([shapely.transform(box, grid.world)]))[0] / 10_000
        assert whole[slice(*rows), slice(*columns)].sum() == pytest.approx(measured, rel=1e-5)
        np.testing.assert_array_equal(
            grid.hectares(rows, columns), whole[slice(*rows), slice(*columns)]
        )
