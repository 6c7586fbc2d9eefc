"""One tile: its files as they go into a shard, its pixels, its label sets and where it lies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from agrivision.data.labels import Labels, class_pixels, compress
from agrivision.data.shards import LABELS, MAX_KEY, Record

Image = NDArray[Any]  # (bands, height, width), of the source's own type

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_NAME = 56  # leaves room for four pixel coordinates of up to six digits and their separators


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where a raster lies on the ground.

    Attributes:
        crs: coordinate reference system as WKT; empty where there is none.
        transform: the affine map from pixel (column, row) to ground, as a, b, c, d, e, f in
            x = a·column + b·row + c and y = d·column + e·row + f.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile as a source gives it.

    Attributes:
        key: unique in the data set; see `is_key`.
        field: the group that splits keep together: the field, or the scene.
        files: content of the image files by extension, in the order of the schema's parts.
        image: the same pixels decoded, shape (bands, height, width).
        labels: label sets as bits, shape (height, width), uint16; see `labels`.
        coordinates: where known.
    """

    key: str
    field: str
    files: Mapping[str, bytes]
    image: Image
    labels: Labels
    coordinates: Coordinates | None = None

    def record(self, classes: int) -> Record:
        """The tile as it goes into a shard of a data set with so many classes."""
        return Record(
            key=self.key,
            field=self.field,
            files={**self.files, LABELS: compress(self.labels)},
            pixels=[int(count) for count in class_pixels(self.labels, classes)],
        )


def is_key(text: str) -> bool:
    """Whether a text can be a key: letters, digits, `_` and `-`, and short enough for a tar header.

    WebDataset cuts a member's name at the first dot, so a key has none.
    """
    return len(text) <= MAX_KEY and _KEY.fullmatch(text) is not None


def safe_name(text: str) -> str:
    """A file's stem made fit to begin a key: other characters become `-`, long names are cut.

    A cut name ends in a digest of the whole, so that names which differ late stay different.
    """
    name = _NOT_IN_KEYS.sub("-", text) or "-"
    if len(name) <= _MAX_NAME:
        return name
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return f"{name[: _MAX_NAME - 9]}-{digest}"


def window_key(name: str, window: tuple[int, int, int, int]) -> str:
    """Key of a window of a scene: `NAME_X1-Y1-X2-Y2`, in pixels of the scene, ends excluded."""
    return f"{name}_{'-'.join(str(int(edge)) for edge in window)}"
