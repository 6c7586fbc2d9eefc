"""Whatever happens to a job on a real Slurm, its run ends as the run to which nothing happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agrivision.errors import ExitCode
from launch.cluster import Cluster
from tests.slurm import jobs
from tests.slurm.conftest import CONFIGURATIONS, Clusters
from tests.slurm.jobs import preempt, state, wait_for
from tests.slurm.runs import CHEAP, References, Run, environment, train
from tests.training.runs import arguments, assert_same, samples

SLOW = 0.05


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hook(monkeypatch, slow=SLOW)


@pytest.fixture(scope="session")
def references(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(dataset, tmp_path_factory.mktemp("references"))


def hook(monkeypatch: pytest.MonkeyPatch, **hooks: float) -> None:
    """Disturb the ranks of the jobs that are submitted from now on."""
    for name, value in environment(**hooks).items():
        monkeypatch.setenv(name, value)


def decisions(run: Run) -> list[str]:
    return [attempt.decision for attempt in run.attempts]


def processes(run: Run, *words: str) -> list[int]:
    """The processes whose command line names the run directory and the words."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(run.path) in command and {os.fsencode(word) for word in words} <= set(
                command
            ):
                found.append(int(process.name))
    return found


def rank_pids(run: Run) -> list[int]:
    """The processes of the ranks, in their order."""
    # srun's own command line ends with the same words.
    return sorted(pid for pid in processes(run, "agrivision", "train") if rank_of(pid) >= 0)


def rank_of(pid: int) -> int:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return -1
    found = [int(each.partition(b"=")[2]) for each in variables if each.startswith(b"SLURM_PROCID=")]
    return found[0] if found and any(each.startswith(b"SLURM_STEP_ID=") for each in variables) else -1


def test_two_nodes_are_as_four_ranks_of_torchrun(
    cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(monkeypatch)
    run = train(
        cluster, dataset, tmp_path / "run", ["--nodes=2", "--ntasks-per-node=2"],
        training__epochs=2, training__evaluate_every_epochs=1,
    )  # fmt: skip
    assert run.end() == "COMPLETED", run.log
    words = arguments(
        dataset, tmp_path / "torchrun",
        **(CHEAP | {"training__epochs": 2, "training__evaluate_every_epochs": 1}),
    )  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--standalone"]
    subprocess.run([*torchrun, "-m", "agrivision", *words], check=True, capture_output=True)
    run.assert_whole(tmp_path / "torchrun")
    assert len(run.attempts) == 1 and run.attempts[0].tasks == 4
    assert len(set(run.attempts[0].nodes)) == 2


def test_preempted_with_sigterm(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(cluster, dataset, tmp_path / "run", ["--partition=preempt"], training__epochs=20)
    run.reach(8)
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(training__epochs=20))
    assert decisions(run) == ["requeued", "done"]
    assert run.attempts[0].preempted and run.attempts[0].reason == "preempted"
    assert run.attempts[0].code == ExitCode.STOPPED and "(SIGTERM)" in run.rank_log
    assert "ended with 85 (preempted): back into the queue" in run.log


def test_a_killed_rank(cluster: Cluster, dataset: Path, tmp_path: Path, references: References) -> None:
    run = train(cluster, dataset, tmp_path / "run", ["--ntasks-per-node=2"], training__epochs=20)
    run.reach(8)
    pids = {rank_of(pid): pid for pid in rank_pids(run)}
    os.kill(pids[1], signal.SIGKILL)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2, training__epochs=20))
    assert decisions(run) == ["requeued", "done"]
    assert "rank 1 on n1 ended without a word (srun: 137, SIGKILL)" in run.attempts[0].reason


def test_cancelled_and_submitted_again(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(cluster, dataset, tmp_path / "run", training__epochs=20)
    run.reach(8)
    jobs.cancel(cluster, run.number)
    run.wait(lambda: run.attempts[0].decision, 60, "it decides")
    assert run.end() == "CANCELLED"
    saved = run.attempts[0].to_step
    assert saved is not None and saved >= 8
    assert decisions(run) == ["left completing"]
    again = train(cluster, dataset, run.path, training__epochs=20)
    assert again.end() == "COMPLETED", again.log
    assert again.attempts[1].from_step == saved
    again.assert_whole(references.get(training__epochs=20))
    # The requeue wait is over by now, and it has not come back.
    assert state(cluster, run.number) == "CANCELLED"
    assert jobs.job(cluster, run.number)["Restarts"] == "0"


def test_a_bug_that_always_crashes(
    cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(monkeypatch, crash=7)
    run = train(cluster, dataset, tmp_path / "run")
    assert run.end() == "FAILED"
    record = jobs.job(cluster, run.number)
    assert (record["ExitCode"], record["Restarts"]) == ("86:0", "3")
    # The first one got as far as a checkpoint; the three after it no further.
    assert decisions(run) == ["requeued", "requeued", "requeued", "given up"]
    last = run.log.splitlines()[-1]
    assert last.endswith(
        "launch: given up: rank 0 on n1: RuntimeError: invented; 3 attempts in a row got no further"
    )
    assert run.log.count("given up") == 1
    assert "raise RuntimeError" in run.log.splitlines()[-3] + run.log.splitlines()[-2]
