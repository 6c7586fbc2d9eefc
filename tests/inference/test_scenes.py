from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from torch import nn

from agrivision.data.sources.rasters import windows
from agrivision.errors import BadInput, NotWritable, SourceError, StorageError
from agrivision.inference.predict import PredictOptions, find_scenes, predict
from agrivision.inference.reading import ScenePixels, read_around
from agrivision.inference.scene import Scene, look
from agrivision.inference.trained import TrainedModel
from agrivision.monitor.pictures import PALETTE
from tests.disks import fill, small_disk
from tests.inference.small import BANDS, CLASSES, TRANSFORM, smooth, trained_model, write_scene

NAIP = Path(__file__).parents[2] / ".." / "shared" / "naip" / "scenes"
SMALL = PredictOptions(tile=48, margin=32, batch_size=4)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(11)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        ids: np.ndarray = dataset.read(1)
        return ids


class Brightest(nn.Module):
    """Calls each pixel by the band that is brightest there: no neighbour matters."""

    def input_size(self, output: int) -> int:
        return output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 100


@pytest.fixture
def brightest(trained: TrainedModel) -> TrainedModel:
    about = dataclasses.replace(
        trained.description, classes=CLASSES[:4], mean=(0.0,) * 4, std=(1.0,) * 4
    )
    return dataclasses.replace(trained, module=Brightest(), description=about)


@settings(deadline=None, max_examples=100)
@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    tile=st.integers(1, 90),
    size=st.integers(1, 9),
)
def test_the_windows_cover_a_scene_exactly_once(height: int, width: int, tile: int, size: int) -> None:
    seen = np.zeros((height, width), np.int64)
    cut = windows(height, width, tile, tile)
    for x1, y1, x2, y2 in cut:
        assert (x2 - x1, y2 - y1) == (tile, tile)
        assert x1 < width
        assert y1 < height
        seen[y1:y2, x1:x2] += 1
    assert (seen == 1).all()


class InMemory:
    """As much of an open raster as `read_around` needs."""

    mask_flag_enums = ((),)

    def __init__(self, image: np.ndarray) -> None:
        self.image, self.largest = image, 0

    def read(self, bands: list[int], window: tuple[tuple[int, int], tuple[int, int]]) -> np.ndarray:
        (top, bottom), (left, right) = window
        assert 0 <= top < bottom <= self.image.shape[1]
        assert 0 <= left < right <= self.image.shape[2]
        self.largest = max(self.largest, bottom - top, right - left)
        return self.image[[band - 1 for band in bands], top:bottom, left:right].copy()


@settings(deadline=None, max_examples=50)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    tile=st.integers(1, 40),
    margin=st.integers(0, 30),
)
def test_a_margin_shows_the_neighbours_and_mirrors_at_the_edges(
    height: int, width: int, tile: int, margin: int
) -> None:
    image = np.arange(height * width, dtype=np.int32).reshape(1, height, width)
    around = margin + tile
    whole = np.pad(image, ((0, 0), (around, around), (around, around)), mode="reflect")
    scene = Scene(
        path=Path("a.tif"),
        height=height,
        width=width,
        bands=(1,),
        alpha=None,
        nodata=(None,),
        empty=None,
    )
    dataset = InMemory(image)
    for window in windows(height, width, tile, tile):
        x, y = window[:2]
        pixels, valid = read_around(ScenePixels(dataset, scene), window, margin)
        side = tile + 2 * margin
        assert pixels.shape == (1, side, side)
        top, left = y - margin + around, x - margin + around
        np.testing.assert_array_equal(pixels, whole[:, top : top + side, left : left + side])
        assert valid.shape == (min(tile, height - y), min(tile, width - x))
        assert valid.all()
    assert dataset.largest <= 2 * (tile + 2 * margin)  # however large the scene is


