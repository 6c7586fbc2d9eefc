"""A STAC item for a scene's map (SpatioTemporal Asset Catalog 1.1): what there is, where, of what.

The item depends on the files and on what is said of them, never on the clock or on where they lie.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shapely import MultiPolygon, Polygon, box, get_parts
from shapely.affinity import translate
from shapely.geometry import mapping
from shapely.geometry.polygon import orient

import agrivision
from agrivision.data.parts import geodata
from agrivision.data.sources.rasters import opened
from agrivision.maps.legend import NODATA, Legend
from agrivision.pages import hexadecimal
from agrivision.storage import write_atomically

_COG = "image/tiff; application=geotiff; profile=cloud-optimized"
_VERSION = "1.1.0"
_EXTENSIONS = tuple(
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in (
        "projection/v2.0.0",
        "classification/v2.0.0",
        "raster/v2.0.0",
        "file/v2.1.0",
        "processing/v1.2.0",
    )
)
# A scene that does not say when it was taken may be of any time since people photograph from the air.
_EVER = ("1858-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
_TIMES = (  # names of tags, the more certain first; TIFF's own may be of the file, not of the flight
    "ACQUISITIONDATETIME",
    "ACQUISITION_DATETIME",
    "EXIF_DateTimeOriginal",
    "ACQUISITION_DATE",
    "DATE_ACQUIRED",
    "TIFFTAG_DATETIME",
)
_COLONS = re.compile(r"(\d{4}):(\d\d):(\d\d)(.*)", re.DOTALL)  # as TIFF and EXIF write a date
_STEPS = 8  # parts of a side of the footprint: straight lines on the map are none on the globe
_DIGITS = 7  # of a degree: a centimetre
_SHA2_256 = "1220"  # multihash: the function's number and the digest's length


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A kind of file that a prediction leaves.

    Attributes:
        key: of the asset in the item.
        title: for people.
        media_type: as IANA or the OGC have it.
        roles: in the item.
    """

    key: str
    title: str
    media_type: str
    roles: tuple[str, ...]


# By what follows the scene's name.
LAYERS: Mapping[str, Layer] = {
    ".tif": Layer(key="map", title="Map of classes", media_type=_COG, roles=("data",)),
    ".confidence.tif": Layer(key="confidence", title="Confidence", media_type=_COG, roles=("data",)),
    ".probabilities.tif": Layer(
        key="probabilities", title="Probability of each class", media_type=_COG, roles=("data",)
    ),
    ".gpkg": Layer(
        key="polygons",
        title="Polygons",
        media_type="application/geopackage+sqlite3",
        roles=("data",),
    ),
    ".geojson": Layer(
        key="geojson", title="Polygons as GeoJSON", media_type="application/geo+json", roles=("data",)
    ),
    ".fields.csv": Layer(
        key="fields", title="Hectares by class and field", media_type="text/csv", roles=("data",)
    ),
    ".png": Layer(key="quicklook", title="Quick-look", media_type="image/png", roles=("overview",)),
    ".html": Layer(key="page", title="Page about the map", media_type="text/html", roles=("metadata",)),
    ".qml": Layer(
        key="style", title="Style for QGIS", media_type="application/xml", roles=("metadata",)
    ),
    ".confidence.qml": Layer(
        key="confidence_style",
        title="Style of the confidence for QGIS",
        media_type="application/xml",
        roles=("metadata",),
    ),
    ".tif.aux.xml": Layer(
        key="map_notes", title="What GDAL noted", media_type="application/xml", roles=("metadata",)
    ),
    ".json": Layer(
        key="item", title="STAC item", media_type="application/geo+json", roles=("metadata",)
    ),
}
_LATER = {".json", ".html"}  # written after the item, or it itself: nothing is known of their bytes


@dataclass(frozen=True, kw_only=True)
class Network:
    """What made a map.

    Attributes:
        data_fingerprint: of the data set that the network learned from.
        step: optimiser steps that it was trained for.
        miou: its mean intersection over union in validation, 0 to 1; None where it is not known.
        postprocessing: factors and least areas by class, in words; None where there were none.
    """

    data_fingerprint: str
    step: int
    miou: float | None = None
    postprocessing: str | None = None


