import io
import logging
import sys

import pytest

from agrivision.monitor.progress import clock_time, progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG, logger="agrivision")
    monkeypatch.setattr(logging.getLogger("agrivision"), "propagate", True)


def terminal_for(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest puts its own stderr in place between a fixture and its test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def test_a_line_at_most_every_n_seconds_and_one_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with progress("train", 100, seconds=30, clock=clock) as bar:
        for step in range(1, 101):
            clock.now += 1
            bar.advance(1, loss=1 / step)
    assert lines(caplog) == [
        "train: 30/100 (30 %) steps, 1 steps/s, 01:10 left, loss 0.03333",
        "train: 60/100 (60 %) steps, 1 steps/s, 00:40 left, loss 0.01667",
        "train: 90/100 (90 %) steps, 1 steps/s, 00:10 left, loss 0.01111",
        "train: 100/100 (100 %) steps, 1 steps/s, in 01:40, loss 0.01",
    ]


def test_what_an_earlier_run_did_does_not_count_for_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with progress("train", 1000, done=900, seconds=5, clock=clock) as bar:
        clock.now += 10
        bar.advance(50)
        assert bar.done == 950
    assert lines(caplog)[0] == "train: 950/1000 (95 %) steps, 5 steps/s, 00:10 left"


def test_a_total_may_be_unknown_and_come_later(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with progress("prepare", unit="tile", seconds=1, clock=clock) as bar:
        clock.now += 2
        bar.advance(4)
        bar.total(8)
        clock.now += 2
        bar.advance(2)
    first, second, last = lines(caplog)
    assert first == "prepare: 4 tiles, 2 tiles/s, in 00:02"
    assert second == "prepare: 6/8 (75 %) tiles, 1.5 tiles/s, 00:01 left"
    assert last == "prepare: 6/8 (75 %) tiles, 1.5 tiles/s, in 00:04"


def test_nothing_to_do_is_no_division_by_zero(caplog: pytest.LogCaptureFixture) -> None:
    with progress("predict", 0, unit="scene", clock=Clock()):
        pass
    assert lines(caplog) == ["predict: 0/0 scenes, in 00:00"]


def test_other_ranks_tell_only_their_log_file(caplog: pytest.LogCaptureFixture) -> None:
    with progress("train", 1, show=False, clock=Clock()) as bar:
        bar.advance()
    assert lines(caplog) == []
    assert len(lines(caplog, logging.DEBUG)) == 1


def test_fields_of_any_name(caplog: pytest.LogCaptureFixture) -> None:
    with progress("train", 1, clock=Clock()) as bar:
        bar.advance(1, loss=float("nan"), **{"images/s": 1234.5})
    assert lines(caplog)[-1].endswith("loss nan, images/s 1234")


def test_a_bar_on_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    clock = Clock()
    with progress("train [1]", 10, clock=clock) as bar:
        for _ in range(5):
            clock.now += 1
            bar.advance(1, miou="0.5 [x]")
        bar.note("saved")
    shown = terminal.getvalue()
    assert "train [1]" in shown
    assert "5/10 (50 %) steps" in shown
    assert "00:05 left" in shown
    assert "miou 0.5 [x]" in shown
    assert lines(caplog) == ["saved"]
    assert len(lines(caplog, logging.DEBUG)) == 1  # the log file has the last line


def test_the_terminal_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress("train", 10, clock=Clock()):
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (59.6, "01:00"), (3600, "1:00:00"), (93784, "1d 02:03:04")],
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
