"""What the campaigns found, once each: refused in one line, without the memory that was asked for."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import rasterio
import simplejpeg
import xxhash
import yaml
import zstandard
from PIL import Image as Pillow
from rasterio.transform import Affine

from agrivision import checkpoint
from agrivision.config import Config
from agrivision.data.labels import compress, decompress_into
from agrivision.data.parts import _has_one_scan, decode_part, decode_place, jpeg_shape, tiff_coordinates
from agrivision.data.schema import FILE_NAME, MAX_TILE, Part, Schema
from agrivision.data.shards import Record, Shard, write_shard
from agrivision.data.sources.masks import MaskReader
from agrivision.data.sources.pairs import Pair, find_pairs
from agrivision.data.sources.rasters import opened
from agrivision.data.sources.source import Flaw, content_of
from agrivision.data.sources.survey import _look
from agrivision.data.workplace import Workplace
from agrivision.ending import read_endings
from agrivision.errors import BadInput, CheckpointError, ConfigurationError, DatasetError, SourceError
from agrivision.evaluation.score import score_folder
from agrivision.fence import read_owner
from agrivision.inference.journal import read_records
from agrivision.json_values import parse
from agrivision.monitor.metrics import keep_steps
from agrivision.options import parse_train, read_config, to_yaml
from agrivision.rundir import RunDirectory
from launch.jobdir import JobDirectory, JobSpec
from tests.fuzz import checkpoints, pngs, schema, tiff

SIDE = 16
DEEP = b"[" * 100_000 + b"]" * 100_000
MOST_MEMORY = 128 << 20  # far less than any of the lies asks for


@contextmanager
def little_memory():
    """Fails where much memory is taken, for however short a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


@pytest.fixture
def memory():
    with little_memory():
        yield


@pytest.fixture
def shard(tmp_path):
    """A function that writes a shard with another index, whose digest fits, and opens it."""
    records = [
        Record(
            key=f"tile{n}",
            field="f",
            files={"image.raw": b"x" * 70, "labels.zst": b"y" * 9},
            pixels=[n],
        )
        for n in range(3)
    ]
    info = write_shard(tmp_path, "00000", records)
    path = tmp_path / "00000.index.npy"

    def open_with(index: np.ndarray | bytes) -> Shard:
        file = io.BytesIO()
        if isinstance(index, bytes):
            file.write(index)
        else:
            np.save(file, index, allow_pickle=True)
        path.write_bytes(file.getvalue())
        digest = xxhash.xxh3_128_hexdigest(file.getvalue())
        return Shard(tmp_path, dataclasses.replace(info, index=digest), 2)

    return np.load(path), open_with


def test_a_good_index_is_taken(shard):
    index, open_with = shard
    assert [bytes(file) for file in open_with(index).read(2)] == [b"x" * 70, b"y" * 9]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offsets", 2**64 - 1),
        ("offsets", 0),
        ("offsets", 513),
        ("sizes", 2**32 - 1),
        ("sizes", 600),
        ("key", b"../../x"),
        ("key", b""),
        ("key", b"a\0b"),
        ("key", b"tile0"),
        ("key", b"\xff"),
    ],
)
def test_an_index_that_lies_is_refused(shard, memory, column, value):
    index, open_with = shard
    index[column][1] = value
    with pytest.raises(DatasetError, match=r"00000\.index\.npy"):
        open_with(index)


def test_other_arrays_are_no_index(shard, memory):
    index, open_with = shard
    objects = index.astype([("key", "O"), *((n, index.dtype[n]) for n in index.dtype.names[1:])])
    whole = io.BytesIO()
    np.save(whole, index)
    content = whole.getvalue()
    for other in (
        b"",
        b"\x93NUMPY",
        content[:-1],
        content + b"x",
        content.replace(b"(3,)", b"(9,)"),
        content.replace(b"'fortran_order': False", b"'fortran_order': True "),
        content.replace(b"<u8", b"<i8"),
        b"\x93NUMPY\x01\x00\x76\x00" + b"{".ljust(118),
        objects,
        index["offsets"],
        np.zeros((), index.dtype),
        index[:0],
    ):
        with pytest.raises(DatasetError, match=r"00000\.index\.npy") as refusal:
            open_with(other)
        assert "\n" not in str(refusal.value)


