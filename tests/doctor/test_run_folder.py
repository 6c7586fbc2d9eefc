"""Disks that are full, read-only, without locks: each is named, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

from agrivision.doctor import disks, run_folder
from agrivision.doctor.disks import nearest
from agrivision.doctor.finding import Finding, Topic, Verdict
from agrivision.doctor.run_folder import clock, examine_run_folder, rename_is_atomic
from agrivision.doctor.speed import Rate, write_rate
from tests.disks import fill, make_read_only, small_disk
from tests.doctor.folders import tree
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
    monkeypatch.setattr(run_folder, "write_rate", lambda *_: Rate(int(rate), 1.0))
    found, written = result(examine_run_folder(tmp_path, shared=False))
    assert written == rate
    said = about(found, "written and fsynced")
    assert (said.verdict, f"{run_folder.CHECKPOINT / rate:.1f} s" in said.what) == (verdict, True)


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
