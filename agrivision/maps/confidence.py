"""How sure a network is of a finished map: sums over its layer of confidences."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agrivision.maps.grid import reading, strips
from agrivision.maps.page import Confidence

_BINS = 20  # of the histogram


def confidence_of(ids: Path, layer: Path, classes: int) -> Confidence | None:
    """Sum up a layer, some rows at a time.

    Args:
        ids: class-id raster.
        layer: raster on the same grid: 1 to 255 is the probability of the class times 255.
        classes: how many there are; ids from there on hold no data.

    Returns:
        None where no pixel has data.

    Raises:
        SourceError: a raster cannot be read.
    """
    counts = np.zeros((256, 256), np.int64)  # by class id and confidence
    with reading(ids) as of_class, reading(layer) as sure:
        for top, bottom in strips(of_class):
            window = ((top, bottom), (0, of_class.width))
            pairs = of_class.read(1, window=window).astype(np.uint16) << 8
            pairs |= sure.read(1, window=window)
            counts += np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)
    known = counts[:classes]
    pixels, values = known.sum(), np.arange(256) / 255
    if not pixels:
        return None
    bins = np.minimum(np.arange(256) * _BINS // 255, _BINS - 1)
    histogram = np.bincount(bins, known.sum(0), minlength=_BINS) / pixels
    by_class = [float(row @ values / row.sum()) if row.any() else None for row in known]
    return Confidence(
        mean=float(known.sum(0) @ values / pixels),
        by_class=tuple(by_class),
        histogram=tuple(histogram.tolist()),
    )
