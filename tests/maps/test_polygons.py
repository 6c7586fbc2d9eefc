from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rasterio import Affine, features
from rasterio.control import GroundControlPoint
from rasterio.io import MemoryFile

from agrivision.errors import BadInput, NotWritable, SourceError
from agrivision.maps.grid import grid_of
from agrivision.maps.hectares import class_hectares
from agrivision.maps.legend import NODATA
from agrivision.maps.polygons import PolygonOptions, write_polygons
from agrivision.maps.sieve import merged
from agrivision.maps.tracing import neighbours, pixels, sums, trace, with_nodes
from tests.maps.made import LEGEND, UTM, patches, write_map

ALL = PolygonOptions(include=(0, 1, 2, 3))
maps = arrays(
    np.uint8,
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    elements=st.sampled_from([0, 1, 2, 255]),
)


def traced(ids: np.ndarray, values: np.ndarray | None = None, transform: Affine | None = None) -> Any:
    """Outlines with nodes, and the sums of the values within them."""
    size = {"height": ids.shape[0], "width": ids.shape[1], "count": 1, "dtype": "uint8"}
    with MemoryFile() as memory, MemoryFile() as other:
        with memory.open(driver="GTiff", transform=transform or Affine.identity(), **size) as dataset:
            dataset.write(ids, 1)
        with other.open(driver="GTiff", **size) as dataset:
            dataset.write(ids if values is None else values, 1)
        with memory.open() as dataset, other.open() as beside:
            outlines = with_nodes(trace(rasterio.band(dataset, 1), [NODATA]))
            return outlines, sums(outlines, rasterio.band(beside, 1))


def labelled(polygons: Any, shape: tuple[int, int]) -> np.ndarray:
    """The number of the polygon at each pixel, from 1; 0 for none."""
    pairs = [(polygon, number) for number, polygon in enumerate(polygons, 1)]
    return (
        features.rasterize(pairs, out_shape=shape, dtype="int32")
        if pairs
        else np.zeros(shape, np.int32)
    )


