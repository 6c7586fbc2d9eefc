"""Scenes as they come: odd bands, types, grids, holes and names; the right map or one clear line."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from numpy.typing import NDArray
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.shutil import copy as copy_raster
from rasterio.transform import Affine
from torch import Tensor, nn

from agrivision import cli
from agrivision.errors import (
    AgrivisionError,
    BadInput,
    ExitCode,
    NotWritable,
    SourceError,
    StorageError,
)
from agrivision.inference.predict import PredictOptions, predict
from agrivision.inference.products import Products
from agrivision.inference.resampling import Taps
from agrivision.inference.scene import Taking
from agrivision.inference.trained import TrainedModel
from tests.disks import fill, make_read_only, small_disk
from tests.inference.small import BANDS, CLASSES, smooth, write_scene

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

PLAIN = Products()
ALL = Products(confidence=True, probabilities=True, polygons=True, background=True)
METRE = Affine(1, 0, 500_000, 0, -1, 5_000_000)
RED, GREEN, BLUE, ALPHA, OTHER = (
    ColorInterp.red,
    ColorInterp.green,
    ColorInterp.blue,
    ColorInterp.alpha,
    ColorInterp.undefined,
)
MEAN = 118  # of the near-infrared in the training, see `trained_model`

Image_ = NDArray[Any]


class Brightest(nn.Module):
    """Calls each pixel by the band that is brightest there: no neighbour matters."""

    def input_size(self, output: int) -> int:
        return output

    def forward(self, images: Tensor) -> Tensor:
        return images * 100


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def image(generator: np.random.Generator) -> Image_:
    return smooth(generator, 44, 60)


def network(trained: TrainedModel, **changes: Any) -> TrainedModel:
    """One that sees pixels as they are, and calls them by their brightest band."""
    bands = len(changes.get("bands", BANDS))
    plain = {"classes": CLASSES[:bands], "mean": (0.0,) * bands, "std": (1.0,) * bands}
    about = dataclasses.replace(trained.description, **plain | changes)
    return dataclasses.replace(trained, module=Brightest(), description=about)


@pytest.fixture
def brightest(trained: TrainedModel) -> TrainedModel:
    return network(trained)


def options(products: Products = PLAIN, **changes: Any) -> PredictOptions:
    taking = {name: changes.pop(name) for name in list(changes) if name in Taking.__annotations__}
    how = {"tile": 48, "margin": 8, "batch_size": 4} | changes
    return PredictOptions(taking=Taking(**taking), products=products, **how)


def map_of(
    trained: TrainedModel, path: Path, out: Path, products: Products = PLAIN, **changes: Any
) -> NDArray[np.uint8]:
    """The class ids that are predicted of a scene."""
    summary = predict(trained, [path], out, options(products, **changes))
    with rasterio.open(summary.maps[0]) as dataset:
        ids: NDArray[np.uint8] = dataset.read(1)
        return ids


def refused(
    trained: TrainedModel,
    inputs: list[Path],
    out: Path,
    products: Products = PLAIN,
    kind: type[AgrivisionError] = BadInput,
    **changes: Any,
) -> str:
    """The one line that is said instead of a map; nothing is left."""
    with pytest.raises(kind) as error:
        predict(trained, inputs, out, options(products, **changes))
    assert error.value.exit_code == (ExitCode.BAD_INPUT if kind is BadInput else kind.exit_code)
    line = str(error.value)
    assert line == " ".join(line.split())
    assert not out.exists() or not [path for path in out.iterdir() if path.name != ".predict"]
    return line


@pytest.mark.parametrize("character", ["\x01", "\x1b"])
def test_a_name_that_gdal_cannot_write_down(
    trained: TrainedModel, image: Image_, tmp_path: Path, character: str
) -> None:
    path = write_scene(tmp_path / f"a{character}b.tif", image)
    line = refused(trained, [path], tmp_path / "maps", kind=SourceError)
    assert "a name with a control character: rename it" in line
    plain = write_scene(tmp_path / "plain.tif", image)
    out = tmp_path / f"a{character}b"
    assert "a control character" in refused(trained, [plain], out, kind=SourceError)


def coloured(path: Path, pixels: Image_, colours: list[ColorInterp], **profile: Any) -> Path:
    write_scene(path, pixels, **profile)
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = colours
    return path


def masked(path: Path, pixels: Image_, valid: NDArray[np.bool_], **profile: Any) -> Path:
    write_scene(path, pixels, **profile)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(valid)
    return path


# Bands


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (("2", "3", "4", "1"), None),
        ((" 2", "3 ", "4", "1"), None),
        (("RED", "green", "4", "nir"), ("nir", "red", "Green", "third")),
        (("2", "3", "4", "1"), ("4", "3", "2", "1")),  # numbers are places, whatever the names
    ],
)
def test_bands_as_they_are_told(
    brightest: TrainedModel, image: Image_, tmp_path: Path, told: tuple[str, ...], names: Any
) -> None:
    path = write_scene(tmp_path / "s.tif", image[[3, 0, 1, 2]], names=names)
    found = map_of(brightest, path, tmp_path / "out", bands=told)
    np.testing.assert_array_equal(found, image.argmax(0))


def test_names_of_any_letters(brightest: TrainedModel, tmp_path: Path) -> None:
    image = smooth(np.random.default_rng(1), 30, 30, bands=6)
    names = ("a,b", 'é "q"', "日本", "new\nline", "<b>&", "x" * 500)
    path = write_scene(tmp_path / "s.tif", image, names=names)
    told = ("日本", 'É "Q"', "a,b", "<b>&")
    found = map_of(brightest, path, tmp_path / "out", ALL, bands=told)
    np.testing.assert_array_equal(found, image[[2, 1, 0, 4]].argmax(0))
    assert "new line" in refused(brightest, [path], tmp_path / "no", bands=("1", "2", "3", "none"))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("1", "2", "3"), "names 3 bands"),
        (("0", "1", "2", "3"), "no band '0'"),
        (("1", "2", "3", "5"), "no band '5'"),
        (("-1", "1", "2", "3"), "no band '-1'"),
        (("1.0", "1", "2", "3"), "no band '1.0'"),
        (("", "1", "2", "3"), "no band ''"),
        (("red", "1", "2", "3"), "several bands 'red'"),
        (("1", "2", "3", "-"), "missing: nir"),
        (("-", "-", "-", "-"), "missing: red, green, blue, nir"),
    ],
)
def test_bands_that_are_not_there(
    brightest: TrainedModel, image: Image_, tmp_path: Path, told: tuple[str, ...], words: str
) -> None:
    path = write_scene(tmp_path / "s.tif", image, names=("red", "red", "", ""))
    line = refused(brightest, [path], tmp_path / "out", bands=told)
    assert words in line


@pytest.mark.parametrize(
    ("order", "colours", "names"),
    [
        ((2, 1, 0, 3), (BLUE, GREEN, RED, OTHER), None),
        ((3, 2, 1, 0), (OTHER, BLUE, GREEN, RED), None),
        ((2, 1, 0, 3), (BLUE, GREEN, RED, ALPHA), None),  # it has shades: near-infrared
        ((2, 1, 0, 3), (BLUE, GREEN, RED, OTHER), ("Band 1", "Band 2", "Band 3", "NIR")),
        ((2, 1, 0, 3), (RED, GREEN, BLUE, ALPHA), ("Blue", "Green", " red ", "nir")),
        ((2, 1, 0, 3), (RED, GREEN, BLUE, OTHER), ("blue", "green", "red", "")),
        ((1, 3, 0, 2), None, ("green", "nir", "red", "")),
        ((3, 0, 1, 2), (ColorInterp.nir, RED, GREEN, BLUE), None),
    ],
)
def test_bands_by_name_and_colour(
    brightest: TrainedModel, image: Image_, tmp_path: Path, order: Any, colours: Any, names: Any
) -> None:
    path = write_scene(tmp_path / "s.tif", image[list(order)], names=names)
    if colours:
        with rasterio.open(path, "r+") as dataset:
            dataset.colorinterp = colours
    found = map_of(brightest, path, tmp_path / "out")
    np.testing.assert_array_equal(found, image.argmax(0))


def test_more_bands_than_needed(brightest: TrainedModel, tmp_path: Path) -> None:
    image = smooth(np.random.default_rng(1), 30, 30, bands=7)
    names = ("coastal", "Blue ", "GREEN", "red", "red edge", "Nir", "swir")
    path = write_scene(tmp_path / "s.tif", image, names=names)
    found = map_of(brightest, path, tmp_path / "out")
    np.testing.assert_array_equal(found, image[[3, 2, 1, 5]].argmax(0))


@pytest.mark.parametrize(
    ("bands", "colours", "names", "words"),
    [
        (5, None, ("red", "red", "green", "blue", "nir"), "which of them is red, nobody knows"),
        (4, None, ("red", "red", "green", "blue"), "which of them is red, nobody knows"),
        (5, (RED, GREEN, BLUE, OTHER, OTHER), None, "which of them is nir, nobody knows"),
        (6, (RED, GREEN, BLUE) * 2, None, "red or green or blue"),
        (5, None, None, "5 bands of uint8"),
        (3, None, None, "missing: nir"),
        (1, None, None, "1 band of uint8"),
    ],
)
def test_bands_that_nobody_knows(
    brightest: TrainedModel, tmp_path: Path, bands: int, colours: Any, names: Any, words: str
) -> None:
    image = smooth(np.random.default_rng(1), 20, 20, bands=bands)
    path = write_scene(tmp_path / "s.tif", image, names=names)
    if colours:
        with rasterio.open(path, "r+") as dataset:
            dataset.colorinterp = colours
    line = refused(brightest, [path], tmp_path / "out")
    assert words in line
    assert "--bands" in line


def test_a_band_of_another_name_is_taken_with_a_warning(
    brightest: TrainedModel, image: Image_, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_scene(tmp_path / "s.tif", image[[2, 1, 0, 3]], names=("blue", "green", "red", "swir"))
    with caplog.at_level(logging.WARNING):
        found = map_of(brightest, path, tmp_path / "out")
    np.testing.assert_array_equal(found, image.argmax(0))
    assert "blue, green, red, swir" in caplog.text


def test_false_colours_are_not_taken_for_natural_ones(
    trained: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    """Files of three bands call them red, green and blue, near-infrared in front or not."""
    model = network(trained, bands=("nir", "red", "green"))
    path = coloured(tmp_path / "s.tif", image[:3], [RED, GREEN, BLUE])
    np.testing.assert_array_equal(map_of(model, path, tmp_path / "out"), image[:3].argmax(0))


def test_a_network_of_fewer_bands_takes_what_it_knows(
    trained: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    model = network(trained, bands=("red", "green", "blue"))
    path = coloured(tmp_path / "s.tif", image[[3, 2, 1, 0]], [OTHER, BLUE, GREEN, RED])
    np.testing.assert_array_equal(map_of(model, path, tmp_path / "out"), image[:3].argmax(0))


@pytest.mark.parametrize("kind", ["rgb", "bgr", "bgr names", "rgba", "png", "told"])
def test_missing_near_infrared(
    brightest: TrainedModel, image: Image_, tmp_path: Path, kind: str
) -> None:
    wanted = np.concatenate([image[:3], np.full((1, 44, 60), MEAN)]).argmax(0)
    order, colours = [0, 1, 2], [RED, GREEN, BLUE]
    told: tuple[str, ...] = ()
    pixels, names = image[:3], None
    if kind.startswith("bgr"):
        order, colours = [2, 1, 0], [BLUE, GREEN, RED] if kind == "bgr" else []
        names = None if colours else ("blue", "green", "red")
        pixels = image[order]
    if kind == "rgba":
        shown = np.full((1, 44, 60), 255, np.uint8)
        shown[:, :7], shown[:, 7] = 0, 90  # a soft edge
        pixels, colours = np.concatenate([pixels, shown]), [*colours, ALPHA]
        wanted[:7] = 255
    if kind == "told":
        pixels, colours, told = image[[1, 0, 3, 2]], [], ("2", "1", "4", "-")
    path = tmp_path / ("s.png" if kind == "png" else "s.tif")
    if kind == "png":
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path)
    else:
        write_scene(path, pixels, names=names)
        if colours:
            with rasterio.open(path, "r+") as dataset:
                dataset.colorinterp = colours
    assert "missing: nir" in refused(brightest, [path], tmp_path / "no", bands=told)
    found = map_of(brightest, path, tmp_path / "out", ALL, bands=told, fill_missing=True)
    np.testing.assert_array_equal(found, wanted)


def test_palettes(brightest: TrainedModel, image: Image_, tmp_path: Path) -> None:
    picture = Image.fromarray(np.ascontiguousarray(image[:3].transpose(1, 2, 0))).convert("P")
    picture.save(tmp_path / "s.png")
    line = refused(brightest, [tmp_path / "s.png"], tmp_path / "out", fill_missing=True)
    assert "palette" in line
    assert "gdal_translate -expand rgb" in line


# Types and scales


@pytest.mark.parametrize(
    "dtype", ["int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
)
def test_every_type_of_pixels(trained: TrainedModel, image: Image_, tmp_path: Path, dtype: str) -> None:
    image = (image // 2).astype(dtype)
    path, wanted = write_scene(tmp_path / "s.tif", image), image.argmax(0)
    assert f"4 bands of {dtype}" in refused(network(trained), [path], tmp_path / "no")
    np.testing.assert_array_equal(map_of(network(trained, dtype=dtype), path, tmp_path / "own"), wanted)
    np.testing.assert_array_equal(
        map_of(network(trained), path, tmp_path / "factor", scale="2"), wanted
    )
    if dtype.startswith("float"):
        line = refused(network(trained), [path], tmp_path / "no", scale="range")
        assert f"range is for integers, and this is {dtype}" in line


def test_the_whole_range_becomes_the_whole_range(
    brightest: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", image.astype(np.uint16) * 257)
    found = map_of(brightest, path, tmp_path / "out", ALL, scale="range")
    np.testing.assert_array_equal(found, image.argmax(0))


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "complex_int16"])
@pytest.mark.parametrize("scale", [None, "2", "range", "statistics"])
def test_complex_pixels_are_refused(
    brightest: TrainedModel, tmp_path: Path, dtype: str, scale: str | None
) -> None:
    path = tmp_path / "s.tif"
    profile = {"driver": "GTiff", "height": 9, "width": 9, "count": 4, "dtype": dtype}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(np.ones((4, 9, 9), np.complex64))
    assert "complex" in refused(brightest, [path], tmp_path / "out", scale=scale)


def test_statistics_make_any_units_those_of_the_training(
    trained: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    """Reflectances give the map that pixels of the training's mean and deviation give."""
    valid = np.ones(image.shape[1:], np.bool_)
    valid[:9] = False
    mean = tuple(image[:, valid].mean(1).tolist())
    std = tuple(image[:, valid].std(1).tolist())
    model = network(trained, data_mean=mean, data_std=std)
    pixels = image.astype(np.float64) / 7 * np.array([1, 2, 3, 4])[:, None, None] - 20
    pixels[:, ~valid] = -9999
    path = write_scene(tmp_path / "s.tif", pixels, nodata=-9999)
    found = map_of(model, path, tmp_path / "out", ALL, scale="statistics")
    even = np.sort(image, 0)
    clear = even[-1] > even[-2]  # no tie that rounding decides
    np.testing.assert_array_equal(found[valid & clear], image.argmax(0)[valid & clear])
    np.testing.assert_array_equal(found == 255, ~valid)


