"""The image files of a record: their bytes → pixels and back.

JPEG files come from the source as they are; scenes are stored as small GeoTIFFs. Sizes are read from
the headers first, so that a damaged or hostile file cannot ask for more memory than a tile takes.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from agrivision.data.schema import Part
from agrivision.data.tile import Coordinates, Image
from agrivision.errors import DatasetError

JPEG, TIFF = "jpg", "tif"
_JPEG_COLOURS = {1: "GRAY", 3: "RGB"}
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
    kind = part.extension.rpartition(".")[2]
    try:
        if kind == JPEG:
            decode_jpeg(content, out)
        elif kind == TIFF:
            _decode_tiff(content, out)
        else:
            raise DatasetError(f"image files of type {kind!r} are not known")
    except DatasetError as error:
        raise DatasetError(f"{part.extension}: {error}") from None
    return out


def jpeg_shape(content: bytes | memoryview) -> tuple[int, int, int]:
    """Height, width and bands of a JPEG, from its header.

    Raises:
        DatasetError: it is not a JPEG of one or three bands.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise DatasetError(f"not a whole JPEG ({error})") from None
    if colours not in ("Gray", "YCbCr", "RGB"):
        raise DatasetError(f"a JPEG of the colour space {colours}: grey or RGB belong here")
    return height, width, 1 if colours == "Gray" else 3


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
    try:
        simplejpeg.decode_jpeg(content, _JPEG_COLOURS[shape[2]], buffer=out, strict=True)
    except ValueError as error:
        raise DatasetError(f"not a whole JPEG ({error})") from None


def describe(shape: tuple[int, ...]) -> str:
    """Height, width and bands in words, width first as image programs say it."""
    height, width, bands = shape
    return f"{width} x {height} pixels with {bands} band{'s' if bands > 1 else ''}"


def _decode_tiff(content: bytes | memoryview, out: NDArray[Any]) -> None:
    if not content:  # rasterio takes that for a file to be written
        raise DatasetError("not a whole TIFF (it is empty)")
    rasterio = geodata()
    try:
        with rasterio.MemoryFile(bytes(content)) as memory, memory.open(driver="GTiff") as dataset:
            shape = (dataset.height, dataset.width, dataset.count)
            if shape != out.shape or dataset.dtypes[0] != out.dtype:
                raise DatasetError(
                    f"{describe(shape)}, {dataset.dtypes[0]}, where {describe(out.shape)},"
                    f" {out.dtype}, belong"
                )
            dataset.read(out=out.transpose(2, 0, 1))
    except rasterio.errors.RasterioError as error:
        raise DatasetError(f"not a whole TIFF ({_reason(error)})") from None


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
    rasterio = geodata()
    try:
        with rasterio.MemoryFile(bytes(content)) as memory, memory.open(driver="GTiff") as dataset:
            return coordinates_of(dataset)
    except rasterio.errors.RasterioError as error:
        raise DatasetError(f"not a whole TIFF ({_reason(error)})") from None


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

    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    return rasterio  # type: ignore[no-any-return]
