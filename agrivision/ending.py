"""How a rank ended, in its own words, for the batch side of its job.

srun returns the highest of its tasks' exit codes. That may be one of a rank that only left because
another had failed, so each rank says in a file what it had to say.

A watchdog that ends its rank speaks for it: what the main thread still says when the others leave it
is only what follows.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agrivision.errors import AgrivisionError, ExitCode
from agrivision.json_values import entries, number, parse, text, whole
from agrivision.storage import write_atomically
from agrivision.world import ending_file

STALLED = "stalled: "  # how a watchdog's line begins

_spoken_for = threading.Event()


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank ended.

    Attributes:
        rank: which.
        code: that it left with.
        line: its error, empty where there was none.
        traceback: of an error that nobody foresaw.
        time: seconds since 1970.
    """

    rank: int
    code: int
    line: str
    traceback: str
    time: float


def report_ending(code: ExitCode, line: str, traceback: str = "") -> None:
    """Say how this rank ends, if anybody asks; a disk that refuses does not change the ending."""
    if not _spoken_for.is_set():
        _write(code, line, traceback)


def report_stall(line: str) -> None:
    """Say for a main thread that hangs how its rank ends; what it says itself counts no more."""
    _spoken_for.set()
    _write(ExitCode.FAILED, line, "")


def _write(code: ExitCode, line: str, traceback: str) -> None:
    path = ending_file()
    if path:
        content = {"code": int(code), "line": line, "traceback": traceback, "time": time.time()}
        with suppress(AgrivisionError):
            write_atomically(Path(path), json.dumps(content).encode())


def read_endings(folder: Path) -> list[Ending]:
    """What the ranks said, by rank; one that was killed has said nothing."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            row = entries(parse(path.read_bytes()))
            found.append(
                Ending(
                    rank=int(path.stem.partition("-")[2]),
                    code=whole(row["code"], most=255),
                    line=text(row["line"]),
                    traceback=text(row["traceback"]),
                    time=number(row["time"]),
                )
            )
        except (OSError, ValueError, KeyError):
            continue
    return sorted(found, key=lambda ending: ending.rank)
