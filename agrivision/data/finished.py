"""Is the data set that stands there the one that would be made?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from agrivision.data.schema import Schema, ShardInfo
from agrivision.data.shard_job import Job
from agrivision.data.shards import Shard
from agrivision.data.sources.source import Flaw, Read, Source
from agrivision.errors import DatasetError


def is_made_of(folder: Path, source: Source, jobs: Sequence[Job]) -> bool:
    """Whether a finished data set was made from this source by this plan.

    Its description must be the source's, each shard must hold tiles of the plan's, and the first tile
    of each, made again, must have the checksum that stands in the index. Tiles that were left out
    may be missing.

    Args:
        folder: whatever stands there.
        source: looked through.
        jobs: the plan.
    """
    try:
        schema = Schema.read(folder)
    except DatasetError:
        return False
    if about(schema) != about(source):
        return False
    shards = {(split, info.name): info for split, each in schema.splits.items() for info in each.shards}
    if not shards.keys() <= {(job.split, job.name) for job in jobs}:
        return False
    with source.reader.reading() as read:
        return all(_fits(folder, job, shards, source, read) for job in jobs)


def about(described: Schema | Source) -> tuple[object, ...]:
    """What a data set and the source that it was made of have in common."""
    kind = described.source if isinstance(described, Schema) else described.kind
    names = ("bands", "dtype", "tile", "parts", "classes", "class_values", "unscored", "nodata")
    return (kind, *(getattr(described, name) for name in names))


def _fits(
    folder: Path, job: Job, shards: Mapping[tuple[str, str], ShardInfo], source: Source, read: Read
) -> bool:
    info = shards.get((job.split, job.name))
    if info is None:
        return True  # no tile of it was left, or so it seems
    references = {reference.key: reference for reference in job.references}
    try:
        shard = Shard(folder / job.split, info, files=len(source.parts) + 1)
        keys = [shard.key(row) for row in range(len(shard.index))]
        if [key for key in references if key in set(keys)] != keys:
            return False
        tile = read(references[keys[0]])
    except (DatasetError, Flaw):
        return False
    if tile is None:
        return False
    checksum = xxhash.xxh3_64()
    for content in tile.record(len(source.classes)).files.values():
        checksum.update(content)
    return checksum.intdigest() == int(shard.index["checksum"][0])
