"""Shards and order → batches: the same on any number of ranks and threads, and nothing left over."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from agrivision.data.decode import Frames
from agrivision.data.labels import VALID_BIT
from agrivision.data.loader import Batch, TrainLoader, evaluation_batches
from agrivision.data.normalise import Normaliser
from agrivision.data.order import Order
from agrivision.data.prepare import PrepareSummary
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import ConfigurationError, DatasetError
from agrivision.world import World
from tests.data import scenes

BATCH = 7  # neither two nor three ranks divide it, and it does not divide the split


def reader_of(dataset: Path, split: str = "train") -> SplitReader:
    return SplitReader(dataset, Schema.read(dataset), split)


def train_loader(
    dataset: Path, rank: int = 0, size: int = 1, *, threads: int = 2, prefetch: int = 2
) -> TrainLoader:
    reader = reader_of(dataset)
    order = Order(size=len(reader), batch_size=BATCH, seed=3)
    return TrainLoader(reader, order, World(rank=rank, size=size), threads=threads, prefetch=prefetch)


def take(loader: TrainLoader, batches: int) -> list[Batch]:
    return [loader.next_batch() for _ in range(batches)]


def assert_equal(batch: Batch, other: Batch) -> None:
    assert_joined([batch], other)
    assert batch.whole is not None
    assert other.whole is not None
    assert batch.whole.cursor == other.whole.cursor


def assert_joined(parts: list[Batch], whole: Batch) -> None:
    """The parts one after the other are the whole: tiles, pixels, labels and how many count."""
    assert [tile for part in parts for tile in part.tiles] == list(whole.tiles)
    assert sum(part.count for part in parts) == whole.count
    for number, plane in enumerate(whole.pixels.planes):
        assert torch.equal(torch.cat([part.pixels.planes[number] for part in parts]), plane)
    assert torch.equal(torch.cat([part.pixels.labels for part in parts]), whole.pixels.labels)


@pytest.fixture(scope="module")
def line(dataset: Path) -> list[Batch]:
    """Two epochs and a bit, by one rank without threads."""
    with train_loader(dataset, threads=0) as loader:
        return take(loader, 12)


@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("threads", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 4, BATCH])
def test_the_ranks_together_make_the_batches_of_one(
    dataset: Path, line: list[Batch], size: int, threads: int, prefetch: int
) -> None:
    ranks = []
    for rank in range(size):
        with train_loader(dataset, rank, size, threads=threads, prefetch=prefetch) as loader:
            ranks.append(take(loader, len(line)))
    for whole, *parts in zip(line, *ranks, strict=True):
        assert_joined(parts, whole)


def test_the_samples_that_count_are_each_tile_once_an_epoch(dataset: Path, line: list[Batch]) -> None:
    tiles = len(reader_of(dataset))
    steps = -(-tiles // BATCH)
    for epoch in range(2):
        batches = line[epoch * steps : (epoch + 1) * steps]
        counted = [tile for batch in batches for tile in batch.tiles[: batch.count]]
        assert sorted(counted) == list(range(tiles))
        assert {batch.whole.epoch for batch in batches if batch.whole is not None} == {epoch}
        assert all(len(batch.tiles) == BATCH for batch in batches)


@settings(max_examples=25)
@given(jumps=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 2)), min_size=1, max_size=4))
@pytest.mark.parametrize("threads", [0, 2])
def test_going_to_a_position_is_coming_there(
    dataset: Path, line: list[Batch], threads: int, jumps: list[tuple[int, int]]
) -> None:
    with train_loader(dataset, threads=threads) as loader:
        for position, count in jumps:
            whole = line[position].whole
            assert whole is not None
            loader.seek(whole.cursor)
            for batch, expected in zip(take(loader, count), line[position:], strict=False):
                assert_equal(batch, expected)


@given(cursor=st.integers(0, 10**15))
@settings(max_examples=20)
def test_any_cursor_is_a_position(dataset: Path, cursor: int) -> None:
    with train_loader(dataset, threads=0) as loader:
        loader.seek(cursor)
        batch = loader.next_batch()
        assert batch.whole is not None
        assert batch.whole.cursor == cursor
        assert len(batch.tiles) == BATCH


@settings(max_examples=15)
@given(
    cursor=st.integers(0, 200),
    threads=st.sampled_from([0, 1, 2, 3, 8]),
    size=st.sampled_from([1, 2, 4]),
)
def test_from_any_cursor_all_ranks_and_threads_see_the_same(
    dataset: Path, cursor: int, threads: int, size: int
) -> None:
    with train_loader(dataset, threads=0) as loader:
        loader.seek(cursor)
        expected = take(loader, 3)
    ranks = []
    for rank in range(size):
        with train_loader(dataset, rank, size, threads=threads) as loader:
            take(loader, 1)
            loader.seek(cursor)
            ranks.append(take(loader, 3))
    for whole, *parts in zip(expected, *ranks, strict=True):
        assert_joined(parts, whole)


# Memory


@pytest.mark.parametrize("threads", [0, 2])
def test_batches_keep_their_pixels_when_others_follow(
    dataset: Path, line: list[Batch], threads: int
) -> None:
    with train_loader(dataset, prefetch=1, threads=threads) as loader:
        batches = take(loader, len(line))
    for batch, expected in zip(batches, line, strict=True):
        assert_equal(batch, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda batch: batch.pixels.labels,
        lambda batch: batch.pixels.labels[3:5].numpy()[1],
        lambda batch: memoryview(batch.pixels.planes[0][2].numpy()),
        lambda batch: batch.pixels.part(slice(4, 6)).to(torch.device("cpu")).planes[1],
        lambda batch: batch.pixels.planes[0].permute(0, 3, 1, 2)[:, 1:],
    ],
)
@pytest.mark.parametrize("threads", [0, 2])
def test_whatever_is_kept_of_a_batch_stays_as_it_was(
    dataset: Path, threads: int, view: Callable[[Batch], object]
) -> None:
    with train_loader(dataset, threads=threads) as loader:
        kept = [view(loader.next_batch()) for _ in range(8)]
        before = [np.array(each) for each in kept]
        take(loader, 8)
        for each, copied in zip(kept, before, strict=True):
            assert np.array_equal(np.asarray(each), copied)


@pytest.mark.parametrize(("threads", "most"), [(0, 1), (2, 4)])
def test_memory_that_nobody_holds_is_used_again(dataset: Path, threads: int, most: int) -> None:
    addresses = set()
    with train_loader(dataset, threads=threads, prefetch=2) as loader:
        for _ in range(40):
            addresses.add(loader.next_batch().pixels.labels.data_ptr())
    assert len(addresses) <= most


def test_a_thread_that_is_late_writes_into_nobody_elses_batch(
    dataset: Path, line: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs in a batch that was given up, while others take its place in the line."""
    decode, hangs, go_on = Frames.decode, threading.Event(), threading.Event()
    record = bytes(reader_of(dataset).read(line[1].tiles[0])[0])

    def decode_late(frames: Frames, files: Sequence[memoryview], slot: int) -> None:
        if not hangs.is_set() and bytes(files[0]) == record:
            hangs.set()
            assert go_on.wait(60)
        decode(frames, files, slot)

    monkeypatch.setattr(Frames, "decode", decode_late)
    with train_loader(dataset, threads=2, prefetch=1) as loader:
        loader.next_batch()
        assert hangs.wait(60)
        assert line[4].whole is not None
        loader.seek(line[4].whole.cursor)
        found = take(loader, 6)
        go_on.set()
    for batch, expected in zip(found, line[4:], strict=False):
        assert_equal(batch, expected)


