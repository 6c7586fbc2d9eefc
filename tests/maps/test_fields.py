from __future__ import annotations

import csv
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import shapely
from numpy.typing import NDArray
from rasterio import Affine
from rasterio.crs import CRS

from agrivision.errors import SourceError
from agrivision.maps.areas import transformer
from agrivision.maps.fields import FieldTable, write_fields
from agrivision.maps.hectares import class_hectares
from agrivision.maps.legend import NODATA
from tests.maps.made import LEGEND, UTM, patches, write_map

DRIVERS = {".gpkg": "GPKG", ".shp": "ESRI Shapefile", ".fgb": "FlatGeobuf", ".geojson": "GeoJSON"}
NORTH_WEST = (400_000, 5_600_000)  # of the map


def field(left: float, top: float, right: float, low: float) -> Any:
    """A rectangle in metres right and down from the corner of the map."""
    x, y = NORTH_WEST
    return shapely.box(x + left, y - low, x + right, y - top)


def write_layer(
    path: Path, polygons: list[Any], names: list[Any] | None = None, crs: str | None = "EPSG:32633"
) -> Path:
    own = np.array(polygons, object)
    if crs not in (None, "EPSG:32633"):
        place = transformer(CRS.from_epsg(32633), CRS.from_string(crs))
        own = shapely.transform(shapely.segmentize(own, 5), place)
    columns = [] if names is None else [np.array(names, object)]
    pyogrio.raw.write(
        path,
        shapely.to_wkb(own),
        columns,
        [] if names is None else ["Name"],
        driver=DRIVERS[path.suffix],
        geometry_type="Unknown" if path.suffix != ".shp" else "Polygon",
        crs=crs,
    )
    return path


def made(tmp_path: Path, **options: Any) -> tuple[Path, NDArray[np.uint8]]:
    ids = patches(0, (60, 80))
    return write_map(tmp_path / "s.tif", ids, **UTM | options), ids


def hectares(table: FieldTable) -> dict[tuple[str, int | None], float]:
    return {(row.field, row.class_id): row.hectares for row in table.rows}


def counted(ids: NDArray[np.uint8], polygon: Any, path: Path) -> dict[int | None, float]:
    """The same by asking of each pixel's centre whether it lies in the polygon."""
    rows, columns = np.indices(ids.shape)
    x, y = NORTH_WEST[0] + (columns + 0.5) * 10, NORTH_WEST[1] - (rows + 0.5) * 10
    inside = ids[shapely.contains_xy(polygon, x, y)]
    of_a_pixel = next(row.hectares / row.pixels for row in class_hectares(path, LEGEND) if row.pixels)
    return {
        (None if value == NODATA else value): float((inside == value).sum()) * of_a_pixel
        for value in (0, 1, 2, 3, NODATA)
    }


@pytest.mark.parametrize("suffix", DRIVERS)
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:3857"])
def test_hectares_are_those_of_the_pixels_with_their_centre_in_the_field(tmp_path, suffix, crs) -> None:
    path, ids = made(tmp_path)
    x, y = NORTH_WEST
    shapes = {
        "säge": field(3, 3, 333, 222),
        "round": shapely.Point(x + 557, y - 303).buffer(211),
        "ring": shapely.Point(x + 257, y - 303).buffer(211)
        - shapely.Point(x + 257, y - 303).buffer(90),
    }
    layer = write_layer(tmp_path / f"fields{suffix}", list(shapes.values()), list(shapes), crs)
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.fields.csv")
    assert (table.fields, table.outside, table.others) == (3, 0, 0)
    found = hectares(table)
    names = list(dict.fromkeys(name for name, _ in found))
    assert (
        sorted(names) == sorted(shapes) if suffix == ".fgb" else names == list(shapes)
    )  # it sorts them
    assert list(found) == [(name, class_id) for name in names for class_id in (0, 1, 2, 3, None)]
    for name, polygon in shapes.items():
        own = {class_id: value for (field, class_id), value in found.items() if field == name}
        assert own == pytest.approx(counted(ids, polygon, path), rel=1e-5, abs=1e-9)
        assert sum(row.share for row in table.rows if row.field == name) == pytest.approx(1)


