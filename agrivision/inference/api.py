"""Predictions for programs: an array in memory, or a file with all that belongs to its map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.errors import BadInput
from agrivision.inference.assemble import assemble, keep
from agrivision.inference.blend import add_up
from agrivision.inference.exported import load_model
from agrivision.inference.predict import PredictOptions, PredictSummary, predict
from agrivision.inference.predictor import Predictor
from agrivision.inference.reading import ArrayPixels, read_block
from agrivision.inference.scene import statistics_of
from agrivision.inference.store import Memory
from agrivision.inference.tiling import Grid, Tiling
from agrivision.inference.trained import TrainedModel
from agrivision.maps.legend import NODATA

Run = TrainedModel | str | Path


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is known of every pixel of an image.

    Attributes:
        classes: names by id.
        ids: (height, width) uint8; 255 where there is no data.
        confidence: (height, width) float32, 0 to 1: the probability of the pixel's class.
        probabilities: (classes, height, width) float32, 0 to 1, in steps of 1/255.
    """

    classes: tuple[str, ...]
    ids: NDArray[np.uint8]
    confidence: NDArray[np.float32]
    probabilities: NDArray[np.float32]


def predict_scene(
    run: Run | Sequence[Run], path: str | Path, out: str | Path, options: PredictOptions | None = None
) -> PredictSummary:
    """Predict a raster, or whatever else `agrivision predict` takes, into a folder.

    Args:
        run: a loaded network, or the path of a run, a checkpoint or an exported network; several of
            them are averaged.
        path: of the scene.
        out: folder of the map and what belongs to it, made where missing.
        options: None takes the defaults of the command.

    Raises:
        AgrivisionError: as of `agrivision.inference.predict.predict`.
    """
    return predict(_loaded(run), [Path(path)], Path(out), options or PredictOptions())


def predict_array(
    run: Run | Sequence[Run],
    array: NDArray[Any],
    options: PredictOptions | None = None,
    *,
    valid: NDArray[np.bool_] | None = None,
) -> Prediction:
    """Predict an image in memory as a scene is predicted: in windows that are blended.

    Args:
        run: as in `predict_scene`.
        array: (bands, height, width), any size, pixels and bands as in the data set.
        options: None takes the defaults of the command; what is about files has no effect.
        valid: (height, width), where there is data; None: where a band differs from the data set's
            nodata value.

    Raises:
        BadInput: the array has other bands, or is empty.
        CheckpointError: the run cannot be loaded.
    """
    how = options or PredictOptions()
    predictor = replace(
        Predictor.of(_loaded(run), symmetries=how.symmetries, precision=how.precision), fast=True
    )
    about = predictor.description
    if array.ndim != 3 or array.shape[0] != len(about.bands) or not array.size:
        raise BadInput(
            f"an array of shape {array.shape}: the network takes (bands, height, width), bands"
            f" {', '.join(about.bands)}"
        )
    if valid is None:
        valid = np.ones(array.shape[1:], np.bool_)
        if about.nodata is not None:
            valid = ~(array == about.nodata).all(0)
    if about.scope == "field":
        predictor = replace(predictor, statistics=statistics_of(array, valid, about))
    pixels = ArrayPixels(array, valid)
    after = how.after(about)
    weights = after.weights if after is not None and after.weighs else None
    tiling = Tiling.of(about, how.tile, how.margin, how.overlap)
    batch_size = how.batch_size or tiling.batch(predictor.device)
    grid, store = Grid.of(tiling, *array.shape[1:]), Memory()
    for number in range(grid.blocks):
        block = grid.block(number)
        cut = read_block(pixels, block, tiling)
        sums = add_up(predictor, cut, grid, block, tiling, batch_size=batch_size, report=lambda _: None)
        keep(store, grid, block, sums, cut.valid, probabilities=True, weights=weights)
    ids = np.empty(array.shape[1:], np.uint8)
    confidence = np.empty(array.shape[1:], np.float32)
    probabilities = np.empty((len(about.classes), *array.shape[1:]), np.float32)
    for (left, top, right, bottom), values in assemble(
        store, grid, len(about.classes), probabilities=True, weights=weights
    ):
        where = slice(top, bottom), slice(left, right)
        assert values.probabilities is not None
        ids[where], confidence[where] = values.ids, values.confidence / 255
        probabilities[:, where[0], where[1]] = values.probabilities / 255
    if after is not None and after.sieves:
        clean = after.sieved(ids, ids != NODATA)
        rows, columns = np.nonzero(clean != ids)
        new = probabilities[clean[rows, columns], rows, columns]
        ids, confidence[rows, columns] = clean, np.maximum(new, np.float32(1 / 255))
    return Prediction(
        classes=about.classes, ids=ids, confidence=confidence, probabilities=probabilities
    )


def _loaded(run: Run | Sequence[Run]) -> list[TrainedModel]:
    runs = [run] if isinstance(run, TrainedModel | str | Path) else list(run)
    return [each if isinstance(each, TrainedModel) else load_model(Path(each)) for each in runs]
