"""Whatever happens to a job on a real Slurm, its run ends as the run to which nothing happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agrivision.errors import ExitCode
from launch.cluster import Cluster
from tests.slurm import jobs
from tests.slurm.conftest import CONFIGURATIONS, Clusters
from tests.slurm.jobs import preempt, state
from tests.slurm.runs import CHEAP, ROOT, References, Run, environment, submit, train
from tests.training.runs import arguments, samples

SLOW = 0.2  # seconds a step: time to disturb it


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hook(monkeypatch, first=SLOW)


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
    run = train(cluster, dataset, tmp_path / "run", ["--partition=preempt"])
    run.reach(3)
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["requeued", "done"]
    assert run.attempts[0].preempted and run.attempts[0].reason == "preempted"
    assert run.attempts[0].code == ExitCode.STOPPED and "(SIGTERM)" in run.rank_log
    assert "ended with 85 (preempted): back into the queue" in run.log


@pytest.mark.faults
def test_a_killed_rank(cluster: Cluster, dataset: Path, tmp_path: Path, references: References) -> None:
    run = train(cluster, dataset, tmp_path / "run", ["--ntasks-per-node=2"])
    run.reach(3)
    pids = {rank_of(pid): pid for pid in rank_pids(run)}
    os.kill(pids[1], signal.SIGKILL)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert decisions(run) == ["requeued", "done"]
    assert run.attempts[0].reason.startswith("rank 1 on n1 ended without a word")


def test_cancelled_and_submitted_again(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(cluster, dataset, tmp_path / "run")
    run.reach(3)
    jobs.cancel(cluster, run.number)
    run.wait(lambda: run.attempts[0].decision, 60, "it decides")
    assert run.end() == "CANCELLED"
    saved = run.attempts[0].to_step
    assert saved is not None and saved >= 3
    assert decisions(run) == ["left completing"]
    again = train(cluster, dataset, run.path)
    assert again.end() == "COMPLETED", again.log
    assert again.attempts[1].from_step == saved
    again.assert_whole(references.get())
    # The requeue wait is over by now, and it has not come back.
    assert state(cluster, run.number) == "CANCELLED"
    assert jobs.job(cluster, run.number)["Restarts"] == "0"


def test_a_bug_that_always_crashes(
    cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(monkeypatch, crash=3)
    run = train(cluster, dataset, tmp_path / "run")
    assert run.end() == "FAILED"
    record = jobs.job(cluster, run.number)
    assert (record["ExitCode"], record["Restarts"]) == ("86:0", "2")
    assert decisions(run) == ["requeued", "requeued", "given up"]
    last = run.log.splitlines()[-1]
    assert last.endswith(
        "launch: given up: rank 0 on n1: RuntimeError: invented; 3 attempts in a row got no further"
    )
    assert run.log.count("given up") == 1
    assert "raise RuntimeError" in run.log.splitlines()[-3] + run.log.splitlines()[-2]


@pytest.mark.faults
def test_preempted_with_the_user_signal(
    clusters: Clusters, dataset: Path, tmp_path: Path, references: References
) -> None:
    cluster = clusters(CONFIGURATIONS["user-signal"])
    run = train(cluster, dataset, tmp_path / "run", ["--partition=preempt"])
    run.reach(3)
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["requeued", "done"]
    assert run.attempts[0].reason == "preempted" and "(SIGUSR1)" in run.rank_log


@pytest.mark.faults
def test_preemption_that_cancels(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    """Slurm would let the job go; in the grace it can still be requeued."""
    run = train(cluster, dataset, tmp_path / "run", ["--partition=cancelp"])
    run.reach(3)
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["requeued", "done"]


@pytest.mark.faults
def test_a_job_that_may_not_be_requeued(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    """Slurm would let a preempted one go: another job like it goes on."""
    options = ["--partition=preempt", "--no-requeue", "--gres=gpu:1", "--exclude=n2", "--comment=a b",
               "--time=10", "--cpus-per-task=2"]  # fmt: skip
    run = train(cluster, dataset, tmp_path / "run", options)
    before = jobs.job(cluster, run.number)
    run.reach(3)
    preempt(cluster, run.number)
    number = run.wait(lambda: run.attempts[0].decision, 60, "it decides").removeprefix("successor ")
    successor = Run(cluster, run.path, number)
    assert successor.end() == "COMPLETED", successor.log
    run.assert_whole(references.get())
    assert decisions(run) == [f"successor {number}", "done"]
    assert run.attempts[0].reason == "preempted"
    after = jobs.job(cluster, number)
    for key in ("JobName", "Partition", "TimeLimit", "NumNodes", "TresPerNode", "ExcNodeList",
                "WorkDir", "Comment", "CPUs/Task", "NumTasks", "OverSubscribe", "Requeue"):  # fmt: skip
        assert after.get(key) == before.get(key), key
    assert after["StdOut"] == before["StdOut"].replace(run.number, number)


@pytest.mark.faults
def test_a_cluster_that_does_not_requeue_by_default(
    clusters: Clusters, dataset: Path, tmp_path: Path, references: References
) -> None:
    """The script asks for it, which is what Slurm goes by."""
    run = train(
        clusters(CONFIGURATIONS["no-requeue"]), dataset, tmp_path / "run", ["--partition=preempt"]
    )
    run.reach(3)
    preempt(run.cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["requeued", "done"]


@pytest.mark.faults
def test_node_set_down(cluster: Cluster, dataset: Path, tmp_path: Path, references: References) -> None:
    run = train(cluster, dataset, tmp_path / "run")
    run.reach(3)
    node = run.attempts[0].nodes[0]
    cluster.set_node(node, "down", "the test says so")
    run.wait(lambda: len(run.attempts) == 2, 90, "it starts again")
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.attempts[-1].number == 2


@pytest.mark.faults
def test_a_lost_node_whose_rank_goes_on(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old rank trains and saves until the new attempt has begun; from then on it may not."""
    hook(monkeypatch, slow=0.25)
    run = train(cluster, dataset, tmp_path / "run", training__epochs=40)
    run.reach(4)
    (node,) = run.attempts[0].nodes
    (old,) = rank_pids(run)
    cluster.kill_node(node)
    run.wait(lambda: len(run.attempts) == 2, 120, "it starts elsewhere")
    assert run.attempts[1].nodes != (node,)
    assert Path(f"/proc/{old}").exists(), "the old rank should have outlived the requeue"
    assert run.end(200) == "COMPLETED", run.log
    run.assert_whole(references.get(training__epochs=40))
    assert decisions(run) == ["requeued", "done"]
    assert "an earlier attempt" in run.log and "still runs, though its job has ended" in run.log
    assert f"{run.path} belongs to a later attempt now (job {run.number}" in run.rank_log
    assert not Path(f"/proc/{old}").exists()
    assert jobs.job(cluster, run.number)["Restarts"] == "1"


