"""A rank of a job that hangs is named, and the job comes back and ends as the undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agrivision.errors import ExitCode
from agrivision.phase import WAITING
from launch.cluster import Cluster
from tests.slurm.runs import SLOW, References, hook, rank_pids, train

STALL = {"training__stall_minutes": 0.2}  # 12 s: time for two ranks that start on a busy machine


@pytest.mark.faults
@pytest.mark.row(9)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_stopped(
    rank: int,
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook(monkeypatch, first=SLOW)
    run = train(cluster, dataset, tmp_path / "run", ["--ntasks-per-node=2"], **STALL)
    run.reach(7)
    stopped = time.time()
    os.kill(rank_pids(run)[rank], signal.SIGSTOP)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert run.decisions == ["requeued", "done"]
    first = run.attempts[0]
    assert first.code == ExitCode.FAILED and (first.to_step or 0) >= 5
    named = re.match(
        rf"stalled: rank {rank} on n1 \(process \d+\) has not been heard of for (\d+) s", first.reason
    )
    assert named, first.reason
    assert first.ended is not None
    record_property("seconds until it is named", float(named[1]))
    record_property("seconds until the attempt has ended", round(first.ended - stopped, 1))
    assert f"({first.reason}): back into the queue" in run.log
    log = (run.path / "log" / f"rank-{1 - rank}.log").read_text()
    assert re.search(r"process \d+ is T \(stopped\)", log)


@pytest.mark.faults
@pytest.mark.row(10)
def test_a_collective_never_ends(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook(monkeypatch, deaf=7)
    options = ["--nodes=2", "--ntasks-per-node=1"]
    run = train(cluster, dataset, tmp_path / "run", options, **STALL)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert run.decisions == ["requeued", "done"]
    first = run.attempts[0]
    assert first.code == ExitCode.FAILED and first.to_step == 5
    named = re.fullmatch(
        r"stalled: a collective does not end: all 2 ranks have been in the same one for (\d+) s, in"
        f" '{WAITING}'",
        first.reason,
    )
    assert named, first.reason
    record_property("seconds until it is named", float(named[1]))
    for rank in range(2):
        assert "never_ends" in (run.path / "log" / f"rank-{rank}.log").read_text()
