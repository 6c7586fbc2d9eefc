"""Jobs on a cluster of one's own: submitted, looked at, waited for, disturbed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from launch.cluster import Cluster, ClusterError

T = TypeVar("T")

POLL_SECONDS = 0.1
TIDY_SECONDS = 60.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL",
         "OUT_OF_MEMORY", "DEADLINE"}  # fmt: skip


def submit(cluster: Cluster, script: Path, *arguments: str, options: Sequence[str] = ()) -> str:
    """Submit a batch script; returns the job's id.

    Args:
        cluster: where.
        script: file that sbatch reads.
        arguments: the script's own.
        options: of sbatch, such as `--nodes=2`.
    """
    answer = cluster.run("sbatch", "--parsable", *options, "--", str(script), *arguments)
    return answer.strip().partition(";")[0]


def job(cluster: Cluster, number: str) -> dict[str, str]:
    """The record of a job, as `scontrol show job` writes it: JobState, Restarts, NodeList, StdOut, …

    Args:
        cluster: where.
        number: the job's id; `12_3` for one of an array, whose tasks `jobs` gives all.
    """
    records = jobs(cluster, number)
    assert len(records) == 1, f"{number} is {len(records)} jobs: {[one['JobId'] for one in records]}"
    return records[0]


def jobs(cluster: Cluster, number: str) -> list[dict[str, str]]:
    """The records of a job, or of all tasks of an array."""
    answer = cluster.run("scontrol", "--oneliner", "show", "job", number)
    return [_fields(line) for line in answer.splitlines() if line.strip()]


def _fields(line: str) -> dict[str, str]:
    # Every key begins with a capital; a value may hold spaces, and words with an equals sign.
    pairs = re.split(r"(?:^|\s+)(?=[A-Z][\w/:]*=)", line.strip())
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs) if key}


def state(cluster: Cluster, number: str) -> str:
    """PENDING, RUNNING, COMPLETING, COMPLETED, …"""
    return job(cluster, number)["JobState"]


def log(cluster: Cluster, number: str) -> str:
    """What the job has written to its standard output so far."""
    path = Path(job(cluster, number)["StdOut"])
    return path.read_text(errors="replace") if path.is_file() else ""


def wait_for(
    condition: Callable[[], T],
    seconds: float,
    what: str,
    *,
    cluster: Cluster | None = None,
    number: str | None = None,
) -> T:
    """Poll until a condition holds; returns what it returned.

    Args:
        condition: asked again and again until it is true.
        seconds: after which the test fails, with the job's record and the end of its log.
        what: it is that was waited for.
        cluster: of the job.
        number: the job's id.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}\n{_story(cluster, number)}")
        time.sleep(POLL_SECONDS)
    return answer


def wait_for_state(cluster: Cluster, number: str, *states: str, seconds: float) -> str:
    """Wait until a job is in one of the states; returns which."""

    def there() -> str:
        now = state(cluster, number)
        return now if now in states else ""

    what = f"job {number} is {' or '.join(states)}"
    return wait_for(there, seconds, what, cluster=cluster, number=number)


def wait_for_end(cluster: Cluster, number: str, seconds: float) -> dict[str, str]:
    """Wait until a job is over; returns its record."""
    wait_for_state(cluster, number, *ENDED, seconds=seconds)
    return job(cluster, number)


def _story(cluster: Cluster | None, number: str | None) -> str:
    if cluster is None or number is None:
        return ""
    try:
        lines = log(cluster, number).splitlines()[-40:]
        return "\n".join([cluster.run("scontrol", "show", "job", number), *lines])
    except ClusterError as error:
        return str(error)


def cancel(cluster: Cluster, number: str) -> None:
    """Cancel a job as its user does."""
    cluster.run("scancel", number)


def preempt(cluster: Cluster, number: str, *, seconds: float = 60) -> None:
    """Put an exclusive job of a higher partition on the nodes of a job, until that has left them.

    Args:
        cluster: where.
        number: a running job in the partition `preempt` or `cancelp`.
        seconds: for it to leave: the grace time, KillWait and some.
    """
    record = job(cluster, number)
    assert record["JobState"] == "RUNNING", record
    answer = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodes={record['NumNodes']}",
        f"--nodelist={record['NodeList']}", "--output=/dev/null", "--wrap=exec sleep 600",
    )  # fmt: skip
    intruder = answer.strip()

    def gone() -> bool:
        now = job(cluster, number)
        left = now["JobState"] not in ("RUNNING", "COMPLETING") or now["Restarts"] != record["Restarts"]
        return left and state(cluster, intruder) == "RUNNING"

    try:
        wait_for(gone, seconds, f"job {number} is preempted", cluster=cluster, number=number)
    finally:
        cancel(cluster, intruder)


def tidy(cluster: Cluster) -> None:
    """Bring a cluster back to what it was: all daemons up, no job left, every node idle."""
    if not cluster.runs("slurmctld"):
        cluster.start_controller()
    for name in cluster.nodes:
        if not cluster.runs(name):
            cluster.start_node(name)
    cluster.run("scancel", f"--user={os.getuid()}")
    wait_for(lambda: _idle(cluster), TIDY_SECONDS, f"all nodes of {cluster.folder} are idle")


def _idle(cluster: Cluster) -> bool:
    states = cluster.states()
    for name, now in states.items():
        if now.startswith(("down", "drain")) and not now.endswith("*"):
            cluster.set_node(name, "resume", "the test is over")
    queued = cluster.run("squeue", "--noheader", "--format=%i").split()
    return not queued and states == dict.fromkeys(cluster.nodes, "idle")