def test_away_from_the_edges_windows_give_what_the_whole_scene_gives(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    image = smooth(generator, 152, 200)
    path = write_scene(tmp_path / "s.tif", image)
    predict(trained, [path], tmp_path / "out", SMALL)
    ids, wanted = read(tmp_path / "out" / "s.tif"), trained.predict(image)
    inner = slice(32, -32), slice(32, -32)
    assert np.count_nonzero(ids[inner] != wanted[inner]) <= 2  # ties of floating point
    assert len(np.unique(ids)) >= 3
    assert (ids != 255).all()


@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (31, 111), (97, 49)])
def test_every_size_keeps_its_grid(
    brightest: TrainedModel, generator: np.random.Generator, tmp_path: Path, shape: tuple[int, int]
) -> None:
    image = smooth(generator, *shape)
    path = write_scene(tmp_path / "s.tif", image)
    predict(brightest, [path], tmp_path / "out", PredictOptions(tile=40, batch_size=3))
    with rasterio.open(path) as scene, rasterio.open(tmp_path / "out" / "s.tif") as map_:
        assert (map_.height, map_.width) == shape
        assert tuple(map_.transform) == tuple(TRANSFORM) == tuple(scene.transform)
        assert map_.crs == scene.crs
        assert (map_.count, map_.dtypes[0], map_.nodata) == (1, "uint8", 255)
        assert map_.block_shapes == [(512, 512)]
        assert map_.compression.name == "deflate"
        np.testing.assert_array_equal(map_.read(1), image.argmax(0))


@pytest.mark.parametrize(
    "transform",
    [
        Affine(0.7, 0.3, 1 / 3, 0.2, -0.6, 5e6 + 1 / 7),  # turned
        Affine(0.1, 0.0, -97.123456789012345, 0.0, 0.1, 46.98765432109876),  # south is up
    ],
)
@pytest.mark.parametrize("pixel_is", ["Area", "Point"])
def test_transforms_are_kept_to_the_last_digit(
    trained: TrainedModel,
    generator: np.random.Generator,
    tmp_path: Path,
    transform: Affine,
    pixel_is: str,
) -> None:
    path = write_scene(
        tmp_path / "s.tif", smooth(generator, 9, 9), transform=transform, crs="EPSG:4326"
    )
    with rasterio.open(path, "r+") as scene:
        scene.update_tags(AREA_OR_POINT=pixel_is)
    predict(trained, [path], tmp_path / "out", SMALL)
    with rasterio.open(path) as scene, rasterio.open(tmp_path / "out" / "s.tif") as map_:
        assert tuple(map_.transform) == tuple(scene.transform)
        assert map_.crs == scene.crs


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_control_points_are_kept(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    points = [
        GroundControlPoint(row=r, col=c, x=c + 0.5, y=50 - r)
        for r, c in ((0, 0), (0, 9), (9, 0), (9, 9))
    ]
    path = write_scene(tmp_path / "s.tif", smooth(generator, 9, 9), transform=None, crs=None)
    with rasterio.open(path, "r+") as scene:
        scene.gcps = (points, rasterio.CRS.from_epsg(4326))
    predict(trained, [path], tmp_path / "out", SMALL)
    with rasterio.open(tmp_path / "out" / "s.tif") as map_:
        found, crs = map_.gcps
    assert crs == rasterio.CRS.from_epsg(4326)
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]


