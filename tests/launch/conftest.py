"""A stand-in for Slurm's commands that notes how it is called; tests/slurm has the real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launch.slurm import QueuedJob

_COLUMN = 255
_SBATCH = """#!/bin/bash
printf '%s\\n' "$@" >> "{home}/sbatch"
cp -- "${{@: -1}}" "{home}/script"
env > "{home}/environment"
if [[ -e "{home}/refusal" ]]; then cat "{home}/refusal" >&2; exit 1; fi
echo . >> "{home}/count"
echo "Submitted batch job $(wc -l < "{home}/count")"
"""
_SQUEUE = """#!/bin/bash
printf '%s\\n' "$*" >> "{home}/squeue"
if [[ -e "{home}/queue" ]]; then cat "{home}/queue"; fi
"""
_NOTING = """#!/bin/bash
printf '%s\\n' "$*" >> "{home}/{name}"
"""


@dataclasses.dataclass(frozen=True)
class FakeSlurm:
    """What the stand-in was told and asked.

    Attributes:
        home: its folder.
    """

    home: Path

    def calls(self, command: str) -> list[str]:
        """The words that sbatch got, one a line, or the command lines of another command."""
        file = self.home / command
        return file.read_text().splitlines() if file.is_file() else []

    @property
    def script(self) -> str:
        """The last script that was submitted."""
        return (self.home / "script").read_text()

    @property
    def environment(self) -> dict[str, str]:
        """That sbatch was called in."""
        lines = (self.home / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def refuse(self, text: str) -> None:
        """From now on sbatch fails and says this."""
        (self.home / "refusal").write_text(text)

    def hold(self, *jobs: QueuedJob) -> None:
        """From now on squeue knows these jobs."""
        (self.home / "queue").write_text("".join(f"{_line(job)}\n" for job in jobs))


def _line(job: QueuedJob) -> str:
    cells = [job.id, job.id, job.state, job.reason, job.time_left, job.time_limit, job.nodes, job.start]
    cells += ["N/A", str(job.restarts)]  # not preempted
    return "".join(cell.ljust(_COLUMN) for cell in cells)


def queued(number: str, state: str = "RUNNING", reason: str = "None", start: str = "N/A") -> QueuedJob:
    """A job as squeue knows it."""
    return QueuedJob(
        id=number,
        state=state,
        reason=reason,
        time_left="1:00:00",
        time_limit="2:00:00",
        nodes="n1",
        start=start,
        preempted=False,
    )


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own: no profile, no cache of this machine's user."""
    home = tmp_path / ".home"
    home.mkdir()
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "AGRIVISION_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """The stand-in, first on the PATH."""
    home = tmp_path / ".slurm"
    (home / "bin").mkdir(parents=True)
    programs = {
        "sbatch": _SBATCH,
        "squeue": _SQUEUE,
        "scancel": _NOTING,
        "scontrol": _NOTING,
        "srun": _NOTING,
    }
    for name, text in programs.items():
        file = home / "bin" / name
        file.write_text(text.format(home=home, name=name))
        file.chmod(0o700)
    monkeypatch.setenv("PATH", str(home / "bin"), prepend=":")
    return FakeSlurm(home)


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which there is no Slurm."""
    empty = tmp_path / ".empty"
    empty.mkdir()
    monkeypatch.setenv("PATH", str(empty))


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Path:
    """A configuration of 18 steps."""
    file = tmp_path / "config.yaml"
    file.write_text(
        f"data: {{path: {dataset}, batch_size: 6, crop: 32, threads: 1}}\n"
        "model: {base_channels: 4, depth: 2}\n"
        "training: {epochs: 3, checkpoint_every_steps: 5}\n"
        "monitor: {tensorboard: false, images: 0, log_every_steps: 3}\n"
    )
    return file
