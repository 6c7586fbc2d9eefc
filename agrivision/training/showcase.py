"""A few validation tiles, drawn anew at each evaluation to see the network learn."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from agrivision.data.augment import Normaliser
from agrivision.data.decode import Pixels, decode_record
from agrivision.data.shards import SplitReader
from agrivision.errors import DatasetError
from agrivision.model.padding import dense_logits
from agrivision.model.precision import Precision, autocast
from agrivision.monitor.pictures import Picture, panel


@torch.inference_mode()
def draw_panels(
    model: nn.Module,
    reader: SplitReader,
    normaliser: Normaliser,
    device: torch.device,
    *,
    count: int,
    precision: Precision = "fp32",
) -> dict[str, Picture]:
    """RGB, NIR-R-G, truth and prediction of `count` tiles, spread evenly over a split.

    Returns:
        uint8 (height, width, 3) by `tiles/KEY`; without tiles that cannot be read.
    """
    schema = reader.schema
    model.eval()
    panels: dict[str, Picture] = {}
    for tile in np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int).tolist():
        pixels = Pixels.allocate(schema, 1)
        try:
            decode_record(reader.read(tile), schema, pixels, 0)
        except DatasetError:
            continue  # the evaluation has named it
        images = pixels.images()
        with autocast(device, precision):
            logits = dense_logits(model, normaliser(images.to(device)))
        bits = pixels.label_bits()[0].numpy()
        panels[f"tiles/{reader.key(tile)}"] = panel(
            images[0].numpy().astype(schema.dtype),
            schema.bands,
            bits,
            logits[0].argmax(0).cpu().numpy(),
            schema.classes,
        )
    return panels
