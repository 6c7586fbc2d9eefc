"""Logs: over requeues, successors and an array's folder; each byte once, and an end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agrivision.errors import harmless
from launch.__main__ import main
from launch.jobdir import Attempt, JobDirectory, JobSpec
from launch.logs import chunks, is_ended, log_file
from tests.launch.conftest import FakeSlurm, queued

FIRST = b"2030-01-01T00:00:00 launch: attempt 1 on n1, 2 ranks: train\none\n"
SECOND = b"2030-01-01T01:00:00 launch: attempt 2 on n2, 2 ranks, from step 5: train\ntwo\n"


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    job = JobDirectory.of_run(tmp_path / "run")
    job.make()
    job.write_spec(JobSpec(command=("train",), python=("python",), cwd=str(tmp_path / "cwd")))
    for number in (1, 2):
        job.began(Attempt(number=number, job="7", nodes=("n1",), tasks=2, began=1.0))
    job.submitted("7", by="launch")
    (job.path / "slurm-7.out").write_bytes(FIRST + SECOND)
    return job


def shown(words: list[str], capfdbinary: pytest.CaptureFixture[bytes]) -> bytes:
    assert main(["logs", *words]) == 0
    return capfdbinary.readouterr().out


def test_whole_and_by_attempt(job: JobDirectory, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run_dir = str(job.path.parent)
    assert shown([run_dir], capfdbinary) == FIRST + SECOND
    assert shown([run_dir, "--attempt", "1"], capfdbinary) == FIRST
    assert shown([run_dir, "--attempt", "2"], capfdbinary) == SECOND
    rank = job.path.parent / "log" / "rank-1.log"
    rank.parent.mkdir()
    rank.write_bytes(b"of rank 1\n")
    assert shown([run_dir, "--rank", "1"], capfdbinary) == b"of rank 1\n"


def test_a_terminal_is_told_nothing_to_obey(job: JobDirectory) -> None:
    """Names of files are strangers' words, and a job prints them."""
    (log,) = job.path.glob("slurm-7.out")
    told = "grün\n\x1b]0;title\x07\x1b[2J\tone\r\x9b31mtwo\r\n".encode() + b"\xff\n"
    log.write_bytes(told)
    command = [sys.executable, "-m", "launch", "logs", str(job.path.parent)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == told  # a file: as it is
    master, terminal = os.openpty()
    with os.fdopen(master, "rb", buffering=0) as screen:
        subprocess.run(command, stdout=terminal, check=True)
        os.close(terminal)
        seen = screen.read(4096).replace(b"\r\n", b"\n")  # as a terminal ends its lines
    wanted = "grün\n\\x1b]0;title\\x07\\x1b[2J\tone\n\\x9b31mtwo\n\\xff\n"
    assert seen.decode().expandtabs() == wanted.expandtabs()


@given(st.text())
def test_nothing_but_lines_and_tabs_is_left_of_what_is_not_shown(text: str) -> None:
    found = harmless(text)
    assert all(each.isprintable() or each in "\n\t" for each in found)
    assert harmless(found) == found
    if text.isprintable():
        assert found == text


def test_after_earlier_jobs(job: JobDirectory, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run_dir = str(job.path.parent)
    job.submitted("8", by="launch")
    assert shown([run_dir], capfdbinary) == FIRST + SECOND  # the new job has not begun
    (job.path / "slurm-8.out").write_bytes(b"three\n")
    job.submitted("9", by="launch")
    assert shown([run_dir], capfdbinary) == FIRST + SECOND + b"three\n"
    (job.path / "slurm-7.out").unlink()
    assert shown([run_dir], capfdbinary) == b"three\n"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--attempt", "3"], "there is no attempt 3"),
        (["--rank", "9"], "rank-9.log"),
        (["--attempt", "1", "-f"], "--attempt goes by itself"),
    ],
)
def test_refusals(
    words: list[str], wanted: str, job: JobDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(job.path), *words]) == 2
    assert wanted in capsys.readouterr().err


def test_where_logs_are(job: JobDirectory, tmp_path: Path) -> None:
    assert log_file(job) == job.path / "slurm-7.out"
    job.submitted("8", by="successor")
    assert log_file(job) == job.path / "slurm-7.out"  # until the successor starts
    (tmp_path / "cwd").mkdir()
    plain = tmp_path / "cwd" / "agrivision-8.out"
    plain.touch()
    assert log_file(job) == plain  # of a plain sbatch
    element = JobDirectory.of_run(tmp_path / "sweep" / "000-seed=1")
    element.make()
    element.submitted("9_0", by="launch")
    assert log_file(element) is None
    (tmp_path / "sweep" / "launch").mkdir()
    (tmp_path / "sweep" / "launch" / "slurm-9_0.out").touch()
    assert log_file(element) == tmp_path / "sweep" / "launch" / "slurm-9_0.out"


@pytest.mark.parametrize("follow", [[], ["-f"]])
def test_of_what_was_not_submitted_there_is_none(
    follow: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = JobDirectory.beside(tmp_path / "maps")
    job.make()
    job.write_spec(JobSpec(command=("predict",), python=("python",)))
    assert main(["logs", str(tmp_path / "maps"), *follow]) == 2
    assert "was not submitted" in capsys.readouterr().err


class World:
    """What happens while somebody follows a log: one event at each sleep."""

    def __init__(self, *events: Callable[[], None]) -> None:
        self._events = list(events)
        self.over = False

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self._events.pop(0)()

    def end(self) -> None:
        self.over = True


def test_following_over_requeue_and_successor(tmp_path: Path) -> None:
    first, second = tmp_path / "slurm-7.out", tmp_path / "slurm-8.out"

    def source() -> Path | None:
        return next((file for file in (second, first) if file.is_file()), None)

    def began() -> None:
        first.write_bytes(b"a")

    def requeued() -> None:
        with first.open("ab") as file:
            file.write(b"b")

    def succeeded() -> None:
        requeued()
        second.write_bytes(b"c")

    def last_words() -> None:
        second.write_bytes(b"cd")
        world.end()

    world = World(lambda: None, began, requeued, succeeded, last_words)
    heard = chunks(source, over=lambda: world.over, follow=True, sleep=world.sleep)
    assert b"".join(heard) == b"abbcd"


def test_when_a_job_is_over(job: JobDirectory, slurm: FakeSlurm, home: Path) -> None:
    slurm.hold(queued("7"))
    assert not is_ended(job)
    job.ended(Attempt(number=2, job="7", nodes=(), tasks=2, began=1.0, decision="done", code=0))
    assert is_ended(job)
    job.submitted("8", by="resume")
    (cache,) = (home / ".cache" / "agrivision").iterdir()
    cache.unlink()
    slurm.hold(queued("8", "PENDING"))
    assert not is_ended(job)
    cache.unlink()
    slurm.hold(queued("8", "FAILED"))
    assert is_ended(job)
