"""What status shows: from Slurm where it knows, from the job's own files where it has forgotten."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agrivision.errors import BadInput
from agrivision.rundir import RunDirectory
from agrivision.world import World
from launch.__main__ import main
from launch.find import find, find_one
from launch.freeze import freeze_train
from launch.jobdir import Attempt, JobDirectory, JobSpec
from launch.poll import SECONDS, Answer, forget, poll
from launch.slurm import QueuedJob, SlurmError
from launch.status import Row, explain, known_of, plan_of, report, state_of, why
from tests.launch.conftest import FakeSlurm, queued

ATTEMPT = Attempt(number=1, job="7", nodes=("n1",), tasks=2, began=1.0)


def ended(
    decision: str, *, code: int = 85, number: int = 1, job: str = "7", reason: str = ""
) -> Attempt:
    return dataclasses.replace(
        ATTEMPT, number=number, job=job, ended=2.0, code=code, decision=decision, reason=reason
    )


def write(
    job: JobDirectory, *, command: Sequence[str] = ("predict",), run_dir: str = ""
) -> JobDirectory:
    job.make()
    job.write_spec(JobSpec(command=tuple(command), python=("python",), run_dir=run_dir))
    return job


@pytest.mark.parametrize(
    ("last", "now", "state"),
    [
        (None, queued("7", "PENDING"), "pending"),
        (ended("requeued"), queued("7", "PENDING"), "pending"),
        (ATTEMPT, queued("7"), "running"),
        (ended("done", code=0), queued("7", "COMPLETING"), "completing"),
        (ended("done", code=0), queued("7", "COMPLETED"), "done"),
        (ended("done", code=0), None, "done"),
        (ended("given up"), queued("7", "FAILED"), "given up"),
        (ended("given up"), None, "given up"),
        (ended("left completing"), queued("7", "CANCELLED"), "cancelled"),
        (ended("left completing"), None, "cancelled"),
        (ATTEMPT, queued("7", "CANCELLED"), "cancelled"),
        (ATTEMPT, queued("7", "NODE_FAIL"), "node_fail"),
        (ATTEMPT, None, "lost"),
        (ended("requeued"), None, "lost"),
        (None, queued("7", "CANCELLED"), "cancelled"),
        (None, None, "ended"),
        (ATTEMPT, queued("7", "COMPLETED"), "done"),
        (ended("successor 7", job="6"), None, "ended"),
    ],
)
def test_states(last: Attempt | None, now: QueuedJob | None, state: str) -> None:
    assert state_of("7", last, now) == state


def test_what_slurm_was_never_given() -> None:
    assert state_of("", None, None) == "not submitted"


def test_why_a_job_waits_or_ended() -> None:
    waiting = queued("7", "PENDING", "Resources", start="2030-01-01T00:00:00")
    assert (
        why(None, waiting) == "Resources: next in line, waiting for nodes, starts 2030-01-01T00:00:00"
    )
    assert why(ATTEMPT, queued("7")) == ""
    assert why(ended("given up", code=1, reason="rank 0: no data"), None) == "rank 0: no data"
    assert why(ended("left completing"), None) == "asked to stop, and saved"
    assert why(ended("done", code=0), None) == ""


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("Priority", "Priority: others are before it"),
        ("DependencyNeverSatisfied", "resume that one"),
        ("QOSMaxJobsPerUserLimit", "quality of service"),
        ("AssocGrpGRES", "account"),
        ("ReqNodeNotAvail, UnavailableNodes:n3", "ReqNodeNotAvail: a node"),
        ("PartitionConfig", "PartitionConfig: no node of the partition has what it asks for"),
        ("BadConstraints", "cannot start"),
        ("SomethingNew", "SomethingNew"),
        ("None", "not looked at yet"),
    ],
)
def test_reasons_in_words(word: str, meaning: str) -> None:
    assert meaning in explain(word)


class Controller:
    """Counts how often it is asked; at first it answers."""

    def __init__(self) -> None:
        self.asked = 0
        self.now = 1000.0
        self.answers = True

    def ask(self) -> dict[str, QueuedJob]:
        self.asked += 1
        if not self.answers:
            raise SlurmError("squeue did not answer")
        return {"3": queued("3")}

    def poll(self, submitted: float = 0.0) -> Answer:
        return poll(submitted, ask=self.ask, clock=lambda: self.now)


def test_slurm_is_asked_once_for_all_and_not_again_for_half_a_minute(home: Path) -> None:
    slurm = Controller()
    assert slurm.poll() == Answer({"3": queued("3")}, 0.0)
    (file,) = (home / ".cache" / "agrivision").iterdir()
    written = file.stat().st_ino
    slurm.now += 29
    assert slurm.poll() == Answer({"3": queued("3")}, 29.0)
    assert (slurm.asked, file.stat().st_ino) == (1, written)  # nor is anything written again
    slurm.now += 1
    assert slurm.poll().age == 0.0
    assert slurm.asked == 2
    assert file.parent.stat().st_mode & 0o077 == 0
    file.write_text('{"time": 1030}')
    assert slurm.poll().age == 0.0


def test_silence_is_remembered_as_long() -> None:
    slurm = Controller()
    slurm.answers = False
    silent = Answer({}, None, "squeue did not answer")
    for _ in range(20):
        assert slurm.poll() == silent
        slurm.now += 0.5
    assert slurm.asked == 1
    slurm.now += 20
    slurm.answers = True
    assert slurm.poll() == Answer({"3": queued("3")}, 0.0)


def test_a_job_that_was_submitted_after_the_answer_is_asked_about_once() -> None:
    slurm = Controller()
    slurm.poll()
    slurm.now += 5
    submitted = slurm.now - 1
    assert slurm.poll(submitted).age == 0.0
    slurm.now += 5
    assert slurm.poll(submitted).age == 5.0
    assert slurm.poll(slurm.now + 1).age == 5.0  # by a clock that is ahead of this one
    assert slurm.asked == 2


def test_a_clock_that_went_back_is_no_young_answer() -> None:
    slurm = Controller()
    slurm.poll()
    slurm.now -= 3600
    assert slurm.poll().age == 0.0
    assert slurm.asked == 2


def test_what_was_said_before_a_change_can_be_forgotten(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Controller()
    forget()  # nothing was said yet
    slurm.poll()
    forget()
    slurm.poll()
    assert slurm.asked == 2
    blocked = home / "file"  # where nothing can be kept but in this process
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    slurm.poll()
    slurm.poll()
    assert slurm.asked == 3
    forget()
    slurm.poll()
    assert slurm.asked == 4


def test_two_screens_ask_once(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        write(JobDirectory.beside(tmp_path / name)).submitted(str(ord(name)), by="launch")
    slurm.hold(queued("97"), queued("98", "PENDING", "Priority"))
    for _ in range(3):
        assert main(["status", str(tmp_path)]) == 0
    (question,) = slurm.calls("squeue")
    assert f"--user={os.getuid()}" in question and "--jobs" not in question
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/a: running, job 97, left 1:00:00"
    assert lines[1].startswith(f"{tmp_path}/b: pending (Priority: others are before it), job 98")
    assert lines[2].startswith(f"{tmp_path}/c: ended, job 99")
    assert lines[3] == f"Slurm was asked 0 s ago (at most every {SECONDS:.0f} s)"


@pytest.fixture
def run_dir(config: Path, tmp_path: Path) -> Path:
    """A run that was launched, and has done 9 of 18 steps."""
    job, run_dir, command = freeze_train(["--config", str(config), "--run_dir", str(tmp_path / "run")])
    write(job, command=command, run_dir=str(run_dir)).submitted("7", by="launch")
    rows = [
        {"kind": "training", "step": 6, "epoch": 0, "images_per_second": 50.0},
        {"kind": "evaluation", "step": 6, "epoch": 1, "miou": 0.5},
        {"kind": "evaluation", "step": 8, "epoch": 1, "miou": 0.25},
        {"kind": "training", "step": 9, "epoch": 1, "images_per_second": 75.5},
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text + '{"kind": "training", "st')
    return run_dir


def test_a_run_s_row(run_dir: Path, slurm: FakeSlurm) -> None:
    job = JobDirectory.of_run(run_dir)
    job.began(ATTEMPT)
    slurm.hold(queued("7"))
    expected = Row(
        path=str(run_dir),
        command="train",
        job="7",
        state="running",
        step=9,
        total_steps=18,
        epoch=2,
        miou=0.25,
        best_miou=0.5,
        best_step=6,
        images_per_second=75.5,
        to_go=9 * 6 / 75.5,
        attempts=1,
        time_left="1:00:00",
    )
    assert report(find([run_dir])).rows == [expected]
    job.ended(ended("given up", code=86, reason="rank 1: diverged"))
    slurm.hold()
    gone = dataclasses.replace(expected, state="given up", time_left="", why="rank 1: diverged")
    (own,) = (Path.home() / ".cache" / "agrivision").iterdir()
    own.unlink()
    assert report(find([run_dir])).rows == [gone]


def test_status_works_where_slurm_does_not(
    run_dir: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    JobDirectory.of_run(run_dir).began(ended("given up", code=86, reason="rank 1: diverged"))
    assert main(["status", "--json", str(run_dir)]) == 0
    content = json.loads(capsys.readouterr().out)
    (row,) = content["jobs"]
    assert (row["state"], row["step"], row["why"]) == ("given up", 9, "rank 1: diverged")
    assert content["age"] is None and "squeue" in content["problem"]


def test_no_question_about_what_is_done(run_dir: Path, slurm: FakeSlurm) -> None:
    JobDirectory.of_run(run_dir).began(ended("done", code=0))
    assert report(find([run_dir])).rows[0].state == "done"
    assert slurm.calls("squeue") == []
    JobDirectory.of_run(run_dir).submitted("8", by="launch")
    slurm.hold(queued("8", "PENDING"))
    assert report(find([run_dir])).rows[0].state == "pending"  # what is done is that of before


@pytest.mark.parametrize(
    "row",
    ['"step": "x"', '"step": 1, "epoch": [1]', '"step": -1', '"step": 1, "images_per_second": {}'],
)
def test_a_row_that_is_not_ours_is_passed_over(row: str, config: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "local")
    run.path.mkdir()
    shutil.copyfile(config, run.config)
    rows = ['{"kind": "training", "step": 9, "epoch": 0}', f'{{"kind": "training", {row}}}']
    run.metrics.write_text("\n".join(rows))
    (found,) = report(find([run.path])).rows
    assert (found.state, found.step) == ("not launched", 9)


def test_a_damaged_job_does_not_hide_the_others(
    run_dir: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write(JobDirectory.beside(tmp_path / "maps"))
    job.submitted("9", by="launch")
    job.spec_file.write_text("{")
    slurm.hold(queued("9"))
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(f"{run_dir.name}: " in line for line in lines)
    assert any("maps: unreadable (" in line and str(job.spec_file) in line for line in lines), lines


def test_what_strangers_wrote_is_shown_as_codes(
    run_dir: Path, no_slurm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    job = JobDirectory.of_run(run_dir)
    job.began(ended("given up", code=86, reason="\x1b]0;title\x07[red]"))
    assert main(["status", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b]0;title\\x07[red]" in said and "\x1b" not in said


@pytest.mark.parametrize(("step", "state"), [(9, "not launched"), (18, "done")])
def test_a_run_without_a_job(step: int, state: str, config: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "local")
    run.path.mkdir()
    shutil.copyfile(config, run.config)
    run.metrics.write_text(f'{{"kind": "training", "step": {step}, "epoch": 0}}\n')
    (row,) = report(find([run.path])).rows
    assert (row.state, row.step, row.total_steps) == (state, step, 18)
    with run.held(World()):
        assert report(find([run.path])).rows[0].state == "running"
    assert report(find([run.path])).rows[0].state == state
    run.config.unlink()  # nobody knows how many steps it has
    assert report(find([run.path])).rows[0].state == "not launched"


def test_an_array_that_shares_a_directory(tmp_path: Path, slurm: FakeSlurm) -> None:
    for task in range(4):
        job = write(JobDirectory.beside(tmp_path / "set", task), command=("prepare",))
        job.submitted(f"7_{task}", by="sbatch")
        job.began(ended("done", code=0, job=f"7_{task}") if task < 3 else ATTEMPT)
    slurm.hold(queued("7_3"))
    (row,) = report(find([tmp_path])).rows
    assert (row.job, row.state, row.attempts) == ("7", "done 3, running 1", 4)


def test_one_that_was_not_submitted_does_not_hide_the_others(
    tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    write(JobDirectory.beside(tmp_path / "a"))
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a: not submitted\n"
    assert slurm.calls("squeue") == []
    write(JobDirectory.beside(tmp_path / "b")).submitted("7", by="launch")
    slurm.hold(queued("7"))
    assert main(["status", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{tmp_path}/a: not submitted",
        f"{tmp_path}/b: running, job 7, left 1:00:00",
    ]


def test_the_successor_of_an_array_s_task(tmp_path: Path, slurm: FakeSlurm) -> None:
    for task in range(2):
        job = write(JobDirectory.beside(tmp_path / "set", task), command=("prepare",))
        job.submitted(f"7_{task}", by="launch")
        job.began(ended("done" if task else "successor 8", job=f"7_{task}"))
    job.submitted("8", "successor", after="7_0")
    slurm.hold(queued("8", "PENDING", "Dependency"))
    (row,) = report(find([tmp_path])).rows
    assert (row.state, row.attempts) == ("done 1, pending 1", 2)


def test_an_array_that_was_cancelled_before_it_began(tmp_path: Path, slurm: FakeSlurm) -> None:
    """To Slurm it is one job then, without tasks; one task's record stands for that task alone."""
    for task in range(2):
        write(JobDirectory.beside(tmp_path / "set", task)).submitted(f"7_{task}", by="launch")
    slurm.hold(queued("7", "CANCELLED"))
    assert report(find([tmp_path])).rows[0].state == "cancelled"
    own = queued("7_1", "CANCELLED")
    assert [known_of(job, {"7": own, "7_1": own}) for job in ("7_0", "7_1")] == [None, own]


