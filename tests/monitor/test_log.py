import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agrivision.monitor.log import LOGGER_NAME, configure_log

logger = logging.getLogger("agrivision.somewhere")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    package = logging.getLogger(LOGGER_NAME)
    before = list(package.handlers), package.level, package.propagate
    yield
    for handler in package.handlers:
        if handler not in before[0]:
            handler.close()
    package.handlers[:], package.level, package.propagate = before
    package.setLevel(before[1])


def test_rank_0_shows_plain_lines_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(0, None)
    logger.debug("hidden")
    logger.info("epoch %d", 3)
    logger.warning("slow")
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d epoch 3\n\d\d:\d\d:\d\d warning: slow\n", capsys.readouterr().err
    )


def test_a_terminal_is_told_nothing_to_obey(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Names of files are strangers' words."""
    configure_log(0, tmp_path / "rank-0.log")
    logger.warning("%s is damaged\nas grün as it was", "a\x1b[2J\x9b\u202e.jpg")
    for said in (capsys.readouterr().err, (tmp_path / "rank-0.log").read_text()):
        assert "a\\x1b[2J\\x9b\\u202e.jpg is damaged\nas grün as it was\n" in said


def test_other_ranks_show_warnings_with_their_rank(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(5, None)
    logger.info("hidden")
    logger.error("lost")
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[rank 5\] error: lost\n", capsys.readouterr().err)


def test_the_file_takes_everything_and_is_appended_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "log" / "rank-1.log"
    for text in ("first", "second"):
        configure_log(1, file)
        logger.debug(text)
    lines = file.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "DEBUG agrivision.somewhere: first",
        "DEBUG agrivision.somewhere: second",
    ]
    assert capsys.readouterr().err == ""


def test_a_second_call_does_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_log(0, None)
    configure_log(0, None)
    logger.info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_full_disk_is_said_once_and_ends_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "rank-0.log"
    file.symlink_to("/dev/full")
    configure_log(0, file)
    logger.info("one")
    logger.info("two")
    shown = capsys.readouterr().err
    assert shown.count("cannot be written: No space left on device") == 1
    assert "two" in shown


def test_a_log_that_cannot_be_opened_ends_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("a file where the folder belongs")
    configure_log(0, tmp_path / "log" / "rank-0.log")
    logger.info("on we go")
    shown = capsys.readouterr().err
    assert shown.count("cannot be written") == 1
    assert "on we go" in shown


def test_a_closed_screen_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_log(0, None)
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    logger.info("nobody listens")


def test_a_surrogate_in_a_file_name_can_be_logged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configure_log(0, tmp_path / "rank-0.log")
    logger.info("odd name %s", "\udcff")
    assert "odd name \\udcff" in (tmp_path / "rank-0.log").read_text()
