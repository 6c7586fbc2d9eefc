"""What the scripts share: rounds, medians, the machine, tables, and a process of one's own for each.

A figure is worth what it was measured beside. Contestants take turns (`interleaved`), so that a machine
that slows down does so for all of them; each runs in a process of its own (`fresh`) where worker
processes or memory matter; what is printed names the machine and the versions.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from agrivision.storage import write_atomically

P = ParamSpec("P")
T = TypeVar("T")
_NUMBER = re.compile(r"([<>]= )?[-+\d]")


class Median(float):
    """The median of some measurements, which remembers them.

    Attributes:
        values: in the order of the rounds.
    """

    values: tuple[float, ...]

    def __new__(cls, values: Sequence[float]) -> Median:
        """The median of at least one value."""
        median = super().__new__(cls, statistics.median(values))
        median.values = tuple(values)
        return median

    @property
    def spread(self) -> float:
        """Half of the way from the lowest to the highest value, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / self if self else 0.0


def interleaved(rounds: int, contestants: Mapping[str, Callable[[], float]]) -> dict[str, Median]:
    """Let contestants take turns; every second round in reverse, so that nobody always comes first.

    Args:
        rounds: turns of each.
        contestants: by name; each returns a rate or seconds.

    Returns:
        The median of each, in the order given.
    """
    values: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        names = list(contestants)
        for name in reversed(names) if number % 2 else names:
            values[name].append(contestants[name]())
            say(f"round {number + 1} of {rounds}: {name}: {values[name][-1]:,.4g}")
    return {name: Median(measured) for name, measured in values.items()}


def fresh(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a new interpreter: without what others left in this one.

    Args:
        function: at the top of a module, so that the other interpreter finds it.
        *args: what it takes; picklable, as its result.
        **kwargs: the same.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_as_usual) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _as_usual() -> None:
    """Processes that are started from here start as this Python starts them by default."""
    multiprocessing.set_start_method(None, force=True)


def confine(cores: int) -> None:
    """Let this process and those that it starts run on so many cores only."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def family(pid: int) -> list[int]:
    """A process and everything that it started, as far as it is still there."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = path.read_text("utf-8").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for one in found:  # grows while it is walked
        found += children.get(one, [])
    return found


def cpu_seconds() -> float:
    """What this process and everything that it started have computed so far.

    Unlike the time on the wall, it hardly depends on who else uses the machine.
    """
    ticks = 0
    for pid in family(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # user, system, and of children that ended
    return ticks / os.sysconf("SC_CLK_TCK")


def missing(*modules: str) -> list[str]:
    """Which of these modules are not installed."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def version(package: str) -> str:
    """The installed version of a distribution, as its metadata gives it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(*packages: str) -> str:
    """One line: processor, cores, memory, system, Python, and the versions of what was used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = (*packages, "torch", "numpy")
    return ", ".join(
        [
            _processor(),
            f"{len(os.sched_getaffinity(0))} cores",
            f"{memory:.0f} GiB",
            f"{platform.system()} {platform.release()}",
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in dict.fromkeys(names)),
        ]
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; numbers to three digits, and at the right."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    columns = list(zip(*cells, strict=True))
    right = [_numbers(column[1:]) for column in columns]
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * (width - 1) + (":" if at else "-") for width, at in zip(widths, right, strict=True)]
    lines = [
        " | ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for cell, width, at in zip(row, widths, right, strict=True)
        )
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _numbers(cells: Sequence[str]) -> bool:
    """Whether most of a column's cells begin like a number."""
    filled = [cell for cell in cells if cell]
    return 2 * sum(_NUMBER.match(cell) is not None for cell in filled) > len(filled)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A claim beside what was measured.

    Attributes:
        claim: its id, such as L1.
        what: in words.
        measured: the number.
        at_least: the goal where more is better, otherwise None.
        at_most: the goal where less is better, otherwise None.
        unit: of both numbers: `x` for ratios, `%`, `tiles/s`, …
    """

    claim: str
    what: str
    measured: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the measured number reaches the goal."""
        low = self.at_least is None or self.measured >= self.at_least
        return low and (self.at_most is None or self.measured <= self.at_most)

    def cells(self) -> list[object]:
        """As a row of a table."""
        goal = (
            f">= {_cell(self.at_least)}" if self.at_least is not None else f"<= {_cell(self.at_most)}"
        )
        measured = f"{_cell(self.measured)} {self.unit}"
        return [self.claim, self.what, f"{goal} {self.unit}", measured, "yes" if self.met else "NO"]


@dataclass
class Report:
    """What a script found out; printed at its end, and written as JSON if asked.

    Attributes:
        title: of the table.
        options: of the command line, from `parser`.
        packages: distributions whose versions belong beside the figures.
        header, rows: the table.
        goals: each beside what was measured.
        notes: how it was measured, and what was left out.
    """

    title: str
    options: argparse.Namespace
    packages: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: list[Sequence[object]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def goal(self, claim: str, what: str, measured: float, **goal: Any) -> None:
        """Add a goal; see Goal for `at_least`, `at_most` and `unit`."""
        self.goals.append(Goal(claim=claim, what=what, measured=float(measured), **goal))

    def left_out(self, what: str, modules: Sequence[str]) -> None:
        """Say that a contestant is not here."""
        self.notes.append(f"{what}: left out, not installed: {', '.join(modules)}")

    def finish(self) -> None:
        """Print everything, and write the JSON file."""
        print(self.text())
        if self.options.json is not None:
            content = json.dumps(self.content(), indent=2) + "\n"
            write_atomically(Path(self.options.json), content.encode())

    def text(self) -> str:
        """The report in Markdown; with `--markdown` only what belongs into README.md."""
        parts = [] if self.options.markdown else [f"## {self.title}"]
        parts.append(machine(*self.packages))
        if self.options.quick:
            parts.append("`--quick`: far too little to measure anything; this only shows that it runs.")
        if self.rows:
            parts.append(table(self.header, self.rows))
        if self.goals:
            rows = [goal.cells() for goal in self.goals]
            parts.append(table(["claim", "what", "goal", "measured", "met"], rows))
        if self.notes and not self.options.markdown:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def content(self) -> dict[str, Any]:
        """The same as JSON can hold it, with the values of every round."""
        return {
            "title": self.title,
            "machine": machine(*self.packages),
            "quick": self.options.quick,
            "header": list(self.header),
            "rows": [[_plain(value) for value in row] for row in self.rows],
            "goals": [
                {
                    "claim": goal.claim,
                    "what": goal.what,
                    "measured": goal.measured,
                    "at_least": goal.at_least,
                    "at_most": goal.at_most,
                    "unit": goal.unit,
                    "met": goal.met,
                }
                for goal in self.goals
            ],
            "notes": self.notes,
        }


def _plain(value: object) -> object:
    if isinstance(value, Median):
        return {"median": float(value), "spread": value.spread, "values": value.values}
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)


def parser(description: str | None, *, rounds: int = 3) -> argparse.ArgumentParser:
    """The options that every script has.

    Args:
        description: the script's docstring; its first paragraph is shown.
        rounds: default of `--rounds`.
    """
    result = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    result.add_argument("--quick", action="store_true", help="everything tiny: does it run at all")
    result.add_argument("--rounds", type=int, default=rounds, help=f"turns of each (default {rounds})")
    result.add_argument("--json", metavar="FILE", help="write the results, each round's values too")
    result.add_argument("--markdown", action="store_true", help="print only what README.md holds")
    return result


def say(line: str) -> None:
    """Tell whoever waits how far it has come; on stderr, since stdout is the report's."""
    print(line, file=sys.stderr, flush=True)