def test_csv_is_the_table(tmp_path) -> None:
    path, _ = made(tmp_path)
    layer = write_layer(tmp_path / "fields.gpkg", [field(0, 0, 300, 300)], ['"a", b'])
    table = write_fields(path, layer, LEGEND, "sö", tmp_path / "s.fields.csv")
    with (tmp_path / "s.fields.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["scene", "field", "class_id", "class", "hectares", "share"]
    assert [row["class"] for row in rows] == [*LEGEND.classes, "no data"]
    assert [row["class_id"] for row in rows] == ["0", "1", "2", "3", ""]
    assert {(row["scene"], row["field"]) for row in rows} == {("sö", '"a", b')}
    assert [float(row["hectares"]) for row in rows] == pytest.approx(
        [r.hectares for r in table.rows], abs=1e-6
    )
    assert [float(row["share"]) for row in rows] == pytest.approx(
        [r.share for r in table.rows], abs=1e-6
    )
    before = (tmp_path / "s.fields.csv").read_bytes()
    write_fields(path, layer, LEGEND, "sö", tmp_path / "s.fields.csv")
    assert (tmp_path / "s.fields.csv").read_bytes() == before


def test_fields_tell_the_whole_map_apart(tmp_path) -> None:
    path, _ = made(tmp_path)
    strips = [field(0, top, 800, top + 150) for top in (0, 150, 300, 450)]
    layer = write_layer(tmp_path / "fields.gpkg", strips)
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert {row.field for row in table.rows} == {"1", "2", "3", "4"}
    for row in class_hectares(path, LEGEND):
        own = [r.hectares for r in table.rows if r.class_id == row.class_id]
        assert sum(own) == pytest.approx(row.hectares)


def test_overlapping_fields_each_count_and_a_field_of_several_polygons_once(tmp_path) -> None:
    path, ids = made(tmp_path)
    one, other = field(0, 0, 300, 300), field(100, 100, 500, 400)
    layer = write_layer(tmp_path / "fields.gpkg", [one, other, one, other], ["a", "b", "c", "c"])
    found = hectares(write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv"))
    for name, polygon in (("a", one), ("b", other), ("c", one | other)):
        own = {class_id: value for (field, class_id), value in found.items() if field == name}
        assert own == pytest.approx(counted(ids, polygon, path), rel=1e-6, abs=1e-9)


def test_fields_outside_are_counted_and_what_reaches_out_has_no_data(tmp_path) -> None:
    path, ids = made(tmp_path)
    shapes = [field(-300, 0, 300, 300), field(2000, 0, 2100, 50), field(-1e7, 0, -9e6, 10)]
    layer = write_layer(tmp_path / "fields.gpkg", shapes, ["half", "away", "nowhere"])
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert (table.fields, table.outside) == (1, 2)
    found = hectares(table)
    expected = counted(ids, shapes[0], path)
    assert sum(found.values()) == pytest.approx(18, rel=2e-3)
    assert found["half", None] == pytest.approx(expected[None] + 9, rel=2e-3)
    assert found["half", 1] == pytest.approx(expected[1], rel=1e-6)


def test_invalid_polygons_are_made_valid_and_other_shapes_left_out(tmp_path) -> None:
    path, ids = made(tmp_path)
    x, y = NORTH_WEST
    bow_tie = shapely.Polygon([(x, y), (x + 400, y - 400), (x + 400, y), (x, y - 400)])
    line = shapely.LineString([(x, y), (x + 9, y - 9)])
    layer = write_layer(tmp_path / "fields.gpkg", [bow_tie, line, None], ["bow", "line", "none"])
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert (table.fields, table.others) == (1, 2)
    own = {class_id: value for (_, class_id), value in hectares(table).items()}
    centres = counted(ids, shapely.make_valid(bow_tie), path)
    assert sum(own.values()) == pytest.approx(
        sum(centres.values()), rel=0.06
    )  # centres on the diagonals
    assert sum(own.values()) == pytest.approx(8, rel=0.06)


def test_fields_across_the_antimeridian_meet_the_map_on_either_side(tmp_path) -> None:
    ids = np.ones((20, 40), np.uint8)
    ids[:, 20:] = 2
    for west in (178.0, -182.0):
        place = {"crs": "EPSG:4326", "transform": Affine(0.1, 0, west, 0, -0.1, 10)}
        path = write_map(tmp_path / f"{west}.tif", ids, **place)
        shapes = [shapely.box(179, 8.5, 180, 9.5), shapely.box(-180, 8.5, -179, 9.5)]
        features = [
            {
                "type": "Feature",
                "properties": {"name": name},
                "geometry": shapely.geometry.mapping(shape),
            }
            for name, shape in zip(("west", "east"), shapes, strict=True)
        ]
        layer = tmp_path / "fields.geojson"
        layer.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        found = hectares(write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv"))
        assert found["west", 1] == pytest.approx(found["east", 2]) and found["west", 1] > 1e6
        assert sum(found.values()) == pytest.approx(2 * found["west", 1])


def test_names_come_from_the_column_asked_for(tmp_path) -> None:
    path, _ = made(tmp_path)
    layer = tmp_path / "fields.gpkg"
    polygons = np.array([field(0, 0, 100, 100), field(100, 0, 200, 100)], object)
    columns = [np.array([7, 8]), np.array(["x", None], object)]
    pyogrio.raw.write(
        layer,
        shapely.to_wkb(polygons),
        columns,
        ["number", "name"],
        driver="GPKG",
        geometry_type="Polygon",
        crs="EPSG:32633",
    )
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert list(dict.fromkeys(row.field for row in table.rows)) == ["x", "2"]
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv", name_column="number")
    assert list(dict.fromkeys(row.field for row in table.rows)) == ["7", "8"]
    with pytest.raises(SourceError, match="no column farm: it has number, name"):
        write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv", name_column="farm")
    pyogrio.raw.write(
        layer,
        shapely.to_wkb(polygons[:1]),
        [],
        [],
        layer="second",
        driver="GPKG",
        append=True,
        geometry_type="Polygon",
        crs="EPSG:32633",
    )
    with pytest.raises(SourceError, match="layers fields, second: say which"):
        write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv", layer="second").fields == 1


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_without_a_coordinate_system_it_is_one_line(tmp_path) -> None:
    path, ids = made(tmp_path)
    layer = write_layer(tmp_path / "fields.gpkg", [field(0, 0, 100, 100)], crs=None)
    with pytest.raises(SourceError, match=r"fields\.gpkg has no coordinate system"):
        write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    good = write_layer(tmp_path / "good.gpkg", [field(0, 0, 100, 100)])
    with pytest.raises(SourceError, match=r"no\.tif has no coordinate system"):
        write_fields(write_map(tmp_path / "no.tif", ids), good, LEGEND, "s", tmp_path / "s.csv")
    assert not (tmp_path / "s.csv").exists()


def collection(**more: Any) -> dict[str, Any]:
    shape = shapely.geometry.mapping(field(0, 0, 100, 100))
    feature = {"type": "Feature", "properties": None, "geometry": shape}
    return {"type": "FeatureCollection", "features": [feature]} | more


def test_geojson_of_before_the_standard_has_its_own_coordinate_system(tmp_path) -> None:
    path, _ = made(tmp_path)
    layer = tmp_path / "fields.geojson"
    system = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    layer.write_text(json.dumps(collection(crs=system)))
    table = write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert sum(row.hectares for row in table.rows) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.vrt", b"<OGRVRTDataSource/>", "must end in one of gpkg, shp, fgb, geojson, json"),
        ("a.gpkg", b"<OGRVRTDataSource/>", "is not what its name says"),
        ("a.shp", b"{}", "is not what its name says"),
        ("a.fgb", b"<wfs>", "is not what its name says"),
        ("a.gpkg", b"SQLite format 3\0 and no more", "cannot be read"),
        ("a.fgb", b"fgb\x03fgb\x00\xff\xff\xff\xff", "holds no polygons"),
        ("a.geojson", b"<OGRVRTDataSource/>", "is no GeoJSON"),
        ("a.geojson", b"[" * 100_000, "is no GeoJSON"),
        ("a.geojson", b'{"features": [1]}', "is no GeoJSON"),
        ("a.geojson", b'{"features": []}', "holds no polygons"),
        ("a.json", b'{"type": "Topology", "objects": {}}', "is no GeoJSON"),
        (
            "a.geojson",
            json.dumps(collection(crs={"type": "link", "properties": {"href": "http://x/"}})).encode(),
            "is no GeoJSON",
        ),
        (
            "a.geojson",
            json.dumps(collection(crs={"type": "name", "properties": {"name": "http://x/"}})).encode(),
            "coordinate system is not known",
        ),
        ("a.geojson", None, "a.geojson"),
        ("a.gpkg", None, "cannot be read"),
        ("b.gpkg!c.zip/a.gpkg", b"SQLite format 3\0", "GDAL does not take for a file's"),
    ],
)
def test_what_is_no_layer_is_one_line(tmp_path, name, content, line) -> None:
    path, _ = made(tmp_path)
    layer = tmp_path / name
    if content is not None:
        layer.parent.mkdir(exist_ok=True)
        layer.write_bytes(content)
    with pytest.raises(SourceError, match=line) as error:
        write_fields(path, layer, LEGEND, "s", tmp_path / "s.csv")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s.csv").exists()


def test_a_database_that_is_no_geopackage_is_one_line(tmp_path) -> None:
    path, _ = made(tmp_path)
    with sqlite3.connect(tmp_path / "a.gpkg") as database:
        database.execute("CREATE TABLE a (b)")
    with pytest.raises(SourceError, match=r"a\.gpkg"):
        write_fields(path, tmp_path / "a.gpkg", LEGEND, "s", tmp_path / "s.csv")
