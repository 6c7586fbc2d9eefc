"""Pictures of the tiles in which a run did best and worst, drawn by its own checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.decode import Pixels, decode_record
from agrivision.data.fields import FieldStatistics, fields_of, of_tiles
from agrivision.data.shards import SplitReader
from agrivision.errors import AgrivisionError, DatasetError
from agrivision.inference.trained import TrainedModel, load_run
from agrivision.model.precision import Precision
from agrivision.monitor.pictures import Picture, panel
from agrivision.report.history import Data, History
from agrivision.report.rows import Evaluation

_PANE = 256  # pixels of a side; larger tiles are drawn at a half, a third, …


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A tile with what is said of it.

    Attributes:
        key: of the tile.
        worst: whether it is one of the worst, or one of the best.
        reasons: the classes that it was named for, each with the tile's IoU.
        picture: RGB, NIR-R-G, truth and prediction side by side.
    """

    key: str
    worst: bool
    reasons: tuple[tuple[str, float], ...]
    picture: Picture


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles that are shown of a run.

    Attributes:
        shown: the worst first; empty where there are none.
        step: of the checkpoint that predicted them.
        split: that they are from.
        why: why there are none, or fewer than named, in a sentence; empty where all is well.
    """

    shown: tuple[Shown, ...]
    step: int
    split: str
    why: str


def draw_tiles(history: History, count: int) -> Tiles:
    """Draw the tiles that the evaluation of a run's best checkpoint names.

    Args:
        history: of the run.
        count: of each class, best and worst.
    """
    evaluations = [one for one in (history.metrics.best, history.metrics.last) if one is not None]
    if not any(one.worst or one.best for one in evaluations):
        return _none("No evaluation of this run names its best and worst tiles.")
    if isinstance(history.data, str):
        return _none(history.data)
    try:
        trained = load_run(history.run.path)
    except AgrivisionError as error:
        return _none(f"There is no checkpoint to draw them with: {error}.")
    evaluation = next((one for one in evaluations if one.step == trained.step), None)
    if evaluation is None:
        return _none(
            f"The checkpoint that is left, of step {trained.step}, was not scored tile by tile."
        )
    return _draw(history.data, history.values, trained, _named(evaluation, count))


def _none(why: str) -> Tiles:
    return Tiles(shown=(), step=0, split="", why=why)


def _named(evaluation: Evaluation, count: int) -> dict[tuple[bool, str], list[tuple[str, float]]]:
    """By whether it is one of the worst and by key: the classes, each with the tile's IoU."""
    found: dict[tuple[bool, str], list[tuple[str, float]]] = {}
    for worst, by_class in ((True, evaluation.worst), (False, evaluation.best)):
        for name, tiles in by_class.items():
            for tile in tiles[:count]:
                found.setdefault((worst, tile.key), []).append((name, tile.iou))
    return found


def _draw(
    data: Data,
    values: Mapping[str, Any],
    trained: TrainedModel,
    named: Mapping[tuple[bool, str], list[tuple[str, float]]],
) -> Tiles:
    schema, about = data.schema, trained.description
    if (schema.bands, schema.classes) != (about.bands, about.classes):
        return _none("The data set that is there now has other bands or classes than the checkpoint.")
    split = str(values.get("data.val_split", "val"))
    precision: Precision = "bf16" if values.get("training.precision") == "bf16" else "fp32"
    try:
        reader = SplitReader(data.folder, schema, split)
        fields = fields_of(reader, about.scope)
        places = _places(reader, {key for _, key in named})
    except AgrivisionError as error:
        return _none(f"They cannot be drawn: {error}.")
    pictures: dict[str, Picture] = {}
    for key, tile in places.items():
        try:
            pictures[key] = _picture(reader, tile, trained, precision, fields)
        except DatasetError:
            continue  # counted below
    shown = tuple(
        Shown(key=key, worst=worst, reasons=tuple(reasons), picture=pictures[key])
        for (worst, key), reasons in named.items()
        if key in pictures
    )
    missing = len({key for _, key in named} - pictures.keys())
    why = f"{missing} of the tiles cannot be read from the data set any more." if missing else ""
    return Tiles(shown=shown, step=trained.step, split=split, why=why)


def _places(reader: SplitReader, keys: set[str]) -> dict[str, int]:
    """The number of each tile in its split, by key; without those that are not there."""
    wanted = np.array(sorted(key.encode() for key in keys))
    found, before = {}, 0
    for shard in reader.shards():
        for row in np.flatnonzero(np.isin(shard.index["key"], wanted)):
            found[shard.key(int(row))] = before + int(row)
        before += len(shard.index)
    return found


def _picture(
    reader: SplitReader,
    tile: int,
    trained: TrainedModel,
    precision: Precision,
    fields: FieldStatistics | None,
) -> Picture:
    """A tile as the checkpoint sees it.

    Raises:
        DatasetError: it cannot be read.
    """
    schema = reader.schema
    pixels = Pixels.allocate(schema, 1)
    decode_record(reader.read(tile), schema, pixels, 0)
    image: NDArray[Any] = pixels.images()[0].numpy().astype(schema.dtype)
    statistics = of_tiles(fields, [tile], trained.device)
    predicted = trained.predict(image, precision=precision, statistics=statistics)
    every = -(-schema.tile // _PANE)
    return panel(
        image[:, ::every, ::every],
        schema.bands,
        pixels.label_bits()[0].numpy()[::every, ::every],
        predicted[::every, ::every],
        schema.classes,
    )
