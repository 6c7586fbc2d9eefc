"""dataset.json: what a prepared data set holds, and the fingerprint that tells two of them apart."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.data.labels import MAX_CLASSES, VALID_BIT
from agrivision.errors import DatasetError
from agrivision.storage import write_atomically

FILE_NAME = "dataset.json"
FORMAT = "agrivision-dataset"
VERSION = 1


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

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES - len(self.unscored):
            raise DatasetError(
                f"{len(self.classes)} classes and {len(self.unscored)} unscored labels:"
                f" at least one class, and at most {MAX_CLASSES} labels altogether"
            )
        if sum(part.bands for part in self.parts) != len(self.bands):
            raise DatasetError(f"the image files do not make up the bands {', '.join(self.bands)}")

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
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            hint = _hint(folder)
            raise DatasetError(f"no {FILE_NAME} in {folder}: {hint}") from None
        except (OSError, ValueError) as error:
            raise DatasetError(f"cannot read {path}: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DatasetError(f"{path} does not describe a prepared data set")
        if content.get("version") != VERSION:
            raise DatasetError(
                f"{path} has format version {content.get('version')!r}; this program reads {VERSION}"
            )
        try:
            schema = _parse(cls, content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DatasetError(f"{path} is damaged: {type(error).__name__} {error}") from None
        if schema.fingerprint != content.get("fingerprint"):
            raise DatasetError(f"{path} was changed after it was written: its fingerprint differs")
        return schema


def _hint(folder: Path) -> str:
    if folder.with_name(folder.name + ".partial").is_dir():
        return "`agrivision prepare` was interrupted; run it again and it goes on"
    if folder.is_dir():
        return "make a data set of it with `agrivision prepare`"
    return "there is no such folder"


def _parse(cls: type[Schema], content: dict[str, Any]) -> Schema:
    return cls(
        source=str(content["source"]),
        bands=tuple(map(str, content["bands"])),
        dtype=str(content["dtype"]),
        tile=int(content["tile"]),
        parts=tuple(Part(**part) for part in content["parts"]),
        classes=tuple(str(entry["name"]) for entry in content["classes"]),
        class_values=tuple(map(int, content["class_values"])),
        unscored=tuple(map(str, content["unscored"])),
        nodata=None if content["nodata"] is None else float(content["nodata"]),
        splits={name: _parse_split(split) for name, split in content["splits"].items()},
        statistics=BandStatistics(
            splits=tuple(content["statistics"]["splits"]),
            pixels=int(content["statistics"]["pixels"]),
            **{
                name: tuple(map(float, content["statistics"][name]))
                for name in ("mean", "std", "minimum", "maximum")
            },
        ),
    )


def _parse_split(content: dict[str, Any]) -> Split:
    return Split(
        tiles=int(content["tiles"]),
        labelled=bool(content["labelled"]),
        shards=tuple(ShardInfo(**shard) for shard in content["shards"]),
        pixels=int(content["pixels"]),
        class_pixels=tuple(map(int, content["class_pixels"])),
        class_tiles=tuple(map(int, content["class_tiles"])),
    )