@pytest.mark.faults
def test_no_slurm_commands_in_the_step(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ranks, in a container perhaps, have none; the batch side does what is to be done."""
    monkeypatch.setenv(
        "AGRIVISION_PYTHON", f"/usr/bin/env PATH=/nowhere {os.environ['AGRIVISION_PYTHON']}"
    )
    run = train(cluster, dataset, tmp_path / "run", ["--partition=preempt"])
    run.reach(3)
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["requeued", "done"]


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_time_limit(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook(monkeypatch, slow=0.5)
    monkeypatch.setenv("AGRIVISION_SIGNAL_SECONDS", "10")
    options = ["--time=1", "--signal=USR1@10"]
    run = train(cluster, dataset, tmp_path / "run", options, training__epochs=20)
    assert run.end(600) == "COMPLETED", run.log
    run.assert_whole(references.get(training__epochs=20))
    *stopped, last = run.attempts
    assert len(stopped) >= 2 and last.decision == "done"
    assert {(each.decision, each.reason) for each in stopped} == {("requeued", "time limit")}
    assert int(jobs.job(cluster, run.number)["Restarts"]) == len(stopped)


@pytest.mark.faults
def test_fewer_nodes_are_left(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    """A range of nodes: Slurm requeues the job when one is lost, and starts it on what there is."""
    options = ["--nodes=2-4", "--cpus-per-task=4"]
    run = train(cluster, dataset, tmp_path / "run", options)
    run.reach(3)
    assert len(run.attempts[0].nodes) == 4
    for node in run.attempts[0].nodes[2:]:
        cluster.kill_node(node)
        cluster.set_node(node, "down", "the test says so")
    run.wait(lambda: len(run.attempts) == 2, 120, "it starts again")
    assert run.end(200) == "COMPLETED", run.log
    assert len(run.attempts[1].nodes) == 2
    reference = samples(references.get())
    found = samples(run.path)
    assert {step: sorted(keys) for step, keys in found.items()} == {
        step: sorted(keys) for step, keys in reference.items()
    }
    for epoch in range(10):
        keys = [key for (of, _), each in found.items() if of == epoch for key in each]
        assert len(keys) == len(set(keys))


@pytest.mark.faults
def test_requeued_by_an_administrator(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(cluster, dataset, tmp_path / "run")
    run.reach(3)
    cluster.run("scontrol", "requeue", run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["requeued", "done"]
    assert run.attempts[0].code == ExitCode.STOPPED
    assert "Slurm itself puts the job back into the queue" in run.log


@pytest.mark.faults
def test_a_killed_batch_side(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(cluster, dataset, tmp_path / "run")
    run.reach(3)
    shell = int(cluster.run("scontrol", "listpids", run.number).split()[5])
    os.kill(shell, signal.SIGKILL)
    assert run.end() == "FAILED"
    again = train(cluster, dataset, run.path)
    assert again.end() == "COMPLETED", again.log
    again.assert_whole(references.get())


@pytest.mark.faults
def test_a_rank_that_leaves_early(
    cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(monkeypatch, leave=8)
    run = train(cluster, dataset, tmp_path / "run", ["--ntasks-per-node=2"])
    run.wait(lambda: run.attempts and run.attempts[0].decision, 120, "the attempt has ended")
    jobs.cancel(cluster, run.number)
    assert decisions(run)[0] == "requeued"
    assert run.attempts[0].reason.startswith("rank 1 on n1 ended without a word")
    assert run.attempts[0].to_step == 5


@pytest.mark.faults
def test_edited_before_a_requeue(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Submitted from a checkout, which is what Python would look at first, with a file of its own."""
    checkout = tmp_path / "checkout"
    for package in ("agrivision", "launch"):
        shutil.copytree(ROOT / package, checkout / package)
    words = arguments(dataset, tmp_path / "run", **CHEAP)[1:]
    place = words.index("--training.epochs")
    del words[place : place + 2]
    config = tmp_path / "my.yaml"
    config.write_text("training:\n  epochs: 10\n")
    run = submit(
        cluster, tmp_path / "run", ["--config", str(config), *words],
        ["--partition=preempt", f"--chdir={checkout}"],
    )  # fmt: skip
    run.reach(3)
    config.write_text("training:\n  epochs: 1\n")
    (checkout / "agrivision" / "training" / "trainer.py").write_text("raise RuntimeError('edited')\n")
    for file in ("launch/decision.py", "launch/batch.py", "agrivision/errors.py"):
        (checkout / file).write_text("raise RuntimeError('edited')\n")
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())


