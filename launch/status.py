"""`python -m launch status`: what runs, waits and has ended, and how far it is.

Slurm is asked once for all jobs. What it has forgotten, minutes after a job's end, comes from the job's
own list of attempts and from the run's files, so that no accounting is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agrivision.config import Config
from agrivision.console import say
from agrivision.data.order import Order
from agrivision.data.sampling import repeats_of
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.errors import AgrivisionError, ExitCode, one_line
from agrivision.json_values import entries, parse, whole
from agrivision.json_values import number as any_number
from agrivision.monitor.progress import clock_time
from agrivision.options import read_config
from agrivision.reading import open_plain
from agrivision.rundir import RunDirectory, best_step
from launch.find import Found, find, jobs_of, last_submission, tasks
from launch.jobdir import Attempt, JobDirectory
from launch.poll import SECONDS, Answer, poll
from launch.slurm import QueuedJob
from launch.submit import alive

_TAIL_BYTES = 1 << 16
_READ: dict[str, Callable[[Any], Any]] = {
    "step": whole,
    "epoch": whole,
    "images_per_second": any_number,
}
_MEANINGS = {
    "Resources": "next in line, waiting for nodes",
    "Priority": "others are before it",
    "Dependency": "waiting for another job",
    "DependencyNeverSatisfied": "the job it waits for failed: resume that one, or cancel this one",
    "BeginTime": "requeued, or told to start later",
    "JobHeldUser": "held: scontrol release",
    "JobHeldAdmin": "held by the admin",
    "launch_failed_requeued_held": "could not be launched; held: scontrol release",
    "JobArrayTaskLimit": "as many of its array run as may",
    "PartitionTimeLimit": "asks for more time than the partition gives",
    "PartitionNodeLimit": "asks for more nodes than the partition gives",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "NodeDown": "a node that it needs is down",
    "ReqNodeNotAvail": "a node that it needs is not available, or reserved",
    "PartitionConfig": "no node of the partition has what it asks for: it cannot start",
    "BadConstraints": "no nodes have all that it asks for: it cannot start",
    "Reservation": "waiting for its reservation",
    "Licenses": "waiting for a licence",
    "Cleaning": "its last attempt is being cleaned up",
    "InvalidAccount": "the account may not be used",
    "InvalidQOS": "the quality of service may not be used",
}
_PREFIXES = {
    "QOS": "a limit of the quality of service",
    "Assoc": "a limit of the account",
    "Max": "a limit of the account or the user",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run or job, as the table shows it.

    Attributes:
        path: of what it writes.
        command: of agrivision; empty for a run that was never launched.
        job: Slurm's id of the latest job.
        state: Slurm's word, in small letters, while Slurm knows the job; else what its files say: done,
            given up, cancelled, lost, ended, not submitted, not launched. A run without a job is
            running while a process of this machine trains in it, and done after all of its steps.
        step: optimiser steps done.
        total_steps: of the whole run.
        epoch: that the step is in, 1 for the first.
        miou: of the last evaluation.
        best_miou: of all evaluations.
        best_step: where that was.
        images_per_second: over all ranks, lately.
        to_go: seconds of training to the run's end, at that speed.
        attempts: begun so far.
        time_left: of this attempt, in Slurm's writing.
        why: why it waits, or why it ended.
    """

    path: str
    command: str = ""
    job: str = ""
    state: str
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    miou: float | None = None
    best_miou: float | None = None
    best_step: int | None = None
    images_per_second: float | None = None
    to_go: float | None = None
    attempts: int = 0
    time_left: str = ""
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `status` shows.

    Attributes:
        rows: one a run.
        answer: what Slurm said, and when.
    """

    rows: list[Row]
    answer: Answer

    @property
    def note(self) -> str:
        """How old Slurm's part is, or why there is none; empty where no job needed it."""
        if self.answer.problem:
            return f"{self.answer.problem}: shown from the files alone"
        if self.answer.age is None:
            return ""
        return f"Slurm was asked {self.answer.age:.0f} s ago (at most every {SECONDS:.0f} s)"