@given(ids=maps, rotated=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_outlines_are_the_map(ids, rotated, seed) -> None:
    transform = Affine(0.3, 0.1, 4e5, 0.1, -0.3, 5e6) if rotated else Affine.identity()
    values = np.random.default_rng(seed).integers(0, 256, ids.shape).astype(np.uint8)
    outlines, (total, known) = traced(ids, values, transform)
    polygons = outlines.polygons(outlines.vertices.astype(np.float64))
    assert shapely.is_valid(polygons).all()
    assert shapely.coverage_is_valid(polygons)  # no overlaps, and the same vertices along each border
    labels = labelled(polygons, ids.shape)
    np.testing.assert_array_equal(labels > 0, ids != NODATA)
    np.testing.assert_array_equal(outlines.values[labels[labels > 0] - 1], ids[labels > 0])
    counts = np.bincount(labels.ravel(), minlength=len(polygons) + 1)[1:]
    np.testing.assert_array_equal(pixels(outlines), counts)
    np.testing.assert_array_equal(shapely.area(polygons), counts)
    for found, part in ((total, values), (known, values > 0)):
        exact = np.bincount(labels.ravel(), part.ravel(), minlength=len(polygons) + 1)[1:]
        np.testing.assert_array_equal(found, exact)


@given(ids=maps)
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_neighbours_are_those_with_a_side_in_common(ids) -> None:
    outlines, _ = traced(ids)
    labels = labelled(outlines.polygons(outlines.vertices.astype(np.float64)), ids.shape)
    expected = set()
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        apart = (one != other) & (one > 0) & (other > 0)
        expected |= set(zip(one[apart] - 1, other[apart] - 1, strict=True))
        expected |= set(zip(other[apart] - 1, one[apart] - 1, strict=True))
    begins, found = neighbours(outlines)
    owners = np.repeat(np.arange(len(outlines.values)), np.diff(begins))
    assert set(zip(owners, found, strict=True)) == expected


@given(ids=maps, least=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_after_the_sieve_only_what_has_no_neighbour_is_small(ids, least) -> None:
    outlines, _ = traced(ids)
    labels = labelled(outlines.polygons(outlines.vertices.astype(np.float64)), ids.shape)
    values = merged(outlines, pixels(outlines), least)
    sieved = np.where(labels > 0, np.append(values, NODATA)[labels - 1], NODATA)
    after, _ = traced(sieved.astype(np.uint8))
    begins, _ = neighbours(after)
    assert (np.diff(begins)[pixels(after) < least] == 0).all()
    large = pixels(outlines) >= least
    np.testing.assert_array_equal(values[large], outlines.values[large])


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_the_largest_neighbour_takes_a_small_area() -> None:
    ids = np.ones((6, 9), np.uint8)
    ids[:, 5:] = 2
    ids[2:4, 4:6] = 3  # touches both; the left one is larger
    outlines, _ = traced(ids)
    values = merged(outlines, pixels(outlines), 5)
    assert sorted(zip(outlines.values.tolist(), values.tolist(), strict=True)) == [
        (1, 1),
        (2, 2),
        (3, 1),
    ]


def read(path: Path) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    meta, _, content, columns = pyogrio.raw.read(path, layer="anomalies")
    return meta, shapely.from_wkb(content), dict(zip(meta["fields"], columns, strict=True))


def test_layer_has_each_polygon_with_its_class_hectares_confidence_and_scene(tmp_path) -> None:
    ids = patches(0, (90, 120))
    sure = np.random.default_rng(1).integers(0, 256, ids.shape).astype(np.uint8)
    sure[:20, :20] = 0  # nobody knows
    path = write_map(tmp_path / "s.tif", ids, **UTM)
    confidence = write_map(tmp_path / "s.confidence.tif", sure, **UTM | {"nodata": 0})
    summary = write_polygons(
        path, LEGEND, "sö", geopackage=tmp_path / "s.gpkg", confidence=confidence, options=ALL
    )
    meta, polygons, columns = read(tmp_path / "s.gpkg")
    assert list(meta["fields"]) == ["class_id", "class", "hectares", "confidence", "scene"]
    assert (meta["crs"], meta["geometry_type"]) == ("EPSG:32633", "Polygon")
    assert summary.polygons == len(polygons) and set(columns["scene"]) == {"sö"}
    pairs = [(polygon, number) for number, polygon in enumerate(polygons, 1)]
    labels = features.rasterize(pairs, out_shape=ids.shape, transform=UTM["transform"], dtype="int32")
    np.testing.assert_array_equal(labels > 0, ids != NODATA)
    np.testing.assert_array_equal(columns["class_id"][labels[labels > 0] - 1], ids[labels > 0])
    assert [LEGEND.classes[i] for i in columns["class_id"]] == columns["class"].tolist()
    known = sure > 0
    number = np.bincount(labels[known], minlength=len(polygons) + 1)[1:]
    total = np.bincount(labels[known], sure[known] / 255, minlength=len(polygons) + 1)[1:]
    assert (number == 0).any()
    np.testing.assert_array_equal(np.isnan(columns["confidence"]), number == 0)
    np.testing.assert_allclose(
        columns["confidence"][number > 0], (total / np.maximum(number, 1))[number > 0]
    )


def test_hectares_of_polygons_are_those_of_the_pixels(tmp_path) -> None:
    ids = patches(3, (90, 120))
    path = write_map(tmp_path / "s.tif", ids, **UTM)
    summary = write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg", options=ALL)
    _, _, columns = read(tmp_path / "s.gpkg")
    for row in class_hectares(path, LEGEND):
        own = columns["hectares"][columns["class_id"] == row.class_id]
        assert row.pixels == (ids == row.class_id).sum()
        assert row.hectares == pytest.approx(own.sum(), rel=1e-6)
        assert row.hectares == pytest.approx(row.pixels * 0.01, rel=1e-3)  # of 10 m, in a UTM zone
    assert summary.hectares == pytest.approx(columns["hectares"].sum())


def test_background_is_left_out_unless_asked_for(tmp_path) -> None:
    path = write_map(tmp_path / "s.tif", patches(0, (30, 40)), **UTM)
    write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg")
    assert set(read(tmp_path / "s.gpkg")[2]["class_id"]) == {1, 2, 3}
    only = PolygonOptions(include=(0, 2))
    write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg", options=only)
    assert set(read(tmp_path / "s.gpkg")[2]["class_id"]) == {0, 2}
    with pytest.raises(BadInput, match="include has 4"):
        write_polygons(
            path, LEGEND, "s", geopackage=tmp_path / "s.gpkg", options=PolygonOptions(include=(4,))
        )


@pytest.mark.parametrize("transform", [UTM["transform"], Affine(7, 3, 400_000, 3, -7, 5_600_000)])
def test_simplified_neighbours_keep_one_border(tmp_path, transform) -> None:
    ids = patches(0, (60, 80), side=9, share_of_nodata=0.02)
    path = write_map(tmp_path / "s.tif", ids, **UTM | {"transform": transform})
    options = PolygonOptions(include=(0, 1, 2, 3), simplify=15)
    write_polygons(path, LEGEND, "s", geopackage=tmp_path / "plain.gpkg", options=ALL)
    write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg", options=options)
    (_, plain, _), (_, polygons, columns) = read(tmp_path / "plain.gpkg"), read(tmp_path / "s.gpkg")
    assert len(polygons) == len(plain)
    assert shapely.get_num_coordinates(polygons).sum() < 0.9 * shapely.get_num_coordinates(plain).sum()
    assert shapely.is_valid(polygons).all() and shapely.coverage_is_valid(polygons)
    both = shapely.area(shapely.union_all(polygons)), shapely.area(polygons).sum()
    assert both[0] == pytest.approx(both[1], rel=1e-9)
    np.testing.assert_allclose(columns["hectares"] * 10_000, shapely.area(polygons), rtol=2e-3)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_sieved_areas_are_gone_and_nodata_stays(tmp_path) -> None:
    ids = patches(0, (60, 80), side=9, share_of_nodata=0.02)
    path = write_map(tmp_path / "s.tif", ids, **UTM)
    by_pixels, by_area = (tmp_path / name for name in ("pixels.gpkg", "area.gpkg"))
    many = PolygonOptions(include=ALL.include, sieve_pixels=20)
    same = PolygonOptions(include=ALL.include, sieve=1950.0)  # square metres; 20 pixels have 2,000
    write_polygons(path, LEGEND, "s", geopackage=by_pixels, options=many)
    write_polygons(path, LEGEND, "s", geopackage=by_area, options=same)
    _, polygons, columns = read(by_pixels)
    assert shapely.area(polygons).min() >= 2000
    assert shapely.area(polygons).sum() == (ids != NODATA).sum() * 100
    assert 0 < len(polygons) < 100 and columns["hectares"].min() > 0.195
    _, others, columns = read(by_area)
    assert columns["hectares"].min() >= 0.195
    assert shapely.area(others).sum() == shapely.area(polygons).sum()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["area.gpkg", "pixels.gpkg", "s.tif"]


def digests(folder: Path) -> list[str]:
    return [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("s.gpkg", "s.geojson")
    ]


def test_same_map_gives_the_same_bytes(tmp_path) -> None:
    path = write_map(tmp_path / "s.tif", patches(0, (60, 80)), **UTM)
    found = []
    for folder in (tmp_path / "one", tmp_path / "another"):
        folder.mkdir()
        write_polygons(path, LEGEND, "s", geopackage=folder / "s.gpkg", geojson=folder / "s.geojson")
        assert sorted(file.name for file in folder.iterdir()) == ["s.geojson", "s.gpkg"]
        found.append(digests(folder))
    assert found[0] == found[1]
    with sqlite3.connect(tmp_path / "one" / "s.gpkg") as database:
        times = database.execute("SELECT last_change FROM gpkg_contents").fetchall()
        times += database.execute("SELECT update_time FROM layer_styles").fetchall()
    assert {time for (time,) in times} == {"1970-01-01T00:00:00.000Z"}


def test_style_lies_in_the_geopackage_where_qgis_looks(tmp_path) -> None:
    path = write_map(tmp_path / "s.tif", patches(0, (30, 40)), **UTM)
    write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg")
    assert [list(row) for row in pyogrio.list_layers(tmp_path / "s.gpkg")] == [
        ["anomalies", "Polygon"],
        ["layer_styles", None],
    ]
    with sqlite3.connect(tmp_path / "s.gpkg") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = """SELECT styleQML, styleSLD FROM layer_styles WHERE f_table_schema = ''
            AND useAsDefault AND f_table_name = 'anomalies' AND f_geometry_column = 'geom'"""
        ((qml, sld),) = database.execute(query).fetchall()
        columns = database.execute("SELECT column_name FROM gpkg_geometry_columns").fetchall()
    assert 'attr="class_id"' in qml and "storm's damage" in qml and "class_id" in sld
    assert columns == [("geom",)]


def test_geojson_is_what_the_standard_wants(tmp_path) -> None:
    path = write_map(tmp_path / "s.tif", patches(0, (60, 80)), **UTM)
    write_polygons(
        path, LEGEND, "s", geopackage=tmp_path / "s.gpkg", geojson=tmp_path / "s.geojson", options=ALL
    )
    content = json.loads((tmp_path / "s.geojson").read_text())
    assert content["type"] == "FeatureCollection" and "crs" not in content
    polygons = np.array([shapely.geometry.shape(one["geometry"]) for one in content["features"]])
    assert shapely.is_valid(polygons).all() and shapely.coverage_is_valid(polygons)
    assert all(polygon.exterior.is_ccw for polygon in polygons)
    assert all(not hole.is_ccw for polygon in polygons for hole in polygon.interiors)
    _, there, columns = read(tmp_path / "s.gpkg")
    for name, values in columns.items():
        ours = [one["properties"][name] for one in content["features"]]
        expected = [None if value != value else value for value in values.tolist()]
        assert ours == expected
    back = np.array(
        rasterio.warp.transform("EPSG:4326", "EPSG:32633", *shapely.get_coordinates(polygons).T)
    )
    np.testing.assert_allclose(back.T, shapely.get_coordinates(there), atol=2e-4)


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4326", Affine(0.1, 0, 178, 0, -0.1, 10)),
        ("EPSG:4326", Affine(0.1, 0, -182, 0, -0.1, 10)),
        ("EPSG:32660", Affine(10_000, 0, 600_000, 0, -10_000, 1_000_000)),
    ],
)
def test_polygons_across_the_antimeridian_are_cut_there(tmp_path, crs, transform) -> None:
    ids = np.ones((20, 40), np.uint8)
    path = write_map(tmp_path / "s.tif", ids, crs=crs, transform=transform)
    summary = write_polygons(path, LEGEND, "s", geojson=tmp_path / "s.geojson")
    (feature,) = json.loads((tmp_path / "s.geojson").read_text())["features"]
    shape = shapely.geometry.shape(feature["geometry"])
    assert shape.geom_type == "MultiPolygon" and shape.is_valid and len(shape.geoms) == 2
    assert shape.bounds[0] == -180 and shape.bounds[2] == 180
    west, east = sorted(shape.geoms, key=lambda part: part.bounds[0])
    assert west.bounds[2] < -175 and east.bounds[0] > 175
    (row,) = [row for row in class_hectares(path, LEGEND) if row.pixels]
    assert summary.hectares == pytest.approx(row.hectares, rel=1e-4)


