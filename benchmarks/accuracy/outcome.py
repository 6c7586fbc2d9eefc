"""What a contestant has reached, and the score by which all are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agrivision.data.loader import evaluation_batches
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.evaluation.confusion import Scores, confusion_matrix, scores
from agrivision.world import World

Predict = Callable[[Tensor], Tensor]
_TOGETHER = 8


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is known of a contestant once it is scored.

    Attributes:
        miou: the challenge's score, 0 to 1.
        iou: by class; None where a class is in neither labels nor predictions.
        steps: of training.
        seconds: of training, on the wall.
        parameters: of the network.
        gflops: of one crop, forward.
        symmetric: `miou` and `iou` with every tile shown in all eight positions of a square; None where
            nobody looked.
    """

    miou: float
    iou: dict[str, float | None]
    steps: int
    seconds: float
    parameters: int
    gflops: float
    symmetric: dict[str, Any] | None = None


def score(predict: Predict, dataset: Path, split: str) -> Scores:
    """Score what a contestant says of the whole tiles of a split.

    Args:
        predict: pixels as in the data set, float32 (batch, bands, side, side), to class ids
            (batch, side, side).
        dataset: prepared.
        split: with labels.
    """
    schema = Schema.read(dataset)
    reader, classes = SplitReader(dataset, schema, split), len(schema.classes)
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in evaluation_batches(reader, World(), batch_size=_TOGETHER, threads=1):
        with torch.inference_mode():
            found = predict(batch.pixels.images())
        matrix += confusion_matrix(found, batch.pixels.label_bits(), classes)
    return scores(matrix, schema.classes)


def sizes(network: nn.Module, bands: int, side: int) -> dict[str, Any]:
    """`parameters` of a network, and `gflops` of one image of so many bands and pixels a side."""
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, bands, side, side))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": parameters, "gflops": counter.get_total_flops() / 1e9}
