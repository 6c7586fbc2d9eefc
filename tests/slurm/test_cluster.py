"""A cluster of one's own: it comes up, runs jobs as Slurm does, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agrivision.errors import BadInput
from launch import cluster as module
from launch.cluster import Cluster, ClusterError, ClusterOptions
from launch.cluster_files import find_address, find_programs
from tests.slurm.conftest import ANY_INTERFACE, CONFIGURATIONS
from tests.slurm.jobs import (
    job,
    jobs,
    log,
    preempt,
    state,
    submit,
    wait_for,
    wait_for_end,
    wait_for_state,
)
from tests.slurm.sampling import choose

SMALL = ClusterOptions(nodes=1, cpus=1, gpus=0, any_interface=ANY_INTERFACE)
SLEEPS = "exec sleep 600"
# Another process of pytest may run the same tests at the same time.
SECONDS = f"600.{os.getpid()}"
# A process without a parent, a session or a variable that would tell whose it is.
DAEMON = f"(setsid env -i /bin/sleep {SECONDS} &)"


def script(folder: Path, *lines: str) -> Path:
    path = folder / "job.sh"
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return path


def run(cluster: Cluster, folder: Path, line: str, *options: str) -> str:
    """Run a line as a batch job to its end; returns the log."""
    number = submit(cluster, script(folder, line), options=[f"--output={folder}/%j.log", *options])
    assert wait_for_end(cluster, number, 60)["JobState"] == "COMPLETED", log(cluster, number)
    return log(cluster, number)


def begin(cluster: Cluster, folder: Path, *lines: str, options: tuple[str, ...] = ()) -> str:
    """Start a batch job, and wait until its lines have run up to one that says so."""
    path = script(folder, *lines)
    where = ["--open-mode=append", f"--output={folder}/%j.log"]
    number = submit(cluster, path, options=[*where, *options])
    wait_for_state(cluster, number, "RUNNING", seconds=30)
    return number


def processes_that_name(folder: Path) -> list[str]:
    """The command lines of living processes with the folder in them, in their environment or as cwd."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            environment = (process / "environ").read_bytes()
            here = os.fsencode((process / "cwd").readlink())
        except OSError:
            continue
        if os.fsencode(folder) in command + environment + here:
            found.append(command.decode(errors="replace"))
    return found


