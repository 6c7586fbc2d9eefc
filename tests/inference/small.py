"""A network with random weights, and data small enough to be made for each test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from agrivision import checkpoint
from agrivision.config import ModelConfig
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.sources.layouts import EDITIONS
from agrivision.inference.trained import Description, TrainedModel, load_run
from agrivision.model.build import build_model

BANDS = ("red", "green", "blue", "nir")
CLASSES = EDITIONS["2021"].classes
TILE = 64
TRANSFORM = Affine(0.1 + 0.2, 0.0, 485900.0123456789, 0.0, -1 / 3, 5209247.7)


def trained_model(folder: Path, **changes: Any) -> TrainedModel:
    """A run whose network maps different pixels to different classes, loaded as users load it."""
    model = changes.get("model", ModelConfig(base_channels=4, depth=2, norm="none"))
    values: dict[str, Any] = {
        "model": model,
        "bands": BANDS,
        "classes": CLASSES,
        "class_values": (),
        "dtype": "uint8",
        "tile": TILE,
        "mean": (110.0, 112.0, 113.0, 118.0),
        "std": (40.0, 41.0, 42.0, 46.0),
        "nodata": None,
        "data_fingerprint": "f" * 64,
    }
    description = Description(**values | changes)
    torch.manual_seed(3)
    module = build_model(model, description.channels, len(description.classes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)  # away from ties, and towards maps of many classes
    states = {"model": module.state_dict(), "description": description.to_dict()}
    checkpoint.save(folder / "checkpoints", states, step=7, epoch=1)
    return load_run(folder, "cpu")


def smooth(generator: np.random.Generator, height: int, width: int, bands: int = 4) -> NDArray[Any]:
    """An image (bands, height, width) uint8 without a pixel that is 0 in all bands."""
    coarse = generator.integers(10, 246, (bands, -(-height // 4), -(-width // 4)), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width])


def write_tile(folder: Path, key: str, generator: np.random.Generator, size: int = TILE) -> None:
    """One tile of the 2021 edition, with labels that overlap and pixels that do not count."""
    image = smooth(generator, size, size)
    for name, bands, colours in (("rgb", image[:3], "RGB"), ("nir", image[3:], "GRAY")):
        pixels = np.ascontiguousarray(bands.transpose(1, 2, 0))
        _write(folder / "images" / name / f"{key}.jpg", simplejpeg.encode_jpeg(pixels, 95, colours))
    for name in ("boundaries", "masks"):
        mask = np.full((size, size), 255, np.uint8)
        mask[: size // 8] = 0
        _write_mask(folder / name / f"{key}.png", mask)
    for name in (*CLASSES[1:], "storm_damage"):
        mask = np.zeros((size, size), np.uint8)
        row, column = generator.integers(0, size // 2, 2)
        mask[row : row + size // 4, column : column + size // 3] = 255
        _write_mask(folder / "labels" / name / f"{key}.png", mask)


def _write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def keys(split: str, count: int) -> list[str]:
    """Names of tiles in order, each split of a field of its own."""
    return sorted(f"{split.upper()}_{64 * n}-0-{64 * n + 64}-64" for n in range(count))


def agriculture_vision(root: Path, splits: dict[str, int]) -> Path:
    """An Agriculture-Vision folder with so many tiles in each split; test has no labels."""
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for key in keys(split, count):
            write_tile(root / split, key, generator)
    if "test" in splits:
        (root / "test" / "labels").rename(root / "kept labels of test")
    return root


def prepared(source: Path, out: Path) -> Path:
    """The data set that `prepare` makes of an Agriculture-Vision folder."""
    prepare(source, out, PrepareOptions(workers=1, shard_tiles=4))
    return out


def write_scene(path: Path, image: NDArray[Any], **profile: Any) -> Path:
    """A GeoTIFF with transform and coordinate system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names: Sequence[str] | None = profile.pop("names", None)
    alpha: bool = profile.pop("with_alpha", False)
    bands, height, width = image.shape
    given = {"crs": "EPSG:26914", "transform": TRANSFORM, "photometric": "MINISBLACK", "alpha": "NO"}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=height,
        width=width,
        count=bands,
        dtype=image.dtype.name,
        **(given | profile),
    ) as dataset:
        if alpha:
            kinds = [ColorInterp.gray, *[ColorInterp.undefined] * (bands - 2), ColorInterp.alpha]
            dataset.colorinterp = kinds
        if names:
            dataset.descriptions = tuple(names)
        dataset.write(image)
    return path
