"""What is in a data set, and is it whole? Everything damaged is named, not only the first."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data import recipe
from agrivision.data.labels import Labels, class_pixels, decompress_into, valid_mask
from agrivision.data.parts import decode_part
from agrivision.data.schema import FILE_NAME, Schema, ShardInfo, Split
from agrivision.data.shards import LABELS, Shard, member_header
from agrivision.data.sources.source import Report, Silence
from agrivision.errors import DatasetError, Interrupted
from agrivision.part import Stop, never

_KEEP = 100_000


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is damaged or missing in a data set.

    Attributes:
        path: the file.
        kind: `shard` (a file is missing, cut or another one), `tile`, `header` (what lies between the
            records; our own reader does not need it).
        what: the rest of the sentence.
        split: the split.
        shard: name of the shard.
        row: of the tile in the shard; None where it is not one tile alone.
        key: of the tile.
        tiles: how many cannot be used because of it.
    """

    path: str
    kind: str
    what: str
    split: str
    shard: str
    row: int | None = None
    key: str | None = None
    tiles: int = 0

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What looking at a data set told.

    Attributes:
        folder: the data set.
        schema: its dataset.json.
        bytes: of all files that belong to it.
        verified: whether every record was read and decoded.
        damaged_tiles: tiles that cannot be used, those of damaged shards included.
        damage: what is damaged or missing, the first hundred thousand.
        damage_count: how many there are of them.
        left_over: files that do not belong to the data set, relative to it.
    """

    folder: Path
    schema: Schema
    bytes: int
    verified: bool
    damaged_tiles: int
    damage: tuple[Finding, ...]
    damage_count: int
    left_over: tuple[str, ...]

    @property
    def damaged(self) -> bool:
        """Whether something is missing or damaged, as far as was looked."""
        return self.damage_count > 0

    @property
    def whole(self) -> bool:
        """The opposite of damaged."""
        return not self.damaged

    def lines(self) -> list[str]:
        """For people: the bands, a table of the splits, and everything that is wrong."""
        schema = self.schema
        lines = [
            f"{self.folder}: {schema.source}, {schema.tile} x {schema.tile} pixels, {schema.dtype},"
            f" {self.bytes / 1e6:,.1f} MB",
            f"fingerprint {schema.fingerprint}",
            *_aligned(_bands(schema)),
            *_aligned(table(self)),
            *map(str, self.damage),
        ]
        lines += [f"{name}: does not belong to the data set" for name in self.left_over]
        if self.damaged:
            lines.append(f"{self.damage_count:,} damages, {self.damaged_tiles:,} tiles cannot be used")
        elif self.verified:
            lines.append("every record is whole")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        schema = self.schema
        return {
            "path": str(self.folder),
            "source": schema.source,
            "fingerprint": schema.fingerprint,
            "bands": list(schema.bands),
            "dtype": schema.dtype,
            "tile": schema.tile,
            "classes": list(schema.classes),
            "class_values": list(schema.class_values),
            "unscored": list(schema.unscored),
            "bytes": self.bytes,
            "splits": {name: self._split(split) for name, split in schema.splits.items()},
            "statistics": dataclasses.asdict(schema.statistics),
            "verified": self.verified,
            "whole": self.whole,
            "damaged_tiles": self.damaged_tiles,
            "damage": [dataclasses.asdict(finding) for finding in self.damage],
            "damage_count": self.damage_count,
            "left_over": list(self.left_over),
        }

    def _split(self, split: Split) -> dict[str, Any]:
        return {
            "tiles": split.tiles,
            "shards": len(split.shards),
            "labelled": split.labelled,
            "pixels": split.pixels,
            "class_pixels": dict(zip(self.schema.classes, split.class_pixels, strict=True)),
            "class_tiles": dict(zip(self.schema.classes, split.class_tiles, strict=True)),
        }


def inspect_dataset(folder: Path, *, verify: bool = False, report: Report | None = None) -> Inspection:
    """Look at a data set.

    Without `verify`, dataset.json is read and every shard opened: sizes and indexes are compared.
    With it, every record's checksum is compared, every image and label file decoded, what is in them
    compared with what was counted, and all that lies between the records with what `prepare` writes:
    no byte of a shard is left out.

    Raises:
        DatasetError: dataset.json is missing or damaged, so that nothing can be said.
    """
    schema = Schema.read(folder)
    report = report or Silence()
    report.total(sum(split.tiles for split in schema.splits.values()))
    damage: list[Finding] = []
    count = tiles = 0
    for finding in find_damage(folder, schema, report, verify=verify):
        report.problem(finding.path, finding.what)
        count, tiles = count + 1, tiles + finding.tiles
        if len(damage) < _KEEP:
            damage.append(finding)
    files = _files(schema)
    return Inspection(
        folder=folder,
        schema=schema,
        bytes=sum((folder / name).stat().st_size for name in files if (folder / name).is_file()),
        verified=verify,
        damaged_tiles=tiles,
        damage=tuple(damage),
        damage_count=count,
        left_over=tuple(_left_over(folder, files)),
    )


def _files(schema: Schema) -> list[str]:
    shards = [f"{name}/{s.name}" for name, split in schema.splits.items() for s in split.shards]
    return [
        FILE_NAME,
        recipe.FILE_NAME,
        *(f"{shard}{end}" for shard in shards for end in (".tar", ".index.npy")),
    ]


def _left_over(folder: Path, files: Iterable[str]) -> list[str]:
    known = set(files)
    present = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in present if path.as_posix() not in known)


def find_damage(
    folder: Path,
    schema: Schema,
    report: Report | None = None,
    *,
    verify: bool = True,
    stop: Stop = never,
) -> Iterator[Finding]:
    """Everything that is damaged or missing in a data set.

    Args:
        folder: the data set.
        schema: its dataset.json.
        report: is told of the progress.
        verify: read every byte; else only sizes and indexes are compared.
        stop: whether to stop before the next shard.

    Raises:
        Interrupted: asked to stop.
    """
    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        for name, split in schema.splits.items():
            for info in split.shards:
                if stop():
                    raise Interrupted("stopped while the data set was being read; nothing was changed")
                yield from _Looker(folder, name, info, schema, pool).look(verify=verify)
                if report is not None:
                    report.advance(info.tiles)


@dataclass(frozen=True)
class _Looker:
    """Looks at one shard."""

    folder: Path
    split: str
    info: ShardInfo
    schema: Schema
    pool: ThreadPoolExecutor

    def look(self, *, verify: bool) -> Iterator[Finding]:
        folder, info = self.folder / self.split, self.info
        try:
            shard = Shard(folder, info, len(self.schema.parts) + 1, self.schema.most_record_bytes)
        except DatasetError as error:
            index, tar = folder / f"{info.name}.index.npy", folder / f"{info.name}.tar"
            path = index if str(index) in str(error) else tar
            yield self._finding(path, "shard", _without(path, error), tiles=info.tiles)
            return
        if not verify:
            return
        checks = self.pool.map(
            lambda row: _tile_damage(shard, row, self.schema, self.split), range(info.tiles)
        )
        for row, what in enumerate(checks):
            if what:
                key = shard.key(row)
                yield self._finding(shard.path, "tile", what, row=row, key=key, tiles=1)
        for what in _header_damage(shard, self.schema):
            yield self._finding(shard.path, "header", what)

    def _finding(self, path: Path, kind: str, what: str, **about: Any) -> Finding:
        return Finding(
            path=str(path), kind=kind, what=what, split=self.split, shard=self.info.name, **about
        )


def _tile_damage(shard: Shard, row: int, schema: Schema, split: str) -> str:
    """What is wrong with a tile; empty if nothing is."""
    try:
        *files, labels_file = shard.read(row)
    except DatasetError as error:
        return _without(shard.path, error)
    try:
        images = [
            decode_part(content, part, schema.dtype, schema.tile)
            for content, part in zip(files, schema.parts, strict=True)
        ]
        labels = np.empty((schema.tile, schema.tile), np.uint16)
        decompress_into(labels_file, labels)
    except DatasetError as error:
        return f"tile {shard.key(row)}: {error}"
    counted = class_pixels(labels, len(schema.classes))
    if not np.array_equal(counted, shard.index["pixels"][row]):
        return f"tile {shard.key(row)}: its labels are not those that were counted"
    known = sum(1 << bit for bit in schema.label_bits.values())
    if np.any(labels & np.uint16(0xFFFF ^ known)):
        return f"tile {shard.key(row)}: its labels have bits that no label has"
    wrong = _values_damage(np.concatenate(images, axis=-1), labels, schema, split)
    return f"tile {shard.key(row)}: {wrong}" if wrong else ""


def _values_damage(image: NDArray[Any], labels: Labels, schema: Schema, split: str) -> str:
    """What is wrong with the pixels that count, (height, width, bands); empty if nothing is."""
    pixels = image[valid_mask(labels)]
    if not pixels.size:
        return ""
    if not np.isfinite(pixels).all():
        return "pixels that count are not finite"
    about = schema.statistics
    if split not in about.splits:
        return ""
    beyond = (pixels.min(0) < np.array(about.minimum)) | (pixels.max(0) > np.array(about.maximum))
    names = [name for name, out in zip(schema.bands, beyond, strict=True) if out]
    return f"{', '.join(names)} beyond the range of the data set" if names else ""


def _header_damage(shard: Shard, schema: Schema) -> Iterator[str]:
    """What lies between the records and is not what `prepare` writes: tar headers, zeros."""
    extensions = [*(part.extension for part in schema.parts), LABELS]
    position = 0
    try:
        for row in range(len(shard.index)):
            entry, key = shard.index[row], shard.key(row)
            sizes = entry["sizes"].tolist()
            for extension, offset, size in zip(
                extensions, entry["offsets"].tolist(), sizes, strict=True
            ):
                header = member_header(f"{key}.{extension}", size)
                if shard.between(position, offset) != header.rjust(offset - position, b"\0"):
                    yield f"the tar header of {key}.{extension} is damaged"
                position = offset + size
        if any(shard.between(position, shard.size)):
            yield "the end of the tar file is damaged"
    except DatasetError as error:
        yield _without(shard.path, error)


def _without(path: Path, error: DatasetError) -> str:
    """What an error says, without the file that the problem names anyway."""
    return str(error).replace(f" in {path}", "").replace(f"{path} ", "")


def table(inspection: Inspection) -> list[Sequence[str]]:
    """Rows by split for people: name, tiles, shards, valid pixels, then the share of each class."""
    schema = inspection.schema
    rows: list[Sequence[str]] = [("split", "tiles", "shards", "valid pixels", *schema.classes)]
    for name, split in schema.splits.items():
        shares = [f"{pixels / max(split.pixels, 1):.2%}" for pixels in split.class_pixels]
        if not split.labelled:
            shares = ["-"] * len(shares)
        rows.append((name, f"{split.tiles:,}", f"{len(split.shards):,}", f"{split.pixels:,}", *shares))
    return rows


def _bands(schema: Schema) -> list[Sequence[str]]:
    statistics = schema.statistics
    columns = statistics.mean, statistics.std, statistics.minimum, statistics.maximum
    rows = zip(schema.bands, *columns, strict=True)
    numbers = [(name, *(f"{value:.6g}" for value in values)) for name, *values in rows]
    return [("band", "mean", "std", "minimum", "maximum"), *numbers]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, names on the left and numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
