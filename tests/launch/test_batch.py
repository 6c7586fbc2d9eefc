"""The batch side of a job: what it makes of its ranks' endings, and what it asks of Slurm."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agrivision.ending import Ending
from agrivision.errors import BadInput, ExitCode, StorageError
from launch import batch, entry, slurm, turn
from launch.decision import Next, Result, decide, judge, out_of_patience, why_stopped
from launch.freeze import freeze_submission
from launch.jobdir import Attempt, JobDirectory, JobSpec
from launch.place import Place
from launch.slurm import QueuedJob, SlurmError, seconds_of

NAMES = ("rank 0 on n1", "rank 1 on n1", "rank 2 on n2")
RUNNING = QueuedJob(
    id="17", state="RUNNING", reason="None", time_left="1:00:00", time_limit="2:00:00", nodes="n1",
    start="N/A", preempted=False,
)  # fmt: skip
SPEC = JobSpec(command=("train",), python=("python",))


def ending(rank: int, code: int, line: str = "", traceback: str = "", at: float = 0) -> Ending:
    return Ending(rank=rank, code=code, line=line, traceback=traceback, time=at)


def endings(*codes: int) -> list[Ending]:
    return [ending(rank, code) for rank, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("said", "srun", "code", "line"),
    [
        (endings(0, 0, 0), 0, 0, ""),
        (endings(0, 0, 0), 1, 0, ""),  # something after the ranks' own end
        (endings(85, 85, 85), 85, 85, ""),
        (endings(0, 85, 85), 85, 85, ""),
        (endings(0, 0), 0, 1, "rank 2 on n2 ended without a word (srun: 0)"),
        ([], 137, 137, f"{', '.join(NAMES)} ended without a word (srun: 137)"),
        (
            [ending(0, 1, "lost the other ranks: gone"), ending(1, 1, "lost the other ranks: gone")],
            143, 143, "rank 2 on n2 ended without a word (srun: 143)",
        ),
        (
            [ending(0, 1, "no space left"), ending(1, 1, "lost the other ranks: gone")],
            143, 143, "rank 2 on n2 ended without a word (srun: 143); rank 0 on n1: no space left",
        ),
        (
            [ending(0, 1, "late", at=2), ending(1, 1, "first", at=1), ending(2, 85)],
            85, 1, "rank 1 on n1: first",
        ),
        ([ending(0, 1, "lost", at=1), ending(1, 86, "nan", at=2)], 86, 86, "rank 1 on n1: nan"),
        ([ending(0, 86, "diverged"), ending(1, 2, "bad")], 86, 86, "rank 0 on n1: diverged"),
        ([ending(0, 1, "lost"), ending(1, 2, "bad", at=9)], 2, 2, "rank 1 on n1: bad"),
    ],
)  # fmt: skip
def test_one_result_for_all_ranks(said: list[Ending], srun: int, code: int, line: str) -> None:
    assert judge(said, srun, NAMES) == Result(code=code, line=line)


def test_the_bug_counts_and_not_who_it_ended() -> None:
    said = [ending(0, 1, "lost", at=1), ending(2, 1, "KeyError", "Traceback", at=2)]
    expected = Result(code=1, line="rank 2 on n2: KeyError", traceback="Traceback")
    assert judge(said, 143, NAMES) == expected


def test_many_silent_ranks_are_counted() -> None:
    names = [f"rank {rank}" for rank in range(12)]
    assert judge([], 9, names).line.startswith("rank 0, rank 1, ")
    assert "rank 7 and 4 more ended" in judge([], 9, names).line


@pytest.mark.parametrize(
    ("code", "now", "refusal", "expected"),
    [
        (0, None, "", Next.END),
        (2, None, "", Next.END),
        (86, RUNNING, "", Next.END),
        (85, None, "", Next.ASK_SOMEBODY),
        (85, RUNNING, "", Next.AGAIN),
        (1, RUNNING, "", Next.AGAIN),
        (137, RUNNING, "", Next.AGAIN),
        (1, RUNNING, "enough", Next.GIVE_UP),
        (85, dataclasses.replace(RUNNING, state="COMPLETING"), "", Next.LEAVE),
        (85, dataclasses.replace(RUNNING, state="COMPLETING"), "enough", Next.LEAVE),
        (1, dataclasses.replace(RUNNING, state="CANCELLED"), "", Next.LEAVE),
        (85, dataclasses.replace(RUNNING, state="COMPLETING", restarts=2), "", Next.LEAVE),
        (85, dataclasses.replace(RUNNING, state="PENDING", restarts=2), "", Next.LEAVE),
        (1, dataclasses.replace(RUNNING, restarts=2), "", Next.SUPERSEDED),
        (1, dataclasses.replace(RUNNING, restarts=2), "enough", Next.SUPERSEDED),
        (1, dataclasses.replace(RUNNING, restarts=1), "", Next.AGAIN),
    ],
)
def test_what_follows(code: int, now: QueuedJob | None, refusal: str, expected: Next) -> None:
    assert decide(Result(code=code, line=""), now, 1, refusal) == expected


def attempt(number: int, begin: int | None, end: int | None, **changes: object) -> Attempt:
    whole = Attempt(
        number=number, job="17", nodes=("n1",), tasks=1, began=0.0, from_step=begin, ended=1.0,
        to_step=end, code=1,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


STALLED = attempt(1, 5, 5)
FURTHER = attempt(1, 5, 6)
NO_STEPS = attempt(1, None, None)
LOST = dataclasses.replace(STALLED, ended=None, to_step=None)


@pytest.mark.parametrize(
    ("attempts", "refused"),
    [
        ([STALLED] * 2, False),
        ([STALLED] * 3, True),
        ([attempt(1, 0, 0)] * 3, True),
        ([STALLED, STALLED, FURTHER, STALLED, STALLED], False),
        ([FURTHER, STALLED, STALLED, STALLED], True),
        ([STALLED, STALLED, dataclasses.replace(STALLED, preempted=True)], False),
        ([STALLED, STALLED, dataclasses.replace(STALLED, preempted=True), STALLED], True),
        ([STALLED, STALLED, dataclasses.replace(STALLED, ended=None)], False),
        ([STALLED, dataclasses.replace(STALLED, ended=None), STALLED, STALLED], True),
        ([NO_STEPS] * 3, True),
        ([dataclasses.replace(NO_STEPS, code=85)] * 9, False),
        ([LOST] * 5 + [STALLED], False),
        ([LOST] * 6 + [STALLED], True),
        ([LOST, LOST, LOST, dataclasses.replace(LOST, from_step=2), LOST, LOST, LOST, STALLED], False),
        ([dataclasses.replace(FURTHER, number=100)], True),
        ([dataclasses.replace(FURTHER, number=99)], False),
    ],
)
def test_patience(attempts: Sequence[Attempt], refused: bool) -> None:
    assert bool(out_of_patience(attempts, SPEC)) is refused


def test_an_evaluation_that_is_stopped_has_kept_nothing() -> None:
    stopped = [dataclasses.replace(NO_STEPS, code=85)] * 3
    assert out_of_patience(stopped, dataclasses.replace(SPEC, command=("predict",))) == ""
    assert out_of_patience(stopped, dataclasses.replace(SPEC, command=("evaluate",))) != ""


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (dataclasses.replace(RUNNING, preempted=True, time_left="0:05"), "preempted"),
        (dataclasses.replace(RUNNING, time_left="3:05"), "time limit"),
        (dataclasses.replace(RUNNING, time_left="10:00"), "asked to stop"),
        (dataclasses.replace(RUNNING, time_left="UNLIMITED"), "asked to stop"),
        (None, "asked to stop"),
    ],
)
def test_why_they_stopped(now: QueuedJob | None, why: str) -> None:
    assert why_stopped(now, 180) == why


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:45", 45), ("2:30", 150), ("1:00:00", 3600), ("2-03:04:05", 183845), ("UNLIMITED", None),
     ("INVALID", None), ("", None)],
)  # fmt: skip
def test_slurms_times(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


# A whole attempt, with stand-ins for Slurm's commands.

ENVIRONMENT = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "1"}


class Cluster:
    """Answers for Slurm, and notes what is asked of it."""

    def __init__(self) -> None:
        self.states: list[QueuedJob | SlurmError] = [RUNNING]
        self.refusals: list[str] = []
        self.asked: list[str] = []

    def queue(self, jobs: Sequence[str]) -> dict[str, QueuedJob]:
        if "17" not in jobs:
            return {}
        answer = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(answer, SlurmError):
            raise answer
        return {"17": answer}

    def requeue(self, job: str) -> None:
        self.asked.append(f"requeue {job}")
        if self.refusals:
            raise SlurmError(self.refusals.pop(0))

    def submit_successor(
        self, job: str, command: Sequence[str], options: Sequence[str], lines: Sequence[str]
    ) -> str:
        assert any("$EUID" in line for line in lines)
        self.asked.append(f"successor of {job}")
        return "18"

    def update(self, job: str, **changes: str) -> None:
        self.asked.append(f"update {job} {changes}")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A job of two ranks, at the place where its batch side runs."""
    cluster = Cluster()
    for name in ("queue", "requeue", "submit_successor", "update"):
        monkeypatch.setattr(slurm, name, getattr(cluster, name))
    monkeypatch.setattr(time, "sleep", lambda seconds: cluster.asked.append("sleep"))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return cluster


