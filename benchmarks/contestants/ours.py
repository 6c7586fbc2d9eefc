"""This package's own loader, and the ceiling over all of them: nothing but decoding."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import simplejpeg

from agrivision.data.labels import decompress_into
from agrivision.data.loader import TrainLoader
from agrivision.data.order import Order
from agrivision.data.shards import SplitReader
from agrivision.world import World
from benchmarks.common import cpu_seconds
from benchmarks.contestants.samples import BATCH, WORKERS, Tensors
from benchmarks.data import Data


def loader(data: Data) -> Iterator[Tensors]:
    """What training uses, with as many threads as the peers have processes."""
    return _batches(data.reader)


def raw(data: Data) -> Iterator[Tensors]:
    """The same over uncompressed shards."""
    return _batches(data.raw_reader)


def _batches(reader: SplitReader) -> Iterator[Tensors]:
    order = Order(size=len(reader), batch_size=BATCH, seed=0)
    with TrainLoader(reader, order, World(), threads=WORKERS) as batches:
        batches.seek(0)
        while True:
            batch = batches.next_batch()
            yield [*batch.pixels.planes, batch.pixels.labels]


def ceiling(data: Data, seconds: float) -> tuple[float, float]:
    """Nothing but decoding, from memory into memory that stays the same, on two threads.

    Returns:
        Tiles a second, and milliseconds of computing a tile.
    """
    reader = data.reader
    records = [[bytes(file) for file in reader.read(tile)] for tile in range(len(reader))]
    done = [0, 0]
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        rgb = np.empty((*data.shape, 3), np.uint8)
        nir = np.empty((*data.shape, 1), np.uint8)
        labels = np.empty(data.shape, np.uint16)
        while time.perf_counter() < end or sum(done) < len(records):
            for record in records[number::WORKERS]:
                simplejpeg.decode_jpeg(record[0], "RGB", buffer=rgb, strict=True)
                simplejpeg.decode_jpeg(record[1], "GRAY", buffer=nir, strict=True)
                decompress_into(record[2], labels)
                done[number] += 1
                if time.perf_counter() >= end and sum(done) >= len(records):
                    return

    computed, begin = cpu_seconds(), time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took, computed = time.perf_counter() - begin, cpu_seconds() - computed
    return sum(done) / took, 1000 * computed / sum(done)
