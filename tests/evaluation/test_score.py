from __future__ import annotations

import logging
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from agrivision.data.labels import MAX_CLASSES, decompress_into
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import BadInput, DatasetError
from agrivision.evaluation.score import score_folder
from tests.inference.small import CLASSES, TILE, agriculture_vision, keys, prepared

KEYS = keys("val", 6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    return prepared(
        agriculture_vision(folder / "av", {"train": 1, "val": 6, "test": 1}), folder / "data"
    )


@pytest.fixture(scope="module")
def truth(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each pixel's labels the one with the lowest id."""
    folder = tmp_path_factory.mktemp("truth")
    reader = SplitReader(dataset, Schema.read(dataset), "val")
    for tile in range(len(reader)):
        labels = np.empty((TILE, TILE), np.uint16)
        decompress_into(reader.read(tile)[-1], labels)
        bits = np.stack([(labels >> bit) & 1 for bit in range(MAX_CLASSES)])[: len(CLASSES)]
        Image.fromarray(bits.argmax(0).astype(np.uint8)).save(folder / f"{reader.key(tile)}.png")
    return folder


@pytest.fixture
def copy(truth: Path, tmp_path: Path) -> Path:
    return shutil.copytree(truth, tmp_path / "predictions")


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.glob("*.png")):
            archive.write(file, f"{prefix}{file.name}")
    return path


def test_the_truth_scores_one(dataset: Path, truth: Path) -> None:
    done: list[int] = []
    found = score_folder(truth, dataset, "val", done.append)
    assert found.miou == 1.0
    assert set(found.iou.values()) == {1.0}
    pixels = Schema.read(dataset).splits["val"].class_pixels
    assert [found.confusion[c][c] for c in range(len(CLASSES))] == list(pixels)
    assert sum(done) == len(KEYS)


def test_a_zip_and_a_subfolder_score_the_same(dataset: Path, copy: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((TILE, TILE), 3, np.uint8)).save(copy / f"{KEYS[0]}.png")
    wanted = score_folder(copy, dataset, "val")
    assert wanted.miou is not None
    assert 0 < wanted.miou < 1
    before = set(tmp_path.rglob("*"))
    flat, nested = tmp_path / "flat.zip", tmp_path / "nested.zip"
    assert score_folder(zipped(copy, flat), dataset, "val") == wanted
    assert score_folder(zipped(copy, nested, "a/../../b/"), dataset, "val") == wanted
    assert set(tmp_path.rglob("*")) == before | {flat, nested}  # nothing is unpacked
    (tmp_path / "out").mkdir()
    copy.rename(tmp_path / "out" / "labels")
    assert score_folder(tmp_path / "out", dataset, "val") == wanted


def refused(folder: Path, dataset: Path) -> str:
    with pytest.raises(BadInput) as error:
        score_folder(folder, dataset, "val")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_pngs_are_counted_and_the_first_named(dataset: Path, copy: Path) -> None:
    for key in KEYS[1:]:
        (copy / f"{key}.png").unlink()
    line = refused(copy, dataset)
    assert "5 of the 6" in line
    assert KEYS[1] in line
    assert KEYS[4] not in line


def test_others_are_only_warned_of(dataset: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(copy / f"{KEYS[0]}.png", copy / "stranger.png")
    with caplog.at_level(logging.WARNING):
        assert score_folder(copy, dataset, "val").miou == 1.0
    assert "stranger.png" in caplog.text


def write_with_shape(path: Path, height: int, width: int) -> None:
    Image.fromarray(np.zeros((height, width), np.uint8)).save(path)


def write_with_id(path: Path) -> None:
    Image.fromarray(np.full((TILE, TILE), 9, np.uint8)).save(path)


def write_in_mode(path: Path, mode: str) -> None:
    Image.fromarray(np.zeros((TILE, TILE), np.uint8)).convert(mode).save(path)


def write_bomb(path: Path) -> None:
    """A header that promises 100,000 x 100,000 pixels."""
    fields = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + fields
    content = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def write_too_few_rows(path: Path) -> None:
    """All is whole, but there are fewer rows than the header says."""
    Image.fromarray(np.zeros((TILE - 5, TILE), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[20:24] = struct.pack(">I", TILE)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "size": (lambda path: write_with_shape(path, TILE, TILE + 1), f"{TILE + 1} x {TILE} pixels"),
    "id": (write_with_id, "value 9"),
    "palette": (lambda path: write_in_mode(path, "P"), "a palette, 8 bits"),
    "colours": (lambda path: write_in_mode(path, "RGB"), "RGB, 8 bits"),
    "one bit": (lambda path: write_in_mode(path, "1"), "grey, 1 bits"),
    "sixteen bits": (lambda path: write_in_mode(path, "I;16"), "grey, 16 bits"),
    "bomb": (write_bomb, "100000 x 100000"),
    "not a PNG": (lambda path: path.write_bytes(b"GIF89a"), "not a PNG"),
    "empty": (lambda path: path.write_bytes(b""), "not a PNG"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "not a whole PNG"),
    "damaged": (damage, "not a whole PNG"),
    "too few rows": (write_too_few_rows, "not a whole PNG"),
}


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_png_is_named_with_what_is_wrong(
    dataset: Path, copy: Path, tmp_path: Path, how: str, packed: bool
) -> None:
    spoil, words = BAD[how]
    spoil(copy / f"{KEYS[2]}.png")
    line = refused(zipped(copy, tmp_path / "a.zip") if packed else copy, dataset)
    assert f"{KEYS[2]}.png" in line
    assert words in line


def test_pngs_with_words_in_them_score_the_same(dataset: Path, copy: Path) -> None:
    """Pillow reads these, and libpng those that hold pixels alone."""
    words = PngInfo()
    words.add_text("a", "b")
    for path in copy.glob("*.png"):
        with Image.open(path) as image:
            image.copy().save(path, pnginfo=words)
    assert score_folder(copy, dataset, "val").miou == 1.0


def test_a_pipe_is_not_waited_for(dataset: Path, copy: Path, tmp_path: Path) -> None:
    path = copy / f"{KEYS[2]}.png"
    path.unlink()
    os.mkfifo(path)
    assert f"{KEYS[2]}.png in {copy}: it is no plain file" in refused(copy, dataset)
    os.mkfifo(tmp_path / "a.zip")
    assert "it is no plain file" in refused(tmp_path / "a.zip", dataset)


def test_two_pngs_of_one_tile(dataset: Path, copy: Path) -> None:
    (copy / "labels").mkdir()
    shutil.copy(copy / f"{KEYS[0]}.png", copy / "labels" / f"{KEYS[0]}.png")
    assert "two PNGs" in refused(copy, dataset)


def test_a_damaged_zip(dataset: Path, copy: Path, tmp_path: Path) -> None:
    path = zipped(copy, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    assert f"{KEYS[0]}.png" in refused(path, dataset)
    path.write_bytes(content[: len(content) // 2])
    assert "neither a folder nor a zip" in refused(path, dataset)
    assert "neither a folder nor a zip" in refused(tmp_path / "nowhere", dataset)


def test_splits_that_cannot_be_scored(dataset: Path, truth: Path) -> None:
    for split, words in {"test": "no labels", "other": "no split 'other'"}.items():
        with pytest.raises(DatasetError, match=words):
            score_folder(truth, dataset, split)