def ranks(tmp_path: Path, *codes: int, code: int = 0, before: str = "") -> None:
    """Put an srun in place whose ranks end so."""
    bodies = [json.dumps({"code": each, "line": "said", "traceback": "", "time": 0}) for each in codes]
    lines = [
        f"echo '{body}' > \"$AGRIVISION_ENDINGS/rank-{rank}.json\"" for rank, body in enumerate(bodies)
    ]
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    words = f"printf '%s\\n' \"$@\" > {tmp_path}/srun; env > {tmp_path}/environment"
    srun.write_text("\n".join(["#!/bin/bash", words, before, *lines, f"exit {code}", ""]))
    srun.chmod(0o700)


def job_of(tmp_path: Path, **changes: object) -> JobDirectory:
    """A frozen job of a run."""
    job = JobDirectory.of_run(tmp_path / "run")
    job.make()
    spec = dataclasses.replace(SPEC, run_dir=str(tmp_path / "run"), **changes)  # type: ignore[arg-type]
    job.write_spec(spec)
    job.submitted("17", "sbatch")
    return job


def last(job: JobDirectory) -> tuple[str, str]:
    found = job.attempts()[-1]
    return found.decision, found.reason


def test_done(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks(tmp_path, 0, 0)
    job = job_of(tmp_path, srun=("--mpi=none",))
    assert batch.run(job) == 0
    assert (last(job), cluster.asked) == (("done", ""), [])
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert words[-5:] == ["--mpi=none", "python", "-m", "agrivision", "train"]
    environment = (tmp_path / "environment").read_text().splitlines()
    assert "PYTHONSAFEPATH=1" in environment
    assert any(line.startswith(f"PYTHONPATH={job.code}") for line in environment)
    assert capsys.readouterr().out.splitlines()[-1].endswith("launch: done after 1 attempts")


def test_a_stopped_run_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    ranks(tmp_path, 85, 85)
    job = job_of(tmp_path)
    assert batch.run(job) == 85
    assert (last(job), cluster.asked) == (("requeued", "asked to stop"), ["requeue 17"])


def test_a_cancelled_run_is_left(cluster: Cluster, tmp_path: Path) -> None:
    cluster.states = [dataclasses.replace(RUNNING, state="COMPLETING")]
    ranks(tmp_path, 85, 85)
    job = job_of(tmp_path)
    assert batch.run(job) == 85
    assert (last(job), cluster.asked) == (("left completing", "asked to stop"), [])


def test_a_run_cancelled_just_before_the_requeue_gets_no_successor(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.states = [RUNNING, dataclasses.replace(RUNNING, state="COMPLETING")]
    cluster.refusals = ["Job is no longer running"]
    ranks(tmp_path, 85, 85)
    job = job_of(tmp_path)
    assert batch.run(job) == 85
    assert (last(job)[0], cluster.asked) == ("left completing", ["requeue 17"])


def test_a_successor_where_requeueing_is_disabled(cluster: Cluster, tmp_path: Path) -> None:
    cluster.refusals = ["Requested operation is presently disabled"]
    ranks(tmp_path, 85, 85)
    job = job_of(tmp_path, dependents=("19",))
    assert batch.run(job) == 85
    assert last(job)[0] == "successor 18"
    update = "update 19 {'Dependency': 'afterok:18'}"
    assert cluster.asked == ["requeue 17", "successor of 17", update]
    assert job.lineage("18") == {"17", "18"} and job.lineage("17") == {"17"}


def test_a_controller_that_refuses_for_a_while(cluster: Cluster, tmp_path: Path) -> None:
    """The third time it is there again."""
    cluster.refusals = ["Unable to contact slurm controller"] * 2
    ranks(tmp_path, 85, 85)
    job = job_of(tmp_path)
    assert batch.run(job) == 85
    assert cluster.asked == ["requeue 17", "sleep", "requeue 17", "sleep", "requeue 17"]
    assert last(job)[0] == "requeued"


def test_a_full_disk_does_not_keep_a_run_from_going_on(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(self: JobDirectory, attempt: Attempt) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(JobDirectory, "ended", refuse)
    ranks(tmp_path, 85, 85)
    assert batch.run(job_of(tmp_path)) == 85
    assert cluster.asked == ["requeue 17"]
    assert "no space left" in capsys.readouterr().out


def test_an_attempt_that_slurm_has_replaced_asks_for_nothing(cluster: Cluster, tmp_path: Path) -> None:
    cluster.states = [dataclasses.replace(RUNNING, restarts=1)]
    ranks(tmp_path, 1, 1)
    job = job_of(tmp_path)
    assert batch.run(job) == 1
    assert (last(job)[0], cluster.asked) == ("superseded", [])


def test_a_controller_that_is_away_is_asked_again(cluster: Cluster, tmp_path: Path) -> None:
    cluster.states = [SlurmError("down"), SlurmError("down"), RUNNING]
    ranks(tmp_path, 85, 85)
    assert batch.run(job_of(tmp_path)) == 85
    assert cluster.asked == ["sleep", "sleep", "requeue 17"]


def test_a_controller_that_stays_away(cluster: Cluster, tmp_path: Path) -> None:
    cluster.states = [SlurmError("down")]
    ranks(tmp_path, 85, 85)
    job = job_of(tmp_path)
    assert batch.run(job) == 85
    assert last(job)[0] == "not requeued"


def test_bad_input_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    ranks(tmp_path, 2, 1)
    job = job_of(tmp_path)
    assert batch.run(job) == 2
    assert (last(job), cluster.asked) == (("given up", "rank 0 on n1: said"), [])


def test_three_attempts_without_progress(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(tmp_path, 1, 1)
    job = job_of(tmp_path)
    assert [batch.run(job) for _ in range(3)] == [1, 1, ExitCode.HOPELESS]
    assert [each.decision for each in job.attempts()] == ["requeued", "requeued", "given up"]
    assert capsys.readouterr().out.count("given up") == 1
    # Somebody who submits again has mended something.
    job.submitted("17", "sbatch")
    job.submitted("20", "sbatch")
    assert job.lineage("20") == {"20"}


def test_slurm_requeues_by_itself_but_not_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    ranks(tmp_path, 0, 0)
    job = job_of(tmp_path, max_attempts=1)
    job.began(attempt(1, 0, None, ended=None, code=None))
    assert batch.run(job) == ExitCode.HOPELESS
    assert len(job.attempts()) == 1 and not (tmp_path / "srun").exists()


def test_what_an_earlier_attempt_said_is_not_heard(cluster: Cluster, tmp_path: Path) -> None:
    job = job_of(tmp_path)
    ranks(tmp_path, 0, 0)
    batch.run(job)
    ranks(tmp_path, 0)
    assert batch.run(job) == 1
    assert last(job)[1].startswith("rank 1 on n2 ended without a word")


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Handlers of signals as they were before."""
    handlers = {number: signal.getsignal(number) for number in batch._SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_signals_reach_the_step(cluster: Cluster, tmp_path: Path, name: str) -> None:
    """One that comes while the ranks run, as from `--signal=B:USR1@60`; at SIGTERM srun would kill."""
    ranks(
        tmp_path,
        85,
        85,
        before=f"trap 'echo heard > {tmp_path}/heard' USR1; kill -{name} $PPID; sleep 0.2",
    )
    assert batch.run(job_of(tmp_path)) == 85
    assert (tmp_path / "heard").read_text() == "heard\n"


@pytest.mark.usefixtures("_handlers")
def test_a_signal_before_the_step_begins_is_heard(cluster: Cluster, tmp_path: Path) -> None:
    ranks(tmp_path, 0, 0, before=f"touch {tmp_path}/started")
    signals = batch._Signals().listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert batch.run(job_of(tmp_path), signals) == 85
    assert not (tmp_path / "started").exists()


# Whose turn it is, and what is frozen when.


def place_of(job: str = "17", **changes: object) -> Place:
    whole = Place(job=job, raw_job=job, task=None, restart=0, nodes=("n1",), tasks_per_node=1)
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What Slurm says of each job, answer after answer."""
    found: dict[str, list[str]] = {}

    def queue(jobs: Sequence[str]) -> dict[str, QueuedJob]:
        known = [name for name in jobs if name in found]
        answers = {
            name: found[name].pop(0) if len(found[name]) > 1 else found[name][0] for name in known
        }
        return {
            name: dataclasses.replace(RUNNING, id=name, state=state) for name, state in answers.items()
        }

    monkeypatch.setattr(slurm, "queue", queue)
    monkeypatch.setattr(turn.time, "sleep", lambda seconds: None)
    return found


def test_another_job_of_the_directory_runs(tmp_path: Path, states: dict[str, list[str]]) -> None:
    job = job_of(tmp_path)
    states["17"] = ["RUNNING"]
    with pytest.raises(BadInput, match="job 17 runs in"):
        turn.earlier_jobs(job, place_of("18"), print)
    assert turn.earlier_jobs(job, place_of("17"), print) == []


def test_a_job_that_is_ending_is_waited_for(tmp_path: Path, states: dict[str, list[str]]) -> None:
    job = job_of(tmp_path)
    states["17"] = ["COMPLETING", "COMPLETING", "CANCELLED"]
    said: list[str] = []
    assert turn.earlier_jobs(job, place_of("18"), said.append) == ["17"]
    assert said == ["waiting for job 17, which is about to end"]


def test_a_job_that_waits_is_not_over(tmp_path: Path, states: dict[str, list[str]]) -> None:
    job = job_of(tmp_path)
    states["17"] = ["PENDING"]
    assert turn.earlier_jobs(job, place_of("18"), print) == []
    del states["17"]  # Slurm has forgotten it
    assert turn.earlier_jobs(job, place_of("18"), print) == ["17"]


def test_tasks_of_an_array_do_not_hinder_one_another(
    tmp_path: Path, states: dict[str, list[str]]
) -> None:
    job = job_of(tmp_path)
    for name in ("20_0", "20_1", "21_1"):
        job.submitted(name, "sbatch")
        states[name] = ["RUNNING"]
    third, second = (JobDirectory(job.path, task) for task in (2, 1))
    assert turn.earlier_jobs(third, place_of("21_2", task=2), print) == []
    with pytest.raises(BadInput, match="job 20_1 runs"):
        turn.earlier_jobs(second, place_of("21_1", task=1), print)


def test_the_successor_of_a_task_has_its_turn_and_no_other(
    tmp_path: Path, states: dict[str, list[str]]
) -> None:
    job = job_of(tmp_path)
    for name in ("20_0", "20_1"):
        job.submitted(name, "sbatch")
    job.submitted("25", "successor", after="20_1")
    states |= {"20_0": ["RUNNING"], "20_1": ["FAILED"], "25": ["RUNNING"]}
    second = JobDirectory(job.path, 1)
    assert turn.earlier_jobs(second, place_of("25"), print) == ["20_1"]
    with pytest.raises(BadInput, match="job 25 runs"):
        turn.earlier_jobs(second, place_of("30_1", task=1), print)


def test_a_submission_is_frozen_once(
    tmp_path: Path, dataset: Path, states: dict[str, list[str]]
) -> None:
    run_dir = tmp_path / "run"
    words = ["train", "--run_dir", str(run_dir), "--data.path", str(dataset)]
    job = freeze_submission(words, place_of("17"), print, {"AGRIVISION_MAX_ATTEMPTS": "7"})
    assert job.spec().max_attempts == 7
    assert (job.code / "agrivision" / "cli.py").is_file()
    marker = job.code / "marker"
    marker.touch()
    # Requeued: nothing is read again, not even the arguments.
    again = freeze_submission([*words[:3], "--nonsense"], place_of("17", restart=1), print, {})
    assert again == job and marker.exists() and job.spec().max_attempts == 7
    # Submitted again: the code of today, and as many attempts as before.
    job.began(attempt(1, 0, 0))
    freeze_submission(words, place_of("18"), print, {"AGRIVISION_MAX_ATTEMPTS": "7"})
    assert not marker.exists() and job.spec().max_attempts == 8
    assert job.jobs() == ["17", "18"]


def test_what_is_refused_changes_nothing(
    tmp_path: Path, dataset: Path, states: dict[str, list[str]]
) -> None:
    words = ["train", "--run_dir", str(tmp_path / "run"), "--data.path", str(dataset)]
    job = freeze_submission(words, place_of("17"), print, {})
    states["17"] = ["RUNNING"]
    before = {path: path.stat().st_mtime_ns for path in job.path.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="job 17 runs"):
        freeze_submission([*words, "--seed", "9"], place_of("18"), print, {})
    with pytest.raises(BadInput, match="PYTHONPATH cannot hold"):
        freeze_submission([*words, "--run_dir", f"{tmp_path}/a:b"], place_of("18"), print, {})
    with pytest.raises(BadInput, match="give a command"):
        freeze_submission(["rain"], place_of("18"), print, {})
    assert before == {path: path.stat().st_mtime_ns for path in job.path.rglob("*") if path.is_file()}


def test_the_tasks_of_an_array_share_the_code(tmp_path: Path, states: dict[str, list[str]]) -> None:
    words = ["prepare", str(tmp_path / "source"), str(tmp_path / "out")]
    first = freeze_submission([*words, "--part", "0/2"], place_of("17_0", task=0), print, {})
    (first.code / "marker").touch()
    second = freeze_submission([*words, "--part", "1/2"], place_of("17_1", task=1), print, {})
    assert second.path == first.path and (second.code / "marker").exists()
    assert first.spec().command[-1] == "0/2" and second.spec().command[-1] == "1/2"


@pytest.mark.parametrize(
    ("options", "environment", "each", "cpus", "overcommit"),
    [
        ("--ntasks-per-node=2", {"NTASKS_PER_NODE": "2", "NTASKS": "4"}, 2, 0, False),
        ("--ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=8", {
            "NTASKS_PER_NODE": "1", "NTASKS": "2", "TASKS_PER_NODE": "1(x2)", "GPUS_ON_NODE": "4",
            "CPUS_PER_TASK": "8", "JOB_CPUS_PER_NODE": "8(x2)"}, 1, 8, False),
        ("--ntasks=8", {"NTASKS": "8", "TASKS_PER_NODE": "4(x2)"}, 4, 0, False),
        ("", {"TASKS_PER_NODE": "1(x2)", "JOB_CPUS_PER_NODE": "1(x2)"}, 1, 1, False),
        ("--exclusive", {"TASKS_PER_NODE": "64,32", "JOB_CPUS_PER_NODE": "64,32"}, 1, 32, False),
        ("--gpus-per-node=4 --cpus-per-task=32", {
            "TASKS_PER_NODE": "1(x2)", "GPUS_ON_NODE": "4", "CPUS_PER_TASK": "32",
            "JOB_CPUS_PER_NODE": "32(x2)"}, 4, 8, False),
        ("--gpus-per-node=4", {
            "TASKS_PER_NODE": "1(x2)", "GPUS_ON_NODE": "4", "JOB_CPUS_PER_NODE": "1(x2)"}, 4, 0, True),
    ],
)  # fmt: skip
def test_ranks_of_a_job(
    options: str, environment: dict[str, str], each: int, cpus: int, overcommit: bool
) -> None:
    """What Slurm 22.05 sets for these options of sbatch with --nodes=2."""
    variables = {f"SLURM_{name}": value for name, value in environment.items()}
    place = Place.from_environment({"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]"} | variables)
    found = (place.tasks_per_node, place.cpus_per_task, place.overcommit)
    assert found == (each, cpus, overcommit)
    assert place.ranks[0] == "rank 0 on n1" and place.ranks[-1] == f"rank {2 * each - 1} on n2"


def test_ranks_that_slurm_is_not_told_of() -> None:
    """A range of nodes is honoured only without --ntasks-per-node."""
    environment = {
        "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "1(x3)",
        "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_CPUS_PER_NODE": "4(x3)",
    }  # fmt: skip
    place = Place.from_environment(environment | {"AGRIVISION_RANKS_PER_NODE": "2"})
    assert (place.tasks, place.tasks_per_node, place.cpus_per_task) == (6, 2, 2)
    with pytest.raises(BadInput, match="AGRIVISION_RANKS_PER_NODE"):
        Place.from_environment(environment | {"AGRIVISION_RANKS_PER_NODE": "0"})


def test_nodes_with_different_numbers_of_ranks() -> None:
    with pytest.raises(BadInput, match="--ntasks-per-node"):
        Place.from_environment(
            {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"}
        )


def test_an_array_task_has_two_names() -> None:
    place = Place.from_environment(
        {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    )
    assert (place.job, place.raw_job, place.task) == ("17_2", "19", 2)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["train", "--run_dir", "a", "--run_dir=/b"], "/b/launch"),
        (["evaluate", "--checkpoint", "/b"], "/b.evaluate.launch"),
        (["predict", "x", "--out", "/b"], "/b.launch"),
        (["prepare", "x", "/b", "--strict"], "/b.launch"),
        (["prepare", "--strict", "x", "/b"], ""),
        (["prepare", "x", "--strict"], ""),
        (["train", "--run_dir"], ""),
        (["rain"], ""),
    ],
)
def test_where_a_job_is(words: list[str], folder: str) -> None:
    assert entry.job_folder(words[0], words[1:]) == folder


def test_only_a_frozen_job_goes_on_in_its_own_code(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    words = ["train", "--run_dir", str(tmp_path / "run")]
    own = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}
    assert entry.frozen(words, own) == ("", "")  # no code yet
    job.code.mkdir()
    assert entry.frozen(words, own) == (str(job.path), str(job.spec_file))
    assert entry.frozen(words, own | {"SLURM_JOB_ID": "18"}) == ("", "")
    assert entry.frozen([], own) == ("", "")
    # A cluster that is set up anew counts from 1 again: that is another job's number.
    assert entry.frozen(words, {"SLURM_JOB_ID": "17"}) == ("", "")


def test_a_task_goes_on_in_its_own_code(tmp_path: Path) -> None:
    job = JobDirectory.beside(tmp_path / "out", 3)
    job.make()
    job.code.mkdir()
    job.write_spec(SPEC)
    job.submitted("17_3", "sbatch")
    words = ["prepare", "x", str(tmp_path / "out")]
    own = {"SLURM_JOB_ID": "21", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    own["SLURM_RESTART_COUNT"] = "1"
    assert entry.frozen(words, own) == (str(job.path), str(job.spec_file))
    assert entry.frozen(words, own | {"SLURM_ARRAY_TASK_ID": "2"}) == ("", "")


def test_outside_of_a_job() -> None:
    with pytest.raises(BadInput, match="submit it with sbatch"):
        Place.from_environment({})
