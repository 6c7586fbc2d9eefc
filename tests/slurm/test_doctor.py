"""`agrivision doctor` on a real Slurm, in order and with each fault made on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agrivision.doctor import node as module
from agrivision.doctor.cluster import Wanted, examine_slurm
from agrivision.doctor.finding import Finding, Verdict
from agrivision.doctor.node import examine_on_node
from agrivision.doctor.pace import Pace
from launch.cluster import Cluster
from tests.doctor.said import about, worse
from tests.slurm.conftest import CONFIGURATIONS, Clusters
from tests.slurm.jobs import submit, wait_for_state

QUICK = Pace(step=0.1, save=0.1, known=True)
SLOW = Pace(step=10.0, save=5.0, known=True)  # 22.5 s
# On a cluster of one's own, which is open to whoever connects.
OPEN = ("careful", "AuthType is auth/none: it believes whoever connects")


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], Cluster]:
    """Makes a cluster the one that Slurm's commands speak with."""

    def choose(cluster: Cluster) -> Cluster:
        for name, value in cluster.environment.items():
            monkeypatch.setenv(name, value)
        return cluster

    return choose


@pytest.fixture
def here(cluster: Cluster, enter: Callable[[Cluster], Cluster]) -> Cluster:
    return enter(cluster)


def on_node(folder: Path, **options: object) -> list[Finding]:
    given = {"data": None, "wait_seconds": 30, **options}
    return list(examine_on_node(Wanted(), [folder], **given))  # type: ignore[arg-type]


def queued(cluster: Cluster) -> list[str]:
    return cluster.run("squeue", "--noheader", "--format=%i %T").splitlines()


def test_a_cluster_in_order_is_good(here: Cluster) -> None:
    found = list(examine_slurm(Wanted(), QUICK))
    assert worse(found) == [OPEN]
    assert "UP, 4 of 4 nodes in order" in about(found, "partition main (default)").what
    assert "20 s (GraceTime) and 5 s (KillWait)" in about(found, "partition cancelp: a pre").what
    assert "partition main" in about(found, "a job like ours is accepted").what


def test_a_cluster_without_requeue_is_named(
    clusters: Clusters, enter: Callable[[Cluster], Cluster]
) -> None:
    enter(clusters(CONFIGURATIONS["no-requeue"]))
    said = ("careful", "JobRequeue is 0: jobs are not requeued unless they ask for it")
    assert worse(examine_slurm(Wanted(), QUICK)) == [OPEN, said]


def test_no_grace_and_a_save_that_does_not_fit_are_named(
    clusters: Clusters, enter: Callable[[Cluster], Cluster]
) -> None:
    enter(clusters(replace(CONFIGURATIONS["default"], nodes=1, grace_time=0)))
    chosen = Wanted(partition="preempt")
    quick = about(examine_slurm(chosen, QUICK), "partition preempt: a preempted job")
    slow = about(examine_slurm(chosen, SLOW), "partition preempt: a preempted job")
    assert "0 s (GraceTime) and 5 s (KillWait)" in quick.what
    assert (quick.verdict, slow.verdict) == (Verdict.CAREFUL, Verdict.BAD)


def test_a_warning_that_comes_too_late_is_named(here: Cluster) -> None:
    found = about(examine_slurm(Wanted(signal_seconds=10), SLOW), "are warned 10 s before")
    lead = f"--signal=USR1@{2 * SLOW.needed} "
    assert (found.verdict, lead in found.advice) == (Verdict.BAD, True)


def test_a_partition_that_is_down_is_named(here: Cluster) -> None:
    here.run("scontrol", "update", "partition=main", "state=down")
    try:
        found = list(examine_slurm(Wanted(), QUICK))
    finally:
        here.run("scontrol", "update", "partition=main", "state=up")
    assert about(found, "partition main (default): DOWN").verdict == Verdict.BAD


def test_nodes_that_are_all_drained_are_named(here: Cluster) -> None:
    for name in here.nodes:
        here.set_node(name, "drain", "the doctor looks")
    found = list(examine_slurm(Wanted(), QUICK))
    assert about(found, "partition main (default)").verdict == Verdict.BAD
    assert about(found, "partition high").verdict == Verdict.CAREFUL
    assert about(found, "a job like ours is refused").verdict == Verdict.BAD


def test_a_partition_that_is_not_there_is_named(here: Cluster) -> None:
    found = list(examine_slurm(Wanted(partition="gpus"), QUICK))
    assert about(found, "there is no partition gpus").verdict == Verdict.BAD
    assert "invalid partition" in about(found, "a job like ours is refused").what.lower()


def test_a_controller_that_does_not_answer_is_named(here: Cluster) -> None:
    here.kill_controller()
    ((verdict, what),) = worse(examine_slurm(Wanted(), QUICK))
    assert verdict == "bad"
    assert "is DOWN" in what


def test_a_node_sees_what_it_needs(here: Cluster, tmp_path: Path, dataset: Path) -> None:
    found = on_node(tmp_path / "runs", data=dataset)
    assert worse(found) == []
    assert f"sees {dataset}" in about(found, str(dataset)).what
    assert about(found, "is seen here").verdict == Verdict.GOOD
    assert about(found, "torch").verdict == Verdict.GOOD
    assert list(tmp_path.iterdir()) == []
    assert "RUNNING" not in " ".join(queued(here))


def test_an_environment_that_nodes_do_not_have_is_named(here: Cluster, tmp_path: Path) -> None:
    ((verdict, what),) = worse(on_node(tmp_path, python=str(tmp_path / "python")))
    assert verdict == "bad"
    assert f"{tmp_path}/python does not start there" in what
    assert "No such file or directory" in what


