"""Shards and order → batches. The whole state is a cursor.

Decoding runs in threads: decoders release the GIL, threads share the batch's memory, and a signal to
the job's step cannot kill them, as it kills worker processes. Nothing is left in /dev/shm or /tmp,
because nothing is ever put there.

A batch's memory is used again for a later one, but only once nobody holds the batch or a tensor that
was made of it: see `agrivision.data.memory`.

What the operating system refuses is tried again a few times, since a server may come back; what is
damaged once more, since the file may just have been replaced. A tile that cannot be read even then ends
the work, unless somebody keeps a quarantine: then its place in the batch stays and counts for nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

from agrivision.data.decode import Frames, Layout, Pixels
from agrivision.data.jpeg_pixels import JpegPixels
from agrivision.data.labels import Labels
from agrivision.data.memory import Memory
from agrivision.data.order import GlobalBatch, Order, Planned
from agrivision.data.parts import is_raw
from agrivision.data.quarantine import Damage, Quarantine, passes
from agrivision.data.sampling import RareCrops
from agrivision.data.shards import Scratch, SplitReader
from agrivision.errors import ConfigurationError, DatasetError
from agrivision.world import World

_PLANNED = 32  # steps whose tiles are looked up at once
_PAUSES = (0.1, 0.5, 2.0)  # seconds before a read that was refused is tried again
_PATIENCE = 10.0  # seconds of such pauses in a batch, about: where all is refused, it passes less soon

Choose = Callable[[int, int, Labels], tuple[int, int] | None]  # of place, tile and labels: row, column


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's part of a batch, in host memory.

    Attributes:
        pixels: decoded tiles; they stay for as long as somebody holds them.
        tiles: their numbers in the split, in the order of the pixels.
        count: how many of them count, the first ones, less those left out.
        whole: the batch of all ranks that this is a part of; None in an evaluation.
        left_out: places of tiles that cannot be used. There is another tile's image, without a valid
            pixel, or zeros.
        found: those of them that nobody knew of.
        cut_off: the operating system refused all that was to be read, two tiles or more: it is not the
            tiles that are damaged.
        samples: numbers of the samples in the epoch; empty in an evaluation.
        focus: by place, row and column of a pixel that the sample's crop must hold; places that may be
            cut anywhere are not there.
    """

    pixels: Pixels
    tiles: Sequence[int]
    count: int
    whole: GlobalBatch | None = None
    left_out: frozenset[int] = frozenset()
    found: tuple[Damage, ...] = ()
    cut_off: bool = False
    samples: Sequence[int] = ()
    focus: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def counted(self) -> list[int]:
        """Numbers of the tiles that count."""
        return [tile for slot, tile in enumerate(self.tiles[: self.count]) if slot not in self.left_out]


