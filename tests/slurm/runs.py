"""Training runs as batch jobs: submitted, watched, compared with runs that nothing disturbed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agrivision import checkpoint
from agrivision.errors import ExitCode
from agrivision.rundir import checkpoint_step
from launch.cluster import Cluster
from launch.jobdir import Attempt, JobDirectory
from tests import ranks
from tests.slurm import jobs
from tests.training.runs import arguments, assert_same

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "slurm"
HOOKS = Path(__file__).with_name("hooks.py")
# Many cheap steps: six an epoch, each some milliseconds.
CHEAP = {
    "training__epochs": 10,
    "training__checkpoint_every_steps": 5,
    "training__checkpoint_every_epochs": 0,
    "training__evaluate_every_epochs": 0,
    "monitor__images": 0,
    "monitor__log_every_steps": 1,
}
SLOW = 0.2  # seconds a step: time to disturb it


def environment(**hooks: float) -> dict[str, str]:
    """What a test exports before it calls sbatch."""
    words = ",".join(f"{name}={value}" for name, value in hooks.items())
    return {
        "AGRIVISION_BATCH_PYTHON": sys.executable,
        "AGRIVISION_SITE_SH": "/nowhere/site.sh",
        "AGRIVISION_PYTHON": f"{sys.executable} {HOOKS} {words}" if words else sys.executable,
    }


def hook(monkeypatch: pytest.MonkeyPatch, **hooks: float) -> None:
    """Disturb the ranks of the jobs that are submitted from now on."""
    for name, value in environment(**hooks).items():
        monkeypatch.setenv(name, value)


@dataclass(frozen=True)
class Run:
    """A training run on a cluster, and the job that it was submitted as.

    Attributes:
        cluster: where.
        path: run directory.
        number: the job's id.
    """

    cluster: Cluster
    path: Path
    number: str

    @property
    def job(self) -> JobDirectory:
        return JobDirectory.of_run(self.path)

    @property
    def attempts(self) -> list[Attempt]:
        return self.job.attempts()

    @property
    def decisions(self) -> list[str]:
        """What followed each attempt."""
        return [attempt.decision for attempt in self.attempts]

    @property
    def log(self) -> str:
        return jobs.log(self.cluster, self.number)

    @property
    def rank_log(self) -> str:
        return (self.path / "log" / "rank-0.log").read_text()

    @property
    def steps(self) -> list[int]:
        """The steps in metrics.jsonl, in their order there."""
        return [row["step"] for row in _rows(self.path / "metrics.jsonl") if row["kind"] == "training"]

    def reach(self, step: int, seconds: float = 120) -> None:
        """Wait until a step is done; a job that has ended before fails the test at once."""

        def reached() -> bool:
            if self.steps[-1:] >= [step]:
                return True
            now = jobs.state(self.cluster, self.number)
            assert now not in jobs.ENDED, f"{now} before step {step}: {self.log}"
            return False

        self.wait(reached, seconds, f"step {step}")

    def wait(self, condition: Any, seconds: float, what: str) -> Any:
        """Poll until a condition holds; a failure shows the job's log."""
        return jobs.wait_for(condition, seconds, what, cluster=self.cluster, number=self.number)

    def end(self, seconds: float = 150) -> str:
        """Wait until the job is over; returns its state."""
        return jobs.wait_for_end(self.cluster, self.number, seconds)["JobState"]

    def assert_whole(self, reference: Path) -> None:
        """It ended as the run that nothing disturbed, and every checkpoint is whole."""
        assert self.attempts[-1].decision == "done", self.log
        assert_same(self.path, reference)
        for entry in checkpoint.entries(self.path / "checkpoints"):
            checkpoint.load(entry.folder)


