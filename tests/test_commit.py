"""A run says which commit it ran from, also where the code is a copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agrivision.commit import FILE, commit
from launch.freeze import freeze_code
from launch.jobdir import JobDirectory

ASK = "from agrivision.commit import commit; print(commit())"


def said_by(code: Path) -> str:
    """What a copy of the code says, asked from elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | {"PYTHONPATH": str(code)},
        cwd=code.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_checkout_says_its_commit() -> None:
    here = Path(__file__).parents[1]
    if not (here / ".git").exists():
        pytest.skip("this is no checkout")
    head = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    found = commit()
    assert found is not None
    assert found.removesuffix("-dirty") == head.stdout.strip()


def test_what_a_job_was_submitted_with_says_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.freeze.commit", lambda: "0123abc-dirty")
    job = JobDirectory.of_run(tmp_path / "run")
    job.make()
    freeze_code(job)
    assert said_by(job.code) == "0123abc-dirty"
    (job.code / FILE).unlink()
    assert said_by(job.code) == "None"
    for content in (b"", b"\xff\xfe", b"a\nb", b"\x1b[31m"):
        (job.code / FILE).write_bytes(content)
        assert said_by(job.code) == "None"


def test_an_installed_package_freezes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.freeze.commit", lambda: None)
    job = JobDirectory.of_run(tmp_path / "run")
    job.make()
    freeze_code(job)
    assert sorted(path.name for path in job.code.iterdir()) == ["agrivision", "launch"]
