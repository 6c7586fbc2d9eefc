"""Which job of a directory has the turn: two that ran at once would write the same files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from agrivision.errors import BadInput
from launch import slurm
from launch.find import jobs_of
from launch.jobdir import JobDirectory
from launch.place import Place
from launch.poll import SECONDS

_RUNS = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "CONFIGURING", "RESIZING", "SIGNALING"})
_GOES = "COMPLETING"
_WAITS = "PENDING"
_PATIENCE_SECONDS = 120.0  # four questions: a job that was cancelled may still be saving


def earlier_jobs(job: JobDirectory, place: Place, say: Callable[[str], None]) -> list[str]:
    """The other jobs of a directory that are over; one that is ending is waited for.

    Their ranks, if a node that Slurm has lost still runs any, must not write.

    Args:
        job: its directory.
        place: of the job that asks.
        say: called with a line for the user.

    Raises:
        BadInput: another job of the directory runs.
    """
    others = _others(job, place)
    end = time.monotonic() + _PATIENCE_SECONDS
    waited = False
    while True:
        states = _states(others)
        for other, state in states.items():
            if state in _RUNS:
                raise BadInput(
                    f"job {other} runs in {job.path}: wait for it, cancel it, or choose another folder"
                )
        ending = [other for other, state in states.items() if state == _GOES]
        if not ending or time.monotonic() > end:
            return [other for other in others if states.get(other) not in (_WAITS, _GOES)]
        if not waited:
            say(f"waiting for job {' '.join(ending)}, which is about to end")
        waited = True
        time.sleep(SECONDS)


def _others(job: JobDirectory, place: Place) -> list[str]:
    """Jobs that do what this one does; the other tasks of an array do something else."""
    return [name for name in dict.fromkeys(jobs_of(job)) if name not in (place.job, place.raw_job)]


def _states(jobs: Sequence[str]) -> dict[str, str]:
    """What Slurm knows of some jobs; nothing where it does not answer."""
    try:
        known = slurm.queue(jobs)
    except slurm.SlurmError:
        return dict.fromkeys(jobs, _WAITS)
    return {name: known[name].state for name in jobs if name in known}
