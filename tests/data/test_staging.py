"""Staging: the run is the same, the copy is good or not used, and whatever fails costs one line."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from agrivision.config import DataConfig
from agrivision.data import staging
from agrivision.data.schema import FILE_NAME, Schema
from agrivision.data.shards import Shard, SplitReader
from agrivision.data.staging import StagedSplit, file_system, stage
from agrivision.errors import ConfigurationError, ExitCode, StorageError
from agrivision.world import expand_variables
from tests.data.conftest import tree
from tests.disks import make_read_only, small_disk
from tests.heard import hear_one
from tests.ranks import Disturbance, run
from tests.training.runs import arguments, assert_same

SPLITS = ("train", "val")


@pytest.fixture(scope="module")
def unstaged(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that reads the shared data set."""
    run_dir = tmp_path_factory.mktemp("unstaged")
    assert run(arguments(dataset, run_dir), 2) == [0, 0]
    return run_dir


@pytest.fixture
def mine(dataset: Path, tmp_path: Path) -> Path:
    """The data set once more, to damage it."""
    return shutil.copytree(dataset, tmp_path / "shared")


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of this module; other tests may have switched off what caplog relies on."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    staging.log.addHandler(handler)
    yield lines
    staging.log.removeHandler(handler)


def stage_here(folder: Path, place: Path | str, splits: tuple[str, ...] = SPLITS) -> Path | None:
    return stage(folder, Schema.read(folder), splits, str(place))


def files_of(folder: Path, splits: tuple[str, ...] = SPLITS) -> dict[str, bytes]:
    return {
        name: content
        for name, content in tree(folder).items()
        if name == FILE_NAME or Path(name).parts[0] in splits
    }


def left_in(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if not path.name.endswith(".lock")]


def flip(path: Path, where: int) -> None:
    with path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0] ^ 1
        file.seek(where)
        file.write(bytes([byte]))


def flip_record(folder: Path, split: str, shard: int, row: int) -> str:
    """Flip a bit inside of a record; returns the tile's key."""
    schema = Schema.read(folder)
    opened = Shard(folder / split, schema.split(split).shards[shard], len(schema.parts) + 1)
    flip(opened.path, int(opened.index["offsets"][row][0]) + 5)
    return opened.key(row)


def logged(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "log").glob("rank-*.log")))


# The whole run


def count_copies(file: Path, rank: int) -> None:
    copy_file = staging._copy_file

    def counted(source: Path, target: Path, stop) -> None:
        with file.open("a") as lines:
            lines.write(f"{source.parent.name}/{source.name}\n")
        copy_file(source, target, stop)

    staging._copy_file = counted


def test_a_staged_run_is_the_same_run(dataset: Path, tmp_path: Path, unstaged: Path) -> None:
    """Started by name of a variable; the shared shards are gone when it starts once more."""
    shared, disk = shutil.copytree(dataset, tmp_path / "shared"), tmp_path / "disk"
    environment = partial(set_variable, "SLURM_TMPDIR", str(disk))
    first, second = (tmp_path / name for name in ("first", "second"))
    assert run(arguments(shared, first, data__stage="${SLURM_TMPDIR}/x"), 2, hook=environment) == [0, 0]
    assert_same(first, unstaged)
    for split in SPLITS:
        shutil.rmtree(shared / split)
    assert run(arguments(shared, second, data__stage=disk / "x"), 2) == [0, 0]
    assert_same(second, unstaged)
    assert logged(second).count("reading the copy in") == 2


def set_variable(name: str, value: str, rank: int) -> None:
    os.environ[name] = value


def test_three_ranks_make_one_copy(dataset: Path, tmp_path: Path) -> None:
    run_dir, disk, counter = tmp_path / "run", tmp_path / "disk", tmp_path / "counter"
    command = arguments(dataset, run_dir, data__stage=disk, training__max_steps=1)
    assert run(command, 3, hook=partial(count_copies, counter)) == [0, 0, 0]
    wanted = [name for name in files_of(dataset) if name != FILE_NAME]
    assert sorted(counter.read_text().split()) == sorted(wanted)
    assert logged(run_dir).count("MB staged in") == 1
    assert logged(run_dir).count("reading the copy in") == 2


def test_a_run_goes_on_with_another_stage(dataset: Path, tmp_path: Path, unstaged: Path) -> None:
    stop = Disturbance(signal.SIGTERM, "forward", count=7)
    assert run(arguments(dataset, tmp_path / "run"), 2, disturbance=stop) == [ExitCode.STOPPED] * 2
    assert run(arguments(dataset, tmp_path / "run", data__stage=tmp_path / "disk"), 2) == [0, 0]
    assert_same(tmp_path / "run", unstaged)


