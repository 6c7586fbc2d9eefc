"""What Slurm's commands said, in the one line that a user gets."""

from __future__ import annotations

from subprocess import CompletedProcess

import pytest

from agrivision.slurm import said

SILENT = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def failed(stderr: str, stdout: str = "") -> CompletedProcess[str]:
    return CompletedProcess([], 1, stdout, stderr)


def test_the_last_line_counts() -> None:
    assert said(failed("warning\ninvalid partition\n")) == "invalid partition"
    assert said(failed("", "on the other channel")) == "on the other channel"
    assert said(failed("")) == "exit code 1"


def test_where_nobody_answers_it_names_whom_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/a/slurm.conf")
    assert said(failed(SILENT)) == f"{SILENT}: does the cluster of SLURM_CONF=/a/slurm.conf still run?"
    monkeypatch.delenv("SLURM_CONF")
    assert said(failed(SILENT)) == f"{SILENT}: does it still run?"