def sleepers() -> set[int]:
    """The processes that run `DAEMON`'s program."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command == f"/bin/sleep\0{SECONDS}\0".encode():
                found.add(int(process.name))
    return found


def test_all_nodes_are_idle(every_cluster: Cluster) -> None:
    assert every_cluster.states() == {"n1": "idle", "n2": "idle", "n3": "idle", "n4": "idle"}
    assert every_cluster.running


def test_a_job_over_two_nodes_sees_its_place(cluster: Cluster, tmp_path: Path) -> None:
    said = run(
        cluster, tmp_path,
        "srun bash -c 'echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS $SLURMD_NODENAME'",
        "--nodes=2", "--ntasks-per-node=2",
    )  # fmt: skip
    assert sorted(said.splitlines()) == ["0 0 4 n1", "1 1 4 n1", "2 0 4 n2", "3 1 4 n2"]


def test_invented_gpus_are_handed_out_as_real_ones(cluster: Cluster, tmp_path: Path) -> None:
    show = "srun bash -c 'echo $SLURM_PROCID $CUDA_VISIBLE_DEVICES'"
    node = ("--nodes=1", "--ntasks-per-node=2")
    together = run(cluster, tmp_path, show, *node, "--gpus-per-node=2")
    assert sorted(together.splitlines()) == ["0 0,1", "1 0,1"]
    alone = run(cluster, tmp_path, show, *node, "--gpus-per-task=1")
    assert sorted(alone.splitlines()) == ["0 0", "1 1"]


def test_every_configuration_does_what_it_is_called(clusters: object, tmp_path: Path) -> None:
    assert callable(clusters)
    shown = {
        name: clusters(options).run("scontrol", "show", "config")
        for name, options in CONFIGURATIONS.items()
    }
    signal = {name for name, text in shown.items() if "preempt_send_user_signal" in text}
    requeue = {name for name, text in shown.items() if "JobRequeue              = 1" in text}
    assert (signal, requeue) == ({"user-signal"}, {"default", "user-signal"})


def test_a_requeued_job_starts_again_after_seconds(cluster: Cluster, tmp_path: Path) -> None:
    number = begin(cluster, tmp_path, "echo attempt ${SLURM_RESTART_COUNT:-0}", SLEEPS)
    wait_for(
        lambda: "attempt 0" in log(cluster, number), 30, "it writes", cluster=cluster, number=number
    )
    cluster.run("scontrol", "requeue", number)
    wait_for(
        lambda: "attempt 1" in log(cluster, number), 60, "it is back", cluster=cluster, number=number
    )
    assert job(cluster, number)["Restarts"] == "1"


def test_a_job_that_makes_way_comes_back(slurm: None, short_path: Path, tmp_path: Path) -> None:
    quick = replace(SMALL, grace_time=1, kill_wait=1)
    with Cluster.start(short_path / "cluster", quick) as cluster:
        number = begin(cluster, tmp_path, SLEEPS, options=("--partition=preempt",))
        preempt(cluster, number)
        assert job(cluster, number)["Restarts"] == "1"
        wait_for_state(cluster, number, "RUNNING", seconds=60)


def test_records_of_an_array(cluster: Cluster, tmp_path: Path) -> None:
    path = script(tmp_path, "exit 0")
    number = submit(
        cluster, path, "a=b c", options=["--array=0-2", "--output=/dev/null", "--job-name=one two"]
    )
    wait_for(
        lambda: {one["JobState"] for one in jobs(cluster, number)} == {"COMPLETED"}, 60, "they end"
    )
    records = jobs(cluster, number)
    assert sorted(one["ArrayTaskId"] for one in records) == ["0", "1", "2"]
    assert {one["JobName"] for one in records} == {"one two"}
    assert job(cluster, f"{number}_1")["ArrayTaskId"] == "1"


def test_waiting_tells_the_story_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    number = begin(cluster, tmp_path, "echo last words", SLEEPS)
    wait_for(lambda: log(cluster, number), 30, "it writes")
    with pytest.raises(pytest.fail.Exception) as caught:
        wait_for(lambda: False, 0, "the impossible", cluster=cluster, number=number)
    told = str(caught.value)
    assert "the impossible" in told and f"JobId={number}" in told and "last words" in told


def test_nodes_and_controller_die_and_come_back(cluster: Cluster, tmp_path: Path) -> None:
    cluster.kill_node("n2")
    assert not cluster.runs("n2") and cluster.runs("n1") and not cluster.running
    cluster.start_node("n2")
    cluster.kill_controller()
    assert cluster.states() == {}
    cluster.start_controller()
    assert cluster.running
    cluster.set_node("n3", "down", "a test")
    assert cluster.states()["n3"] == "down"
    with pytest.raises(ClusterError, match="n1 runs already"):
        cluster.start_node("n1")
    with pytest.raises(BadInput, match="no node 'n9'; the nodes are n1, n2, n3, n4"):
        cluster.start_node("n9")


def test_nothing_survives_a_stop(slurm: None, short_path: Path, tmp_path: Path) -> None:
    before = sleepers()
    folder = short_path / "cluster"
    stubborn = "trap '' TERM; for i in $(seq 600); do sleep 1; done"
    with Cluster.start(folder, ClusterOptions(nodes=2, gpus=0, any_interface=ANY_INTERFACE)) as cluster:
        lines = (DAEMON, f"srun bash -c {DAEMON!r}", f"srun bash -c {stubborn!r}")
        number = begin(cluster, tmp_path, *lines, options=("--nodes=2",))
        wait_for(
            lambda: len(sleepers() - before) == 3 and state(cluster, number) == "RUNNING",
            30, "its orphans run", cluster=cluster, number=number,
        )  # fmt: skip
        cluster.kill_node("n2")
        assert processes_that_name(folder) != []
    assert processes_that_name(folder) == []
    assert sleepers() - before == set()
    assert not cluster.running


def test_stopping_twice_and_from_another_process(slurm: None, short_path: Path) -> None:
    folder = short_path / "cluster"
    Cluster(folder).stop()  # there never was one
    Cluster.start(folder, SMALL)
    command = [sys.executable, "-m", "launch.cluster", "stop", "--folder", str(folder)]
    said = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)
    ]
    assert said[0].startswith(f"stopped the cluster in {folder}")
    assert said[1].startswith(f"no cluster runs in {folder}")
    assert processes_that_name(folder) == []


def test_starting_twice_tells_the_same(
    slurm: None, short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_path / "cluster"
    start = ["start", "--folder", str(folder), "--nodes", "2", *["--any_interface"] * ANY_INTERFACE]
    try:
        assert module.main(start) == 0
        first = capsys.readouterr().out
        assert module.main(start) == 0
        second = capsys.readouterr().out
        exports = [line for line in first.splitlines() if not line.startswith("#")]
        assert exports == [f"export SLURM_CONF={folder}/slurm.conf"]
        assert second == first.replace("runs in", "runs already in", 1) != first
        assert module.main([*start, "--nodes", "3"]) == 1
        assert "a cluster of 2 nodes runs in" in capsys.readouterr().err
        with pytest.raises(ClusterError, match=r"runs in .* already: stop it first"):
            Cluster.start(folder, SMALL)
    finally:
        Cluster(folder).stop()


def test_two_clusters_do_not_meet(
    slurm: None, cluster: Cluster, short_path: Path, tmp_path: Path
) -> None:
    number = begin(cluster, tmp_path, SLEEPS, options=("--job-name=first",))
    with Cluster.start(short_path / "cluster", SMALL) as other:
        assert other.run("squeue", "--noheader") == ""
        assert list(other.states()) == ["n1"]
        run(other, tmp_path, "hostname")
    assert state(cluster, number) == "RUNNING"
    assert cluster.running


def test_a_stopped_cluster_starts_anew(slurm: None, short_path: Path, tmp_path: Path) -> None:
    folder = short_path / "cluster"
    with Cluster.start(folder, SMALL) as cluster:
        run(cluster, tmp_path, "true")
    with Cluster.start(folder, SMALL) as cluster:
        assert cluster.options == SMALL
        assert cluster.run("squeue", "--noheader", "--states=all") == ""


def test_another_slurm_is_not_heard(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The tests themselves may run in a job."""
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    assert run(cluster, tmp_path, "echo $SLURM_JOB_PARTITION") == "main\n"