@dataclass(frozen=True)
class Fault:
    """A moment at which something was done to a run.

    Attributes:
        run: what it was done to.
        time: seconds since 1970.
        step: that had been done by then.
    """

    run: Run
    time: float
    step: int

    @classmethod
    def now(cls, run: Run) -> Fault:
        """It is about to be done."""
        return cls(run, time.time(), max(run.steps, default=0))

    def cost(self) -> dict[str, float]:
        """Seconds until a checkpoint was saved because of it, steps repeated, seconds lost.

        Lost is the time until a later attempt had done the step at which training was, or the one after
        it, where nothing had to be repeated. What did not happen is left out.
        """
        before = [attempt for attempt in self.run.attempts if attempt.began <= self.time][-1:]
        after = [attempt for attempt in self.run.attempts if attempt.began > self.time][:1]
        found: dict[str, float] = {}
        for attempt in before:
            folders = checkpoint.folders(self.run.path / "checkpoints")
            saved = [folder for folder in folders if checkpoint_step(folder) == attempt.to_step]
            if attempt.code == ExitCode.STOPPED and saved:
                found["seconds to save"] = round(saved[0].stat().st_mtime - self.time, 2)
        for attempt in after:
            begin = attempt.from_step or 0
            reached = max([self.step, *(each.to_step or 0 for each in before)])
            found["steps repeated"] = max(0, reached - begin)
            done = self._times().get(max(reached, begin + 1))
            if done is not None:
                found["seconds lost"] = round(done - self.time, 1)
        return found

    def _times(self) -> dict[int, float]:
        """When each step was done, by the attempt whose work stands."""
        events = EventAccumulator(str(self.run.path / "tensorboard"), size_guidance={"scalars": 0})
        return {event.step: event.wall_time for event in events.Reload().Scalars("loss/total")}


def rank_pids(run: Run) -> dict[int, int]:
    """The processes of a run's ranks, by rank."""
    # srun's own command line ends with the same words, and its environment names no rank.
    pids = processes(run.path, "agrivision", "train")
    found = {rank_of(pid): pid for pid in pids}
    return {rank: found[rank] for rank in sorted(found) if rank >= 0}


def processes(*words: str | Path) -> list[int]:
    """The processes whose command line has all of these words."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = set((process / "cmdline").read_bytes().split(b"\0"))
            except OSError:
                continue
            if {os.fsencode(word) for word in words} <= command:
                found.append(int(process.name))
    return found


def rank_of(pid: int) -> int:
    """The rank that a process of a step is; -1 for any other process."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return -1
    found = [int(each.partition(b"=")[2]) for each in variables if each.startswith(b"SLURM_PROCID=")]
    return found[0] if found and any(each.startswith(b"SLURM_STEP_ID=") for each in variables) else -1


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return
    for line in lines:
        if line.endswith("\n"):  # the last one may be half written
            yield json.loads(line)


def train(
    cluster: Cluster, dataset: Path, path: Path, options: Sequence[str] = (), **overrides: Any
) -> Run:
    """Submit a run with slurm/train.sbatch, in the folder of its run directory."""
    words = arguments(dataset, path, **(CHEAP | overrides))[1:]
    return submit(cluster, path, words, options)


def submit(cluster: Cluster, path: Path, words: Sequence[str], options: Sequence[str] = ()) -> Run:
    """Submit slurm/train.sbatch with these words after its name."""
    options = [f"--chdir={path.parent}", "--job-name=test", *options]
    return Run(cluster, path, jobs.submit(cluster, SCRIPTS / "train.sbatch", *words, options=options))


class References:
    """Runs that nothing disturbs, outside of Slurm, each made once."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self._dataset, self._folder = dataset, folder

    def get(self, size: int = 1, **overrides: Any) -> Path:
        """The run directory of a run by so many ranks.

        Args:
            size: number of ranks.
            overrides: of the configuration.
        """
        words = "-".join(f"{key}={value}" for key, value in sorted(overrides.items()))
        path = self._folder / f"{size}-{words}"
        if not path.exists():
            codes = ranks.run(arguments(self._dataset, path, **(CHEAP | overrides)), size)
            assert codes == [0] * size
        return path
