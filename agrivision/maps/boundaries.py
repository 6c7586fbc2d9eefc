"""Boundaries of fields from a vector layer, without letting GDAL choose what it opens.

The suffix decides on the format, and the file's first bytes must agree. GeoJSON is read here: GDAL
would follow a coordinate system that is given as a link, and has several drivers that take JSON for
theirs.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from pyogrio.errors import CRSError as LayerCRSError
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, FieldError, GeometryError
from pyogrio.util import vsi_path
from rasterio.crs import CRS
from rasterio.errors import CRSError

from agrivision.data.sources.source import Flaw, content_of
from agrivision.errors import SourceError
from agrivision.json_values import parse
from agrivision.reading import open_plain

FORMATS = {
    ".gpkg": ("GPKG", b"SQLite format 3\0"),
    ".shp": ("ESRI Shapefile", b"\0\0\x27\x0a"),
    ".fgb": ("FlatGeobuf", b"fgb\x03fgb"),
}
GEOJSON = (".geojson", ".json")
_REFUSED = (DataLayerError, DataSourceError, FeatureError, FieldError, GeometryError, LayerCRSError)
_NAME = "name"  # of the column with the fields' names, in any case
_SYSTEM = re.compile(r"(?:urn:ogc:def:crs:EPSG:[0-9.]*:|EPSG:)([0-9]{4,6})")
_DEGREES = re.compile(r"urn:ogc:def:crs:OGC:[0-9.]*:CRS84|OGC:CRS84")


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """Fields, one of each a feature of the layer.

    Attributes:
        names: of the fields; features of one name are one field.
        polygons: of shapely, polygons or multipolygons, perhaps not valid.
        crs: of rasterio, or None.
        others: features left out, which are no polygons.
    """

    names: tuple[str, ...]
    polygons: NDArray[Any]
    crs: Any
    others: int


def read_boundaries(path: Path, name_column: str | None = None, layer: str | None = None) -> Boundaries:
    """Read the fields of a layer.

    Args:
        path: GeoPackage, Shapefile, FlatGeobuf or GeoJSON, known by the suffix.
        name_column: column with the names; None takes a column called name, or numbers from 1.
        layer: of a GeoPackage with several.

    Raises:
        SourceError: it cannot be read, or has no such layer or column, or no polygons.
    """
    suffix = path.suffix.lower()
    if suffix in GEOJSON:
        names, polygons, crs = _read_geojson(path, name_column)
    elif suffix in FORMATS:
        names, polygons, crs = _read_layer(path, name_column, layer)
    else:
        known = ", ".join(kind.lstrip(".") for kind in (*FORMATS, *GEOJSON))
        raise SourceError(f"{path} is no layer of fields: its name must end in one of {known}")
    kept = np.isin(shapely.get_type_id(polygons), (3, 6)) & ~shapely.is_empty(polygons)
    if not kept.any():
        raise SourceError(f"{path} holds no polygons: give a layer with the boundaries of fields")
    return Boundaries(
        names=tuple(name for name, keep in zip(names, kept, strict=True) if keep),
        polygons=polygons[kept],
        crs=crs,
        others=int((~kept).sum()),
    )


def _read_layer(
    path: Path, name_column: str | None, layer: str | None
) -> tuple[list[str], NDArray[Any], Any]:
    driver, begin = FORMATS[path.suffix.lower()]
    whole = path.absolute()
    if vsi_path(whole) != str(whole) or str(whole).startswith("/vsi"):
        raise SourceError(f"{path} is a name that GDAL does not take for a file's: rename it")
    try:
        with open_plain(path) as file:
            found = file.read(len(begin))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    if found != begin:
        raise SourceError(
            f"{path} is not what its name says: a file of the format {driver} belongs there"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # GDAL's; what is wrong is an error
            return _read_with_gdal(path, whole, name_column, layer)
    except _REFUSED as error:
        raise SourceError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None


def _read_with_gdal(
    path: Path, whole: Path, name_column: str | None, layer: str | None
) -> tuple[list[str], NDArray[Any], Any]:
    layer = _layer_of(path, [str(n) for n, kind in pyogrio.list_layers(whole) if kind], layer)
    about = pyogrio.read_info(whole, layer=layer)
    column = _column_of(path, about["fields"].tolist(), name_column)
    columns = [] if column is None else [column]
    _, _, content, values = pyogrio.raw.read(whole, layer=layer, columns=columns, force_2d=True)
    polygons = shapely.from_wkb(content, on_invalid="ignore")
    names = _names(values[0].tolist() if values else [None] * len(polygons))
    return names, polygons, _system(path, about["crs"])


def _read_geojson(path: Path, name_column: str | None) -> tuple[list[str], NDArray[Any], Any]:
    """Read GeoJSON, and what was written before RFC 7946: with a coordinate system of its own."""
    try:
        content = parse(content_of(path))
        features = content["features"]
        properties = [feature.get("properties") or {} for feature in features]
        geometries = [json.dumps(feature.get("geometry")) for feature in features]
        columns = list(dict.fromkeys(name for row in properties for name in row))
        system = content.get("crs")
        system = "OGC:CRS84" if system is None else str(system["properties"]["name"])
    except Flaw as flaw:
        raise SourceError(str(flaw)) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise SourceError(f"{path} is no GeoJSON of features: write it anew with ogr2ogr") from None
    column = _column_of(path, columns, name_column)
    names = _names([row.get(column) for row in properties])
    polygons = shapely.from_geojson(np.array(geometries, object), on_invalid="ignore")
    return names, shapely.force_2d(polygons), _system(path, system)


def _layer_of(path: Path, layers: list[str], wanted: str | None) -> str:
    if wanted is None and len(layers) == 1:
        return layers[0]
    if wanted in layers:
        return str(wanted)
    if not layers:
        raise SourceError(f"{path} holds no polygons: give a layer with the boundaries of fields")
    raise SourceError(f"{path} has the layers {', '.join(layers)}: say which one holds the fields")


def _column_of(path: Path, columns: list[str], wanted: str | None) -> str | None:
    if wanted is None:
        return next((column for column in columns if column.lower() == _NAME), None)
    if wanted not in columns:
        raise SourceError(f"{path} has no column {wanted}: it has {', '.join(columns) or 'none'}")
    return wanted


def _names(values: list[Any]) -> list[str]:
    """Names as text; where there is none, the feature's number."""
    return [
        str(number) if value is None or value == "" or _is_nan(value) else str(value)
        for number, value in enumerate(values, 1)
    ]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _system(path: Path, text: str | None) -> Any:
    if not text:
        return None
    number = _SYSTEM.fullmatch(text)
    try:
        if number is not None:
            return CRS.from_epsg(int(number[1]))
        if _DEGREES.fullmatch(text):
            return CRS.from_epsg(4326)  # rasterio says longitude first in either
        return CRS.from_wkt(text)
    except CRSError:
        raise SourceError(f"{path}: its coordinate system is not known: {text}") from None