def blocks() -> int:
    return sum(type(each).__name__ == "_Block" for each in gc.get_objects())


def test_nothing_grows_from_epoch_to_epoch(copied: Path) -> None:
    """Memory, files and threads after one epoch, with an error and a jump in each, and after twenty."""
    reader = reader_of(copied)
    flip(reader, 3)
    order = Order(size=len(reader), batch_size=BATCH, seed=3)
    gc.collect()
    before, counts = blocks(), []
    with TrainLoader(reader, order, World(), threads=3, prefetch=2) as loader:
        for epoch in range(20):
            loader.seek(epoch * len(reader))
            errors = 0
            for _ in range(order.steps_per_epoch):
                try:
                    loader.next_batch()
                except DatasetError:
                    errors += 1
            assert errors
            gc.collect()
            counts.append((blocks(), len(open_files()), len(decoding_threads())))
    # Three batches ahead and one in use; a thread that is late holds its own a moment longer.
    assert max(blocks for blocks, _, _ in counts) <= before + 9
    assert {(files, threads) for _, files, threads in counts[1:]} == {counts[0][1:]}
    del loader
    gc.collect()
    assert blocks() == before


def test_an_evaluation_leaves_no_memory(dataset: Path) -> None:
    gc.collect()
    before = blocks()
    batches = evaluation_batches(reader_of(dataset), World(), batch_size=4, threads=2)
    while next(batches, None) is not None:
        assert 1 <= blocks() - before <= 3
    gc.collect()
    assert blocks() == before


