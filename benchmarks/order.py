"""S1: what it costs a rank to find its samples: 100 million of them, 1,024 ranks, any step.

A simulation: the shards do not exist, but dataset.json does, and is read as a run reads it. Besides,
how many shards a node of eight ranks touches in a while, and how often it opens one, with tiles from
everywhere and with windows.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agrivision.data.order import Order
from agrivision.data.schema import BandStatistics, Part, Schema, ShardInfo, Split
from benchmarks.common import Median, Report, fresh, parser

_PER_RANK = 16
_RANKS_OF_A_NODE = 8
_OPEN = 64  # shards that a rank keeps open at least


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the report."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--tiles", type=int, default=100_000_000, help="default 100 million")
    options.add_argument("--ranks", type=int, default=1024, help="default 1,024")
    options.add_argument("--shard", type=int, default=4096, help="tiles in a shard (default 4,096)")
    options.add_argument("--steps", type=int, default=2000, help="steps to simulate (default 2,000)")
    args = options.parse_args(argv)
    if args.quick:
        args.tiles, args.ranks, args.steps, args.rounds = 1_000_000, 64, 20, 2
    window = 16 * args.shard
    report = Report("S1: finding samples", args)
    report.header = (
        "tiles come from",
        "ms a step",
        "slowest",
        "first",
        "shards a node touches",
        "openings a node and step",
    )
    slowest = 0.0
    for name, size in (("everywhere", None), (f"windows of {window:,}", window)):
        steps, shards, openings = fresh(_walk, args, size)
        report.rows.append(
            (name, 1e3 * Median(steps[1:]), 1e3 * max(steps[1:]), 1e3 * steps[0], shards, openings)
        )
        slowest = max(slowest, 1e3 * max(steps))
    seconds, megabytes = fresh(_read, args)
    report.goal(
        "S1", f"finding the samples of any step, of {args.tiles:,}", slowest, at_most=10, unit="ms"
    )
    report.goal(
        "S1", "memory of a rank for that, dataset.json included", megabytes, at_most=50, unit="MB"
    )
    report.notes.append(
        f"rank 0 … 7 of {args.ranks:,} with {_PER_RANK} samples each, {args.tiles // args.shard:,}"
        f" shards; {args.rounds} random places of the line, {args.steps:,} steps from each; an"
        f" opening is one where {_OPEN} shards are kept open; dataset.json was read in {seconds:.2f} s"
    )
    report.finish()


def _walk(args: argparse.Namespace, window: int | None) -> tuple[list[float], int, float]:
    """Seconds of each step of rank 0; shards of a node at one place; openings of a node and step."""
    batch = _PER_RANK * args.ranks
    order = Order(size=args.tiles, batch_size=batch, seed=1, window=window)
    random = np.random.default_rng(0)
    seconds, touched, opened = [], [], 0
    for _ in range(args.rounds):
        first = int(random.integers(order.steps_per_epoch)) * batch + order.size * int(
            random.integers(30)
        )
        shards: set[int] = set()
        for rank in range(_RANKS_OF_A_NODE):
            cursor, places, open_ = first, order.share(rank, args.ranks), OrderedDict[int, None]()
            for _ in range(args.steps // 10 if rank else args.steps):
                begin = time.thread_time()  # what others do on this machine is not its cost
                whole = order.batch(cursor)
                tiles = order.tiles(whole, places)
                numbers = (tiles // args.shard).tolist()
                if rank == 0:
                    seconds.append(time.thread_time() - begin)
                    opened += sum(_open(open_, number) for number in numbers)
                shards.update(numbers)
                cursor = whole.next_cursor
        touched.append(len(shards))
    per_step = opened * _RANKS_OF_A_NODE / (args.rounds * args.steps)
    return seconds, int(np.median(touched)), per_step


def _open(kept: OrderedDict[int, None], shard: int) -> bool:
    """Whether a shard has to be opened; the one used least recently is closed."""
    new = shard not in kept
    kept[shard] = None
    kept.move_to_end(shard)
    if len(kept) > _OPEN:
        kept.popitem(last=False)
    return new


def _read(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds to read dataset.json, and the most megabytes that a rank needs to find its samples."""
    with tempfile.TemporaryDirectory() as folder:
        _schema(args).write(Path(folder))
        gc.collect()
        Schema.read(Path(folder))  # what is imported and cached for good
        tracemalloc.start()
        begin = time.perf_counter()
        schema = Schema.read(Path(folder))
        seconds = time.perf_counter() - begin
    order = Order(size=args.tiles, batch_size=_PER_RANK * args.ranks, seed=1, window=16 * args.shard)
    ends = np.cumsum([shard.tiles for shard in schema.split("train").shards], dtype=np.int64)
    gc.collect()
    tiles = order.tiles(order.batch(order.size // 3), order.share(5, args.ranks))
    np.searchsorted(ends, tiles, side="right")
    _, peak = tracemalloc.get_traced_memory()
    return seconds, peak / 2**20


def _schema(args: argparse.Namespace) -> Schema:
    count = -(-args.tiles // args.shard)
    shards = tuple(
        ShardInfo(name=f"{number:05d}", tiles=args.shard, bytes=10**9 + number, index=f"{number:032x}")
        for number in range(count)
    )
    split = Split(
        tiles=sum(shard.tiles for shard in shards),
        labelled=True,
        shards=shards,
        pixels=1,
        class_pixels=(1,) * 9,
        class_tiles=(1,) * 9,
    )
    bands = ("red", "green", "blue", "nir")
    numbers = (1.0,) * len(bands)
    return Schema(
        source="simulated",
        bands=bands,
        dtype="uint8",
        tile=512,
        parts=(Part(extension="rgb.jpg", bands=3), Part(extension="nir.jpg", bands=1)),
        classes=tuple(f"class{number}" for number in range(9)),
        class_values=(),
        unscored=(),
        splits={"train": split},
        statistics=BandStatistics(
            splits=("train",), pixels=1, mean=numbers, std=numbers, minimum=numbers, maximum=numbers
        ),
    )


if __name__ == "__main__":
    main()