class _Work:
    """A batch that is being decoded: threads take its tiles in order, each the next one.

    Args:
        reader: of the split.
        tiles: their numbers.
        pixels: the batch's memory.
        own: each thread's own memory.
        skip: numbers of tiles that are not read.
        choose: the pixel that the crop of a place must hold, or None, of its tile's number and labels.

    Attributes:
        futures: of the threads that are at it.
        focus: what was chosen, by place.
    """

    def __init__(
        self,
        reader: SplitReader,
        tiles: Sequence[int],
        pixels: Pixels,
        own: threading.local,
        *,
        skip: Container[int],
        choose: Choose | None,
    ) -> None:
        self.futures: Sequence[Future[None]] = ()
        self.focus: dict[int, tuple[int, int]] = {}
        self._choose = choose
        self._reader, self._tiles, self._pixels, self._own = reader, tiles, pixels, own
        self._skip = skip
        self._frames = Frames(reader.schema, pixels)
        self._slots = iter(range(len(tiles)))  # next() is one step: no two threads get the same
        self._failed: dict[int, DatasetError] = {}
        self._over = False
        self._patience = _PATIENCE

    def run(self) -> None:
        """Decode until no tile is left."""
        while not self._over:
            slot = next(self._slots, None)
            if slot is None:
                return
            if self._tiles[slot] in self._skip:
                continue
            try:
                self._load(slot)
            except DatasetError as error:
                # Another error of the kind: this one's trace and cause would hold the batch's memory.
                self._failed[slot] = type(error)(str(error))

    def _load(self, slot: int) -> None:
        tile = self._tiles[slot]
        files = self._read(tile, slot)
        try:
            self._frames.decode(files, slot)
            if isinstance(self._pixels, JpegPixels):
                self._pixels.put(files[:-1], slot)
            chosen = self._choose and self._choose(slot, tile, self._frames.labels(slot))
            if chosen:
                self.focus[slot] = chosen
        except DatasetError as error:
            shard, row = self._reader.locate(tile)
            raise DatasetError(f"tile {shard.key(row)} in {shard.path}: {error}") from None

    def _read(self, tile: int, slot: int) -> list[memoryview]:
        for pause in _PAUSES:
            try:
                return self._read_once(tile, slot)
            except DatasetError as error:
                passing = passes(error)
            self._reader.reopen(tile)
            if self._over or not passing or self._patience <= 0:
                break
            self._patience -= pause
            time.sleep(pause)
        return self._read_once(tile, slot)

    def _read_once(self, tile: int, slot: int) -> list[memoryview]:
        if isinstance(self._pixels, JpegPixels):
            return self._reader.read(tile)  # in memory of its own, which the batch keeps
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch()
        return self._reader.read(tile, self._frames.places(slot), self._own.scratch)

    def wait(self) -> dict[int, DatasetError]:
        """Wait until all is decoded; returns why tiles cannot be used, by place in the batch."""
        for future in self.futures:
            future.result()
        return dict(sorted(self._failed.items()))

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

    def start(
        self, tiles: Sequence[int], skip: Container[int] = (), choose: Choose | None = None
    ) -> tuple[Pixels, _Work]:
        """Begin with a batch, but for the tiles to skip."""
        pixels = self._layout.pixels(self._memory.lease()).part(slice(len(tiles)))
        if self._files:
            pixels = JpegPixels.of(pixels, self._reader.schema)
        work = _Work(self._reader, tiles, pixels, self._own, skip=skip, choose=choose)
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
        crops: where some samples are cut; None leaves it to whoever cuts them.

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
        crops: RareCrops | None = None,
    ) -> None:
        if order.batch_size < world.size:
            raise ConfigurationError(
                f"data.batch_size is {order.batch_size}, but there are {world.size} ranks:"
                " each needs at least one sample"
            )
        self.order, self.world, self.reader = order, world, reader
        self.waited = 0.0  # seconds spent in next_batch() waiting for pixels
        self._cursor = 0  # of the next batch to hand out
        self._ahead = 0  # of the next batch to start
        self._prefetch = prefetch if threads else 0
        self._quarantine: Quarantine | None = None
        mine = order.share(world.rank, world.size)
        self._together = mine.stop - mine.start
        self._decoder = _Decoder(
            reader,
            threads,
            most=self._together,
            ahead=self._prefetch,
            pinned=pinned,
            files=decoder == "gpu",
        )
        self._crops = crops
        self._planned: deque[Planned] = deque()
        self._pending: deque[tuple[Batch, _Work]] = deque()

    def isolate(self, quarantine: Quarantine, together: int) -> None:
        """From now on give batches without the tiles that cannot be used, instead of an error.

        What takes a tile's place is the image of the next one that can be used, of those that go
        through the network together: BatchNorm's statistics are then those of real images, as zeros
        would not leave them, and where micro-batches do not depend on the ranks, neither do they.

        Args:
            quarantine: the tiles that are left out already; it may grow between two batches.
            together: places of a batch that go through the network at once, counted from its beginning.
        """
        self._quarantine, self._together = quarantine, together

    def seek(self, cursor: int) -> None:
        """Go to a position on the line of samples; costs the same for each."""
        self._discard()
        self._cursor = self._ahead = cursor

    def next_batch(self) -> Batch:
        """The next batch of this rank.

        Raises:
            DatasetError: a record cannot be read, and nobody called `isolate`; the line names shard and
                tile. The same call can be made again and meets the same batch.
        """
        begin = time.perf_counter()
        try:
            while len(self._pending) <= self._prefetch:
                self._start_one()
            batch, work = self._pending[0]
            failed = work.wait()
        finally:
            self.waited += time.perf_counter() - begin
        if failed and self._quarantine is None:
            self._discard()
            self._ahead = self._cursor
            raise next(iter(failed.values()))
        self._pending.popleft()
        assert batch.whole is not None
        self._cursor = batch.whole.next_cursor
        batch = replace(batch, focus=work.focus)
        return batch if self._quarantine is None else self._without(batch, failed, self._quarantine)

    def without(self, batch: Batch, failed: dict[int, DatasetError]) -> Batch:
        """The batch, its memory changed, without more tiles that cannot be used.

        Args:
            batch: the last one handed out.
            failed: why, by place in the batch.
        """
        assert self._quarantine is not None
        return self._without(batch, failed, self._quarantine)

    def _without(self, batch: Batch, failed: dict[int, DatasetError], quarantine: Quarantine) -> Batch:
        known = {slot for slot, tile in enumerate(batch.tiles) if tile in quarantine}
        new = {slot: error for slot, error in failed.items() if slot not in known}
        if not known and not new:
            return batch
        left_out = batch.left_out | known | new.keys()
        _stand_in(batch.pixels, left_out, self._together)
        found = [Damage.of(self.reader, batch.tiles[slot], error) for slot, error in new.items()]
        wanted = len(batch.tiles) - len(known)
        return replace(
            batch,
            left_out=left_out,
            found=(*batch.found, *found),
            cut_off=1 < wanted == len(new) and all(map(passes, new.values())),
        )

    def _start_one(self) -> None:
        mine = self.order.share(self.world.rank, self.world.size)
        if not self._planned or self._planned[0].batch.cursor != self._ahead:
            self._planned = deque(self.order.ahead(self._ahead, mine, _PLANNED))
        planned = self._planned.popleft()
        whole, tiles = planned.batch, planned.tiles
        count = min(max(whole.count - mine.start, 0), len(tiles))
        skip = () if self._quarantine is None else self._quarantine
        pixels, work = self._decoder.start(tiles, skip, self._choice(planned))
        batch = Batch(pixels=pixels, tiles=tiles, count=count, whole=whole, samples=planned.samples)
        self._pending.append((batch, work))
        self._ahead = whole.next_cursor

    def _choice(self, planned: Planned) -> Choose | None:
        if self._crops is None:
            return None
        crops, reader, epoch = self._crops, self.reader, planned.batch.epoch

        def choose(place: int, tile: int, labels: Labels) -> tuple[int, int] | None:
            shard, row = reader.locate(tile)
            return crops.pixel(labels, shard.index["pixels"][row], epoch, planned.samples[place])

        return choose

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


