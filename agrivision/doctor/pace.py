"""How long a run takes from a signal until it is safe: the step that it is in, and a save."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from agrivision.doctor.run_folder import CHECKPOINT
from agrivision.json_values import entries, number, parse
from agrivision.reading import open_plain, read_plain
from agrivision.rundir import RunDirectory

_STEP_SECONDS = 2.0  # of a large batch on one GPU; a step on processors may take longer
_WRITTEN = 50e6  # bytes a second where it was not measured
_MARGIN = 1.5  # as the training itself takes: the next one may be slower than any before
_SAVED = re.compile(r"step \d+ saved in (\d+\.\d+) s")
_MOST_CONFIG = 1 << 16  # bytes
_MOST_LOG = 4 << 20  # bytes of its end
_MOST_LINE = 1 << 20  # bytes of a row; what is longer is no row


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What stands between a signal and a saved run.

    Attributes:
        step: seconds of a step, the median of the run's rows.
        save: seconds of the slowest save.
        known: whether a run has shown them; else they are guessed.
    """

    step: float
    save: float
    known: bool

    @property
    def needed(self) -> int:
        """Whole seconds that a run should have."""
        return math.ceil(_MARGIN * (self.step + self.save))

    def __str__(self) -> str:
        origin = "as in this run" if self.known else "guessed for a large network"
        parts = f"a step ({self.step:.1f} s) and a save ({self.save:.1f} s)"
        return f"{self.needed} s for {parts}, {origin}, and half as much again"


def pace_of(run_dir: Path | None, written: float | None) -> Pace:
    """As a run has shown it, else a guess.

    Args:
        run_dir: of a run; None for none.
        written: bytes a second that its disk takes; None where that is not known.
    """
    found = _of_run(RunDirectory(run_dir)) if run_dir is not None else None
    return found or Pace(step=_STEP_SECONDS, save=CHECKPOINT / (written or _WRITTEN), known=False)


def _of_run(run: RunDirectory) -> Pace | None:
    try:
        config = entries(yaml.safe_load(read_plain(run.config, _MOST_CONFIG)))
        batch = number(entries(config["data"])["batch_size"])
        steps, saves = _rows(run.metrics, batch)
    except (OSError, ValueError, KeyError, RecursionError, yaml.YAMLError):
        return None
    saves = saves or list(_logged_saves(run.log / "rank-0.log"))
    if not saves or not steps:
        return None
    return Pace(step=median(steps), save=max(saves), known=True)


def _rows(metrics: Path, batch: float) -> tuple[list[float], list[float]]:
    """Seconds of a step by each row on training, and of each save; a torn row is passed over.

    A rate counts all that was done since the row before: a row that has an evaluation in it is left
    out, unless all of them have.

    Args:
        metrics: rows, line by line.
        batch: images of a step.

    Raises:
        OSError: there are none, or they cannot be read.
    """
    steps: list[float] = []
    mixed: list[float] = []
    saves: list[float] = []
    evaluated = False
    with open_plain(metrics) as file:
        while line := file.readline(_MOST_LINE):
            try:
                row = entries(parse(line))
                if row["kind"] == "evaluation":
                    evaluated = True
                elif row["kind"] == "checkpoint":
                    saves.append(number(row["seconds"]))
                elif row["kind"] == "training":
                    seconds = batch / number(row["images_per_second"])
                    (mixed if evaluated else steps).append(seconds)
                    evaluated = False
            except (ValueError, KeyError, ZeroDivisionError):
                continue
    return steps or mixed, saves


def _logged_saves(log: Path) -> Iterator[float]:
    """Seconds of each save, by the log of a run whose rows do not tell of saves."""
    try:
        with open_plain(log) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_LOG))
            text = file.read().decode(errors="replace")
    except OSError:
        return
    yield from map(float, _SAVED.findall(text))
