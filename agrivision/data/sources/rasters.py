"""Scenes with label rasters of the same grid, cut into tiles that keep their coordinates.

A pixel of a scene is nodata where all bands hold their nodata value, where a band is not finite (or
beyond 1e100), or where the file's mask or alpha band says so. A pixel of a label raster counts unless
it holds the nodata value, the value to ignore, or one that is no class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.labels import VALID_BIT, Labels
from agrivision.data.parts import coordinates_of, encode_tiff, geodata
from agrivision.data.schema import Part
from agrivision.data.sources.guard import DRIVERS, VRT, check, check_opened, files_of
from agrivision.data.sources.header import check_header
from agrivision.data.sources.pairs import Pair
from agrivision.data.sources.source import Flaw, Read, Reference, Window
from agrivision.data.tile import Coordinates, Tile

EXTENSION = "image.tif"
_LARGEST = 1e100  # no measurement comes near; the largest double is a usual mark for nodata


@dataclass(frozen=True, kw_only=True)
class RasterReader:
    """Cuts tiles from scenes.

    Attributes:
        pairs: by the group of the references.
        tile: side of the tiles in pixels.
        bands: indexes of the scenes' bands, from 1.
        alpha: index of the band that says where the scene is valid, or None.
        values: of the classes in the label rasters, by class id.
        ignore: value in the label rasters that does not count, besides nodata.
    """

    pairs: tuple[Pair, ...]
    tile: int
    bands: tuple[int, ...]
    alpha: int | None
    values: tuple[int, ...]
    ignore: int | None

    def files(self, reference: Reference) -> list[Path]:
        """See TileReader."""
        pair = self.pairs[reference.group]
        return [*files_of(pair.scene), *files_of(pair.label)]

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """See TileReader; the files of the latest scene stay open, with what GDAL cached of them."""
        with ExitStack() as stack:
            now: list[tuple[int, Any, Any]] = []

            def read(reference: Reference) -> Tile | None:
                if not now or now[0][0] != reference.group:
                    stack.close()
                    now.clear()
                    pair = self.pairs[reference.group]
                    scene = stack.enter_context(opened(pair.scene))
                    now.append((reference.group, scene, stack.enter_context(opened(pair.label))))
                return self._cut(reference, *now[0][1:])

            yield read

    def _cut(self, reference: Reference, scene: Any, label: Any) -> Tile | None:
        assert reference.window is not None
        x1, y1, x2, y2 = reference.window
        inside = (y1, min(y2, scene.height)), (x1, min(x2, scene.width))
        pixels, pixels_valid = self._read_scene(scene, inside, reference)
        labels, labels_valid = self._read_labels(label, inside, reference)
        valid = pixels_valid & labels_valid & np.not_equal(labels, 0)
        if not valid.any():
            return None
        nodata = nodata_of(scene)
        image = np.full((len(self.bands), self.tile, self.tile), nodata or 0, pixels.dtype)
        image[:, : pixels.shape[1], : pixels.shape[2]] = pixels
        whole = np.zeros((self.tile, self.tile), np.uint16)
        whole[: labels.shape[0], : labels.shape[1]] = labels | valid.astype(np.uint16) << VALID_BIT
        coordinates = _shifted(coordinates_of(scene), x1, y1)
        return Tile(
            key=reference.key,
            field=reference.field,
            files={EXTENSION: encode_tiff(image, coordinates, nodata)},
            image=image,
            labels=whole,
            coordinates=coordinates,
        )

    def _read_scene(
        self, scene: Any, inside: Slices, reference: Reference
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        path = self.pairs[reference.group].scene
        pixels = attempt(path, lambda: scene.read(list(self.bands), window=inside), reference.window)
        valid = attempt(path, lambda: own_mask(scene, inside), reference.window)
        if self.alpha is not None:
            alpha = attempt(path, lambda: scene.read(self.alpha, window=inside), reference.window)
            valid = valid & np.greater(alpha, 0)
        return pixels, valid & has_data(pixels, [scene.nodatavals[band - 1] for band in self.bands])

    def _read_labels(
        self, label: Any, inside: Slices, reference: Reference
    ) -> tuple[Labels, NDArray[np.bool_]]:
        path = self.pairs[reference.group].label
        values, valid = attempt(path, lambda: read_labels(label, inside, self.ignore), reference.window)
        labels = np.zeros(values.shape, np.uint16)
        for bit, value in enumerate(self.values):
            labels |= np.equal(values, value).astype(np.uint16) << bit
        return labels, valid


Slices = tuple[tuple[int, int], tuple[int, int]]  # rows and columns, ends excluded


def part_of(bands: Sequence[str]) -> tuple[Part, ...]:
    """The only image file of a record."""
    return (Part(extension=EXTENSION, bands=len(bands)),)


def windows(height: int, width: int, tile: int, stride: int) -> list[Window]:
    """Where to cut: squares that start at multiples of the stride and may reach beyond the edge.

    None is added that lies in ground which the one before it covers up to the edge. With a stride up
    to the tile's side they cover every pixel, and with one equal to it exactly once.
    """
    rows, columns = _starts(height, tile, stride), _starts(width, tile, stride)
    return [(x, y, x + tile, y + tile) for y in rows for x in columns]


def _starts(length: int, tile: int, stride: int) -> list[int]:
    return [start for start in range(0, length, stride) if start == 0 or start - stride + tile < length]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a raster with the one driver that its suffix stands for.

    Raises:
        Flaw: it cannot be opened, or could make GDAL open something else.
    """
    rasterio = geodata()
    check(path)
    suffix = path.suffix.lower()
    driver = "VRT" if suffix == VRT else DRIVERS[suffix]
    with attempt(path, lambda: rasterio.open(path.absolute(), driver=driver)) as dataset:
        attempt(path, lambda: check_opened(path, dataset))
        attempt(path, lambda: dataset.descriptions)  # read when asked for: what is no text, now
        check_header(path, dataset)
        yield dataset


