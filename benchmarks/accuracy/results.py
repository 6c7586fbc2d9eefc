"""The file of results: a JSON line for each run, added when the run ends.

What a run is known by (`key`) is all that decides its result: whoever is asked for it again finds it
there. A line is written at once, so that several processes may add to one file; a line that a kill has
torn is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import say

Row = dict[str, Any]
_KEY = ("data", "contestant", "settings", "seed", "budget")


def key(row: Mapping[str, Any]) -> str:
    """What a run is known by: data, contestant, settings, seed and budget, as JSON."""
    return json.dumps({name: row[name] for name in _KEY}, sort_keys=True)


@dataclass(frozen=True)
class Results:
    """A file of results.

    Attributes:
        path: of the file, which need not exist.
    """

    path: Path

    def rows(self) -> list[Row]:
        """All lines, the oldest first."""
        if not self.path.is_file():
            return []
        rows = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                say(f"{self.path}, line {number}, is not whole, and is passed over")
        return rows

    def add(self, row: Row) -> None:
        """Add a line, and wait until the disk has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size > 0 and file.read(1) != b"\n"
            line = json.dumps(row).encode() + b"\n"
            file.write(b"\n" + line if torn else line)
            os.fsync(file.fileno())
