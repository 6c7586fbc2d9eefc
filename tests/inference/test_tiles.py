from __future__ import annotations

import csv
import dataclasses
import logging
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.data.sources.agriculture_vision import iterate_images
from agrivision.distributed import Ranks
from agrivision.errors import BadInput, DatasetError, NotWritable, SourceError
from agrivision.evaluation.evaluate import evaluate
from agrivision.evaluation.presence import tile_scores
from agrivision.evaluation.score import score_folder
from agrivision.inference.predict import PredictOptions, predict
from agrivision.inference.tilesets import batched, check_keys, open_dataset
from agrivision.inference.trained import TrainedModel
from agrivision.world import World
from tests.inference.small import CLASSES, TILE, agriculture_vision, keys, trained_model, write_tile

ONE = PredictOptions(batch_size=1, threads=0)


def ids_in(out: Path) -> dict[str, NDArray[np.uint8]]:
    found = {}
    for path in (out / "labels").glob("*.png"):
        with Image.open(path) as image:
            assert image.mode == "L"
            found[path.stem] = np.array(image)
    return found


def files(out: Path) -> dict[str, bytes]:
    """All files, but for what is known of how they came to be."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and ".predict" not in path.parts
    }


def test_a_downloaded_folder_gives_the_predictions_of_its_pixels(
    trained: TrainedModel, source: Path, tmp_path: Path
) -> None:
    summary = predict(trained, [source], tmp_path, ONE)
    found = ids_in(tmp_path)
    images = {key: image for key, image, _ in iterate_images(source)}
    assert summary.tiles == 14
    assert (
        sorted(found) == sorted(images) == sorted(keys("train", 5) + keys("val", 6) + keys("test", 3))
    )
    for key, image in images.items():
        np.testing.assert_array_equal(found[key], trained.predict(image))
    assert len(np.unique(np.stack(list(found.values())))) >= 3  # or the test would prove little


def test_a_prepared_data_set_gives_the_same_as_the_folder_it_came_from(
    trained: TrainedModel, source: Path, dataset: Path, tmp_path: Path
) -> None:
    predict(trained, [source], tmp_path / "a", ONE)
    predict(trained, [dataset], tmp_path / "b", ONE)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_the_split_asked_for(
    trained: TrainedModel, source: Path, dataset: Path, tmp_path: Path, split: str
) -> None:
    count = {"val": 6, "test": 3}[split]
    for name, path in {"a": source, "b": dataset}.items():
        predict(trained, [path], tmp_path / name, PredictOptions(split=split))
        assert sorted(ids_in(tmp_path / name)) == keys(split, count)


def test_the_score_of_the_pngs_is_the_score_of_the_evaluation(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    predict(trained, [dataset], tmp_path, PredictOptions(split="val", batch_size=4))
    reader = SplitReader(dataset, Schema.read(dataset), "val")
    wanted = evaluate(
        trained.module,
        reader,
        trained.description.normaliser,
        Ranks(World()),
        trained.device,
        batch_size=4,
        threads=0,
    )
    assert wanted is not None
    for place in (tmp_path, tmp_path / "labels", tmp_path / "submission.zip"):
        assert score_folder(place, dataset, "val") == wanted.scores
    assert sum(map(sum, wanted.scores.confusion)) > 6 * TILE * TILE // 2


def test_the_size_of_the_batch_decides_ties_at_most(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    found = []
    for size in (1, 3, 8):
        predict(trained, [dataset], tmp_path / str(size), PredictOptions(batch_size=size))
        found.append(ids_in(tmp_path / str(size)))
    for other in found[1:]:
        assert sum(np.count_nonzero(other[key] != found[0][key]) for key in other) <= 2


def test_the_submission_has_fixed_bytes_and_the_pngs_at_its_top(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        predict(trained, [dataset], tmp_path / name, PredictOptions(split="test"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with zipfile.ZipFile(tmp_path / "a" / "submission.zip") as archive:
        assert archive.namelist() == [f"{key}.png" for key in keys("test", 3)]
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert archive.read(info) == (tmp_path / "a" / "labels" / info.filename).read_bytes()


def test_presence_is_the_score_of_the_valid_pixels(
    trained: TrainedModel, source: Path, tmp_path: Path
) -> None:
    predict(trained, [source], tmp_path, PredictOptions(split="val", batch_size=1))
    with (tmp_path / "presence.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["key", *CLASSES]
    assert [row[0] for row in rows[1:]] == keys("val", 6)
    for row, (_, image, valid) in zip(rows[1:], iterate_images(source, ["val"]), strict=True):
        assert not valid.all()
        wanted = tile_scores(trained.probabilities(image[None]), torch.from_numpy(valid)[None])[0]
        assert row[1:] == [f"{score:.4f}" for score in wanted.tolist()]


def test_tiles_of_other_sizes_keep_theirs(trained: TrainedModel, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    sizes = {f"F_{n}-0-1-1": (48, 64, 80)[n % 3] for n in range(7)}
    for key, size in sizes.items():
        write_tile(tmp_path / "av", key, generator, size)
    predict(trained, [tmp_path / "av"], tmp_path / "out", PredictOptions(batch_size=2))
    assert {key: ids.shape[0] for key, ids in ids_in(tmp_path / "out").items()} == sizes


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), max_size=30), batch_size=st.integers(1, 5))
def test_batches_hold_every_tile_once_and_one_size_each(sizes: list[int], batch_size: int) -> None:
    tiles = [
        (str(n), np.full((1, side, side), n, np.uint8), np.ones((side, side), np.bool_))
        for n, side in enumerate(sizes)
    ]
    batches = list(batched(tiles, batch_size))
    assert sorted(int(key) for batch in batches for key in batch.keys) == list(range(len(sizes)))
    for batch in batches:
        assert 1 <= len(batch.keys) <= batch_size
        assert batch.images[:, 0, 0, 0].tolist() == [int(key) for key in batch.keys]
        assert batch.valid.shape == batch.images[:, 0].shape


def test_old_files_are_replaced_and_strangers_left_alone(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "mine.png").write_bytes(b"mine")
    (tmp_path / "labels" / f"{keys('test', 1)[0]}.png").write_bytes(b"old")
    (tmp_path / "submission.zip").write_bytes(b"old")
    predict(trained, [dataset], tmp_path, PredictOptions(split="test"))
    assert (tmp_path / "labels" / "mine.png").read_bytes() == b"mine"
    assert (tmp_path / "labels" / f"{keys('test', 1)[0]}.png").read_bytes().startswith(b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert len(archive.namelist()) == 3
    assert not list(tmp_path.rglob("*.part"))


def test_several_inputs_go_into_one_submission(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    other = agriculture_vision(tmp_path / "more", {"train": 0})
    write_tile(other, "OTHER_0-0-64-64", np.random.default_rng(1))
    summary = predict(trained, [dataset, other], tmp_path / "out", PredictOptions())
    assert summary.tiles == 15
    with zipfile.ZipFile(tmp_path / "out" / "submission.zip") as archive:
        assert "OTHER_0-0-64-64.png" in archive.namelist()
    assert "15 tiles" in summary.lines()[0]


def refused(trained: TrainedModel, inputs: list[Path], out: Path, options: PredictOptions = ONE) -> str:
    with pytest.raises(BadInput) as error:
        predict(trained, inputs, out, options)
    line = str(error.value)
    assert "\n" not in line
    assert not out.exists()
    return line


def test_other_bands_are_named(tmp_path: Path, source: Path, dataset: Path) -> None:
    other = trained_model(tmp_path, bands=("red", "green", "nir"), mean=(0.0,) * 3, std=(1.0,) * 3)
    for path in (source, dataset):
        line = refused(other, [path], tmp_path / "out")
        assert "red, green, blue, nir" in line
        assert "red, green, nir" in line


def test_the_same_tile_twice(
    trained: TrainedModel, source: Path, dataset: Path, tmp_path: Path
) -> None:
    line = refused(trained, [source, dataset], tmp_path / "out", PredictOptions(split="val"))
    assert keys("val", 1)[0] in line
    assert str(source) in line
    assert str(dataset) in line


def test_a_key_that_leads_out_of_the_folder(trained: TrainedModel, dataset: Path) -> None:
    (tiles,) = open_dataset(dataset, "test", trained.description)
    hostile = dataclasses.replace(tiles, keys=("../../x", *tiles.keys[1:]))
    with pytest.raises(SourceError, match="not a file's name"):
        check_keys([hostile])


@pytest.mark.parametrize("kind", ["source", "dataset"])
def test_a_split_that_is_not_there(
    trained: TrainedModel, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    line = refused(trained, [path], tmp_path / "out", PredictOptions(split="holdout"))
    assert "'holdout'" in line
    assert "train, val, test" in line


def test_a_tile_that_lacks_a_band_is_found_before_anything_is_written(
    trained: TrainedModel, source: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "val" / "images" / "nir" / f"{keys('val', 3)[2]}.jpg").unlink()
    assert keys("val", 3)[2] in refused(trained, [copy], tmp_path / "out")


def test_a_damaged_image_ends_the_work_and_leaves_whole_files(
    trained: TrainedModel, source: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    path = copy / "val" / "images" / "rgb" / f"{keys('val', 6)[5]}.jpg"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(SourceError, match=path.name):
        predict(trained, [copy], tmp_path / "out", PredictOptions(split="val", batch_size=2))
    assert all(ids.shape == (TILE, TILE) for ids in ids_in(tmp_path / "out").values())
    assert {Path(name).suffix for name in files(tmp_path / "out")} <= {".png"}


def test_a_damaged_record_is_an_error_of_the_data_set(
    trained: TrainedModel, dataset: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    shard = copy / "val" / "00001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match="checksum"):
        predict(trained, [copy], tmp_path / "out", PredictOptions(split="val", batch_size=2))
    assert not (tmp_path / "out" / "submission.zip").exists()


def test_a_place_that_cannot_be_written(trained: TrainedModel, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotWritable, match="cannot write"):
        predict(trained, [dataset], tmp_path / "file" / "out", ONE)


def test_strays_beside_the_images_do_not_matter(
    trained: TrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = agriculture_vision(tmp_path / "av", {"val": 1})
    (folder / "val" / "images" / "rgb" / "Thumbs.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert predict(trained, [folder], tmp_path / "out", ONE).tiles == 1
