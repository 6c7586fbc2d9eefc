"""What Slurm says of this user's jobs, asked for all together and not too often.

The answer is kept in a private file for half a minute, also where it is that there was none: `watch -n1
python -m launch status` on every screen of the office costs the controller one question. Nothing here
or elsewhere in launch/ asks it the same again sooner.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agrivision.errors import AgrivisionError, Untrusted
from agrivision.ownership import read_own
from agrivision.storage import make_private, write_atomically
from launch import slurm
from launch.slurm import QueuedJob

SECONDS = 30.0
# What this process was told, and when, where there is no home to write to.
_WITHOUT_FILE: dict[Path, tuple[float, Answer]] = {}


@dataclass(frozen=True)
class Answer:
    """What Slurm said.

    Attributes:
        jobs: of this user, by id; those that it has forgotten are not among them.
        age: seconds since it said so; None where it did not say anything.
        problem: why it did not; else empty.
    """

    jobs: dict[str, QueuedJob]
    age: float | None
    problem: str = ""


def poll(
    submitted: float,
    *,
    ask: Callable[[], dict[str, QueuedJob]] = slurm.queue_of_user,
    clock: Callable[[], float] = time.time,
    environment: Mapping[str, str] = os.environ,
) -> Answer:
    """Ask Slurm, unless the last answer is young and holds what is looked for.

    Args:
        submitted: when the latest of the jobs that are looked for was, in seconds since 1970; an answer
            from before that does not know it.
        ask: Slurm.
        clock: seconds since 1970.
        environment: says where caches are, and which cluster is meant.
    """
    file, now = _file(environment), clock()
    asked, kept = _read(file, now)
    # A time of submission that is still to come is that of a file server whose clock is ahead.
    if 0 <= now - asked < SECONDS and not asked < submitted <= now:
        return kept
    try:
        answer = Answer(ask(), 0.0)
    except slurm.SlurmError as error:
        answer = Answer({}, None, str(error))
    _write(file, now, answer)
    return answer


def forget(environment: Mapping[str, str] = os.environ) -> None:
    """Drop what Slurm said: a job was changed since, and whoever looks next wants to see that.

    Args:
        environment: says where caches are, and which cluster is meant.
    """
    file = _file(environment)
    _WITHOUT_FILE.pop(file, None)
    with suppress(OSError):  # where it cannot be written, it is old half a minute later
        file.unlink(missing_ok=True)


def _file(environment: Mapping[str, str]) -> Path:
    home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cluster = f"{environment.get('SLURM_CONF', '')}\n{environment.get('SLURM_CLUSTERS', '')}"
    return home / "agrivision" / f"queue-{hashlib.sha256(cluster.encode()).hexdigest()[:16]}.json"


def _read(file: Path, now: float) -> tuple[float, Answer]:
    """When Slurm was asked, and what came of it; as if it were long ago where there is no file."""
    try:
        content = json.loads(read_own(file))
        asked, problem = float(content["time"]), str(content["problem"])
        jobs = {str(name): QueuedJob(**job) for name, job in content["jobs"].items()}
    except (OSError, Untrusted, ValueError, KeyError, TypeError, AttributeError):
        asked, kept = _WITHOUT_FILE.get(file, (0.0, Answer({}, None)))
        return asked, dataclasses.replace(kept, age=None if kept.age is None else now - asked)
    return asked, Answer(jobs, None if problem else now - asked, problem)


def _write(file: Path, now: float, answer: Answer) -> None:
    jobs = {name: dataclasses.asdict(job) for name, job in answer.jobs.items()}
    content = {"time": now, "problem": answer.problem, "jobs": jobs}
    try:
        make_private(file.parent)
        write_atomically(file, json.dumps(content).encode())
    except AgrivisionError:
        _WITHOUT_FILE[file] = now, answer