def test_jpeg_2000_is_read(
    brightest: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    image = smooth(generator, 40, 56)
    path = tmp_path / "s.jp2"
    with rasterio.open(
        path,
        "w",
        driver="JP2OpenJPEG",
        height=40,
        width=56,
        count=4,
        dtype="uint8",
        crs="EPSG:26914",
        transform=Affine(5.0, 0.0, 485900.0, 0.0, -5.0, 5209247.0),
        quality=100,
        reversible=True,
    ) as dataset:
        dataset.write(image)
    predict(brightest, [path], tmp_path / "out", SMALL)
    np.testing.assert_array_equal(read(tmp_path / "out" / "s.tif"), image.argmax(0))


def test_a_map_tells_what_it_is(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(generator, 30, 30))
    summary = predict(trained, [path], tmp_path / "out", SMALL)
    assert summary.maps == (tmp_path / "out" / "s.tif",)
    with rasterio.open(summary.maps[0]) as map_:
        tags, colours = map_.tags(), map_.colormap(1)
    assert [tags[f"CLASS_{c}"] for c in range(9)] == list(CLASSES)
    assert (tags["AGRIVISION_DATA"], tags["AGRIVISION_STEP"]) == ("f" * 64, "7")
    assert [colours[c][:3] for c in range(9)] == list(PALETTE[:9])
    with Image.open(tmp_path / "out" / "s.png") as picture:
        assert picture.mode == "RGB"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [".predict", "s.html", "s.json", "s.png", "s.qml", "s.tif"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scenes_without_coordinates_are_welcome(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    image = smooth(generator, 20, 30)
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(tmp_path / "s.png")
    predict(trained, [tmp_path / "s.png"], tmp_path / "out", SMALL)
    with rasterio.open(tmp_path / "out" / "s.tif") as map_:
        assert map_.crs is None
        assert map_.transform.is_identity


def holes(image: np.ndarray) -> np.ndarray:
    """Where a scene is made to hold no data: a whole window, and a few pixels."""
    valid = np.ones(image.shape[1:], np.bool_)
    valid[40:80, 40:80] = False
    valid[3:5, 90:] = False
    return valid


@pytest.mark.parametrize("kind", ["tag", "training", "mask", "alpha"])
def test_pixels_without_data_become_255(
    brightest: TrainedModel, generator: np.random.Generator, tmp_path: Path, kind: str
) -> None:
    image = smooth(generator, 100, 95)
    valid = holes(image)
    image[0, 10, 10] = 0  # dark in one band only: this is data
    profile = {"nodata": 0} if kind == "tag" else {}
    if kind in ("tag", "training"):
        image[:, ~valid] = 0
    if kind == "training":  # the scene has no tag, but the run knows that 0 is empty
        about = dataclasses.replace(brightest.description, nodata=0.0)
        brightest = dataclasses.replace(brightest, description=about)
    pixels = image
    if kind == "alpha":
        pixels = np.concatenate([image, valid[None].astype(np.uint8) * 255])
        profile["with_alpha"] = True
    path = write_scene(tmp_path / "s.tif", pixels, **profile)
    if kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(valid)
    predict(brightest, [path], tmp_path / "out", PredictOptions(tile=40, margin=8))
    np.testing.assert_array_equal(
        read(tmp_path / "out" / "s.tif"), np.where(valid, image.argmax(0), 255)
    )


def test_empty_pixels_reach_the_network_as_in_training(
    brightest: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    image = smooth(generator, 20, 20)
    image[:, :5] = 255
    path = write_scene(tmp_path / "s.tif", image, nodata=255)
    about = dataclasses.replace(brightest.description, nodata=0.0)
    scene = look(path, about)
    with rasterio.open(path) as dataset:
        pixels, valid = read_around(ScenePixels(dataset, scene), (0, 0, 20, 20), 0)
    assert (pixels[:, :5] == 0).all()
    np.testing.assert_array_equal(pixels[:, 5:], image[:, 5:])
    assert not valid[:5].any()
    assert valid[5:].all()


def test_a_huge_nodata_value_does_not_reach_the_neighbours(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    trained = trained_model(tmp_path / "run", dtype="float32")
    image = smooth(generator, 40, 40).astype(np.float32)
    found = []
    for name, value in {"a": -3e30, "b": np.nan}.items():
        image[:, :4, :4] = value
        path = write_scene(tmp_path / f"{name}.tif", image, nodata=value)
        predict(trained, [path], tmp_path / "out", SMALL)
        found.append(read(tmp_path / "out" / f"{name}.tif"))
    np.testing.assert_array_equal(*found)
    assert (found[0] == 255).sum() == 16


def test_not_a_number_is_no_data(tmp_path: Path, generator: np.random.Generator) -> None:
    trained = trained_model(tmp_path / "run", dtype="float32")
    image = smooth(generator, 40, 40).astype(np.float32)
    image[2, 7, 9] = np.nan
    path = write_scene(tmp_path / "s.tif", image)
    predict(trained, [path], tmp_path / "out", SMALL)
    ids = read(tmp_path / "out" / "s.tif")
    assert np.argwhere(ids == 255).tolist() == [[7, 9]]


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float64"])
def test_other_types_of_pixels(dtype: str, tmp_path: Path, generator: np.random.Generator) -> None:
    trained = trained_model(tmp_path / "run", dtype=dtype)
    image = smooth(generator, 40, 40).astype(dtype)
    path = write_scene(tmp_path / "s.tif", image)
    predict(trained, [path], tmp_path / "out", PredictOptions(tile=40, margin=0))
    np.testing.assert_array_equal(
        read(tmp_path / "out" / "s.tif"), trained.predict(image.astype(np.float32))
    )


def test_bands_are_put_in_order_by_name(
    brightest: TrainedModel,
    generator: np.random.Generator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = smooth(generator, 30, 30)
    order = [3, 0, 2, 1]
    names = [BANDS[band].upper() for band in order]
    path = write_scene(tmp_path / "s.tif", image[order], names=names)
    with caplog.at_level(logging.INFO):
        predict(brightest, [path], tmp_path / "out", SMALL)
    np.testing.assert_array_equal(read(tmp_path / "out" / "s.tif"), image.argmax(0))
    assert "nir, red, blue, green" in caplog.text


def test_other_names_are_taken_in_the_order_of_the_file(
    brightest: TrainedModel,
    generator: np.random.Generator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = smooth(generator, 30, 30)
    path = write_scene(tmp_path / "s.tif", image, names=["B4", "B3", "B2", "B8"])
    with caplog.at_level(logging.WARNING):
        predict(brightest, [path], tmp_path / "out", SMALL)
    np.testing.assert_array_equal(read(tmp_path / "out" / "s.tif"), image.argmax(0))
    assert "B4, B3, B2, B8" in caplog.text


def test_the_size_of_the_batch_and_threads_decide_nothing(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(generator, 111, 90))
    found = []
    for size, threads in ((1, 0), (4, 2), (50, 1)):
        options = PredictOptions(tile=32, batch_size=size, threads=threads)
        predict(trained, [path], tmp_path / str(size), options)
        found.append(read(tmp_path / str(size) / "s.tif"))
    assert all(np.count_nonzero(other != found[0]) <= 2 for other in found[1:])


def test_folders_of_scenes(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for name in ("b.tif", "a.tiff", "deeper/c.tif"):
        write_scene(folder / name, smooth(generator, 20, 20))
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.tif").write_bytes(b"x")
    assert [path.name for path in find_scenes(folder)] == ["a.tiff", "b.tif"]
    write_scene(tmp_path / "pairs" / "scenes" / "d.tif", smooth(generator, 20, 20))
    summary = predict(trained, [folder, tmp_path / "pairs"], tmp_path / "out", SMALL)
    assert [path.name for path in summary.maps] == ["a.tif", "b.tif", "d.tif"]
    assert len(summary.lines()) == 3


def refused(
    trained: TrainedModel, inputs: list[Path], out: Path, options: PredictOptions = SMALL
) -> str:
    with pytest.raises(BadInput) as error:
        predict(trained, inputs, out, options)
    assert "\n" not in str(error.value)
    assert not [path for path in out.glob("*") if path.name != ".predict"]
    return str(error.value)


def test_scenes_of_the_same_name(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    paths = [tmp_path / "a" / "s.tif", tmp_path / "b" / "s.tiff"]
    for path in paths:
        write_scene(path, smooth(generator, 20, 20))
    line = refused(trained, paths, tmp_path / "out")
    assert all(str(path) in line for path in paths)


def test_a_scene_is_never_overwritten(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "in" / "s.tif", smooth(generator, 20, 20))
    content = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for inputs, out in (
        ([path], path.parent),
        ([path.parent], path.parent),
        ([path], tmp_path / "link"),
    ):
        with pytest.raises(SourceError, match="--out"):
            predict(trained, inputs, out, SMALL)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_scenes_that_do_not_fit(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    image = smooth(generator, 20, 20, bands=6)
    cases = {
        "three.tif": (image[:3], "3 bands of uint8; the run was trained on 4 of uint8"),
        "six.tif": (image, "6 bands of uint8; the run was trained on 4 of uint8"),
        "deep.tif": (
            image[:4].astype(np.uint16),
            "4 bands of uint16; the run was trained on 4 of uint8",
        ),
    }
    good = write_scene(tmp_path / "good.tif", image[:4])
    for name, (pixels, words) in cases.items():
        path = write_scene(tmp_path / name, pixels)
        line = refused(trained, [good, path], tmp_path / "out")
        assert words in line
        assert str(path) in line


def test_a_fifth_band_with_shades_is_no_mask(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(generator, 20, 20, bands=5), with_alpha=True)
    assert "5 bands" in refused(trained, [path], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scene.vrt", "no raster of a known format"),
        ("scene.dat", "no raster of a known format"),
        ("scene.tif", "cannot be read"),
        ("nothing", "nothing to predict"),
        ("/vsicurl/http/x.tif", "no such file"),
        ("http://localhost/x.tif", "no such file"),
    ],
)
def test_what_is_no_imagery(trained: TrainedModel, tmp_path: Path, name: str, words: str) -> None:
    path = Path(name) if "/" in name else tmp_path / name
    if path.suffix and "/" not in name:
        path.write_text("<VRTDataset/>")
    elif "/" not in name:
        path.mkdir()
    line = refused(trained, [path], tmp_path / "out")
    assert words in line
    assert "left out" not in line


def test_a_scene_that_is_damaged_further_in(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    image = generator.integers(1, 255, (4, 200, 200), dtype=np.uint8)
    path = write_scene(tmp_path / "s.tif", image, compress="deflate", blockysize=8)
    content = bytearray(path.read_bytes())
    middle = len(content) * 2 // 3
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    line = refused(trained, [path], tmp_path / "out")
    assert str(path) in line
    assert "left out" not in line


@pytest.mark.parametrize("changes", [{"tile": 0}, {"margin": -1}, {"batch_size": 0}, {"threads": -1}])
def test_options_that_make_no_sense(changes: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(changes))):
        PredictOptions(**changes)  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_old_map(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(generator, 300, 300))
    with small_disk(tmp_path / "disk") as disk:
        out = disk / "out"
        out.mkdir()
        (out / "s.tif").write_bytes(b"old")
        fill(disk, leave=0)
        with pytest.raises(StorageError, match=r"cannot write .*No space left"):
            predict(trained, [path], out, SMALL)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {"s.tif": b"old"}


def test_a_place_that_cannot_be_written(
    trained: TrainedModel, generator: np.random.Generator, tmp_path: Path
) -> None:
    path = write_scene(tmp_path / "s.tif", smooth(generator, 20, 20))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotWritable, match="cannot write"):
        predict(trained, [path], tmp_path / "file", SMALL)


@pytest.mark.naip
@pytest.mark.skipif(not NAIP.is_dir(), reason="the NAIP scenes are not beside the checkout")
def test_a_real_scene(trained: TrainedModel, tmp_path: Path) -> None:
    path = shutil.copy(NAIP / "20160816.tif", tmp_path / "20160816.tif")
    predict(trained, [path], tmp_path / "out", PredictOptions(tile=256))
    with rasterio.open(path) as scene, rasterio.open(tmp_path / "out" / "20160816.tif") as map_:
        assert map_.shape == scene.shape
        assert tuple(map_.transform) == tuple(scene.transform)
        assert map_.crs == scene.crs
        empty = (scene.read() == 0).all(0)
        np.testing.assert_array_equal(map_.read(1) == 255, empty)
