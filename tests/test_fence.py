"""An attempt that Slurm has replaced writes no more, and one that it has not is not replaced."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agrivision import rundir
from agrivision.errors import RunMismatch, Superseded
from agrivision.fence import Fence, Owner, read_owner
from agrivision.rundir import RunDirectory
from agrivision.world import World

FIRST = World(job="17", restart=0)
LATER = World(job="17", restart=1)
OTHER = World(job="18", restart=0)
ALONE = World()


def owner(world: World) -> Owner:
    return Owner.of(world)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """The lock that an old rank would still hold: another open file, as of another process."""
    with (run_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize(
    ("holder", "taker", "earlier", "follows"),
    [
        (FIRST, LATER, (), True),
        (LATER, FIRST, (), False),
        (FIRST, FIRST, (), False),
        (FIRST, dataclasses.replace(FIRST, step_id=1), (), True),
        (FIRST, OTHER, (), False),
        (FIRST, OTHER, ("17",), True),
        (OTHER, FIRST, ("17",), False),
        (ALONE, LATER, (), False),
        (ALONE, OTHER, ("",), False),
    ],
)
def test_who_follows_whom(holder: World, taker: World, earlier: tuple[str, ...], follows: bool) -> None:
    assert owner(taker).follows(owner(holder), earlier) is follows


@pytest.mark.row(12)
def test_the_old_attempt_is_fenced_off(tmp_path: Path) -> None:
    old = Fence.raise_around(tmp_path / "attempt.json", owner(FIRST))
    old.check()
    new = Fence.raise_around(tmp_path / "attempt.json", owner(LATER))
    new.check()
    with pytest.raises(Superseded, match=r"later attempt now \(job 17 on"):
        old.check()


def test_the_same_attempt_of_another_process_is_another(tmp_path: Path) -> None:
    first = Fence.raise_around(tmp_path / "attempt.json", owner(ALONE))
    Fence.raise_around(tmp_path / "attempt.json", owner(ALONE))
    with pytest.raises(Superseded, match="job none"):
        first.check()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"token": "x"}'])
def test_a_file_that_says_nothing_ends_nobody(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "attempt.json"
    fence = Fence.raise_around(file, owner(FIRST))
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    assert read_owner(file) is None
    fence.check()


@pytest.mark.row(35)
def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with run.held(FIRST) as first:
        for other in (FIRST, OTHER, ALONE):
            with pytest.raises(RunMismatch, match="in use by another run"), run.held(other):
                pass
        first.check()


@pytest.mark.parametrize("taker", [LATER, dataclasses.replace(OTHER, earlier_jobs=("17",))])
def test_a_later_attempt_takes_over(
    tmp_path: Path, taker: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rundir, "_HANDOVER_SECONDS", 0.0)
    run = RunDirectory(tmp_path)
    with run.held(FIRST) as first, run.held(taker) as later:
        later.check()
        with pytest.raises(Superseded):
            first.check()
    (record,) = caplog.records
    assert f"(process {os.getpid()} on" in record.getMessage()
    assert "can write no more" in record.getMessage()


def test_a_lock_that_nobody_answers_for_is_respected(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RunMismatch), RunDirectory(tmp_path).held(LATER):
        pass