@pytest.mark.parametrize("scale", ["statistics", "range", "2", None])
@pytest.mark.parametrize("kind", ["empty", "even"])
def test_scenes_with_nothing_to_measure(
    brightest: TrainedModel, tmp_path: Path, scale: str | None, kind: str
) -> None:
    value = 0 if kind == "empty" else 9
    path = write_scene(tmp_path / "s.tif", np.full((4, 30, 20), value, np.uint8), nodata=0)
    found = map_of(brightest, path, tmp_path / "out", ALL, scale=scale)
    # The data set's near-infrared is the brightest; as they are, the first of equals is.
    wanted = 255 if kind == "empty" else 3 if scale == "statistics" else 0
    assert (found == wanted).all()


@pytest.mark.parametrize(
    "changes",
    [
        *({"scale": s} for s in ("0", "-1", "nan", "inf", "x", "1e400", "")),
        *({"resolution": r} for r in (0, -1, float("nan"), float("inf"))),
    ],
)
def test_scales_and_resolutions_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(changes))):
        Taking(**changes)


# Where there is data


@pytest.fixture
def valid() -> NDArray[np.bool_]:
    valid = np.ones((44, 60), np.bool_)
    valid[8:20, 16:32] = False
    valid[:4, 50:] = False
    return valid


def hollow(path: Path, image: Image_, valid: NDArray[np.bool_], kind: str) -> tuple[Path, str]:
    """A scene with holes; of which type."""
    empty = image.copy()
    empty[:, ~valid] = 0
    shown = valid.astype(np.uint8)[None] * 255
    half = valid.copy()
    half[14:] = True  # the rest of the holes is told in another way
    rest = valid | ~half
    some = image.copy()
    some[:, ~rest] = 0
    colours = [RED, GREEN, BLUE, OTHER, ALPHA]
    if kind == "nodata":
        write_scene(path, empty, nodata=0, transform=METRE)
    elif kind == "training":
        write_scene(path, empty, transform=METRE)
    elif kind == "mask":
        masked(path, image, valid, transform=METRE)
    elif kind == "mask and nodata":
        masked(path, some, half, nodata=0, transform=METRE)
    elif kind == "alpha":
        coloured(path, np.concatenate([image, shown]), colours, transform=METRE)
    elif kind == "alpha first":
        first = [ALPHA, *colours[:-1]]
        coloured(path, np.concatenate([shown, image]), first, transform=METRE)
    elif kind == "alpha and nodata":
        pixels = np.concatenate([some, half.astype(np.uint8)[None] * 255])
        coloured(path, pixels, colours, nodata=0, transform=METRE)
    elif kind == "alpha of 16 bits":
        pixels = np.concatenate([image.astype(np.uint16), shown.astype(np.uint16) * 257])
        coloured(path, pixels, colours, transform=METRE)
    elif kind == "alpha of 8 bits in 16":
        pixels = np.concatenate([image, shown]).astype(np.uint16)
        coloured(path, pixels, colours, transform=METRE)
    elif kind == "alpha of floats":
        pixels = np.concatenate([image, shown // 255]).astype(np.float32)
        coloured(path, pixels, colours, transform=METRE)
    else:
        lowest = float(np.finfo(np.float32).min)
        value = {"NaN": np.nan, "lowest": lowest, "infinite": np.inf}[kind]
        write_scene(path, np.where(valid, image, value).astype(np.float32), transform=METRE)
    with rasterio.open(path) as dataset:
        return path, dataset.dtypes[0]


KINDS = (
    "nodata",
    "training",
    "mask",
    "mask and nodata",
    "alpha",
    "alpha first",
    "alpha and nodata",
    "alpha of 16 bits",
    "alpha of 8 bits in 16",
    "alpha of floats",
    "NaN",
    "lowest",
    "infinite",
)


@pytest.mark.parametrize("kind", KINDS)
def test_holes(
    trained: TrainedModel, image: Image_, valid: NDArray[np.bool_], tmp_path: Path, kind: str
) -> None:
    path, dtype = hollow(tmp_path / "s.tif", image, valid, kind)
    model = network(trained, dtype=dtype, nodata=0.0 if kind == "training" else None)
    wanted = np.where(valid, image.argmax(0), 255)
    np.testing.assert_array_equal(map_of(model, path, tmp_path / "out"), wanted)
    # Holes and blocks of even pixels begin and end at even rows and columns.
    found = map_of(model, path, tmp_path / "coarse", ALL, resolution=2.0)
    np.testing.assert_array_equal(found, wanted[::2, ::2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_empty_does_not_bleed(
    trained: TrainedModel, valid: NDArray[np.bool_], tmp_path: Path, kind: str
) -> None:
    """A resampled scene of one class is of this class up to the edges of its holes."""
    image = np.stack([np.full((44, 60), value, np.uint8) for value in (90, 8, 7, 6)])
    path, dtype = hollow(tmp_path / "s.tif", image, valid, kind)
    # With a ninth of its brightness, the first band would be the darkest.
    mean, nodata = (80.0, 0.0, 0.0, 0.0), 0.0 if kind == "training" else None
    model = network(trained, dtype=dtype, nodata=nodata, mean=mean)
    coarse = map_of(model, path, tmp_path / "coarse", resolution=1.7)
    height, width = coarse.shape
    assert (height, width) == (26, 35)
    whole = valid.repeat(height, 0).repeat(width, 1).reshape(height, 44, width, 60)
    np.testing.assert_array_equal(coarse, np.where(whole.sum((1, 3)) * 2 >= 44 * 60, 0, 255))
    fine = map_of(model, path, tmp_path / "fine", resolution=0.7)
    rows, columns = (
        ((np.arange(n) + 0.5) * size / n).astype(int)
        for n, size in zip(fine.shape, (44, 60), strict=True)
    )
    np.testing.assert_array_equal(fine, np.where(valid[rows][:, columns], 0, 255))


def test_one_band_of_the_nodata_value_is_data(
    brightest: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    image[1, 10:20, 10:20] = 0
    path = write_scene(tmp_path / "s.tif", image, nodata=0)
    np.testing.assert_array_equal(map_of(brightest, path, tmp_path / "out"), image.argmax(0))


# Grids


def control_points(system: int | None, places: list[tuple[int, int]]) -> Any:
    step, x, y = (1.0, 500_000, 5_000_000) if system == 32614 else (1e-5, -97, 47)
    points = [GroundControlPoint(row=r, col=c, x=x + step * c, y=y - step * r) for r, c in places]
    return points, rasterio.CRS.from_epsg(system) if system else rasterio.CRS()


CORNERS = [(0, 0), (0, 60), (44, 0), (44, 60), (22, 30)]
LOCAL = 'LOCAL_CS["site",UNIT["metre",1]]'
GRIDS: dict[str, tuple[str | None, Affine | None, Any]] = {
    "nothing": (None, None, None),
    "transform only": (None, METRE, None),
    "system only": ("EPSG:26914", None, None),
    "rotated": ("EPSG:26914", Affine(0.8, 0.6, 500_000, 0.6, -0.8, 5_000_000), None),
    "sheared": ("EPSG:26914", Affine(1, 0.5, 500_000, 0, -1, 5_000_000), None),
    "south up": ("EPSG:26914", Affine(1, 0, 500_000, 0, 1, 5_000_000), None),
    "mirrored": ("EPSG:26914", Affine(-1, 0, 500_000, 0, -1, 5_000_000), None),
    "degrees": ("EPSG:4326", Affine(1e-5, 0, -97, 0, -1e-5, 47), None),
    "longitudes to 360": ("EPSG:4326", Affine(1e-5, 0, 263, 0, -1e-5, 47), None),
    "antimeridian": ("EPSG:4326", Affine(1e-5, 0, 180 - 3e-4, 0, -1e-5, -17), None),
    "feet": ("EPSG:2264", Affine(3.28, 0, 2_000_000, 0, -3.28, 600_000), None),
    "own projection": ("+proj=tmerc +lat_0=10 +lon_0=3 +k=0.9 +a=6377000 +b=6356000", METRE, None),
    "with heights": ("EPSG:26914+5703", METRE, None),
    "pole": ("EPSG:3413", Affine(10, 0, -300, 0, -10, 300), None),
    "off the map": ("EPSG:26914", Affine(1, 0, 5e8, 0, -1, 5e9), None),
    "globe": ("+proj=ortho +lat_0=0 +lon_0=0", Affine(1e6, 0, -3e7, 0, -1e6, 3e7), None),
    "local": (LOCAL, Affine(1, 0, 10, 0, -1, 10), None),
    "geocentric": ("EPSG:4978", Affine(3, 0, 1000, 0, -3, 1000), None),
    "points in degrees": (None, None, (4326, CORNERS)),
    "points in metres": (None, None, (32614, CORNERS)),
    "one point": (None, None, (4326, CORNERS[:1])),
    "points in a line": (None, None, (4326, [(n, n) for n in range(4)])),
    "points without system": (None, None, (None, CORNERS)),
}
NOWHERE = {
    *("nothing", "transform only", "system only", "off the map", "local", "geocentric"),
    *("one point", "points in a line", "points without system"),
}  # fmt: skip
NO_HECTARES = NOWHERE | {"globe"}
HECTARES = {"points in degrees": 0.2232, "points in metres": 0.2642, "rotated": 0.2642, "pole": 28.07}


def placed(path: Path, image: Image_, name: str) -> Path:
    system, transform, points = GRIDS[name]
    crs = rasterio.CRS.from_user_input(system) if system else None
    write_scene(path, image, crs=crs, transform=transform)
    if points:
        with rasterio.open(path, "r+") as dataset:
            dataset.gcps = control_points(*points)
    return path


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid(brightest: TrainedModel, image: Image_, tmp_path: Path, name: str) -> None:
    path, out = placed(tmp_path / "s.tif", image, name), tmp_path / "out"
    found = map_of(brightest, path, out, dataclasses.replace(ALL, simplify=0.1))
    np.testing.assert_array_equal(found, image.argmax(0))
    with rasterio.open(path) as scene, rasterio.open(out / "s.tif") as made:
        assert tuple(made.transform) == tuple(scene.transform)
        assert made.crs == scene.crs
        points = [[(p.row, p.col, p.x, p.y) for p in dataset.gcps[0]] for dataset in (scene, made)]
        assert points[0] == points[1]
    item = json.loads((out / "s.json").read_text())
    assert (item["geometry"] is None) == (name in NO_HECTARES)
    with sqlite3.connect(out / "s.gpkg") as database:
        ((count, hectares),) = database.execute("select count(*), sum(hectares) from anomalies")
    assert (hectares is None) == (name in NO_HECTARES)
    if name in HECTARES:
        assert hectares == pytest.approx(HECTARES[name], rel=5e-3)
    assert (out / "s.geojson").exists() == (name not in NOWHERE | {"pole", "globe"})
    if (out / "s.geojson").exists():
        assert len(json.loads((out / "s.geojson").read_text())["features"]) == count
    assert {Path(a["href"]).name for a in item["assets"].values()} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_resampled(
    brightest: TrainedModel, image: Image_, tmp_path: Path, name: str
) -> None:
    path, out = placed(tmp_path / "s.tif", image, name), tmp_path / "out"
    if name in NOWHERE or name.startswith("points") or name == "globe":
        line = refused(brightest, [path], out, resolution=2.0)
        assert "resampled" in line or "--resolution is in metres a pixel" in line
        return
    found = map_of(brightest, path, out, resolution=2.0)
    with rasterio.open(path) as scene, rasterio.open(out / "s.tif") as made:
        corners = [
            (dataset.transform * (0, 0), dataset.transform * (dataset.width, dataset.height))
            for dataset in (scene, made)
        ]
        assert made.crs == scene.crs
    np.testing.assert_allclose(corners[0], corners[1], rtol=1e-13)
    if name in ("rotated", "south up", "mirrored"):
        np.testing.assert_array_equal(found, image.argmax(0)[::2, ::2])


@pytest.mark.parametrize("name", sorted(NO_HECTARES))
@pytest.mark.parametrize("what", ["--fields", "--smallest"])
def test_hectares_that_nobody_knows(
    brightest: TrainedModel, image: Image_, tmp_path: Path, name: str, what: str
) -> None:
    path = placed(tmp_path / "s.tif", image, name)
    products = dataclasses.replace(ALL, smallest=5.0)
    if what == "--fields":
        products = Products(fields=write_fields(tmp_path / "fields.gpkg"))
    line = refused(brightest, [path], tmp_path / "out", products)
    assert str(path) in line
    assert what in line


def write_fields(path: Path, crs: str | None = "EPSG:26914") -> Path:
    field = shapely.to_wkb(np.array([shapely.box(500_000, 4_999_980, 500_010, 5_000_000)]))
    pyogrio.raw.write(path, field, [], [], geometry_type="Polygon", crs=crs, driver="GPKG")
    return path


def test_fields_over_control_points(brightest: TrainedModel, image: Image_, tmp_path: Path) -> None:
    path = placed(tmp_path / "s.tif", image, "points in metres")
    products = Products(fields=write_fields(tmp_path / "fields.gpkg", "EPSG:32614"))
    map_of(brightest, path, tmp_path / "out", products)
    with (tmp_path / "out" / "s.fields.csv").open() as file:
        rows = {row["class"]: float(row["hectares"]) for row in csv.DictReader(file)}
    counts = np.bincount(image.argmax(0)[:20, :10].ravel(), minlength=4)
    for name, count in zip(CLASSES, counts, strict=False):
        assert rows[name] == pytest.approx(count / 10_000, rel=2e-3, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*crs.*:UserWarning")
def test_fields_without_coordinates_are_refused_beforehand(
    brightest: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", image)
    products = Products(fields=write_fields(tmp_path / "fields.gpkg", None))
    assert "no coordinate system" in refused(brightest, [path], tmp_path / "out", products)


def test_simplified_by_metres_where_points_are_in_degrees(
    brightest: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    path = placed(tmp_path / "s.tif", image, "points in degrees")
    areas = []
    for simplify in (0.0, 0.01):  # a centimetre moves nothing
        out = tmp_path / str(simplify)
        map_of(brightest, path, out, dataclasses.replace(ALL, simplify=simplify))
        with sqlite3.connect(out / "s.gpkg") as database:
            areas.append(np.array(database.execute("select hectares from anomalies").fetchall()))
    np.testing.assert_allclose(areas[0], areas[1], rtol=1e-9)


# How large pixels are


def test_web_mercator_is_measured_on_the_ground(
    trained: TrainedModel, image: Image_, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At 60° north, its metre is half of one."""
    transform = Affine(2, 0, 1e6, 0, -2, 8_399_737.889818)
    path = write_scene(tmp_path / "s.tif", image, crs="EPSG:3857", transform=transform)
    with caplog.at_level(logging.WARNING):
        map_of(network(trained, resolution=1.0), path, tmp_path / "one")
        assert "--resolution" not in caplog.text
        map_of(network(trained, resolution=2.0), path, tmp_path / "two")
        assert re.search(r"pixels of 1 m, the training had 2 m.*--resolution 2 ", caplog.text)
    found = map_of(network(trained), path, tmp_path / "out", resolution=2.0)
    np.testing.assert_array_equal(found, image.argmax(0)[::2, ::2])


@pytest.mark.parametrize("resolution", [1e-9, 1e-3, 1e9])
def test_resolutions_of_a_slip(
    brightest: TrainedModel, image: Image_, tmp_path: Path, resolution: float
) -> None:
    path = write_scene(tmp_path / "s.tif", image.repeat(20, 2), transform=METRE)
    line = refused(brightest, [path], tmp_path / "out", resolution=resolution)
    assert "--resolution is in metres a pixel" in line


@pytest.mark.parametrize(("source", "target"), [(60, 60), (60, 7), (7, 60), (61, 60), (60, 61), (5, 1)])
def test_taps_keep_what_is_even_and_the_mean(source: int, target: int) -> None:
    whole = Taps.of(source, target, (0, target))
    np.testing.assert_allclose(whole.weights.sum(0), 1)
    np.testing.assert_allclose(whole.cover.sum(0), 1)
    if target <= source:  # each pixel counts by its area
        counts = np.bincount(whole.indexes.ravel(), whole.weights.ravel(), minlength=source)
        np.testing.assert_allclose(counts, target / source)
    for start in range(target):  # whatever window they are asked for
        one = Taps.of(source, target, (start, start + 1))
        np.testing.assert_array_equal(one.weights[:, 0], whole.weights[:, start])
        np.testing.assert_array_equal(one.indexes[:, 0], whole.indexes[:, start])


# Sizes


@pytest.mark.parametrize("shape", [(1, 1), (1, 130), (130, 1), (2, 3), (47, 49)])
@pytest.mark.parametrize("tile", [48, None])
def test_tiny_and_thin_scenes(
    brightest: TrainedModel,
    generator: np.random.Generator,
    tmp_path: Path,
    shape: tuple[int, int],
    tile: int | None,
) -> None:
    image = smooth(generator, *shape)
    path = write_scene(tmp_path / "s.tif", image)
    found = map_of(brightest, path, tmp_path / "out", ALL, tile=tile, margin=None)
    np.testing.assert_array_equal(found, image.argmax(0))


def test_a_ribbon_has_a_small_picture(
    brightest: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(generator, 3000, 2))
    map_of(brightest, path, tmp_path / "out")
    with Image.open(tmp_path / "out" / "s.png") as picture:
        assert picture.width * picture.height < 3 * 1024 * 1024


# Formats, lists, names


@pytest.mark.parametrize("kind", ["cog", "jp2", "png", "vrt"])
def test_formats(brightest: TrainedModel, image: Image_, tmp_path: Path, kind: str) -> None:
    plain = write_scene(tmp_path / "plain.tif", image, names=BANDS, transform=METRE)
    path = tmp_path / {"cog": "s.tif"}.get(kind, f"s.{kind}")
    if kind == "vrt":
        write_vrt(path, ["Byte"] * 4)
        assert "--allow_vrt" in refused(brightest, [path], tmp_path / "no")
    elif kind == "png":
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)), "RGBA").save(path)
    else:
        driver = {"cog": "COG", "jp2": "JP2OpenJPEG"}[kind]
        more = {"REVERSIBLE": "YES", "QUALITY": "100"} if kind == "jp2" else {}
        copy_raster(plain, path, driver=driver, **more)
    found = map_of(brightest, path, tmp_path / "out", ALL, allow_vrt=True)
    np.testing.assert_array_equal(found, image.argmax(0))


def write_vrt(path: Path, types: list[str]) -> None:
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{number}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">plain.tif</SourceFilename><SourceBand>{number}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for number, kind in enumerate(types, 1)
    )
    path.write_text(f'<VRTDataset rasterXSize="60" rasterYSize="44">{bands}</VRTDataset>')


@pytest.mark.parametrize("scale", [None, "1", "range", "statistics"])
def test_bands_of_several_types(
    brightest: TrainedModel, image: Image_, tmp_path: Path, scale: str | None
) -> None:
    write_scene(tmp_path / "plain.tif", image)
    write_vrt(tmp_path / "s.vrt", ["Byte", "Byte", "UInt16", "Byte"])
    line = refused(brightest, [tmp_path / "s.vrt"], tmp_path / "out", scale=scale, allow_vrt=True)
    assert "several types" in line


def test_lists(brightest: TrainedModel, image: Image_, tmp_path: Path) -> None:
    write_scene(tmp_path / "farm" / "a b.tif", image)
    write_scene(tmp_path / "other" / "c.tif", image)
    text = f"\ufeff# fields of the north\r\n\r\n  farm/a b.tif \r\n{tmp_path}/other\r\n"
    (tmp_path / "list.TXT").write_bytes(text.encode())
    summary = predict(brightest, [tmp_path / "list.TXT"], tmp_path / "out", options())
    assert [path.name for path in summary.maps] == ["a b.tif", "c.tif"]
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names nothing"),
        (b"# later\n\n", "names nothing"),
        (b"s.tif\nnone.tif\n", "none.tif, which does not exist"),
        (b'"s.tif"\n', "does not exist"),
        (b"http://localhost/x.tif\n", "does not exist"),
        (b"s\0.tif\n", "s\\x00.tif, which does not exist"),
        (b"\xff\xfes.tif\n", "no list of paths"),
        (b"x" * 5000, "no list of paths"),
        (b"s.tif\ns.tif\n", "given twice"),
        (b"list.txt\n", "list.txt is no raster"),
    ],
)
def test_lists_that_lead_nowhere(
    brightest: TrainedModel, image: Image_, tmp_path: Path, content: bytes, words: str
) -> None:
    write_scene(tmp_path / "s.tif", image)
    (tmp_path / "list.txt").write_bytes(content)
    assert words in refused(brightest, [tmp_path / "list.txt"], tmp_path / "out")


NAMES = (
    *("two words", "日本 é", "quote'\"", "dots.in.name", "-dash", "per%20cent"),
    *("a&<b>", "#1?x=2", "[x]{y}", "back\\slash", "x.tif", "e\u0301"),
)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_scenes(brightest: TrainedModel, image: Image_, tmp_path: Path, name: str) -> None:
    path = write_scene(tmp_path / name / f"{name}.tif", image)
    out = tmp_path / f"{name} out"
    np.testing.assert_array_equal(map_of(brightest, path, out, ALL), image.argmax(0))
    ends = {".tif", ".confidence.tif", ".probabilities.tif", ".qml", ".confidence.qml", ".png", ".gpkg"}
    ends |= {".geojson", ".json", ".html"}
    assert {path.name for path in out.iterdir()} == {".predict", *(f"{name}{end}" for end in ends)}


@pytest.mark.parametrize("name", ["semi;colon", "new\nline", "tab\t"])
def test_names_that_gdal_cannot_write_are_refused_beforehand(
    brightest: TrainedModel, image: Image_, tmp_path: Path, name: str
) -> None:
    path = write_scene(tmp_path / f"{name}.tif", image)
    assert "rename it" in refused(brightest, [path], tmp_path / "no", ALL)
    np.testing.assert_array_equal(map_of(brightest, path, tmp_path / "out"), image.argmax(0))


def test_names_that_are_no_text(brightest: TrainedModel, image: Image_, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"b\xffd.tif")
    write_scene(tmp_path / "s.tif", image).rename(path)
    assert "no UTF-8: rename it" in refused(brightest, [path], tmp_path / "out")


def test_scenes_that_would_share_a_file(brightest: TrainedModel, image: Image_, tmp_path: Path) -> None:
    paths = [write_scene(tmp_path / name, image) for name in ("x.tif", "x.confidence.tif", "index.tif")]
    assert "both become" in refused(brightest, paths[:2], tmp_path / "no", ALL)
    assert "their index" in refused(brightest, paths[1:], tmp_path / "no")
    assert "given twice" in refused(brightest, [paths[0], paths[0]], tmp_path / "no")
    assert len(predict(brightest, paths[:2], tmp_path / "two", options()).maps) == 2
    np.testing.assert_array_equal(map_of(brightest, paths[2], tmp_path / "one"), image.argmax(0))


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"II*\0\x08\0\0\0"), "cannot be read"),
        (lambda path: path.symlink_to(path.with_name("gone.tif")), "no such file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.mkdir(), "nothing to predict"),
        (make_pipe, "neither a file nor a folder"),
    ],
)
def test_files_that_are_none(
    brightest: TrainedModel, tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "s.tif")
    assert words in refused(brightest, [tmp_path / "s.tif"], tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 300 + ".tif", "x" * 300 + ".txt"])
def test_names_that_are_too_long(brightest: TrainedModel, tmp_path: Path, name: str) -> None:
    assert "too long" in refused(brightest, [tmp_path / name], tmp_path / "out")


# Where maps go


def test_a_folder_of_maps_within_that_of_scenes(
    brightest: TrainedModel, image: Image_, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", image)
    for _ in range(2):  # what is in it is no input then
        found = map_of(brightest, tmp_path, tmp_path / "maps")
        np.testing.assert_array_equal(found, image.argmax(0))
    line = refused(brightest, [tmp_path / "maps" / "s.tif"], tmp_path / "no")
    assert "palette" in line
    assert path.exists()


def test_a_place_that_is_read_only(brightest: TrainedModel, image: Image_, tmp_path: Path) -> None:
    path = write_scene(tmp_path / "s.tif", image)
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        for out in (disk, disk / "out"):
            line = refused(brightest, [path], out, ALL, NotWritable)
            assert "Read-only file system" in line


@pytest.mark.parametrize("leave", [0, 100_000, 250_000])
def test_a_disk_that_is_full(brightest: TrainedModel, tmp_path: Path, leave: int) -> None:
    image = np.random.default_rng(0).integers(1, 255, (4, 200, 200), np.uint8)
    path = write_scene(tmp_path / "s.tif", image)
    with small_disk(tmp_path / "disk", "16m") as disk:
        fill(disk, leave)
        with pytest.raises(StorageError, match="cannot write"):
            predict(brightest, [path], disk / "out", options(ALL, batch_size=16))
        assert not [
            p for p in (disk / "out").glob("*") if p.name.startswith(".") and p.name != ".predict"
        ]
        (disk / "filler").unlink()
        np.testing.assert_array_equal(
            map_of(brightest, path, disk / "out", ALL, batch_size=16), image.argmax(0)
        )
        assert len(list((disk / "out").glob("s.*"))) == 10


# By the command


def command(capsys: pytest.CaptureFixture[str], trained: TrainedModel, *words: Any) -> tuple[int, str]:
    arguments = ["predict", "--checkpoint", trained.folder, "--tile", 48, "--margin", 8, *words]
    code = cli.main([str(word) for word in arguments])
    return code, capsys.readouterr().err


def test_the_command_takes_odd_scenes(
    trained: TrainedModel, image: Image_, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bands, scale and resolution of a scene, taken back by the options: the map of the plain one."""
    plain = write_scene(tmp_path / "a" / "s.tif", image, transform=METRE)
    odd = image[[3, 0, 1, 2]].astype(np.uint16) * 16
    path = write_scene(tmp_path / "b" / "s.tif", odd.repeat(2, 1).repeat(2, 2), transform=METRE)
    out = ["--out", tmp_path / "odd", "--polygons"]
    how = ["--bands", "2, 3,4,1", "--scale", "0.0625", "--resolution", "2"]
    assert command(capsys, trained, plain, "--out", tmp_path / "plain")[0] == ExitCode.DONE
    assert command(capsys, trained, path, *out, *how)[0] == ExitCode.DONE
    maps = []
    for name in ("plain", "odd"):
        with rasterio.open(tmp_path / name / "s.tif") as dataset:
            maps.append(dataset.read(1))
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "4 bands of uint16"),
        (("--scale", "much"), "scale is 'much'"),
        (("--scale", "range", "--bands", "1,2,3"), "--bands names 3 bands"),
        (("--scale", "range", "--bands", "1,,2,3"), "--bands"),
        (("--scale", "range", "--resolution", "0"), "resolution is 0"),
        (("--scale", "range", "--resolution", "1"), "cannot be resampled"),
        (("--scale", "range", "--polygons", "--smallest", "5"), "leave out --smallest"),
        (("--smallest", "5"), "--polygons"),
    ],
)
def test_the_command_says_one_line(
    trained: TrainedModel,
    image: Image_,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    path = write_scene(tmp_path / "s.tif", image.astype(np.uint16), crs=None, transform=None)
    code, line = command(capsys, trained, path, "--out", tmp_path / "out", *words)
    assert code == ExitCode.BAD_INPUT
    assert said in line
    assert "Traceback" not in line
    assert line.splitlines()[-1].startswith("agrivision: error: ")
    assert not (tmp_path / "out").exists()
