"""What breaks under a job on a real Slurm: ranks, the controller, memory, a port; and what follows."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from agrivision.errors import ExitCode
from agrivision.world import PORTS
from launch.cluster import Cluster
from tests.slurm import jobs
from tests.slurm.runs import SLOW, References, Run, hook, rank_pids, train

Stopwatch = Callable[[Run], None]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hook(monkeypatch, first=SLOW)


@pytest.mark.faults
@pytest.mark.row(5)
def test_all_ranks_are_killed_at_once(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    """On two nodes, as by an operating system that is out of memory or power."""
    run = train(every_cluster, dataset, tmp_path / "run", ["--nodes=2", "--ntasks-per-node=2"])
    run.reach(7)
    pids = rank_pids(run)
    assert list(pids) == [0, 1, 2, 3]
    stopwatch(run)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(4))
    assert run.decisions == ["requeued", "done"]
    first, second = run.attempts
    assert "rank 0 on n1" in first.reason and "ended without a word" in first.reason
    assert second.from_step == first.to_step != 0


@pytest.mark.faults
@pytest.mark.row(6)
def test_a_killed_rank(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run", ["--ntasks-per-node=2"])
    run.reach(3)
    stopwatch(run)
    os.kill(rank_pids(run)[1], signal.SIGKILL)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert run.decisions == ["requeued", "done"]
    assert run.attempts[0].reason.startswith("rank 1 on n1 ended without a word")


@pytest.mark.faults
@pytest.mark.row(8)
def test_a_rank_that_leaves_early(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook(monkeypatch, leave=8)
    run = train(cluster, dataset, tmp_path / "run", ["--ntasks-per-node=2"])
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert run.decisions == ["requeued", "done"]
    assert run.attempts[0].reason.startswith("rank 1 on n1 ended without a word")
    assert run.attempts[0].to_step == run.attempts[1].from_step == 5


@pytest.mark.faults
@pytest.mark.row(13)
def test_the_controller_is_away_while_a_run_trains_and_ends(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run", training__epochs=20)
    run.reach(3)
    every_cluster.kill_controller()
    jobs.wait_for(lambda: run.decisions == ["done"], 120, "the run ends by itself")
    every_cluster.start_controller()
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(training__epochs=20))
    assert jobs.job(every_cluster, run.number)["Restarts"] == "0"


@pytest.mark.faults
@pytest.mark.row(13)
def test_the_controller_is_away_when_a_rank_is_lost(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    """The batch side asks until somebody answers, and then has the job requeued."""
    run = train(every_cluster, dataset, tmp_path / "run")
    log = tmp_path / f"agrivision-{run.number}.out"
    run.reach(3)
    every_cluster.kill_controller()
    stopwatch(run)
    os.kill(rank_pids(run)[0], signal.SIGKILL)
    jobs.wait_for(lambda: "cannot ask for the job's state" in log.read_text(), 120, "it asks in vain")
    every_cluster.start_controller()
    assert run.end(200) == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.decisions == ["requeued", "done"]


@pytest.mark.faults
@pytest.mark.row(13)
def test_the_controller_dies_while_a_job_is_launched(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    """Slurm may keep the job, or put it back held, for an administrator to release.

    What it has not written down is not there for it: up to five seconds of what it was told.
    """
    before = time.time()
    run = train(every_cluster, dataset, tmp_path / "run")
    jobs.wait_for_state(every_cluster, run.number, "RUNNING", seconds=30)
    known = every_cluster.folder / "state" / "job_state"
    run.wait(
        lambda: known.exists() and known.stat().st_mtime > before, 30, "the controller noted it down"
    )
    every_cluster.kill_controller()
    every_cluster.start_controller()

    def released() -> bool:
        record = jobs.job(every_cluster, run.number)
        if record["JobState"] == "PENDING" and "held" in record["Reason"].lower():
            every_cluster.run("scontrol", "release", run.number)
        return record["JobState"] in jobs.ENDED

    run.wait(released, 240, "it ends")
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert set(run.decisions[:-1]) <= {"", "requeued", "superseded", "left pending"}


@pytest.mark.faults
@pytest.mark.row(27)
def test_out_of_memory_on_one_rank(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batch would not fit the next time either: one attempt, one line, all nodes are free."""
    hook(monkeypatch, memory=7)
    run = train(every_cluster, dataset, tmp_path / "run", ["--nodes=2"])
    assert run.end() == "FAILED", run.log
    record = jobs.job(every_cluster, run.number)
    assert (record["ExitCode"], record["Restarts"]) == (f"{ExitCode.HOPELESS.value}:0", "0")
    assert run.decisions == ["given up"]
    assert run.attempts[0].to_step == 5
    assert run.log.splitlines()[-1].endswith(
        "launch: given up: rank 1 on n2: out of GPU memory: use smaller batches or crops, or"
        " training.micro_batch_size"
    )


@pytest.mark.faults
@pytest.mark.row(31)
def test_ports_that_are_taken(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first fifty that the job would take: rank 0 goes on along the row, and says where it is."""
    hook(monkeypatch)
    run = train(cluster, dataset, tmp_path / "run", ["--nodes=2", "--hold"])
    first = int(run.number) % len(PORTS)
    with ExitStack() as stack:
        for place in range(first, first + 50):
            other = stack.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("0.0.0.0", PORTS[place % len(PORTS)]))
            other.listen()
        cluster.run("scontrol", "release", run.number)
        assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert run.decisions == ["done"]


@pytest.mark.row(38)
def test_a_bug_that_always_crashes(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(monkeypatch, crash=3)
    run = train(every_cluster, dataset, tmp_path / "run")
    assert run.end() == "FAILED"
    record = jobs.job(every_cluster, run.number)
    assert (record["ExitCode"], record["Restarts"]) == ("86:0", "2")
    assert run.decisions == ["requeued", "requeued", "given up"]
    last = run.log.splitlines()[-1]
    assert last.endswith(
        "launch: given up: rank 0 on n1: RuntimeError: invented; 3 attempts in a row got no further"
    )
    assert run.log.count("given up") == 1
    assert "raise RuntimeError" in run.log.splitlines()[-3] + run.log.splitlines()[-2]
