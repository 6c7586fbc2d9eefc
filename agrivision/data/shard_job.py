"""Making one shard, in whatever process: read its tiles, write it, note what is in it.

A note carries a digest of everything that the shard was made from. An interrupted `prepare` that goes
on keeps a shard whose note still fits and whose files are whole, and makes all others anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from agrivision import __version__
from agrivision.data.schema import ShardInfo
from agrivision.data.shards import Record, write_shard
from agrivision.data.sources.source import Flaw, Problem, Read, Reference, TileReader
from agrivision.data.statistics import Sums, add_up, channel_moments
from agrivision.data.workplace import Workplace
from agrivision.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class ShardMaker:
    """What all shards of a data set have in common; every worker process gets a copy.

    Attributes:
        reader: reads the source's tiles.
        workplace: where the data set grows.
        bands: names of the bands.
        classes: number of classes.
        strict: let the first damaged tile end the work.
    """

    reader: TileReader
    workplace: Workplace
    bands: tuple[str, ...]
    classes: int
    strict: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to make.

    Attributes:
        split: its split.
        name: its name.
        references: its tiles, in order.
    """

    split: str
    name: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A finished shard.

    Attributes:
        info: for dataset.json; None if no tile was left.
        sums: over its tiles.
        blank: tiles without a valid pixel, which were left out.
        problems: tiles that were left out for a reason.
    """

    info: ShardInfo | None
    sums: Sums
    blank: int
    problems: tuple[Problem, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        info = dataclasses.asdict(self.info) if self.info else None
        problems = [list(problem) for problem in self.problems]
        return {"info": info, "sums": self.sums.to_dict(), "blank": self.blank, "problems": problems}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Made:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            info=ShardInfo(**content["info"]) if content["info"] else None,
            sums=Sums.from_dict(content["sums"]),
            blank=int(content["blank"]),
            problems=tuple(Problem(*problem) for problem in content["problems"]),
        )


def make_shard(maker: ShardMaker, job: Job) -> Made:
    """Make a shard, or find that it is there already.

    Raises:
        SourceError: strict, and a tile is damaged.
        StorageError, NotWritable: the disk refused.
    """
    digest = _digest(maker, job)
    made = _made_before(maker, job, digest)
    if made is None or (maker.strict and made.problems):
        made = _make(maker, job)
        note = {"digest": digest, "files": _file_digests(maker, job, made), **made.to_dict()}
        maker.workplace.write_note(job.split, job.name, note)
    return made


def _make(maker: ShardMaker, job: Job) -> Made:
    sums: list[Sums] = []
    problems: list[Problem] = []
    blank = 0

    def records(read: Read) -> Iterator[Record]:
        nonlocal blank
        for reference in job.references:
            try:
                tile = read(reference)
            except Flaw as flaw:
                if maker.strict:
                    raise SourceError(str(flaw.problem)) from None
                problems.append(flaw.problem)
                continue
            if tile is None:
                blank += 1
                continue
            record = tile.record(maker.classes)
            of_tile = Sums.of(tile.image, tile.labels, record.pixels)
            sums.append(of_tile)
            moments = channel_moments(tile.image, tile.labels, of_tile, maker.bands)
            yield dataclasses.replace(record, valid=of_tile.pixels, moments=moments)

    with maker.reader.reading() as read:
        info = write_shard(maker.workplace.split(job.split), job.name, records(read))
    return Made(
        info=info,
        sums=add_up(sums, bands=len(maker.bands), classes=maker.classes),
        blank=blank,
        problems=tuple(problems),
    )


def _made_before(maker: ShardMaker, job: Job, digest: str) -> Made | None:
    note = maker.workplace.note(job.split, job.name)
    if not isinstance(note, dict) or note.get("digest") != digest:
        return None
    try:
        made = Made.from_dict(note)
        whole = note["files"] == _file_digests(maker, job, made)
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return made if whole else None


def _file_digests(maker: ShardMaker, job: Job, made: Made) -> list[str]:
    """Of the shard's files as they are on the disk."""
    if made.info is None:
        return []
    digests = []
    for path in maker.workplace.shard(job.split, job.name):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, xxhash.xxh3_128).hexdigest())
    return digests


def _digest(maker: ShardMaker, job: Job) -> str:
    """Of the program's version, the options, and the names, sizes and times of the source's files."""
    digest = hashlib.blake2b(repr((__version__, maker.reader, maker.bands, maker.classes)).encode())
    files: dict[Path, None] = {}
    for reference in job.references:
        digest.update(repr(tuple(reference)).encode())
        files |= dict.fromkeys(maker.reader.files(reference))
    for line in _stamps(list(files)):
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def plan_digest(reader: TileReader, jobs: Sequence[Job], how: object) -> str:
    """Of all that decides which shards there are and what is in them, but the source's pixels.

    Args:
        reader: of the source.
        jobs: every shard.
        how: options, as `repr` shows them.
    """
    digest = hashlib.blake2b(repr((__version__, reader, how)).encode())
    for job in jobs:
        digest.update(repr((job.split, job.name, *map(tuple, job.references))).encode())
    return digest.hexdigest()


def _stamps(files: Sequence[Path]) -> list[str]:
    stamps = []
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116 - a third of the time of Path.stat
            stamps.append(f"{path}|{status.st_size}|{status.st_mtime_ns}\n")
        except OSError:
            stamps.append(f"{path}|missing\n")
    return stamps
