"""Polygons with what is known of each: what a GIS shows as a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class VectorLayer:
    """Polygons and their attributes, one of each a polygon.

    Attributes:
        name: of the layer.
        polygons: of shapely; outer rings counterclockwise.
        class_ids: uint8.
        classes: names of all classes, by id.
        hectares: float64; NaN where nobody knows.
        confidence: float64 from 0 to 1; NaN where nobody knows.
        scene: name, the same for all.
    """

    name: str
    polygons: NDArray[Any]
    class_ids: NDArray[np.uint8]
    classes: tuple[str, ...]
    hectares: NDArray[np.float64]
    confidence: NDArray[np.float64]
    scene: str

    def columns(self) -> dict[str, NDArray[Any]]:
        """The attributes by the name of their column, in order."""
        names = np.array(self.classes, object)
        return {
            "class_id": self.class_ids.astype(np.int32),
            "class": names[self.class_ids],
            "hectares": self.hectares,
            "confidence": self.confidence,
            "scene": np.full(len(self.polygons), self.scene, object),
        }

    def rows(self) -> Iterator[Row]:
        """The attributes of one polygon after another; None where a number is not known."""
        columns = self.columns()
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            known = (None if isinstance(v, float) and math.isnan(v) else v for v in values)
            yield dict(zip(columns, known, strict=True))
