"""The image files of a record: their bytes → pixels and back.

JPEG files come from the source as they are; scenes are stored as small GeoTIFFs, lossless. Sizes are
read from the headers first, so that a damaged or hostile file cannot ask for more memory than a tile
takes. A raw file is nothing but pixels, (height, width, bands), little-endian; where the tile lies then
stands in a small JSON file beside it, a part without bands.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from agrivision.data.schema import MAX_TILE, Part
from agrivision.data.tile import Coordinates, Image
from agrivision.errors import DatasetError
from agrivision.json_values import items, number, parse, text

JPEG, TIFF, RAW, JSON = "jpg", "tif", "raw", "json"
RAW_IMAGE, PLACE = f"image.{RAW}", f"place.{JSON}"  # extensions of a raw record
_JPEG_COLOURS = {1: "GRAY", 3: "RGB"}
_SCAN = re.compile(rb"\xff\xda")
_MOST_SCANS = 100  # of a JPEG; progressive ones have about ten
_SOS, _SOF_COMPONENTS = (
    0xDA,
    9,
)  # kind of the segment that begins a scan; where a frame counts components
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = {0xC0, 0xC1, 0xC9}
_HORIZONTAL_DIFFERENCES, _FLOATING_POINT = 2, 3  # the predictors of TIFF


def decode_part(
    content: bytes | memoryview, part: Part, dtype: str, size: int, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Decode one image file of a record.

    Args:
        content: the file.
        part: its extension and number of bands.
        dtype: type of the pixels; JPEG holds uint8 only.
        size: side of the tile in pixels.
        out: C-contiguous (size, size, bands) of that type to decode into; made if absent.

    Returns:
        `out`, shape (size, size, bands).

    Raises:
        DatasetError: the file is damaged, or of another size, type or number of bands.
    """
    if out is None:
        out = np.empty((size, size, part.bands), dtype)
    elif out.shape != (size, size, part.bands) or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"cannot decode {part} into {out.dtype} {out.shape}")
    kind = kind_of(part)
    try:
        if kind == JPEG:
            decode_jpeg(content, out)
        elif kind == TIFF:
            _decode_tiff(content, out)
        elif kind == RAW:
            _copy_raw(content, out)
        elif kind == JSON:
            decode_place(content)
        else:
            raise DatasetError(f"image files of type {kind!r} are not known")
    except DatasetError as error:
        raise DatasetError(f"{part.extension}: {error}") from None
    return out


def kind_of(part: Part) -> str:
    """What follows the last dot of the extension: one of JPEG, TIFF, RAW and JSON, if it is known."""
    return part.extension.rpartition(".")[2]


def is_raw(part: Part) -> bool:
    """Whether the file is the pixels as they are in memory."""
    return kind_of(part) == RAW


def _copy_raw(content: bytes | memoryview, out: NDArray[Any]) -> None:
    if len(content) != out.nbytes:
        raise DatasetError(f"{len(content)} bytes where {out.nbytes} belong")
    pixels = np.frombuffer(content, out.dtype).reshape(out.shape)
    if not np.may_share_memory(pixels, out):  # else it was read to where it belongs
        out[...] = pixels


def encode_raw(image: Image) -> bytes:
    """A tile's pixels as a raw file.

    Args:
        image: shape (bands, height, width).
    """
    return np.asarray(image.transpose(1, 2, 0), image.dtype.newbyteorder("<")).tobytes()


def jpeg_shape(content: bytes | memoryview) -> tuple[int, int, int]:
    """Height, width and bands of a JPEG, from its header.

    Raises:
        DatasetError: it is not a JPEG of one or three bands.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise DatasetError(f"not a whole JPEG ({error})") from None
    except KeyError:  # libjpeg-turbo knows more of them than its bindings
        raise DatasetError("a JPEG of unusual subsampling: save it anew, as 4:4:4 or 4:2:0") from None
    if max(height, width) > MAX_TILE:
        raise DatasetError(f"{width} x {height} pixels: larger than any tile")
    # Each scan goes over all pixels again, and a scan of twelve bytes is one.
    if not _has_one_scan(content) and len(_SCAN.findall(content)) > _MOST_SCANS:
        raise DatasetError(f"a JPEG of more than {_MOST_SCANS} scans")
    if colours not in ("Gray", "YCbCr", "RGB"):
        raise DatasetError(f"a JPEG of the colour space {colours}: grey or RGB belong here")
    return height, width, 1 if colours == "Gray" else 3


def _has_one_scan(content: bytes | memoryview) -> bool:
    """Whether a JPEG's first scan is its last: sequential, with all components (ITU T.81, annex B)."""
    place, components = 2, 0
    while place + _SOF_COMPONENTS < len(content) and content[place] == 0xFF:
        kind = content[place + 1]
        if kind == _SOS:
            return content[place + 4] == components
        if kind in _FRAMES:
            if kind not in _SEQUENTIAL:
                return False
            components = content[place + _SOF_COMPONENTS]
        elif kind < 0xC0 or 0xD0 <= kind <= 0xD9:  # without a length: none of a picture's header
            return False
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return False


