"""`inspect --verify` finds every damage, and `prepare --repair` brings the same bytes back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import zstandard

from agrivision.cli import main
from agrivision.data import recipe
from agrivision.data import repair as module
from agrivision.data.inspect import inspect_dataset
from agrivision.data.labels import compress
from agrivision.data.prepare import PrepareOptions, prepare
from agrivision.data.repair import repair
from agrivision.data.schema import Schema, ShardInfo
from agrivision.data.shards import Record, Shard, write_shard
from agrivision.data.sources.source import Silence
from agrivision.errors import Busy, DatasetError, ExitCode, Interrupted, SourceError
from agrivision.locks import FileLock
from tests.data import av, scenes
from tests.data.conftest import tree

SPLITS = {"train": av.ids("AAA", 6) + av.ids("BBB", 5), "val": av.ids("CCC", 4)}
HOW = PrepareOptions(workers=1)


def times(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A source and a data set made from it with options that are not the usual ones, by kind."""
    folder = tmp_path_factory.mktemp("made")
    av.write_folder(folder / "fields", SPLITS)
    # A tile that is left out is left out again.
    (folder / "fields/train/images/rgb" / f"{SPLITS['train'][3]}.jpg").write_bytes(b"x")
    scenes.write_source(folder / "scenes", scenes=3, shape=(4, 70, 90), dtype="float32")
    how = {
        "fields": (folder / "fields", {"shard_tiles": 3}),
        "fields-raw": (folder / "fields", {"shard_tiles": 2, "raw": True}),
        "scenes": (folder / "scenes", {"tile": 32, "stride": 16, "shard_tiles": 8, "val": ("s1",)}),
        "scenes-raw": (folder / "scenes", {"tile": 32, "shard_tiles": 3, "raw": True}),
    }

    def make(kind: str) -> tuple[Path, Path]:
        source, options = how[kind]
        if not (folder / kind / "set").exists():
            prepare(source, folder / kind / "set", PrepareOptions(workers=1, **options))
        return source, folder / kind / "set"

    for kind in how:
        (folder / kind).mkdir(exist_ok=True)
    return make


def shard_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def hurt(random: Random, folder: Path, file: Path) -> None:
    """Damage one file somehow."""
    size = file.stat().st_size
    kind = random.choice(["flip"] * 6 + ["cut", "gone", "longer", "zeros"])
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        os.truncate(file, random.randrange(size))
    elif kind == "longer":
        with file.open("ab") as grown:
            grown.write(bytes(random.randrange(1, 600)))
    else:
        content = bytearray(file.read_bytes())
        place = random.randrange(size)
        if kind == "flip":
            content[place] ^= 1 << random.randrange(8)
        else:
            content[place : place + 512] = bytes(len(content[place : place + 512]))
        file.write_bytes(content)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["fields", "fields-raw", "scenes", "scenes-raw"])
