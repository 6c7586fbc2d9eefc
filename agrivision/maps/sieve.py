"""Areas of a map that are too small become a part of their largest neighbour.

The smallest goes first, and takes its neighbour's class; what touches of that class becomes one area
with it, which may then be large enough to stay. What has no neighbour (an area all around which the
scene has no data) stays as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio import Affine, features
from rasterio.errors import RasterioError

from agrivision.errors import StorageError
from agrivision.maps.grid import strips
from agrivision.maps.tracing import Outlines, neighbours
from agrivision.storage import storage_error


def merged(outlines: Outlines, sizes: NDArray[Any], least: float) -> NDArray[np.uint8]:
    """The class that each area has once the small ones are gone.

    Args:
        outlines: of all areas that count, with nodes (`with_nodes`).
        sizes: by area, in any unit.
        least: size that an area must have to stay.

    Returns:
        uint8 by area.
    """
    areas = _Areas(outlines, sizes)
    small = np.flatnonzero(sizes < least).tolist()
    members = {area: [area] for area in small}
    waiting = [(areas.sizes[area], area) for area in small]
    heapq.heapify(waiting)
    while waiting:
        size, area = heapq.heappop(waiting)
        if areas.root(area) != area or areas.sizes[area] != size:
            continue  # it is a part of another by now, or has grown
        around = areas.around(members[area], area)
        if not around:
            continue
        largest = max(around, key=lambda other: (areas.sizes[other], -other))
        alike = [other for other in around if areas.values[other] == areas.values[largest]]
        gone = [area, *(other for other in alike if other != largest)]
        areas.join(gone, largest)
        parts = [part for root in (*gone, largest) for part in members.pop(root, ())]
        if areas.sizes[largest] < least:
            members[largest] = parts
            heapq.heappush(waiting, (areas.sizes[largest], largest))
    roots = [areas.root(area) for area in range(len(sizes))]
    return np.array([areas.values[root] for root in roots], np.uint8)


class _Areas:
    """Areas that grow together: of each group one, its root, stands for all."""

    def __init__(self, outlines: Outlines, sizes: NDArray[Any]) -> None:
        self.sizes: list[float] = sizes.tolist()
        self.values: list[int] = outlines.values.tolist()
        self._parents = list(range(len(sizes)))
        self._begins, self._neighbours = neighbours(outlines)

    def root(self, area: int) -> int:
        """The area that stands for the group."""
        parents = self._parents
        while parents[area] != area:
            parents[area] = area = parents[parents[area]]
        return area

    def around(self, members: Sequence[int], root: int) -> list[int]:
        """The roots of the groups that touch these members of a group, in order."""
        begins = self._begins
        found = {
            self.root(other)
            for member in members
            for other in self._neighbours[begins[member] : begins[member + 1]].tolist()
        }
        return sorted(found - {root})

    def join(self, gone: Sequence[int], root: int) -> None:
        """Make groups part of another, whose class they take."""
        for other in gone:
            self._parents[other] = root
            self.sizes[root] += self.sizes[other]


@contextmanager
def changed(dataset: Any, outlines: Outlines, values: NDArray[np.uint8], beside: Path) -> Iterator[Any]:
    """A copy of a map in which areas have other values, open with rasterio and gone afterwards.

    Args:
        dataset: the map, open.
        outlines: of the map.
        values: uint8, the new ones, by area.
        beside: where the copy may lie, with the suffix `.tif`.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    which = np.flatnonzero(values != outlines.values)
    polygons = outlines.polygons(outlines.vertices.astype(np.float64))[which]
    tree = shapely.STRtree(polygons)
    size = {"height": dataset.height, "width": dataset.width, "count": 1, "dtype": "uint8"}
    try:
        beside.touch()  # the system says more clearly than GDAL why it cannot be made
        try:
            with rasterio.open(
                beside, "w", driver="GTiff", compress="lzw", bigtiff="IF_SAFER", **size
            ) as copy:
                for top, low in strips(dataset):
                    window = ((top, low), (0, dataset.width))
                    ids = dataset.read(1, window=window)
                    here = sorted(tree.query(shapely.box(0, top, dataset.width, low)).tolist())
                    if here:
                        pairs = [(polygons[i], int(values[which[i]])) for i in here]
                        features.rasterize(pairs, out=ids, transform=Affine.translation(0, top))
                    copy.write(ids, 1, window=window)
            copy = rasterio.open(beside, driver="GTiff")
        except RasterioError as error:
            raise StorageError(f"cannot write {beside}: {error.__cause__ or error}") from None
        with copy:
            yield copy
    except OSError as error:
        raise storage_error(beside, error) from error
    finally:
        beside.unlink(missing_ok=True)
