"""STAC items: valid, the same for the same files, honest about place and time."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import rasterio.warp
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.validation import JsonSchemaSTACValidator
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine
from shapely.geometry import MultiPolygon, Point, Polygon, shape

from agrivision.maps.legend import NODATA, Legend
from agrivision.maps.stac import LAYERS, Network, stac_item, taken_at, write_stac

LEGEND = Legend(classes=("background", "Double plant", "double plant", "мокро"))
NETWORK = Network(data_fingerprint="ab" * 32, step=1200, miou=0.5)
UTM = CRS.from_epsg(32615)
NORTH_UP = Affine(0.5, 0, 500000.25, 0, -0.5, 4.6e6)


def write_map(path: Path, *, bands: int = 1, nodata: int = NODATA, **place: Any) -> Path:
    points = place.pop("gcps", None)
    shape_ = {"count": bands, "height": 200, "width": 300, "dtype": "uint8", "nodata": nodata}
    with rasterio.open(path, "w", driver="GTiff", **shape_, **place) as file:
        if points:
            file.gcps = points
        file.write(np.ones((bands, 200, 300), np.uint8))
    return path


def item_of(path: Path, **options: Any) -> dict[str, Any]:
    return stac_item(path, [path], legend=LEGEND, network=NETWORK, **options)


def checked(item: dict[str, Any]) -> pystac.Item:
    """Pystac's reading of an item that follows the specification's own schemas, which it carries."""
    JsonSchemaSTACValidator().validate_core(item, pystac.STACObjectType.ITEM, "1.1.0")
    assert json.loads(json.dumps(item, allow_nan=False)) == item
    return pystac.Item.from_dict(item, preserve_dict=True)


def test_it_says_where_and_what(tmp_path: Path) -> None:
    path = write_map(tmp_path / "north field.tif", crs=UTM, transform=NORTH_UP)
    item = item_of(path, taken=datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC))
    read = checked(item)
    assert read.id == "north field"
    assert read.datetime == datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
    grid = ProjectionExtension.ext(read)
    assert (grid.code, grid.shape) == ("EPSG:32615", [200, 300])
    assert grid.transform == [0.5, 0, 500000.25, 0, -0.5, 4.6e6]
    assert item["properties"]["gsd"] == 0.5
    assert item["properties"]["agrivision:step"] == 1200
    assert item["properties"]["agrivision:miou"] == 0.5
    footprint = shape(item["geometry"])
    assert isinstance(footprint, Polygon) and footprint.exterior.is_ccw
    west, north = rasterio.warp.transform(UTM, "EPSG:4326", [500000.25], [4.6e6])
    assert footprint.exterior.distance(Point(west[0], north[0])) < 1e-6
    assert item["bbox"] == pytest.approx(footprint.bounds, abs=1e-12)
    assert footprint.bounds[0] == pytest.approx(west[0], abs=1e-6)


def test_classes_have_words_names_and_colours(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.tif", crs=UTM, transform=NORTH_UP)
    item = item_of(path)
    band = item["assets"]["map"]["bands"][0]
    assert (band["data_type"], band["nodata"]) == ("uint8", NODATA)
    classes = band["classification:classes"]
    assert [(entry["value"], entry["name"], entry["title"]) for entry in classes] == [
        (0, "background", "background"),
        (1, "class_1", "Double plant"),
        (2, "class_2", "double plant"),
        (3, "class_3", "мокро"),
        (NODATA, "nodata", "no data"),
    ]
    assert classes[1]["color_hint"] == "E69F00"
    assert "classification:classes" not in item["properties"]
    assert ClassificationExtension.has_extension(checked(item))


def test_every_file_is_an_asset_with_its_size_and_digest(tmp_path: Path) -> None:
    place = {"crs": UTM, "transform": NORTH_UP}
    files = []
    for ending in LAYERS:
        path = tmp_path / f"a b{ending}"
        if ending.endswith(".tif"):
            many = ending == ".probabilities.tif"
            write_map(path, bands=4 if many else 1, nodata=255 if many else 0, **place)
        elif ending not in (".html", ".json"):  # they are written afterwards
            path.write_text(ending)
        files.append(path)
    item = stac_item(files[0], files, legend=LEGEND, network=NETWORK)
    read = checked(item)
    assert list(read.assets) == [layer.key for layer in LAYERS.values() if layer.key != "item"]
    by_key = {layer.key: ending for ending, layer in LAYERS.items()}
    for key, asset in read.assets.items():
        path = tmp_path / f"a b{by_key[key]}"
        assert asset.href == f"./a%20b{by_key[key]}"
        assert asset.media_type == LAYERS[by_key[key]].media_type
        about = FileExtension.ext(asset)
        if key == "page":
            assert about.size is None
            continue
        assert about.size == path.stat().st_size
        assert about.checksum == "1220" + hashlib.sha256(path.read_bytes()).hexdigest()
    bands = item["assets"]["probabilities"]["bands"]
    assert [band["name"] for band in bands] == ["background", "class_1", "class_2", "class_3"]
    assert bands[3]["description"] == "мокро"
    assert bands[0]["raster:scale"] == 1 / 254  # 255 is no data
    assert item["assets"]["confidence"]["bands"][0]["raster:scale"] == 1 / 255


def test_a_file_that_is_no_layer_is_a_mistake(tmp_path: Path) -> None:
    path = write_map(tmp_path / "map.tif")
    with pytest.raises(KeyError, match=r"\.exe"):
        stac_item(path, [path, tmp_path / "map.exe"], legend=LEGEND, network=NETWORK)


def test_same_files_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        path = write_map(folder / "map.tif", crs=UTM, transform=NORTH_UP)
        write_stac(folder / "map.json", item_of(path))
        written.append((folder / "map.json").read_bytes())
    assert written[0] == written[1]
    assert str(tmp_path).encode() not in written[0]
    assert json.loads(written[0]) == item_of(tmp_path / "a" / "map.tif")


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"transform": NORTH_UP},
        {"crs": UTM},
        {"crs": CRS.from_wkt('LOCAL_CS["a site",UNIT["metre",1]]'), "transform": NORTH_UP},
    ],
    ids=["nothing", "no CRS", "no transform", "a site's own grid"],
)
def test_a_map_that_lies_nowhere_has_no_geometry(tmp_path: Path, place: dict[str, Any]) -> None:
    item = item_of(write_map(tmp_path / "map.tif", **place))
    assert item["geometry"] is None
    assert "bbox" not in item
    assert item["properties"]["proj:shape"] == [200, 300]
    assert ("proj:transform" in item["properties"]) == ("transform" in place)
    assert item["properties"]["proj:code"] == ("EPSG:32615" if place.get("crs") == UTM else None)
    checked(item)


def test_a_system_without_a_number_is_written_out(tmp_path: Path) -> None:
    crs = CRS.from_proj4("+proj=laea +lat_0=41.3 +lon_0=-93.2 +ellps=GRS80")
    item = item_of(write_map(tmp_path / "map.tif", crs=crs, transform=Affine(2, 0, 0, 0, -2, 0)))
    assert item["properties"]["proj:code"] is None
    assert CRS.from_wkt(item["properties"]["proj:wkt2"]) == crs
    assert item["bbox"][0] == pytest.approx(-93.2, abs=1e-6)
    checked(item)


def test_control_points_say_where(tmp_path: Path) -> None:
    points = [
        GroundControlPoint(row=row, col=column, x=10 + column / 1e4, y=50 - row / 1e4)
        for row in (0, 200)
        for column in (0, 300)
    ]
    path = write_map(tmp_path / "map.tif", gcps=(points, CRS.from_epsg(4326)))
    item = item_of(path)
    assert item["bbox"] == pytest.approx([10, 49.98, 10.03, 50], abs=1e-6)
    assert item["properties"]["proj:code"] == "EPSG:4326"
    checked(item)


@pytest.mark.parametrize(
    ("west", "crs"),
    [(179.5, "EPSG:4326"), (-180.5, "EPSG:4326"), (539.5, "EPSG:4326"), (None, "EPSG:32660")],
)
def test_the_antimeridian_cuts_a_map_in_two(tmp_path: Path, west: float | None, crs: str) -> None:
    if west is None:
        easting = rasterio.warp.transform("EPSG:4326", crs, [179.5], [1.0])[0][0]
        transform = Affine(500, 0, easting, 0, -500, 1e5)
    else:
        transform = Affine(1 / 300, 0, west, 0, -1 / 200, 1)
    item = item_of(write_map(tmp_path / "map.tif", crs=crs, transform=transform))
    footprint = shape(item["geometry"])
    assert isinstance(footprint, MultiPolygon) and footprint.is_valid
    assert len(footprint.geoms) == 2
    assert all(part.exterior.is_ccw for part in footprint.geoms)
    assert all(-180 <= part.bounds[0] < part.bounds[2] <= 180 for part in footprint.geoms)
    assert item["bbox"][0] == pytest.approx(179.5, abs=0.01)
    assert item["bbox"][2] == pytest.approx(-179.5 if west else -179.15, abs=0.1)
    checked(item)


def test_a_map_around_a_pole_takes_all_longitudes(tmp_path: Path) -> None:
    transform = Affine(10000, 0, -1.5e6, 0, -10000, 1e6)
    item = item_of(write_map(tmp_path / "map.tif", crs="EPSG:3031", transform=transform))
    assert item["bbox"][0::2] == [-180, 180] and item["bbox"][1] == -90
    checked(item)


def test_nobody_knows_when(tmp_path: Path) -> None:
    properties = item_of(write_map(tmp_path / "map.tif"))["properties"]
    assert properties["datetime"] is None
    assert properties["start_datetime"] < properties["end_datetime"]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, None),
        ({"TIFFTAG_DATETIME": "2019:07:31 13:02:03"}, datetime(2019, 7, 31, 13, 2, 3, tzinfo=UTC)),
        ({"TIFFTAG_DATETIME": "0000:00:00 00:00:00"}, None),
        ({"TIFFTAG_DATETIME": "yesterday"}, None),
        ({"ACQUISITION_DATE": "2018-06-05"}, datetime(2018, 6, 5, tzinfo=UTC)),
        (
            {"EXIF_DateTimeOriginal": "2018:06:05 10:00:00", "TIFFTAG_DATETIME": "2019:07:31 13:02:03"},
            datetime(2018, 6, 5, 10, tzinfo=UTC),
        ),
        ({"ACQUISITIONDATETIME": "2018-06-05T10:00:00+02:00"}, datetime(2018, 6, 5, 8, tzinfo=UTC)),
        ({"ACQUISITIONDATETIME": "0001-01-01T00:00:00+14:00"}, None),
    ],
)
def test_tags_say_when(tmp_path: Path, tags: dict[str, str], expected: datetime | None) -> None:
    path = write_map(tmp_path / "map.tif")
    with rasterio.open(path, "r+") as file:
        file.update_tags(**tags)
    with rasterio.open(path) as file:
        taken = taken_at(file)
    assert taken == expected
    checked(item_of(path, taken=taken))
