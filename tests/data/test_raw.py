"""Raw shards: the same pixels, labels and coordinates, uncompressed."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from agrivision.cli import main
from agrivision.data.inspect import inspect_dataset
from agrivision.data.loader import evaluation_batches
from agrivision.data.parts import (
    PLACE,
    RAW_IMAGE,
    decode_part,
    decode_place,
    encode_place,
    encode_raw,
    tiff_coordinates,
)
from agrivision.data.schema import Part, Schema
from agrivision.data.shards import SplitReader
from agrivision.data.tile import MAX_KEY, Coordinates
from agrivision.errors import DatasetError
from agrivision.world import World
from tests.data import scenes

RAW = Part(extension=RAW_IMAGE, bands=3)


def reader_of(dataset: Path, split: str) -> SplitReader:
    return SplitReader(dataset, Schema.read(dataset), split)


@pytest.fixture(scope="module")
def raw(fields: Path) -> Path:
    out = fields.with_name("raw")
    options = ["--raw", "--workers", "1", "--shard_tiles", "7"]
    assert main(["prepare", str(fields), str(out), *options]) == 0
    return out


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("threads", [0, 3])
def test_the_same_tiles_as_from_jpeg(dataset: Path, raw: Path, split: str, threads: int) -> None:
    readers = [reader_of(folder, split) for folder in (dataset, raw)]
    loaded = [evaluation_batches(reader, World(), batch_size=5, threads=threads) for reader in readers]
    tiles = 0
    for jpeg, plain in zip(*loaded, strict=True):
        assert torch.equal(jpeg.pixels.images(), plain.pixels.images())
        assert torch.equal(jpeg.pixels.labels, plain.pixels.labels)
        assert plain.pixels.images().is_contiguous(memory_format=torch.channels_last)
        tiles += len(plain.tiles)
    assert tiles == len(readers[0])
    assert [readers[0].key(n) for n in range(tiles)] == [readers[1].key(n) for n in range(tiles)]


@pytest.mark.parametrize("refuses", [False, True])
def test_tiles_are_announced_to_the_disk(
    dataset: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    announced: list[tuple[int, int, int]] = []

    def note(descriptor: int, start: int, length: int, advice: int) -> None:
        announced.append((start, length, advice))
        if refuses:
            raise OSError(errno.ENOSYS, "")

    monkeypatch.setattr(os, "posix_fadvise", note)
    for folder in (raw, dataset):
        reader, wanted = reader_of(folder, "val"), []
        announced.clear()
        for batch in evaluation_batches(reader, World(), batch_size=5, threads=2):
            for tile in batch.tiles:
                shard, row = reader.locate(tile)
                offsets, sizes = shard.index["offsets"][row], shard.index["sizes"][row]
                length = int(offsets[-1] + sizes[-1] - offsets[0])
                wanted.append((int(offsets[0]), length, os.POSIX_FADV_WILLNEED))
        assert sorted(announced) == (sorted(wanted) if folder == raw else [])


def test_what_is_known_of_the_data_is_the_same(dataset: Path, raw: Path) -> None:
    jpeg, plain = Schema.read(dataset), Schema.read(raw)
    assert plain.parts == (Part(extension="image.raw", bands=4),)
    assert plain.statistics == jpeg.statistics
    assert plain.label_bits == jpeg.label_bits
    assert {name: split.class_pixels for name, split in plain.splits.items()} == {
        name: split.class_pixels for name, split in jpeg.splits.items()
    }
    assert plain.fingerprint != jpeg.fingerprint
    assert inspect_dataset(raw, verify=True).whole


def test_other_programs_read_it(raw: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    reader = reader_of(raw, "train")
    path = raw / "train/00000.tar"
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    with tarfile.open(path) as tar:
        assert tar.getnames()[:2] == [f"{reader.key(0)}.{end}" for end in ("image.raw", "labels.zst")]
    (batch, *_) = evaluation_batches(reader, World(), batch_size=len(samples), threads=0)
    for slot, sample in enumerate(samples):
        assert sample["__key__"] == reader.key(slot)
        pixels = np.frombuffer(sample["image.raw"], np.uint8).reshape(64, 64, 4)
        assert np.array_equal(pixels, batch.pixels.planes[0][slot].numpy())


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
def test_scenes_of_every_type_keep_pixels_and_coordinates(tmp_path, prepared, dtype) -> None:
    source = tmp_path / "source"
    scenes.write_source(source, scenes=2, shape=(3, 40, 50), dtype=dtype)
    usual = prepared(source, tile=32, val=("s1.tif",), shard_tiles=3)
    plain = prepared(source, tile=32, val=("s1.tif",), shard_tiles=3, raw=True)
    assert [part.extension for part in plain.schema.parts] == ["image.raw", "place.json"]
    readers = [SplitReader(each.out, each.schema, "train") for each in (usual, plain)]
    batches = [evaluation_batches(reader, World(), batch_size=3, threads=2) for reader in readers]
    for tiff, raw in zip(*batches, strict=True):
        assert raw.pixels.planes[0].dtype == tiff.pixels.planes[0].dtype
        assert torch.equal(raw.pixels.planes[0], tiff.pixels.planes[0])
        assert len(raw.pixels.planes) == 1
        assert torch.equal(raw.pixels.labels, tiff.pixels.labels)
    for tile in range(len(readers[0])):
        assert readers[1].key(tile) == readers[0].key(tile)
        _, place, _ = readers[1].read(tile)
        coordinates = tiff_coordinates(readers[0].read(tile)[0])
        assert coordinates is not None
        assert decode_place(place) == coordinates
    assert inspect_dataset(plain.out, verify=True).whole


def test_a_place_is_json() -> None:
    where = Coordinates(crs="", transform=(2.0, 0.0, 10.0, 0.0, -2.0, 20.5))
    assert json.loads(encode_place(where)) == {"crs": "", "transform": [2.0, 0, 10.0, 0, -2.0, 20.5]}
    assert decode_place(encode_place(where)) == where
    assert decode_place(encode_place(None)) is None
    for wrong in (b"", b"{", b"3", b'{"crs": ""}', b'{"crs": "", "transform": [1, 2]}'):
        with pytest.raises(DatasetError, match=r"^place.json: not the coordinates of a tile$"):
            decode_part(wrong, Part(extension=PLACE, bands=0), "uint8", 8)
    assert len(f"{'k' * MAX_KEY}.{PLACE}") <= 100


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_raw_files_are_pixels_in_order(dtype: str) -> None:
    image = scenes.noise(0, (3, 8, 8), dtype)
    content = encode_raw(image)
    assert content == b"".join(
        image[band, row, column].astype(image.dtype.newbyteorder("<")).tobytes()
        for row in range(8)
        for column in range(8)
        for band in range(3)
    )
    assert np.array_equal(decode_part(content, RAW, dtype, 8).transpose(2, 0, 1), image)
    size = len(content)
    with pytest.raises(DatasetError, match=rf"^image.raw: {size - 1} bytes where {size} belong$"):
        decode_part(content[:-1], RAW, dtype, 8)
