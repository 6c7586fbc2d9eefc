"""Invented fields: Agriculture-Vision's layout, the same bytes for a seed, every class in its share."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from agrivision.data.sources.synthetic import synthesize
from agrivision.errors import ConfigurationError, ExitCode, NotWritable, SourceError, StorageError

SHARES = {
    "double_plant": 0.0085,
    "drydown": 0.123,
    "endrow": 0.0091,
    "nutrient_deficiency": 0.074,
    "planter_skip": 0.0019,
    "water": 0.01,
    "waterway": 0.0095,
    "weed_cluster": 0.062,
}
LABELLED = ("train", "val")
KEY = re.compile(r"([A-Z0-9]{9})_(\d+)-(\d+)-(\d+)-(\d+)")


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def keys(root: Path, split: str) -> list[str]:
    return sorted(path.stem for path in (root / split / "images" / "rgb").iterdir())


def read_mask(root: Path, split: str, folder: str, key: str) -> NDArray[np.bool_]:
    return np.asarray(Image.open(root / split / folder / f"{key}.png")) > 0


def read_bands(root: Path, split: str, key: str) -> NDArray[np.float32]:
    """Red, green, blue, near-infrared as (height, width, 4)."""
    images = root / split / "images"
    rgb = simplejpeg.decode_jpeg((images / "rgb" / f"{key}.jpg").read_bytes())
    nir = simplejpeg.decode_jpeg((images / "nir" / f"{key}.jpg").read_bytes(), "GRAY")
    return np.concatenate([rgb, nir], axis=-1).astype(np.float32)


def valid(root: Path, split: str, key: str) -> NDArray[np.bool_]:
    return read_mask(root, split, "boundaries", key) & read_mask(root, split, "masks", key)


def labels(root: Path, split: str, key: str) -> dict[str, NDArray[np.bool_]]:
    here = valid(root, split, key)
    return {name: read_mask(root, split, f"labels/{name}", key) & here for name in SHARES}


def label_shares(root: Path, splits: tuple[str, ...]) -> dict[str, float]:
    tiles = [(split, key) for split in splits for key in keys(root, split)]
    pixels = sum(int(valid(root, split, key).sum()) for split, key in tiles)
    masks = [labels(root, split, key) for split, key in tiles]
    return {name: sum(int(mask[name].sum()) for mask in masks) / pixels for name in SHARES}


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 tiles of 64 pixels."""
    out = tmp_path_factory.mktemp("synthetic") / "fields"
    synthesize(out, tiles=96, size=64)
    return out


def test_every_key_is_in_every_folder(fields: Path) -> None:
    for split, number in {"train": 67, "val": 19, "test": 10}.items():
        found = keys(fields, split)
        assert len(found) == number
        names = [*SHARES, "storm_damage"] if split in LABELLED else []
        folders = ["images/nir", "boundaries", "masks", *(f"labels/{name}" for name in names)]
        for folder in folders:
            assert sorted(path.stem for path in (fields / split / folder).iterdir()) == found
    assert not (fields / "test" / "labels").exists()
    assert {path.name for path in (fields / "train" / "labels").iterdir()} == {*SHARES, "storm_damage"}


def test_keys_are_fields_and_coordinates(fields: Path) -> None:
    places: dict[str, set[tuple[int, int]]] = {}
    for split in ("train", "val", "test"):
        for key in keys(fields, split):
            match = KEY.fullmatch(key)
            assert match
            left, top, right, bottom = (int(number) for number in match.groups()[1:])
            assert (right - left, bottom - top) == (64, 64)
            places.setdefault(match[1], set()).add((left % 64, top % 64))
    assert all(len(offsets) == 1 for offsets in places.values())  # one grid for each field


def test_splits_share_no_field(fields: Path) -> None:
    codes = {split: {key[:9] for key in keys(fields, split)} for split in ("train", "val", "test")}
    assert len(set().union(*codes.values())) == sum(len(found) for found in codes.values())
    assert len(codes["train"]) < len(keys(fields, "train")) / 4  # several tiles a field


def test_files_are_what_their_names_say(fields: Path) -> None:
    for path in fields.rglob("*.png"):
        mask = np.asarray(Image.open(path))
        assert mask.shape == (64, 64)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
    key = keys(fields, "train")[0]
    assert Image.open(fields / "train" / "images" / "rgb" / f"{key}.jpg").mode == "RGB"
    assert Image.open(fields / "train" / "images" / "nir" / f"{key}.jpg").mode == "L"


def test_classes_have_the_shares_of_the_real_data(fields: Path) -> None:
    found = label_shares(fields, LABELLED)
    assert all(share / 2 < found[name] < share * 2 for name, share in SHARES.items()), found


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("seed", [1, 2])
def test_48_tiles_have_all_classes_in_train_and_val(tmp_path: Path, size: int, seed: int) -> None:
    synthesize(tmp_path / "out", tiles=48, size=size, seed=seed)
    for split in LABELLED:
        assert min(label_shares(tmp_path / "out", (split,)).values()) > 0