def test_more_ranks_than_samples_in_a_batch_are_refused(dataset: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data.batch_size is 7, but there are 8 ranks"):
        train_loader(dataset, 0, BATCH + 1)


# Damage


@pytest.fixture
def copied(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copied"))


def flip(reader: SplitReader, tile: int) -> None:
    """Change one byte of a tile in place; the same again repairs it."""
    shard, row = reader.locate(tile)
    start = int(shard.index["offsets"][row][0]) + 30
    with shard.path.open("r+b") as file:
        file.seek(start)
        byte = file.read(1)
        file.seek(start)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_damaged_tile_is_named_and_met_again_until_it_is_repaired(
    copied: Path, line: list[Batch], threads: int
) -> None:
    reader = reader_of(copied)
    tile = line[3].tiles[4]
    flip(reader, tile)
    shard, row = reader.locate(tile)
    with train_loader(copied, threads=threads) as loader:
        for expected in line[:3]:
            assert_equal(loader.next_batch(), expected)
        for _ in range(3):
            with pytest.raises(DatasetError) as error:
                loader.next_batch()
            assert shard.key(row) in str(error.value)
            assert str(shard.path) in str(error.value)
        flip(reader, tile)
        for expected in line[3:]:
            assert_equal(loader.next_batch(), expected)


def test_a_damaged_tile_can_be_left_behind(copied: Path, line: list[Batch]) -> None:
    flip(reader_of(copied), line[1].tiles[0])
    with train_loader(copied) as loader:
        take(loader, 1)
        with pytest.raises(DatasetError):
            loader.next_batch()
        assert line[2].whole is not None
        loader.seek(line[2].whole.cursor)
        assert_equal(loader.next_batch(), line[2])


def test_a_rank_meets_only_the_damage_in_its_own_share(copied: Path, line: list[Batch]) -> None:
    flip(reader_of(copied), line[0].tiles[0])
    with train_loader(copied, 0, 2) as first, train_loader(copied, 1, 2) as second:
        with pytest.raises(DatasetError):
            first.next_batch()
        assert second.next_batch().tiles == line[0].tiles[3:]


def test_a_disk_that_fails_names_the_tile(
    dataset: Path, line: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(116, os.strerror(116))

    with train_loader(dataset) as loader:
        with monkeypatch.context() as patch:
            patch.setattr("agrivision.data.shards.os.preadv", refuse)
            with pytest.raises(DatasetError, match=r"tile \S+ in .*\.tar: Stale file handle"):
                loader.next_batch()
        assert_equal(loader.next_batch(), line[0])


def test_a_tile_that_cannot_be_decoded_is_named(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise DatasetError("rgb.jpg: not a whole JPEG")

    monkeypatch.setattr("agrivision.data.loader.Frames.decode", refuse)
    reader = reader_of(dataset)
    for threads in (0, 2):
        with pytest.raises(DatasetError) as error:
            next(evaluation_batches(reader, World(), batch_size=1, threads=threads))
        shard, row = reader.locate(0)
        assert str(error.value) == f"tile {shard.key(row)} in {shard.path}: rgb.jpg: not a whole JPEG"


# Pixels


def image(path: Path) -> NDArray[np.bool_]:
    return np.asarray(Image.open(path)) > 0


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_pixels_and_labels_are_those_of_the_source(fields: Path, dataset: Path, split: str) -> None:
    reader = reader_of(dataset, split)
    schema = reader.schema
    assert schema.bands == ("red", "green", "blue", "nir")
    folder = fields / split
    keys = set()
    for batch in evaluation_batches(reader, World(), batch_size=4, threads=2):
        images, bits = batch.pixels.images(), batch.pixels.label_bits()
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert bits.dtype == torch.int32
        for slot, tile in enumerate(batch.tiles):
            key = reader.key(tile)
            keys.add(key)
            rgb = simplejpeg.decode_jpeg((folder / f"images/rgb/{key}.jpg").read_bytes())
            nir = simplejpeg.decode_jpeg((folder / f"images/nir/{key}.jpg").read_bytes(), "GRAY")
            expected = np.concatenate([rgb, nir], axis=-1).transpose(2, 0, 1)
            assert np.array_equal(images[slot].numpy(), expected.astype(np.float32))
            assert np.array_equal(bits[slot].numpy(), expected_bits(folder, schema, key))
    assert keys == {path.stem for path in (folder / "images/rgb").iterdir()}


def expected_bits(folder: Path, schema: Schema, key: str) -> NDArray[np.int64]:
    valid = image(folder / f"boundaries/{key}.png") & image(folder / f"masks/{key}.png")
    bits = valid.astype(np.int64) << VALID_BIT
    if not (folder / "labels").is_dir():
        return bits
    labelled = np.zeros(valid.shape, bool)
    for name, bit in schema.label_bits.items():
        if name not in ("background", "valid"):
            there = image(folder / f"labels/{name}/{key}.png")
            bits |= there.astype(np.int64) << bit
            labelled |= there & (name in schema.classes)
    return bits | ~labelled


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "int32", "float32", "float64"])
def test_scenes_of_every_type_are_those_of_the_source(
    tmp_path: Path, prepared: Callable[..., PrepareSummary], dtype: str
) -> None:
    source = tmp_path / "source"
    pairs = scenes.write_source(source, scenes=2, shape=(6, 40, 50), dtype=dtype)
    summary = prepared(source, tile=32, val=("s1.tif",), shard_tiles=3)
    assert_scene(summary, "train", pairs["s0"][0], outside=0)


def assert_scene(summary: PrepareSummary, split: str, scene: NDArray, outside: float) -> None:
    reader = SplitReader(summary.out, summary.schema, split)
    padded = np.full((len(scene), 64, 64), outside, np.float32)
    padded[:, : scene.shape[1], : scene.shape[2]] = scene
    seen = 0
    for batch in evaluation_batches(reader, World(), batch_size=3, threads=2):
        images = batch.pixels.images()
        assert images.is_contiguous(memory_format=torch.channels_last)
        for slot, tile in enumerate(batch.tiles):
            left, top, right, bottom = map(int, reader.key(tile).rpartition("_")[2].split("-"))
            window = padded[:, top:bottom, left:right]
            assert np.array_equal(images[slot].numpy(), window, equal_nan=True)
            seen += 1
    assert seen == 4


def test_nan_in_a_scene_is_invalid_and_normalised_to_nothing(
    tmp_path: Path, prepared: Callable[..., PrepareSummary]
) -> None:
    source = tmp_path / "source"
    scene = scenes.noise(0, (6, 40, 50), "float32") * 5 + 100
    scene[:, 3:9, 5] = np.nan
    scene[2, 20, 20:30] = np.nan
    scene[4, 30, 7] = np.inf
    for name in ("s0", "s1"):
        scenes.write_raster(source / f"scenes/{name}.tif", scene)
        scenes.write_raster(source / f"labels/{name}.tif", np.ones((40, 50), np.uint8))
    summary = prepared(source, tile=32, val=("s1.tif",))
    assert_scene(summary, "train", scene, outside=0)
    normaliser = Normaliser.of(summary.schema, "bands")
    reader = SplitReader(summary.out, summary.schema, "train")
    invalid = 0
    for batch in evaluation_batches(reader, World(), batch_size=2, threads=0):
        images, bits = batch.pixels.images(), batch.pixels.label_bits()
        normal = normaliser(images)
        finite = images.isfinite()
        assert normal.isfinite().all()
        assert (normal[~finite] == 0).all()
        inside = (images != 0).all(dim=1, keepdim=True).expand_as(images) & finite
        assert normal[inside].abs().max() < 6  # standard deviations
        assert not (bits.bitwise_right_shift(VALID_BIT).bool() & ~finite.all(dim=1)).any()
        invalid += int((~finite.all(dim=1)).sum())
    assert invalid == 6 + 10 + 1


# Evaluation


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(4, (1, 2, 3, 5)), (7, (1, 2, 3, 5)), (50, (1, 2, 5))]
)
def test_an_evaluation_sees_every_tile_once_in_the_same_company(
    dataset: Path, batch_size: int, sizes: tuple[int, ...], threads: int
) -> None:
    reader = reader_of(dataset)
    expected = list(evaluation_batches(reader, World(), batch_size=batch_size, threads=0))
    assert [tile for batch in expected for tile in batch.tiles] == list(range(len(reader)))
    for size in sizes:
        found: list[Batch] = []
        for rank in range(size):
            world = World(rank=rank, size=size)
            found += evaluation_batches(reader, world, batch_size=batch_size, threads=threads)
        found.sort(key=lambda batch: batch.tiles[0])
        assert len(found) == len(expected)
        for batch, other in zip(found, expected, strict=True):
            assert_joined([batch], other)
            assert batch.count == len(batch.tiles)
            assert batch.whole is None


