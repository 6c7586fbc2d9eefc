"""Every layout of Agriculture-Vision, and every way in which a copy can be damaged."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from agrivision.data.labels import VALID_BIT, decompress_into
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.shards import SplitReader
from agrivision.data.sources.agriculture_vision import iterate_images
from agrivision.errors import ExitCode, SourceError
from tests.data import av

KEY = "AAA_0-0-64-64"


def labels_of(reader: SplitReader, tile: int) -> np.ndarray:
    out = np.empty((av.SIZE, av.SIZE), np.uint16)
    decompress_into(reader.read(tile)[-1], out)
    return out


def expected_labels(key: str, layout: dict, year: str, labelled: bool = True) -> np.ndarray:
    bits = np.zeros((av.SIZE, av.SIZE), np.uint16)
    scored = [name for name in av.YEARS[year] if name != "storm_damage"]
    for bit, name in enumerate(av.YEARS[year] if labelled else (), 1):
        bits |= av.mask(key, name, 0.1).astype(np.uint16) << bit
    if labelled:
        bits |= ~np.any([av.mask(key, name, 0.1) for name in scored], axis=0)
    valid = np.all([av.mask(key, name, 0.9) for name in layout["valid"]], axis=0)
    return bits | valid.astype(np.uint16) << VALID_BIT


@pytest.mark.parametrize("year", ["2020", "2021"])
@pytest.mark.parametrize("layout", [av.CHALLENGE, av.PAPER], ids=["challenge", "paper"])
@pytest.mark.parametrize("divided", [True, False], ids=["splits", "undivided"])
def test_every_layout(tmp_path, prepared, layout, year, divided):
    splits = None if divided else {"": av.ids("AAA", 3) + av.ids("BBB", 2)}
    splits = av.write_folder(tmp_path / "source", splits, layout=layout, year=year)
    (tmp_path / "source" / ".DS_Store").write_bytes(b"x")
    summary = prepared(tmp_path / "source", strict=True)
    schema = summary.schema
    assert schema.source == f"agriculture-vision-{year}"
    assert schema.tile == av.SIZE
    assert schema.bands == ("red", "green", "blue", "nir")
    assert len(schema.classes) == {"2020": 7, "2021": 9}[year]
    assert schema.unscored == (("storm_damage",) if year == "2021" else ())
    assert not summary.problem_kinds
    keys = {}
    for name, split in schema.splits.items():
        reader = SplitReader(summary.out, schema, name)
        assert split.labelled == (name != "test")
        for tile in range(len(reader)):
            key = reader.key(tile)
            keys[key] = name
            rgb, nir, _ = reader.read(tile)
            assert (bytes(rgb), bytes(nir)) == (av.jpeg(key, 3), av.jpeg(key, 1))
            wanted = expected_labels(key, layout, year, split.labelled)
            np.testing.assert_array_equal(labels_of(reader, tile), wanted)
    if divided:
        assert keys == {key: name for name, of_split in splits.items() for key in of_split}
    else:
        assert sorted(keys) == sorted(splits[""])
        fields = {(key.split("_")[0], name) for key, name in keys.items()}
        assert sorted(name for _, name in fields) == ["train", "val"]


def test_unscored_only_pixels_are_background(tmp_path, prepared):
    source = tmp_path / "source"
    av.write_tile(source, KEY)
    for name in av.YEARS["2021"]:
        on = np.full((64, 64), name == "storm_damage")
        av.write_png(source / "labels" / name / f"{KEY}.png", on)
    summary = prepared(source)
    labels = labels_of(SplitReader(summary.out, summary.schema, "train"), 0)
    assert np.all(labels & 1)
    assert np.all(labels >> 9 & 1)
    assert summary.schema.label_bits["storm_damage"] == 9


def test_statistics_are_those_of_all_pixels(tmp_path, prepared):
    av.write_folder(tmp_path / "source")
    schema = prepared(tmp_path / "source", shard_tiles=2).schema
    values, classes = [[], [], [], []], np.zeros((2, 9), int)
    for key in av.ids("AAA", 3) + av.ids("BBB", 2):
        labels = expected_labels(key, av.CHALLENGE, "2021")
        valid = labels >> VALID_BIT == 1
        rgb = simplejpeg.decode_jpeg(av.jpeg(key, 3))
        nir = simplejpeg.decode_jpeg(av.jpeg(key, 1), "GRAY")
        for band in range(4):
            values[band] += np.dstack([rgb, nir])[valid][:, band].tolist()
        here = np.array([np.sum(valid & (labels >> c & 1 == 1)) for c in range(9)])
        classes += [here, here > 0]
    statistics = schema.statistics
    n = len(values[0])
    assert statistics.pixels == schema.splits["train"].pixels == n
    assert statistics.mean == tuple(float(Fraction(sum(band), n)) for band in values)
    exact = [Fraction(sum(v * v for v in band), n) - Fraction(sum(band), n) ** 2 for band in values]
    assert statistics.std == tuple(float(v) ** 0.5 for v in exact)
    np.testing.assert_allclose(statistics.std, [np.std(band) for band in values], rtol=1e-12)
    assert statistics.minimum == tuple(map(min, values))
    assert statistics.maximum == tuple(map(max, values))
    assert schema.splits["train"].class_pixels == tuple(classes[0])
    assert schema.splits["train"].class_tiles == tuple(classes[1])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _small(path: Path) -> None:
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(path)


def _small_rgb(path: Path) -> None:
    path.write_bytes(av.jpeg("small", 3, size=32))


def _grey(path: Path) -> None:
    path.write_bytes(av.jpeg("grey", 1))


def _colour(path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)


def _text(path: Path) -> None:
    path.write_text("not an image")


DAMAGES = [
    ("images/rgb", ".jpg", _truncate, "unreadable"),
    ("images/nir", ".jpg", _truncate, "unreadable"),
    ("images/rgb", ".jpg", _text, "unreadable"),
    ("images/rgb", ".jpg", _small_rgb, "wrong size"),
    ("images/rgb", ".jpg", _grey, "wrong size"),
    ("images/rgb", ".jpg", Path.unlink, "unpaired"),
    ("images/nir", ".jpg", Path.unlink, "unpaired"),
    ("boundaries", ".png", Path.unlink, "unpaired"),
    ("boundaries", ".png", _truncate, "unreadable"),
    ("boundaries", ".png", _small, "wrong size"),
    ("masks", ".png", _text, "unreadable"),
    ("masks", ".png", _small, "wrong size"),
    ("labels/water", ".png", Path.unlink, "unpaired"),
    ("labels/water", ".png", _truncate, "unreadable"),
    ("labels/water", ".png", _flip, "unreadable"),
    ("labels/water", ".png", _small, "wrong size"),
    ("labels/water", ".png", _colour, "wrong size"),
    ("labels/storm_damage", ".png", _text, "unreadable"),
]


@pytest.mark.parametrize(("folder", "suffix", "damage", "kind"), DAMAGES)
def test_a_damaged_tile_is_named_and_left_out(tmp_path, prepared, folder, suffix, damage, kind):
    source = tmp_path / "source"
    av.write_folder(source)
    path = source / "train" / folder / f"{KEY}{suffix}"
    damage(path)
    with pytest.raises(SourceError, match=f"{path}") as stopped:
        prepared(source, strict=True)
    assert stopped.value.exit_code == ExitCode.BAD_INPUT
    assert "\n" not in str(stopped.value)
    summary = prepared(source)
    assert summary.problem_kinds == {kind: 1}
    assert [problem.path for problem in summary.problems] == [str(path)]
    assert summary.tiles == 7
    reader = SplitReader(summary.out, summary.schema, "train")
    assert KEY not in [reader.key(tile) for tile in range(len(reader))]


def test_a_missing_class_folder_is_named_and_nothing_is_labelled_so(tmp_path, prepared):
    source = tmp_path / "source"
    av.write_folder(source, {"train": av.ids("AAA", 2)})
    for path in (source / "train/labels/water").iterdir():
        path.unlink()  # an empty folder is as good as none
    summary = prepared(source)
    assert summary.problem_kinds == {"missing class": 1}
    assert summary.problems[0].path == str(source / "train/labels/water")
    assert summary.schema.splits["train"].class_pixels[6] == 0
    with pytest.raises(SourceError, match="labels/water"):
        prepared(source, strict=True)


def test_unknown_class_folders_and_stray_files_are_ignored(tmp_path, prepared):
    source = tmp_path / "source"
    av.write_folder(source, {"train": av.ids("AAA", 2)})
    train = source / "train"
    av.write_png(train / "labels/hail" / f"{KEY}.png", np.ones((64, 64), bool))
    (train / "images/rgb/.DS_Store").write_bytes(b"x")
    (train / "images/rgb/Thumbs.db").write_bytes(b"x")
    (train / "images/rgb/._x.jpg").write_bytes(b"x")
    (train / "labels/water/notes.txt").write_bytes(b"x")
    (train / "labels/.hidden").mkdir()
    (train / "images/rgb/quicklook.png").write_bytes(b"x")
    summary = prepared(source)
    assert summary.tiles == 2
    assert {(problem.path, problem.kind) for problem in summary.problems} == {
        (str(train / "labels/hail"), "unknown class"),
        (str(train / "images/rgb/quicklook.png"), "stray file"),
    }


def test_a_name_that_cannot_be_a_key_and_a_tile_in_two_splits(tmp_path, prepared):
    source = tmp_path / "source"
    av.write_folder(source, {"train": [KEY, "AAA.x_0-0-64-64"], "val": [KEY, "BBB_0-0-64-64"]})
    summary = prepared(source)
    assert summary.problem_kinds == {"bad name": 1, "twice": 1}
    assert {name: split.tiles for name, split in summary.schema.splits.items()} == {
        "train": 1,
        "val": 1,
    }


@pytest.mark.parametrize("folder", ["images/rgb", "images/nir", "boundaries", "masks", "labels"])
def test_a_missing_folder_is_fatal(tmp_path, prepared, folder):
    source = tmp_path / "source"
    av.write_folder(source, {"train": av.ids("AAA", 2)})
    (source / "train" / folder).rename(tmp_path / "gone")
    with pytest.raises(SourceError, match=f"train/{folder}|no class|--edition"):
        prepared(source)
    assert not list(tmp_path.glob("prepared*"))


@pytest.mark.parametrize("missing", [["boundaries"], ["masks"], ["boundaries", "masks"]])
def test_assume_valid(tmp_path, prepared, missing):
    source = tmp_path / "source"
    av.write_folder(source, {"": av.ids("AAA", 1)})
    for name in missing:
        (source / name).rename(tmp_path / name)
    summary = prepared(source, assume_valid=True)
    labels = labels_of(SplitReader(summary.out, summary.schema, "train"), 0)
    valid = np.ones((64, 64), bool)
    for name in {"boundaries", "masks"} - set(missing):
        valid &= av.mask(KEY, name, 0.9)
    np.testing.assert_array_equal(labels >> VALID_BIT == 1, valid)


def test_editions_that_cannot_be_told(tmp_path, prepared):
    source = tmp_path / "source"
    av.write_folder(source, {"": av.ids("AAA", 1)})
    av.write_png(source / "labels/cloud_shadow" / f"{KEY}.png", np.zeros((64, 64), bool))
    with pytest.raises(SourceError, match="--edition 2020 or --edition 2021"):
        prepared(source)
    with pytest.raises(SourceError, match="no edition '2019': there are 2020, 2021"):
        prepared(source, edition="2019")
    assert prepared(source, edition="2021").problem_kinds == {"unknown class": 1}


def test_images_to_predict_on_need_no_labels(tmp_path):
    source = tmp_path / "source"
    av.write_folder(source)
    images = {key: (image, valid) for key, image, valid in iterate_images(source)}
    assert len(images) == 8
    image, valid = images[KEY]
    np.testing.assert_array_equal(image[:3], simplejpeg.decode_jpeg(av.jpeg(KEY, 3)).transpose(2, 0, 1))
    np.testing.assert_array_equal(image[3], simplejpeg.decode_jpeg(av.jpeg(KEY, 1), "GRAY")[..., 0])
    np.testing.assert_array_equal(valid, av.mask(KEY, "boundaries", 0.9) & av.mask(KEY, "masks", 0.9))
    assert [key for key, _, _ in iterate_images(source, ["test"])] == av.ids("DDD", 1)
    with pytest.raises(SourceError, match="no split 'extra'"):
        next(iterate_images(source, ["extra"]))
    with pytest.raises(SourceError, match="has no images/rgb"):
        next(iterate_images(tmp_path))
    (source / "train/masks" / f"{KEY}.png").unlink()
    with pytest.raises(SourceError, match="train/masks"):
        list(iterate_images(source))


def test_no_source(tmp_path):
    with pytest.raises(SourceError, match=r"images/rgb or field_images/rgb.*scenes and labels.*csv"):
        prepare(tmp_path, tmp_path / "out", PrepareOptions())
    with pytest.raises(SourceError, match="no such file or folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out", PrepareOptions())
