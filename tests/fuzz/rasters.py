"""Scenes and label rasters: headers that lie, and pixels that are what another reader sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import Affine, from_origin

from agrivision.config import ModelConfig
from agrivision.data.sources.pairs import Pair
from agrivision.data.sources.rasters import RasterReader, opened, windows
from agrivision.data.sources.source import Flaw, Reference
from agrivision.data.sources.survey import _look
from agrivision.data.tile import window_key
from agrivision.inference.reading import ScenePixels, read_around
from agrivision.inference.scene import look, unreadable
from agrivision.inference.trained import Description
from tests.fuzz import tiff
from tests.fuzz.harness import REFUSED, Target, answer

_SHAPE = (4, 20, 28)
_TILE = 16
_MOST = 1 << 22  # pixels of a scene that is read here; a mutation may make it larger
_PLACE = {"crs": "EPSG:26914", "transform": from_origin(486_000, 5_209_000, 5, 5)}

_DESCRIPTION = Description(
    model=ModelConfig(base_channels=1, depth=1),
    bands=("red", "green", "blue", "nir"),
    classes=("a", "b"),
    class_values=(),
    dtype="uint8",
    tile=_TILE,
    mean=(0.0,) * 4,
    std=(1.0,) * 4,
    nodata=None,
    data_fingerprint="",
)


def _image(seed: int = 0, bands: int = 4, dtype: str = "uint8") -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 250, (bands, *_SHAPE[1:])).astype(dtype)


def _named(**options: Any) -> bytes:
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            count=4,
            height=_SHAPE[1],
            width=_SHAPE[2],
            dtype="uint8",
            **_PLACE,
            **options,
        ) as dataset:
            dataset.write(_image())
            dataset.descriptions = ("nir", "red", "green", "blue")
            dataset.update_tags(anything="else")
        return bytes(memory.getbuffer())


def scene(folder: Path) -> Target:
    """A scene as `predict` and `prepare` open it, with good labels beside it."""
    path, label = folder / "scene.tif", folder / "label.tif"
    values = (_image(1, 1)[0] % 3).astype("uint8")
    label.write_bytes(tiff.encode(values[None], **_PLACE))
    rolled = Affine(5, 0, 0, 0, 0, 0)
    seeds = (
        tiff.encode(_image(), **_PLACE),
        tiff.encode(_image(), tile=16, nodata=0, **_PLACE),
        tiff.encode(_image(), compress="deflate", predictor=2),
        tiff.encode(_image(), compress="lzw", nodata=3, **_PLACE),
        tiff.encode(_image(), BIGTIFF="YES", **_PLACE),
        tiff.encode(_image(), transform=rolled),
        tiff.encode(_image(), transform=Affine(float("nan"), 0, 0, 0, float("inf"), 0)),
        _named(),
        tiff.encode(_image(bands=1, dtype="float32"), **_PLACE),
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        _check_prediction(path, data)
        _check_preparation(Pair(name="scene", scene=path, label=label), values)

    return Target(seeds=seeds, run=run)


def jpeg2000(folder: Path) -> Target:
    """A scene as JPEG 2000: read, or refused."""
    path = folder / "scene.jp2"
    seeds = []
    for options in ({"QUALITY": "100", "REVERSIBLE": "YES"}, {"CODEC": "J2K"}, {"BLOCKXSIZE": "16"}):
        with rasterio.MemoryFile() as memory:
            with memory.open(
                driver="JP2OpenJPEG", count=4, height=_SHAPE[1], width=_SHAPE[2], dtype="uint8",
                **_PLACE, **options,
            ) as dataset:  # fmt: skip
                dataset.write(_image())
            seeds.append(bytes(memory.getbuffer()))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        _check_prediction(path, data)

    return Target(seeds=tuple(seeds), run=run)


def _check_prediction(path: Path, data: bytes) -> None:
    found = answer(lambda: look(path, _DESCRIPTION), path)
    if found is REFUSED:
        return
    assert found.height > 0 and found.width > 0
    slowly = tiff.decode(data)
    with opened(path) as dataset:
        for window in _some_windows(found.height, found.width):
            result = answer(lambda window=window: _read(dataset, found, window), path)
            if result is REFUSED:
                continue
            pixels, valid = result
            x1, y1, x2, y2 = window
            inside = min(y2, found.height) - y1, min(x2, found.width) - x1
            assert pixels.shape == (4, _TILE + 8, _TILE + 8) and pixels.dtype == np.uint8
            assert valid.shape == inside
            if slowly is not None and slowly.shape[2] >= 4 and found.empty is None:
                part = slowly[y1:y2, x1:x2, [band - 1 for band in found.bands]]
                own = pixels[:, 4 : 4 + inside[0], 4 : 4 + inside[1]].transpose(1, 2, 0)
                assert np.array_equal(own[valid], part[valid])


def _read(dataset: Any, found: Any, window: Any) -> Any:
    try:
        return read_around(ScenePixels(dataset, found), window, 4)
    except Flaw as flaw:
        raise unreadable(flaw) from None


def _some_windows(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The first and the last, without a list of all those that a lying header has."""
    x, y = (width - 1) // _TILE * _TILE, (height - 1) // _TILE * _TILE
    return [(0, 0, _TILE, _TILE), (x, y, x + _TILE, y + _TILE)]


def _check_preparation(pair: Pair, values: np.ndarray | None) -> None:
    found = answer(lambda: _look(pair, None, named=True), pair.scene, pair.label)
    if found is REFUSED or found.height * found.width > _MOST:
        return
    if values is not None:
        counted = {value: count for value, count in found.values.items() if count}
        assert counted == {value: int((values == value).sum()) for value in np.unique(values).tolist()}
    reader = RasterReader(
        pairs=(pair,), tile=_TILE, bands=tuple(range(1, found.count + 1)), alpha=None, values=(0, 1, 2),
        ignore=None,
    )  # fmt: skip
    with reader.reading() as read:
        for window in windows(found.height, found.width, _TILE, _TILE)[:4]:
            reference = Reference(window_key("scene", window), "scene", 0, window)
            tile = answer(lambda r=reference: read(r), pair.scene, pair.label)
            if tile is not REFUSED and tile is not None:
                tile.record(3)


def label_raster(folder: Path) -> Target:
    """A label raster beside a good scene."""
    scene_path, path = folder / "scene.tif", folder / "label.tif"
    scene_path.write_bytes(tiff.encode(_image(), **_PLACE))
    values = _image(1, 1) % 3
    seeds = (
        tiff.encode(values.astype("uint8"), **_PLACE),
        tiff.encode(values.astype("uint8"), tile=16, nodata=255, **_PLACE),
        tiff.encode(values.astype("float32"), compress="deflate", predictor=3, **_PLACE),
        tiff.encode(values.astype("int16"), compress="deflate", predictor=2),
        tiff.encode(values.astype("uint8"), transform=Affine(0, 0, 0, 0, 0, 0)),
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        pair = Pair(name="scene", scene=scene_path, label=path)
        slowly = tiff.decode(data)
        _check_preparation(pair, None if slowly is None or _marks(path) else slowly[..., 0])

    return Target(seeds=seeds, run=run)


def _marks(path: Path) -> bool:
    """Whether some values do not count, or what counts is more than the values say."""
    try:
        with rasterio.open(path, driver="GTiff") as dataset:
            special = dataset.nodata is not None or dataset.dtypes[0].startswith("float")
            return special or dataset.mask_flag_enums[0][0].name != "all_valid"
    except (rasterio.errors.RasterioError, ValueError):
        return True
