"""A finished raster → a Cloud Optimised GeoTIFF: overviews, colours and names inside one file.

GDAL's COG driver keeps whatever says where the pixels lie: rotated transforms, ground control points,
no coordinate system at all. One that GeoTIFF has no words for goes into `NAME.tif.aux.xml`. Names of
categories and attribute tables would go there as well; the classes therefore stand in the tags,
`CLASS_0` and so on, and in the style of `agrivision.maps.style`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from agrivision.data.parts import geodata
from agrivision.data.sources.rasters import opened, windows
from agrivision.data.sources.source import Flaw
from agrivision.errors import StorageError, one_line
from agrivision.maps.legend import NODATA, Legend
from agrivision.storage import storage_error, sync_folder

SIDECAR = ".aux.xml"  # what GDAL adds to the name of a file
_BLOCK = 512  # pixels
_WINDOW = 2 * _BLOCK  # pixels: what is compared at a time
_CACHE = 64  # MB of blocks that GDAL keeps; its own idea is a twentieth of the machine


def write_cog(
    source: Any,
    target: Path,
    *,
    categorical: bool,
    legend: Legend | None = None,
    tags: Mapping[str, str],
    descriptions: Sequence[str],
    nodata: int | None,
    threads: int = 1,
) -> None:
    """Write a raster as a Cloud Optimised GeoTIFF, the same bytes for the same pixels.

    Overviews of class ids take the most frequent id, those of other values the mean; both pass over
    pixels without data. Memory grows neither with the raster nor with what GDAL thinks a machine has.

    Args:
        source: a GeoTIFF's path, or one that is open: uint8, with its coordinates. It stays as it is.
        target: file to write; its folder must exist. What GDAL noted of an older one beside it goes.
        categorical: whether the values are class ids.
        legend: colours of the only band and names of its values, or None.
        tags: to be read with any GDAL, in this order; `TIFFTAG_SOFTWARE` and the like as TIFF has them.
        descriptions: names of the bands.
        nodata: value that stands for no data in every band, or None.
        threads: that compress; the bytes do not depend on them.

    Raises:
        StorageError, NotWritable: the disk refused, or what was written is not what was asked for.
    """
    rasterio = geodata()
    beside = target.with_name(f".{target.stem}.{os.getpid()}.part.tif")
    names = {
        f"CLASS_{class_id}": name for class_id, name in enumerate(legend.classes if legend else ())
    }
    about = {key: one_line(value) for key, value in {**names, **tags}.items()}
    try:
        beside.touch()  # the system says why a file cannot be made; GDAL would not say it as clearly
        beside.unlink()
        with (
            rasterio.Env(GDAL_CACHEMAX=_CACHE),
            _opened(source) as dataset,
            _described(dataset, legend, about, descriptions, nodata) as described,
        ):
            options = _options(categorical) | {"num_threads": threads}
            _copy(described, beside, driver="COG", **options)
            whole = _is_whole(beside, described)
        if not whole:
            raise StorageError(f"cannot write {target}: it is not whole; is the disk full?")
        _put(beside, target)
    except (Flaw, rasterio.errors.RasterioError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise StorageError(f"cannot write {target}: {reason}; is the disk full?") from None
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        for leftover in ("", SIDECAR, ".ovr.tmp"):  # a read-only file system refuses even to look
            with suppress(OSError):
                _beside(beside, leftover).unlink(missing_ok=True)


def _copy(source: Any, target: Any, **options: Any) -> None:
    """Copy a raster with GDAL.

    Raises:
        RasterioError: GDAL refused; of some of its errors, rasterio makes none of its own.
    """
    from rasterio._err import CPLE_BaseError  # noqa: PLC0415 - as late as `geodata`
    from rasterio.shutil import copy  # noqa: PLC0415

    try:
        copy(source, target, **options)
    except CPLE_BaseError as error:
        raise geodata().errors.RasterioError(str(error)) from None


def _options(categorical: bool) -> dict[str, Any]:
    return {
        "blocksize": _BLOCK,
        "compress": "deflate",  # every reader knows it
        "predictor": "no" if categorical else "yes",  # differences of ids repeat less than ids do
        "bigtiff": "if_safer",
        "overview_resampling": "mode" if categorical else "average",
    }


def _opened(source: Any) -> Any:
    return opened(source) if isinstance(source, Path) else nullcontext(source)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


@contextmanager
def _described(
    dataset: Any,
    legend: Legend | None,
    tags: Mapping[str, str],
    descriptions: Sequence[str],
    nodata: int | None,
) -> Iterator[Any]:
    """The same pixels with colours and names: a view in memory, so that the source stays as it is."""
    rasterio = geodata()
    with rasterio.MemoryFile(ext=".vrt") as view:
        _copy(dataset, view.name, driver="VRT")
        with rasterio.open(view.name, "r+", driver="VRT") as described:
            if dataset.gcps[0]:  # the view's text has fewer digits
                points, system = dataset.gcps
                described.gcps = (points, system or rasterio.CRS())
            described.nodata = nodata
            described.update_tags(**tags)
            for band, description in enumerate(descriptions, 1):
                described.set_band_description(band, one_line(description))
            if legend is not None:
                described.write_colormap(1, _colormap(legend))
            yield described


def _colormap(legend: Legend) -> dict[int, tuple[int, int, int, int]]:
    colors = {class_id: (*color, 255) for class_id, color in enumerate(legend.colors)}
    return colors | {NODATA: (0, 0, 0, 0)}


def _is_whole(path: Path, described: Any) -> bool:
    """Whether a file holds what was to be written: of a full disk, GDAL may say nothing."""
    try:
        with opened(path) as written:
            same = _about(written) == _about(described) and all(
                np.array_equal(written.read(window=window), described.read(window=window))
                for window in _windows(described)
            )
            levels = len(written.overviews(1))
        for level in range(levels):
            with geodata().open(path, overview_level=level, driver="GTiff") as overview:
                for window in _windows(overview):
                    overview.read(window=window)
    except (Flaw, geodata().errors.RasterioError):
        return False
    return bool(same)


def _about(dataset: Any) -> tuple[Any, ...]:
    """What says where the pixels lie, and what they are."""
    points, points_crs = dataset.gcps
    return (
        dataset.shape,
        dataset.dtypes,
        dataset.crs,
        dataset.transform,
        [(point.row, point.col, point.x, point.y, point.z) for point in points],
        points_crs,
        dataset.nodatavals,
        dataset.descriptions,
    )


def _windows(dataset: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for x1, y1, x2, y2 in windows(dataset.height, dataset.width, _WINDOW, _WINDOW):
        yield (y1, min(y2, dataset.height)), (x1, min(x2, dataset.width))


def _put(beside: Path, target: Path) -> None:
    """Give a file its name, with what GDAL had to write beside it."""
    note = _beside(target, SIDECAR)
    note.unlink(missing_ok=True)  # of the older file: its statistics would be taken for the new one's
    sync_folder(beside)
    if _beside(beside, SIDECAR).exists():
        sync_folder(_beside(beside, SIDECAR))
        _beside(beside, SIDECAR).replace(note)
    beside.replace(target)
    sync_folder(target.parent)
