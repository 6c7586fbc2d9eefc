"""Logs: over requeues, successors and an array's folder; each byte once, and an end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
