"""What is in a data set, and is it whole? Everything damaged is named, not only the first."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agrivision.data.labels import class_pixels, decompress_into
from agrivision.data.parts import decode_part
from agrivision.data.schema import FILE_NAME, Schema, ShardInfo, Split
from agrivision.data.shards import LABELS, Shard
from agrivision.data.sources.source import Problem, Report, Silence
from agrivision.errors import DatasetError

_KEEP = 1000


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What looking at a data set told.

    Attributes:
        folder: the data set.
        schema: its dataset.json.
        bytes: of all files that belong to it.
        verified: whether every record was read and decoded.
        damaged_tiles: tiles that cannot be used, those of damaged shards included.
        damage: what is damaged or missing, the first thousand.
        damage_count: how many there are of them.
        left_over: files that do not belong to the data set, relative to it.
    """

    folder: Path
    schema: Schema
    bytes: int
    verified: bool
    damaged_tiles: int
    damage: tuple[Problem, ...]
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
            "damage": [problem._asdict() for problem in self.damage],
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
    With it, every record's checksum is compared, every image and label file decoded and the tar
    files' own headers read.

    Raises:
        DatasetError: dataset.json is missing or damaged, so that nothing can be said.
    """
    schema = Schema.read(folder)
    report = report or Silence()
    report.total(sum(split.tiles for split in schema.splits.values()))
    damage: list[Problem] = []
    count = tiles = 0
    for problem, lost in _damage(folder, schema, report, verify=verify):
        report.problem(problem.path, problem.what)
        count, tiles = count + 1, tiles + lost
        if len(damage) < _KEEP:
            damage.append(problem)
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
    return [FILE_NAME, *(f"{shard}{end}" for shard in shards for end in (".tar", ".index.npy"))]


def _left_over(folder: Path, files: Iterable[str]) -> list[str]:
    known = set(files)
    present = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in present if path.as_posix() not in known)


def _damage(
    folder: Path, schema: Schema, report: Report, *, verify: bool
) -> Iterator[tuple[Problem, int]]:
    """Everything damaged, and the tiles that are lost with it."""
    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        for name, split in schema.splits.items():
            if sum(info.tiles for info in split.shards) != split.tiles:
                what = f"the shards of {name} do not hold {split.tiles} tiles together"
                yield Problem(str(folder / FILE_NAME), "count", what), 0
            for info in split.shards:
                yield from _shard_damage(folder / name, info, schema, pool, verify=verify)
                report.advance(info.tiles)


def _shard_damage(
    folder: Path, info: ShardInfo, schema: Schema, pool: ThreadPoolExecutor, *, verify: bool
) -> Iterator[tuple[Problem, int]]:
    try:
        shard = Shard(folder, info, len(schema.parts) + 1)
    except DatasetError as error:
        index, tar = folder / f"{info.name}.index.npy", folder / f"{info.name}.tar"
        path = index if str(index) in str(error) else tar
        yield Problem(str(path), "shard", _without(path, error)), info.tiles
        return
    if not verify:
        return
    checks = pool.map(lambda row: _tile_damage(shard, row, schema), range(info.tiles))
    for what in checks:
        if what:
            yield Problem(str(shard.path), "tile", what), 1
    for what in _header_damage(shard, schema):
        yield Problem(str(shard.path), "header", what), 0


def _tile_damage(shard: Shard, row: int, schema: Schema) -> str:
    """What is wrong with a tile; empty if nothing is."""
    try:
        *images, labels_file = shard.read(row)
    except DatasetError as error:
        return _without(shard.path, error)
    try:
        for content, part in zip(images, schema.parts, strict=True):
            decode_part(content, part, schema.dtype, schema.tile)
        labels = np.empty((schema.tile, schema.tile), np.uint16)
        decompress_into(labels_file, labels)
    except DatasetError as error:
        return f"tile {shard.key(row)}: {error}"
    counted = class_pixels(labels, len(schema.classes))
    if not np.array_equal(counted, shard.index["pixels"][row]):
        return f"tile {shard.key(row)}: its labels are not those that were counted"
    return ""


def _header_damage(shard: Shard, schema: Schema) -> Iterator[str]:
    """Headers that other programs would stumble over: our own reader does not need them."""
    extensions = [*(part.extension for part in schema.parts), LABELS]
    rows = range(len(shard.index))
    wanted = [f"{shard.key(row)}.{extension}" for row in rows for extension in extensions]
    try:
        with tarfile.open(shard.path, "r:") as tar:
            names = tar.getnames()
    except (tarfile.TarError, OSError) as error:
        yield f"is no longer a whole tar file ({error})"
        return
    if names != wanted:
        yield f"holds {len(names)} readable members where {len(wanted)} belong"


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
