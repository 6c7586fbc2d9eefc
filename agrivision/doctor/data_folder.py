"""The folder of data: is it read fast enough, as a prepared data set or as what is to become one.

What is enough follows from what a run does; docs/performance.md has the figures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agrivision.data.schema import FILE_NAME, Schema
from agrivision.data.shards import Scratch, SplitReader
from agrivision.data.staging import automatic_place
from agrivision.doctor.disks import kind
from agrivision.doctor.finding import Finding, Topic
from agrivision.doctor.speed import forget, read_beginning, reading_rate, sequential_rate
from agrivision.errors import AgrivisionError, DatasetError

_MB, _GB = 1e6, 1e9
# One GPU trains 340 images of 512 x 512 a second (a UNet of 64 base channels, 40 % of 989 TFLOP/s).
_IMAGES, _SIDE = 340.0, 512
_WAITING = 10  # a GPU that waits for nine tenths of its images is not worth having
_FILES_OF_TILE = 13  # of Agriculture-Vision: two images, nine masks or ten, a boundary
_PER_FILE = 1000.0
_SMALL = 1 << 20  # bytes; where files have more, how many a second says little
_MOST_FILES, _MOST_TILES, _MOST_SHARDS = 2000, 4000, 64


def examine_data(folder: Path, *, gpus: int, shared: bool) -> Iterator[Finding]:
    """Whether a data set, or a folder of small files, is read fast enough.

    Args:
        folder: a prepared data set, or what is to become one.
        gpus: that it should feed; at least one is taken.
        shared: whether there are other nodes that should see it.
    """
    topic = Topic(f"Data folder {folder}")
    if not folder.is_dir():
        yield topic.bad("there is no such folder", "give a prepared data set, or a folder with images")
        return
    yield from kind(topic, folder, shared=shared)
    try:
        if (folder / FILE_NAME).is_file():
            yield from _shards(topic, folder, max(1, gpus))
        else:
            yield from _files(topic, folder)
    except DatasetError as error:
        yield topic.bad(str(error), f"agrivision inspect {folder} --verify says what is whole")
    except OSError as error:
        yield topic.bad(
            f"cannot be read: {error}", "look at its permissions, and whether its disk is there"
        )
    yield _staging(topic, folder)


def _shards(topic: Topic, folder: Path, gpus: int) -> Iterator[Finding]:
    schema = Schema.read(folder)
    name = "train" if "train" in schema.splits else next(iter(schema.splits))
    split = schema.split(name)
    paths = [folder / name / f"{shard.name}.tar" for shard in split.shards]
    rate = sequential_rate(paths)
    yield topic.good(f"split {name} is read at {rate.per_second / _MB:.0f} MB/s, shard after shard")
    reader = SplitReader(folder, schema, name)
    generator = np.random.default_rng()
    # Neighbours share a shard, so that a large split does not have to be forgotten as a whole.
    some = generator.permutation(len(paths))[:_MOST_SHARDS]
    ends = np.cumsum([shard.tiles for shard in split.shards])
    tiles = np.concatenate(
        [np.arange(ends[at] - split.shards[at].tiles, ends[at]) for at in map(int, some)]
    )
    for at in map(int, some):
        forget(paths[at])
    wanted = generator.permutation(tiles)[:_MOST_TILES].tolist()
    found, read = reading_rate(wanted, lambda tile, _: sum(map(len, reader.read(tile, (), Scratch()))))
    tiles_per_second = read / max(found.seconds, 1e-9)
    needed = gpus * _IMAGES * (_SIDE / schema.tile) ** 2
    yield topic.graded(
        tiles_per_second,
        needed,
        needed / _WAITING,
        f"{tiles_per_second:.0f} tiles a second at random places, {found.per_second / _MB:.0f} MB/s;"
        f" {gpus} fast {'GPU takes' if gpus == 1 else 'GPUs take'} up to {needed:.0f}",
        "copy it to the node's disk (data.stage), or use data.shuffle_window; processors need far less",
    )


def _files(topic: Topic, folder: Path) -> Iterator[Finding]:
    paths = list(_some_files(folder))
    if not paths:
        yield topic.careful("no data set and no files", "prepare a data set, or name another folder")
        return
    for path in paths:
        forget(path)
    order = np.random.default_rng().permutation(len(paths)).tolist()
    found, read = reading_rate(order, lambda at, end: read_beginning(paths[at], end))
    speed = f"{found.per_second / _MB:.0f} MB/s"
    if found.amount > _SMALL * read:
        yield topic.good(f"large files, whose beginnings are read at {speed}")
        return
    rate = read / max(found.seconds, 1e-9)
    yield topic.graded(
        rate,
        _PER_FILE,
        0,
        f"{rate:.0f} files a second, {speed}: prepare would read"
        f" {rate / _FILES_OF_TILE:.0f} tiles of {_FILES_OF_TILE} files each a second",
        "small files are slow here: copy them to a disk of the node in one archive, and prepare there",
    )


def _some_files(folder: Path) -> Iterator[Path]:
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file():
                yield path
                found += 1
                if found == _MOST_FILES:
                    return


def _staging(topic: Topic, folder: Path) -> Finding:
    try:
        place = Path(automatic_place(folder))
        free = shutil.disk_usage(place).free
    except AgrivisionError as refusal:
        return topic.good(f"data.stage: auto would not copy it here: {refusal}")
    except OSError as error:
        return topic.careful(
            f"data.stage: auto would copy it to a folder that cannot be used: {error}",
            "unset SLURM_TMPDIR or TMPDIR, or name a path",
        )
    return topic.good(f"data.stage: auto would copy it to {place}, where {free / _GB:.1f} GB are free")
