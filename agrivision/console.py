"""What commands print: tables on stdout, progress and problems on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agrivision.errors import harmless, one_line
from agrivision.monitor.progress import Progress
from agrivision.storage import write_atomically


def say(text: str) -> None:
    """Print a line on stdout, or some; see `harmless`."""
    sys.stdout.write(f"{harmless(text)}\n")
    sys.stdout.flush()


def is_watched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether stdout is somebody's terminal.

    In a step of Slurm it may look like one and be a log: `srun --unbuffered` puts a terminal of its own
    before it.
    """
    in_log = "SLURM_STEP_ID" in environment and "SLURM_PTY_PORT" not in environment
    return sys.stdout.isatty() and not in_log


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


class ProgressReport:
    """Tells a progress bar what `prepare` and `inspect` do, and prints the problems they find.

    Args:
        bar: entered already.
        shown: problems that are printed; the others are only counted.
    """

    def __init__(self, bar: Progress, shown: int = 20) -> None:
        self._bar, self._shown, self.problems = bar, shown, 0

    def total(self, tiles: int) -> None:
        """So many tiles are to be done."""
        self._bar.total(tiles)

    def advance(self, tiles: int) -> None:
        """So many more are done."""
        self._bar.advance(tiles)

    def problem(self, path: str, what: str) -> None:
        """Something in this file or folder is not as it should be."""
        self.problems += 1
        if self.problems <= self._shown:
            self._bar.note(f"{path}: {what}")
        elif self.problems == self._shown + 1:
            self._bar.note("further problems are counted, not printed")


def print_scores(scores: Mapping[str, Any]) -> None:
    """A table of what `Scores.to_dict` or `Evaluation.to_dict` holds, on stdout."""
    presence = scores.get("presence")
    table = Table(box=None, pad_edge=False)
    columns = ["class", "IoU", "precision", "recall", "F1"]
    columns += ["tiles", "AP by tile", "F1 by tile"] if presence is not None else []
    for name in columns:
        table.add_column(name, justify="left" if name == "class" else "right")
    for name in scores["classes"]:
        cells = [_number(scores[kind][name]) for kind in ("iou", "precision", "recall", "f1")]
        if presence is not None:
            found = presence[name] or {}
            cells += [str(found.get("tiles", 0))]
            cells += [_number(found.get(kind)) for kind in ("average_precision", "f1")]
        table.add_row(Text(one_line(name)), *cells)
    _print(table)
    absent = scores["absent"]
    note = f" (absent, not in the mean: {', '.join(absent)})" if absent else ""
    say(f"mIoU {_number(scores['miou'])} over {len(scores['classes']) - len(absent)} classes{note}")


def print_tuned(found: Mapping[str, Any]) -> None:
    """A table of what `Tuned.to_dict` holds, on stdout."""
    table = Table(box=None, pad_edge=False)
    for name in ("class", "factor", "least area", "IoU before", "expected", "on the split"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for name in found["classes"]:
        kinds = ("before", "crossed", "after")
        scores = [_number(found[kind]["iou"][name] if found[kind] else None) for kind in kinds]
        factor, area = f"{found['factors'][name]:.3g}", str(found["areas"][name])
        table.add_row(Text(one_line(name)), factor, area, *scores)
    _print(table)


def _print(table: Table) -> None:
    # A log has no width of its own; a table that is cut would be worth nothing.
    seen = is_watched()
    Console(width=None if seen else 120, force_terminal=seen).print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
