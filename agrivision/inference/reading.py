"""Rectangles of a scene with what lies around them, from a file or from memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agrivision.data.parts import geodata
from agrivision.data.sources.rasters import attempt, has_data, opened, own_mask
from agrivision.data.sources.source import Window
from agrivision.inference.resampling import resampled
from agrivision.inference.scene import Scene
from agrivision.inference.tiling import Block, Tiling
from agrivision.model.padding import mirrored

Slices = tuple[tuple[int, int], tuple[int, int]]  # rows and columns, ends excluded
_CACHE_MEGABYTES = 256  # of blocks that GDAL keeps; its own idea is a twentieth of the machine


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A block as it was read.

    Attributes:
        pixels: (bands, rows, columns) of the block's reach, with the margin around it.
        valid: where the block's extent has data, bool (rows, columns).
    """

    pixels: NDArray[Any]
    valid: NDArray[np.bool_]


class Pixels(Protocol):
    """Imagery that can be read in pieces."""

    @property
    def height(self) -> int:
        """In pixels."""

    @property
    def width(self) -> int:
        """In pixels."""

    def read(self, inside: Slices) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Pixels (bands, rows, columns) as the network takes them, and where there is data."""


def read_block(pixels: Pixels, block: Block, tiling: Tiling) -> Cut:
    """Read a block and what is around it; beyond the scene's edges its pixels are mirrored.

    Raises:
        Flaw: the file cannot be read there.
    """
    whole, valid = read_around(pixels, block.reach, tiling.margin)
    return Cut(pixels=whole, valid=valid)


def read_around(pixels: Pixels, window: Window, margin: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read a window and what is around it; beyond the scene's edges its pixels are mirrored.

    Args:
        pixels: the scene.
        window: begins inside of the scene and may reach beyond its edge.
        margin: pixels around the window.

    Returns:
        Pixels (bands, height + 2 margin, width + 2 margin), and where the part of the window that lies
        in the scene has data, bool (rows, columns).

    Raises:
        Flaw: the file cannot be read there.
    """
    x1, y1, x2, y2 = window
    rows = mirrored(pixels.height, margin - y1, y2 - y1 + 2 * margin).numpy()
    columns = mirrored(pixels.width, margin - x1, x2 - x1 + 2 * margin).numpy()
    top, left = int(rows.min()), int(columns.min())
    found, valid = pixels.read(((top, int(rows.max()) + 1), (left, int(columns.max()) + 1)))
    own = valid[y1 - top : min(y2, pixels.height) - top, x1 - left : min(x2, pixels.width) - left]
    return found[:, (rows - top)[:, None], columns - left], own


class ScenePixels:
    """A scene that is open.

    Args:
        dataset: of rasterio.
        scene: what is known of it.
    """

    def __init__(self, dataset: Any, scene: Scene) -> None:
        self._dataset, self._scene = dataset, scene

    @property
    def height(self) -> int:
        """In pixels."""
        return self._scene.height

    @property
    def width(self) -> int:
        """In pixels."""
        return self._scene.width

    def read(self, inside: Slices) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """See `Pixels`; empty pixels are as the network knows them.

        Raises:
            Flaw: the file cannot be read there.
        """
        scene = self._scene
        if scene.resampled is None:
            found, valid = self._read(self._dataset, inside)
        else:
            file, target = self._dataset, (scene.height, scene.width)
            size = (file.height, file.width)
            found, valid = resampled(lambda part: self._read(file, part), size, target, inside)
        pixels = scene.scaled(found)
        if scene.empty is not None:
            pixels[:, ~valid] = scene.empty
        elif np.issubdtype(pixels.dtype, np.floating):
            pixels[:, ~valid] = np.nan  # to the network the mean; -9999 would outshine the neighbours
        return pixels, valid

    def _read(self, file: Any, inside: Slices) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Bands that are there, as they are in the file, and where there is data."""
        scene = self._scene
        (top, bottom), (left, right) = inside
        where = (left, top, right, bottom)
        there = [band for band in scene.bands if band is not None]
        found: NDArray[Any] = attempt(scene.path, lambda: file.read(there, window=inside), where)
        valid = attempt(scene.path, lambda: own_mask(file, inside), where)
        if scene.alpha is not None:
            alpha = attempt(scene.path, lambda: file.read(scene.alpha, window=inside), where)
            valid = valid & np.greater(alpha, 0)
        return found, valid & has_data(found, scene.nodata)


@contextmanager
def open_scene(scene: Scene) -> Iterator[Any]:
    """The scene's raster, as its file has it; `ScenePixels` knows its grid, and what has data.

    Raises:
        Flaw: it cannot be opened.
    """
    with geodata().Env(GDAL_CACHEMAX=_CACHE_MEGABYTES), opened(scene.path) as dataset:
        yield dataset


@dataclass(frozen=True)
class ArrayPixels:
    """Imagery in memory.

    Attributes:
        image: (bands, height, width), pixels as in the data set.
        valid: where it has data, (height, width).
    """

    image: NDArray[Any]
    valid: NDArray[np.bool_]

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.image.shape[1])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.image.shape[2])

    def read(self, inside: Slices) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """See `Pixels`."""
        (top, bottom), (left, right) = inside
        return self.image[:, top:bottom, left:right], self.valid[top:bottom, left:right]
