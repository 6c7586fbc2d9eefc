"""Small maps of class ids, written with rasterio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio import Affine

from agrivision.maps.legend import NODATA, Legend

UTM = {"crs": "EPSG:32633", "transform": Affine(10, 0, 400_000, 0, -10, 5_600_000)}
LEGEND = Legend(classes=("background", "weed_cluster", "water", "storm's damage"))


def write_map(path: Path, ids: NDArray[Any], **options: Any) -> Path:
    height, width = ids.shape
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": NODATA} | options
    with rasterio.open(path, "w", height=height, width=width, **profile) as dataset:
        dataset.write(ids.astype(np.uint8), 1)
    return path


def patches(
    seed: int, shape: tuple[int, int], side: int = 5, share_of_nodata: float = 0.1
) -> NDArray[np.uint8]:
    """Squares of random classes, some pixels of which hold others, with holes without data."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, len(LEGEND.classes), (-(-shape[0] // side), -(-shape[1] // side)))
    ids = np.kron(coarse, np.ones((side, side), np.int64))[: shape[0], : shape[1]]
    odd = rng.random(shape) < 0.05
    ids[odd] = rng.integers(0, len(LEGEND.classes), int(odd.sum()))
    ids[rng.random(shape) < share_of_nodata] = NODATA
    return ids.astype(np.uint8)
