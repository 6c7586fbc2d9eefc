"""The attempts of a run: when each began and ended, where, and why.

Each attempt writes what it is into provenance.json. How it ended stands in two places: the job's list
of attempts, where Slurm ran it, and the log of rank 0, whose clock is that of its node's time zone. An
attempt that was killed has written nothing; the next one then tells from where it went on.
"""

from __future__ import annotations

import calendar
import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrivision.json_values import entries, items, label, number, parse, whole
from agrivision.reading import open_plain, read_plain
from agrivision.rundir import RunDirectory

FINISHED, RUNNING, INTERRUPTED, UNKNOWN = "finished", "running", "interrupted", "not known"
_SILENCE = 15 * 60.0  # seconds without a row, after which nobody believes that an attempt still runs
_QUARTER = 15 * 60  # seconds; time zones differ by whole ones
_SLACK = 1.0  # second: what provenance.json's clock leaves out
_MOST_BYTES = 64 << 20  # of provenance.json or of a list of attempts
_MOST_LINE = 1 << 16
_STAMP = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_BEGUN = re.compile(rb"agrivision\.training\.run: .* (?:going on from|starting at) step (\d+)\s*$")
_STOPPED = re.compile(rb"agrivision\.training\.loop: stopped at step (\d+) \((.*)\); ")
_DONE = re.compile(rb"agrivision\.training\.loop: done after (\d+) steps")
_LEFT = re.compile(rb"agrivision\.training\.run: leaving with \d+: (.*)")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt, as far as files tell.

    Attributes:
        started: seconds since 1970; None where it is not known.
        ended: likewise; of one that still runs, its last sign of life.
        from_step: that it went on from.
        to_step: that the run went on from after it, or that it has reached.
        ranks: processes; 0 where it is not known.
        device: of rank 0.
        hosts: of rank 0, or all nodes where Slurm's list tells them.
        why: how it ended, in a few words.
        state: FINISHED, RUNNING, INTERRUPTED or UNKNOWN.
        about: versions and hardware, by name.
    """

    started: float | None
    ended: float | None
    from_step: int
    to_step: int
    ranks: int
    device: str
    hosts: tuple[str, ...]
    why: str
    state: str
    about: dict[str, str]

    @property
    def seconds(self) -> float | None:
        """How long it took; None where that is not known."""
        if self.started is None or self.ended is None:
            return None
        return max(0.0, self.ended - self.started)

    @property
    def on_gpu(self) -> bool:
        """Whether it computed on GPUs."""
        return self.device not in ("", "cpu")


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """What a list or a log says of an attempt's end; what it does not know is None or empty."""

    ended: float | None = None
    to_step: int | None = None
    why: str = ""
    state: str = UNKNOWN
    hosts: tuple[str, ...] = ()


def read_attempts(
    run: RunDirectory, last_step: int, last_time: float | None, now: float
) -> tuple[Attempt, ...]:
    """The attempts of a run, oldest first; empty where provenance.json tells none.

    Args:
        run: its directory.
        last_step: the last that its metrics tell of.
        last_time: of the last row, seconds since 1970; None takes that of the file.
        now: seconds since 1970.
    """
    known = list(_provenance(run.provenance))
    logged, listed = _of_log(run.log / "rank-0.log", known), _of_job(run.path, known)
    if last_time is None:
        with suppress(OSError):
            last_time = run.metrics.stat().st_mtime
    found = []
    for number_, attempt in enumerate(known):
        later = known[number_ + 1] if number_ + 1 < len(known) else None
        ending = _together(listed[number_], logged[number_])
        if later is None:
            found.append(_last(attempt, ending, last_step, last_time, now))
            continue
        why = ending.why or "without a word: killed, or lost with its node"
        state = FINISHED if ending.state == FINISHED else INTERRUPTED
        found.append(
            dataclasses.replace(
                attempt,
                ended=ending.ended,
                to_step=later.from_step,
                why=why,
                state=state,
                hosts=ending.hosts or attempt.hosts,
            )
        )
    return tuple(found)


def _last(
    attempt: Attempt, ending: _Ending, last_step: int, last_time: float | None, now: float
) -> Attempt:
    """The latest attempt, which may still run."""
    to_step = max(last_step, ending.to_step or 0, attempt.from_step)
    ended, why, state = ending.ended, ending.why, ending.state
    if state == UNKNOWN:
        signs = [sign for sign in (last_time, ended, attempt.started) if sign is not None]
        ended = max(signs, default=None)
        if ended is not None and now - ended < _SILENCE:
            why, state = "still running", RUNNING
        else:
            why, state = why or "without a word: killed, or lost with its node", INTERRUPTED
    return dataclasses.replace(
        attempt,
        ended=ended,
        to_step=to_step,
        why=why,
        state=state,
        hosts=ending.hosts or attempt.hosts,
    )


def _together(first: _Ending, second: _Ending) -> _Ending:
    """What two sources say of an end; the first counts where both say something."""
    return _Ending(
        ended=first.ended if first.ended is not None else second.ended,
        to_step=first.to_step if first.to_step is not None else second.to_step,
        why=first.why or second.why,
        state=first.state if first.state != UNKNOWN else second.state,
        hosts=first.hosts or second.hosts,
    )


def _provenance(path: Path) -> Iterator[Attempt]:
    """Beginnings; an entry that is none is passed over."""
    try:
        written = items(entries(parse(read_plain(path, _MOST_BYTES)))["attempts"])
    except (OSError, ValueError, KeyError):
        return
    for entry in written:
        try:
            content = entries(entry)
            yield _begun(content)
        except (ValueError, KeyError):
            continue


