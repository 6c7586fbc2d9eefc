"""A map of class ids → the outlines of its areas in pixels, and sums over what lies within them.

Outlines are kept flat, as arrays of vertices and offsets. What a raster's values add up to within an
outline follows from its vertices alone: with the sum S of all pixels above and left of a vertex, an
outline holds the sum of S along its vertical edges (Green's theorem), so that a raster is read once,
strip by strip, whatever the outlines' sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio import features

from agrivision.maps.grid import strips


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """Areas of one class each, whose pixels touch by their sides.

    Attributes:
        vertices: int32 (n, 2) of columns and rows at the corners of pixels; a ring ends where it began.
        rings: int64, where each ring begins in the vertices, and the end.
        areas: int64, where each area's rings begin, and the end; the first ring is the outer one.
        values: uint8, class id of each area.
    """

    vertices: NDArray[np.int32]
    rings: NDArray[np.int64]
    areas: NDArray[np.int64]
    values: NDArray[np.uint8]

    def polygons(self, vertices: NDArray[np.float64]) -> NDArray[Any]:
        """Polygons of shapely.

        Args:
            vertices: float64 (n, 2), where the vertices are to lie.
        """
        kind = shapely.GeometryType.POLYGON
        polygons: NDArray[Any] = shapely.from_ragged_array(kind, vertices, (self.rings, self.areas))
        return polygons


def trace(band: Any, skip: Iterable[int]) -> Outlines:
    """Find the areas of a map.

    Args:
        band: of rasterio (`rasterio.band`), uint8.
        skip: values whose areas are left out.

    Returns:
        In the order in which GDAL completes them from the top down: the same for the same map.
    """
    left_out = frozenset(skip)
    places, lengths, counts, values = [np.empty((0, 2))], [0], [0], []
    for shape, value in features.shapes(band, connectivity=4):
        if int(value) in left_out:
            continue
        rings = [np.array(ring) for ring in shape["coordinates"]]
        places += rings
        lengths += [len(ring) for ring in rings]
        counts.append(len(rings))
        values.append(int(value))
    return Outlines(
        vertices=_in_pixels(np.concatenate(places), band.ds.transform),
        rings=np.cumsum(lengths, dtype=np.int64),
        areas=np.cumsum(counts, dtype=np.int64),
        values=np.array(values, np.uint8),
    )


def _in_pixels(places: NDArray[np.float64], transform: Any) -> NDArray[np.int32]:
    """Undo what GDAL does to a file's outlines, unasked; the corners of pixels are whole numbers."""
    a, b, c, d, e, f = tuple(~transform)[:6]
    x, y = places[:, 0], places[:, 1]
    return np.column_stack([a * x + b * y + c, d * x + e * y + f]).round().astype(np.int32)


def with_nodes(outlines: Outlines) -> Outlines:
    """The same with a vertex wherever an edge passes a vertex of another outline.

    Neighbours then have the same vertices along what they share, whatever becomes of the vertices.
    """
    vertices, starts = outlines.vertices.astype(np.int64), _edges(outlines)
    span = int(vertices.max(initial=0)) + 1
    extra = np.zeros(len(vertices), np.int64)
    found = []
    for along in (0, 1):
        keys = vertices[:, 1 - along] * span + vertices[:, along]
        edges = starts[vertices[starts, 1 - along] == vertices[starts + 1, 1 - along]]
        one, other, known = keys[edges], keys[edges + 1], np.unique(keys)
        first = np.searchsorted(known, np.minimum(one, other), "right")
        count = np.searchsorted(known, np.maximum(one, other), "left") - first
        order = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
        ahead = np.repeat(first, count) + order
        behind = np.repeat(first + count - 1, count) - order
        passed = known[np.where(np.repeat(one > other, count), behind, ahead)]
        extra[edges] = count
        found.append((along, np.repeat(edges, count), order, passed))
    begins = np.concatenate([[0], (extra + 1).cumsum()])
    new = np.empty((begins[-1], 2), np.int32)
    new[begins[:-1]] = vertices
    for along, edges, order, passed in found:
        new[begins[edges] + 1 + order, along] = passed % span
        new[begins[edges] + 1 + order, 1 - along] = passed // span
    return replace(outlines, vertices=new, rings=begins[outlines.rings])