def test_whatever_is_damaged_is_found_and_made_again(
    kind: str, seed: int, made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Any bit of any file: of a record, an index, a tar header, what fills up, the end."""
    source, whole = made(kind)
    mine = Path(shutil.copytree(whole, tmp_path / "set"))
    random = Random(seed)
    hit = random.sample(shard_files(mine), random.randrange(1, 4))
    for file in hit:
        hurt(random, mine, file)
    changed = {name for name, content in tree(whole).items() if tree(mine).get(name) != content}
    found = inspect_dataset(mine, verify=True)
    assert {(damage.split, damage.shard) for damage in found.damage} == {
        (name.split("/")[0], name.split("/")[1].split(".")[0]) for name in changed
    }
    before = times(mine)
    summary = repair(source, mine, HOW)
    assert tree(mine) == tree(whole)
    assert summary.damage == found.damage_count
    after = times(mine)
    touched = {name for name in after if before.get(name) != after[name]}
    assert {name.split(".")[0] for name in touched} == set(summary.shards)
    assert inspect_dataset(mine, verify=True).whole
    before = times(mine)
    assert repair(source, mine, HOW).shards == ()
    assert times(mine) == before


# Damage that no checksum tells


def write_again(
    folder: Path, split: str, number: int, change: Callable[[int, dict[str, bytes]], None]
) -> None:
    """Write a shard with other files, and dataset.json that knows it: all checksums are right."""
    schema = Schema.read(folder)
    info = schema.splits[split].shards[number]
    shard = Shard(folder / split, info, len(schema.parts) + 1)
    extensions = [*(part.extension for part in schema.parts), "labels.zst"]
    records = []
    for row in range(info.tiles):
        files = dict(zip(extensions, map(bytes, shard.read(row)), strict=True))
        change(row, files)
        pixels = shard.index["pixels"][row].tolist()
        field = bytes(shard.index["field"][row]).decode()
        records.append(Record(key=shard.key(row), field=field, files=files, pixels=pixels))
    written = write_shard(folder / split, info.name, records)
    assert isinstance(written, ShardInfo)
    shards = list(schema.splits[split].shards)
    shards[number] = written
    object.__setattr__(schema.splits[split], "shards", tuple(shards))
    schema.write(folder)


def bits_of(files: dict[str, bytes], side: int = av.SIZE) -> np.ndarray:
    plain = zstandard.ZstdDecompressor().decompress(files["labels.zst"])
    return np.frombuffer(plain, np.uint16).reshape(side, side).copy()


def cut_jpeg(files: dict[str, bytes]) -> None:
    files["rgb.jpg"] = files["rgb.jpg"][:-200]


def one_band(files: dict[str, bytes]) -> None:
    files["rgb.jpg"] = files["nir.jpg"]


def another_size(files: dict[str, bytes]) -> None:
    files["nir.jpg"] = av.jpeg("x", 1, size=32)


def no_labels(files: dict[str, bytes]) -> None:
    files["labels.zst"] = b"not zstd"


def fewer_labels(files: dict[str, bytes]) -> None:
    files["labels.zst"] = compress(np.zeros((8, 8), np.uint16))


def other_labels(files: dict[str, bytes]) -> None:
    files["labels.zst"] = compress(np.roll(bits_of(files), 1) & 0x8003)


def unknown_bit(files: dict[str, bytes]) -> None:
    files["labels.zst"] = compress(bits_of(files) | 1 << 13)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_jpeg, "rgb.jpg: not a whole JPEG"),
        (one_band, "rgb.jpg: 64 x 64 pixels with 1 band where 64 x 64 pixels with 3 bands belong"),
        (another_size, "nir.jpg: 32 x 32 pixels"),
        (no_labels, "labels"),
        (fewer_labels, "labels of 128 bytes where 8192 belong"),
        (other_labels, "its labels are not those that were counted"),
        (unknown_bit, "its labels have bits that no label has"),
    ],
)
def test_what_is_wrong_with_a_right_checksum_is_named(
    harm: Callable[[dict[str, bytes]], None], said: str, made, tmp_path: Path
) -> None:
    source, whole = made("fields")
    mine = Path(shutil.copytree(whole, tmp_path / "set"))
    write_again(mine, "train", 1, lambda row, files: harm(files) if row == 2 else None)
    (damage,) = inspect_dataset(mine, verify=True).damage
    assert said in damage.what
    assert (damage.split, damage.shard, damage.row, damage.tiles) == ("train", "00001", 2, 1)
    assert damage.key is not None and damage.key in damage.what
    # dataset.json knows these bytes: no source can give them.
    before = tree(mine)
    with pytest.raises(SourceError, match=r"train/00001, made again from .* is not the one"):
        repair(source, mine, HOW)
    assert tree(mine) == before


def test_pixels_beyond_the_range_are_named(made, tmp_path: Path) -> None:
    """As when bytes of numbers are swapped, or bands mixed up."""
    _, whole = made("scenes-raw")
    mine = Path(shutil.copytree(whole, tmp_path / "set"))

    def swap(row: int, files: dict[str, bytes]) -> None:
        if row == 0:
            files["image.raw"] = np.frombuffer(files["image.raw"], ">f4").astype("<f4").tobytes()

    write_again(mine, "train", 0, swap)
    (damage,) = inspect_dataset(mine, verify=True).damage
    assert "beyond the range of the data set" in damage.what or "not finite" in damage.what


# The commands


def test_the_commands_say_what_they_do(
    made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, whole = made("fields")
    mine = Path(shutil.copytree(whole, tmp_path / "set"))
    schema = Schema.read(mine)
    shard = Shard(mine / "train", schema.splits["train"].shards[2], 3)
    key, start = shard.key(1), int(shard.index["offsets"][1][0])
    with (mine / "train/00002.tar").open("r+b") as file:
        file.seek(start + 40)
        file.write(b"????")
    (mine / "val/00000.tar").unlink()
    found = tmp_path / "found.json"
    assert main(["inspect", str(mine), "--verify", "--json", str(found)]) == ExitCode.BAD_INPUT
    listed = json.loads(found.read_text())
    assert [
        (entry["split"], entry["shard"], entry["row"], entry["key"], entry["kind"])
        for entry in listed["damage"]
    ] == [("train", "00002", 1, key, "tile"), ("val", "00000", None, None, "shard")]
    assert all(entry["what"] for entry in listed["damage"])
    assert listed["damaged_tiles"] == 1 + schema.splits["val"].shards[0].tiles
    capsys.readouterr()
    # Options on the command line do not count: the data set knows its own.
    command = ["prepare", str(source), str(mine), "--repair", "--tile", "17", "--workers", "2"]
    assert main(command) == ExitCode.DONE
    assert "made again, byte for byte: train/00002, val/00000" in capsys.readouterr().out
    assert tree(mine) == tree(whole)
    assert main(["inspect", str(mine), "--verify"]) == ExitCode.DONE
    assert main(command) == ExitCode.DONE
    assert "every record is whole, nothing was changed" in capsys.readouterr().out
    assert main([*command, "--part", "0/2"]) == ExitCode.BAD_INPUT
    assert "leave out --part" in capsys.readouterr().err


def flip(path: Path, place: int = 5000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def damaged(made, tmp_path: Path) -> tuple[Path, Path]:
    """A source that may be changed, and a data set with two damaged shards."""
    source, whole = made("fields")
    mine = Path(shutil.copytree(whole, tmp_path / "set"))
    flip(mine / "train/00000.tar")
    flip(mine / "train/00002.tar")
    return Path(shutil.copytree(source, tmp_path / "source")), mine


def test_what_is_to_be_done_is_what_is_done(damaged: tuple[Path, Path]) -> None:
    class Recorder(Silence):
        wanted = done = 0

        def total(self, tiles: int) -> None:
            self.wanted = tiles

        def advance(self, tiles: int) -> None:
            self.done += tiles

    report = Recorder()
    repair(*damaged, PrepareOptions(workers=1), report)
    tiles = sum(split.tiles for split in Schema.read(damaged[1]).splits.values())
    assert report.wanted == report.done > tiles


@pytest.mark.parametrize("harm", ["another tile", "no tiles", "another label", "other bands"])
def test_a_source_that_has_changed_replaces_nothing(
    harm: str, damaged: tuple[Path, Path], tmp_path: Path
) -> None:
    source, mine = damaged
    key = sorted(SPLITS["train"])[7]  # in the second of the damaged shards
    if harm == "another tile":
        (source / f"train/images/rgb/{key}.jpg").write_bytes(av.jpeg("another", 3))
    elif harm == "no tiles":
        shutil.rmtree(source / "train")
    elif harm == "another label":
        av.write_png(source / f"train/labels/water/{key}.png", av.mask(key, "other", 0.5))
    else:
        shutil.rmtree(source)
        scenes.write_source(source, scenes=3)
    before = tree(mine)
    with pytest.raises(
        SourceError, match="the source has changed since; nothing was replaced"
    ) as error:
        repair(source, mine, HOW)
    assert "\n" not in str(error.value)
    assert tree(mine) == before


def test_another_program_is_named(damaged: tuple[Path, Path]) -> None:
    """Another zstd compresses to other bytes: then it is not the source that has changed."""
    source, mine = damaged
    options, versions = recipe.read_recipe(mine) or ({}, {})
    recipe.write_recipe(mine, options, versions | {"zstd": "1.2.3"})
    flip(source / "train/images/nir" / f"{sorted(SPLITS['train'])[0]}.jpg", 700)
    with pytest.raises(SourceError, match=r"has changed since, or it is that zstd 1\.2\.3 and not"):
        repair(source, mine, HOW)


def test_a_data_set_that_cannot_say_how_it_was_made(damaged: tuple[Path, Path], made) -> None:
    """Older ones; whoever knows the options can give them, and the bytes tell whether he is right."""
    source, mine = damaged
    (mine / recipe.FILE_NAME).unlink()
    before = tree(mine)
    with pytest.raises(SourceError, match=r"cannot say how it was made: give the options"):
        repair(source, mine, PrepareOptions(workers=1, shard_tiles=4))
    assert tree(mine) == before
    repair(source, mine, PrepareOptions(workers=1, shard_tiles=3))
    wanted = tree(made("fields")[1])
    del wanted[recipe.FILE_NAME]
    assert tree(mine) == wanted


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": "agrivision-prepared"}', b"\xff"])
def test_a_recipe_that_is_damaged(content: bytes, damaged: tuple[Path, Path]) -> None:
    source, mine = damaged
    (mine / recipe.FILE_NAME).write_bytes(content)
    with pytest.raises(DatasetError, match=r"cannot read .*prepared\.json"):
        repair(source, mine, HOW)


def test_options_that_nobody_knows(damaged: tuple[Path, Path]) -> None:
    source, mine = damaged
    recipe.write_recipe(mine, {"colour": "green"}, {})
    with pytest.raises(SourceError, match="options of the data set cannot be read"):
        repair(source, mine, HOW)


def test_what_is_no_data_set(tmp_path: Path, made) -> None:
    source, whole = made("fields")
    mine = Path(shutil.copytree(whole, tmp_path / "set"))
    flip(mine / "dataset.json", 60)
    for folder in (mine, tmp_path / "none"):
        with pytest.raises(DatasetError):
            repair(source, folder, HOW)
    assert not (tmp_path / "none").exists()


# Interrupted


@pytest.mark.parametrize("moment", ["looking", "making", "replacing"])
def test_interrupted_it_goes_on(
    moment: str, damaged: tuple[Path, Path], made, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, mine = damaged
    before, whole = tree(mine), tree(made("fields")[1])
    with monkeypatch.context() as patch:
        asked = iter([False] * {"looking": 2, "making": 7}.get(moment, 1000))
        if moment == "replacing":
            rename, left = Path.replace, [1]

            def kill(path: Path, target: Path) -> Path:
                if path.parent.name == "train" and not path.name.startswith("."):
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt
                return rename(path, target)

            patch.setattr(module.Path, "replace", kill)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            repair(source, mine, HOW, stop=lambda: next(asked, True))
    kept = {name: content for name, content in tree(mine).items() if not name.startswith(".repair")}
    assert all(content in (before[name], whole[name]) for name, content in kept.items())
    assert kept.keys() == whole.keys()
    shards = {path: path.stat().st_mtime_ns for path in mine.glob(".repair/train/*.tar")}
    assert bool(shards) == (moment != "looking")
    if moment == "making":  # what was made is not made again
        (first,) = shards
        renamed = []
        rename = Path.replace
        monkeypatch.setattr(
            module.Path, "replace", lambda path, to: renamed.append((path, to)) or rename(path, to)
        )
        repair(source, mine, HOW)
        assert (mine / "train" / first.name).stat().st_mtime_ns == shards[first]
    else:
        repair(source, mine, HOW)
    assert tree(mine) == whole


def test_two_at_once(damaged: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agrivision.locks._PATIENCE_SECONDS", 0.0)
    source, mine = damaged
    with FileLock(mine / ".repair/.prepare/lock") as lock:
        assert lock.take(alone=True)
        with pytest.raises(Busy, match="another process repairs"):
            repair(source, mine, HOW)
    assert repair(source, mine, HOW).shards == ("train/00000", "train/00002")


def test_the_recipe_does_not_depend_on_who_made_it(made, tmp_path: Path) -> None:
    source, whole = made("fields")
    prepare(source, tmp_path / "two", PrepareOptions(workers=2, shard_tiles=3))
    assert tree(tmp_path / "two") == tree(whole)
    options, versions = recipe.read_recipe(whole) or ({}, {})
    assert PrepareOptions.from_dict(options) == PrepareOptions(shard_tiles=3)
    assert set(versions) == {"agrivision", "zstd"}
    assert set((recipe.read_recipe(made("scenes")[1]) or ({}, {}))[1]) == {"agrivision", "zstd", "gdal"}