def main(argv: list[str]) -> ExitCode:
    """`python -m launch status`."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m launch status",
        description="What runs, waits and has ended, and how far it is.",
        exit_on_error=False,
    )
    parser.add_argument(
        "paths",
        type=str,
        nargs="*",
        default=["."],
        help="runs, jobs, or folders that hold some; default: this folder",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--watch", action="store_true", help=f"again every {SECONDS:.0f} s")
    args = parser.parse_args(argv)
    while True:
        found = report(find([Path(path) for path in args.paths]))
        if args.watch and sys.stdout.isatty():
            Console().clear()
        _print_json(found) if args.json else print_report(found)
        if not args.watch:
            return ExitCode.DONE
        try:
            time.sleep(SECONDS)
        except KeyboardInterrupt:
            return ExitCode.DONE


def report(found: Sequence[Found]) -> Report:
    """Gather what is known of some work, with one question to Slurm."""
    open_jobs = [one.job for one in found if one.job is not None and _needs_slurm(one.job)]
    submitted = max(map(last_submission, open_jobs), default=0.0)
    answer = poll(submitted) if open_jobs else Answer({}, None)
    return Report([_row_or_why_not(one, answer.jobs) for one in found], answer)


def _row_or_why_not(found: Found, queued: Mapping[str, QueuedJob]) -> Row:
    """As `row_of`; of files that are damaged it says so, and of the others how they are."""
    try:
        return row_of(found, queued)
    except (AgrivisionError, OSError) as error:
        return Row(path=_shown(found.path), state="unreadable", why=str(error))


def _needs_slurm(job: JobDirectory) -> bool:
    """Whether only Slurm knows how some work stands; its own files do where it is done."""
    try:
        latest = _latest(job)
    except (AgrivisionError, OSError):
        return False  # its row will say why
    return any(
        name and (last is None or (last.job, last.decision) != (name, "done")) for name, last in latest
    )


def _latest(job: JobDirectory) -> list[tuple[str, Attempt | None]]:
    """The latest job, empty before there is one, and the last attempt; of each task of an array."""
    names = job.jobs()
    return [
        (next(reversed(jobs_of(one, names)), ""), next(reversed(one.attempts()), None))
        for one in tasks(job)
    ]


def row_of(found: Found, queued: Mapping[str, QueuedJob]) -> Row:
    """What is known of one run or job.

    Args:
        found: which.
        queued: what Slurm says, by job; those that it has forgotten are not there.
    """
    path = _shown(found.path)
    if found.job is None:
        far = _progress(found.path, RunDirectory(found.path).config)
        early = _ended_early(found.path, far)
        whole = far["total_steps"] is not None and far["step"] >= far["total_steps"]
        state = "done" if whole or early else "not launched"
        return Row(path=path, state="running" if _runs_here(found.path) else state, why=early, **far)
    spec, latest = found.job.spec(), _latest(found.job)
    of_run = _progress(Path(spec.run_dir), found.job.config) if spec.run_dir else {}
    early = _ended_early(Path(spec.run_dir), of_run) if spec.run_dir else ""
    known = [known_of(job, queued) for job, _ in latest]
    states = [state_of(job, last, now) for (job, last), now in zip(latest, known, strict=True)]
    reasons = [early, *(why(last, now) for (_, last), now in zip(latest, known, strict=True))]
    return Row(
        path=path,
        command=spec.command[0] if spec.command else "",
        job=latest[0][0] if len(latest) == 1 else latest[0][0].partition("_")[0],
        state=_together(states),
        attempts=sum(last.number for _, last in latest if last is not None),
        time_left=next((now.time_left for now in known if now is not None and now.running), ""),
        why="; ".join(dict.fromkeys(filter(None, reasons))),
        **of_run,
    )


def _runs_here(run_dir: Path) -> bool:
    """Whether a process of this machine trains in a run directory: the kernel lists who holds locks.

    To try the lock instead could keep out a training that begins at this moment.
    """
    try:
        about = RunDirectory(run_dir).lock_file.stat()
        locks = Path("/proc/locks").read_text()
    except OSError:
        return False
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    return any(place in line.split() for line in locks.splitlines())


def known_of(job: str, queued: Mapping[str, QueuedJob]) -> QueuedJob | None:
    """What Slurm says of a job; an array that is cancelled before it begins is one job to it again."""
    whole = queued.get(job.partition("_")[0])
    return queued.get(job, whole if whole is not None and "_" not in whole.id else None)


def _together(states: Sequence[str]) -> str:
    """One state, or how many tasks of an array are in each: `done 3, running 1`."""
    if len(set(states)) == 1:
        return states[0]
    return ", ".join(f"{state} {count}" for state, count in sorted(Counter(states).items()))


def state_of(job: str, last: Attempt | None, queued: QueuedJob | None) -> str:
    """One word or two for how a job is."""
    if not job and last is None:
        return "not submitted"
    if queued is not None and alive(queued):
        return queued.state.lower()
    if last is not None and last.job == job and last.decision:
        return _decided(last)
    if queued is not None:
        return "done" if queued.state == "COMPLETED" else queued.state.lower()
    # Slurm does not know it any more, and it had no time to write how it ended.
    return "lost" if last is not None and last.job == job else "ended"


def _decided(last: Attempt) -> str:
    """How the latest job ended, in its own words."""
    if last.decision == "requeued":
        return "lost"  # it should be in the queue
    word = last.decision.removeprefix("left ")
    return "cancelled" if word in ("completing", "cancelled") else word


def is_over(state: str) -> bool:
    """Whether nothing more comes of a job by itself."""
    return state in ("done", "given up", "cancelled", "not requeued", "superseded")


def why(last: Attempt | None, queued: QueuedJob | None) -> str:
    """Why a job waits, or why it ended; empty while it runs and where all is well."""
    if queued is not None and alive(queued):
        if queued.running:
            return ""
        begin = f", starts {queued.start}" if queued.start not in ("", "N/A", "Unknown") else ""
        return explain(queued.reason) + begin
    if last is None or last.decision == "done":
        return ""
    if last.code == ExitCode.STOPPED:
        return last.reason or "asked to stop, and saved"
    return last.reason


def explain(reason: str) -> str:
    """Slurm's word for why a job waits, and what it means."""
    word = reason.strip("()").partition(",")[0]
    if word in ("", "None"):
        return "not looked at yet"
    meaning = _MEANINGS.get(word)
    if meaning is None:
        meaning = next((text for prefix, text in _PREFIXES.items() if word.startswith(prefix)), None)
    return f"{word}: {meaning}" if meaning else word


