"""What a raster's header says of its size, looked at before memory or time is taken for it.

A header of a few bytes can ask for any amount of either: sides of two thousand million pixels, blocks
of four thousand megabytes, thousands of bands.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from agrivision.data.sources.source import Flaw

_MOST_BANDS = 1024  # hyperspectral scenes have some hundreds
_MOST_BLOCK_BYTES = 1 << 31  # that GDAL takes to read any pixel; an unpacked strip may be a whole scene
_MOST_PIXELS_PER_BYTE = 1 << 17  # of the file: an empty page, packed as well as any format can
_INDEX_BYTES = 4  # of a TIFF for each of its blocks, at least: where it begins and how long it is


def check_header(path: Path, dataset: Any) -> None:
    """Refuse a raster whose header asks for more than the file can hold, or that lies nowhere.

    Args:
        path: of the file.
        dataset: the same, open, nothing of it read yet.

    Raises:
        Flaw: it does.
    """
    height, width = dataset.height, dataset.width
    size = sum(Path(file).stat().st_size for file in dataset.files if Path(file).is_file())
    if dataset.count > _MOST_BANDS:
        raise Flaw(path, "header", f"has {dataset.count} bands where {_MOST_BANDS} are the most")
    if dataset.driver != "VRT" and height * width > _MOST_PIXELS_PER_BYTE * size:
        raise Flaw(path, "header", f"has {size} bytes, too few for {width} x {height} pixels")
    for (rows, columns), dtype in zip(dataset.block_shapes, dataset.dtypes, strict=True):
        blocks = -(-height // rows) * -(-width // columns)
        if dataset.driver == "GTiff" and blocks * _INDEX_BYTES > size:
            raise Flaw(path, "header", f"has {size} bytes, too few for {blocks} blocks")
        if rows * columns * _item_bytes(dtype) > _MOST_BLOCK_BYTES:
            raise Flaw(path, "header", f"has blocks of {columns} x {rows} pixels, too large to be read")
    transform = tuple(dataset.transform)[:6]
    a, b, _, d, e, _ = transform
    if not all(map(math.isfinite, transform)) or a * e - b * d == 0:
        raise Flaw(path, "coordinates", "has a transform that leads to no place on the ground")


def _item_bytes(dtype: str) -> int:
    """Bytes of a value; GDAL has complex integers, which numpy has not."""
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        return 16