def test_what_slurm_refuses_is_said_in_its_words(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"999999: .*Invalid job id"):
        job(cluster, "999999")


def test_a_daemon_that_does_not_come_up_is_quoted(
    slurm: None, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> str:
        return f"{module_slurm_conf(*arguments)}Nonsense=1\n"  # type: ignore[arg-type]

    module_slurm_conf = module.slurm_conf
    monkeypatch.setattr(module, "slurm_conf", broken)
    folder = short_path / "cluster"
    with pytest.raises(ClusterError, match=r"slurmctld did not come up: .*Nonsense"):
        Cluster.start(folder, SMALL)
    assert processes_that_name(folder) == []


def test_a_missing_slurm_is_one_line(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    with pytest.raises(BadInput) as caught:
        Cluster.start(short_path / "cluster")
    assert str(caught.value) == (
        "Slurm is not on this machine (slurmctld, slurmd, sbatch, srun, scontrol, sinfo, squeue, "
        "scancel missing): install Debian's packages slurmctld, slurmd and slurm-client, or another "
        "build of it"
    )
    assert not (short_path / "cluster").exists()


def test_missing_commands_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="sbatch, srun, scontrol, sinfo, squeue, scancel missing"):
        find_programs()


@pytest.mark.parametrize("name", ["a b", "a#b", "a%nb", 'a"b', "x" * 80])
def test_folders_that_slurm_cannot_use(slurm: None, short_path: Path, name: str) -> None:
    with pytest.raises(BadInput):
        Cluster.start(short_path / name, SMALL)
    assert not (short_path / name).exists()


def test_a_folder_with_other_things_is_left_alone(slurm: None, short_path: Path) -> None:
    short_path.chmod(0o755)
    (short_path / "thesis.tex").touch()
    link = short_path.with_name(f"{short_path.name}-link")
    link.symlink_to(short_path)
    try:
        for folder in (short_path, link):
            with pytest.raises(BadInput):
                Cluster.start(folder, SMALL)
    finally:
        link.unlink()
    assert [path.name for path in short_path.iterdir()] == ["thesis.tex"]
    assert short_path.stat().st_mode & 0o777 == 0o755


def test_a_name_on_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "198.51.100.7")
    with pytest.raises(BadInput, match=r"add '127.0.0.1 198.51.100.7' to /etc/hosts"):
        find_address(any_interface=False)
    assert find_address(any_interface=True) is None
    monkeypatch.setattr("socket.gethostname", lambda: "127.0.0.1")
    assert find_address(any_interface=False) == "127.0.0.1"


@pytest.mark.parametrize("options", [{"nodes": 0}, {"gpus": -1}, {"requeue_wait": 4}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        ClusterOptions(**options)


def test_a_sample_is_repeated_by_its_seed() -> None:
    names = [f"test_{number}" for number in range(20)]
    samples = [choose(names, 3, seed) for seed in range(50)]
    assert {len(sample) for sample in samples} == {3}
    assert set().union(*samples) == set(names)
    assert [choose(names[::-1], 3, seed) for seed in range(50)] == samples
    assert choose(names, 50, 0) == set(names)


@pytest.mark.faults
def test_a_lost_node_requeues_its_job_and_keeps_its_processes(cluster: Cluster, tmp_path: Path) -> None:
    before = sleepers()
    number = begin(cluster, tmp_path, f"exec /bin/sleep {SECONDS}", options=("--nodelist=n2",))
    (rank,) = wait_for(lambda: sleepers() - before, 30, "it sleeps")
    cluster.kill_node("n2")
    wait_for(
        lambda: job(cluster, number)["Restarts"] == "1", 120, "it is requeued",
        cluster=cluster, number=number,
    )  # fmt: skip
    assert rank in sleepers()


@pytest.mark.faults
def test_a_time_limit_ends_a_job(cluster: Cluster, tmp_path: Path) -> None:
    number = begin(cluster, tmp_path, SLEEPS, options=("--time=1",))
    assert wait_for_end(cluster, number, 180)["JobState"] == "TIMEOUT"


@pytest.mark.faults
def test_a_job_outlives_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    number = begin(cluster, tmp_path, SLEEPS)
    wait_for(lambda: job(cluster, number)["RunTime"] >= "00:00:20", 60, "it is 20 s old")
    cluster.kill_controller()
    cluster.start_controller()
    assert (state(cluster, number), job(cluster, number)["Restarts"]) == ("RUNNING", "0")


@pytest.mark.faults
def test_preemption_by_cancelling(cluster: Cluster, tmp_path: Path) -> None:
    number = begin(cluster, tmp_path, SLEEPS, options=("--partition=cancelp",))
    preempt(cluster, number)
    assert state(cluster, number) == "PREEMPTED"