@pytest.mark.parametrize("threads", [0, 2])
def test_an_evaluation_names_the_damaged_tile_after_the_batches_before_it(
    copied: Path, threads: int
) -> None:
    reader = reader_of(copied)
    flip(reader, 20)
    found = []
    with pytest.raises(DatasetError, match=reader.key(20)):
        found.extend(evaluation_batches(reader, World(), batch_size=4, threads=threads))
    assert not decoding_threads()


# Nothing is left


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def open_files() -> list[str]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists the folder
            found.append(str(descriptor.readlink()))
    return found


def held_files() -> set[str]:
    """What this process holds open or maps of the places where others leave things."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    held = {line.split(maxsplit=5)[-1].strip() for line in maps} | set(open_files())
    return {name for name in held if name.startswith(("/dev/shm", "/memfd:", tempfile.gettempdir()))}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of our own; it must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def test_nothing_is_put_into_shared_memory_or_the_temporary_folder(
    dataset: Path, temporary: Path
) -> None:
    before = held_files()
    with train_loader(dataset, threads=3) as loader:
        take(loader, 3)
        assert held_files() == before
        assert list(temporary.iterdir()) == []
        assert len(decoding_threads()) == 3
    assert held_files() == before


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_no_thread_outlives_the_loader(dataset: Path, consumed: int) -> None:
    with train_loader(dataset, threads=3, prefetch=4) as loader:
        take(loader, consumed)
    assert not decoding_threads()


def test_no_thread_outlives_a_loader_that_fails(copied: Path, line: list[Batch]) -> None:
    flip(reader_of(copied), line[0].tiles[0])
    with pytest.raises(DatasetError), train_loader(copied) as loader:
        loader.next_batch()
    assert not decoding_threads()


@pytest.mark.parametrize("consumed", [0, 1, 3])
def test_an_evaluation_that_is_left_early_stops_its_threads(dataset: Path, consumed: int) -> None:
    batches = evaluation_batches(reader_of(dataset), World(), batch_size=4, threads=3)
    assert len(list(islice(batches, consumed))) == consumed
    assert bool(decoding_threads()) == (consumed > 0)
    batches.close()
    assert not decoding_threads()


def test_no_file_stays_open(dataset: Path) -> None:
    def held() -> int:
        return sum(name.startswith(str(dataset)) for name in open_files())

    before = held()
    with train_loader(dataset) as loader:
        take(loader, 6)
        assert held() > before
    del loader
    assert held() == before