def stac_item(
    map_: Path,
    files: Sequence[Path],
    *,
    legend: Legend,
    network: Network,
    taken: datetime | None = None,
) -> dict[str, Any]:
    """Describe a scene's map and the files beside it.

    The footprint is the map's rectangle in longitude and latitude, cut where it crosses the
    antimeridian. A map that lies nowhere on the globe has none, as the specification has it. Where
    nobody knows when the scene was taken, `datetime` is null and the interval holds every aerial
    photograph there can be.

    Args:
        map_: `STEM.tif`, finished; the item's id is its stem.
        files: all that were written, the map among them, and `STEM.html` if it will be; each begins
            with the stem and ends as `LAYERS` has it.
        legend: of the map.
        network: that made it.
        taken: when the scene was photographed, see `taken_at`.

    Returns:
        JSON values.

    Raises:
        Flaw: the map cannot be read.
        OSError: another file cannot.
        KeyError: a file is none of `LAYERS`.
    """
    with opened(map_) as dataset:
        geometry = _footprint(dataset)
        properties = {
            **_times(taken),
            **_projection(dataset),
            **_gsd(dataset),
            "processing:software": {"agrivision": agrivision.__version__},
            "processing:lineage": "Classes predicted by a neural network, pixel by pixel",
            "agrivision:data_fingerprint": network.data_fingerprint,
            "agrivision:step": network.step,
        }
    if network.miou is not None:
        properties["agrivision:miou"] = network.miou
    if network.postprocessing is not None:
        properties["agrivision:postprocessing"] = network.postprocessing
    endings = {path.name.removeprefix(map_.stem): path for path in files}
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": _VERSION,
        "stac_extensions": list(_EXTENSIONS),
        "id": map_.stem,
        "geometry": None if geometry is None else _rounded(mapping(geometry)),
        **({} if geometry is None else {"bbox": _bbox(geometry)}),
        "properties": properties,
        "links": [],
        "assets": {
            layer.key: _asset(ending, layer, endings[ending], legend)
            for ending, layer in LAYERS.items()
            if ending in endings and layer.key != "item"
        },
    }
    if unknown := endings.keys() - LAYERS.keys():
        raise KeyError(f"no layer of {map_.stem} ends with {', '.join(sorted(unknown))}")
    return item


def write_stac(target: Path, item: Mapping[str, Any]) -> None:
    """Write an item as `STEM.json`.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    write_atomically(target, (json.dumps(item, indent=2, ensure_ascii=False) + "\n").encode())


def taken_at(dataset: Any) -> datetime | None:
    """When a scene was photographed, as far as its tags say; a time without a zone is taken for UTC.

    Args:
        dataset: the scene, open.

    Returns:
        A time in UTC, or None: no tag says it, or none that can be understood.
    """
    tags = {**dataset.tags(ns="IMAGERY"), **dataset.tags()}
    for name in _TIMES:
        text = _COLONS.sub(r"\1-\2-\3\4", tags.get(name, "").strip())
        try:
            time = datetime.fromisoformat(text)
            return time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
        except (ValueError, OverflowError):
            continue
    return None


def _times(taken: datetime | None) -> dict[str, Any]:
    if taken is None:
        return {"datetime": None, "start_datetime": _EVER[0], "end_datetime": _EVER[1]}
    text = taken.astimezone(UTC).isoformat().removesuffix("+00:00")
    return {"datetime": f"{text}Z"}


def _projection(dataset: Any) -> dict[str, Any]:
    """The grid: coordinate system, rows and columns, and the transform if there is one."""
    crs = dataset.crs or dataset.gcps[1]
    about: dict[str, Any] = {"proj:code": None}
    if crs:
        authority = crs.to_authority()
        if authority and geodata().crs.CRS.from_authority(*authority) == crs:  # the nearest may differ
            about["proj:code"] = ":".join(authority)
        else:
            about["proj:wkt2"] = crs.to_wkt(version="WKT2_2019")
    about["proj:shape"] = [dataset.height, dataset.width]
    if not dataset.transform.is_identity:
        about["proj:transform"] = list(dataset.transform)[:6]
    return about


def _gsd(dataset: Any) -> dict[str, float]:
    """The side of a pixel in metres, where the coordinate system has a unit of length."""
    if not (dataset.crs and dataset.crs.is_projected) or dataset.transform.is_identity:
        return {}
    a, b, _, d, e, _ = tuple(dataset.transform)[:6]
    side = abs(a * e - b * d) ** 0.5 * dataset.crs.linear_units_factor[1]
    return {"gsd": float(f"{side:.6g}")}


def _footprint(dataset: Any) -> Polygon | MultiPolygon | None:
    """Where a raster lies, in longitude and latitude; None where that is not known."""
    points, crs = dataset.gcps
    transform = dataset.transform
    if points and transform.is_identity:
        transform = geodata().transform.from_gcps(points)
    else:
        crs = dataset.crs
    if not crs or transform.is_identity:
        return None
    places = _longitudes_latitudes(
        crs, [_on_ground(transform, *corner) for corner in _edge(*dataset.shape)]
    )
    if not all(abs(x) <= 720 and abs(y) <= 90 for x, y in places):  # infinite, or on another planet
        return None
    return _on_globe(places) if places else None


def _longitudes_latitudes(crs: Any, places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Places in degrees; none where no way leads there from their coordinate system."""
    from rasterio._err import CPLE_BaseError  # noqa: PLC0415 - as late as `geodata`
    from rasterio.warp import transform  # noqa: PLC0415

    try:
        longitudes, latitudes = transform(crs, "EPSG:4326", *zip(*places, strict=True))
    except (geodata().errors.RasterioError, CPLE_BaseError):
        return []
    return list(zip(longitudes, latitudes, strict=True))


