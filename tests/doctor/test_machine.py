"""Too few cores, descriptors or bytes, and control groups of both versions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agrivision.doctor.finding import Verdict
from agrivision.doctor.machine import Node, control_group, examine_node, read_node
from tests.doctor.said import about, worse

GOOD = Node(
    cores=16,
    all_cores=64,
    quota=None,
    threads=None,
    memory=128 << 30,
    files=65_536,
    most_files=65_536,
)


def test_a_node_with_enough_is_good() -> None:
    assert worse(examine_node(GOOD, gpus=0)) == []
    assert worse(examine_node(GOOD, gpus=4)) == []


@pytest.mark.parametrize(
    ("changes", "gpus", "verdict", "words"),
    [
        ({"cores": 8}, 4, "careful", "8 of 64 cores"),
        ({"cores": 1}, 4, "bad", "1 of 64 cores for 4 ranks"),
        ({"quota": 1.5}, 0, "careful", "worth 1.5 of time"),
        ({"quota": 2.0}, 4, "bad", "worth 2.0 of time for 4 ranks"),
        ({"threads": 16}, 4, "careful", "OMP_NUM_THREADS is 16"),
        ({"memory": 4 << 30}, 0, "careful", "4 GiB of memory"),
        ({"memory": 8 << 30}, 4, "bad", "8 GiB of memory for 4 ranks"),
        ({"files": 512}, 0, "careful", "512 files"),
        ({"files": 64}, 0, "bad", "64 files"),
    ],
)
def test_what_is_short_is_named(changes: dict[str, float], gpus: int, verdict: str, words: str) -> None:
    ((found, what),) = worse(examine_node(replace(GOOD, **changes), gpus))  # type: ignore[arg-type]
    assert (found, words in what) == (verdict, True), what


def test_the_limit_that_a_process_really_has_is_read() -> None:
    script = (
        "import json, resource, dataclasses\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))\n"
        "from agrivision.doctor.machine import read_node, examine_node\n"
        "found = [f for f in examine_node(read_node(), 0) if 'files may be open' in f.what]\n"
        "print(json.dumps([[f.verdict, f.what, f.advice] for f in found]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ((verdict, what, advice),) = json.loads(done.stdout)
    assert (verdict, what) == ("bad", "100 files may be open at once")
    assert "ulimit -n 200" in advice


def test_a_hard_limit_is_somebody_elses() -> None:
    node = replace(GOOD, files=100, most_files=100)
    assert "limits.conf" in about(examine_node(node, 0), "files may be open").advice


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    job = tmp_path / "slurm" / "job_17"
    job.mkdir(parents=True)
    (job / "cpu.max").write_text("max 100000\n")
    (job / "memory.max").write_text("max\n")
    (job.parent / "cpu.max").write_text("250000 100000\n")
    (job.parent / "memory.max").write_text("1073741824\n")
    assert control_group("0::/slurm/job_17\n", tmp_path) == (2.5, 1 << 30)


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    for name, files in {
        "cpu": {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"},
        "memory": {"memory.limit_in_bytes": "2147483648"},
    }.items():
        (tmp_path / name / "job").mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / "job" / file).write_text(content)
    membership = "4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n"
    assert control_group(membership, tmp_path) == (1.5, 2 << 30)


def test_no_limit_is_none(tmp_path: Path) -> None:
    assert control_group("0::/\n", tmp_path) == (None, None)
    (tmp_path / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    assert control_group("0::/\n", tmp_path) == (None, None)


def test_this_node_is_judged() -> None:
    assert {each.topic for each in examine_node(read_node(), 0)} == {"Machine"}
    assert read_node({"OMP_NUM_THREADS": "3,2"}).threads == 3
    assert about(examine_node(GOOD, 0), "cores").verdict == Verdict.GOOD
