"""The windows of a block → sums of weighted probabilities, and what follows from finished sums.

The sums are of whole numbers: each window's probability times its weight is rounded to a 65,280th.
Whole numbers add up alike in any order, so a map does not depend on how its windows were shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agrivision.errors import Interrupted
from agrivision.inference.predictor import Predictor
from agrivision.inference.reading import Cut
from agrivision.inference.shared import by_cores, in_turn
from agrivision.inference.tiling import Block, Grid, Tiling
from agrivision.maps.legend import NODATA
from agrivision.part import Stop, never

ONE = 255 * 256  # probability 1: a pixel's sum fits into 16 bits, and its upper byte is the probability

Sums = NDArray[np.uint16]  # (classes, rows, columns)


@dataclass(frozen=True, kw_only=True)
class Values:
    """What a map says of a rectangle of pixels.

    Attributes:
        ids: class by pixel, uint8; 255 where the scene has no data.
        confidence: probability of that class, uint8 1 to 255; 0 where the scene has no data.
        probabilities: (classes, rows, columns) uint8, 255 for certain; None where not asked for.
    """

    ids: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    probabilities: NDArray[np.uint8] | None


def add_up(
    predictor: Predictor,
    cut: Cut,
    grid: Grid,
    block: Block,
    tiling: Tiling,
    *,
    batch_size: int,
    report: Callable[[int], None],
    stop: Stop = never,
) -> Sums:
    """Sums over a block's windows.

    Args:
        predictor: what a map is made with.
        cut: the block's pixels.
        grid: of the scene.
        block: one of its blocks.
        tiling: how the scene is cut.
        batch_size: windows in one forward pass.
        report: called with the number of windows done since the last call.
        stop: whether to stop before the next batch.

    Returns:
        Sums of the block's extent, `ONE` altogether at pixels that no other block covers. A window
        without any data adds nothing.

    Raises:
        Interrupted: asked to stop.
    """
    x1, y1, x2, y2 = block.reach
    classes = len(predictor.description.classes)
    sums = torch.zeros(classes, y2 - y1, x2 - x1, device=predictor.device)
    pixels, side = torch.from_numpy(cut.pixels), tiling.tile
    batches = list(_batches(cut, grid, block, batch_size))

    def compute(batch: Sequence[tuple[int, int]]) -> list[tuple[int, int, torch.Tensor]]:
        places = [(grid.rows.start(row) - y1, grid.columns.start(column) - x1) for row, column in batch]
        seen = side + 2 * tiling.margin
        images = torch.stack([pixels[:, y : y + seen, x : x + seen] for y, x in places])
        found = predictor.probabilities(images, margin=tiling.margin)
        weighted = []
        for (row, column), (y, x), each in zip(batch, places, found, strict=True):
            weights = np.outer(grid.rows.weights(row), grid.columns.weights(column) * ONE)
            weighted.append((y, x, (each * torch.from_numpy(weights).to(each.device)).round_()))
        return weighted

    def offered() -> Iterator[Sequence[tuple[int, int]]]:
        for batch in batches:
            if stop():
                raise Interrupted("stopped; finished blocks are kept, and the same command goes on")
            yield batch

    share = by_cores if predictor.device.type == "cpu" else in_turn
    with closing(share(compute, offered())) as done:
        for windows in done:
            for y, x, weighted in windows:
                sums[:, y : y + side, x : x + side] += weighted
            report(len(windows))
    report(grid.count(block) - sum(map(len, batches)))
    inside = sums[:, : block.extent[3] - y1, : block.extent[2] - x1]
    return inside.cpu().numpy().astype(np.uint16)


def _batches(cut: Cut, grid: Grid, block: Block, batch_size: int) -> Iterator[list[tuple[int, int]]]:
    """The windows that hold data, so many at a time: those of a block alone, whoever computes it."""
    x1, y1, _, _ = block.extent
    filled = []
    for row, column in grid.windows(block):
        y, x = grid.rows.start(row) - y1, grid.columns.start(column) - x1
        if cut.valid[y : y + grid.rows.tile, x : x + grid.columns.tile].any():
            filled.append((row, column))
    for start in range(0, len(filled), batch_size):
        yield filled[start : start + batch_size]


def decide(
    sums: Sums,
    valid: NDArray[np.bool_],
    *,
    probabilities: bool,
    weights: NDArray[np.float32] | None = None,
) -> Values:
    """What finished sums say.

    Args:
        sums: of a rectangle that all its windows have been added to.
        valid: where the scene has data, (rows, columns).
        probabilities: whether those of all classes are wanted.
        weights: by class id, that sums are multiplied by before the largest is taken; None for 1.

    Returns:
        Of equal sums the class with the lowest id; its confidence is its probability, unweighted.
    """
    ids, best = _largest(sums if weights is None else map(np.multiply, sums, weights), valid.shape)
    if weights is not None:
        best = np.take_along_axis(sums, ids[None], 0)[0]
    ids[~valid] = NODATA
    confidence = np.where(valid, np.maximum(_byte(best), 1), 0).astype(np.uint8)
    kept = np.where(valid, _byte(sums), 0).astype(np.uint8) if probabilities else None
    return Values(ids=ids, confidence=confidence, probabilities=kept)


def _largest(
    each_class: Iterable[NDArray[Any]], shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Which class has the largest value at each pixel, and this value.

    Several times as fast as argmax over the first axis.
    """
    ids, values = np.zeros(shape, np.uint8), iter(each_class)
    best = next(values).copy()
    for class_id, each in enumerate(values, 1):
        np.putmask(ids, each > best, class_id)
        np.maximum(best, each, out=best)
    return ids, best


def _byte(sums: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The nearest 255th."""
    bytes_: NDArray[np.uint16] = np.minimum((sums.astype(np.uint32) + 128) >> 8, 255).astype(np.uint16)
    return bytes_
