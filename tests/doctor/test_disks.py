"""Disks that are full, read-only, damaged, without locks: each is named, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import pytest

from agrivision.data.schema import Schema
from agrivision.doctor import disks, speed
from agrivision.doctor.disks import clock, examine_data, examine_run_folder, nearest, rename_is_atomic
from agrivision.doctor.finding import Finding, Topic, Verdict
from agrivision.doctor.speed import Rate, sequential_rate, small_files, write_rate
from tests.disks import fill, make_read_only, small_disk
from tests.doctor.said import about, worse

T = TypeVar("T")
TOPIC = Topic("somewhere")


def result(steps: Generator[Finding, None, T]) -> tuple[list[Finding], T]:
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as end:
            return found, end.value


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_good_folder_is_good_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    found, rate = result(examine_run_folder(tmp_path, shared=False))
    assert rate is not None and rate > 0
    assert about(found, "renames").verdict == about(found, "locks").verdict == Verdict.GOOD
    assert tree(tmp_path) == ["mine"]


def test_a_folder_that_is_not_there_yet_is_not_made(tmp_path: Path) -> None:
    assert nearest(tmp_path / "runs" / "first") == tmp_path
    result(examine_run_folder(tmp_path / "runs" / "first", shared=False))
    assert tree(tmp_path) == []


def test_a_full_disk_is_named_and_not_filled_further(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        fill(disk, 0)
        before = os.statvfs(disk).f_bavail
        found, rate = result(examine_run_folder(disk, shared=False))
        assert os.statvfs(disk).f_bavail == before
        assert tree(disk) == ["filler"]
    assert rate is None
    assert about(found, "0.0 GB free").verdict == Verdict.BAD
    assert any("full" in what or "no room" in what for _, what in worse(found))


def test_a_disk_with_little_room_is_named_and_measured_with_a_tenth_of_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "20m") as disk:
        rate = write_rate(disk, 20 << 20)
        assert 0 < rate.amount <= 2 << 20
        found, _ = result(examine_run_folder(disk, shared=False))
    assert about(found, "0.0 GB free").verdict == Verdict.BAD
    assert about(found, "tmpfs").verdict == Verdict.CAREFUL


def test_a_disk_without_room_for_files_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8g,nr_inodes=700") as disk:
        found, _ = result(examine_run_folder(disk, shared=False))
    assert about(found, "more files").verdict == Verdict.BAD


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        found, rate = result(examine_run_folder(disk, shared=False))
    assert rate is None
    assert about(found, "is read-only").verdict == Verdict.BAD


def test_a_folder_of_somebody_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disks.tempfile, "mkdtemp", refuse)
    found, _ = result(examine_run_folder(tmp_path, shared=False))
    assert about(found, "may not be written by you").verdict == Verdict.BAD


def test_a_local_disk_on_a_cluster_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, shared, verdict in [
        ("ext4", True, Verdict.CAREFUL),
        ("ext4", False, Verdict.GOOD),
        ("nfs4", True, Verdict.GOOD),
    ]:
        monkeypatch.setattr(disks, "file_system", lambda *_, kind=kind: kind)
        found, _ = result(examine_run_folder(tmp_path, shared=shared))
        assert about(found, kind).verdict == verdict


@pytest.mark.parametrize(("rate", "verdict"), [(100e6, "good"), (10e6, "careful"), (1e6, "bad")])
def test_what_a_slow_disk_means_is_said(
    rate: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "write_rate", lambda *_: Rate(int(rate), 1.0))
    found, written = result(examine_run_folder(tmp_path, shared=False))
    assert written == rate
    said = about(found, "written and fsynced")
    assert (said.verdict, f"{disks.CHECKPOINT / rate:.1f} s" in said.what) == (verdict, True)


def test_a_rename_that_is_two_steps_is_named(tmp_path: Path) -> None:
    def copy(source: Path, target: Path) -> None:
        target.unlink()
        shutil.copyfile(source, target)

    assert rename_is_atomic(tmp_path)
    assert not rename_is_atomic(tmp_path, replace=copy)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(OSError(errno.ENOLCK, "No locks available"), "no locks"), (None, "that two can hold")],
)
def test_locks_that_do_not_hold_are_named(
    answer: OSError | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(fcntl, "flock", flock)
    found, _ = result(examine_run_folder(tmp_path, shared=False))
    assert about(found, words).verdict == Verdict.CAREFUL


@pytest.mark.parametrize(
    ("skew", "verdict"), [(0, "good"), (60, "careful"), (-60, "careful"), (900, "bad")]
)
def test_a_clock_that_is_off_is_named(skew: float, verdict: str, tmp_path: Path) -> None:
    def now() -> float:
        return (tmp_path / "clock").stat().st_mtime + skew

    found = clock(TOPIC, tmp_path, now)
    assert (found.verdict, f"{abs(skew):.1f} s apart" in found.what) == (verdict, True)


def test_a_file_without_a_name_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network file systems have no such files: a named one is removed before it is written."""
    real = os.open

    def refuse(path: Path, flags: int, *more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more)

    seen = []
    sync = os.fsync
    monkeypatch.setattr(speed.os, "open", refuse)
    monkeypatch.setattr(speed.os, "fsync", lambda file: (seen.append(tree(tmp_path)), sync(file)))
    assert write_rate(tmp_path, 1 << 40, most=1 << 20).amount == 1 << 20
    assert seen == [[]]


