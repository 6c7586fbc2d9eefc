"""No network and a vulnerability are told apart, and so is a package that nobody knows."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / ".ci" / "audit"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_loader("audit", SourceFileLoader("audit", str(FILE)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "own", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "code", "line"),
    [
        ([GOOD], 0, "1 of 1 packages looked up, none is known to be vulnerable"),
        ([GOOD, UNKNOWN], 0, "1 of 2 packages looked up"),
        ([GOOD, BAD, UNKNOWN], 1, "bad 2: CVE-1, fixed in 3"),
        ([UNKNOWN, UNKNOWN], 3, "none of the 2 packages is known, so nothing was looked up"),
    ],
)
def test_what_was_found(
    audit: ModuleType,
    packages: list[object],
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert audit.judge(json.dumps({"dependencies": packages}).encode(), "") == code
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "code", "line"),
    [
        ("…\nrequests.exceptions.ProxyError: HTTPSConnectionPool: refused", 3, "cannot be reached"),
        ("ERROR: Could not connect to the feed", 3, "cannot be reached"),
        ("requests.exceptions.HTTPError: 503 Server Error", 3, "cannot be reached"),
        ("Traceback …\nKeyError: 'x'", 1, "pip-audit failed: KeyError: 'x'"),
        ("No module named pip_audit", 1, "failed"),
        ("", 1, "it said nothing"),
    ],
)
def test_what_did_not_work(
    audit: ModuleType, said: str, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.judge(b"", said) == code
    assert line in capsys.readouterr().out


def test_a_tool_that_is_not_there_is_a_failure(audit: ModuleType) -> None:
    assert audit.main(["false"]) == 1


def test_ci_goes_on_without_an_answer_and_with_nothing_else() -> None:
    """`.ci/run` lets 0 and 3 pass; any other code ends it, by `set -e`."""
    run = FILE.with_name("run").read_text()
    assert '[ "$result" = 0 ] || [ "$result" = 3 ]\n}' in run and "\naudit\n" in run
    assert "set -euo pipefail" in run
