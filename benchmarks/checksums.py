"""L5: what the checksum of every read costs, and what it finds.

The cost is measured twice: as a share of the time that one core needs for a tile, call by call, and as
the speed of the whole loader with the checksum taken out, in turns. It is taken out here and only here,
by putting a checksum that equals everything in the place of xxhash: there is no switch for it.

Damage is one byte of a record, or of an index, changed at random. What the decoders notice by
themselves stands beside it.

    python -m benchmarks.checksums [--flips 2000]
"""

from __future__ import annotations

import functools
import io
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import simplejpeg
import xxhash
import zstandard
from PIL import Image

from agrivision.data import shards
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import DatasetError
from benchmarks.common import Report, confine, fresh, interleaved, missing, parser, say
from benchmarks.contestants.ours import loader
from benchmarks.contestants.samples import WORKERS
from benchmarks.data import SPLIT, Data, add_options, make


class _Any:
    """A checksum that equals every other."""

    def update(self, content: object) -> None:
        """Nothing."""

    def intdigest(self) -> Any:
        """Itself."""
        return self

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 0


def _without_checksums() -> None:
    """From here on, this process compares no record's checksum."""
    nothing = SimpleNamespace(
        xxh3_64=lambda *_: _Any(),
        xxh3_64_intdigest=lambda *_: _Any(),
        xxh3_128_hexdigest=xxhash.xxh3_128_hexdigest,  # of an index, once a shard
    )
    vars(shards)["xxhash"] = nothing


def loader_rate(data: Data, seconds: float, *, checksums: bool) -> float:
    """Tiles a second of the loader, with checksums or without."""
    confine(WORKERS)
    if not checksums:
        _without_checksums()
    batches = loader(data)
    for _ in range(8):
        next(batches)
    tiles, done, begin = len(data.reader), 0, time.perf_counter()
    while done < tiles or time.perf_counter() - begin < seconds:
        done += len(next(batches)[0])
    return done / (time.perf_counter() - begin)


def costs(data: Data, tiles: int) -> dict[str, float]:
    """Milliseconds a tile of each thing that is done to it, on one core; medians."""
    confine(1)
    reader = data.reader
    rgb, nir = np.empty((*data.shape, 3), np.uint8), np.empty((*data.shape, 1), np.uint8)
    spent: dict[str, list[float]] = {name: [] for name in ("read", "checksum", "decode")}
    for tile in range(min(tiles, len(reader))):
        files = _timed(spent["read"], functools.partial(reader.read, tile))  # its checksum included
        _timed(spent["checksum"], functools.partial(_checksum, files))

        def decode(files: Sequence[memoryview] = files) -> None:
            simplejpeg.decode_jpeg(files[0], "RGB", buffer=rgb, strict=True)
            simplejpeg.decode_jpeg(files[1], "GRAY", buffer=nir, strict=True)
            zstandard.ZstdDecompressor().decompress(files[2])

        _timed(spent["decode"], decode)
    return {name: 1000 * statistics.median(values) for name, values in spent.items()}


def _timed(into: list[float], function: Callable[[], Any]) -> Any:
    begin = time.perf_counter()
    result = function()
    into.append(time.perf_counter() - begin)
    return result


def _checksum(files: Sequence[memoryview]) -> int:
    checksum = xxhash.xxh3_64()
    for file in files:
        checksum.update(file)
    return checksum.intdigest()


