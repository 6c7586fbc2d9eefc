"""Small scenes with label rasters, written with rasterio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin

CRS = "EPSG:26914"
ORIGIN = from_origin(486_000, 5_209_000, 5, 5)


def write_raster(path: Path, image: NDArray[Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if image.ndim == 3 else image[None]
    profile = {"driver": "GTiff", "crs": CRS, "transform": ORIGIN} | options
    count, height, width = image.shape
    with rasterio.open(
        path, "w", count=count, height=height, width=width, dtype=image.dtype, **profile
    ) as dataset:
        dataset.write(image)


def noise(seed: int, shape: tuple[int, ...], dtype: str = "uint8") -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if np.issubdtype(np.dtype(dtype), np.floating):
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def write_source(
    root: Path,
    *,
    scenes: int = 3,
    shape: tuple[int, int, int] = (4, 50, 70),
    dtype: str = "uint8",
    values: int = 3,
    **options: Any,
) -> dict[str, tuple[NDArray[Any], NDArray[np.uint8]]]:
    """Write `scenes/` and `labels/`; returns image and labels by stem."""
    pairs = {}
    for number in range(scenes):
        image = noise(number, shape, dtype)
        labels = np.random.default_rng([number, 1]).integers(0, values, shape[1:], dtype=np.uint8)
        write_raster(root / "scenes" / f"s{number}.tif", image, **options)
        write_raster(root / "labels" / f"s{number}.tif", labels, nodata=255)
        pairs[f"s{number}"] = image, labels
    return pairs
