"""L7: how long a run waits for its first batch after a resume, anywhere in 95,000 tiles.

The data set has as many shards as one of 95,000 tiles: hard links to those of the small one. Each
measurement is a process of its own, which has imported everything and then reads dataset.json, opens
the split, seeks and takes a batch. After that, the stream of batches is compared, pixels and labels,
between numbers of threads and of ranks.

    python -m benchmarks.resume
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from agrivision.data.loader import TrainLoader
from agrivision.data.order import Order
from agrivision.data.schema import Schema, ShardInfo
from agrivision.data.shards import SplitReader
from agrivision.world import World
from benchmarks.common import Report, confine, fresh, interleaved, parser
from benchmarks.contestants.samples import BATCH, WORKERS
from benchmarks.data import SPLIT, Data, add_options, make

THREADS = (0, 1, 2, 3, 8)
RANKS = (1, 2, 4)
POSITIONS = (0, 50, 95)  # per cent of an epoch


def enlarge(data: Data, out: Path, tiles: int) -> None:
    """A data set of at least so many tiles, by hard links to the shards of another."""
    folder = out / SPLIT
    folder.mkdir()
    split = data.schema.split(SPLIT)
    shards: list[ShardInfo] = []
    while sum(shard.tiles for shard in shards) < tiles:
        shard = split.shards[len(shards) % len(split.shards)]
        name = f"{len(shards):05d}"
        for suffix in (".tar", ".index.npy"):
            _link(data.dataset / SPLIT / f"{shard.name}{suffix}", folder / f"{name}{suffix}")
        shards.append(dataclasses.replace(shard, name=name))
    large = dataclasses.replace(split, shards=tuple(shards), tiles=sum(shard.tiles for shard in shards))
    dataclasses.replace(data.schema, splits={SPLIT: large}).write(out)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the data set lies on another disk
        target.symlink_to(source)


def first_batch(folder: Path, percent: int) -> float:
    """Seconds from opening the data set to the first batch at a place of the second epoch."""
    confine(WORKERS)
    begin = time.perf_counter()
    reader = SplitReader(folder, Schema.read(folder), SPLIT)
    order = Order(size=len(reader), batch_size=BATCH, seed=0)
    with TrainLoader(reader, order, World(), threads=WORKERS) as loader:
        loader.seek(len(reader) + len(reader) * percent // 100)
        loader.next_batch()
        return time.perf_counter() - begin


def stream(folder: Path, threads: int, ranks: int, batches: int) -> str:
    """Digest of the pixels, labels and numbers of some batches, the ranks' parts put together."""
    reader = SplitReader(folder, Schema.read(folder), SPLIT)
    order = Order(size=len(reader), batch_size=BATCH, seed=0)
    parts: list[list[bytes]] = [[] for _ in range(batches)]
    for rank in range(ranks):
        world = World(rank=rank, size=ranks, local_rank=rank, local_size=ranks)
        with TrainLoader(reader, order, world, threads=threads) as loader:
            loader.seek(len(reader) - BATCH)  # over the end of an epoch
            for digests in parts:
                batch = loader.next_batch()
                digests += [
                    _digest(tile, [plane[slot] for plane in _tensors(batch.pixels)])
                    for slot, tile in enumerate(batch.tiles)
                ]
    return xxhash.xxh3_128_hexdigest(b"".join(b"".join(digests) for digests in parts))


def _tensors(pixels: object) -> list[torch.Tensor]:
    planes: Sequence[torch.Tensor] = pixels.planes  # type: ignore[attr-defined]
    labels: torch.Tensor = pixels.labels  # type: ignore[attr-defined]
    return [*planes, labels]


def _digest(tile: int, tensors: Sequence[torch.Tensor]) -> bytes:
    hasher = xxhash.xxh3_128(tile.to_bytes(8, "little"))
    for tensor in tensors:
        hasher.update(np.ascontiguousarray(tensor.numpy()).data)
    return hasher.digest()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    options = add_options(parser(__doc__, rounds=7))
    options.add_argument("--tiles", type=int, default=95_000, help="of the large set (default 95,000)")
    chosen = options.parse_args(argv)
    report = Report("Resuming", chosen, ("simplejpeg",))
    data = make(chosen, ())
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=data.root))
    try:
        enlarge(data, folder, 2000 if chosen.quick else chosen.tiles)
        tiles = Schema.read(folder).split(SPLIT).tiles
        turns = {
            f"{percent} %": functools.partial(fresh, first_batch, folder, percent)
            for percent in POSITIONS
        }
        seconds = interleaved(1 if chosen.quick else chosen.rounds, turns)
        batches = 2 if chosen.quick else 8
        threads = {stream(folder, number, 1, batches) for number in THREADS}
        ranks = {stream(folder, WORKERS, number, batches) for number in RANKS}
    finally:
        shutil.rmtree(folder)
    report.header = ["position in the epoch", "seconds to the first batch", "spread"]
    for position, took in seconds.items():
        report.rows.append([position, took, f"{100 * took.spread:.0f} %"])
    start, late = seconds["0 %"], seconds["95 %"]
    report.goal("L7", f"first batch after a resume, {tiles:,} tiles", late, at_most=0.3, unit="s")
    report.goal("L7", "at 95 % of the epoch, of at 0 %", late / start, at_most=1.2)
    streams = len(threads | ranks)
    report.goal(
        "L7",
        f"streams with {', '.join(map(str, THREADS))} threads and {', '.join(map(str, RANKS))} ranks",
        streams,
        at_most=1,
        unit="different",
    )
    report.finish()


if __name__ == "__main__":
    main()
