"""Agriculture-Vision: the 2020 and 2021 editions of the challenge and the paper's own archive.

JPEG files are kept byte for byte, and decoded to find damaged ones and to count. A class is on where
its PNG is above 0; background where no scored class is. A pixel is valid where its boundary and its
mask are both above 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from agrivision.data.labels import VALID_BIT, Labels
from agrivision.data.parts import decode_jpeg, decode_jpeg_for_four, describe, jpeg_shape
from agrivision.data.schema import Part
from agrivision.data.sources.layouts import (
    EDITIONS,
    SPLITS,
    STRAY,
    SplitFolder,
    field_of,
    find_edition,
    find_layouts,
    open_split,
    pair,
    require,
)
from agrivision.data.sources.masks import Mask, MaskReader
from agrivision.data.sources.source import Flaw, Problem, Read, Reference, Source, content_of
from agrivision.data.tile import Tile
from agrivision.errors import DatasetError, SourceError

BANDS = ("red", "green", "blue", "nir")
PARTS = (Part(extension="rgb.jpg", bands=3), Part(extension="nir.jpg", bands=1))
_T = TypeVar("_T")
_PROBES = 25  # headers that decide on the tile size; single files of another size cannot


@dataclass(frozen=True, kw_only=True)
class AgricultureVisionReader:
    """Reads tiles from the folders of the splits.

    Attributes:
        folders: by the group of the references.
        tile: side of the tiles in pixels.
        scored: classes of the edition, background included; label bits from there up are unscored.
    """

    folders: tuple[SplitFolder, ...]
    tile: int
    scored: int

    def files(self, reference: Reference) -> list[Path]:
        """See TileReader."""
        return self.folders[reference.group].files(reference.key)

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """See TileReader; nothing stays open between two tiles."""
        yield partial(self._read, MaskReader(size=(self.tile, self.tile)))

    def _read(self, masks: MaskReader, reference: Reference) -> Tile:
        folder, key = self.folders[reference.group], reference.key
        paths = folder.rgb / f"{key}.jpg", folder.nir / f"{key}.jpg"
        contents = [content_of(path) for path in paths]
        image = np.empty((self.tile, self.tile, len(BANDS)), np.uint8)
        _check_size(paths[0], contents[0], (self.tile, self.tile, 3))
        _attempt(paths[0], lambda: decode_jpeg_for_four(contents[0], image))
        image[..., 3:] = _decode(paths[1], contents[1], (self.tile, self.tile, 1))
        return Tile(
            key=key,
            field=reference.field,
            files={part.extension: content for part, content in zip(PARTS, contents, strict=True)},
            image=image.transpose(2, 0, 1),
            labels=self._labels(masks, folder, key),
        )

    def _labels(self, masks: MaskReader, folder: SplitFolder, key: str) -> Labels:
        labels = np.zeros(masks.size, np.uint16)
        for bit, classes in folder.classes:
            _set(labels, bit, masks.read(f"{classes}/{key}.png"))  # much cheaper than a Path
        if folder.classes:
            scored = np.uint16((1 << self.scored) - 1)
            _set(labels, 0, np.equal(labels & scored, 0))  # background is bit 0
        _set(labels, VALID_BIT, _valid(masks, folder, key))
        return labels


def _set(labels: Labels, bit: int, mask: Mask) -> None:
    if mask is not False:  # most masks are empty
        labels |= mask * np.uint16(1 << bit)


def open_agriculture_vision(root: Path, *, edition: str | None, assume_valid: bool) -> Source | None:
    """Look through an Agriculture-Vision folder.

    Args:
        root: with the folders of one split, or with train, val and test of which some may be absent.
        edition: `2020` or `2021`; None finds it by the class folders.
        assume_valid: take all pixels as valid where boundaries or masks are missing as a whole.

    Returns:
        What is there, or None if this is no Agriculture-Vision folder.

    Raises:
        SourceError: a folder is missing that nothing can be done without.
    """
    layouts = find_layouts(root)
    if not layouts:
        return None
    labels = [folder / layout.labels for folder, layout in layouts.values()]
    year = find_edition([path for path in labels if path.is_dir()], edition)
    folders, problems = {}, []
    for name, (folder, layout) in layouts.items():
        folders[name], found = open_split(
            name, folder, layout, EDITIONS[year], assume_valid=assume_valid
        )
        problems += found
    splits, found = _references(folders)
    chosen = EDITIONS[year]
    reader = AgricultureVisionReader(
        folders=tuple(folders.values()),
        tile=_tile_size(list(folders.values()), splits),
        scored=len(chosen.classes),
    )
    return Source(
        kind=f"agriculture-vision-{year}",
        bands=BANDS,
        dtype="uint8",
        tile=reader.tile,
        parts=PARTS,
        classes=chosen.classes,
        unscored=chosen.unscored,
        splits=splits,
        unlabelled=frozenset(name for name, folder in folders.items() if not folder.classes),
        reader=reader,
        problems=problems + found,
    )


def _references(
    folders: Mapping[str, SplitFolder],
) -> tuple[dict[str, list[Reference]], list[Problem]]:
    """Complete tiles by split; one that an earlier split has as well is left out of the later."""
    splits: dict[str, list[Reference]] = {}
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for group, (name, folder) in enumerate(folders.items()):
        keys, found = pair(folder)
        problems += found
        problems += [
            Problem(str(folder.rgb / f"{key}.jpg"), "twice", f"also in {seen[key]}: left out here")
            for key in keys
            if key in seen
        ]
        splits[name] = [Reference(key, field_of(key), group) for key in keys if key not in seen]
        seen |= dict.fromkeys(keys, name)
    return splits, problems


def _tile_size(folders: Sequence[SplitFolder], splits: Mapping[str, Sequence[Reference]]) -> int:
    """The most frequent side of the first tiles; 512 where no tile is left to look at."""
    references = [reference for tiles in splits.values() for reference in tiles]
    sizes: Counter[tuple[int, int]] = Counter()
    for reference in references[:: max(1, len(references) // _PROBES)]:
        path = folders[reference.group].rgb / f"{reference.key}.jpg"
        try:
            sizes[jpeg_shape(content_of(path))[:2]] += 1
        except (DatasetError, Flaw):
            continue  # named when the tile is read
    (height, width), _ = sizes.most_common(1)[0] if sizes else ((512, 512), 0)
    if height != width:
        raise SourceError(f"tiles of {width} x {height} pixels: square ones are needed")
    return height


def iterate_images(
    root: Path, splits: Sequence[str] | None = None, chosen: Container[str] | None = None
) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]]:
    """Images of a folder in one of the layouts, to predict on; labels are not needed.

    Args:
        root: as for `open_agriculture_vision`.
        splits: those to take, None for all.
        chosen: ids to take, None for all; no other image is read.

    Yields:
        The id, the image (4, height, width) uint8 and where it is valid (height, width) bool;
        everywhere, where there are no boundaries or masks. Sizes may differ from tile to tile.

    Raises:
        SourceError: the folder is of another kind, lacks a split or images, or a file is damaged.
    """
    layouts = find_layouts(root)
    unknown = [name for name in splits or () if name not in layouts]
    if unknown or not layouts:
        there = ", ".join(name for name in layouts if name) or "no splits"
        wanted = f"split {unknown[0]!r}" if unknown else f"images/rgb, also under {' or '.join(SPLITS)}"
        raise SourceError(f"{root} has no {wanted}: there are {there}")
    for name, (folder, layout) in layouts.items():
        if splits is not None and name not in splits:
            continue
        require((folder / layout.rgb, folder / layout.nir))
        yield from _iterate(layout.images_of(folder), chosen)


def _iterate(
    folder: SplitFolder, chosen: Container[str] | None
) -> Iterator[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]]:
    keys, problems = pair(folder)
    serious = [problem for problem in problems if problem.kind != STRAY]
    if serious:
        raise SourceError(f"{serious[0]} (there are {len(serious)} such tiles)")
    for key in keys:
        if chosen is not None and key not in chosen:
            continue
        try:
            rgb_path, nir_path = folder.rgb / f"{key}.jpg", folder.nir / f"{key}.jpg"
            content = content_of(rgb_path)
            height, width, _ = _attempt(rgb_path, partial(jpeg_shape, content))
            rgb = _decode(rgb_path, content, (height, width, 3))
            nir = _decode(nir_path, content_of(nir_path), (height, width, 1))
            valid = np.full((height, width), True)
            valid &= _valid(MaskReader(size=(height, width)), folder, key)
        except Flaw as flaw:
            raise SourceError(str(flaw)) from None
        yield key, _joined(rgb, nir), valid


def _decode(path: Path, content: bytes, wanted: tuple[int, int, int]) -> NDArray[np.uint8]:
    _check_size(path, content, wanted)
    out = np.empty(wanted, np.uint8)
    _attempt(path, lambda: decode_jpeg(content, out))
    return out


def _check_size(path: Path, content: bytes, wanted: tuple[int, int, int]) -> None:
    shape = _attempt(path, lambda: jpeg_shape(content))
    if shape != wanted:
        what = f"{describe(shape)} where {describe(wanted)} belong"
        raise Flaw(path, "wrong size", what)


def _attempt(path: Path, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except DatasetError as error:
        raise Flaw(path, "unreadable", f"{error}") from None


def _joined(rgb: NDArray[np.uint8], nir: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bands one after the other, (4, height, width), of pixels one after the other."""
    image = np.empty((4, *nir.shape[:2]), np.uint8)
    image[:3] = rgb.transpose(2, 0, 1)
    image[3] = nir[..., 0]
    return image


def _valid(masks: MaskReader, folder: SplitFolder, key: str) -> Mask:
    valid: Mask = True
    for path in folder.valid:
        mask = masks.read(f"{path}/{key}.png")
        valid = mask if valid is True else valid & mask
    return valid