def test_an_index_that_is_a_pipe_is_refused(shard, tmp_path):
    _, open_with = shard
    path = tmp_path / "00000.tar"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DatasetError, match="no plain file"):
        open_with(np.load(tmp_path / "00000.index.npy"))


def test_labels_are_one_frame_and_nothing_else():
    labels = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)
    out = np.empty_like(labels)
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(labels.astype("<u2").tobytes())
    for good in (compress(labels), checked, compress(np.zeros_like(labels))):
        decompress_into(good, out)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    for bad in (compress(labels) + b"x", checked * 2, checked[:-1], bomb, b"", b"\x28\xb5\x2f\xfd"):
        with little_memory(), pytest.raises(DatasetError):
            decompress_into(bad, out)


def test_a_jpeg_that_says_it_is_huge_is_refused(memory):
    file = io.BytesIO()
    Pillow.new("RGB", (SIDE, SIDE)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    with pytest.raises(DatasetError, match="larger than any tile"):
        jpeg_shape(bytes(content))


def test_an_integer_of_hundreds_of_digits_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"optimizer: {{lr: 1{'0' * 400}}}\n")
    with pytest.raises(ConfigurationError, match=r"config.yaml: optimizer.lr is too large a number"):
        read_config(path)
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigurationError, match="command line is too large"):
        read_config(path, ["--optimizer.lr", f"1{'0' * 400}"])


@pytest.mark.parametrize(
    "name", ["1e3", "1.5E-3", "-2_0e+1", "1e3x", "null", "true", "2024-01-01", "0x1", "7"]
)
def test_a_folder_of_any_name_is_the_same_when_it_is_read_again(name, tmp_path):
    path = tmp_path / "config.yaml"
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, path=name))
    path.write_text(to_yaml(config.to_dict()))
    assert read_config(path) == config


@pytest.mark.parametrize("name", [b"of_the_band", b"of_the_system"])
def test_a_raster_with_a_text_that_is_no_utf8_is_refused(name, tmp_path):
    path = tmp_path / "scene.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=SIDE, height=SIDE, count=1, dtype="uint8",
        crs=rasterio.CRS.from_wkt('LOCAL_CS["of_the_system",UNIT["metre",1]]'),
        transform=Affine(1, 0, 5, 0, -1, 5),
    ) as dataset:  # fmt: skip
        dataset.write(np.ones((1, SIDE, SIDE), np.uint8))
        dataset.set_band_description(1, "of_the_band")
    with opened(path) as dataset:
        assert dataset.descriptions == ("of_the_band",)
    content = path.read_bytes()
    assert name in content
    path.write_bytes(content.replace(name, b"\xe4" + name[1:]))
    with pytest.raises(Flaw, match="no UTF-8"), opened(path):
        pass


def test_a_jpeg_whose_subsampling_has_no_name_is_refused():
    content = bytearray(
        simplejpeg.encode_jpeg(np.zeros((SIDE, SIDE, 3), np.uint8), colorsubsampling="440")
    )
    assert jpeg_shape(content) == (SIDE, SIDE, 3)
    content[content.index(b"\xff\xc0") + 11] = 0x14  # 4:4:1: four rows of light to one of colour
    with pytest.raises(DatasetError, match="subsampling"):
        jpeg_shape(bytes(content))


def test_a_jpeg_of_thousands_of_scans_is_refused():
    file = io.BytesIO()
    Pillow.new("L", (512, 512), 77).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    assert jpeg_shape(content) == (512, 512, 1)
    scan = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(DatasetError, match="scans"):
        jpeg_shape(content[:-2] + scan * 5000 + content[-2:])
    assert not _has_one_scan(content)
    for colours in ({}, {"colorspace": "GRAY", "colorsubsampling": "Gray"}):
        bands = 1 if colours else 3
        plain = simplejpeg.encode_jpeg(np.zeros((SIDE, SIDE, bands), np.uint8), **colours)
        assert _has_one_scan(plain)


