"""Whatever Slurm and its people do to a job, its run ends as the run to which nothing happened."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agrivision.errors import ExitCode
from launch.cluster import Cluster
from tests.slurm import jobs
from tests.slurm.hooks import MOMENTS, moment
from tests.slurm.jobs import preempt, state
from tests.slurm.runs import (
    CHEAP,
    ROOT,
    SLOW,
    References,
    Run,
    hook,
    processes,
    rank_pids,
    submit,
    train,
)
from tests.training.runs import arguments, samples

Stopwatch = Callable[[Run], None]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    hook(monkeypatch, first=SLOW)


@pytest.mark.row(32)
def test_two_nodes_are_as_four_ranks_of_torchrun(
    cluster: Cluster, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose names nobody knows."""
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
    for name in run.attempts[0].nodes:
        with pytest.raises(socket.gaierror):
            socket.gethostbyname(name)


@pytest.mark.faults
@pytest.mark.timeout(1500)
@pytest.mark.row(1)
def test_time_limit(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook(monkeypatch, slow=0.75)
    monkeypatch.setenv("AGRIVISION_SIGNAL_SECONDS", "10")
    options = ["--time=1", "--signal=USR1@10"]
    run = train(every_cluster, dataset, tmp_path / "run", options, training__epochs=20)
    assert run.end(1200) == "COMPLETED", run.log
    run.assert_whole(references.get(training__epochs=20))
    *stopped, last = run.attempts
    assert len(stopped) >= 2 and last.decision == "done"
    assert {(each.decision, each.reason) for each in stopped} == {("requeued", "time limit")}
    assert int(jobs.job(every_cluster, run.number)["Restarts"]) == len(stopped)
    # Each goes on where the one before it stopped: not a step is repeated.
    assert [each.from_step for each in run.attempts[1:]] == [each.to_step for each in stopped]


@pytest.mark.row(2, "default", "no-requeue")
@pytest.mark.row(3, "user-signal")
def test_preempted(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    stopwatch: Stopwatch,
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run", ["--partition=preempt"])
    run.reach(3)
    stopwatch(run)
    preempt(every_cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.decisions == ["requeued", "done"]
    first, second = run.attempts
    assert first.preempted and first.reason == "preempted" and first.code == ExitCode.STOPPED
    assert second.from_step == first.to_step
    name = "SIGUSR1" if every_cluster.options.preempt_send_user_signal else "SIGTERM"
    assert f"({name})" in run.rank_log
    assert "ended with 85 (preempted): back into the queue" in run.log


@pytest.mark.faults
@pytest.mark.row(4)
def test_preemption_that_cancels(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    stopwatch: Stopwatch,
) -> None:
    """Slurm would let the job go; in the grace it can still be requeued."""
    run = train(every_cluster, dataset, tmp_path / "run", ["--partition=cancelp"])
    run.reach(3)
    stopwatch(run)
    preempt(every_cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.decisions == ["requeued", "done"]
    assert run.attempts[1].from_step == run.attempts[0].to_step


@pytest.mark.faults
@pytest.mark.row(11)
def test_node_set_down(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    stopwatch: Stopwatch,
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run")
    run.reach(3)
    node = run.attempts[0].nodes[0]
    stopwatch(run)
    every_cluster.set_node(node, "down", "the test says so")
    run.wait(lambda: len(run.attempts) == 2, 90, "it starts again")
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.attempts[-1].number == 2


@pytest.mark.faults
@pytest.mark.row(12)
def test_a_lost_node_whose_rank_goes_on(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
    stopwatch: Stopwatch,
) -> None:
    """The old rank trains and saves until the new attempt has begun; from then on it may not."""
    hook(monkeypatch, first=0.5)
    run = train(every_cluster, dataset, tmp_path / "run", training__epochs=40)
    run.reach(4)
    (node,) = run.attempts[0].nodes
    old = rank_pids(run)[0]
    stopwatch(run)
    every_cluster.kill_node(node)
    run.wait(lambda: len(run.attempts) == 2, 120, "it starts elsewhere")
    assert run.attempts[1].nodes != (node,)
    assert Path(f"/proc/{old}").exists(), "the old rank should have outlived the requeue"
    assert run.end(200) == "COMPLETED", run.log
    run.assert_whole(references.get(training__epochs=40))
    assert run.decisions == ["requeued", "done"]
    assert "an earlier attempt" in run.log and "still runs, though its job has ended" in run.log
    run.wait(lambda: not Path(f"/proc/{old}").exists(), 30, "the old rank has gone")
    assert f"{run.path} belongs to a later attempt now (job {run.number}" in run.rank_log
    assert jobs.job(every_cluster, run.number)["Restarts"] == "1"


@pytest.mark.faults
@pytest.mark.row(14)
def test_a_killed_batch_side(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    """Nobody is left to requeue the job: the same command goes on with the run."""
    run = train(every_cluster, dataset, tmp_path / "run")
    run.reach(3)
    rows = [line.split() for line in every_cluster.run("scontrol", "listpids", run.number).splitlines()]
    (shell,) = (int(pid) for pid, _, step, local, _ in rows if (step, local) == ("batch", "0"))
    stopwatch(run)
    os.kill(shell, signal.SIGKILL)
    assert run.end() == "FAILED"
    again = train(every_cluster, dataset, run.path)
    assert again.end() == "COMPLETED", again.log
    again.assert_whole(references.get())
    # Slurm ends what the shell leaves behind, and may be quicker than the batch side's last line.
    assert again.decisions in (["left completing", "done"], ["", "done"])


@pytest.mark.row(15)
def test_cancelled_and_submitted_again(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run")
    run.reach(3)
    stopwatch(run)
    jobs.cancel(every_cluster, run.number)
    run.wait(lambda: run.attempts[0].decision, 60, "it decides")
    assert run.end() == "CANCELLED"
    saved = run.attempts[0].to_step
    assert saved is not None and saved >= 3
    assert run.decisions == ["left completing"]
    again = train(every_cluster, dataset, run.path)
    assert again.end() == "COMPLETED", again.log
    assert again.attempts[1].from_step == saved
    again.assert_whole(references.get())
    # The requeue wait is over by now, and it has not come back.
    assert state(every_cluster, run.number) == "CANCELLED"
    assert jobs.job(every_cluster, run.number)["Restarts"] == "0"


@pytest.mark.faults
@pytest.mark.row(16)
def test_requeued_by_an_administrator(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run")
    run.reach(3)
    stopwatch(run)
    every_cluster.run("scontrol", "requeue", run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.decisions == ["requeued", "done"]
    assert run.attempts[0].code == ExitCode.STOPPED
    assert run.attempts[1].from_step == run.attempts[0].to_step
    assert "Slurm itself puts the job back into the queue" in run.log


@pytest.mark.faults
@pytest.mark.row(17)
def test_a_job_that_may_not_be_requeued(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    """Slurm would let a preempted one go: another job like it goes on."""
    options = ["--partition=preempt", "--no-requeue", "--gres=gpu:1", "--exclude=n2", "--comment=a b",
               "--time=10", "--cpus-per-task=2"]  # fmt: skip
    run = train(every_cluster, dataset, tmp_path / "run", options)
    before = jobs.job(every_cluster, run.number)
    run.reach(3)
    stopwatch(run)
    preempt(every_cluster, run.number)
    word = "successor "  # before it has one, it notes that it asks for a requeue
    run.wait(lambda: run.attempts[0].decision.startswith(word), 60, "it has a successor")
    number = run.attempts[0].decision.removeprefix(word)
    successor = Run(every_cluster, run.path, number)
    assert successor.end() == "COMPLETED", successor.log
    run.assert_whole(references.get())
    assert run.decisions == [f"successor {number}", "done"]
    assert run.attempts[0].reason == "preempted"
    after = jobs.job(every_cluster, number)
    for key in ("JobName", "Partition", "TimeLimit", "NumNodes", "TresPerNode", "ExcNodeList",
                "WorkDir", "Comment", "CPUs/Task", "NumTasks", "OverSubscribe", "Requeue"):  # fmt: skip
        assert after.get(key) == before.get(key), key
    log = Path(before["StdOut"])
    assert run.number in log.name
    assert Path(after["StdOut"]) == log.with_name(log.name.replace(run.number, number))


@pytest.mark.faults
@pytest.mark.row(18)
def test_no_slurm_commands_in_the_step(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
    stopwatch: Stopwatch,
) -> None:
    """The ranks, in a container perhaps, have none; the batch side does what is to be done."""
    monkeypatch.setenv(
        "AGRIVISION_PYTHON", f"/usr/bin/env PATH=/nowhere {os.environ['AGRIVISION_PYTHON']}"
    )
    run = train(every_cluster, dataset, tmp_path / "run", ["--partition=preempt"])
    run.reach(3)
    stopwatch(run)
    preempt(every_cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.decisions == ["requeued", "done"]


@pytest.mark.faults
@pytest.mark.row(29)
def test_fewer_nodes_are_left(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
) -> None:
    """A range of nodes: Slurm requeues the job when one is lost, and starts it on what there is."""
    options = ["--nodes=2-4", "--cpus-per-task=4"]
    run = train(cluster, dataset, tmp_path / "run", options)
    run.reach(3)
    assert len(run.attempts[0].nodes) == 4
    stopwatch(run)
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
@pytest.mark.row(30)
def test_edited_before_a_requeue(
    cluster: Cluster, dataset: Path, tmp_path: Path, references: References, stopwatch: Stopwatch
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
    stopwatch(run)
    preempt(cluster, run.number)
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())


@pytest.mark.faults
@pytest.mark.row(33)
def test_signalled_again_and_again(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While Python starts, while torch is imported, in a save, in an evaluation: until it leaves."""
    hook(monkeypatch, first=SLOW, linger=0.3)
    monkeypatch.setenv(MOMENTS, str(tmp_path))
    options = {"training__epochs": 4, "training__evaluate_every_epochs": 1}
    run = train(every_cluster, dataset, tmp_path / "run", **options)
    run.wait(lambda: run.attempts, 60, "the batch side is there")
    signal_until_it_decides(run, attempt=1)
    run.wait(lambda: any(map(listens, rank_pids(run).values())), 60, "the rank listens")
    heard = [signal_until_it_decides(run, attempt=2)]
    for attempt, name in ((3, "saving"), (4, "evaluating")):
        begun = tmp_path / moment(name, restart=attempt - 1)
        run.wait(begun.exists, 120, f"attempt {attempt} is {name}")
        heard.append(signal_until_it_decides(run, attempt))
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(**options))
    assert run.decisions == ["requeued"] * 4 + ["done"]
    # A program that has just begun may die of a signal: there was nothing to save yet.
    assert [attempt.code for attempt in run.attempts[1:4]] == [ExitCode.STOPPED] * 3
    assert min(heard) >= 2


def listens(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def signal_until_it_decides(run: Run, attempt: int) -> int:
    """Signal the ranks of a job until an attempt is over; returns how often.

    By their processes and not with `scancel --signal`: that would reach the next attempt too, if this
    one has just left.
    """
    count = 0

    def decided() -> bool:
        nonlocal count
        if len(run.decisions) > attempt or run.decisions[attempt - 1]:
            return True
        for pid in rank_pids(run).values():
            with suppress(ProcessLookupError):
                os.kill(pid, (signal.SIGUSR1, signal.SIGTERM)[count % 2])
                count += 1
        return False

    run.wait(decided, 120, f"attempt {attempt} leaves")
    return count


@pytest.mark.faults
@pytest.mark.row(33)
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_the_batch_side_alone_is_signalled(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    references: References,
    stopwatch: Stopwatch,
    name: str,
) -> None:
    """It tells the ranks, and srun does not kill them for that."""
    run = train(cluster, dataset, tmp_path / "run", ["--nodes=2"])
    run.reach(3)
    stopwatch(run)
    (batch,) = processes("launch.batch", run.job.spec_file)  # bash, around it, is deaf
    os.kill(batch, getattr(signal, f"SIG{name}"))
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get(2))
    assert run.decisions == ["requeued", "done"]
    first, second = run.attempts
    assert first.code == ExitCode.STOPPED and first.to_step == second.from_step
    assert first.to_step is not None and first.to_step >= 3


@pytest.mark.faults
@pytest.mark.row(35)
def test_two_jobs_on_one_run(
    every_cluster: Cluster, dataset: Path, tmp_path: Path, references: References
) -> None:
    run = train(every_cluster, dataset, tmp_path / "run")
    run.reach(3)
    spec = run.job.spec_file.read_bytes()
    second = train(every_cluster, dataset, run.path)
    assert second.end() == "FAILED"
    assert second.log.splitlines()[-1].endswith(
        f"launch: error: job {run.number} runs in {run.job.path}: wait for it, cancel it, or choose"
        " another folder"
    )
    assert jobs.job(every_cluster, second.number)["ExitCode"] == "2:0"
    assert run.job.spec_file.read_bytes() == spec
    assert run.end() == "COMPLETED", run.log
    run.assert_whole(references.get())
    assert run.decisions == ["done"]


@pytest.mark.faults
@pytest.mark.row(36)
def test_tensorboard_over_three_attempts(
    cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopwatch: Stopwatch,
) -> None:
    hook(monkeypatch, slow=SLOW)
    run = train(cluster, dataset, tmp_path / "run")
    for step in (8, 30):
        run.reach(step)
        rank = rank_pids(run)[0]
        stopwatch(run)
        os.kill(rank, signal.SIGKILL if step == 8 else signal.SIGUSR1)
        run.wait(lambda folder=Path(f"/proc/{rank}"): not folder.exists(), 60, "the rank has gone")
    assert run.end() == "COMPLETED", run.log
    assert len(run.attempts) == 3
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("checkpoint/")]
    losses = [tag for tag in tags if len(events.Scalars(tag)) > 1]
    assert losses
    for tag in losses:
        assert [event.step for event in events.Scalars(tag)] == list(range(1, 61)), tag
