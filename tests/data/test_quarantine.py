"""What takes a damaged tile's place, how many there may be, and what is tried again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agrivision.config import DataConfig
from agrivision.data import loader as module
from agrivision.data.jpeg_pixels import JpegPixels
from agrivision.data.loader import Batch, TrainLoader, evaluation_batches
from agrivision.data.order import Order
from agrivision.data.quarantine import Damage, Quarantine, most_damaged
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.staging import StagedSplit, stage
from agrivision.errors import CheckpointError, ConfigurationError, DatasetError
from agrivision.world import World
from tests.data.test_loader import flip, reader_of
from tests.data.test_repair import cut_jpeg, write_again

BATCH = 7


@pytest.fixture
def mine(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "mine"))


def isolating(
    reader: SplitReader,
    *,
    share: float = 1.0,
    together: int = BATCH,
    threads: int = 2,
    world: World | None = None,
    decoder: Any = "cpu",
) -> tuple[TrainLoader, Quarantine]:
    order = Order(size=len(reader), batch_size=BATCH, seed=3)
    made = TrainLoader(reader, order, world or World(), threads=threads, decoder=decoder)
    quarantine = Quarantine(reader, share)
    made.isolate(quarantine, together)
    return made, quarantine


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [loader.next_batch() for _ in range(count)]


def same_images(batch: Batch, slot: int, other: Batch, place: int) -> bool:
    pairs = zip(batch.pixels.planes, other.pixels.planes, strict=True)
    return all(torch.equal(mine[slot], theirs[place]) for mine, theirs in pairs)


# How many


@given(tiles=st.integers(0, 10**9), parts=st.integers(0, 10**6))
def test_the_bound_is_exact(tiles: int, parts: int) -> None:
    """For every share that somebody can write with six digits."""
    assert most_damaged(parts / 10**6, tiles) == tiles * parts // 10**6


def test_the_first_of_fewer_than_a_thousand_is_too_many() -> None:
    share = DataConfig().max_damaged_share
    assert [most_damaged(share, tiles) for tiles in (0, 33, 999, 1000, 1999, 2000)] == [
        0,
        0,
        0,
        1,
        1,
        2,
    ]
    assert most_damaged(0.29, 100) == 29
    assert most_damaged(0, 10**6) == 0
    assert most_damaged(1, 10) == most_damaged(1.0, 10) == 10


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.max_damaged_share"):
        DataConfig(max_damaged_share=share)


def damage(tile: int) -> Damage:
    return Damage(tile=tile, key=f"k{tile}", shard="train/00000.tar", why=f"tile k{tile} is bad")


def test_all_are_taken_in_or_none(dataset: Path) -> None:
    quarantine = Quarantine(reader_of(dataset), 0.1)  # of 33: 3
    assert [each.tile for each in quarantine.add([damage(9), damage(4), damage(9)], 5)] == [4, 9]
    assert quarantine.add([damage(9)], 6) == []
    with pytest.raises(DatasetError, match=r"4 of 33 tiles of .*/train cannot be read, at most 3 may"):
        quarantine.add([damage(1), damage(9), damage(2)], 7)
    assert len(quarantine) == 2 and 1 not in quarantine and 9 in quarantine
    quarantine.add([damage(1)], 8)
    assert [(row["step"], row["tile"]) for row in quarantine.rows] == [(5, 4), (5, 9), (8, 1)]
    other = Quarantine(reader_of(dataset), 0.1)
    other.load(quarantine.rows)
    assert other.rows == quarantine.rows and 4 in other
    for rows in ([{}], [3], [{"tile": "x"}], 7):
        with pytest.raises(CheckpointError, match="list of damaged tiles"):
            other.load(rows)  # type: ignore[arg-type]


def test_a_long_list_is_cut_in_the_line(dataset: Path) -> None:
    quarantine = Quarantine(reader_of(dataset), 0)
    with pytest.raises(DatasetError) as error:
        quarantine.add(map(damage, range(20)), 1)
    line = str(error.value)
    assert "20 of 33" in line and "tile k2 is bad; and 17 more. `agrivision inspect" in line
    assert "\n" not in line and "may be" not in line


# What takes the place


@pytest.fixture(scope="module")
def line(dataset: Path) -> list[Batch]:
    """An epoch of the data set before it was damaged."""
    reader = reader_of(dataset)
    order = Order(size=len(reader), batch_size=BATCH, seed=3)
    with TrainLoader(reader, order, World(), threads=0) as loader:
        return take(loader, 5)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_place_gets_the_image_of_the_next_of_those_that_go_together(
    threads: int, mine: Path, line: list[Batch]
) -> None:
    """Places 0 1 2 | 3 4 5 | 6; of the last there is no other."""
    reader = reader_of(mine)
    out = [line[1].tiles[slot] for slot in (2, 4, 5, 6)]
    for tile in out:
        flip(reader, tile)
    loader, quarantine = isolating(reader, together=3, threads=threads)
    with loader:
        batches = take(loader, 5)
    batch, whole = batches[1], line[1]
    assert batch.left_out == {2, 4, 5, 6}
    assert [found.tile for found in batch.found] == out
    assert batch.tiles == whole.tiles and batch.count == whole.count
    assert batch.counted == [whole.tiles[slot] for slot in (0, 1, 3)]
    for slot, other in {0: 0, 1: 1, 2: 0, 3: 3, 4: 3, 5: 3}.items():
        assert same_images(batch, slot, whole, other), slot
    assert all(not plane[6].any() for plane in batch.pixels.planes)
    for slot in range(BATCH):
        wanted = torch.zeros_like(whole.pixels.labels[slot]) if slot in batch.left_out else None
        wanted = whole.pixels.labels[slot] if wanted is None else wanted
        assert torch.equal(batch.pixels.labels[slot], wanted)
    assert not batches[0].left_out and not batches[0].found and not batches[0].cut_off
    assert len(quarantine) == 0  # ranks have to agree on that


def test_what_is_in_quarantine_is_not_read(
    mine: Path, line: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the batch was decoded before the tile was put there."""
    reader = reader_of(mine)
    early, late = line[1].tiles[0], line[4].tiles[1]
    read: list[int] = []
    original = SplitReader.read
    monkeypatch.setattr(
        SplitReader, "read", lambda self, tile, *args: read.append(tile) or original(self, tile, *args)
    )
    loader, quarantine = isolating(reader)
    with loader:
        loader.next_batch()
        quarantine.add([damage(early), damage(late)], 2)
        batches = take(loader, 4)
    assert batches[0].left_out == {0} and batches[3].left_out == {1}
    assert not any(batch.found for batch in batches)
    assert late not in read
    assert same_images(batches[0], 0, line[1], 1)