def test_tiffs_that_prepare_did_not_write_are_refused():
    tile = np.zeros((1, 24, 24), np.uint8)
    part = Part(extension="image.tif", bands=1)
    with pytest.raises(DatasetError, match="blocks are larger"):
        decode_part(tiff.encode(tile, tile=64), part, "uint8", 24)
    with rasterio.MemoryFile() as file:
        with file.open(driver="GTiff", width=24, height=24, count=1, dtype="complex_int16"):
            pass
        with pytest.raises(DatasetError, match="complex_int16"):
            decode_part(file.getbuffer(), part, "uint8", 24)
    with pytest.raises(DatasetError, match="empty"):
        tiff_coordinates(b"")


@pytest.mark.parametrize(
    "transform", ["[1, 2, 3, 4, 5, NaN]", f"[1, 2, 3, 4, 5, 1{'0' * 400}]", '["1", 2, 3, 4, 5, 6]']
)
def test_a_place_has_six_finite_numbers(transform):
    with pytest.raises(DatasetError, match="coordinates"):
        decode_place(f'{{"crs": "", "transform": {transform}}}'.encode())
    with pytest.raises(DatasetError, match="coordinates"):
        decode_place(DEEP)


def test_json_that_is_nested_too_deep_is_a_value_error():
    with pytest.raises(ValueError, match="too deep"):
        parse(DEEP)


def _changed(content: dict, path: str, value: object) -> dict:
    *way, last = path.split(".")
    node = content
    for key in way:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tile", "64"),
        ("tile", 64.5),
        ("tile", 10**9),
        ("tile", True),
        ("tile", 0),
        ("dtype", "O"),
        ("dtype", "S99999999"),
        ("parts.0.bands", -1),
        ("parts.0.extension", "../x"),
        ("nodata", float("nan")),
        ("classes.1.name", "valid"),
        ("classes.1.name", "a\nb"),
        ("class_values", [1]),
        ("splits.train.tiles", 4),
        ("splits.train.shards.0.name", "../../00000"),
        ("splits.train.shards.0.tiles", 0),
        ("splits.train.shards.0.bytes", 2**64),
        ("splits.train.shards.0.index", None),
        ("splits.train.class_pixels", [10**9, 0]),
        ("splits.train.class_tiles", [1]),
        ("splits.train.labelled", 1),
        ("splits", {"../x": None}),
        ("statistics.mean", [1.0]),
        ("statistics.std.0", -1.0),
        ("statistics.mean.0", float("inf")),
    ],
)
def test_a_description_whose_fingerprint_fits_is_still_checked(tmp_path, path, value):
    schema._good().write(tmp_path)
    file = tmp_path / FILE_NAME
    content = _changed(json.loads(file.read_bytes()), path, value)
    file.write_bytes(schema._fitted(json.dumps(content).encode()))
    with pytest.raises(DatasetError, match=r"dataset\.json is damaged|too large"):
        Schema.read(tmp_path)


def test_a_description_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(DEEP)
    with pytest.raises(DatasetError, match="nested too deep"):
        Schema.read(tmp_path)


def test_tiles_that_no_index_can_hold_are_refused():
    with pytest.raises(DatasetError, match="too large"):
        schema._good(tile=MAX_TILE, dtype="float64")


def test_masks_and_predictions_have_one_header(tmp_path):
    """A second one would ask Pillow for a picture of another size than the one that was checked."""
    own = pngs._SIGNATURE + pngs.header(SIDE, SIDE)
    body = pngs._png(pngs._ids(0))[len(own) :]
    path = tmp_path / "mask.png"
    dataset, _ = pngs._dataset(tmp_path, 1)
    (tmp_path / "predicted").mkdir()
    for content in (
        own + pngs.header(65_535, 65_535) + body,
        pngs._SIGNATURE + pngs.header(65_535, 65_535) + body,
        body,
        b"",
    ):
        path.write_bytes(content)
        with little_memory(), pytest.raises(Flaw, match="mask"):
            MaskReader(size=(SIDE, SIDE)).read(path)
        (tmp_path / "predicted" / "tile0.png").write_bytes(content)
        with little_memory(), pytest.raises(BadInput, match="tile0"):
            score_folder(tmp_path / "predicted", dataset, "val")


