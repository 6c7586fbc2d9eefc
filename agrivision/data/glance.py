"""What a data set looks like: histograms, overlaps, examples and places, from some of its tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.labels import Labels, class_mask, decompress_into, valid_mask
from agrivision.data.parts import JSON, TIFF, decode_part, decode_place, kind_of, tiff_coordinates
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.sources.source import Report, Silence
from agrivision.data.tile import Coordinates, Image
from agrivision.errors import DatasetError

TILES = 256  # that are looked at; a percentile of their pixels is good to a part of itself
EXAMPLES = 2  # of each class
_BINS = 64
_BYTES = 256  # values that a uint8 has


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tile that shows a class.

    Attributes:
        split: that it is in.
        key: of the tile.
        share: of its valid pixels that are of the class, 0 to 1.
        image: (bands, height, width), of the data set's type.
        labels: label sets as bits, uint16 (height, width).
    """

    split: str
    key: str
    share: float
    image: Image
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Where a tile lies.

    Attributes:
        split: that it is in.
        crs: of its coordinates, as WKT; empty where nobody knows.
        corners: (4, 2) x and y in that system, around the tile.
    """

    split: str
    crs: str
    corners: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Glance:
    """What some tiles of a data set look like.

    Attributes:
        tiles: how many were looked at.
        unreadable: how many of those chosen could not be read.
        edges: of the bins of the histograms, in the units of the pixels.
        histograms: valid pixels by band and bin, int64 (bands, bins).
        overlaps: valid pixels with both labels, int64 (classes, classes); on the diagonal those with
            one.
        examples: of each class that there is, by class id.
        footprints: of the tiles that say where they lie.
    """

    tiles: int
    unreadable: int
    edges: NDArray[np.float64]
    histograms: NDArray[np.int64]
    overlaps: NDArray[np.int64]
    examples: dict[int, tuple[Example, ...]]
    footprints: tuple[Footprint, ...]


def look_over(
    folder: Path, schema: Schema, *, tiles: int = TILES, report: Report | None = None
) -> Glance:
    """Look at some tiles of each split, spread evenly, and at examples of each class.

    Args:
        folder: the data set.
        schema: its dataset.json.
        tiles: how many; a larger data set has a share of them for each split, but one at least.
        report: is told of the progress.
    """
    report = report or Silence()
    edges = _edges(schema)
    bands, classes = len(schema.bands), len(schema.classes)
    histograms = np.zeros((bands, len(edges) - 1), np.int64)
    overlaps = np.zeros((classes, classes), np.int64)
    footprints: list[Footprint] = []
    seen = unreadable = 0
    readers = [
        SplitReader(folder, schema, name) for name, split in schema.splits.items() if split.tiles
    ]
    chosen = {reader.name: _spread(len(reader), tiles, schema) for reader in readers}
    report.total(sum(map(len, chosen.values())))
    for reader in readers:
        for tile in chosen[reader.name]:
            report.advance(1)
            try:
                files, image, labels = _read(reader, tile)
                place = _place(files, schema)
            except DatasetError as error:
                report.problem(*_named(reader, tile, error))
                unreadable += 1
                continue
            seen += 1
            histograms += _histograms(image, labels, edges)
            if reader.split.labelled:
                overlaps += _overlaps(labels, classes)
            if place is not None:
                corners = _corners(place, schema.tile)
                footprints.append(Footprint(split=reader.name, crs=place.crs, corners=corners))
    return Glance(
        tiles=seen,
        unreadable=unreadable,
        edges=edges,
        histograms=histograms,
        overlaps=overlaps,
        examples=dict(_examples(readers, classes)),
        footprints=tuple(footprints),
    )


def _edges(schema: Schema) -> NDArray[np.float64]:
    """Bins for all bands: of four values each for uint8, else from the least to the greatest value."""
    if schema.dtype == "uint8":
        return np.linspace(0, _BYTES, _BINS + 1)
    low, high = min(schema.statistics.minimum), max(schema.statistics.maximum)
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)


def _spread(size: int, tiles: int, schema: Schema) -> Sequence[int]:
    """Numbers of tiles of a split of some size, evenly over it."""
    whole = sum(split.tiles for split in schema.splits.values())
    count = min(size, max(1, round(tiles * size / whole)))
    return (np.arange(count) * size // count).tolist()


def _read(reader: SplitReader, tile: int) -> tuple[list[memoryview], Image, Labels]:
    schema = reader.schema
    *files, labels_file = reader.read(tile)
    planes = [
        decode_part(content, part, schema.dtype, schema.tile)
        for content, part in zip(files, schema.parts, strict=True)
    ]
    labels = np.empty((schema.tile, schema.tile), np.uint16)
    decompress_into(labels_file, labels)
    return files, np.concatenate(planes, axis=-1).transpose(2, 0, 1), labels


def _named(reader: SplitReader, tile: int, error: DatasetError) -> tuple[str, str]:
    """The file of a tile, and what is wrong there."""
    shard, key = reader.where(tile)
    return str(reader.dataset / shard), f"tile {key or tile}: {error}"


def _place(files: Sequence[memoryview], schema: Schema) -> Coordinates | None:
    for content, part in zip(files, schema.parts, strict=True):
        if kind_of(part) == TIFF:
            return tiff_coordinates(content)
        if kind_of(part) == JSON:
            return decode_place(content)
    return None


def _corners(place: Coordinates, side: int) -> NDArray[np.float64]:
    a, b, c, d, e, f = place.transform
    around = np.array([(0, 0), (side, 0), (side, side), (0, side)], np.float64)
    x, y = around.T
    return np.column_stack([a * x + b * y + c, d * x + e * y + f])


def _histograms(image: Image, labels: Labels, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    pixels = image[:, valid_mask(labels)]
    counts: NDArray[np.int64] = np.stack([np.histogram(band, edges)[0] for band in pixels])
    return counts


def _overlaps(labels: Labels, classes: int) -> NDArray[np.int64]:
    masks = np.stack([class_mask(labels, class_id).ravel() for class_id in range(classes)])
    there = [class_id for class_id in range(classes) if masks[class_id].any()]
    counts = np.zeros((classes, classes), np.int64)
    for one in there:
        for other in there:
            counts[one, other] = np.count_nonzero(masks[one] & masks[other])
    return counts


def _examples(
    readers: Sequence[SplitReader], classes: int
) -> Iterator[tuple[int, tuple[Example, ...]]]:
    """Of each class the tile that has most of it, and the one in the middle of those that have any."""
    labelled = [reader for reader in readers if reader.split.labelled]
    counts = np.concatenate([_counts(reader) for reader in labelled] or [np.zeros((0, classes))])
    starts = np.cumsum([0, *map(len, labelled)])
    for class_id in range(classes):
        column = counts[:, class_id]
        ranked = np.argsort(-column.astype(np.int64), kind="stable")[: np.count_nonzero(column)]
        found = []
        for place in _places(len(ranked)):
            number = int(np.searchsorted(starts, ranked[place], side="right")) - 1
            try:
                tile = int(ranked[place] - starts[number])
                found.append(_example(labelled[number], tile, class_id))
            except DatasetError:
                continue  # `inspect` names it
        if found:
            yield class_id, tuple(found)


def _places(count: int) -> list[int]:
    """The first of so many and those that follow in even steps, the last of which is in the middle."""
    steps = np.linspace(0, count // 2, EXAMPLES).round().astype(int).tolist()
    return [step for step in dict.fromkeys(steps) if step < count]


def _counts(reader: SplitReader) -> NDArray[Any]:
    """Valid pixels by tile and class; of a shard that cannot be opened none."""
    counts = np.zeros((len(reader), len(reader.schema.classes)), np.uint32)
    start = 0
    for info in reader.split.shards:
        try:
            shard, _ = reader.locate(start)
            counts[start : start + info.tiles] = shard.index["pixels"]
        except DatasetError:
            pass  # `inspect` names it
        start += info.tiles
    return counts


def _example(reader: SplitReader, tile: int, class_id: int) -> Example:
    _, image, labels = _read(reader, tile)
    pixels = int(valid_mask(labels).sum())
    return Example(
        split=reader.name,
        key=reader.key(tile),
        share=int(class_mask(labels, class_id).sum()) / max(1, pixels),
        image=image,
        labels=labels,
    )
