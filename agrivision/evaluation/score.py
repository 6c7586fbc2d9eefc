"""Anybody's class-id PNGs against the labels of a data set."""

from __future__ import annotations

import logging
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from agrivision.data.labels import decompress_into
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.sources.masks import NOT_WHOLE, png_pixels
from agrivision.errors import BadInput, DatasetError
from agrivision.evaluation.confusion import Scores, confusion_matrix, scores
from agrivision.reading import open_plain

logger = logging.getLogger(__name__)

_SUFFIX = ".png"
_SUBFOLDER = "labels"  # where `predict` puts them
_NAMED = 3  # files that a message names
_THREADS = 4
_GREY = 0  # PNG's number of the colour type
_HEADER = struct.Struct(">8sI4sIIBB")  # signature, length and kind of the first chunk, its first fields
_SLACK = 1 << 16  # bytes that a PNG may be longer than twice its pixels: text, a colour profile


class _Reading(Exception):
    """A file that cannot be read, and why."""


@dataclass(frozen=True, kw_only=True)
class _Predictions:
    """PNGs by key, in a folder or in a zip file.

    Attributes:
        place: of all of them, for messages.
        names: of each by its key, for messages.
        read: at most so many bytes of the PNG with this key.
    """

    place: Path
    names: dict[str, str]
    read: Callable[[str, int], bytes]


def score_folder(
    folder: Path, dataset: Path, split: str, report: Callable[[int], None] = lambda _: None
) -> Scores:
    """Score class-id PNGs, one for each tile of a split.

    Args:
        folder: with KEY.png directly in it or in `labels/`, or a zip file of them, which is read as it
            is and not unpacked. Each PNG has one grey band of 8 bits and the tile's size.
        dataset: a prepared data set.
        split: with labels.
        report: called with the number of tiles finished since the last call.

    Raises:
        DatasetError: the data set has no such split, or the split no labels, or it is damaged.
        BadInput: PNGs are missing, or one is damaged, of another size or type, or holds an id that is
            no class; the line names it.
    """
    schema = Schema.read(dataset)
    schema.split(split, labelled=True)
    reader = SplitReader(dataset, schema, split)
    keys = [shard.key(row) for shard in reader.shards() for row in range(len(shard.index))]
    matrix = torch.zeros(len(schema.classes), len(schema.classes), dtype=torch.int64)
    with _predictions(folder) as predictions, ThreadPoolExecutor(_THREADS, "score") as pool:
        _check_complete(predictions, keys, split)
        tiles = range(len(keys))
        for part in pool.map(lambda tile: _score_tile(predictions, reader, tile, keys[tile]), tiles):
            matrix += part
            report(1)
    return scores(matrix, schema.classes)


@contextmanager
def _predictions(path: Path) -> Iterator[_Predictions]:
    if path.is_dir():
        yield _in_folder(path)
        return
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(open_plain(path))))
        except _ZIP_ERRORS as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise BadInput(f"{path} is neither a folder nor a zip file of PNGs ({reason})") from None
        yield _in_zip(path, archive)


def _in_folder(folder: Path) -> _Predictions:
    found = [*sorted(folder.glob(f"*{_SUFFIX}")), *sorted((folder / _SUBFOLDER).glob(f"*{_SUFFIX}"))]
    names = _by_key(folder, [str(path.relative_to(folder)) for path in found])

    def read(key: str, limit: int) -> bytes:
        try:
            with open_plain(folder / names[key]) as file:
                return file.read(limit)
        except OSError as error:
            raise _Reading(error.strerror or str(error)) from None

    return _Predictions(place=folder, names=names, read=read)


# What zipfile raises for members that are damaged, encrypted or packed in a way it does not know.
_ZIP_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
# LZMA takes as much memory as a member says, up to 4 GiB.
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def _in_zip(path: Path, archive: zipfile.ZipFile) -> _Predictions:
    """Members by the last part of their names: nothing is written under the names in the file."""
    members = [name for name in archive.namelist() if name.endswith(_SUFFIX)]
    names = _by_key(path, [name for name in members if not name.startswith("__MACOSX/")])

    def read(key: str, limit: int) -> bytes:
        try:
            if archive.getinfo(names[key]).compress_type not in _PACKED:
                raise _Reading("it is packed in another way than stored or deflated")
            with archive.open(names[key]) as file:
                return file.read(limit)
        except _ZIP_ERRORS as error:
            raise _Reading(str(error)) from None

    return _Predictions(place=path, names=names, read=read)


def _by_key(place: Path, names: Sequence[str]) -> dict[str, str]:
    by_key: dict[str, str] = {}
    for name in names:
        key = PurePosixPath(name).name.removesuffix(_SUFFIX)
        if key in by_key:
            raise BadInput(f"{place} has two PNGs of the tile {key}: {by_key[key]} and {name}")
        by_key[key] = name
    return by_key


def _check_complete(predictions: _Predictions, keys: Sequence[str], split: str) -> None:
    missing = [key for key in keys if key not in predictions.names]
    if missing:
        raise BadInput(
            f"{predictions.place} lacks {len(missing)} of the {len(keys)} PNGs of the split {split!r}:"
            f" {_some(missing)}"
        )
    extra = sorted(predictions.names.keys() - set(keys))
    if extra:
        logger.warning(
            "%s has %d PNGs that are no tiles of the split %r and do not count: %s",
            predictions.place,
            len(extra),
            split,
            _some(extra),
        )


def _some(keys: Sequence[str]) -> str:
    named = ", ".join(f"{key}{_SUFFIX}" for key in keys[:_NAMED])
    return f"{named} …" if len(keys) > _NAMED else named


def _score_tile(predictions: _Predictions, reader: SplitReader, tile: int, key: str) -> torch.Tensor:
    """The confusion matrix of one tile."""
    side, classes = reader.schema.tile, len(reader.schema.classes)
    labels = np.empty((side, side), np.uint16)
    try:
        decompress_into(reader.read(tile)[-1], labels)
    except DatasetError as error:
        raise DatasetError(f"tile {key}: {error}") from None
    try:
        ids = _decode(predictions.read(key, 2 * side * side + _SLACK), side)
        if ids.max() >= classes:
            raise _Reading(
                f"it holds the value {ids.max()}, but the ids of the classes are 0 to {classes - 1}"
            )
    except _Reading as error:
        raise BadInput(f"{predictions.names[key]} in {predictions.place}: {error}") from None
    bits = torch.from_numpy(labels.astype(np.int32))
    return confusion_matrix(torch.from_numpy(ids)[None], bits[None], classes)


def _decode(content: bytes, side: int) -> NDArray[np.uint8]:
    """Class ids (side, side) of a PNG; what its header says is checked before memory is taken.

    Raises:
        _Reading: it is damaged, or of another size or type.
    """
    if len(content) < _HEADER.size or not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise _Reading("it is not a PNG")
    _, _, _, width, height, depth, colour = _HEADER.unpack_from(content)
    if (depth, colour) != (8, _GREY):
        raise _Reading(f"it is not of one grey band of 8 bits ({_kind(depth, colour)})")
    if (width, height) != (side, side):
        raise _Reading(f"it has {width} x {height} pixels, but the tile has {side} x {side}")
    try:
        pixels: NDArray[np.uint8] = png_pixels(content, (side, side))
        return pixels
    except (DatasetError, *NOT_WHOLE) as error:
        raise _Reading(f"it is not a whole PNG ({error})") from None


def _kind(depth: int, colour: int) -> str:
    kinds = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey and alpha", 6: "RGB and alpha"}
    return f"{kinds.get(colour, 'unknown')}, {depth} bits"