def test_total_steps_are_those_of_the_loader(run_dir: Path, config: Path) -> None:
    assert plan_of(config) == (18, 6)
    config.write_text(config.read_text().replace("epochs: 3", "epochs: 3, max_steps: 7"))
    assert plan_of(config) == (7, 6)
    assert plan_of(config.with_name("nowhere.yaml")) is None


@pytest.mark.parametrize("give", [lambda run: run, lambda run: run / "launch", lambda run: run.parent])
def test_what_a_path_stands_for(give: Callable[[Path], Path], run_dir: Path, tmp_path: Path) -> None:
    (one,) = find([give(run_dir), run_dir])
    assert one.path == run_dir and one.job == JobDirectory(run_dir / "launch")
    assert find_one(give(run_dir)) == (run_dir, JobDirectory(run_dir / "launch"))


def test_folders_of_runs(run_dir: Path, tmp_path: Path) -> None:
    write(JobDirectory.of_run(tmp_path / "sweep" / "000-seed=1"))
    write(JobDirectory.beside(tmp_path / "maps"))
    (tmp_path / "local" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sweep" / "launch").mkdir()
    found = {one.path.name: one.job is not None for one in find([tmp_path])}
    assert found == {"run": True, "000-seed=1": True, "maps": True, "local": False}
    with pytest.raises(BadInput, match="holds 4"):
        find_one(tmp_path)
    with pytest.raises(BadInput, match="not launched"):
        find_one(tmp_path / "local")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no run and no job"):
        find([tmp_path / "empty"])
