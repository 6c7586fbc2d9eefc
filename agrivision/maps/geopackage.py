"""Polygons → a GeoPackage with its style inside, the same bytes for the same polygons."""

from __future__ import annotations

import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyogrio
import shapely
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, FieldError, GeometryError
from pyogrio.util import vsi_path

from agrivision.errors import NotWritable, StorageError
from agrivision.maps.layer import VectorLayer
from agrivision.storage import storage_error, sync_folder

# A GeoPackage says when it was written. The same map has the same polygons, whenever that is.
_WRITTEN = "1970-01-01T00:00:00.000Z"
_SETTINGS = {
    "OGR_CURRENT_DATE": _WRITTEN,
    "OGR_GPKG_ALLOW_THREADED_RTREE": "NO",  # the index is built in the same order each time
}
_REFUSED = (DataLayerError, DataSourceError, FeatureError, FieldError, GeometryError)
# What QGIS makes when it stores a style in a database.
_STYLES = """
CREATE TABLE layer_styles (
    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL,
    f_table_catalog TEXT(256), f_table_schema TEXT(256), f_table_name TEXT(256),
    f_geometry_column TEXT(256), styleName TEXT(30), styleQML TEXT, styleSLD TEXT, useAsDefault BOOLEAN,
    description TEXT, owner TEXT(30), ui TEXT(30), update_time DATETIME
)
"""
_STYLE = """
INSERT INTO layer_styles (f_table_catalog, f_table_schema, f_table_name, f_geometry_column, styleName,
    styleQML, styleSLD, useAsDefault, description, owner, ui, update_time)
VALUES ('', '', :layer, 'geom', :layer, :qml, :sld, 1, '', '', NULL, :written)
"""
_CONTENTS = """
INSERT INTO gpkg_contents (table_name, data_type, identifier, description, last_change, srs_id)
VALUES ('layer_styles', 'attributes', 'layer_styles', '', :written, 0)
"""


def check_name(target: Path) -> None:
    """Check that a file of this name can be written.

    Raises:
        NotWritable: GDAL would take it for something else, since it holds a semicolon, say.
    """
    if vsi_path(target.absolute()) != str(target.absolute()):
        raise NotWritable(f"cannot write {target}: GDAL takes its name for something else; rename it")


def write_geopackage(target: Path, layer: VectorLayer, crs: Any, style: tuple[str, str]) -> None:
    """Write polygons as the only layer of a GeoPackage.

    Args:
        target: file.
        layer: polygons, and what is known of them.
        crs: of rasterio, or None.
        style: of the layer, as QML and as SLD.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    check_name(target)
    beside = target.with_name(f".{target.stem}.{os.getpid()}.part.gpkg").absolute()
    try:
        beside.touch()  # the system says more clearly than GDAL why it cannot be made
        beside.unlink()
        _write_layer(beside, layer, crs)
        _write_style(beside, layer.name, style, len(layer.polygons))
        sync_folder(beside)
        beside.replace(target)
        sync_folder(target.parent)
    except (*_REFUSED, sqlite3.Error) as error:
        raise StorageError(f"cannot write {target}: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        for left in (beside, *beside.parent.glob(f"{beside.name}-*")):  # and what SQLite left there
            left.unlink(missing_ok=True)


def _write_layer(path: Path, layer: VectorLayer, crs: Any) -> None:
    columns = layer.columns()
    with _settings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'crs' was not provided")
        pyogrio.raw.write(
            path,
            shapely.to_wkb(layer.polygons),
            list(columns.values()),
            list(columns),
            layer=layer.name,
            driver="GPKG",
            geometry_type="Polygon",
            crs=None if crs is None else crs.to_wkt(),
            dataset_options={"VERSION": "1.3"},  # older programs warn of newer ones
        )


def _write_style(path: Path, layer: str, style: tuple[str, str], count: int) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        written = database.execute(f'SELECT count(*) FROM "{layer}"').fetchone()[0]  # noqa: S608  # a name of ours # nosec B608
        if written != count:
            raise StorageError(f"cannot write {path}: it is not whole; is the disk full?")
        database.execute(_STYLES)
        qml, sld = style
        values = {"layer": layer, "qml": qml, "sld": sld, "written": _WRITTEN}
        database.execute(_STYLE, values)
        database.execute(_CONTENTS, {"written": _WRITTEN})


@contextmanager
def _settings() -> Iterator[None]:
    """GDAL's settings within the block."""
    before = {name: pyogrio.get_gdal_config_option(name) for name in _SETTINGS}
    pyogrio.set_gdal_config_options(_SETTINGS)
    try:
        yield
    finally:
        pyogrio.set_gdal_config_options(before)
