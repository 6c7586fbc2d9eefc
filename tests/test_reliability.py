"""docs/reliability.md says which test shows what of the fault matrix, and says it of every fault."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults_report import CONFIGURATIONS, PAGE, ROWS, collect, page_tests, replaced, seen, table
from tests.slurm.conftest import CONFIGURATIONS as CLUSTERS

FAULT = re.compile(r"\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|")


def test_every_fault_has_a_test() -> None:
    assert {shown.row for shown in collect()} == set(ROWS)


def test_the_page_names_the_tests_of_each_fault() -> None:
    """If this fails: `python -m tests.faults_report --write`, with a report if there is one."""
    assert page_tests(PAGE.read_text()) == collect()


def test_the_page_says_of_each_fault_what_follows() -> None:
    found = [FAULT.fullmatch(line) for line in PAGE.read_text().splitlines()]
    assert [int(line[1]) for line in found if line is not None] == list(ROWS)


def test_rows_name_clusters_that_there_are() -> None:
    assert tuple(CLUSTERS) == CONFIGURATIONS
    assert {name for shown in collect() for name in shown.on} == set(CONFIGURATIONS)


TEST = """
import pytest

@pytest.mark.row(9)
def test_good(record_property):
    record_property("seconds lost", 2.5)

@pytest.mark.row(9)
@pytest.mark.row(10)
def test_bad():
    assert False

@pytest.mark.row(11)
def test_left_out(): ...
"""


def test_a_report_tells_what_was_seen(tmp_path: Path) -> None:
    folder, report = tmp_path / "tests", tmp_path / "report.jsonl"
    folder.mkdir()
    (folder / "test_it.py").write_text(TEST)
    root = PAGE.parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults_report", "-p",
               "no:cacheprovider", "-c", root / "pyproject.toml", "--rootdir", tmp_path,
               "--rows", "9,10", "--faults-report", report, folder]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert "1 failed, 1 passed, 1 deselected" in done.stdout
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    lines = table(collect(folder), rows)[2:]
    assert [line.split(" in ")[0] for line in lines] == [
        "| 9 | `tests/test_it.py::test_good` | ranks of this machine | 2 of 2 passed,",
        "| 9 | `tests/test_it.py::test_bad` | ranks of this machine | 0 of 2 passed,",
        "| 10 | `tests/test_it.py::test_bad` | ranks of this machine | 0 of 2 passed,",
        "| 11 | `tests/test_it.py::test_left_out` | ranks of this machine |  |",
    ]
    assert lines[0].endswith("; seconds lost 2.5 |")


def test_figures_are_ranges() -> None:
    figures = [{"lost": 9.04, "repeated": 0}, {"lost": 12.6, "repeated": 0}]
    rows = [
        {"outcome": "passed", "seconds": 31.4 + place, "figures": each}
        for place, each in enumerate(figures)
    ]
    rows.append({"outcome": "skipped", "seconds": 0.1, "figures": {}})
    assert seen(rows) == "2 of 2 passed, in 31 to 32 s; lost 9.0 to 13; repeated 0"
    assert seen(rows[2:]) == ""


def test_a_table_takes_the_place_of_another() -> None:
    text = (
        "before\n\n| # | test | on | seen |\n| --- | --- | --- | --- |\n| 1 | `a` | b |  |\n\nafter\n"
    )
    lines = table([], [])
    assert replaced(text, lines) == "before\n\n" + "\n".join(lines) + "\n\nafter\n"
    with pytest.raises(ValueError, match="no table"):
        replaced("nothing", lines)
