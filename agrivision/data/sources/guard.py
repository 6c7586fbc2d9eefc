"""What GDAL may open for us: files of a few formats, none of which leads to other files or the network.

A driver by suffix is half of it. GDAL looks for files beside a raster, `X.tif.ovr` and `X.tif.msk`, and
opens them by whatever driver knows their content: a VRT there reads any file and any URL. So may
`X.tif.aux.xml`, and the tags of a TIFF itself, say where else its overviews are. These are looked at
first. World files and the like, which hold numbers and names, are left to GDAL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET  # see where it reads # nosec B405

from agrivision.data.parts import geodata
from agrivision.data.sources.source import Flaw
from agrivision.reading import open_plain

IMG = ".img"
# One driver a suffix, so that no file can choose another one.
DRIVERS = {
    ".tif": "GTiff",
    ".tiff": "GTiff",
    ".jp2": "JP2OpenJPEG",
    IMG: "HFA",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
}
VRT = ".vrt"  # only where it was asked for, see `vrt_sources`
ALLOW_VRT = "--allow_vrt takes it, where its sources are plain files"

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAGIC = {
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".jp2": (b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51"),
    ".png": (b"\x89PNG",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
}
_ELSEWHERE = re.compile(rb"overview|&#", re.IGNORECASE)  # &#79; is another way to write an O
_NO_PATH = re.compile(r"/vsi|[A-Za-z][A-Za-z0-9+._-]+:", re.IGNORECASE)
_MOST_BYTES = 64 << 20
# What places rasters beside one another, and no more: not pixels in other forms, not code.
_ELEMENTS = {
    "VRTDataset", "SRS", "GeoTransform", "GCPList", "GCP", "Metadata", "MDI", "VRTRasterBand",
    "Description", "UnitType", "Offset", "Scale", "NoDataValue", "HideNoDataValue", "ColorInterp",
    "ColorTable", "Entry", "CategoryNames", "Category", "MaskBand", "SimpleSource", "ComplexSource",
    "SourceFilename", "SourceBand", "SourceProperties", "SrcRect", "DstRect", "NODATA", "ScaleOffset",
    "ScaleRatio", "UseMaskBand",
}  # fmt: skip
_ATTRIBUTES = {
    "rasterXSize", "rasterYSize", "dataType", "band", "relativeToVRT", "shared", "key",
    "dataAxisToSRSAxisMapping", "coordinateEpoch", "blockXSize", "blockYSize", "RasterXSize",
    "RasterYSize", "DataType", "BlockXSize", "BlockYSize", "xOff", "yOff", "xSize", "ySize", "c1", "c2",
    "c3", "c4", "Projection", "Id", "Info", "Pixel", "Line", "X", "Y", "Z",
}  # fmt: skip
_SYSTEM = re.compile(r"\s*(?:[A-Z_]{4,}\[|EPSG:\d+\s*$|\{|$)")  # WKT, a number, PROJJSON, or nothing


def is_raster(path: Path, *, allow_vrt: bool) -> bool:
    """Whether a file's suffix is one of those that are read."""
    suffix = path.suffix.lower()
    return suffix in DRIVERS or (allow_vrt and suffix == VRT)


def is_no_path(text: str) -> bool:
    """Whether GDAL could take a text for something else than a file: a URL, `/vsi…`, `DRIVER:…`."""
    return not text or _NO_PATH.match(text.strip()) is not None or text.lstrip().startswith("<")


def files_of(path: Path) -> list[Path]:
    """What a raster's pixels come from: itself and, for a VRT, its sources.

    Raises:
        Flaw: it is a VRT that leads elsewhere.
    """
    return [path, *(vrt_sources(path) if path.suffix.lower() == VRT else ())]


def check(path: Path) -> None:
    """Refuse a raster that could make GDAL open something else; to be called before GDAL sees it.

    Raises:
        Flaw: it could; the line names the file that leads elsewhere.
    """
    if str(path.absolute()).startswith("/vsi"):
        raise Flaw(path, "elsewhere", "is a name that GDAL does not take for a file's")
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise Flaw(path, "elsewhere", "has a name that is no UTF-8: rename it") from None
    _check_beside(path)
    if path.suffix.lower() == VRT:
        for source in vrt_sources(path):
            _check_plain(path, source)


def check_opened(path: Path, dataset: Any) -> None:
    """Refuse an open raster that keeps overviews in another file, or pixels in another folder.

    Raises:
        Flaw: they do.
    """
    if dataset.tags(ns="OVERVIEWS"):
        raise Flaw(path, "elsewhere", "has tags that lead to overviews in another file: remove them")
    if path.suffix.lower() == IMG:  # may keep its pixels in a file that it names
        names = {path.absolute(), path.resolve(), Path(os.path.normpath(path.absolute()))}
        here = {each.parent for each in names}
        for name in dataset.files:
            if Path(os.path.normpath(Path(name).absolute())).parent not in here:
                raise Flaw(path, "elsewhere", f"takes pixels from {name}, in another folder")


def _check_beside(path: Path) -> None:
    """Look at what GDAL would find beside a raster, and beside that again: `X.tif.msk.ovr`."""
    folder = path.absolute().parent
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return  # opening says what is wrong
    for name in _listed(folder, changed).get(path.stem.lower(), ()):
        _check_sidecar(folder / name)