def test_a_scene_over_a_pole_has_no_geojson_but_the_rest(tmp_path) -> None:
    place = {"crs": "EPSG:3031", "transform": Affine(100, 0, -1000, 0, -100, 1000)}
    path = write_map(tmp_path / "s.tif", np.ones((20, 20), np.uint8), **place)
    summary = write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg")
    assert summary.hectares == pytest.approx(
        400 / 0.97276901**2, rel=1e-4
    )  # scale at the pole, squared
    with pytest.raises(SourceError, match="south pole lies in the scene"):
        write_polygons(path, LEGEND, "s", geojson=tmp_path / "s.geojson")
    assert not (tmp_path / "s.geojson").exists()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({}, (0, -20, 40, 0)),  # rows go down, as QGIS shows it
        ({"transform": Affine(2, 0, 100, 0, -2, 500)}, (100, 460, 180, 500)),
        (
            {"crs": 'LOCAL_CS["site",UNIT["metre",1]]', "transform": Affine(2, 0, 9, 0, -2, 9)},
            (9, -31, 89, 9),
        ),
    ],
)
def test_without_a_place_on_the_earth_hectares_are_null(tmp_path, options, bounds) -> None:
    path = write_map(tmp_path / "s.tif", np.ones((20, 40), np.uint8), **options)
    if "crs" in options:
        targets = {"geopackage": tmp_path / "s.gpkg"}
    else:
        targets = {"geopackage": tmp_path / "s.gpkg", "geojson": tmp_path / "s.geojson"}
    summary = write_polygons(path, LEGEND, "s", **targets)
    assert summary.hectares is None and "nobody knows hectares" in summary.why_no_hectares
    _, (polygon,), columns = read(tmp_path / "s.gpkg")
    assert polygon.bounds == bounds and np.isnan(columns["hectares"]).all()
    if "geojson" in targets:
        (feature,) = json.loads((tmp_path / "s.geojson").read_text())["features"]
        assert feature["properties"]["hectares"] is None and feature["properties"]["confidence"] is None
        assert shapely.geometry.shape(feature["geometry"]).equals(polygon)
    assert all(row.hectares is None for row in class_hectares(path, LEGEND))
    with pytest.raises(SourceError, match="nobody knows hectares"):
        write_polygons(path, LEGEND, "s", **targets, options=PolygonOptions(sieve=3))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scene_placed_by_control_points_has_its_polygons_where_the_points_say(tmp_path) -> None:
    true = Affine(10, 1, 400_000, 1, -10, 5_600_000)
    ids = patches(0, (30, 40))
    path = write_map(tmp_path / "s.tif", ids)
    points = [
        GroundControlPoint(row, col, *rasterio.transform.xy(true, row, col, offset="ul"))
        for row in (0, 30)
        for col in (0, 40)
    ]
    with rasterio.open(path, "r+") as dataset:
        dataset.gcps = (points, rasterio.CRS.from_epsg(32633))
    plain = write_map(tmp_path / "plain.tif", ids, crs="EPSG:32633", transform=true)
    for name in ("s", "plain"):
        write_polygons(tmp_path / f"{name}.tif", LEGEND, "s", geopackage=tmp_path / f"{name}.gpkg")
    (meta, ours, columns), (_, theirs, expected) = (
        read(tmp_path / "s.gpkg"),
        read(tmp_path / "plain.gpkg"),
    )
    assert meta["crs"] == "EPSG:32633"
    assert shapely.equals_exact(ours, theirs, 1e-5).all()
    np.testing.assert_allclose(columns["hectares"], expected["hectares"], rtol=1e-6)
    with rasterio.open(path) as dataset:
        grid = grid_of(dataset)
    places = np.random.default_rng(0).random((50, 2)) * 30
    np.testing.assert_allclose(grid.pixels(grid.world(places)), places, atol=1e-5)
    assert [row.hectares for row in class_hectares(path, LEGEND)] == pytest.approx(
        [row.hectares for row in class_hectares(plain, LEGEND)], rel=1e-6
    )