def pixels(outlines: Outlines) -> NDArray[np.int64]:
    """How many pixels each area has."""
    vertices = outlines.vertices.astype(np.int64)
    return _sums(outlines, vertices[:, 0] * vertices[:, 1])


def sums(outlines: Outlines, band: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What a raster holds within each area.

    Args:
        outlines: of a map on the same grid.
        band: of rasterio (`rasterio.band`), uint8.

    Returns:
        The sum of the values, and the number of those that are not 0; both by area.

    Raises:
        RasterioError: it cannot be read.
    """
    width = band.shape[1]
    columns, rows = outlines.vertices[:, 0], outlines.vertices[:, 1]
    order = np.argsort(rows, kind="stable")
    sorted_rows = rows[order]
    above = np.zeros((2, len(rows)), np.int64)  # of each vertex: S of the values, and of their number
    last = np.zeros((2, width + 1), np.int64)
    for top, low in strips(band.ds):
        values = band.ds.read(band.bidx, window=((top, low), (0, width)))
        here = order[slice(*np.searchsorted(sorted_rows, (top, low), "right"))]
        for number, part in enumerate((values, values > 0)):
            strip = np.zeros((low - top, width + 1), np.int64)
            part.cumsum(axis=1, dtype=np.int64, out=strip[:, 1:])
            strip[0] += last[number]
            strip.cumsum(axis=0, out=strip)
            above[number, here] = strip[rows[here] - top - 1, columns[here]]
            last[number] = strip[-1]
    return _sums(outlines, above[0]), _sums(outlines, above[1])


def _sums(outlines: Outlines, above: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums within areas from the sums above and left of their vertices."""
    if not len(outlines.values):
        return np.zeros(0, np.int64)
    vertices = outlines.vertices.astype(np.int64)
    upright = np.zeros(len(vertices), np.bool_)
    starts = _edges(outlines)
    upright[starts] = vertices[starts, 0] == vertices[starts + 1, 0]
    begins = outlines.rings[:-1]

    def around(values: NDArray[np.int64]) -> NDArray[np.int64]:
        steps = np.where(upright, np.roll(values, -1) - values, 0)
        return np.add.reduceat(steps, begins)

    direction = np.sign(around(vertices[:, 0] * vertices[:, 1]))  # which way GDAL went around
    outer = np.full(len(begins), -1)
    outer[outlines.areas[:-1]] = 1
    return np.add.reduceat(around(above) * direction * outer, outlines.areas[:-1])


def _edges(outlines: Outlines) -> NDArray[np.int64]:
    """The vertices from which an edge goes to the next: all but the last of each ring."""
    going = np.ones(len(outlines.vertices), np.bool_)
    going[outlines.rings[1:] - 1] = False
    return np.flatnonzero(going)


def neighbours(outlines: Outlines) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which areas have a side in common.

    Args:
        outlines: with nodes (`with_nodes`).

    Returns:
        Where each area's neighbours begin in the second array, and the end; and the neighbours.
    """
    vertices, starts = outlines.vertices.astype(np.int64), _edges(outlines)
    numbers = vertices[:, 1] * (int(vertices[:, 0].max(initial=0)) + 1) + vertices[:, 0]
    numbers = np.unique(numbers, return_inverse=True)[1]
    one, other = numbers[starts], numbers[starts + 1]
    sides = np.minimum(one, other) * (len(numbers) + 1) + np.maximum(one, other)
    owner = np.repeat(
        np.arange(len(outlines.values)),
        np.diff(outlines.rings[outlines.areas]) - np.diff(outlines.areas),
    )
    order = np.argsort(sides, kind="stable")
    twice = np.flatnonzero(sides[order][1:] == sides[order][:-1])
    left, right = owner[order[twice]], owner[order[twice + 1]]
    pairs = np.unique(
        np.stack([np.concatenate([left, right]), np.concatenate([right, left])], 1), axis=0
    )
    return np.searchsorted(pairs[:, 0], np.arange(len(outlines.values) + 1)), pairs[:, 1]
