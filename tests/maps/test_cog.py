"""Cloud Optimised GeoTIFFs: the same pixels in the same place, whatever wrote them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine
from rio_cogeo.cogeo import cog_validate

from agrivision.errors import NotWritable, StorageError
from agrivision.maps import cog
from agrivision.maps.cog import write_cog
from agrivision.maps.legend import NODATA, Legend
from tests.disks import fill, make_read_only, small_disk

LEGEND = Legend(classes=("background", 'a <b> & "c"', "мокро"))
TAGS = {"AGRIVISION_STEP": "7", "TIFFTAG_SOFTWARE": "agrivision"}
UTM = CRS.from_epsg(32615)
NORTH_UP = Affine(0.1, 0, 500000.123456789, 0, -0.1, 4.4e6 + 1 / 3)
ROTATED = Affine(0.287, 0.029, 1 / 3, 0.088, -0.096, 1e6 / 7)
POINTS = [
    GroundControlPoint(row=row, col=column, x=10 + column / 7e4, y=50 - row / 9e4)
    for row, column in ((1 / 3, 1 / 7), (0.5, 1000.123456789), (900, 1), (900, 1000))
]
# What GeoTIFF has no words for.
ROTATED_POLE = CRS.from_proj4(
    "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18 +a=6367470 +b=6367470"
)


def ids(height: int = 1100, width: int = 1300) -> NDArray[np.uint8]:
    blocks = np.random.default_rng(0).integers(0, 3, (-(-height // 20), -(-width // 20)))
    pixels = blocks.repeat(20, 0).repeat(20, 1)[:height, :width].astype(np.uint8)
    pixels[: height // 8] = NODATA
    return pixels


def write_plain(path: Path, pixels: NDArray[np.uint8], **profile: Any) -> Path:
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    count, height, width = pixels.shape
    points = profile.pop("gcps", None)
    usual = {
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "compress": "deflate",
        "dtype": "uint8",
    }
    shape = {"count": count, "height": height, "width": width}
    with rasterio.open(path, "w", driver="GTiff", **shape, **(usual | profile)) as file:
        if points:
            file.gcps = points
        file.write(pixels)
    return path


def write_map(source: Any, target: Path, **options: Any) -> Path:
    usual = {"legend": LEGEND, "tags": TAGS, "descriptions": ["class ids"], "nodata": NODATA}
    write_cog(source, target, categorical=True, **(usual | options))
    return target


@pytest.mark.parametrize(
    "place",
    [
        {"crs": UTM, "transform": NORTH_UP},
        {"crs": UTM, "transform": ROTATED},
        {"crs": UTM, "transform": Affine(0.5, 0, 3, 0, 0.5, 4)},  # south up
        {"crs": None, "transform": NORTH_UP},
        {"crs": UTM},
        {},
        {"gcps": (POINTS, CRS.from_epsg(4326))},
        {"crs": ROTATED_POLE, "transform": Affine(0.01, 0, -1, 0, -0.01, 1)},
    ],
    ids=[
        "north up",
        "rotated",
        "south up",
        "no CRS",
        "only a CRS",
        "nowhere",
        "points",
        "rotated pole",
    ],
)
def test_coordinates_are_the_same_to_the_last_digit(tmp_path: Path, place: dict[str, Any]) -> None:
    source = write_plain(tmp_path / "plain.tif", ids(), **place)
    target = write_map(source, tmp_path / "map.tif")
    with rasterio.open(source) as plain, rasterio.open(target) as finished:
        assert finished.transform == plain.transform
        assert finished.crs == plain.crs == place.get("crs")
        assert [vars(p) | {"id": ""} for p in map(copied, finished.gcps[0])] == [
            vars(p) | {"id": ""} for p in map(copied, plain.gcps[0])
        ]
        assert len(finished.gcps[0]) == len(place.get("gcps", [[]])[0])
        assert finished.gcps[1] == plain.gcps[1]
        assert (finished.read() == plain.read()).all()
    assert cog_validate(target, strict=True, quiet=True) == (True, [], [])
    assert leftovers(tmp_path) == []


def copied(point: GroundControlPoint) -> Any:
    return GroundControlPoint(row=point.row, col=point.col, x=point.x, y=point.y, z=point.z, id="")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_it_has_colours_names_tags_and_overviews_of_the_most_frequent_class(tmp_path: Path) -> None:
    pixels = np.full((1024, 1024), 2, np.uint8)
    pixels[::2, ::2] = 1  # a quarter
    pixels[:512] = NODATA
    pixels[1:512:2, ::2] = 0  # a quarter, of what else is no data
    source = write_plain(tmp_path / "plain.tif", pixels, crs=UTM, transform=NORTH_UP)
    target = write_map(source, tmp_path / "map.tif")
    with rasterio.open(target) as finished:
        assert finished.nodata == NODATA
        assert finished.descriptions == ("class ids",)
        assert finished.colorinterp[0].name == "palette"
        colors = finished.colormap(1)
        assert [colors[class_id][:3] for class_id in range(3)] == list(LEGEND.colors)
        assert colors[NODATA][3] == 0
        wanted = {f"CLASS_{class_id}": name for class_id, name in enumerate(LEGEND.classes)} | TAGS
        assert wanted.items() <= finished.tags().items()
        assert finished.profile["blockxsize"] == finished.profile["blockysize"] == 512
        assert finished.profile["compress"] == "deflate"
        assert finished.overviews(1) == [2]
        halved = finished.read(1, out_shape=(512, 512))
    assert (halved[:256] == 0).all() and (halved[256:] == 2).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "plain.tif"]


def test_overviews_of_confidence_are_means_of_what_has_data(tmp_path: Path) -> None:
    pixels = np.full((2, 1024, 1024), 100, np.uint8)
    pixels[:, ::2] = 200
    pixels[0, :512, ::2] = 0
    source = write_plain(tmp_path / "plain.tif", pixels)
    target = tmp_path / "confidence.tif"
    write_cog(source, target, categorical=False, tags={}, descriptions=["a", "b"], nodata=0)
    with rasterio.open(target) as finished:
        assert finished.descriptions == ("a", "b")
        assert finished.nodatavals == (0, 0)
        halved = finished.read(out_shape=(2, 512, 512))
        assert (finished.read() == pixels).all()
    assert (halved == 150).all()  # with zeros counted, the first quarter would be 75
    assert cog_validate(target, strict=True, quiet=True) == (True, [], [])


def test_same_pixels_give_the_same_bytes(tmp_path: Path) -> None:
    """However the source was stored, and whatever memory and threads there are."""
    plain = write_plain(tmp_path / "a.tif", ids(), crs=UTM, transform=ROTATED)
    other = write_plain(
        tmp_path / "b.tif", ids(), crs=UTM, transform=ROTATED, blockxsize=256, compress="lzw"
    )
    first = write_map(plain, tmp_path / "1.tif").read_bytes()
    assert write_map(other, tmp_path / "2.tif", threads=3).read_bytes() == first
    with rasterio.Env(GDAL_CACHEMAX=1, GDAL_NUM_THREADS="ALL_CPUS"), rasterio.open(plain) as dataset:
        assert write_map(dataset, tmp_path / "3.tif", threads=2).read_bytes() == first
    before = plain.read_bytes()
    write_map(plain, tmp_path / "1.tif")  # again, over itself
    assert (tmp_path / "1.tif").read_bytes() == first
    assert plain.read_bytes() == before


def test_strange_text_in_tags_and_names_comes_back_as_one_line(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "plain & <x> 'é'.tif", ids(64, 64))
    target = tmp_path / "map & <x> 'é'.tif"
    write_map(source, target, tags={"A": "x\ny\0z & <é> \udcff"}, descriptions=["1\n2"])
    with rasterio.open(target) as finished:
        assert finished.tags()["A"] == "x y\\x00z & <é> \\udcff"
        assert finished.descriptions == ("1 2",)


def test_notes_of_an_older_map_are_not_taken_for_the_new_one(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "plain.tif", ids(64, 64))
    target = write_map(source, tmp_path / "map.tif")
    note = tmp_path / "map.tif.aux.xml"
    note.write_text('<PAMDataset><Metadata><MDI key="OLD">1</MDI></Metadata></PAMDataset>')
    write_map(source, target)
    assert not note.exists()


def test_a_full_disk_is_one_line_and_leaves_the_older_map(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 3, (1100, 1300)).astype(np.uint8)
    source = write_plain(tmp_path / "plain.tif", noise)
    small = write_plain(tmp_path / "small.tif", ids(64, 64))
    with small_disk(tmp_path / "disk") as disk:
        target = write_map(small, disk / "map.tif")
        before = target.read_bytes()
        for leave in (200_000, 20_000, 0):
            fill(disk, leave)
            with pytest.raises(StorageError, match=r"cannot write .*map\.tif: .*disk full") as caught:
                write_map(source, target)
            assert "\n" not in str(caught.value)
            assert target.read_bytes() == before
            assert leftovers(disk) == []
            (disk / "filler").unlink()


def test_every_size_of_disk_gives_a_whole_map_or_an_error(tmp_path: Path) -> None:
    """The space may end in the overviews, in the pixels or in the last bytes."""
    source = write_plain(tmp_path / "plain.tif", ids(), crs=UTM, transform=NORTH_UP)
    whole = write_map(source, tmp_path / "whole.tif").read_bytes()
    outcomes = set()
    with small_disk(tmp_path / "disk") as disk:
        for leave in range(4096, 3 * len(whole), 8192):
            fill(disk, leave)
            try:
                assert write_map(source, disk / "map.tif").read_bytes() == whole
                outcomes.add("whole")
            except StorageError:
                outcomes.add("refused")
            (disk / "map.tif").unlink(missing_ok=True)
            (disk / "filler").unlink()
    assert outcomes == {"whole", "refused"}


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    source = write_plain(tmp_path / "plain.tif", ids(64, 64))
    with pytest.raises(NotWritable, match=r"nowhere/map\.tif: No such file"):
        write_map(source, tmp_path / "nowhere" / "map.tif")
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        with pytest.raises(NotWritable, match="Read-only"):
            write_map(source, disk / "map.tif")


@pytest.mark.parametrize("damage", ["pixels", "place", "cut"])
def test_what_reads_back_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    source = write_plain(tmp_path / "plain.tif", ids(), crs=UTM, transform=NORTH_UP)
    with damaging(monkeypatch, damage), pytest.raises(StorageError, match="it is not whole"):
        write_map(source, tmp_path / "map.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.tif"]


@contextmanager
def damaging(monkeypatch: pytest.MonkeyPatch, damage: str) -> Iterator[None]:
    """Spoil each file between its writing and its reading."""
    copy = cog._copy

    def spoiled(source: Any, target: Any, **options: Any) -> None:
        copy(source, target, **options)
        if options["driver"] == "COG" and damage == "cut":
            os.truncate(target, target.stat().st_size - 4096)
        elif options["driver"] == "COG":
            with rasterio.open(target, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
                if damage == "pixels":
                    file.write(np.ones((1, 1), np.uint8), 1, window=((1099, 1100), (1299, 1300)))
                else:
                    file.transform = ROTATED

    monkeypatch.setattr(cog, "_copy", spoiled)
    yield
