"""Tiles to predict: of a prepared data set, or of an Agriculture-Vision folder as it is downloaded."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from agrivision.data.fields import FieldStatistics, fields_of, of_tiles
from agrivision.data.labels import VALID_BIT
from agrivision.data.loader import evaluation_batches
from agrivision.data.schema import Schema
from agrivision.data.shards import Shard, SplitReader
from agrivision.data.sources.agriculture_vision import BANDS, iterate_images
from agrivision.data.sources.layouts import STRAY, SplitFolder, find_layouts, pair, require
from agrivision.data.tile import is_key
from agrivision.errors import SourceError
from agrivision.inference.ahead import one_ahead
from agrivision.inference.journal import stamp
from agrivision.inference.trained import Description
from agrivision.world import World


@dataclass(frozen=True, kw_only=True)
class TileBatch:
    """Some tiles of the same size.

    Attributes:
        keys: their names.
        images: (tiles, bands, height, width), pixels as in the data set, on any device.
        valid: bool (tiles, height, width), on the same device.
        statistics: of the tiles' fields, float32 (tiles, 2, channels), where they are known.
    """

    keys: Sequence[str]
    images: torch.Tensor
    valid: torch.Tensor
    statistics: torch.Tensor | None = None


class Tiles(Protocol):
    """Tiles that can be predicted, with or without labels."""

    @property
    def place(self) -> str:
        """Where they are, for messages."""

    @property
    def keys(self) -> Sequence[str]:
        """Names of all tiles, in an order that does not change."""

    def identity(self, key: str) -> str:
        """Of what is read for a tile: another one where that has changed."""

    def batches(
        self, groups: Sequence[int], batch_size: int, threads: int, device: torch.device
    ) -> Generator[TileBatch, None, None]:
        """The tiles of some groups (see `grouped`), each once, in batches that depend on the group."""


def grouped(tiles: Tiles, batch_size: int) -> list[Sequence[str]]:
    """The keys in groups: as many as go into a batch, one after the other."""
    keys = tiles.keys
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


class _SomeTiles(SplitReader):
    """Some tiles of a split, numbered anew."""

    def __init__(self, folder: Path, schema: Schema, name: str, tiles: Sequence[int]) -> None:
        super().__init__(folder, schema, name)
        self._tiles = tiles

    def __len__(self) -> int:
        return len(self._tiles)

    def locate(self, tile: int) -> tuple[Shard, int]:
        """See SplitReader."""
        return super().locate(self._tiles[tile])


@dataclass(frozen=True, kw_only=True)
class PreparedTiles:
    """The tiles of a split of a prepared data set.

    Attributes:
        folder: of the data set.
        schema: its description.
        split: name of the split.
        keys: in the order of the split.
        fields: what its fields have in common; None where nobody needs to know.
    """

    folder: Path
    schema: Schema
    split: str
    keys: tuple[str, ...]
    fields: FieldStatistics | None = None

    @property
    def place(self) -> str:
        """See Tiles."""
        return str(self.folder / self.split)

    def identity(self, key: str) -> str:  # noqa: ARG002 - the whole data set has one
        """See Tiles."""
        return self.schema.fingerprint

    def batches(
        self, groups: Sequence[int], batch_size: int, threads: int, device: torch.device
    ) -> Generator[TileBatch, None, None]:
        """See Tiles; in the batches of an evaluation, so that the predictions are the same bits."""
        pinned = device.type == "cuda"
        numbers = range(len(self.keys))
        chosen = [tile for group in groups for tile in numbers[group * batch_size :][:batch_size]]
        reader = _SomeTiles(self.folder, self.schema, self.split, chosen)
        loaded = evaluation_batches(
            reader, World(), batch_size=batch_size, threads=threads, pinned=pinned
        )
        with closing(loaded):
            for batch in loaded:
                pixels = batch.pixels.to(device)
                tiles = [chosen[tile] for tile in batch.tiles]
                yield TileBatch(
                    keys=[self.keys[tile] for tile in tiles],
                    statistics=of_tiles(self.fields, tiles, device),
                    images=pixels.images(),
                    valid=((pixels.label_bits() >> VALID_BIT) & 1).bool(),
                )


@dataclass(frozen=True, kw_only=True)
class FolderTiles:
    """The tiles of an Agriculture-Vision folder as it is downloaded.

    Attributes:
        root: of the folder.
        splits: those to take; None for all.
        folders: of the tiles, by key in the order in which the images are read.
    """

    root: Path
    splits: tuple[str, ...] | None
    folders: Mapping[str, SplitFolder]

    @property
    def keys(self) -> Sequence[str]:
        """See Tiles."""
        return tuple(self.folders)

    def identity(self, key: str) -> str:
        """See Tiles; by the sizes and times of the files, masks of validity included."""
        stamps = "\n".join(stamp(path) for path in self.folders[key].files(key))
        return xxhash.xxh3_64_hexdigest(stamps.encode("utf-8", "surrogateescape"))

    @property
    def place(self) -> str:
        """See Tiles."""
        return str(self.root)

    def batches(
        self, groups: Sequence[int], batch_size: int, threads: int, device: torch.device
    ) -> Generator[TileBatch, None, None]:
        """See Tiles; with any threads, one of them decodes the next batch."""
        keys = grouped(self, batch_size)
        chosen = {key for group in groups for key in keys[group]}
        images = iterate_images(self.root, self.splits, chosen)
        batches = (
            batch for group in groups for batch in batched(islice(images, batch_size), batch_size)
        )
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
            folder=folder,
            schema=schema,
            split=reader.name,
            keys=tuple(shard.key(row) for shard in reader.shards() for row in range(len(shard.index))),
            fields=fields_of(reader, description.scope),
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
    if description.scope == "field":
        raise SourceError(
            f"{root}: the network sees pixels relative to their field, whose statistics `agrivision"
            " prepare` takes: prepare the folder, and predict the data set"
        )
    if split is not None and split not in layouts:
        there = ", ".join(name for name in layouts if name) or "none, its tiles are undivided"
        raise SourceError(f"{root} has no split {split!r}; there are: {there}")
    folders: dict[str, SplitFolder] = {}
    for name, (folder, layout) in layouts.items():
        if split in (None, name):
            images = layout.images_of(folder)
            for key in _complete_keys(images):
                _check_new(key, folders, images)
                folders[key] = images
    return FolderTiles(root=root, splits=None if split is None else (split,), folders=folders)


def _check_new(key: str, folders: Mapping[str, SplitFolder], images: SplitFolder) -> None:
    if key in folders:
        raise SourceError(
            f"the tile {key} is in {folders[key].rgb} and in {images.rgb}: predict one at a time"
            " (--split), each into a folder of its own"
        )


def _complete_keys(folder: SplitFolder) -> list[str]:
    require((folder.rgb, folder.nir))
    keys, problems = pair(folder)
    serious = [problem for problem in problems if problem.kind != STRAY]
    if serious:
        raise SourceError(
            f"{serious[0].path} is missing or cannot be paired (there are {len(serious)} such tiles):"
            " complete the folder first"
        )
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
        batch_size: tiles in a batch; fewer where no more are of the size.
    """
    sizes: dict[tuple[int, ...], list[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]]] = {}
    for tile in tiles:
        sizes.setdefault(tile[1].shape, []).append(tile)
    for same in sizes.values():
        for start in range(0, len(same), batch_size):
            yield _join(same[start : start + batch_size])


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
