"""Shards and order → batches. The whole state is a cursor.

Decoding runs in threads: decoders release the GIL, threads share the batch's memory, and a signal to
the job's step cannot kill them, as it kills worker processes. Nothing is left in /dev/shm or /tmp,
because nothing is ever put there.

A batch's memory is used again for a later one, but only once nobody holds the batch or a tensor that
was made of it: see `agrivision.data.memory`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from agrivision.data.decode import Frames, Layout, Pixels
from agrivision.data.jpeg_pixels import JpegPixels
from agrivision.data.memory import Memory
from agrivision.data.order import GlobalBatch, Order
from agrivision.data.parts import is_raw
from agrivision.data.shards import Scratch, SplitReader
from agrivision.errors import ConfigurationError, DatasetError
from agrivision.world import World

_PLANNED = 32  # steps whose tiles are looked up at once


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a batch, in host memory.

    Attributes:
        pixels: decoded tiles; they stay for as long as somebody holds them.
        tiles: their numbers in the split, in the order of the pixels.
        count: how many of them count, the first ones.
        whole: the batch of all ranks that this is a part of; None in an evaluation.
    """

    pixels: Pixels
    tiles: Sequence[int]
    count: int
    whole: GlobalBatch | None = None


class _Work:
    """A batch that is being decoded: threads take its tiles in order, each the next one.

    Args:
        reader: of the split.
        tiles: their numbers.
        pixels: the batch's memory.
        own: each thread's own memory.
    """

    def __init__(
        self, reader: SplitReader, tiles: Sequence[int], pixels: Pixels, own: threading.local
    ) -> None:
        self.futures: Sequence[Future[None]] = ()
        self._reader, self._tiles, self._pixels, self._own = reader, tiles, pixels, own
        self._frames = Frames(reader.schema, pixels)
        self._slots = iter(range(len(tiles)))  # next() is one step: no two threads get the same
        self._failed: dict[int, DatasetError] = {}
        self._over = False

    def run(self) -> None:
        """Decode until no tile is left, or somebody has met one that cannot be read."""
        while not self._over:
            slot = next(self._slots, None)
            if slot is None:
                return
            try:
                self._load(slot)
            except DatasetError as error:
                self._failed[slot] = error.with_traceback(None)  # which would hold the batch's memory
                self._over = True

    def _load(self, slot: int) -> None:
        tile = self._tiles[slot]
        files = self._read(tile, slot)
        try:
            self._frames.decode(files, slot)
            if isinstance(self._pixels, JpegPixels):
                self._pixels.put(files[:-1], slot)
        except DatasetError as error:
            shard, row = self._reader.locate(tile)
            raise DatasetError(f"tile {shard.key(row)} in {shard.path}: {error}") from None

    def _read(self, tile: int, slot: int) -> list[memoryview]:
        if isinstance(self._pixels, JpegPixels):
            return self._reader.read(tile)  # in memory of its own, which the batch keeps
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        return self._reader.read(tile, self._frames.places(slot), self._own.scratch)

    def wait(self) -> None:
        """Wait until all is decoded.

        Raises:
            DatasetError: a tile cannot be read; of several the first in the batch, whoever was faster:
                tiles before the one that ended the work were all taken by then.
        """
        for future in self.futures:
            future.result()
        if self._failed:
            raise self._failed[min(self._failed)]

    def give_up(self) -> None:
        """Leave the tiles that nobody has begun with; the memory is held until the others are done."""
        self._over = True
        for future in self.futures:
            future.cancel()


class _Decoder:
    """Decodes batches, in threads or, with none, at once.

    Args:
        reader: of the split.
        threads: how many.
        most: tiles in a batch.
        ahead: batches that are decoded while one is in use.
        pinned: in page-locked memory.
        files: leave JPEG files as they are, for a GPU to decode.
    """

    def __init__(
        self,
        reader: SplitReader,
        threads: int,
        *,
        most: int,
        ahead: int,
        pinned: bool,
        files: bool = False,
    ) -> None:
        self._reader, self._threads, self._files = reader, threads, files
        self._layout = Layout.of(reader.schema, most, images=not files)
        # The batches ahead, the one in use, the one before it and the one that is being fetched.
        self._memory = Memory(self._layout.size, pinned=pinned, keep=ahead + 3)
        # Raw tiles are read faster than a disk finds the next; JPEG files leave it time while they are
        # decoded, and it would cost them more than it brings.
        self._announces = any(map(is_raw, reader.schema.parts))
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, "decode") if threads else None

    def start(self, tiles: Sequence[int]) -> tuple[Pixels, _Work]:
        """Begin with a batch."""
        pixels = self._layout.pixels(self._memory.lease()).part(slice(len(tiles)))
        if self._files:
            pixels = JpegPixels.of(pixels, self._reader.schema)
        work = _Work(self._reader, tiles, pixels, self._own)
        if self._pool is None:
            work.run()
        else:
            if self._announces:
                self._pool.submit(self._reader.announce, tiles)
            shares = min(self._threads, len(tiles))
            work.futures = [self._pool.submit(work.run) for _ in range(shares)]
        return pixels, work

    def close(self) -> None:
        """End the threads, once each is done with the tile that it is at."""
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
        decoder: `gpu` leaves JPEG files to the device that a batch goes to (`Pixels.to`); see
            `agrivision.data.jpeg_pixels.check_decoder` for where that is possible.

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
        decoder: Literal["cpu", "gpu"] = "cpu",
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
        mine = order.share(world.rank, world.size)
        self._decoder = _Decoder(
            reader,
            threads,
            most=mine.stop - mine.start,
            ahead=self._prefetch,
            pinned=pinned,
            files=decoder == "gpu",
        )
        self._planned: deque[tuple[GlobalBatch, list[int]]] = deque()
        self._pending: deque[tuple[Batch, _Work]] = deque()

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
            batch, work = self._pending[0]
            work.wait()
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
        mine = self.order.share(self.world.rank, self.world.size)
        if not self._planned or self._planned[0][0].cursor != self._ahead:
            self._planned = deque(self.order.ahead(self._ahead, mine, _PLANNED))
        whole, tiles = self._planned.popleft()
        count = min(max(whole.count - mine.start, 0), len(tiles))
        pixels, work = self._decoder.start(tiles)
        self._pending.append((Batch(pixels=pixels, tiles=tiles, count=count, whole=whole), work))
        self._ahead = whole.next_cursor

    def _discard(self) -> None:
        for _, work in self._pending:
            work.give_up()
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
    most = min(batch_size, len(reader))
    decoder = _Decoder(reader, threads, most=most, ahead=1, pinned=pinned)
    pending: deque[tuple[Batch, _Work]] = deque()
    starts = range(world.rank * batch_size, len(reader), world.size * batch_size)
    try:
        for start in starts:
            tiles = range(start, min(start + batch_size, len(reader)))
            pixels, work = decoder.start(tiles)
            pending.append((Batch(pixels=pixels, tiles=tiles, count=len(tiles)), work))
            del pixels, work  # else they would be held while the next batch is waited for
            if len(pending) > 1:
                yield _finish(*pending.popleft())
        while pending:
            yield _finish(*pending.popleft())
    finally:
        for _, work in pending:
            work.give_up()
        decoder.close()


def _finish(batch: Batch, work: _Work) -> Batch:
    work.wait()
    return batch
