"""Slurm's commands: each called with a list of words, never through a shell, and its answer read.

Nothing here needs accounting (`sacct`): squeue knows a job until some minutes after its end.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agrivision.errors import BadInput
from agrivision.slurm import SlurmError, available, call, clean_environment, said, seconds_of

__all__ = [
    "QueuedJob",
    "SlurmError",
    "available",
    "cancel",
    "clean_environment",
    "queue",
    "queue_of_user",
    "requeue",
    "require",
    "seconds_of",
    "submit",
    "submit_successor",
    "update",
]

_RUNNING = "RUNNING"
_FIELDS = ("JobArrayID", "JobID", "State", "Reason", "TimeLeft", "TimeLimit", "NodeList", "StartTime",
           "PreemptTime", "RestartCnt")  # fmt: skip
_ID = re.compile(r"\d+(?:[_+]\d+)?")  # of a job, of an array's task, of a part of a heterogeneous job
_COLUMN = 255  # squeue cuts every column at its width


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """What squeue says of a job.

    Attributes:
        id: as people write it: `17`, or `17_3` for the fourth task of an array.
        state: PENDING, RUNNING, COMPLETING, CANCELLED, …
        reason: why it is pending, in Slurm's word; `None` where there is nothing to say.
        time_left: until its time limit, in Slurm's writing.
        time_limit: likewise.
        nodes: node list, empty while it is pending.
        start: when it started, or is expected to.
        preempted: it has been asked to make room.
        restarts: how often it was requeued.
    """

    id: str
    state: str
    reason: str
    time_left: str
    time_limit: str
    nodes: str
    start: str
    preempted: bool
    restarts: int = 0

    @property
    def seconds_left(self) -> int | None:
        """Until its time limit; None where it has none."""
        return seconds_of(self.time_left)

    @property
    def running(self) -> bool:
        """Whether it runs and nobody wants it to end for good: only then may it requeue itself."""
        return self.state == _RUNNING


def require() -> None:
    """Refuse to go on where there is no Slurm.

    Raises:
        BadInput: there is none.
    """
    if not available():
        raise BadInput(
            "no sbatch on the PATH: run this on a login node of the cluster, or start one of your own"
            " with `make cluster`"
        )


def queue(jobs: Sequence[str]) -> dict[str, QueuedJob]:
    """What Slurm knows of some jobs, in one question to it; jobs that it has forgotten are left out.

    Args:
        jobs: ids, `17` or `17_3`; `17` stands for all tasks of an array, as they are in the queue.

    Raises:
        SlurmError: squeue failed.
    """
    if not jobs:
        return {}
    return _queue(f"--jobs={','.join(map(_id, jobs))}")


def queue_of_user() -> dict[str, QueuedJob]:
    """What Slurm knows of all jobs of this user, in one question to it.

    Raises:
        SlurmError: squeue failed.
    """
    return _queue(f"--user={os.getuid()}")


def _queue(which: str) -> dict[str, QueuedJob]:
    columns = ",".join(f"{name}:{_COLUMN}" for name in _FIELDS)
    command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={columns}", which]
    done = call(command, check=False)
    if done.returncode != 0:
        # So it fails if it knows none of the ids that it is asked for; some of them are no error.
        if "Invalid job id" in done.stderr:
            return {}
        raise SlurmError(f"squeue: {said(done)}")
    found = {}
    for line in done.stdout.removesuffix("\n").split("\n") if done.stdout else ():
        row = dict(zip(_FIELDS, _cells(line, _COLUMN, len(_FIELDS)), strict=True))
        job = QueuedJob(
            id=row["JobArrayID"],
            state=row["State"],
            reason=row["Reason"],
            time_left=row["TimeLeft"],
            time_limit=row["TimeLimit"],
            nodes=row["NodeList"],
            start=row["StartTime"],
            preempted=row["PreemptTime"] not in ("", "N/A", "None"),
            restarts=int(row["RestartCnt"]) if row["RestartCnt"].isdigit() else 0,
        )
        found[job.id] = job
        found.setdefault(row["JobID"], job)
    return found


def _id(job: str) -> str:
    """A job's id; what is none comes from a damaged list of jobs, and may be an option to Slurm.

    Raises:
        SlurmError: it is none.
    """
    if _ID.fullmatch(job) is None:
        raise SlurmError(f"{job!r} is no job id")
    return job


def requeue(job: str) -> None:
    """Put a running job back into the queue.

    Raises:
        SlurmError: Slurm refused: requeueing is disabled, or the job has ended.
    """
    call(["scontrol", "requeue", _id(job)])


def cancel(jobs: Sequence[str]) -> None:
    """End jobs for good.

    Raises:
        SlurmError: Slurm refused.
    """
    call(["scancel", *map(_id, jobs)])


def update(job: str, **changes: str) -> None:
    """Change a job that has been submitted: `update("17", Dependency="afterok:18")`.

    Raises:
        SlurmError: Slurm refused.
    """
    call(
        [
            "scontrol",
            "update",
            f"JobId={_id(job)}",
            *(f"{key}={value}" for key, value in changes.items()),
        ]
    )


def submit(script: str, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Submit a batch script; what the calling job was given is not handed on.

    Args:
        script: path of the script.
        options: of sbatch.
        arguments: of the script.

    Returns:
        The id of the job.

    Raises:
        SlurmError: sbatch refused.
    """
    command = ["sbatch", "--parsable", *options, script, *arguments]
    done = call(command, environment=clean_environment(os.environ))
    return done.stdout.strip().splitlines()[-1].split(";")[0]


