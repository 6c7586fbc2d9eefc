"""Hectares of each class in each field of a vector layer."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import Affine, features

from agrivision.data.sources.rasters import windows
from agrivision.errors import SourceError
from agrivision.maps.areas import SQUARE_METRES, Nowhere, longest_edge, transformer
from agrivision.maps.boundaries import Boundaries, read_boundaries
from agrivision.maps.grid import Grid, grid_of, reading
from agrivision.maps.hectares import VALUES, check_values, summed
from agrivision.maps.legend import NODATA, Legend
from agrivision.storage import write_atomically

NO_DATA = "no data"  # in the column of the classes: what of a field the scene does not show
COLUMNS = ("scene", "field", "class_id", "class", "hectares", "share")
_WINDOW = 1024  # pixels


@dataclass(frozen=True, kw_only=True)
class FieldRow:
    """A class in a field.

    Attributes:
        field: its name.
        class_id: of the class; None for what of the field has no data.
        name: of the class.
        hectares: on the ellipsoid.
        share: of the field, from 0 to 1; those of a field add up to 1. None where it has no pixel's
            centre.
    """

    field: str
    class_id: int | None
    name: str
    hectares: float
    share: float | None


@dataclass(frozen=True, kw_only=True)
class FieldTable:
    """What the fields of a scene hold.

    Attributes:
        rows: for each field in the order of the layer, its classes by id, then what has no data.
        fields: number of fields in the table.
        outside: fields that the scene does not touch.
        others: features of the layer that are no polygons.
    """

    rows: tuple[FieldRow, ...]
    fields: int
    outside: int
    others: int


def write_fields(
    ids: Path,
    boundaries: Path,
    legend: Legend,
    scene: str,
    target: Path,
    *,
    name_column: str | None = None,
    layer: str | None = None,
) -> FieldTable:
    """Write the hectares of each class in each field as a CSV file.

    A pixel counts where its centre lies in the field: once in each of fields that overlap, and once in
    a field of several polygons that do (features of one name are one field). What of a field lies
    beyond the scene has no data. The map is read once, window by window.

    Args:
        ids: finished map, `STEM.tif`.
        boundaries: vector layer in any coordinate system, see `read_boundaries`.
        legend: of the map.
        scene: name for the first column.
        target: `STEM.fields.csv`.
        name_column: column of the layer with the fields' names; None takes one called name, or numbers.
        layer: of a GeoPackage with several.

    Raises:
        SourceError: one of the files cannot be used, or one of them has no coordinate system.
        StorageError, NotWritable: the disk refused.
    """
    found = read_boundaries(boundaries, name_column, layer)
    if found.crs is None:
        raise SourceError(f"{boundaries} has no coordinate system: assign it, with ogr2ogr -a_srs say")
    with reading(ids) as dataset:
        grid = grid_of(dataset)
        if grid.crs is None:
            raise SourceError(
                f"{ids} has no coordinate system: nobody knows where the fields lie in it"
            )
        names, fields = _placed(found, grid)
        scene_box = shapely.box(0, 0, grid.width, grid.height)
        here = np.flatnonzero(shapely.area(shapely.intersection(fields, scene_box)) > 0)
        names, fields = [names[i] for i in here], fields[here]
        hectares = _hectares(dataset, grid, fields)
    check_values(hectares.sum(0), legend, ids)
    beyond = shapely.transform(shapely.difference(fields, scene_box), grid.world)
    hectares[:, NODATA] += np.nan_to_num(grid.ground.areas(beyond)) / SQUARE_METRES
    table = FieldTable(
        rows=tuple(
            row for name, own in zip(names, hectares, strict=True) for row in _rows(name, own, legend)
        ),
        fields=len(names),
        outside=len(set(found.names)) - len(names),
        others=found.others,
    )
    write_atomically(target, _csv(table, scene).encode())
    return table


def _placed(found: Boundaries, grid: Grid) -> tuple[list[str], NDArray[Any]]:
    """The fields by name, in the order of the layer, as valid polygons in pixels of the map."""
    fields: dict[str, list[Any]] = {}
    for name, polygon in zip(found.names, found.polygons, strict=True):
        fields.setdefault(name, []).append(_in_pixels(polygon, found.crs, grid))
    return list(fields), np.array([shapely.union_all(parts) for parts in fields.values()], object)


def _in_pixels(polygon: Any, crs: Any, grid: Grid) -> Any:
    """A valid polygon in pixels; an empty one where it has no place in the map's coordinate system."""
    valid = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
    short = shapely.segmentize(valid, longest_edge(crs))
    place = transformer(crs, grid.crs)
    try:
        there = shapely.transform(short, place)
    except Nowhere:
        return shapely.Polygon()
    if math.isfinite(grid.ground.quarter) and not there.is_empty:
        # The same meridian has many longitudes: take the nearest to the scene.
        turn = grid.ground.quarter * 4
        x = grid.world(np.array([[grid.width / 2, grid.height / 2]]))[0, 0]
        shift = np.array([round((x - there.centroid.x) / turn) * turn, 0])
        there = shapely.transform(there, lambda vertices: vertices + shift)
    flat = shapely.transform(there, grid.pixels)
    return shapely.make_valid(flat, method="structure", keep_collapsed=False)


def _hectares(dataset: Any, grid: Grid, fields: NDArray[Any]) -> NDArray[np.float64]:
    """Hectares by field and value of the map, from the pixels whose centre lies in the field."""
    hectares = np.zeros((len(fields), VALUES))
    tree = shapely.STRtree(fields)
    for left, top, right, low in windows(dataset.height, dataset.width, _WINDOW, _WINDOW):
        rows, columns = (top, min(low, dataset.height)), (left, min(right, dataset.width))
        inside = sorted(tree.query(shapely.box(columns[0], rows[0], columns[1], rows[1])).tolist())
        if not inside:
            continue
        values = dataset.read(1, window=(rows, columns))
        sizes = grid.hectares(rows, columns)
        for field in inside:
            mask = features.rasterize(
                [fields[field]],
                out_shape=values.shape,
                transform=Affine.translation(left, top),
                dtype="uint8",
            ).view(np.bool_)
            hectares[field] += summed(values[mask], sizes[mask])
    return hectares


def _rows(field: str, hectares: NDArray[np.float64], legend: Legend) -> list[FieldRow]:
    whole = float(hectares.sum())
    names = [*enumerate(legend.classes), (None, NO_DATA)]
    return [
        FieldRow(
            field=field,
            class_id=class_id,
            name=name,
            hectares=float(hectares[NODATA if class_id is None else class_id]),
            share=float(hectares[NODATA if class_id is None else class_id]) / whole if whole else None,
        )
        for class_id, name in names
    ]


def _csv(table: FieldTable, scene: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in table.rows:
        class_id = "" if row.class_id is None else row.class_id
        share = "" if row.share is None else f"{row.share:.6f}"
        writer.writerow([scene, row.field, class_id, row.name, f"{row.hectares:.6f}", share])
    return text.getvalue()
