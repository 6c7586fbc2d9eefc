"""Shards and order → batches. The whole state is a cursor.

Decoding runs in threads: decoders release the GIL, threads share the batch's memory, and a signal to
the job's step cannot kill them, as it kills worker processes. Nothing is left in /dev/shm or /tmp,
because nothing is ever put there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from agrivision.data.decode import Pixels, decode_record
from agrivision.data.order import GlobalBatch, Order
from agrivision.data.shards import SplitReader
from agrivision.errors import ConfigurationError, DatasetError
from agrivision.world import World


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a batch, in host memory.

    Attributes:
        pixels: decoded tiles.
        tiles: their numbers in the split, in the order of the pixels.
        count: how many of them count, the first ones.
        whole: the batch of all ranks that this is a part of; None in an evaluation.
    """

    pixels: Pixels
    tiles: Sequence[int]
    count: int
    whole: GlobalBatch | None = None


class _Decoder:
    """Decodes tiles into fresh memory, in threads or, with none, at once."""

    def __init__(self, reader: SplitReader, threads: int, *, pinned: bool) -> None:
        self._reader, self._pinned = reader, pinned
        self._pool = ThreadPoolExecutor(threads, "decode") if threads else None

    def start(self, tiles: Sequence[int]) -> tuple[Pixels, list[Future[None]]]:
        pixels = Pixels.allocate(self._reader.schema, len(tiles), pinned=self._pinned)
        if self._pool is None:
            for slot, tile in enumerate(tiles):
                self._decode(tile, pixels, slot)
            return pixels, []
        return pixels, [
            self._pool.submit(self._decode, tile, pixels, slot) for slot, tile in enumerate(tiles)
        ]

    def _decode(self, tile: int, pixels: Pixels, slot: int) -> None:
        files = self._reader.read(tile)
        try:
            decode_record(files, self._reader.schema, pixels, slot)
        except DatasetError as error:
            shard, row = self._reader.locate(tile)
            raise DatasetError(f"tile {shard.key(row)} in {shard.path}: {error}") from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class TrainLoader:
    """Batches of the training split for one rank, without end.

    Args:
        reader: of the training split.
        order: the line of samples.
        world: this rank decodes its share of every batch.
        threads: decoding threads; 0 decodes in the caller's.
        prefetch: batches decoded ahead.
        pinned: batches in page-locked memory, for a GPU.

    Raises:
        ConfigurationError: more ranks than samples in a batch.
    """

    def __init__(
        self,
        reader: SplitReader,
        order: Order,
        world: World,
        *,
        threads: int,
        prefetch: int = 2,
        pinned: bool = False,
    ) -> None:
        if order.batch_size < world.size:
            raise ConfigurationError(
                f"data.batch_size is {order.batch_size}, but there are {world.size} ranks:"
                " each needs at least one sample"
            )
        self.order, self.world = order, world
        self.waited = 0.0  # seconds spent in next_batch() waiting for pixels
        self._cursor = 0  # of the next batch to hand out
        self._ahead = 0  # of the next batch to start
        self._prefetch = prefetch if threads else 0
        self._decoder = _Decoder(reader, threads, pinned=pinned)
        self._pending: deque[tuple[Batch, list[Future[None]]]] = deque()

    def seek(self, cursor: int) -> None:
        """Go to a position on the line of samples; costs the same for each."""
        self._discard()
        self._cursor = self._ahead = cursor

    def next_batch(self) -> Batch:
        """The next batch of this rank.

        Raises:
            DatasetError: a record cannot be read; the line names shard and tile. The same call can
                be made again and meets the same batch.
        """
        begin = time.perf_counter()
        try:
            while len(self._pending) <= self._prefetch:
                self._start_one()
            batch, futures = self._pending[0]
            for future in futures:
                future.result()
        except DatasetError:
            self._discard()
            self._ahead = self._cursor
            raise
        finally:
            self.waited += time.perf_counter() - begin
        self._pending.popleft()
        assert batch.whole is not None
        self._cursor = batch.whole.next_cursor
        return batch

    def _start_one(self) -> None:
        whole = self.order.batch(self._ahead)
        mine = self.order.share(self.world.rank, self.world.size)
        tiles = self.order.tiles(whole, mine).tolist()
        count = min(max(whole.count - mine.start, 0), len(tiles))
        pixels, futures = self._decoder.start(tiles)
        self._pending.append((Batch(pixels=pixels, tiles=tiles, count=count, whole=whole), futures))
        self._ahead = whole.next_cursor

    def _discard(self) -> None:
        for _, futures in self._pending:
            for future in futures:
                future.cancel()
        self._pending.clear()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()
        self._decoder.close()


def evaluation_batches(
    reader: SplitReader,
    world: World,
    *,
    batch_size: int,
    threads: int,
    pinned: bool = False,
) -> Generator[Batch, None, None]:
    """Every tile of a split exactly once over all ranks.

    The split is cut into the same batches on any number of ranks, which take turns: a tile always
    meets the same neighbours and the kernels the same shapes, so predictions do not depend on the
    world. Ranks may get different numbers of batches.

    Raises:
        DatasetError: a record cannot be read.
    """
    decoder = _Decoder(reader, threads, pinned=pinned)
    pending: deque[tuple[Batch, list[Future[None]]]] = deque()
    starts = range(world.rank * batch_size, len(reader), world.size * batch_size)
    try:
        for start in starts:
            tiles = range(start, min(start + batch_size, len(reader)))
            pixels, futures = decoder.start(tiles)
            pending.append((Batch(pixels=pixels, tiles=tiles, count=len(tiles)), futures))
            if len(pending) > 1:
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())
    finally:
        decoder.close()


def _finish(batch: Batch, futures: list[Future[None]]) -> Batch:
    for future in futures:
        future.result()
    return batch