def submit_successor(
    job: str, command: Sequence[str], options: Sequence[str], lines: Sequence[str] = ()
) -> str:
    """Submit a job that asks for what a running one asked for, and starts when that one is over.

    To be called in the running job, whose environment says some of it.

    Args:
        job: SLURM_JOB_ID of the running one.
        command: what the new job runs: program and arguments.
        options: of sbatch, besides and before those that can be read off the running job.
        lines: of shell, before the command.

    Returns:
        The id of the new job.

    Raises:
        SlurmError: Slurm refused.
    """
    # What the calling script's umask and traps did is done again; its environment is handed on.
    begin = ["#!/bin/bash", "umask 077", "trap '' TERM USR1 USR2", *lines]
    script = "\n".join([*begin, f"exec {shlex.join(command)}", ""])
    given = {option.partition("=")[0] for option in options}
    asked = _asked_for(job) | _told_by(os.environ)
    rest = [f"{flag}={value}" if value else flag for flag, value in asked.items() if flag not in given]
    words = ["sbatch", "--parsable", *options, *rest, f"--dependency=afterany:{job}"]
    done = call(words, environment=clean_environment(os.environ), text=script)
    return done.stdout.strip().splitlines()[-1].split(";")[0]


# Of a job as squeue writes it → what sbatch calls it.
_ASKED = {
    "Name": "--job-name", "Partition": "--partition", "Account": "--account", "QOS": "--qos",
    "TimeLimit": "--time", "NumNodes": "--nodes", "tres-per-node": "--gres", "tres-per-job": "--gpus",
    "tres-per-task": "--gpus-per-task", "Feature": "--constraint", "Reservation": "--reservation",
    "Comment": "--comment", "WorkDir": "--chdir", "STDOUT": "--output", "ReqNodes": "--nodelist",
    "Licenses": "--licenses", "WCKey": "--wckey",
}  # fmt: skip
_LONG_COLUMN = 4096  # for paths
_NOTHING = {"", "N/A", "(null)", "None", "0"}
# Of a job as its environment says it.
_TOLD = {
    "SLURM_NTASKS_PER_NODE": "--ntasks-per-node", "SLURM_NTASKS": "--ntasks",
    "SLURM_CPUS_PER_TASK": "--cpus-per-task", "SLURM_MEM_PER_NODE": "--mem",
    "SLURM_MEM_PER_CPU": "--mem-per-cpu", "SLURM_MEM_PER_GPU": "--mem-per-gpu",
}  # fmt: skip


def _asked_for(job: str) -> dict[str, str]:
    columns = ",".join(f"{name}:{_LONG_COLUMN}" for name in _ASKED)
    line = _line_about(job, f"--Format={columns}")
    found = dict(zip(_ASKED.values(), _cells(line, _LONG_COLUMN, len(_ASKED)), strict=True))
    for flag in ("--gres", "--gpus", "--gpus-per-task"):
        # Written as `gres:gpu:2`, by newer versions as `gres/gpu:2`, some with CPUs beside it.
        entries = [re.sub(r"^gres[:/]", "", entry) for entry in found[flag].split(",")]
        gpus = [entry for entry in entries if not re.match(r"cpu[:=]", entry)]
        found[flag] = ",".join(gpus if flag == "--gres" else map(_without_gpu, gpus))
    if "%a" in found["--output"]:  # the successor of an array's task is a job by itself
        found["--output"] = found["--output"].replace("%A_%a", "%j").replace("%a", "%j")
    # `--Format` has no word for these in every version.
    found["--exclude"], _, shared = _line_about(job, "--format=%x|%h").rpartition("|")
    found = {flag: value for flag, value in found.items() if value not in _NOTHING}
    return found | ({"--exclusive": ""} if shared.strip() == "NO" else {})


def _without_gpu(entry: str) -> str:
    return re.sub(r"^gpu[:=]", "", entry)


def _cells(line: str, width: int, count: int) -> list[str]:
    """The columns of a line of squeue, which fills them up to a number of bytes, not of characters."""
    row = line.encode(errors="surrogateescape")
    starts = range(0, width * count, width)
    return [row[at : at + width].decode(errors="surrogateescape").strip() for at in starts]


def _line_about(job: str, form: str) -> str:
    done = call(["squeue", "--noheader", f"--jobs={job}", form])
    if not done.stdout:
        raise SlurmError(f"squeue says nothing of job {job}")
    return done.stdout.split("\n")[0]


def _told_by(environment: Mapping[str, str]) -> dict[str, str]:
    return {flag: environment[name] for name, flag in _TOLD.items() if environment.get(name)}