def _begun(content: Mapping[str, Any]) -> Attempt:
    packages = content.get("packages", {})
    about = {
        name: label(str(content[key]))
        for name, key in _ABOUT.items()
        if content.get(key) is not None and not isinstance(content[key], dict | list)
    }
    versions = [
        f"{label(name)} {label(version)}"
        for name, version in entries(packages).items()
        if version is not None
    ]
    return Attempt(
        started=_utc(content.get("started")),
        ended=None,
        from_step=whole(content.get("from_step", 0)),
        to_step=0,
        ranks=whole(content.get("ranks", 0)),
        device=label(content.get("device", "")),
        hosts=(label(content["host"]),) if content.get("host") else (),
        why="",
        state=UNKNOWN,
        about=about | ({"Packages": ", ".join(versions)} if versions else {}),
    )


_ABOUT = {
    "agrivision": "agrivision",
    "Commit": "commit",
    "Python": "python",
    "Device": "device",
    "Ranks": "ranks",
    "Launched by": "launcher",
    "Host of rank 0": "host",
    "Platform": "platform",
    "Processor cores": "cpus",
    "Threads of torch": "torch_threads",
    "Data set": "data_fingerprint",
}


def _utc(value: Any) -> float | None:
    """`2026-01-31T12:00:00Z` in seconds since 1970; None where it is something else."""
    try:
        return float(calendar.timegm(time.strptime(value, "%Y-%m-%dT%H:%M:%SZ")))
    except (TypeError, ValueError, OverflowError):
        return None


def _of_job(run: Path, known: Sequence[Attempt]) -> list[_Ending]:
    """What Slurm's side wrote about each attempt's end."""
    rows: dict[int, Mapping[str, Any]] = {}
    with suppress(OSError), (run / "launch" / "attempts.jsonl").open("rb") as file:
        for line in file.read(_MOST_BYTES).splitlines():
            with suppress(ValueError, KeyError):
                row = entries(parse(line))
                number(row["began"])
                rows[whole(row["number"])] = row
    listed = sorted(rows.values(), key=lambda row: float(row["began"]))
    endings = []
    for attempt in known:
        began = [
            row
            for row in listed
            if attempt.started is not None and row["began"] <= attempt.started + _SLACK
        ]
        try:
            endings.append(_ended(began[-1], attempt) if began else _Ending())
        except (ValueError, KeyError):
            endings.append(_Ending())
    return endings


def _ended(row: Mapping[str, Any], attempt: Attempt) -> _Ending:
    nodes = tuple(label(node) for node in items(row.get("nodes", [])))
    if row.get("ended") is None:
        return _Ending(hosts=nodes)
    ended = number(row["ended"])
    if attempt.started is not None and ended < attempt.started - _SLACK:
        return _Ending()  # another one's: this attempt was started by hand
    decision, reason = label(row.get("decision", "")), label(row.get("reason", ""))
    state = FINISHED if decision == "done" else INTERRUPTED
    reason = ", ".join(filter(None, ("" if reason or state == FINISHED else "asked to stop", reason)))
    why = FINISHED if state == FINISHED else " and ".join(filter(None, (reason, decision)))
    step = row.get("to_step")
    return _Ending(
        ended=ended, to_step=None if step is None else whole(step), why=why, state=state, hosts=nodes
    )


def _of_log(path: Path, known: Sequence[Attempt]) -> list[_Ending]:
    """What rank 0 said at the end of each attempt, where its log has as many as provenance.json."""
    found: list[tuple[bytes, bytes, _Ending]] = []  # stamps of the first and the last line
    with suppress(OSError), open_plain(path) as file:
        while line := file.readline(_MOST_LINE):
            if not _STAMP.match(line):
                continue
            if b" agrivision.training." in line and _BEGUN.search(line):
                found.append((line[:19], line[:19], _Ending()))
            # What follows "done" is of a command that was refused: that does not undo it.
            if found and found[-1][2].state != FINISHED:
                known_so_far = found[-1][2]
                if b" agrivision.training." in line:
                    known_so_far = _together(_said(line), known_so_far)
                found[-1] = (found[-1][0], line[:19], known_so_far)
    if len(found) != len(known):
        return [_Ending()] * len(known)
    return [
        dataclasses.replace(ending, ended=_ended_at(first, last, attempt.started))
        for (first, last, ending), attempt in zip(found, known, strict=True)
    ]


def _said(line: bytes) -> _Ending:
    if match := _STOPPED.search(line):
        return _Ending(
            to_step=int(match[1][:18]), why=f"asked to stop ({_text(match[2])})", state=INTERRUPTED
        )
    if match := _DONE.search(line):
        return _Ending(to_step=int(match[1][:18]), why=FINISHED, state=FINISHED)
    if match := _LEFT.search(line):
        return _Ending(why=_text(match[1].strip()), state=INTERRUPTED)
    return _Ending()


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _ended_at(first: bytes, last: bytes, started: float | None) -> float | None:
    """When an attempt ended: lines have local time, and the first is written as the attempt starts."""
    try:
        begun, ended = (
            calendar.timegm(time.strptime(stamp.decode(), "%Y-%m-%d %H:%M:%S"))
            for stamp in (first, last)
        )
    except ValueError:
        return None
    if started is None:
        return None
    zone = round((begun - started) / _QUARTER) * _QUARTER
    return float(max(ended - zone, started))
