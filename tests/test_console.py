"""What commands print, on a terminal and in a log."""

from __future__ import annotations

import pytest

from agrivision import console


@pytest.mark.parametrize(
    ("is_terminal", "environment", "watched"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"SLURM_JOB_ID": "7"}, True),  # a shell in an allocation
        (True, {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}, False),  # srun --unbuffered
        (True, {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "5"}, True),  # srun --pty
    ],
)
def test_a_step_of_slurm_writes_a_log(
    is_terminal: bool, environment: dict[str, str], watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    assert console.is_watched(environment) is watched


def test_names_are_no_markup_and_nothing_to_obey(capsys: pytest.CaptureFixture[str]) -> None:
    name, of_class = "[red]\x1b[2J", {"[red]\x1b[2J": 0.5}
    kinds = dict.fromkeys(("iou", "precision", "recall", "f1"), of_class)
    console.print_scores({"classes": [name], "absent": [name], "miou": 0.5, **kinds})
    said = capsys.readouterr().out
    assert said.count("[red]\\x1b[2J") == 2 and "\x1b" not in said


def test_names_are_whole_and_plain_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.delenv("SLURM_PTY_PORT", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    name = "nutrient_deficiency_of_the_lower_leaves"
    of_class = {name: 0.5}
    kinds = dict.fromkeys(("iou", "precision", "recall", "f1"), of_class)
    console.print_scores({"classes": [name], "absent": [], "miou": 0.5, **kinds})
    said = capsys.readouterr().out
    assert name in said and "\x1b" not in said
