"""The attempts of a run, from what it and its job have left."""

import json
from pathlib import Path

import pytest

from agrivision.report.attempts import FINISHED, INTERRUPTED, RUNNING, read_attempts
from agrivision.rundir import RunDirectory
from tests.report.made import (
    BEGAN,
    DONE,
    attempt,
    interrupted_run,
    log,
    make_run,
    stopped,
    training,
)

SILENT = "without a word: killed, or lost with its node"


def test_three_interruptions_are_told_as_they_were(tmp_path: Path) -> None:
    run = RunDirectory(interrupted_run(tmp_path / "run"))
    found = read_attempts(run, 40, None, BEGAN + 10_000)
    assert [one.started for one in found] == [BEGAN, BEGAN + 600, BEGAN + 1200, BEGAN + 1800]
    assert [one.seconds for one in found] == [300, 100, 300, 600]  # the log has another time zone
    assert [(one.from_step, one.to_step) for one in found] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    whys = [one.why for one in found]
    assert whys == ["asked to stop (SIGTERM)", SILENT, "rank 2 is gone", "finished"]
    assert [one.state for one in found] == [INTERRUPTED] * 3 + [FINISHED]
    assert {(one.ranks, one.device, one.hosts) for one in found} == {(4, "NVIDIA H200", ("node1",))}


def test_the_jobs_own_list_counts_more_than_the_log(tmp_path: Path) -> None:
    folder = interrupted_run(tmp_path / "run")
    (folder / "launch").mkdir()
    rows = [
        {"number": 1, "job": "7", "nodes": ["n1", "n2"], "tasks": 4, "began": BEGAN - 20.0},
        {"number": 1, "job": "7", "nodes": ["n1", "n2"], "tasks": 4, "began": BEGAN - 20.0,
         "ended": BEGAN + 310.0, "to_step": 10, "code": 85, "reason": "preempted",
         "decision": "requeued", "preempted": True},
        {"number": 2, "job": "7", "nodes": ["n3"], "tasks": 4, "began": BEGAN + 590.0},
    ]  # fmt: skip
    lines = [*map(json.dumps, rows), "torn {", '{"number": "x"}']
    (folder / "launch" / "attempts.jsonl").write_text("\n".join(lines))
    found = read_attempts(RunDirectory(folder), 40, None, BEGAN + 10_000)
    assert found[0].hosts == ("n1", "n2")
    assert (found[0].ended, found[0].why) == (BEGAN + 310, "preempted and requeued")
    assert (found[1].hosts, found[1].why) == (("n3",), SILENT)
    assert found[2].why == "rank 2 is gone"  # its row is not there: the log tells


@pytest.mark.parametrize(("silence", "state"), [(60, RUNNING), (3600, INTERRUPTED)])
def test_whether_it_runs_is_told_by_its_last_sign_of_life(
    tmp_path: Path, silence: int, state: str
) -> None:
    run = make_run(tmp_path / "run", [training(5)], attempts=[attempt(0, 0)])
    found = read_attempts(RunDirectory(run), 5, BEGAN + 100.0, BEGAN + 100.0 + silence)
    assert (found[0].state, found[0].ended, found[0].to_step) == (state, BEGAN + 100, 5)


def test_a_log_that_does_not_fit_is_not_believed(tmp_path: Path) -> None:
    said = log([(0, 300, 0, stopped(10, "SIGTERM"))])
    run = make_run(
        tmp_path / "run", [training(5)], attempts=[attempt(0, 0), attempt(600, 10)], said=said
    )
    found = read_attempts(RunDirectory(run), 12, None, BEGAN + 10_000)
    assert (found[0].ended, found[0].why) == (None, SILENT)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"attempts": 7}',
        '{"attempts": [7, {"from_step": "x"}, {"ranks": -1}]}',
        "[" * 10**5,
    ],
)
def test_provenance_that_is_none_tells_of_no_attempt(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run", [training(5)])
    (run / "provenance.json").write_text(content)
    assert read_attempts(RunDirectory(run), 5, None, BEGAN) == ()


def test_a_command_that_was_refused_does_not_undo_what_was_finished(tmp_path: Path) -> None:
    """Somebody tries another configuration on a run that is done."""
    refused = log([(900, 900, 0, "agrivision.training.run: leaving with 2: lr was 1")])
    said = log([(0, 300, 0, DONE)]) + refused.splitlines(keepends=True)[-1]
    run = make_run(tmp_path / "run", [training(40)], attempts=[attempt(0, 0)], said=said)
    (found,) = read_attempts(RunDirectory(run), 40, None, BEGAN + 10_000)
    assert (found.state, found.ended, found.why) == (FINISHED, BEGAN + 300, "finished")