def test_ranks_meet_what_is_in_their_share(mine: Path, line: list[Batch]) -> None:
    reader = reader_of(mine)
    out = [line[0].tiles[slot] for slot in (1, 5)]
    for tile in out:
        flip(reader, tile)
    found = []
    for rank in range(2):
        loader, _ = isolating(reader, world=World(rank=rank, size=2), together=2)
        with loader:
            found.append(loader.next_batch())
    assert [[each.tile for each in batch.found] for batch in found] == [[out[0]], [out[1]]]


def test_without_a_quarantine_damage_is_an_error(mine: Path, line: list[Batch]) -> None:
    reader = reader_of(mine)
    flip(reader, line[0].tiles[2])
    order = Order(size=len(reader), batch_size=BATCH, seed=3)
    with (
        TrainLoader(reader, order, World(), threads=2) as loader,
        pytest.raises(DatasetError, match=reader.key(line[0].tiles[2])),
    ):
        loader.next_batch()


@pytest.mark.parametrize("threads", [0, 2])
def test_an_evaluation_goes_on_without(threads: int, mine: Path) -> None:
    reader = reader_of(mine)
    flip(reader, 6)
    whole = list(
        evaluation_batches(reader_of(mine, "train"), World(), batch_size=1, threads=0, isolate=True)
    )
    found = list(evaluation_batches(reader, World(), batch_size=4, threads=threads, isolate=True))
    assert [batch.left_out for batch in found] == [{2} if number == 1 else set() for number in range(9)]
    assert [each.tile for batch in found for each in batch.found] == [6]
    assert [tile for batch in found for tile in batch.counted] == [t for t in range(33) if t != 6]
    assert same_images(found[1], 2, whole[7], 0)


