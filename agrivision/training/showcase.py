"""Validation tiles, drawn anew at each evaluation: some always, to see it learn, and the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from agrivision.data.decode import Pixels, decode_record
from agrivision.data.fields import FieldStatistics, of_tiles
from agrivision.data.normalise import Normaliser
from agrivision.data.shards import SplitReader
from agrivision.errors import DatasetError
from agrivision.model.padding import dense_logits
from agrivision.model.precision import Precision, autocast
from agrivision.monitor.pictures import Picture, panel
from agrivision.phase import moved

Worst = Mapping[str, Sequence[tuple[int, float]]]  # by class: tiles and their IoU


@torch.inference_mode()
def draw_panels(
    model: nn.Module,
    reader: SplitReader,
    normaliser: Normaliser,
    device: torch.device,
    *,
    count: int,
    worst: Worst | None = None,
    fields: FieldStatistics | None = None,
    precision: Precision = "fp32",
) -> dict[str, Picture]:
    """RGB, NIR-R-G, truth, prediction, mistakes and confidence of some tiles.

    Args:
        model: left in evaluation mode.
        reader: of the split.
        normaliser: with the statistics that the model was trained with.
        device: where the model is.
        count: of tiles spread evenly over the split, the same each time.
        worst: more tiles, by class.
        fields: of the split, where the model sees pixels relative to their field.
        precision: of the forward pass.

    Returns:
        uint8 (height, width, 3) by `tiles/KEY`, and by `worst/CLASS/NUMBER`, 1 for the worst; without
        tiles that cannot be read.
    """
    schema = reader.schema
    model.eval()
    panels: dict[str, Picture] = {}

    def draw(tag: str, tile: int, title: str) -> None:
        pixels = Pixels.allocate(schema, 1)
        try:
            decode_record(reader.read(tile), schema, pixels, 0)
        except DatasetError:
            return  # the evaluation has named it
        images = pixels.images()
        with autocast(device, precision):
            statistics = of_tiles(fields, [tile], device)
            logits = dense_logits(model, normaliser(images.to(device), statistics=statistics))
        confidence, predicted = logits[0].float().softmax(0).max(0)
        panels[tag] = panel(
            images[0].numpy().astype(schema.dtype),
            schema.bands,
            pixels.label_bits()[0].numpy(),
            predicted.cpu().numpy(),
            schema.classes,
            confidence=confidence.cpu().numpy(),
            title=title,
        )
        moved()

    for tile in np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int).tolist():
        draw(f"tiles/{reader.key(tile)}", tile, reader.key(tile))
    for name, found in (worst or {}).items():
        for number, (tile, iou) in enumerate(found, 1):
            draw(f"worst/{name}/{number}", tile, f"{name}: IoU {iou:.3f} in {reader.key(tile)}")
    return panels
