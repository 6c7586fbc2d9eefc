"""What Slurm says of many jobs, asked for together and not too often.

The answer is kept in a private file for half a minute, so that `watch -n1 python -m launch status` on
every screen of the office costs the controller one question.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agrivision.errors import AgrivisionError
from agrivision.storage import make_private, write_atomically
from launch import slurm
from launch.slurm import QueuedJob

SECONDS = 30.0
_REMEMBERED_SECONDS = 300.0  # a job that nobody has asked for any more is not asked about


@dataclass(frozen=True)
class Answer:
    """What Slurm said.

    Attributes:
        jobs: by id; those that it has forgotten are not among them.
        age: seconds since it said so; None where it did not say anything.
        problem: why it did not; else empty.
    """

    jobs: dict[str, QueuedJob]
    age: float | None
    problem: str = ""


def poll(
    jobs: Iterable[str],
    *,
    ask: Callable[[list[str]], dict[str, QueuedJob]] = slurm.queue,
    clock: Callable[[], float] = time.time,
    environment: Mapping[str, str] = os.environ,
) -> Answer:
    """Ask about some jobs, unless the last answer is young and holds them.

    Args:
        jobs: ids.
        ask: Slurm.
        clock: seconds since 1970.
        environment: says where caches are, and which cluster is meant.
    """
    wanted = {job.partition("_")[0] for job in jobs}
    if not wanted:
        return Answer({}, None)
    file, now = _file(environment), clock()
    asked, seconds, known = _read(file)
    age = now - seconds
    if wanted <= asked.keys() and 0 <= age < SECONDS:
        _write(file, asked | dict.fromkeys(wanted, now), seconds, known)
        return Answer(known, age)
    asked = {job: at for job, at in asked.items() if 0 <= now - at < _REMEMBERED_SECONDS}
    asked |= dict.fromkeys(wanted, now)
    try:
        found = ask(sorted(asked, key=int))
    except slurm.SlurmError as error:
        return Answer({}, None, str(error))
    _write(file, asked, now, found)
    return Answer(found, 0.0)


def _file(environment: Mapping[str, str]) -> Path:
    home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cluster = f"{environment.get('SLURM_CONF', '')}\n{environment.get('SLURM_CLUSTERS', '')}"
    return home / "agrivision" / f"queue-{hashlib.sha256(cluster.encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> tuple[dict[str, float], float, dict[str, QueuedJob]]:
    """Who was asked about and when; when Slurm answered, and what; nothing where there is no file."""
    try:
        content = json.loads(file.read_bytes())
        known = {str(name): QueuedJob(**job) for name, job in content["jobs"].items()}
        asked = {str(name): float(at) for name, at in content["asked"].items() if name.isdigit()}
        return asked, float(content["time"]), known
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, 0.0, {}


def _write(file: Path, asked: dict[str, float], seconds: float, jobs: dict[str, QueuedJob]) -> None:
    content = {
        "asked": asked,
        "time": seconds,
        "jobs": {name: dataclasses.asdict(job) for name, job in jobs.items()},
    }
    try:
        make_private(file.parent)
        write_atomically(file, json.dumps(content).encode())
    except AgrivisionError:  # no home to write to: every question goes to Slurm, as without this module
        return