def test_no_polygon_is_an_empty_layer(tmp_path) -> None:
    path = write_map(tmp_path / "s.tif", np.zeros((20, 40), np.uint8), **UTM)
    summary = write_polygons(
        path,
        LEGEND,
        "s",
        geopackage=tmp_path / "s.gpkg",
        geojson=tmp_path / "s.geojson",
        options=PolygonOptions(simplify=3),
    )
    assert (summary.polygons, summary.hectares) == (0, 0)
    assert pyogrio.read_info(tmp_path / "s.gpkg", layer="anomalies")["features"] == 0
    assert json.loads((tmp_path / "s.geojson").read_text())["features"] == []


def test_what_cannot_be_is_one_line(tmp_path) -> None:
    ids = patches(0, (30, 40))
    path = write_map(tmp_path / "s.tif", np.where(ids == 3, 7, ids), **UTM)
    with pytest.raises(SourceError, match=r"holds the value 7, and its classes are 0 to 3"):
        write_polygons(path, LEGEND, "s", geopackage=tmp_path / "s.gpkg")
    with pytest.raises(SourceError, match="holds the value 7"):
        class_hectares(path, LEGEND)
    good = write_map(tmp_path / "good.tif", ids, **UTM)
    small = write_map(tmp_path / "small.tif", ids[1:], **UTM)
    with pytest.raises(SourceError, match="another size"):
        write_polygons(good, LEGEND, "s", geopackage=tmp_path / "s.gpkg", confidence=small)
    with pytest.raises(SourceError, match=r"nowhere\.tif"):
        write_polygons(tmp_path / "nowhere.tif", LEGEND, "s", geopackage=tmp_path / "s.gpkg")
    with pytest.raises(NotWritable, match="cannot write"):
        write_polygons(good, LEGEND, "s", geopackage=tmp_path / "nowhere" / "s.gpkg")
    odd = tmp_path / "a!b"
    odd.mkdir()
    with pytest.raises(NotWritable, match="something else"):
        write_polygons(good, LEGEND, "s", geopackage=odd / "s.gpkg")
    for options in ({"sieve": -1.0}, {"simplify": float("nan")}, {"sieve": 1.0, "sieve_pixels": 2}):
        with pytest.raises(BadInput, match=r"polygons\."):
            PolygonOptions(**options)
    assert sorted(file.name for file in tmp_path.glob("*")) == ["a!b", "good.tif", "s.tif", "small.tif"]
