"""Which test shows what of the fault matrix, and what it saw.

As a plugin of pytest, `-p tests.faults_report`: `--rows 9,10` runs the tests of two rows, and
`--faults-report FILE` appends a line of JSON for each test that has ended. As a program, `python -m
tests.faults_report FILE` prints the second table of docs/reliability.md, with what the file says;
`--write` puts it onto the page.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
ROWS = range(1, 39)
CONFIGURATIONS = ("default", "user-signal", "no-requeue")
_HEAD = ("| # | test | on | seen |", "| --- | --- | --- | --- |")
_LINE = re.compile(r"\| (\d+) \| `(tests/[^`]+)` \| ([^|]*) \|(?: (.*) \|)?")
_LOCAL = "ranks of this machine"

# Tests and rows


@dataclass(frozen=True)
class Shown:
    """A test that carries a row.

    Attributes:
        row: of the matrix.
        test: `tests/slurm/test_interruptions.py::test_time_limit`.
        on: configurations of the cluster; empty where the test needs no Slurm.
    """

    row: int
    test: str
    on: tuple[str, ...]


def collect(folder: Path = TESTS) -> list[Shown]:
    """All tests that carry a row, by row; the files are parsed, not imported.

    Args:
        folder: of the tests, called `tests`.
    """
    found = [shown for path in sorted(folder.rglob("test_*.py")) for shown in _of_file(folder, path)]
    return sorted(found, key=lambda shown: shown.row)


def _of_file(folder: Path, path: Path) -> Iterator[Shown]:
    tree = ast.parse(path.read_text())
    whole = [mark for node in tree.body if _name(node) == "pytestmark" for mark in _marks(node)]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        arguments = {argument.arg for argument in node.args.args}
        clusters: tuple[str, ...] = ()
        if "every_cluster" in arguments:
            clusters = CONFIGURATIONS
        elif "slurm" in path.relative_to(folder).parts:
            clusters = CONFIGURATIONS[:1]
        name = f"{folder.name}/{path.relative_to(folder).as_posix()}::{node.name}"
        for row, *on in [*whole, *(mark for each in node.decorator_list for mark in _marks(each))]:
            yield Shown(row, name, tuple(on) or clusters)


def _name(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else ""


def _marks(node: ast.AST) -> Iterator[tuple[Any, ...]]:
    """The arguments of each `pytest.mark.row(…)` below a node."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.row":
            yield tuple(ast.literal_eval(argument) for argument in call.args)


# A plugin of pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--rows", type=_rows, metavar="9,10", help="run the tests of these rows only")
    group.addoption(
        "--faults-report", type=Path, metavar="FILE", help="append what each test saw to FILE"
    )


def _rows(text: str) -> list[int]:
    rows = [int(word) for word in text.split(",")]
    if not set(rows) <= set(ROWS):
        raise ValueError(text)
    return rows


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--faults-report")
    if file is not None and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to us
        config.pluginmanager.register(_Writer(file), "faults-report")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--rows")
    for item in items:
        item.user_properties += [("rows", rows_of(item)), ("configuration", _configuration(item))]
    if wanted is not None:
        left_out = [item for item in items if not set(rows_of(item)) & set(wanted)]
        items[:] = [item for item in items if set(rows_of(item)) & set(wanted)]
        config.hook.pytest_deselected(items=left_out)


def rows_of(item: pytest.Item) -> list[int]:
    """The rows that a test carries, as far as they are about the cluster that it runs on."""
    here = _configuration(item)
    marks = (mark.args for mark in item.iter_markers("row"))
    return sorted({row for row, *on in marks if not on or here in on})


def _configuration(item: pytest.Item) -> str:
    if item.get_closest_marker("slurm") is None:
        return ""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("every_cluster", "default")) if callspec else "default"


class _Writer:
    """Writes down how each test ended."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds: dict[str, float] = {}
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self._seconds[name] = self._seconds.get(name, 0.0) + report.duration
        if report.outcome != "passed":
            self._outcomes[name] = report.outcome
        if report.when != "teardown":
            return
        properties = dict(report.user_properties)
        row = {
            "test": name.partition("[")[0],
            "parameters": name.partition("[")[2].rstrip("]"),
            "rows": properties.pop("rows", []),
            "configuration": properties.pop("configuration", ""),
            "outcome": self._outcomes.pop(name, "passed"),
            "seconds": round(self._seconds.pop(name), 2),
            "figures": properties,
        }
        with self._file.open("a") as file:
            file.write(f"{json.dumps(row)}\n")


# The page


def table(shown: Sequence[Shown], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """The page's second table.

    Args:
        shown: the tests, by row.
        reports: lines of a report.
    """
    found: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for report in reports:
        for row in report["rows"]:
            found.setdefault((row, report["test"]), []).append(report)
    lines = []
    for each in shown:
        cells = (str(each.row), f"`{each.test}`", ", ".join(each.on) or _LOCAL)
        lines.append(f"| {' | '.join([*cells, seen(found.get((each.row, each.test), []))])} |")
    return [*_HEAD, *lines]


def seen(reports: Sequence[Mapping[str, Any]]) -> str:
    """What came of a test: `9 of 9 passed, in 31 to 38 s; seconds lost 8 to 12`; empty for none."""
    ran = [report for report in reports if report["outcome"] != "skipped"]
    if not ran:
        return ""
    passed = sum(report["outcome"] == "passed" for report in ran)
    words = [f"{passed} of {len(ran)} passed, in {_range([each['seconds'] for each in ran])} s"]
    names = dict.fromkeys(name for report in ran for name in report["figures"])
    for name in names:
        values = [report["figures"][name] for report in ran if name in report["figures"]]
        words.append(f"{name} {_range(values)}")
    return "; ".join(words)


def _range(values: Sequence[float]) -> str:
    low, high = (_short(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def page_tests(text: str) -> list[Shown]:
    """The tests that a page names in its second table."""
    found = (_LINE.fullmatch(line) for line in text.splitlines())
    return [
        Shown(int(line[1]), line[2], () if line[3] == _LOCAL else tuple(line[3].split(", ")))
        for line in found
        if line is not None
    ]


def replaced(text: str, lines: Sequence[str]) -> str:
    """A page with another second table."""
    before, head, after = text.partition("\n".join(_HEAD))
    if not head:
        raise ValueError(f"no table begins with {_HEAD[0]!r}")
    rest = after.lstrip("\n").splitlines()
    while rest and rest[0].startswith("|"):
        del rest[0]
    return "\n".join([before + "\n".join(lines), *rest, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or put it onto the page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults_report")
    parser.add_argument("files", nargs="*", type=Path, help="written by make test-faults REPORT=FILE")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    args = parser.parse_args(argv)
    reports = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
    lines = table(collect(), reports)
    if args.write:
        PAGE.write_text(replaced(PAGE.read_text(), lines))
    else:
        sys.stdout.write("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
