"""Everything that reads bytes from elsewhere, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import (
    checkpoints,
    exported,
    images,
    labels,
    options,
    pngs,
    rasters,
    rows,
    schema,
    shards,
)
from tests.fuzz.harness import Target

TARGETS: dict[str, Callable[[Path], Target]] = {
    "index": shards.index,
    "records": shards.records,
    "jpeg": images.jpeg,
    "tile-tiff": images.tile_tiff,
    "raw": images.raw,
    "labels": labels.labels,
    "dataset-json": schema.dataset_json,
    "config-file": options.config_file,
    "command-line": options.command_line,
    "manifest": checkpoints.manifest,
    "states": checkpoints.states,
    "scene": rasters.scene,
    "label-raster": rasters.label_raster,
    "jpeg2000": rasters.jpeg2000,
    "mask": pngs.mask,
    "prediction": pngs.prediction,
    "zip": pngs.zip_file,
    "note": rows.note,
    "journal": rows.journal,
    "owner": rows.owner,
    "ending": rows.ending,
    "job": rows.job,
    "attempts": rows.attempts,
    "metrics": rows.metrics,
    "pairs": rows.pairs,
    "exported-weights": exported.weights,
    "exported-graph": exported.graph,
}
