"""Tiles → class-id PNGs, the challenge's submission and a table of which class is in which tile."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow

from agrivision.data.labels import VALID_BIT
from agrivision.data.loader import evaluation_batches
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.sources.agriculture_vision import BANDS, iterate_images
from agrivision.data.sources.layouts import STRAY, SplitFolder, find_layouts, pair, require
from agrivision.data.tile import is_key
from agrivision.errors import SourceError
from agrivision.evaluation.presence import tile_scores
from agrivision.inference.ahead import one_ahead
from agrivision.inference.trained import Description, TrainedModel
from agrivision.model.precision import Precision
from agrivision.storage import replacing, storage_error, write_atomically
from agrivision.world import World

LABELS, SUBMISSION, PRESENCE = "labels", "submission.zip", "presence.csv"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can hold
_WAITING_BATCHES = 4  # of tiles of other sizes that are kept until their batch is full


@dataclass(frozen=True, kw_only=True)
class TileBatch:
    """Some tiles of the same size.

    Attributes:
        keys: their names.
        images: (tiles, bands, height, width), pixels as in the data set, on any device.
        valid: bool (tiles, height, width), on the same device.
    """

    keys: Sequence[str]
    images: torch.Tensor
    valid: torch.Tensor


class Tiles(Protocol):
    """Tiles that can be predicted, with or without labels."""

    @property
    def place(self) -> str:
        """Where they are, for messages."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of all tiles."""

    def batches(
        self, batch_size: int, threads: int, device: torch.device
    ) -> Generator[TileBatch, None, None]:
        """All tiles, each once."""


@dataclass(frozen=True, kw_only=True)
class PreparedTiles:
    """The tiles of a split of a prepared data set.

    Attributes:
        reader: of the split.
        place: of the split.
        keys: in the order of the split.
    """

    reader: SplitReader
    place: str
    keys: tuple[str, ...]

    def batches(
        self, batch_size: int, threads: int, device: torch.device
    ) -> Generator[TileBatch, None, None]:
        """See Tiles; in the batches of an evaluation, so that the predictions are the same bits."""
        pinned = device.type == "cuda"
        loaded = evaluation_batches(
            self.reader, World(), batch_size=batch_size, threads=threads, pinned=pinned
        )
        with closing(loaded):
            for batch in loaded:
                pixels = batch.pixels.to(device)
                yield TileBatch(
                    keys=[self.keys[tile] for tile in batch.tiles],
                    images=pixels.images(),
                    valid=((pixels.label_bits() >> VALID_BIT) & 1).bool(),
                )


@dataclass(frozen=True, kw_only=True)
class FolderTiles:
    """The tiles of an Agriculture-Vision folder as it is downloaded.

    Attributes:
        root: of the folder.
        splits: those to take; None for all.
        keys: in no particular order.
    """

    root: Path
    splits: tuple[str, ...] | None
    keys: tuple[str, ...]

    @property
    def place(self) -> str:
        """See Tiles."""
        return str(self.root)

    def batches(
        self, batch_size: int, threads: int, device: torch.device
    ) -> Generator[TileBatch, None, None]:
        """See Tiles; with any threads, one of them decodes the next batch."""
        batches = batched(iterate_images(self.root, self.splits), batch_size)
        with closing(one_ahead(batches) if threads else batches) as loaded:
            for batch in loaded:
                yield TileBatch(
                    keys=batch.keys, images=batch.images.to(device), valid=batch.valid.to(device)
                )


def open_dataset(folder: Path, split: str | None, description: Description) -> list[PreparedTiles]:
    """The tiles of a prepared data set.

    Args:
        folder: with dataset.json.
        split: the one to take; None for all that have tiles.
        description: of the run that is to predict them.

    Raises:
        DatasetError: there is no such split, or it cannot be read.
        SourceError: the run was trained on other bands.
    """
    schema = Schema.read(folder)
    _check_pixels(str(folder), schema.bands, schema.dtype, description)
    names = [split] if split else [name for name, each in schema.splits.items() if each.tiles]
    readers = [SplitReader(folder, schema, name) for name in names]
    return [
        PreparedTiles(
            reader=reader,
            place=str(folder / reader.name),
            keys=tuple(shard.key(row) for shard in reader.shards() for row in range(len(shard.index))),
        )
        for reader in readers
    ]


def open_folder(root: Path, split: str | None, description: Description) -> FolderTiles | None:
    """The tiles of an Agriculture-Vision folder in any layout; None if it is none.

    Args:
        root: the folder.
        split: the one to take; None for all.
        description: of the run that is to predict them.

    Raises:
        SourceError: there is no such split, images are missing, or the run was trained on other bands.
    """
    layouts = find_layouts(root)
    if not layouts:
        return None
    _check_pixels(str(root), BANDS, "uint8", description)
    if split is not None and split not in layouts:
        there = ", ".join(name for name in layouts if name) or "none, its tiles are undivided"
        raise SourceError(f"{root} has no split {split!r}; there are: {there}")
    keys: list[str] = []
    for name, (folder, layout) in layouts.items():
        if split in (None, name):
            keys += _complete_keys(folder / layout.rgb, folder / layout.nir)
    return FolderTiles(root=root, splits=None if split is None else (split,), keys=tuple(keys))


def _complete_keys(rgb: Path, nir: Path) -> list[str]:
    require((rgb, nir))
    keys, problems = pair(SplitFolder(rgb=rgb, nir=nir, valid=(), classes=()))
    serious = [problem for problem in problems if problem.kind != STRAY]
    if serious:
        raise SourceError(f"{serious[0]} (there are {len(serious)} such tiles)")
    return keys


