"""A small picture of a scene beside its map, to see at a glance whether the map makes sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agrivision.data.parts import geodata
from agrivision.data.sources.rasters import attempt
from agrivision.inference.scene import Scene
from agrivision.inference.trained import Description
from agrivision.monitor.pictures import INVALID, composite, enlarge, paint, save_png, sheet

SIDE = 1024  # pixels: the longest side of a pane


def write_quicklook(
    path: Path, dataset: Any, scene: Scene, finished: Any, description: Description
) -> None:
    """Write a PNG with the scene in natural colours, in false colours, and its map, side by side.

    Args:
        path: of the PNG.
        dataset: the scene, open.
        scene: what is known of it.
        finished: its map, open: class ids, nodata where the scene has no data.
        description: of the run.

    Raises:
        Flaw: the scene cannot be read.
        StorageError, NotWritable: the disk refused.
    """
    factor = min(1.0, SIDE / max(scene.height, scene.width))
    shape = (max(1, round(scene.height * factor)), max(1, round(scene.width * factor)))
    average = geodata().enums.Resampling.average
    there = [band for band in scene.bands if band is not None]
    image = scene.scaled(
        attempt(scene.path, lambda: dataset.read(there, out_shape=shape, resampling=average))
    )
    ids = finished.read(1, out_shape=shape)  # the nearest pixel: ids have no average
    valid = np.not_equal(ids, int(finished.nodata))
    if image.dtype != np.uint8:  # it will be stretched between percentiles: of pixels with data
        image = np.where(valid, image.astype(np.float32), np.nan)
    panes = [composite(image, description.bands, kind) for kind in ("rgb", "nir")]
    for pane in panes:
        pane[~valid] = INVALID
    panes.append(paint(np.where(valid, ids, 0), len(description.classes), valid))
    captions = ["RGB", "NIR-R-G", "map"]
    save_png(path, sheet([enlarge(pane) for pane in panes], captions, description.classes))
