"""The shard format: what goes in comes out, other programs read it, and damage is named."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision.data import shards
from agrivision.data.inspect import inspect_dataset
from agrivision.data.parts import decode_part, encode_tiff, tiff_coordinates
from agrivision.data.schema import FILE_NAME, Part, Schema
from agrivision.data.shards import Record, Scratch, Shard, SplitReader, write_shard
from agrivision.data.statistics import BandSums, Sums, add_up
from agrivision.data.tile import MAX_KEY, Coordinates, is_key, safe_name
from agrivision.errors import DatasetError
from tests.data import av, scenes

NAMES = st.text("abcXYZ019_-", min_size=1, max_size=MAX_KEY)
FILES = st.tuples(st.binary(max_size=2000), st.binary(max_size=600), st.binary(max_size=20))
EXTENSIONS = ("rgb.jpg", "nir.jpg", "labels.zst")


@pytest.fixture
def dataset(tmp_path, prepared):
    """Three shards of train with two tiles at most, one of val."""
    splits = {"train": av.ids("AAA", 5), "val": av.ids("BBB", 2)}
    av.write_folder(tmp_path / "source", splits)
    return prepared(tmp_path / "source", shard_tiles=2).out


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(NAMES, FILES, min_size=1, max_size=8), st.text("xyz", max_size=5))
def test_what_is_written_is_read(tiles, field):
    records = [
        Record(key=key, field=field, files=dict(zip(EXTENSIONS, files, strict=True)), pixels=[len(key)])
        for key, files in tiles.items()
    ]
    with tempfile.TemporaryDirectory() as name:
        info = write_shard(Path(name), "00000", records)
        again = write_shard(Path(name), "00001", records)
        assert (info.bytes, info.index) == (again.bytes, again.index)
        shard = Shard(Path(name), info, 3)
        for row, (key, files) in enumerate(tiles.items()):
            assert shard.key(row) == key
            assert tuple(map(bytes, shard.read(row))) == files
            assert shard.index["pixels"][row] == [len(key)]
            assert shard.index["field"][row] == field.encode()


def test_tar_and_webdataset_read_it(dataset, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = dataset / "train/00000.tar"
    listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    keys = av.ids("AAA", 5)
    keys = sorted(keys)[:2]
    assert listed.stdout.split() == [f"{key}.{extension}" for key in keys for extension in EXTENSIONS]
    assert listed.stderr == ""
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == keys
    for sample in samples:
        key = sample["__key__"]
        for extension in ("rgb", "nir"):
            source = tmp_path / "source/train/images" / extension / f"{key}.jpg"
            assert sample[f"{extension}.jpg"] == source.read_bytes()


def test_no_records_make_no_shard(tmp_path):
    assert write_shard(tmp_path, "00000", iter(())) is None
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_leaves_no_shard(tmp_path):
    def records():
        yield Record(key="a", field="", files={"rgb.jpg": b"1", "labels.zst": b"2"}, pixels=[1])
        raise DatasetError("no more")

    with pytest.raises(DatasetError, match="no more"):
        write_shard(tmp_path, "00000", records())
    assert list(tmp_path.iterdir()) == []


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(bytes(content))


def test_a_flipped_bit_names_the_tile(dataset):
    schema = Schema.read(dataset)
    info = schema.splits["train"].shards[1]
    shard = Shard(dataset / "train", info, 3)
    flip(shard.path, int(shard.index["offsets"][1][2]) + 5)
    reader = SplitReader(dataset, schema, "train")
    key = reader.key(3)
    with pytest.raises(DatasetError, match=rf"tile {key} in .*train/00001.tar is damaged"):
        reader.read(3)
    assert reader.read(2)
    inspection = inspect_dataset(dataset, verify=True)
    assert (inspection.damaged_tiles, inspection.damage_count, inspection.whole) == (1, 1, False)
    assert key in inspection.damage[0].what
    assert inspection.damage[0].path == str(shard.path)


@pytest.fixture(params=[False, True])
def either(request, tmp_path, prepared):
    """A data set of JPEG files, and one of raw ones."""
    av.write_folder(tmp_path / "either", {"train": av.ids("AAA", 2), "val": av.ids("BBB", 1)})
    return prepared(tmp_path / "either", raw=request.param).out


def test_any_single_byte_that_is_damaged_is_found(either):
    reader, scratch = SplitReader(either, Schema.read(either), "train"), Scratch()
    shard, row = reader.locate(1)
    entry = shard.index[row]
    offsets, sizes = entry["offsets"].tolist(), entry["sizes"].tolist()
    into = [memoryview(bytearray(size)) for size in sizes]
    places = [
        place
        for offset, size in zip(offsets, sizes, strict=True)
        for place in range(offset, offset + size)
    ]
    assert len(places) == sum(sizes) > 3000
    whole, found = [bytes(file) for file in reader.read(1)], 0
    with shard.path.open("r+b", buffering=0) as file:
        for number, place in enumerate(places):
            byte = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << number % 8]), place)
            try:
                reader.read(1, into if number % 2 else (), scratch)
            except DatasetError:
                found += 1
            os.pwrite(file.fileno(), byte, place)
    assert found == len(places)
    assert [bytes(file) for file in reader.read(1)] == whole


def test_files_go_where_they_are_wanted(dataset):
    reader, scratch = SplitReader(dataset, Schema.read(dataset), "train"), Scratch()
    for tile in range(len(reader)):
        expected = [bytes(file) for file in reader.read(tile)]
        for wanted in range(8):
            into = [
                memoryview(bytearray(len(file))) if wanted >> number & 1 else None
                for number, file in enumerate(expected)
            ]
            files = reader.read(tile, into, scratch)
            assert [bytes(file) for file in files] == expected
            for place, file in zip(into, files, strict=True):
                assert place is None or place is file
        short = memoryview(bytearray(len(expected[0]) - 1))
        files = reader.read(tile, [short], scratch)
        assert bytes(files[0]) == expected[0]
        assert bytes(short) == bytes(len(short))


def count_calls(monkeypatch, name):
    """Calls of a function of the module, by the name of the shard."""
    calls, original = Counter(), getattr(shards, name)

    def counted(folder, info, *rest):
        calls[info.name] += 1
        return original(folder, info, *rest)

    monkeypatch.setattr(shards, name, counted)
    return calls


def held_open(folder):
    names = [path.name for path in Path("/proc/self/fd").iterdir()]
    return sum(os.path.realpath(f"/proc/self/fd/{name}").startswith(str(folder)) for name in names)


def test_indexes_are_kept_and_few_shards_open(dataset, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_OPEN", 2)
    indexes, opened = (count_calls(monkeypatch, name) for name in ("_read_index", "_open"))
    schema = Schema.read(dataset)
    reader = SplitReader(dataset, schema, "train")
    assert not indexes and not opened
    reader.read(4)
    assert indexes == opened == {"00002": 1}
    del reader
    indexes.clear(), opened.clear()
    reader = SplitReader(dataset, schema, "train")
    for tile in [0, 2, 4] * 3:
        reader.read(tile)
        assert held_open(dataset) <= 2
    assert indexes == {"00000": 1, "00001": 1, "00002": 1}
    assert opened.total() == 9  # the least recently used is the next one wanted
    del reader
    assert held_open(dataset) == 0
    monkeypatch.setattr(shards, "_INDEX_BYTES", 1)
    reader = SplitReader(dataset, schema, "train")
    indexes.clear()
    for tile in [0, 1, 4, 0]:
        reader.read(tile)
    assert indexes == {"00000": 2, "00002": 1}


@pytest.mark.parametrize(
    ("limit", "most"), [(resource.RLIM_INFINITY, 256), (1 << 20, 256), (1024, 128), (4, 1)]
)
def test_open_shards_leave_descriptors_to_others(limit, most, monkeypatch):
    monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (limit, limit))
    assert shards._most_open() == most


def test_a_shard_that_opens_slowly_stops_nobody_else(dataset, monkeypatch):
    opens, go_on, original = threading.Event(), threading.Event(), shards._open

    def slow(folder, info):
        if info.name == "00000":
            opens.set()
            assert go_on.wait(60)
        return original(folder, info)

    monkeypatch.setattr(shards, "_open", slow)
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(reader.read, 0) for _ in range(2)]
        assert opens.wait(60)
        try:
            assert pool.submit(reader.read, 4).result(timeout=60)
            assert not any(future.done() for future in waiting)
        finally:
            go_on.set()
        first, second = ([*map(bytes, future.result())] for future in waiting)
    assert first == second
    assert held_open(dataset) == 2


def test_a_truncated_shard(dataset):
    path = dataset / "train/00001.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    reader = SplitReader(dataset, Schema.read(dataset), "train")
    with pytest.raises(DatasetError, match=r"00001.tar has \d+ bytes instead of \d+"):
        reader.read(2)
    assert reader.read(4)


def test_dataset_json_that_was_edited(dataset):
    path = dataset / FILE_NAME
    content = json.loads(path.read_text())
    content["splits"]["train"]["tiles"] = 4
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="its fingerprint differs"):
        inspect_dataset(dataset)
    path.write_text("{")
    with pytest.raises(DatasetError, match="cannot read"):
        Schema.read(dataset)


def test_everything_damaged_is_named(dataset):
    whole = inspect_dataset(dataset, verify=True)
    assert whole.whole
    assert (whole.damaged_tiles, whole.left_over) == (0, ())
    assert whole.bytes == sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    json.dumps(whole.to_dict())
    assert whole.lines()[-1] == "every record is whole"
    assert [line.split()[:2] for line in whole.lines() if line.startswith(("train", "nir"))][1] == [
        "train",
        "5",
    ]
    (dataset / "train/00000.tar").unlink()
    flip(dataset / "train/00001.index.npy", -1)
    flip(dataset / "train/00002.tar", 3)  # in a header: our own reader does not need it
    flip(dataset / "val/00000.tar", 600)
    (dataset / "val/notes.txt").write_text("x")
    found = inspect_dataset(dataset, verify=True)
    assert [(Path(problem.path).name, problem.kind) for problem in found.damage] == [
        ("00000.tar", "shard"),
        ("00001.index.npy", "shard"),
        ("00002.tar", "header"),
        ("00000.tar", "tile"),
    ]
    assert (found.damaged_tiles, found.damage_count) == (5, 4)
    assert found.left_over == ("val/notes.txt",)
    assert found.damaged
    assert found.lines()[-1] == "4 damages, 5 tiles cannot be used"
    assert "val/notes.txt: does not belong to the data set" in found.lines()
    assert all("\n" not in str(problem) for problem in found.damage)
    quick = inspect_dataset(dataset)
    assert (quick.damage_count, quick.damaged_tiles, quick.verified) == (2, 4, False)
    assert found.to_dict()["damage"][0]["kind"] == "shard"


RGB = Part(extension="rgb.jpg", bands=3)
TIFF = Part(extension="image.tif", bands=4)


def test_images_are_decoded_in_place():
    content = memoryview(av.jpeg("a", 3))
    out = np.zeros((64, 64, 3), np.uint8)
    assert decode_part(content, RGB, "uint8", 64, out) is out
    np.testing.assert_array_equal(out, simplejpeg.decode_jpeg(content))
    image = scenes.noise(0, (4, 64, 64), "uint16")
    out = np.zeros((64, 64, 4), np.uint16)
    assert decode_part(encode_tiff(image, None, None), TIFF, "uint16", 64, out) is out
    np.testing.assert_array_equal(out.transpose(2, 0, 1), image)
    with pytest.raises(ValueError, match="cannot decode"):
        decode_part(content, RGB, "uint8", 64, out)


@pytest.mark.parametrize(
    "content", [av.jpeg("a", 3), encode_tiff(scenes.noise(0, (4, 64, 64)), None, None)]
)
def test_damaged_images_are_one_line(content, capfd):
    part = RGB if content[:2] == b"\xff\xd8" else TIFF
    for damaged in (
        b"",
        b"x" * 100,
        content[:20],
        content[: len(content) // 2],
        content[: len(content) * 9 // 10],
    ):
        with pytest.raises(DatasetError, match=rf"^{part.extension}: not a whole") as error:
            decode_part(damaged, part, "uint8", 64)
        assert "\n" not in str(error.value)
    with pytest.raises(DatasetError, match=r"64 x 64 pixels with .* where 32 x 32"):
        decode_part(content, part, "uint8", 32)
    with pytest.raises(DatasetError, match="belong"):
        decode_part(content, Part(extension=part.extension, bands=1), "uint8", 64)
    assert capfd.readouterr() == ("", "")


def test_a_tiff_that_claims_to_be_huge_is_refused():
    wide = encode_tiff(np.zeros((4, 1, 60_000), np.uint8), None, None)
    with pytest.raises(DatasetError, match="60000 x 1 pixels"):
        decode_part(wide, TIFF, "uint8", 64)
    with pytest.raises(DatasetError, match="image files of type 'gif'"):
        decode_part(b"", Part(extension="gif", bands=1), "uint8", 64)


def test_a_tiff_says_where_it_lies():
    image = scenes.noise(0, (2, 8, 8), "float32")
    assert tiff_coordinates(encode_tiff(image, None, None)) is None
    where = Coordinates(crs="", transform=(2.0, 0.0, 10.0, 0.0, -2.0, 20.0))
    assert tiff_coordinates(encode_tiff(image, where, None)) == where
    assert encode_tiff(image, where, 1.0) == encode_tiff(image, where, 1.0)


@pytest.mark.parametrize("key", ["", "a.b", "a b", "a/b", "ä", "a" * (MAX_KEY + 1)])
def test_keys(key):
    assert not is_key(key)
    assert is_key(safe_name(key) + "_123456-123456-123456-123456")
    assert safe_name("a" * 80 + "1") != safe_name("a" * 80 + "2")


@settings(deadline=None)
@given(st.permutations(range(6)), st.integers(0, 6), st.sampled_from(["float32", "int16"]))
def test_sums_do_not_depend_on_the_order(order, cut, dtype):
    tiles = [
        Sums.of(
            scenes.noise(seed, (2, 8, 8), dtype),
            scenes.noise(seed, (8, 8), "uint16"),
            [10 * seed, 0, 1],
        )
        for seed in range(6)
    ]
    whole = add_up(tiles, bands=2, classes=3)
    shuffled = [tiles[i] for i in order]
    parts = [add_up(shuffled[:cut], bands=2, classes=3), add_up(shuffled[cut:], bands=2, classes=3)]
    parts = [Sums.from_dict(json.loads(json.dumps(part.to_dict()))) for part in parts]
    assert add_up(parts, bands=2, classes=3) == whole
    assert Sums.none(1, 0).bands == (BandSums(),)