def test_a_package_that_nodes_do_not_have_is_named(here: Cluster, tmp_path: Path) -> None:
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec env -u PYTHONPATH {sys.executable} -I -S "$@"\n')
    empty.chmod(0o700)
    ((verdict, what),) = worse(on_node(tmp_path, python=str(empty)))
    assert (verdict, "No module named" in what) == ("bad", True), what


def test_a_folder_that_only_this_side_sees_is_named(here: Cluster, tmp_path: Path) -> None:
    """As on a login node with a disk of its own: here a mount that only this process has."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root and unshare for a mount of one's own")
    script = (
        "import json, sys; from pathlib import Path\n"
        "from agrivision.doctor.cluster import Wanted\n"
        "from agrivision.doctor.node import examine_on_node\n"
        "found = examine_on_node(Wanted(), [Path(sys.argv[1])], Path(sys.argv[2]), wait_seconds=30)\n"
        "print(json.dumps([[each.verdict, each.what] for each in found]))\n"
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "data").mkdir()
    shell = 'mount -t tmpfs none "$1" && mkdir "$1/data" && exec "$2" -c "$3" "$1" "$1/data"'
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        shell,
        "sh",
        str(tmp_path / "runs"),
        sys.executable,
        script,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare failed" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount of one's own: {done.stderr.strip()}")
    bad = [what for verdict, what in json.loads(done.stdout.splitlines()[-1]) if verdict == "bad"]
    assert len(bad) == 2
    assert f"does not see {tmp_path}/runs: No such file" in bad[0]
    assert f"does not see {tmp_path}/runs/data: No such file" in bad[1]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_cluster_without_a_free_node_is_a_warning(here: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nexec sleep 600\n")
    job = submit(here, script, options=["--exclusive", "--nodes=4", f"--output={tmp_path}/log"])
    wait_for_state(here, job, "RUNNING", seconds=30)
    ((verdict, what),) = worse(on_node(tmp_path, wait_seconds=2))
    assert (verdict, "no node within 2 s" in what) == ("careful", True)
    assert [line.split()[0] for line in queued(here) if "COMPL" not in line] == [job]


def test_a_job_that_says_nothing_is_ended(
    here: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = tmp_path / "python"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o700)
    monkeypatch.setattr(module, "_RUN_SECONDS", 1.0)
    ((verdict, what),) = worse(on_node(tmp_path, wait_seconds=2, python=str(stuck)))
    assert (verdict, "nothing heard within 3 s" in what) == ("bad", True)
    deadline = time.monotonic() + 30
    while any("RUNNING" in line or "PENDING" in line for line in queued(here)):
        assert time.monotonic() < deadline, queued(here)
        time.sleep(0.1)


def seen(**changes: object) -> dict[str, object]:
    """What a node in order says."""
    return {
        "host": "g7",
        "python": "3.11.7",
        "agrivision": "0.1.0",
        "torch": "2.15.0",
        "torch_error": "",
        "torch_seconds": 4.0,
        "gpus": 4,
        "folders": {},
        "time": time.time(),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"torch_error": "OSError: libcudart.so.13"}, "bad", "g7: torch does not load: OSError"),
        ({"torch_seconds": 90.0}, "careful", "90.0 s"),
        ({"time": 0.0}, "careful", "its clock is"),
        ({"folders": {"data": "Permission denied"}}, "bad", "g7 does not see data: Permission denied"),
    ],
)
def test_what_a_node_lacks_is_named(changes: dict[str, object], verdict: str, words: str) -> None:
    now = time.time()
    ((found, what),) = worse(module.judge(seen(**changes), {}, Path("data"), begin=now, end=now))
    assert (found, words in what) == (verdict, True), what


@pytest.mark.parametrize(
    ("clock", "said"),
    [
        (94.0, "at least 6 s off"),
        (96.0, ""),
        (104.0, ""),  # before a long epilog
        (600.0, ""),  # after a long wait
        (604.0, ""),
        (606.0, "at least 6 s off"),
    ],
)
def test_a_clock_is_off_only_outside_of_the_time_of_the_job(clock: float, said: str) -> None:
    found = worse(module.judge(seen(time=clock), {}, None, begin=100.0, end=600.0))
    assert [(verdict, said in what) for verdict, what in found] == [("careful", True)] * bool(said)


def test_an_epilog_is_no_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job looks at once, and srun returns a minute later."""
    clock = [1000.0]

    def srun(*_: object) -> tuple[int, str]:
        told = json.dumps(seen(time=clock[0]))
        clock[0] += 60.0
        return 0, f"agrivision doctor: {told}\n"

    monkeypatch.setattr(module, "_srun", srun)
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    assert worse(on_node(tmp_path)) == []


def test_another_folder_of_the_same_name_is_named(tmp_path: Path) -> None:
    own = tmp_path / ".agrivision-doctor-1"
    own.mkdir()
    assert module.look("token", [own])["folders"] == {str(own): "it is another folder of that name"}
    (own / "token").touch()
    assert module.look("token", [own])["folders"] == {str(own): ""}
    assert (own / "token.node").exists()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LATE_SECONDS", 0.3)


def test_what_a_node_wrote_elsewhere_is_missed(tmp_path: Path, impatient: None) -> None:
    found = module._comes_back(tmp_path / "token.node", Path("runs"))
    assert (found.verdict, "wrote into runs is not seen here" in found.what) == (Verdict.BAD, True)
