"""Training runs as batch jobs: submitted, watched, compared with runs that nothing disturbed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision import checkpoint
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


def environment(**hooks: float) -> dict[str, str]:
    """What a test exports before it calls sbatch."""
    words = ",".join(f"{name}={value}" for name, value in hooks.items())
    return {
        "AGRIVISION_BATCH_PYTHON": sys.executable,
        "AGRIVISION_SITE_SH": "/dev/null",
        "AGRIVISION_PYTHON": f"{sys.executable} {HOOKS} {words}" if words else sys.executable,
    }


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
        """Wait until a step is done."""
        self.wait(lambda: self.steps[-1:] >= [step], seconds, f"step {step}")

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