# Why


def test_damage_is_told_from_the_data_sets_folder_on(mine: Path, line: list[Batch]) -> None:
    reader = reader_of(mine)
    tile = line[0].tiles[0]
    shard, row = reader.locate(tile)
    key, name = shard.key(row), f"train/{shard.path.name}"
    shard.path.unlink()
    loader, _ = isolating(reader_of(mine))
    with loader:
        found = loader.next_batch().found
    mine_alone = next(each for each in found if each.tile == tile)
    assert (mine_alone.key, mine_alone.shard) == (key, name)
    assert mine_alone.why == f"cannot open {name}: No such file or directory"
    assert mine_alone.why_in(mine) == f"cannot open {shard.path}: No such file or directory"


def test_of_a_shard_without_an_index_tiles_have_numbers(mine: Path) -> None:
    (mine / "train/00001.index.npy").unlink()
    reader = reader_of(mine)
    assert reader.where(7) == ("train/00001.tar", None)
    told = Damage.of(reader, 7, DatasetError(f"cannot open {mine}/train/00001.index.npy: gone"))
    assert told.name == "number 7 of train" and "/train/00001.index.npy" in told.why_in(mine)


# What passes


class Disk:
    """`os` with a disk that refuses some reads.

    Args:
        refuses: told how often this place was read before; a number of an error, or 0.
    """

    def __init__(self, refuses: Callable[[int], int]) -> None:
        self.reads: dict[tuple[int, int], int] = {}
        self.refused = 0
        self._refuses = refuses

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def preadv(self, descriptor: int, pieces: Any, place: int) -> int:
        what = (os.fstat(descriptor).st_ino, place)
        self.reads[what] = self.reads.get(what, 0) + 1
        number = self._refuses(self.reads[what])
        if number:
            self.refused += 1
            raise OSError(number, os.strerror(number))
        return os.preadv(descriptor, pieces, place)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], int]], Disk]:
    monkeypatch.setattr(module, "_PAUSES", (0.0, 0.0, 0.0))

    def install(refuses: Callable[[int], int]) -> Disk:
        made = Disk(refuses)
        monkeypatch.setattr("agrivision.data.shards.os", made)
        return made

    return install


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_the_disk_refuses_thrice_is_read_the_fourth_time(
    number: int, threads: int, dataset: Path, line: list[Batch], disk
) -> None:
    refusing = disk(lambda reads: number if reads <= 3 else 0)
    loader, _ = isolating(reader_of(dataset), threads=threads)
    with loader:
        for batch, whole in zip(take(loader, 5), line, strict=True):
            assert not batch.left_out and not batch.found
            for slot in range(BATCH):
                assert same_images(batch, slot, whole, slot)
    assert refusing.refused >= 3 * 33


def test_what_the_disk_always_refuses_is_damage_at_last(dataset: Path, line: list[Batch], disk) -> None:
    refusing = disk(lambda reads: errno.EIO)
    loader, _ = isolating(reader_of(dataset), threads=0)
    with loader:
        batch = loader.next_batch()
    assert batch.left_out == set(range(BATCH)) and batch.cut_off
    assert set(refusing.reads.values()) == {4}
    assert "Input/output error" in batch.found[0].why