def _shown(path: Path) -> str:
    """Relative to here where it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _progress(run_dir: Path, config: Path) -> dict[str, Any]:
    """The columns that a training run's files fill."""
    run, plan = RunDirectory(run_dir), plan_of(config)
    row = _last_row(run.metrics)
    step = max(row.get("step", 0), run.latest_step())
    scores, speed = run.evaluations(), row.get("images_per_second")
    best = best_step(scores)
    left = 0 if plan is None or step in run.early_ends() else max(0, plan.steps - step)
    return {
        "step": step,
        "total_steps": None if plan is None else plan.steps,
        "epoch": row["epoch"] + 1 if "epoch" in row else None,
        "miou": scores[max(scores)] if scores else None,
        "best_miou": scores[best] if best is not None else None,
        "best_step": best,
        "images_per_second": speed,
        "to_go": left * plan.batch_size / speed if plan and speed else None,
    }


def _ended_early(run_dir: Path, far: Mapping[str, Any]) -> str:
    """Why a run ended before its last step; empty where it did not, or has gone on since."""
    return RunDirectory(run_dir).early_ends().get(far["step"], "")


class Plan(NamedTuple):
    """How much a run has to do.

    Attributes:
        steps: of the whole run.
        batch_size: images in each, over all ranks.
    """

    steps: int
    batch_size: int


def plan_of(file: Path) -> Plan | None:
    """The plan of a run with this configuration; None where it or its data cannot be read."""
    try:
        config = read_config(file)
        return Plan(steps_of(config, Schema.read(Path(config.data.path))), config.data.batch_size)
    except AgrivisionError:
        return None


def steps_of(config: Config, schema: Schema) -> int:
    """Steps of a run on some data.

    Raises:
        DatasetError: the data has no such split, or its indexes cannot be read.
    """
    reader = SplitReader(Path(config.data.path), schema, config.data.train_split)
    repeats = repeats_of(reader, config.data.rare_sampling, config.seed)
    order = Order(
        size=len(reader) if repeats is None else repeats.size,
        batch_size=config.data.batch_size,
        seed=config.seed,
    )
    steps = order.steps_per_epoch * config.training.epochs
    return min(steps, config.training.max_steps or steps)


def _last_row(metrics: Path) -> dict[str, Any]:
    """The last row on training; empty before there is one."""
    try:
        with open_plain(metrics) as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = entries(parse(line))
            if row.get("kind") == "training":
                return {
                    name: read(row[name]) for name, read in _READ.items() if row.get(name) is not None
                }
        except ValueError:  # torn, cut by the seek, or not ours
            continue
    return {}


def _print_json(found: Report) -> None:
    rows = [dataclasses.asdict(row) for row in found.rows]
    say(json.dumps({"jobs": rows, "age": found.answer.age, "problem": found.answer.problem}, indent=2))


_COLUMNS = (
    "run",
    "state",
    "job",
    "step",
    "epoch",
    "mIoU",
    "best",
    "images/s",
    "to go",
    "attempts",
    "left",
    "why",
)


def cells(row: Row) -> Mapping[str, str]:
    """A row as texts."""
    step = "" if row.step is None else f"{row.step}/{row.total_steps or '?'}"
    return {
        "run": row.path,
        "state": row.state,
        "job": row.job,
        "step": step,
        "epoch": "" if row.epoch is None else str(row.epoch),
        "mIoU": number(row.miou, 4),
        "best": number(row.best_miou, 4),
        "images/s": number(row.images_per_second, 1),
        "to go": clock_time(row.to_go) if row.to_go and not is_over(row.state) else "",
        "attempts": str(row.attempts) if row.attempts else "",
        "left": row.time_left,
        "why": row.why,
    }


def number(value: float | None, digits: int) -> str:
    """`0.4213`; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def print_report(found: Report) -> None:
    """A table on a terminal; else a line for each run, with the names of what it holds."""
    rows = [cells(row) for row in found.rows]
    if sys.stdout.isatty():
        shown = [name for name in _COLUMNS if any(row[name] for row in rows)]
        table = Table(box=None, pad_edge=False)
        for name in shown:
            table.add_column(name, overflow="fold", no_wrap=name in ("run", "state"))
        for row in rows:
            # As text: brackets are no markup.
            table.add_row(*(Text(one_line(row[name])) for name in shown))
        Console().print(table)
    else:
        for row in rows:
            parts = [f"{name} {row[name]}" for name in _COLUMNS[2:-1] if row[name]]
            why = f" ({row['why']})" if row["why"] else ""
            say(f"{row['run']}: {row['state']}{why}{', ' if parts else ''}{', '.join(parts)}")
    if found.note:
        say(found.note)