def _check_pixels(place: str, bands: Sequence[str], dtype: str, description: Description) -> None:
    if (tuple(bands), dtype) != (description.bands, description.dtype):
        raise SourceError(
            f"{place} has the bands {', '.join(bands)} of {dtype}; the run was trained on"
            f" {', '.join(description.bands)} of {description.dtype}"
        )


def batched(
    tiles: Iterable[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]], batch_size: int
) -> Generator[TileBatch, None, None]:
    """Put tiles of the same size together, whatever order the sizes come in.

    Args:
        tiles: key, image (bands, height, width) and where it is valid (height, width).
        batch_size: tiles in a batch; fewer at the end, or where too many sizes are waiting.
    """
    waiting: dict[tuple[int, ...], list[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]]] = {}
    for tile in tiles:
        group = waiting.setdefault(tile[1].shape, [])
        group.append(tile)
        too_many = sum(map(len, waiting.values())) >= _WAITING_BATCHES * batch_size
        if len(group) == batch_size or too_many:
            fullest = max(waiting, key=lambda shape: len(waiting[shape]))
            yield _join(waiting.pop(fullest))
    for group in waiting.values():
        yield _join(group)


def _join(tiles: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]]) -> TileBatch:
    keys, images, valid = zip(*tiles, strict=True)
    return TileBatch(
        keys=keys, images=torch.from_numpy(np.stack(images)), valid=torch.from_numpy(np.stack(valid))
    )


def check_keys(sets: Iterable[Tiles]) -> None:
    """Check that every tile can have a file of its own.

    Raises:
        SourceError: two tiles have the same key, or one cannot be a file's name.
    """
    seen: dict[str, str] = {}
    for tiles in sets:
        for key in tiles.keys:
            if not is_key(key):  # a data set from elsewhere could name a path outside of the output
                raise SourceError(f"a tile in {tiles.place} has the key {key!r}: not a file's name")
            if key in seen:
                raise SourceError(
                    f"the tile {key} is in {seen[key]} and in {tiles.place}: predict one at a time"
                    " (--split), each into a folder of its own"
                )
            seen[key] = tiles.place


def predict_tiles(
    trained: TrainedModel,
    sets: Sequence[Tiles],
    out: Path,
    *,
    batch_size: int,
    threads: int,
    precision: Precision,
    report: Callable[[int], None],
) -> None:
    """Write the class-id PNGs of tiles, a zip of them and the table of presence.

    Files in `out` of the same names are replaced one by one; any others stay as they are.

    Args:
        trained: the network.
        sets: tiles whose keys `check_keys` has passed.
        out: folder; it gets `labels/KEY.png`, `submission.zip` and `presence.csv`.
        batch_size: tiles in one forward pass.
        threads: that decode and write; 0 decodes in the caller's.
        precision: of the forward pass.
        report: called with the number of tiles finished since the last call.

    Raises:
        SourceError, DatasetError: an image cannot be read.
        StorageError, NotWritable: the disk refused.
    """
    folder = out / LABELS
    _make_folder(folder)
    rows: dict[str, list[float]] = {}
    with ThreadPoolExecutor(max(threads, 1), "write") as pool:
        writing: list[Future[None]] = []
        for tiles in sets:
            with closing(tiles.batches(batch_size, threads, trained.device)) as batches:
                for batch in batches:
                    ids, found = _predict(trained, batch, precision)
                    _wait(writing)
                    writing = [
                        pool.submit(_write_ids, folder / f"{key}.png", tile)
                        for key, tile in zip(batch.keys, ids, strict=True)
                    ]
                    rows |= zip(batch.keys, found, strict=True)
                    report(len(batch.keys))
        _wait(writing)
    write_submission(out / SUBMISSION, folder, rows)
    _write_presence(out / PRESENCE, rows, trained.description.classes)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(folder, error) from error


def _wait(writing: Iterable[Future[None]]) -> None:
    for future in writing:
        future.result()


@torch.inference_mode()
def _predict(
    trained: TrainedModel, batch: TileBatch, precision: Precision
) -> tuple[NDArray[np.uint8], list[list[float]]]:
    """Class ids (tiles, height, width) and scores of presence by tile and class."""
    probabilities = trained.probabilities(batch.images, precision=precision)
    scores = tile_scores(probabilities, batch.valid)
    ids: NDArray[np.uint8] = probabilities.argmax(1).to(torch.uint8).cpu().numpy()
    return ids, scores.tolist()


def _write_ids(path: Path, ids: NDArray[np.uint8]) -> None:
    """Write a PNG of one grey band, 8 bits, whose values are class ids."""
    content = io.BytesIO()
    Pillow.fromarray(ids).save(content, "PNG")
    write_atomically(path, content.getvalue())


def write_submission(path: Path, folder: Path, keys: Iterable[str]) -> None:
    """Zip the PNGs of some tiles as the challenge takes them; the same PNGs give the same bytes.

    Args:
        path: of the zip.
        folder: with KEY.png.
        keys: of the tiles.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for key in sorted(keys):
            member = zipfile.ZipInfo(f"{key}.png", _EPOCH)
            member.create_system, member.external_attr = 3, 0o644 << 16  # Unix, rw-r--r--
            archive.writestr(member, (folder / f"{key}.png").read_bytes())


def _write_presence(path: Path, rows: dict[str, list[float]], classes: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", *classes])
    writer.writerows(_cells(rows))
    write_atomically(path, text.getvalue().encode())


def _cells(rows: dict[str, list[float]]) -> Iterator[list[str]]:
    for key in sorted(rows):
        yield [key, *(f"{score:.4f}" for score in rows[key])]