def test_one_that_is_refused_among_others_is_damage(dataset: Path, line: list[Batch], disk) -> None:
    reader = reader_of(dataset)
    shard, row = reader.locate(line[0].tiles[3])
    what = (shard.path.stat().st_ino, int(shard.index["offsets"][row][0]))
    refusing = disk(lambda reads: 0)
    refusing.preadv = lambda descriptor, pieces, place: (  # type: ignore[method-assign]
        (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
        if (os.fstat(descriptor).st_ino, place) == what
        else os.preadv(descriptor, pieces, place)
    )
    loader, _ = isolating(reader)
    with loader:
        batch = loader.next_batch()
    assert batch.left_out == {3} and not batch.cut_off


def test_a_missing_file_is_not_waited_for(
    mine: Path, monkeypatch: pytest.MonkeyPatch, line: list[Batch]
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("waited"))
    shutil.rmtree(mine / "train")
    loader, _ = isolating(reader_of(mine), threads=0)
    with loader:
        batch = loader.next_batch()
    assert len(batch.found) == BATCH and not batch.cut_off


def test_a_file_that_was_replaced_meanwhile_is_read(
    dataset: Path, mine: Path, line: list[Batch]
) -> None:
    """A repair beside a run: the reader has the damaged file open."""
    reader = reader_of(mine)
    tile = line[2].tiles[0]
    flip(reader, tile)
    shard, _ = reader.locate(tile)
    with pytest.raises(DatasetError):
        reader.read(tile)
    shutil.copy(dataset / "train" / shard.path.name, mine / "new")
    (mine / "new").replace(shard.path)
    with pytest.raises(DatasetError):
        reader.read(tile)
    loader, _ = isolating(reader)
    with loader:
        assert not any(batch.found for batch in take(loader, 5))


# Staged


def test_a_tile_that_is_damaged_in_both_copies_is_named_once(
    mine: Path, line: list[Batch], tmp_path: Path
) -> None:
    schema = Schema.read(mine)
    copy = stage(mine, schema, ("train",), str(tmp_path / "disk"))
    assert copy is not None
    only_copy, both = line[0].tiles[1], line[0].tiles[4]
    for folder, tiles in ((copy, (only_copy, both)), (mine, (both,))):
        for tile in tiles:
            flip(reader_of(folder), tile)
    loader, _ = isolating(StagedSplit(copy, mine, schema, "train"))
    with loader:
        batch = loader.next_batch()
    assert [found.tile for found in batch.found] == [both]
    assert batch.found[0].why_in(mine).count(str(mine)) == 1
    assert same_images(batch, 1, line[0], 1)


# Decoded on a device


def test_what_only_the_devices_decoder_refuses(mine: Path, line: list[Batch]) -> None:
    """Its header is good, so that nobody knows before."""
    pytest.importorskip("torchvision")
    reader = reader_of(mine)
    tile = line[0].tiles[2]
    shard, wanted = reader.locate(tile)
    number = int(shard.path.stem)
    write_again(mine, "train", number, lambda row, files: cut_jpeg(files) if row == wanted else None)
    device = torch.device("cpu")
    loader, _ = isolating(reader_of(mine), decoder="gpu")
    with loader:
        batch = loader.next_batch()
        assert isinstance(batch.pixels, JpegPixels) and not batch.found
        with pytest.raises(DatasetError):
            batch.pixels.to(device)
        failed = batch.pixels.undecodable(device)
        assert list(failed) == [2]
        batch = loader.without(batch, failed)
    assert batch.left_out == {2} and [found.tile for found in batch.found] == [tile]
    decoded = batch.pixels.to(device)
    for plane in decoded.planes:
        assert torch.equal(plane[2], plane[3])
    assert not decoded.labels[2].any()
    batch.pixels.stand_in(5, None)
    assert all(not plane[5].any() for plane in batch.pixels.to(device).planes)