@pytest.mark.faults
def test_signalled_at_once(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    """While Python starts, while torch is imported: the job is requeued, or goes on."""
    run = train(cluster, dataset, tmp_path / "run")
    run.wait(lambda: run.attempts, 60, "the batch side is there")
    for _ in range(3):
        cluster.run("scancel", "--full", "--signal=USR1", run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert set(decisions(run)[:-1]) <= {"requeued"}


@pytest.mark.faults
def test_two_jobs_on_one_run(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(cluster, dataset, tmp_path / "run")
    run.reach(3)
    spec = run.job.spec_file.read_bytes()
    second = train(cluster, dataset, run.path)
    assert second.end() == "FAILED"
    assert second.log.splitlines()[-1].endswith(
        f"launch: error: job {run.number} runs in {run.job.path}: wait for it, cancel it, or choose"
        " another folder"
    )
    assert jobs.job(cluster, second.number)["ExitCode"] == "2:0"
    assert run.job.spec_file.read_bytes() == spec
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert decisions(run) == ["done"]


@pytest.mark.faults
def test_tensorboard_over_three_attempts(
    cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook(monkeypatch, slow=SLOW)
    run = train(cluster, dataset, tmp_path / "run")
    for step in (8, 30):
        run.reach(step)
        (rank,) = rank_pids(run)
        os.kill(rank, signal.SIGKILL if step == 8 else signal.SIGUSR1)
        run.wait(lambda folder=Path(f"/proc/{rank}"): not folder.exists(), 60, "the rank has gone")
    assert run.end() == "COMPLETED", run.log
    assert len(run.attempts) == 3
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    losses = [tag for tag in tags if len(events.Scalars(tag)) > 1]
    assert losses
    for tag in losses:
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 61)), tag