def decode_jpeg(content: bytes | memoryview, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG strictly: one that ends early or is damaged is an error, never grey blocks.

    Args:
        content: the file.
        out: C-contiguous, shape (height, width, bands), uint8.

    Raises:
        DatasetError: it is damaged or has another shape.
    """
    shape = jpeg_shape(content)
    if shape != out.shape:
        raise DatasetError(f"{describe(shape)} where {describe(out.shape)} belong")
    _decode_strictly(content, _JPEG_COLOURS[shape[2]], out)


def decode_jpeg_for_four(content: bytes | memoryview, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG of three bands strictly, each pixel beside room for a fourth band.

    Args:
        content: the file.
        out: C-contiguous, shape (height, width, 4), uint8; the fourth band may hold anything then.

    Raises:
        DatasetError: it is damaged or has another shape.
    """
    shape, wanted = jpeg_shape(content), (*out.shape[:2], 3)
    if shape != wanted:
        raise DatasetError(f"{describe(shape)} where {describe(wanted)} belong")
    _decode_strictly(content, "RGBX", out)


def _decode_strictly(content: bytes | memoryview, colours: str, out: NDArray[np.uint8]) -> None:
    try:
        simplejpeg.decode_jpeg(content, colours, buffer=out, strict=True)
    except ValueError as error:
        raise DatasetError(f"not a whole JPEG ({error})") from None


def describe(shape: tuple[int, ...]) -> str:
    """Height, width and bands in words, width first as image programs say it."""
    height, width, bands = shape
    return f"{width} x {height} pixels with {bands} band{'s' if bands > 1 else ''}"


def _decode_tiff(content: bytes | memoryview, out: NDArray[Any]) -> None:
    with _opened_tiff(content) as dataset:
        _check_tiff(dataset, out)
        dataset.read(out=out.transpose(2, 0, 1))


@contextmanager
def _opened_tiff(content: bytes | memoryview) -> Iterator[Any]:
    """A record's GeoTIFF; what GDAL refuses of it within the block is a DatasetError."""
    if not content:  # rasterio takes that for a file to be written
        raise DatasetError("not a whole TIFF (it is empty)")
    rasterio = geodata()
    try:
        with rasterio.MemoryFile(bytes(content)) as memory, memory.open(driver="GTiff") as dataset:
            yield dataset
    # A coordinate system that cannot be and text that is no UTF-8 are ValueErrors.
    except (rasterio.errors.RasterioError, ValueError) as error:
        raise DatasetError(f"not a whole TIFF ({_reason(error)})") from None


def _check_tiff(dataset: Any, out: NDArray[Any]) -> None:
    """Refuse what was not written by `encode_tiff` before GDAL takes memory for it."""
    shape = (dataset.height, dataset.width, dataset.count)
    # A string: numpy does not know all of GDAL's types.
    if shape != out.shape or dataset.dtypes[0] != out.dtype.name:
        raise DatasetError(
            f"{describe(shape)}, {dataset.dtypes[0]}, where {describe(out.shape)}, {out.dtype}, belong"
        )
    if any(height > shape[0] or width > shape[1] for height, width in dataset.block_shapes):
        raise DatasetError("its blocks are larger than the tile")


def encode_tiff(image: Image, coordinates: Coordinates | None, nodata: float | None) -> bytes:
    """A tile as a GeoTIFF, losslessly compressed; the same tile always gives the same bytes.

    Args:
        image: shape (bands, height, width).
        coordinates: of the tile itself, not of its scene.
        nodata: value of the pixels that hold nothing, or None.
    """
    rasterio = geodata()
    bands, height, width = image.shape
    floating = np.issubdtype(image.dtype, np.floating)
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff",
            height=height,
            width=width,
            count=bands,
            dtype=image.dtype.name,
            nodata=nodata,
            crs=coordinates.crs if coordinates and coordinates.crs else None,
            transform=rasterio.Affine(*coordinates.transform) if coordinates else None,
            compress="deflate",
            predictor=_FLOATING_POINT if floating else _HORIZONTAL_DIFFERENCES,
            interleave="pixel",
            # Left alone, GDAL calls the fourth band of 8-bit images alpha: near-infrared is not.
            photometric="MINISBLACK",
            alpha="NO",
        ) as dataset:
            dataset.write(image)
        return bytes(memory.getbuffer())


def tiff_coordinates(content: bytes | memoryview) -> Coordinates | None:
    """Where a tile lies, from its GeoTIFF; None where it does not say.

    Raises:
        DatasetError: it is not a TIFF.
    """
    with _opened_tiff(content) as dataset:
        return coordinates_of(dataset)


def encode_place(coordinates: Coordinates | None) -> bytes:
    """Where a tile lies as JSON: crs (WKT) and transform (six numbers), or null where unknown."""
    return json.dumps(dataclasses.asdict(coordinates) if coordinates else None).encode()


def decode_place(content: bytes | memoryview) -> Coordinates | None:
    """What `encode_place` wrote.

    Raises:
        DatasetError: it is something else.
    """
    try:
        place = parse(bytes(content))
        if place is None:
            return None
        a, b, c, d, e, f = map(number, items(place["transform"]))
        return Coordinates(crs=text(place["crs"]), transform=(a, b, c, d, e, f))
    except (ValueError, TypeError, KeyError):
        raise DatasetError("not the coordinates of a tile") from None


def coordinates_of(dataset: Any) -> Coordinates | None:
    """Coordinates of an open rasterio dataset; None where it has neither system nor transform."""
    if dataset.crs is None and dataset.transform.is_identity:
        return None
    crs = dataset.crs.to_wkt() if dataset.crs else ""
    return Coordinates(crs=crs, transform=tuple(dataset.transform)[:6])


def _reason(error: Exception) -> str:
    """What GDAL said first: rasterio's own message is often only a pointer to it."""
    return " ".join(str(error.__cause__ or error).split())


@cache
def geodata() -> ModuleType:
    """Rasterio, imported when first needed, since it takes a quarter of a second.

    Its warning about tiles and scenes without coordinates is turned off: they are welcome here.
    """
    import rasterio  # noqa: PLC0415
    import rasterio.vrt  # noqa: PLC0415
    import rasterio.warp  # noqa: PLC0415

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio  # type: ignore[no-any-return]
