"""Which jobs somebody means by a path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
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


def tasks(job: JobDirectory) -> list[JobDirectory]:
    """Those of the tasks of a job array that share a directory; else the directory itself."""
    files = map(JobDirectory.of_spec, job.path.glob("job-*.json"))
    shared = {one.task: one for one in files if one.task is not None}
    return [shared[task] for task in sorted(shared)] or [job]


def jobs_of(job: JobDirectory, names: Sequence[str] | None = None) -> list[str]:
    """Slurm's ids of a job or of one task of an array, oldest first.

    Args:
        job: its directory.
        names: all ids of the directory, for who asks for many tasks of it; None reads them.
    """
    names = job.jobs() if names is None else names
    if job.task is None:
        return list(names)
    # A task's successor is a job by itself: which task it goes on with, its predecessor's id says.
    lines = {name: [name] if "_" in name else job.lineage(name) for name in names}
    return [name for name in names if any(one.endswith(f"_{job.task}") for one in lines[name])]


def is_done(job: JobDirectory) -> bool:
    """Whether a job, or each task of an array, has ended well."""
    last = [next(reversed(task.attempts()), None) for task in tasks(job)]
    return all(attempt is not None and attempt.decision == "done" for attempt in last)


def last_submission(job: JobDirectory) -> float:
    """When Slurm was last given a job of this directory, in seconds since 1970; 0 for never."""
    with suppress(OSError):
        return (job.path / "submissions.jsonl").stat().st_mtime
    return 0.0