def test_a_mask_that_is_a_pipe_or_huge_is_refused(tmp_path, memory):
    pipe, huge = tmp_path / "pipe.png", tmp_path / "huge.png"
    os.mkfifo(pipe)
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    reader = MaskReader(size=(SIDE, SIDE))
    for path in (pipe, huge):
        with pytest.raises(Flaw, match=path.name):
            reader.read(path)
        with pytest.raises(Flaw, match=path.name):
            content_of(path)


def test_zip_members_that_take_much_memory_are_refused(tmp_path):
    dataset, _ = pngs._dataset(tmp_path, 1)
    path = tmp_path / "predicted.zip"
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("tile0.png", pngs._png(pngs._ids(0)))
        with pytest.raises(BadInput, match="stored or deflated"):
            score_folder(path, dataset, "val")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tile0.png", pngs._SIGNATURE + bytes(1 << 28))
    with little_memory(), pytest.raises(BadInput, match=r"tile0\.png"):
        score_folder(path, dataset, "val")


def _scene(path: Path, **options: object) -> Path:
    path.write_bytes(tiff.encode(np.zeros((1, 20, 28), np.uint8), **options))
    return path


@pytest.mark.parametrize(
    "transform",
    [Affine(1, 0, 0, 0, 0, 0), Affine(1, 0, float("nan"), 0, 1, 0), Affine(1, 2, 0, 2, 4, 0)],
)
def test_scenes_that_lie_nowhere_are_flaws(tmp_path, transform):
    scene, label = _scene(tmp_path / "s.tif", transform=transform), _scene(tmp_path / "l.tif")
    for pair in ((scene, label), (label, scene)):
        with pytest.raises(Flaw, match="no place on the ground"):
            _look(Pair(name="s", scene=pair[0], label=pair[1]), None, named=True)


@pytest.mark.parametrize(("tag", "value"), [(257, 2**31 - 1), (256, 2**31 - 1), (278, 1)])
def test_headers_that_ask_for_more_than_the_file_has_are_flaws(tmp_path, memory, tag, value):
    path = _scene(tmp_path / "s.tif")
    content = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", content, place)[0] == tag:
            struct.pack_into("<HII", content, place + 2, 4, 1, value)
        if tag == 278 and struct.unpack_from("<H", content, place)[0] == 257:
            struct.pack_into("<HII", content, place + 2, 4, 1, 60_000)
    path.write_bytes(content)
    with pytest.raises(Flaw, match=r"s\.tif"), opened(path):
        pass


def test_a_table_with_names_that_no_file_can_have_is_read(tmp_path):
    table = tmp_path / "pairs.csv"
    table.write_text(f"scene,label\n{'x' * 300}.tif,la.tif\n")
    pairs, problems = find_pairs(table)
    assert (pairs, {problem.kind for problem in problems}) == ([], {"unpaired"})
    table.write_text("scene,la\x1d\x1b[31mbel\n")
    with pytest.raises(SourceError) as refusal:
        find_pairs(table)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "data: " + "[" * 5000,
        "seed: 1\nseed: 2\n",
        "data: {path: a}\nmodel: {depth: 3}\ndata: {path: b}\n",
        "data: &a {path: x}\nmodel: *a\n",
        "data: &a {path: x}\nmodel: {<<: *a}\n",
        "# " + "x" * 70_000,
        "data: {1: 2}\n1: 2\n",
        "seed: 2001-02-30\n",
        f"seed: {'9' * 5000}\n",
        f"seed: {2**63}\n",
        "seed: null\n",
        "data: {path: null}\n",
        "training: {epochs: null}\n",
        "optimizer: {lr: .nan}\n",
        "optimizer: {lr: .inf}\n",
        "seed: !!python/object/apply:os.getpid []\n",
        "seed: \x00\n",
        "\udcff",
    ],
)
def test_configurations_that_are_none_are_one_line(tmp_path, memory, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError) as refusal:
        read_config(path)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 2100