def attempt(path: Path, read: Callable[[], Any], window: Window | None = None) -> Any:
    """Read something of a raster.

    Raises:
        Flaw: it cannot be read; the line names the file and the window.
    """
    rasterio = geodata()
    try:
        return read()
    except UnicodeDecodeError:  # of the coordinate system, a band's name, a tag
        reason = "a text in it is no UTF-8: write the file anew, or without such names"
        raise Flaw(path, "unreadable", f"cannot be read ({reason})") from None
    except (rasterio.errors.RasterioError, OSError) as error:
        where = f" at {window}" if window else ""
        reason = " ".join(str(error.__cause__ or error).split())
        raise Flaw(path, "unreadable", f"cannot be read{where} ({reason})") from None


def nodata_of(dataset: Any) -> float | None:
    """The nodata value of the first band, where the pixels' type can hold it."""
    value = dataset.nodatavals[0]
    return value if value is not None and _holds(np.dtype(dataset.dtypes[0]), value) else None


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    if np.issubdtype(dtype, np.floating):
        return True
    limits = np.iinfo(dtype)
    return float(value).is_integer() and limits.min <= value <= limits.max


def has_data(pixels: NDArray[Any], nodata: Sequence[float | None]) -> NDArray[np.bool_]:
    """Where a band differs from its nodata value and none is beyond measure: (height, width)."""
    shape = pixels.shape[1:]
    valid = np.ones(shape, np.bool_)
    if np.issubdtype(pixels.dtype, np.floating):
        valid &= (np.abs(pixels) < min(_LARGEST, float(np.finfo(pixels.dtype).max))).all(
            axis=0
        )  # False for NaN as well
    values = [v if v is not None and _holds(pixels.dtype, v) else None for v in nodata]
    if all(value is not None for value in values):
        missing = [np.equal(band, band.dtype.type(v)) for band, v in zip(pixels, values, strict=True)]
        valid &= ~np.logical_and.reduce(missing)
    return valid


def own_mask(dataset: Any, inside: Slices) -> NDArray[np.bool_]:
    """What a mask in or beside the file says; True everywhere without one. Alpha is no such mask."""
    flags = {flag.name for flag in dataset.mask_flag_enums[0]}
    if "per_dataset" in flags and "alpha" not in flags:
        mask: NDArray[np.bool_] = np.greater(dataset.read_masks(1, window=inside), 0)
        return mask
    (top, bottom), (left, right) = inside
    return np.ones((bottom - top, right - left), np.bool_)


def read_labels(
    label: Any, inside: Slices, ignore: int | None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values of a label raster and where they count, both (height, width)."""
    values: NDArray[Any] = label.read(1, window=inside)
    valid = own_mask(label, inside) & has_data(values[None], [label.nodatavals[0]])
    if ignore is not None:
        valid = valid & np.not_equal(values, ignore)
    return values, valid


def _shifted(coordinates: Coordinates | None, column: int, row: int) -> Coordinates | None:
    """Coordinates of a window that starts at this pixel."""
    if coordinates is None:
        return None
    a, b, c, d, e, f = coordinates.transform
    moved = (a, b, a * column + b * row + c, d, e, d * column + e * row + f)
    return Coordinates(crs=coordinates.crs, transform=moved)
