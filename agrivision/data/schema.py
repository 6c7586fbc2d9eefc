"""dataset.json: what a prepared data set holds, and the fingerprint that tells two of them apart."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agrivision.data.labels import MAX_CLASSES, VALID_BIT
from agrivision.errors import DatasetError
from agrivision.json_values import entries, flag, items, label, name, number, parse, texts, whole
from agrivision.reading import read_plain
from agrivision.storage import write_atomically

FILE_NAME = "dataset.json"
FORMAT = "agrivision-dataset"
VERSION = 1
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
MAX_TILE = (
    1 << 14
)  # pixels of a side; no network takes that at once, and it bounds what memory is asked for
_MOST_TILE_BYTES = 1 << 32  # of a tile's pixels: an index has 32 bits for the size of a file
_MOST_BYTES = 64 << 20  # of dataset.json: a quarter of a million shards
_METADATA = 16 << 20  # bytes of a record besides pixels; a colour profile in a JPEG takes up to that
_EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One image file of a record.

    Attributes:
        extension: what follows the key in the tar member's name, for example `rgb.jpg`.
        bands: how many bands it holds, in order; none in a file that says where the tile lies.
    """

    extension: str
    bands: int


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard of a split.

    Attributes:
        name: file name without suffix, for example `00000`.
        tiles: records in it.
        bytes: size of the tar file.
        index: XXH3-128 of the index file, in hexadecimal.
    """

    name: str
    tiles: int
    bytes: int
    index: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split.

    Attributes:
        tiles: number of tiles.
        labelled: whether its tiles have labels (a challenge's test split has none).
        shards: in the order of the tiles.
        pixels: valid pixels.
        class_pixels: valid pixels by class id; a pixel with two labels counts for both.
        class_tiles: tiles with at least one valid pixel, by class id.
    """

    tiles: int
    labelled: bool
    shards: tuple[ShardInfo, ...]
    pixels: int
    class_pixels: tuple[int, ...]
    class_tiles: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BandStatistics:
    """Mean and standard deviation of each band over the valid pixels of some splits.

    Attributes:
        splits: splits that were counted: `train`, or all where there is no `train`.
        pixels: valid pixels counted.
        mean: by band, in the units of the pixels.
        std: by band, population standard deviation.
        minimum: by band.
        maximum: by band.
    """

    splits: tuple[str, ...]
    pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The content of dataset.json.

    Attributes:
        source: kind of source it was prepared from: `agriculture-vision-2021`, `rasters`, …
        bands: names in order, for example red, green, blue, nir.
        dtype: numpy name of the pixels' type.
        tile: side of the square tiles in pixels.
        parts: the image files of each record; their bands in order make up `bands`.
        classes: names by id; id 0 first.
        class_values: value of each class in the label rasters it came from; empty for masks.
        unscored: label names whose bits follow those of the classes.
        splits: by name.
        statistics: of the bands.
        nodata: a pixel with this value in all bands holds no data; None where there is no such value.
        resolution: metres a pixel, the median over the scenes; None where nothing says where they lie.
    """

    source: str
    bands: tuple[str, ...]
    dtype: str
    tile: int
    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    class_values: tuple[int, ...]
    unscored: tuple[str, ...]
    splits: dict[str, Split]
    statistics: BandStatistics
    nodata: float | None = None
    resolution: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES - len(self.unscored):
            raise DatasetError(
                f"{len(self.classes)} classes and {len(self.unscored)} unscored labels:"
                f" at least one class, and at most {MAX_CLASSES} labels altogether"
            )
        if sum(part.bands for part in self.parts) != len(self.bands):
            raise DatasetError(f"the image files do not make up the bands {', '.join(self.bands)}")
        if self.tile > MAX_TILE or self.tile**2 * self._pixel_bytes >= _MOST_TILE_BYTES:
            raise DatasetError(
                f"tiles of {self.tile} x {self.tile} pixels with {len(self.bands)} bands of"
                f" {self.dtype} are too large: sides of {MAX_TILE} pixels at most, and below 4 GiB"
            )

    @property
    def _pixel_bytes(self) -> int:
        return len(self.bands) * np.dtype(self.dtype).itemsize

    @property
    def most_record_bytes(self) -> int:
        """Bytes that a record's files may take together: twice what its pixels and labels are plain."""
        return 2 * self.tile**2 * (self._pixel_bytes + 2) + _METADATA

    @property
    def label_bits(self) -> dict[str, int]:
        """Bit of each label in the uint16 label image, `valid` included."""
        names = (*self.classes, *self.unscored)
        return {name: bit for bit, name in enumerate(names)} | {"valid": VALID_BIT}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content; the indexes' digests in it stand for every byte of every record."""
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, name: str, *, labelled: bool = False) -> Split:
        """One split by name.

        Args:
            name: as in dataset.json.
            labelled: refuse a split that has no labels.

        Raises:
            DatasetError: there is none of that name, it is empty, or it has no labels.
        """
        if name not in self.splits:
            raise DatasetError(f"no split {name!r}: the data set has {', '.join(self.splits)}")
        split = self.splits[name]
        if split.tiles == 0:
            raise DatasetError(f"the split {name!r} has no tiles")
        if labelled and not split.labelled:
            raise DatasetError(f"the split {name!r} has no labels")
        return split

    def write(self, folder: Path) -> None:
        """Write dataset.json into a folder, whole or not at all."""
        content = self._content() | {"fingerprint": self.fingerprint}
        write_atomically(folder / FILE_NAME, (json.dumps(content, indent=2) + "\n").encode())

    def _content(self) -> dict[str, Any]:
        # By hand: dataclasses.asdict copies deeply, seconds for some ten thousand shards.
        fields = dict(vars(self))
        fields["parts"] = [vars(part) for part in self.parts]
        fields["splits"] = {
            name: {**vars(split), "shards": [vars(shard) for shard in split.shards]}
            for name, split in self.splits.items()
        }
        fields["statistics"] = vars(self.statistics)
        if self.resolution is None:  # tiles without coordinates; and data sets of earlier versions
            del fields["resolution"]
        fields["classes"] = [{"id": i, "name": name} for i, name in enumerate(self.classes)]
        return {"format": FORMAT, "version": VERSION, **fields, "label_bits": self.label_bits}

    @classmethod
    def read(cls, folder: Path) -> Schema:
        """Read and check the dataset.json of a folder.

        Raises:
            DatasetError: it is missing, of another format or version, damaged, or edited.
        """
        path = folder / FILE_NAME
        try:
            content = parse(read_plain(path, _MOST_BYTES))
        except FileNotFoundError:
            hint = _hint(folder)
            raise DatasetError(f"no {FILE_NAME} in {folder}: {hint}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DatasetError(f"cannot read {path}: {reason}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DatasetError(f"{path} does not describe a prepared data set")
        if content.get("version") != VERSION:
            raise DatasetError(
                f"{path} has format version {content.get('version')!r}; this program reads {VERSION}"
            )
        try:
            schema = _parse(cls, content)
        except (KeyError, TypeError, ValueError, DatasetError) as error:
            raise DatasetError(f"{path} is damaged: {type(error).__name__} {error}") from None
        if schema.fingerprint != content.get("fingerprint"):
            raise DatasetError(
                f"{path} was changed after it was written: its fingerprint differs;"
                " copy it again, or prepare the data set anew"
            )
        try:
            _check(schema)
        except ValueError as error:
            raise DatasetError(f"{path} is damaged: {error}") from None
        return schema


def _hint(folder: Path) -> str:
    if folder.with_name(folder.name + ".partial").is_dir():
        return "`agrivision prepare` was interrupted; run it again and it goes on"
    if folder.is_dir():
        return "make a data set of it with `agrivision prepare`"
    return "there is no such folder"


def _parse(cls: type[Schema], content: dict[str, Any]) -> Schema:
    return cls(
        source=label(content["source"]),
        bands=tuple(map(label, texts(content["bands"]))),
        dtype=_dtype(content["dtype"]),
        tile=whole(content["tile"], 1, MAX_TILE),
        parts=tuple(map(_parse_part, items(content["parts"]))),
        classes=tuple(label(entry["name"]) for entry in items(content["classes"])),
        class_values=tuple(whole(value, -(2**63)) for value in items(content["class_values"])),
        unscored=tuple(map(label, texts(content["unscored"]))),
        nodata=None if content["nodata"] is None else number(content["nodata"]),
        resolution=number(content["resolution"]) if "resolution" in content else None,
        splits={name(key): _parse_split(split) for key, split in entries(content["splits"]).items()},
        statistics=_parse_statistics(content["statistics"]),
    )


def _dtype(value: Any) -> str:
    if value not in DTYPES:
        raise ValueError(
            f"pixels of the type {label(value)!r}: one of {', '.join(DTYPES)} belongs here"
        )
    return str(value)


def _parse_part(content: dict[str, Any]) -> Part:
    part = Part(extension=label(content["extension"]), bands=whole(content["bands"]))
    if not _EXTENSION.fullmatch(part.extension):
        raise ValueError(f"{part.extension!r} is no extension of a file")
    return part


def _parse_split(content: dict[str, Any]) -> Split:
    return Split(
        tiles=whole(content["tiles"]),
        labelled=flag(content["labelled"]),
        shards=tuple(map(_parse_shard, items(content["shards"]))),
        pixels=whole(content["pixels"]),
        class_pixels=tuple(map(whole, items(content["class_pixels"]))),
        class_tiles=tuple(map(whole, items(content["class_tiles"]))),
    )


def _parse_shard(content: dict[str, Any]) -> ShardInfo:
    if not _DIGEST.fullmatch(label(content["index"])):
        raise ValueError(f"the index of the shard {name(content['name'])} has no checksum")
    return ShardInfo(
        name=name(content["name"]),
        tiles=whole(content["tiles"], 1),
        bytes=whole(content["bytes"]),
        index=content["index"],
    )


def _parse_statistics(content: dict[str, Any]) -> BandStatistics:
    return BandStatistics(
        splits=tuple(map(name, texts(content["splits"]))),
        pixels=whole(content["pixels"]),
        **{
            key: tuple(map(number, items(content[key])))
            for key in ("mean", "std", "minimum", "maximum")
        },
    )


def _check(schema: Schema) -> None:
    """Raise ValueError where two things do not go together."""
    labels = (*schema.classes, *schema.unscored, "valid")
    if len(set(labels)) < len(labels) or len(set(schema.bands)) < len(schema.bands):
        raise ValueError("a band or a label stands twice")
    if schema.class_values and len(schema.class_values) != len(schema.classes):
        raise ValueError("not every class has a value")
    about = schema.statistics
    columns = (about.mean, about.std, about.minimum, about.maximum)
    if any(len(column) != len(schema.bands) for column in columns) or min(about.std, default=0) < 0:
        raise ValueError("not every band has its statistics")
    for key, split in schema.splits.items():
        _check_split(schema, key, split)


def _check_split(schema: Schema, key: str, split: Split) -> None:
    if len({shard.name for shard in split.shards}) < len(split.shards):
        raise ValueError(f"a shard of {key} stands twice")
    if sum(shard.tiles for shard in split.shards) != split.tiles:
        raise ValueError(f"the shards of {key} do not hold {split.tiles} tiles together")
    counts = (split.class_pixels, split.class_tiles)
    if any(len(count) != len(schema.classes) for count in counts):
        raise ValueError(f"not every class is counted in {key}")
    pixels, tiles = max(split.class_pixels), max(split.class_tiles)
    if pixels > split.pixels or tiles > split.tiles or split.pixels > split.tiles * schema.tile**2:
        raise ValueError(f"more is counted in {key} than there is")
