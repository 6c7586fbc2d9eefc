"""Which jobs somebody means by a path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agrivision.errors import BadInput
from agrivision.rundir import RunDirectory
from launch.jobdir import JobDirectory

_DEPTH = 3  # runs/SWEEP/ELEMENT, and the folder itself
_SUFFIX = ".launch"


@dataclass(frozen=True)
class Found:
    """A run or another piece of work, with or without a job.

    Attributes:
        path: of what is written: the run directory, or what stands beside the job directory.
        job: its job directory; None for a run that was never launched.
    """

    path: Path
    job: JobDirectory | None


def find(paths: Sequence[Path]) -> list[Found]:
    """All work that some paths stand for, each once, in the order of the paths.

    Args:
        paths: run directories, outputs, job directories, or folders that hold some.

    Raises:
        BadInput: a path stands for none.
    """
    found: dict[Path, Found] = {}
    for path in paths:
        some = list(_below(Path(os.path.abspath(path)), _DEPTH))  # noqa: PTH100 - follows no links
        if not some:
            what = "there is no such folder" if not path.exists() else "no run and no job in it"
            raise BadInput(f"{path}: {what}")
        for one in some:
            found.setdefault(one.path, one)
    return list(found.values())


def find_one(path: Path) -> tuple[Path, JobDirectory]:
    """The one job that a path stands for, and what it writes.

    Raises:
        BadInput: it stands for none or for several, or was never launched.
    """
    found = find([path])
    if len(found) > 1:
        raise BadInput(f"{path} holds {len(found)} of them: give one, such as {found[0].path}")
    if found[0].job is None:
        raise BadInput(f"{path} was not launched: no job is known")
    return found[0].path, found[0].job


def _below(path: Path, depth: int) -> Iterator[Found]:
    own = _itself(path)
    if own is not None:
        yield own
    elif depth and path.is_dir():
        for child in sorted(Path(entry.path) for entry in os.scandir(path) if entry.is_dir()):
            if not child.name.startswith(".") and child.name != "launch":
                yield from _below(child, depth - 1)


def _itself(path: Path) -> Found | None:
    try:
        job = JobDirectory.find(path)
    except BadInput:
        run = RunDirectory(path)
        is_run = run.metrics.is_file() or run.checkpoints.is_dir()
        return Found(path, None) if is_run else None
    if job.path != path:
        return Found(path, job)
    out = path.parent if path.name == "launch" else path.with_name(path.name.removesuffix(_SUFFIX))
    return Found(out, job)


def tasks(job: JobDirectory) -> dict[int, str]:
    """The latest job of each task, where a job array shares the directory; empty for any other."""
    numbers = sorted(
        place.task
        for place in map(JobDirectory.of_spec, job.path.glob("job-*.json"))
        if place.task is not None
    )
    latest = {name.partition("_")[2]: name for name in job.jobs()}
    return {task: latest.get(str(task), "") for task in numbers}