def test_some_tiles_have_two_labels_on_a_pixel(fields: Path) -> None:
    tiles = [labels(fields, split, key) for split in LABELLED for key in keys(fields, split)]
    doubled = [np.stack(list(masks.values())).sum(axis=0).max() > 1 for masks in tiles]
    assert 1 <= sum(doubled) <= 0.1 * len(tiles)
    assert any((masks["double_plant"] & masks["endrow"]).any() for masks in tiles)


def test_fields_have_edges_and_invalid_corners(fields: Path) -> None:
    all_keys = [(split, key) for split in ("train", "val", "test") for key in keys(fields, split)]
    masks = [read_mask(fields, split, "masks", key) for split, key in all_keys]
    bounds = [read_mask(fields, split, "boundaries", key) for split, key in all_keys]
    assert 0 < sum(not mask.all() for mask in masks) < len(masks) / 2
    assert 0 < sum(not bound.all() for bound in bounds) < len(bounds)
    assert np.mean(bounds) > 0.8


def test_what_the_camera_did_not_see_is_black(fields: Path) -> None:
    for split in ("train", "val", "test"):
        for key in keys(fields, split):
            unseen = ~read_mask(fields, split, "masks", key)
            if unseen.sum() > 256:
                assert read_bands(fields, split, key)[unseen].mean() < 8  # JPEG smears the edge


def mean_nir(root: Path, split: str) -> dict[str, float]:
    """Mean near-infrared of each class, and as `crop` of the valid pixels that have no label."""
    values: dict[str, list[NDArray[np.float32]]] = {}
    for key in keys(root, split):
        masks = labels(root, split, key)
        masks["crop"] = valid(root, split, key) & ~np.logical_or.reduce(list(masks.values()))
        nir = read_bands(root, split, key)[..., 3]
        for name, mask in masks.items():
            values.setdefault(name, []).append(nir[mask])
    return {name: float(np.concatenate(parts).mean()) for name, parts in values.items()}


def test_near_infrared_follows_the_vegetation(fields: Path) -> None:
    nir = mean_nir(fields, "train")
    assert nir["weed_cluster"] > nir["crop"] + 15
    assert nir["drydown"] < nir["crop"] - 20
    assert nir["planter_skip"] < nir["crop"] - 5
    assert nir["water"] < nir["crop"] / 2


def test_same_seed_same_bytes_whoever_paints(tmp_path: Path) -> None:
    synthesize(tmp_path / "alone", tiles=24, size=32, seed=7)
    synthesize(tmp_path / "again", tiles=24, size=32, seed=7)
    synthesize(tmp_path / "together", tiles=24, size=32, seed=7, workers=2)
    expected = files(tmp_path / "alone")
    assert files(tmp_path / "again") == expected
    assert files(tmp_path / "together") == expected


def test_other_seed_other_fields(tmp_path: Path) -> None:
    for seed in (0, 1, 2**63 - 1):
        synthesize(tmp_path / str(seed), tiles=3, size=32, seed=seed)
    images = [
        content for path in tmp_path.iterdir() for content in files(path / "train/images").values()
    ]
    assert len(set(images)) == len(images) == 6
    codes = {key[:9] for path in tmp_path.iterdir() for key in keys(path, "train")}
    assert len(codes) == 3


@pytest.mark.parametrize(("tiles", "workers"), [(3, 1), (20, 2)])
def test_reports_every_tile_once(tmp_path: Path, tiles: int, workers: int) -> None:
    reported: list[int] = []
    synthesize(tmp_path / "out", tiles=tiles, size=32, workers=workers, report=reported.append)
    assert sum(reported) == tiles
    assert len(reported) > 1
    assert len(list((tmp_path / "out").glob("*/images/rgb/*.jpg"))) == tiles


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    synthesize(tmp_path / "out", tiles=3, size=32)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_leftovers_of_a_killed_run_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "train").mkdir(parents=True)
    (tmp_path / "out.partial" / "train" / "half.jpg").write_bytes(b"half")
    synthesize(tmp_path / "out", tiles=3, size=32)
    assert not list((tmp_path / "out").rglob("half.jpg"))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    mine = out / "mine.txt" if kind == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SourceError, match="exists") as caught:
        synthesize(out, tiles=3, size=32)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_left_after_a_failure(tmp_path: Path, workers: int) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", tiles=40, size=32, workers=workers, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        synthesize(tmp_path / "out", tiles=3, size=32)
    assert str(tmp_path / "out") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotWritable, match="cannot write"):
        synthesize(tmp_path / "file" / "out", tiles=3, size=32)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tiles", 2), ("size", 24), ("size", 100), ("size", 1032), ("seed", -1), ("workers", 0)],
)
def test_numbers_out_of_range_are_named(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} is {value}"):
        synthesize(tmp_path / "out", **{key: value})