def test_damage_of_the_shared_copy_ends_the_run_as_without_staging(mine: Path, tmp_path: Path) -> None:
    key = flip_record(mine, "train", 1, 2)
    plain = hear_one(arguments(mine, tmp_path / "plain"))
    staged = hear_one(arguments(mine, tmp_path / "staged", data__stage=tmp_path / "disk"))
    assert f"tile {key} in {mine}/train/00001.tar is damaged" in plain.complaint
    assert (staged.complaint, staged.code) == (plain.complaint, plain.code)
    warnings = [line for line in staged.err if "warning: " in line]
    assert len(warnings) == 1
    assert "not staged" in warnings[0] and "copied twice" in warnings[0] and key in warnings[0]
    assert left_in(tmp_path / "disk") == []


def test_a_copy_that_goes_bad_later_is_read_no_more(
    dataset: Path, tmp_path: Path, unstaged: Path
) -> None:
    copy = stage_here(dataset, tmp_path / "disk")
    assert copy is not None
    key = flip_record(copy, "train", 0, 1)
    assert run(arguments(dataset, tmp_path / "run", data__stage=tmp_path / "disk"), 2) == [0, 0]
    assert_same(tmp_path / "run", unstaged)
    assert key in logged(tmp_path / "run")
    assert "train/00000.tar is read from the shared copy" in logged(tmp_path / "run")


def die_while_copying(rank: int) -> None:
    compare, calls = staging._compare, []

    def deadly(shard: Shard, stop) -> None:
        calls.append(shard)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        compare(shard, stop)

    staging._compare = deadly


def test_killed_while_copying_then_again(dataset: Path, tmp_path: Path, unstaged: Path) -> None:
    disk = tmp_path / "disk"
    command = arguments(dataset, tmp_path / "run", data__stage=disk)
    assert run(command, hook=die_while_copying) == [-signal.SIGKILL]
    (half,) = left_in(disk)
    assert (disk / half / ".train.part").is_dir() and not (disk / half / FILE_NAME).exists()
    assert run(command, 2) == [0, 0]
    assert_same(tmp_path / "run", unstaged)
    assert left_in(disk) == [half]
    assert tree(disk / half) == files_of(dataset)


# The copy


def test_the_copy_is_the_data_set_and_private(dataset: Path, tmp_path: Path) -> None:
    copy = stage_here(dataset, tmp_path / "disk")
    assert copy == tmp_path / "disk" / f"agrivision-{Schema.read(dataset).fingerprint}"
    assert tree(copy) == files_of(dataset)
    assert copy.stat().st_mode & 0o777 == 0o700


def test_a_whole_copy_is_not_copied_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    copy = stage_here(dataset, tmp_path / "disk", ("train",))
    assert copy is not None and tree(copy) == files_of(dataset, ("train",))
    times = {path: path.stat().st_mtime_ns for path in copy.glob("train/*")}
    assert stage_here(dataset, tmp_path / "disk") == copy  # brings what is missing
    assert tree(copy) == files_of(dataset)
    assert {path: path.stat().st_mtime_ns for path in copy.glob("train/*")} == times
    monkeypatch.setattr(staging, "_copy_file", lambda *_: pytest.fail("copied"))
    assert stage_here(dataset, tmp_path / "disk") == copy
    assert said == []


@pytest.mark.parametrize("harm", ["cut", "removed", "index", "marker"])
def test_a_copy_that_is_not_whole_is_made_anew(harm: str, dataset: Path, tmp_path: Path) -> None:
    copy = stage_here(dataset, tmp_path / "disk")
    assert copy is not None
    if harm == "cut":
        os.truncate(copy / "train/00001.tar", 1024)
    elif harm == "removed":
        (copy / "val/00000.tar").unlink()
    elif harm == "index":
        flip(copy / "train/00000.index.npy", 300)
    else:
        (copy / FILE_NAME).unlink()
    assert stage_here(dataset, tmp_path / "disk") == copy
    assert tree(copy) == files_of(dataset)


