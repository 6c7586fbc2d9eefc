"""Plain layers of a finished scene → the same without small areas.

Areas reach over blocks, so they are looked for in the whole map once it is put together: what becomes
of them depends neither on the blocks nor on who predicted them. It is read in strips, twice; memory
grows with the number of areas alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agrivision.data.parts import geodata
from agrivision.data.sources.source import Window
from agrivision.errors import StorageError
from agrivision.inference.blend import Values
from agrivision.maps.specks import strips_without_specks

_PIXELS = 1 << 20  # of a strip, about

Written = list[tuple[Window, int]]  # rectangles, and digests of what was written there


def remove_specks(path: Path, least: Sequence[int]) -> Written:
    """Give the small areas of a map to what surrounds them.

    Args:
        path: GeoTIFF of class ids, which is changed.
        least: pixels that an area must have to stay, by class id.

    Raises:
        StorageError: the disk refused.
    """
    written: Written = []
    with _changing(path) as layer:
        rows = max(1, _PIXELS // layer.width)
        starts = range(0, layer.height, rows)
        windows = [(0, start, layer.width, min(start + rows, layer.height)) for start in starts]
        first = (layer.read(1, window=slices(window)) for window in windows)
        again = (layer.read(1, window=slices(window)) for window in windows)
        for window, strip in zip(windows, strips_without_specks(first, again, least), strict=True):
            layer.write(strip[None], window=slices(window))
            written.append((window, digest(strip[None])))
    return written


def mend_confidence(path: Path, ids: Path, cells: Iterable[tuple[Window, Values]]) -> Written:
    """Let a layer of confidence tell the probability of the classes that a map has by now.

    Args:
        path: of the layer, which is changed.
        ids: of the map.
        cells: what was known before areas were removed, with the probabilities of all classes.

    Raises:
        StorageError: the disk refused.
    """
    written: Written = []
    with _changing(path) as layer, geodata().open(ids) as finished:
        for cell, values in cells:
            assert values.probabilities is not None
            confidence = mended(values, finished.read(1, window=slices(cell)))
            layer.write(confidence[None], window=slices(cell))
            written.append((cell, digest(confidence[None])))
    return written


def mended(values: Values, ids: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    """Confidence, uint8 1 to 255, of other classes than those that were decided.

    Args:
        values: what was decided, with the probabilities of all classes.
        ids: (rows, columns), the classes that the pixels have now.
    """
    assert values.probabilities is not None
    changed = ids != values.ids
    confidence = values.confidence.copy()
    rows, columns = np.nonzero(changed)
    confidence[changed] = np.maximum(values.probabilities[ids[changed], rows, columns], 1)
    return confidence


@contextmanager
def _changing(path: Path) -> Iterator[Any]:
    try:
        with geodata().open(path, "r+") as layer:
            yield layer
    except geodata().errors.RasterioError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise StorageError(f"cannot write {path}: {reason}; is the disk full?") from None


def slices(cell: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns, as rasterio takes a window."""
    left, top, right, bottom = cell
    return (top, bottom), (left, right)


def digest(layer: np.ndarray[Any, Any]) -> int:
    """XXH3-64 of (bands, rows, columns)."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(layer).data)