def _on_ground(transform: Any, column: float, row: float) -> tuple[float, float]:
    """A corner of a pixel in the scene's coordinates; affine writes this `*` or `@`, by its version."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * column + b * row + c, d * column + e * row + f


def _edge(height: int, width: int) -> list[tuple[float, float]]:
    """Points on the outline of a raster in pixels, from its corner and back to it."""
    corners = ((0, 0), (0, height), (width, height), (width, 0))
    return [
        (x + (x2 - x) * step / _STEPS, y + (y2 - y) * step / _STEPS)
        for (x, y), (x2, y2) in zip(corners, (*corners[1:], corners[0]), strict=True)
        for step in range(_STEPS)
    ]


def _on_globe(places: Sequence[tuple[float, float]]) -> Polygon | MultiPolygon | None:
    """An outline as a polygon, in two where the antimeridian cuts it (RFC 7946, section 3.1.9)."""
    ring = [places[0]]
    for x, y in (*places[1:], places[0]):  # unrolled: no step is longer than half way round
        before = ring[-1][0]
        ring.append((x - 360 * round((x - before) / 360), y))
    west, east = min(x for x, _ in ring), max(x for x, _ in ring)
    if abs(ring[-1][0] - ring[0][0]) > 180:  # it goes round a pole: all longitudes up to there
        latitudes = [y for _, y in ring]
        low, high = (min(latitudes), 90) if sum(latitudes) > 0 else (-90, max(latitudes))
        return box(-180, low, 180, high)
    polygon = Polygon(ring)
    if not polygon.is_valid:  # crumpled by its coordinate system
        polygon = polygon.envelope
    parts = []
    for turn in range(round(west / 360), round(east / 360) + 1):
        part = polygon.intersection(box(360 * turn - 180, -90, 360 * turn + 180, 90))
        parts += [orient(translate(piece, -360 * turn)) for piece in get_parts(part) if piece.area > 0]
    if not parts:  # a line or a point: of a system that is not of the Earth's surface
        return None
    return parts[0] if len(parts) == 1 else MultiPolygon(parts)


def _bbox(geometry: Polygon | MultiPolygon) -> list[float]:
    """West, south, east and north; west is greater than east where the antimeridian lies within."""
    west, south, east, north = geometry.bounds
    if isinstance(geometry, MultiPolygon):
        west = min(part.bounds[0] for part in geometry.geoms if part.bounds[2] >= 180)
        east = max(part.bounds[2] for part in geometry.geoms if part.bounds[0] <= -180)
    return [round(value, _DIGITS) for value in (west, south, east, north)]


def _rounded(value: Any) -> Any:
    """JSON values with numbers of as many digits as a place has."""
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


def _asset(ending: str, layer: Layer, path: Path, legend: Legend) -> dict[str, Any]:
    about: dict[str, Any] = {
        "href": f"./{quote(os.fsencode(path.name))}",
        "title": layer.title,
        "type": layer.media_type,
        "roles": list(layer.roles),
    }
    if ending not in _LATER:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        about |= {"file:size": path.stat().st_size, "file:checksum": _SHA2_256 + digest}
    if layer.media_type == _COG:
        about["bands"] = _bands(layer.key, path, legend)
    return about


def _bands(key: str, path: Path, legend: Legend) -> list[dict[str, Any]]:
    """What the bands of a raster hold; of probabilities, a value times the scale is one."""
    with opened(path) as dataset:
        values = dataset.nodatavals
    bands = []
    for number, value in enumerate(values):
        band: dict[str, Any] = {"name": key, "data_type": "uint8"}
        if value is not None:
            band["nodata"] = int(value)
        if key == "map":
            band["classification:classes"] = _classes(legend)
        else:
            band["raster:scale"] = 1 / (254 if value == 255 else 255)  # to the greatest that counts
        if key == "probabilities":
            band |= {"name": _word(legend.classes, number), "description": legend.classes[number]}
        bands.append(band)
    return bands


def _classes(legend: Legend) -> list[dict[str, Any]]:
    classes: list[dict[str, Any]] = [
        {
            "value": class_id,
            "name": _word(legend.classes, class_id),
            "title": name,
            "color_hint": hexadecimal(color)[1:].upper(),
        }
        for class_id, (name, color) in enumerate(zip(legend.classes, legend.colors, strict=True))
    ]
    return [*classes, {"value": NODATA, "name": "nodata", "title": "no data", "nodata": True}]


def _word(classes: Sequence[str], class_id: int) -> str:
    """A class's name as a word of ASCII letters, its number in it where another has the same."""
    words = [re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_") for name in classes]
    word = words[class_id]
    return word if word not in ("", "nodata") and words.count(word) == 1 else f"class_{class_id}"