def test_rates_count_what_was_done(tmp_path: Path) -> None:
    assert small_files(tmp_path, most=10).amount == 10
    assert tree(tmp_path) == []
    (tmp_path / "a").write_bytes(bytes(100_000))
    (tmp_path / "b").write_bytes(bytes(50_000))
    assert sequential_rate([tmp_path / "a", tmp_path / "b"]).amount == 150_000


def test_a_data_set_is_read(dataset: Path) -> None:
    before = tree(dataset)
    found = list(examine_data(dataset, gpus=1, shared=False))
    assert "at random places" in about(found, "tiles a second").what
    assert about(found, "shard after shard").verdict == Verdict.GOOD
    assert tree(dataset) == before


def test_each_tile_is_read_once(dataset: Path) -> None:
    tiles = Schema.read(dataset).split("train").tiles
    read: list[int] = []
    rate, number = speed.reading_rate(range(tiles), lambda tile: read.append(tile) or 10, seconds=60)
    assert (sorted(read), number, rate.amount) == (list(range(tiles)), tiles, 10 * tiles)


def damage(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[:] = bytes(byte ^ 1 for byte in content)
    shard.write_bytes(content)


def cut(shard: Path) -> None:
    os.truncate(shard, 1000)


@pytest.mark.parametrize("harm", [damage, cut, Path.unlink])
def test_a_damaged_data_set_is_named(
    harm: Callable[[Path], None], dataset: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(dataset, tmp_path / "copy")
    for shard in (copy / "train").glob("*.tar"):
        harm(shard)
    found = [each for each in examine_data(copy, gpus=1, shared=False) if each.verdict == Verdict.BAD]
    assert len(found) == 1
    assert "train/" in found[0].what


def test_small_files_are_read(fields: Path) -> None:
    found = list(examine_data(fields, gpus=1, shared=False))
    assert "tiles of 13 files each" in about(found, "files a second").what


def test_a_data_folder_that_is_empty_or_not_there_is_named(tmp_path: Path) -> None:
    assert about(examine_data(tmp_path, gpus=1, shared=False), "no files").verdict == Verdict.CAREFUL
    assert worse(examine_data(tmp_path / "none", gpus=1, shared=False)) == [
        ("bad", "there is no such folder")
    ]


def test_where_a_copy_would_go(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert str(tmp_path) in about(examine_data(dataset, gpus=1, shared=False), "data.stage").what
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "gone"))
    found = about(examine_data(dataset, gpus=1, shared=False), "data.stage")
    assert found.verdict == Verdict.CAREFUL