def test_billions_of_laughs_are_not_laughed(tmp_path, memory):
    path = tmp_path / "config.yaml"
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigurationError, match="write it out"):
        read_config(path)


def test_a_value_may_be_named_and_used_again(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("seed: &n 3\ndata: {threads: *n}\n")
    config = read_config(path)
    assert (config.seed, config.data.threads) == (3, 3)
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert read_config(path) == config != Config()


def test_every_configuration_of_a_command_line_is_looked_at(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("seed: 3\n")
    bad.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigurationError, match="stands twice"):
        parse_train(["--run_dir", "run", "--config", str(good), f"--config={bad}"])
    for argument in ("a\0b", "\udcff"):
        with pytest.raises(BadInput, match="not plain text"):
            parse_train(["--run_dir", argument])


_OWNER = {"token": "t", "job": "1", "restart": 0, "step_id": 0, "host": "h", "pid": 1}


@pytest.mark.parametrize(
    "content",
    [DEEP, b"[]", *(json.dumps(_OWNER | {name: None}).encode() for name in _OWNER), b'{"token": "t"}'],
)
def test_an_owner_that_is_none_is_nobody(tmp_path, content):
    path = tmp_path / "attempt.json"
    path.write_bytes(json.dumps(_OWNER).encode())
    assert read_owner(path) is not None
    path.write_bytes(content)
    assert read_owner(path) is None


def test_endings_that_are_none_are_passed_over(tmp_path):
    good = {"code": 1, "line": "x", "traceback": "", "time": 1.0}
    contents = [DEEP, b"[]", *(json.dumps(good | {name: []}).encode() for name in good)]
    contents += [json.dumps(good | {"time": float("inf")}).encode()]
    for content in contents:
        (tmp_path / "rank-0.json").write_bytes(content)
        assert read_endings(tmp_path) == []
    (tmp_path / "rank-0.json").write_text(json.dumps(good))
    assert [ending.line for ending in read_endings(tmp_path)] == ["x"]


def test_a_job_has_a_list_of_words_to_run(tmp_path):
    directory = JobDirectory(tmp_path)
    good = json.loads(JobSpec(command=("train",), python=("python",)).to_json())
    contents = [DEEP, b"[]"]
    for name, value in (
        ("command", "train"),
        ("command", []),
        ("command", ["a\0b"]),
        ("python", [1]),
        ("max_attempts", "3"),
        ("signal_seconds", -1),
        ("cwd", None),
        ("resources", []),
    ):
        contents.append(json.dumps(good | {name: value}).encode())
    for content in contents:
        directory.spec_file.write_bytes(content)
        with pytest.raises(BadInput, match=r"job\.json"):
            directory.spec()
    directory.spec_file.write_text(json.dumps(good))
    assert directory.spec().command == ("train",)


def test_rows_of_attempts_that_are_none_are_passed_over(tmp_path):
    good = {"number": 1, "job": "7", "nodes": ["a"], "tasks": 1, "began": 1.0}
    bad = [good | {"number": n, name: value} for n, name, value in (
        (2, "nodes", None), (3, "nodes", "abc"), (4, "job", None), (5, "ended", "x"), (6, "code", [1]),
        (7, "preempted", "no"), (8, "began", float("nan")),
    )]  # fmt: skip
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in [*bad, good, good | {"number": "9"}])
    (tmp_path / "attempts.jsonl").write_bytes(DEEP + b"\n" + rows)
    assert [attempt.number for attempt in JobDirectory(tmp_path).attempts()] == [1]
    (tmp_path / "submissions.jsonl").write_bytes(b'{"job": ["x"]}\n{"job": "-u root"}\n{"job": "7"}\n')
    assert JobDirectory(tmp_path).jobs() == ["7"]