def _stand_in(pixels: Pixels, missing: Collection[int], together: int) -> None:
    """Fill the places of tiles that cannot be used.

    Args:
        pixels: of a batch.
        missing: the places.
        together: so many places go through the network at once.
    """
    for slot in missing:
        start = slot - slot % together
        end = min(start + together, len(pixels.labels))
        others = (*range(slot + 1, end), *range(start, slot))
        pixels.stand_in(slot, next((other for other in others if other not in missing), None))


def evaluation_batches(
    reader: SplitReader,
    world: World,
    *,
    batch_size: int,
    threads: int,
    pinned: bool = False,
    isolate: bool = False,
) -> Generator[Batch, None, None]:
    """Every tile of a split exactly once over all ranks.

    The split is cut into the same batches on any number of ranks, which take turns: a tile always
    meets the same neighbours and the kernels the same shapes, so predictions do not depend on the
    world. Ranks may get different numbers of batches.

    Args:
        reader: of the split.
        world: this rank among the others.
        batch_size: tiles in a batch.
        threads: decoding threads; 0 decodes in the caller's.
        pinned: batches in page-locked memory, for a GPU.
        isolate: give batches without the tiles that cannot be used, instead of an error.

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
                yield _finish(reader, *pending.popleft(), isolate=isolate)
        while pending:
            yield _finish(reader, *pending.popleft(), isolate=isolate)
    finally:
        for _, work in pending:
            work.give_up()
        decoder.close()


def _finish(reader: SplitReader, batch: Batch, work: _Work, *, isolate: bool) -> Batch:
    failed = work.wait()
    if not failed:
        return batch
    if not isolate:
        raise next(iter(failed.values()))
    _stand_in(batch.pixels, failed, len(batch.tiles))
    return replace(
        batch,
        left_out=frozenset(failed),
        found=tuple(Damage.of(reader, batch.tiles[slot], error) for slot, error in failed.items()),
        cut_off=1 < len(batch.tiles) == len(failed) and all(map(passes, failed.values())),
    )