@pytest.mark.parametrize("suffix", [".tar", ".index.npy"])
@pytest.mark.parametrize("bad", [1, 2])
def test_a_bad_copy_is_made_twice_and_then_not_used(
    bad: int,
    suffix: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    copy_file, left = staging._copy_file, [bad]

    def copied_badly(source: Path, target: Path, stop) -> None:
        copy_file(source, target, stop)
        if target.name == f"00001{suffix}" and source.parent.name == "train" and left[0]:
            left[0] -= 1
            flip(target, 700)

    monkeypatch.setattr(staging, "_copy_file", copied_badly)
    copy = stage_here(dataset, tmp_path / "disk")
    if bad == 1:
        assert copy is not None and tree(copy) == files_of(dataset)
        assert said == []
    else:
        assert copy is None and left_in(tmp_path / "disk") == []
        assert len(said) == 1
        assert f"{dataset}/train/00001.tar was copied twice, and differs" in said[0]


@pytest.mark.parametrize("harm", ["flipped", "removed", "index"])
def test_what_the_copy_has_lost_is_read_from_the_shared_one(
    harm: str, dataset: Path, tmp_path: Path, said: list[str]
) -> None:
    schema, copy = Schema.read(dataset), stage_here(dataset, tmp_path / "disk")
    assert copy is not None
    if harm == "flipped":
        flip_record(copy, "train", 1, 0)
    elif harm == "removed":
        (copy / "train/00001.tar").unlink()
    else:
        flip(copy / "train/00001.index.npy", 300)
    reader, reference = (
        StagedSplit(copy, dataset, schema, "train"),
        SplitReader(dataset, schema, "train"),
    )
    for tile in [*range(len(reference))] * 2:
        assert reader.key(tile) == reference.key(tile)
        assert [*map(bytes, reader.read(tile))] == [*map(bytes, reference.read(tile))]
    assert len(said) == 1 and "train/00001.tar is read from the shared copy" in said[0]
    paths = [shard.path.parent for shard in reader.shards()]
    assert [path == copy / "train" for path in paths] == [n != 1 for n in range(len(paths))]


# The disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "256k") as folder:
        yield folder


def test_too_small_a_disk(disk: Path, dataset: Path, said: list[str]) -> None:
    assert stage_here(dataset, disk) is None
    assert len(said) == 1
    assert f"{disk} has 0.3 MB free; the copy takes" in said[0]
    assert left_in(disk) == []


def test_a_disk_that_fills_up_on_the_way(
    disk: Path, dataset: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_check_room", lambda *_: None)
    assert stage_here(dataset, disk) is None
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert left_in(disk) == []


def test_a_part_of_the_disk_stays_free(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "RESERVED_SHARE", 1 / 16)
    status = os.statvfs(disk)
    most = status.f_bavail * status.f_frsize - status.f_blocks * status.f_frsize // 16
    staging._check_room(disk, most)
    with pytest.raises(StorageError, match="left to others"):
        staging._check_room(disk, most + 1)


def test_a_read_only_disk(disk: Path, dataset: Path, tmp_path: Path, said: list[str]) -> None:
    make_read_only(disk)
    assert stage_here(dataset, disk) is None
    assert stage_here(dataset, disk / "below") is None
    assert len(said) == 2
    assert all("Read-only file system" in line for line in said)
    assert left_in(disk) == []


def test_a_place_that_is_no_folder_or_not_ours(dataset: Path, tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "file").write_text("precious")
    assert stage_here(dataset, tmp_path / "file") is None
    taken = tmp_path / "disk" / f"agrivision-{Schema.read(dataset).fingerprint}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    taken.parent.mkdir()
    taken.symlink_to(elsewhere)
    assert stage_here(dataset, taken.parent) is None
    assert left_in(elsewhere) == []
    taken.unlink()
    lock = taken.with_name(f".{taken.name}.lock")
    lock.unlink()
    lock.symlink_to(tmp_path / "file")
    assert stage_here(dataset, taken.parent) is None
    assert (tmp_path / "file").read_text() == "precious"
    assert len(said) == 3
    assert "is not a folder of this user" in said[1]
    assert "symbolic links" in said[2]


def test_a_shard_may_not_lie_elsewhere(dataset: Path, tmp_path: Path, said: list[str]) -> None:
    schema = Schema.read(dataset)
    info = schema.splits["train"].shards[0]
    object.__setattr__(info, "name", "../../outside")
    assert stage(dataset, schema, SPLITS, str(tmp_path / "disk")) is None
    assert "names a shard outside of its folder" in said[0]
    assert left_in(tmp_path / "disk") == []


# Taking turns


def test_who_waited_hears_why_it_failed_and_does_not_try(
    dataset: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema, waiting, tries = Schema.read(dataset), threading.Event(), []

    def refuse(*_: object) -> None:
        tries.append(1)
        assert waiting.wait(60)
        raise StorageError("the disk has a bad day")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_check_room", refuse)
        patch.setattr(staging.time, "sleep", lambda _: waiting.set())
        found: list[Path | None] = []
        threads = [
            threading.Thread(target=lambda: found.append(stage(dataset, schema, SPLITS, str(tmp_path))))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (found, len(tries)) == ([None, None], 1)
        assert all("the disk has a bad day" in line for line in said) and len(said) == 2
        assert stage(dataset, schema, SPLITS, str(tmp_path), speaks=False) is None
        assert (len(tries), len(said)) == (2, 2)  # who did not wait tries anew
    assert stage_here(dataset, tmp_path) is not None


@pytest.mark.parametrize("polls", [0, 1, 5, 40])
def test_a_stop_leaves_nothing(polls: int, dataset: Path, tmp_path: Path, said: list[str]) -> None:
    left = iter([False] * polls)
    schema, stop = Schema.read(dataset), lambda: next(left, True)
    assert stage(dataset, schema, SPLITS, str(tmp_path), stop=stop) is None
    assert len(said) == 1 and "asked to stop" in said[0]
    assert left_in(tmp_path) == []


def test_a_stop_ends_the_waiting(dataset: Path, tmp_path: Path, said: list[str]) -> None:
    schema = Schema.read(dataset)
    with staging._turn(tmp_path, f"agrivision-{schema.fingerprint}", lambda: False):
        assert stage(dataset, schema, SPLITS, str(tmp_path), stop=lambda: True) is None
    assert len(said) == 1 and "asked to stop" in said[0]


# Where


@pytest.mark.parametrize("text", ["", "here", "./here", "~/here", "/a\nb", "/a\0b", "Auto"])
def test_places_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"data\.stage is .*null, auto or an absolute path"):
        DataConfig(stage=text)


def test_only_variables_are_expanded() -> None:
    environment = {"A": "/disk", "B_1": "x y", "EMPTY": ""}
    assert expand_variables("$A/${B_1}/$$/~/*", environment) == "/disk/x y/$$/~/*"
    assert expand_variables("/$(id)`id`;${A:-no}\\$A", environment) == "/$(id)`id`;${A:-no}\\/disk"
    assert expand_variables("$A", {"A": "$B", "B": "/no"}) == "$B"
    for text, name in (("$NONE/x", "NONE"), ("/${EMPTY}", "EMPTY"), ("$AA", "AA")):
        with pytest.raises(ConfigurationError, match=f"variable {name} of .* is not set"):
            expand_variables(text, environment)


def test_a_path_is_never_run(dataset: Path, tmp_path: Path) -> None:
    name = "a b;$(touch ran)`touch ran`'\""
    copy = stage_here(dataset, tmp_path / name)
    assert copy is not None and copy.parent == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("value", "why"), [("", "PLACE of '$PLACE/below' is not set"), ("x", "not an absolute")]
)
def test_a_variable_that_leads_nowhere(
    value: str,
    why: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", value)
    assert stage_here(dataset, "$PLACE/below") is None
    assert len(said) == 1
    assert why in said[0]
    assert left_in(tmp_path) == []


def test_auto_takes_what_the_job_has(
    disk: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(own))
    monkeypatch.setenv("TMPDIR", str(disk))
    copy = stage_here(dataset, "auto")
    assert copy is not None and copy.parent == own
    monkeypatch.delenv("SLURM_TMPDIR")
    assert stage_here(dataset, "auto") is None  # memory is no disk
    monkeypatch.setattr(staging, "_DISKS", {"tmpfs"})
    monkeypatch.setattr(staging, "_check_room", lambda *_: None)
    assert stage_here(dataset, "auto") is None  # would take it, but it is too small
    monkeypatch.setenv("TMPDIR", str(own))
    monkeypatch.setattr(staging, "file_system", lambda *_: "tmpfs")
    assert stage_here(dataset, "auto") is None  # the data set's own disk
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert stage_here(dataset, "auto") is None
    monkeypatch.delenv("TMPDIR")
    assert stage_here(dataset, "auto") is None
    wanted = [
        "is tmpfs, not a disk",
        "No space left",
        "own disk",
        "No such file",
        "neither SLURM_TMPDIR",
    ]
    assert len(said) == len(wanted)
    assert all(words in line for words, line in zip(wanted, said, strict=True))


def test_the_file_system_of_a_folder() -> None:
    mounts = "\n".join(
        [
            "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
            "30 27 0:25 / /nfs rw shared:5 master:1 - nfs4 server:/nfs rw",
            "31 27 0:26 / /local\\040disk rw - xfs /dev/nvme0n1 rw",
            "32 27 0:27 / /scratch rw - ext4 /dev/sda rw",
            "33 27 0:28 / /scratch rw - lustre mgs:/scratch rw",
        ]
    )
    places = ["/", "/nfsx/x", "/nfs/x", "/nfs", "/local disk/job", "/local", "/scratch/a"]
    kinds = ["ext4", "ext4", "nfs4", "nfs4", "xfs", "ext4", "lustre"]
    assert [file_system(Path(place), mounts) for place in places] == kinds
    assert file_system(Path("/"), "") == ""