def test_scores_are_shares_and_steps_whole_numbers(tmp_path):
    rows = [("3", "0.5"), ("4", "NaN"), ("5", "7"), ('"6"', "0.1"), ("true", "0.9"), ("7", "null")]
    lines = [f'{{"kind": "evaluation", "step": {step}, "miou": {miou}}}\n' for step, miou in rows]
    run = RunDirectory(tmp_path)
    run.metrics.write_bytes(DEEP + b"\n" + "".join(lines).encode())
    assert run.evaluations() == {3: 0.5, 7: None}
    assert keep_steps(run.metrics, 4) > 0
    assert [json.loads(line)["step"] for line in run.metrics.read_bytes().splitlines()] == [3, 4]


def test_a_record_that_says_it_is_huge_ends_a_journal(tmp_path, memory):
    path = tmp_path / "journal"
    good = struct.pack("<IQ", 1, xxhash.xxh3_64_intdigest(b"x")) + b"x"
    path.write_bytes(b"agrivision d\n" + good + struct.pack("<IQ", 2**32 - 1, 0))
    assert list(read_records(path, "d")) == [b"x"]


def test_a_note_with_another_number_is_none(tmp_path):
    place = Workplace(tmp_path / "set")
    place.own("").mkdir(parents=True)
    place.make_folders(["train"])
    place.write_note("train", "00000", {"pixels": 3})
    assert place.note("train", "00000") == {"pixels": 3}
    path = place._note("train", "00000")
    path.write_bytes(path.read_bytes().replace(b"3", b"4", 1))
    assert place.note("train", "00000") is None
    for content in (DEEP, b"[]", b'{"plan": "x", "parts": "3"}'):
        path.write_bytes(content)
        place.own("parts.json").write_bytes(content)
        assert place.note("train", "00000") is None
        assert place.agreement() is None


def test_a_state_of_a_checkpoint_is_an_object(tmp_path):
    """`dict` takes a list of pairs as well."""
    folder = checkpoint.save(tmp_path, {"progress": {"a": 1}}, step=1, epoch=0)
    for content in (b'[["a", 1]]', DEEP):
        (folder / "progress.json").write_bytes(content)
        about = json.loads((folder / checkpoint.MANIFEST).read_bytes())
        file = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        fitting = json.dumps(about | {"files": {"progress.json": file}}).encode()
        (folder / checkpoint.MANIFEST).write_bytes(checkpoints._fitted(fitting))
        with pytest.raises(CheckpointError, match=r"progress\.json"):
            checkpoint.load(folder)


def test_png_pixels_by_hand_are_those_of_pillow():
    """The slow reference of the campaign is one."""
    for seed in range(5):
        ids = pngs._ids(seed) * 200
        assert np.array_equal(pngs._slowly(pngs._png(ids)), ids)
    assert (
        pngs._slowly(
            pngs._SIGNATURE + pngs.header(SIDE, SIDE) + pngs.chunk(b"IDAT", zlib.compress(b""))
        )
        is None
    )


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_a_block_that_unpacks_to_too_much_is_known(tiled: bool, interleave: str) -> None:
    image = np.random.default_rng(0).normal(size=(2, 48, 40)).astype(np.float32)
    whole = tiff.encode(image, tile=16 if tiled else 0, compress="deflate", interleave=interleave)
    assert not tiff.overflows(whole)
    with rasterio.MemoryFile(whole) as memory, memory.open() as dataset:
        names = ("BLOCK_OFFSET_0_0", "BLOCK_SIZE_0_0")
        start, size = (int(dataset.get_tag_item(name, "TIFF", 1)) for name in names)
    longer = zlib.compress(bytes(48 * 40 * 2 * 4 + 100)).ljust(size, b"\0")
    assert len(longer) == size
    assert tiff.overflows(whole[:start] + longer + whole[start + size :])
    assert not tiff.overflows(tiff.encode(image))