def damage(data: Data, flips: int, folder: Path) -> dict[str, float]:
    """Change single bytes of a copy of the data set's first shard, one at a time.

    Returns:
        Share of the changes that were noticed, by who noticed it. For the decoders a change counts as
        noticed if one of the tile's files is refused, whether by an error or by no image.
    """
    schema = Schema.read(data.dataset)
    copy = folder / SPLIT
    copy.mkdir()
    name = schema.split(SPLIT).shards[0].name
    for suffix in (".tar", ".index.npy"):
        shutil.copy(data.dataset / SPLIT / f"{name}{suffix}", copy)
    reader = SplitReader(folder, schema, SPLIT)
    shard, _ = reader.locate(0)
    index = np.array(shard.index)
    chance = random.Random(0)  # noqa: S311 - the same damage in every run
    names = ["checksum", "simplejpeg, strict, and zstd", "Pillow and zstd"]
    judges: list[Callable[[Sequence[bytes]], bool]] = [_strict, _pillow]
    if not missing("cv2"):
        names.append("OpenCV and zstd")
        judges.append(_opencv)
    noticed = [0] * len(names)
    with (copy / f"{name}.tar").open("r+b", buffering=0) as file:
        for _ in range(flips):
            row = chance.randrange(len(index))
            offsets, sizes = index[row]["offsets"].tolist(), index[row]["sizes"].tolist()
            part = chance.choices(range(len(sizes)), weights=sizes)[0]
            place = offsets[part] + chance.randrange(sizes[part])
            before = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([before[0] ^ chance.randrange(1, 256)]), place)
            contents = [
                os.pread(file.fileno(), size, offset)
                for offset, size in zip(offsets, sizes, strict=True)
            ]
            noticed[0] += _refused(functools.partial(reader.read, row))
            for number, judge in enumerate(judges, start=1):
                noticed[number] += judge(contents)
            os.pwrite(file.fileno(), before, place)
    shares = {name: 100 * count / flips for name, count in zip(names, noticed, strict=True)}
    return shares | {"checksum of an index": _index_damage(folder, schema, name, flips // 4, chance)}


def _index_damage(folder: Path, schema: Schema, name: str, flips: int, chance: random.Random) -> float:
    path = folder / SPLIT / f"{name}.index.npy"
    content = path.read_bytes()
    noticed = 0
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= chance.randrange(1, 256)
        path.write_bytes(damaged)
        noticed += _refused(lambda: SplitReader(folder, schema, SPLIT).read(0))
    path.write_bytes(content)
    return 100 * noticed / flips


def _refused(read: Callable[[], Any]) -> bool:
    try:
        read()
    except DatasetError:
        return True
    return False


def _labels_refused(content: bytes) -> bool:
    try:
        zstandard.ZstdDecompressor().decompress(content)
    except zstandard.ZstdError:
        return True
    return False


def _strict(contents: Sequence[bytes]) -> bool:
    try:
        simplejpeg.decode_jpeg(contents[0], "RGB", strict=True)
        simplejpeg.decode_jpeg(contents[1], "GRAY", strict=True)
    except ValueError:
        return True
    return _labels_refused(contents[2])


def _pillow(contents: Sequence[bytes]) -> bool:
    try:
        for content in contents[:2]:
            Image.open(io.BytesIO(content)).load()
    except (OSError, SyntaxError, ValueError):
        return True
    return _labels_refused(contents[2])


def _opencv(contents: Sequence[bytes]) -> bool:
    import cv2

    for content in contents[:2]:
        try:
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error:
            return True
        if image is None:
            return True
    return _labels_refused(contents[2])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    options = add_options(parser(__doc__, rounds=5))
    options.add_argument("--flips", type=int, default=2000, help="single-byte damages (default 2000)")
    chosen = options.parse_args(argv)
    flips, seconds, rounds = (40, 0.2, 1) if chosen.quick else (chosen.flips, 3.0, chosen.rounds)
    report = Report("Checksums", chosen, ("xxhash", "simplejpeg", "opencv-python-headless", "pillow"))
    data = make(chosen, ())
    spent = fresh(costs, data, 20 if chosen.quick else 512)
    share = 100 * spent["checksum"] / (spent["read"] + spent["decode"])
    rates = interleaved(
        rounds,
        {
            name: functools.partial(fresh, loader_rate, data, seconds, checksums=checksums)
            for name, checksums in (("with checksums", True), ("without", False))
        },
    )
    say(f"changing {flips:,} bytes, one at a time")
    with tempfile.TemporaryDirectory() as folder:
        found = fresh(damage, data, flips, Path(folder))
    report.header = ["what", "measured"]
    report.rows = [
        *([f"{name}, one tile, one core", f"{value:.4f} ms"] for name, value in spent.items()),
        *([f"loader {name}", f"{rate:,.0f} tiles/s"] for name, rate in rates.items()),
        *([f"single-byte damage noticed by {name}", f"{value:.1f} %"] for name, value in found.items()),
    ]
    report.goal("L5", "checksum, of reading and decoding a tile", share, at_most=1.0, unit="%")
    least = min(found["checksum"], found["checksum of an index"])
    report.goal("L5", "of single-byte damage found", least, at_least=100.0, unit="%")
    slower = 100 * (rates["without"] / rates["with checksums"] - 1)
    report.notes.append(
        f"Without them the whole loader is {slower:+.1f} % faster, in {rounds} rounds that differ by"
        f" {100 * rates['with checksums'].spread:.0f} % among themselves."
    )
    report.finish()


if __name__ == "__main__":
    main()
