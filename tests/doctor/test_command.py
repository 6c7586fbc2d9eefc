"""The command: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agrivision.cli import main
from agrivision.doctor import examination
from agrivision.doctor.exchange import add_up
from agrivision.doctor.finding import Finding, Topic, Verdict

TOPIC = Topic("Weather")
SUN = TOPIC.good("sun")
RAIN = TOPIC.careful("rain", "take a coat")
HAIL = TOPIC.bad("hail, and [red]storm[/red]", "stay in")


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What the examination finds; to be filled."""
    found: list[Finding] = []
    monkeypatch.setattr(examination, "examine", lambda _: iter(found))
    return found


def doctor(*arguments: str) -> int:
    previous = signal.getsignal(signal.SIGTERM)
    try:
        return main(["doctor", *arguments])
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_lines_marks_and_the_exit_code(
    weather: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    weather += [SUN, RAIN]
    assert doctor() == 0
    weather.append(HAIL)
    capsys.readouterr()
    assert doctor() == 1
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Weather",
        "  good     sun",
        "  careful  rain",
        "           → take a coat",
        "  bad      hail, and [red]storm[/red]",
        "           → stay in",
        "",
        "1 good, 1 careful, 1 bad",
    ]


def test_json_holds_every_finding(weather: list[Finding], tmp_path: Path) -> None:
    weather += [SUN, HAIL]
    assert doctor("--json", str(tmp_path / "found.json")) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"] == {"good": 1, "careful": 0, "bad": 1}
    assert found["findings"] == [
        {"topic": "Weather", "what": "sun", "verdict": "good", "advice": ""},
        {
            "topic": "Weather",
            "what": "hail, and [red]storm[/red]",
            "verdict": "bad",
            "advice": "stay in",
        },
    ]


def test_lines_are_folded_on_a_terminal(
    weather: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weather.append(TOPIC.careful("word " * 30, "do " * 40))
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    assert doctor() == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("\x1b[33m" in line for line in lines)
    assert all(len(line) <= 60 + 12 for line in lines)
    assert sum("word" in line for line in lines) > 1


@pytest.mark.parametrize("flag", ["--wait_seconds", "--signal_seconds"])
def test_a_time_that_is_none_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(flag, "0") == 2
    assert f"{flag} is 0" in capsys.readouterr().err


def test_what_is_not_good_needs_an_advice() -> None:
    for verdict, advice in [(Verdict.BAD, ""), (Verdict.CAREFUL, ""), (Verdict.GOOD, "rest")]:
        with pytest.raises(ValueError, match="advice"):
            Finding(topic="Weather", what="hail", verdict=verdict, advice=advice)


def test_whoever_ends_it_finds_nothing_left(tmp_path: Path) -> None:
    """SIGTERM in the middle of the small files, as from a scheduler."""
    script = (
        "import sys, time\n"
        "from agrivision.doctor import examination, run_folder\n"
        "def wait(folder):\n"
        "    (folder / 'small').touch()\n"
        "    print('now', flush=True)\n"
        "    time.sleep(600)\n"
        "run_folder.small_files = wait\n"
        "examination.examine_software = lambda: iter(())\n"
        "examination._torch = lambda: iter(())\n"
        "examination.examine_node = lambda *_: iter(())\n"
        "from agrivision.cli import main\n"
        "sys.exit(main(['doctor', '--run_dir', sys.argv[1]]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = iter(process.stdout)
    assert any("now" in line for line in said)
    assert list(tmp_path.iterdir()) != []
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_ranks_add_up() -> None:
    assert add_up("gloo", 2) == ""


def test_ranks_that_cannot_meet_are_named() -> None:
    assert "no_such_backend" in add_up("no_such_backend", 1).lower()


def test_ranks_that_never_answer_are_ended(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(600)\n")
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert add_up("gloo", 2, environment, seconds=2) == "no answer within 2 s"
    assert time.monotonic() - begin < 60


@pytest.mark.faults
def test_the_whole_examination_of_this_machine(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "missing", lambda: Topic("Slurm").good("not here"))
    ranks = iter([Topic("Ranks").good("not started: there is a test for them")])
    monkeypatch.setattr(examination, "examine_exchange", lambda *_: ranks)
    what = examination.Examination(data=dataset, run_dir=tmp_path)
    found = list(examination.examine(what))
    assert [*dict.fromkeys(each.topic for each in found)] == [
        "Python",
        "GPUs",
        "Ranks",
        "Machine",
        f"Run folder {tmp_path}",
        f"Data folder {dataset}",
        "Slurm",
    ]
    assert list(tmp_path.iterdir()) == []


def test_without_torch_the_rest_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise ImportError("no torch")

    monkeypatch.setattr(examination, "read_torch", broken)
    monkeypatch.setattr(examination, "examine_software", lambda: iter([SUN]))
    monkeypatch.setattr(examination, "missing", lambda: Topic("Slurm").good("not here"))
    topics = {each.topic for each in examination.examine(examination.Examination())}
    assert topics == {"Weather", "Machine", "Slurm"}