@lru_cache(maxsize=8)
def _listed(folder: Path, changed: int) -> dict[str, list[str]]:  # noqa: ARG001 - part of the key
    """The files of a folder that may lead elsewhere, by what stands before each dot of their names."""
    found: dict[str, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208 - names
        if name.lower().endswith((".ovr", ".msk", ".xml")):
            dots = [place for place, char in enumerate(name) if char == "."]
            for dot in dots:
                found.setdefault(name[:dot].lower(), []).append(name)
    return found


def _check_sidecar(path: Path) -> None:
    remedy = "remove it, or make a copy of the raster without it"
    try:
        with open_plain(path) as file:
            content = file.read(4 if path.suffix.lower() != ".xml" else _MOST_BYTES)
    except OSError as error:
        raise Flaw(path, "elsewhere", f"cannot be read ({error.strerror}): {remedy}") from None
    if path.suffix.lower() == ".xml":
        if len(content) == _MOST_BYTES or _ELSEWHERE.search(content):
            raise Flaw(path, "elsewhere", f"may lead to overviews in another file: {remedy}")
        return
    if content not in _TIFF:
        raise Flaw(path, "elsewhere", f"is no TIFF, and may lead to other files: {remedy}")
    rasterio = geodata()
    try:
        with rasterio.open(path.absolute(), driver="GTiff") as dataset:
            check_opened(path, dataset)
    except (rasterio.errors.RasterioError, UnicodeDecodeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise Flaw(path, "elsewhere", f"cannot be read ({reason}): {remedy}") from None


def _check_plain(vrt: Path, source: Path) -> None:
    """Refuse a source of a VRT that is no plain raster: GDAL opens it by whatever driver knows it."""
    try:
        with open_plain(source) as file:
            begin = file.read(8)
    except OSError as error:
        raise Flaw(vrt, "elsewhere", f"its source {source} cannot be read ({error.strerror})") from None
    if not begin.startswith(_MAGIC[source.suffix.lower()]):
        raise Flaw(vrt, "elsewhere", f"its source {source} is not what its name says")
    _check_beside(source)
    rasterio = geodata()
    try:
        with rasterio.open(source, driver=DRIVERS[source.suffix.lower()]) as dataset:
            check_opened(source, dataset)
    except (rasterio.errors.RasterioError, UnicodeDecodeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise Flaw(vrt, "elsewhere", f"its source {source} cannot be read ({reason})") from None


def vrt_sources(path: Path) -> Sequence[Path]:
    """The files that a VRT is put together from.

    Raises:
        Flaw: it holds anything but sources that are plain files, and what describes them.
    """
    try:
        return _vrt_sources(path.absolute(), path.stat().st_mtime_ns)
    except OSError as error:
        raise Flaw(path, "unreadable", f"cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _vrt_sources(path: Path, changed: int) -> Sequence[Path]:  # noqa: ARG001 - part of the key
    with open_plain(path) as file:
        content = file.read(_MOST_BYTES)
    # Another reader may take declarations otherwise; nothing that writes VRTs needs any.
    if len(content) == _MOST_BYTES or b"<!" in content or b"\0" in content:
        raise Flaw(path, "elsewhere", "is too large for a VRT, or holds declarations: write it anew")
    try:
        root = ET.fromstring(content.decode())  # noqa: S314  # no declarations # nosec B314
    except (UnicodeDecodeError, ET.ParseError) as error:
        raise Flaw(path, "unreadable", f"cannot be read ({error})") from None
    found: dict[Path, None] = {}
    for element in root.iter():
        _check_element(path, element)
        if element.tag == "SourceFilename":
            found[_source(path, element)] = None
    return tuple(found)


def _check_element(path: Path, element: ET.Element) -> None:
    """GDAL takes attributes for elements, whatever their case, so both are from short lists."""
    unknown = {element.tag} - _ELEMENTS | element.attrib.keys() - _ATTRIBUTES
    if element.get("subClass") == "VRTSourcedRasterBand":
        unknown -= {"subClass"}
    if unknown:
        raise Flaw(path, "elsewhere", f"holds {min(unknown)}: only VRTs that place rasters are read")
    system = element.get("Projection", "") if element.tag == "GCPList" else element.text or ""
    if element.tag in ("SRS", "GCPList") and _SYSTEM.match(system) is None:
        raise Flaw(path, "elsewhere", "its coordinate system is no text of its own")


def _beside(path: Path, text: str) -> Path:
    """The file that a VRT names from where it is.

    GDAL begins where a link leads to, and `..` of a folder that is a link may be another for it than
    for the kernel: where these are several files, the one looked at may not be the one that is read.
    """
    source = path.parent / text
    meant = {source.resolve(), (path.resolve().parent / text).resolve()}
    meant.add(Path(os.path.normpath(source)).resolve())
    if len(meant) > 1:
        raise Flaw(path, "elsewhere", f"its source {text!r} depends on links: make a copy instead")
    return source


def _source(path: Path, element: ET.Element) -> Path:
    text, relative = element.text or "", element.get("relativeToVRT", "0")
    if is_no_path(text) or text != text.strip() or len(element) or relative not in ("0", "1"):
        raise Flaw(path, "elsewhere", f"its source {text!r} is not the path of a file")
    source = _beside(path, text) if relative == "1" else Path(text).absolute()
    if source.suffix.lower() not in _MAGIC:
        formats = ", ".join(suffix.lstrip(".") for suffix in _MAGIC)
        raise Flaw(path, "elsewhere", f"its source {source} is not one of the formats {formats}")
    if not source.is_file():
        raise Flaw(path, "elsewhere", f"its source {source} is no file")
    return source
