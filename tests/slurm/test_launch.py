"""`python -m launch` on a real Slurm: what it submits runs, and nothing in a name is ever executed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agrivision.rundir import RunDirectory
from launch.__main__ import main
from launch.cluster import Cluster
from launch.jobdir import JobDirectory
from tests.ranks import run
from tests.slurm.jobs import job, preempt, wait_for, wait_for_end
from tests.slurm.runs import Run
from tests.training.runs import arguments, assert_same

SECONDS = 150
ODD = "a b;$(touch HACK) 'q\"`touch HACK`#&*"


@pytest.fixture
def here(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to launch from, in which another checkout lies that must never run."""
    return enter(cluster, tmp_path, monkeypatch)


def enter(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to such a folder, as somebody who has logged in to this cluster."""
    folder = tmp_path / "here"
    for package in ("agrivision", "launch", "submitit"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise SystemExit('not the frozen code')\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "AGRIVISION_SITE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return folder


def launch(*words: str) -> None:
    assert main([*words]) == 0


def undisturbed(words: Sequence[str], ranks: int = 1) -> None:
    """Run the same without Slurm, where the other checkout is not in the way."""
    with contextlib.chdir(Path(__file__).parent):
        assert run(list(words), ranks) == [0] * ranks


def last_job(run_dir: Path) -> str:
    return JobDirectory.of_run(run_dir).jobs()[-1]


def rows(path: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """What `status` says now; an answer that it keeps from before does not count."""
    for file in (Path.home() / ".cache" / "agrivision").glob("queue-*.json"):
        file.unlink()
    capsys.readouterr()
    launch("status", "--json", str(path))
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)["jobs"]
    return found


def train(dataset: Path, run_dir: Path, **overrides: object) -> Sequence[str]:
    """Arguments of a small run, without its command."""
    return arguments(dataset, run_dir, **overrides)[1:]


def test_a_launched_run_is_the_run_on_this_machine(
    cluster: Cluster,
    here: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference, run_dir = tmp_path / "reference", tmp_path / ODD
    resources = ["--nodes", "2", "--time", "10", "--job_name", ODD, "--comment", f"{ODD}\\"]
    launch("train", *train(dataset, run_dir), "--profile", *resources)
    number = last_job(run_dir)
    undisturbed(arguments(dataset, reference), ranks=2)
    record = wait_for_end(cluster, number, SECONDS)
    assert record["JobState"] == "COMPLETED", (run_dir / "launch" / f"slurm-{number}.out").read_text()
    assert record["JobName"] == ODD and record["Comment"] == f"{ODD}\\"
    assert record["StdOut"] == f"{run_dir}/launch/slurm-{number}.out"
    assert (record["NumNodes"], record["TimeLimit"], record["Requeue"]) == ("2", "00:10:00", "1")
    assert_same(run_dir, reference)
    (row,) = rows(run_dir, capsys)
    assert (row["state"], row["step"], row["total_steps"], row["attempts"]) == ("done", 18, 18, 1)
    assert {path.name for path in (run_dir / "profile").glob("*.gz")} == {
        "rank-0.trace.json.gz",
        "rank-1.trace.json.gz",
    }
    assert not list(tmp_path.rglob("HACK"))
    assert all(path.stat().st_mode & 0o077 == 0 for path in (run_dir, run_dir / "launch"))


@pytest.mark.faults
@pytest.mark.row(15)
def test_cancelled_it_stays_so_until_somebody_resumes_it(
    cluster: Cluster,
    here: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference, run_dir = tmp_path / "reference", tmp_path / "run"
    longer = {"training__epochs": 40, "training__evaluate_every_epochs": 0}
    launch("train", *train(dataset, run_dir, **longer), "--exclusive")
    first = last_job(run_dir)
    metrics = RunDirectory(run_dir).metrics
    wait_for(lambda: metrics.is_file() and metrics.read_bytes(), SECONDS, "a first step")
    launch("cancel", str(run_dir))
    assert wait_for_end(cluster, first, SECONDS)["JobState"] == "CANCELLED"
    (row,) = rows(run_dir, capsys)
    assert row["state"] == "cancelled" and 0 < int(str(row["step"])) < 240
    launch("resume", str(run_dir), "--qos", "normal", "--time", "20")
    second = last_job(run_dir)
    assert second != first
    undisturbed(arguments(dataset, reference, **longer))
    record = wait_for_end(cluster, second, SECONDS)
    assert (record["JobState"], record["TimeLimit"]) == ("COMPLETED", "00:20:00")
    assert job(cluster, first)["JobState"] == "CANCELLED"
    assert_same(run_dir, reference)
    assert main(["resume", str(run_dir)]) == 2
    assert "is done" in capsys.readouterr().err


def test_a_sweep_is_one_array(
    cluster: Cluster, here: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = tmp_path / "sweep", tmp_path / "table.json"
    shared = [word for word in train(dataset, out) if word not in ("--run_dir", str(out))]
    launch("sweep", "--out", str(out), *shared, "--optimizer.lr", "1e-3,1e-2")
    elements = sorted(path for path in out.iterdir() if path.name != "launch")
    numbers = [last_job(path) for path in elements]
    (array,) = {number.partition("_")[0] for number in numbers}
    assert numbers == [f"{array}_0", f"{array}_1"]
    for number in numbers:
        assert wait_for_end(cluster, number, SECONDS)["JobState"] == "COMPLETED"
    launch("sweep", "--out", str(out), "--table", str(table))
    results = json.loads(table.read_text())
    assert [(row["optimizer.lr"], row["state"], row["step"]) for row in results] == [
        ("1e-3", "done", 18),
        ("1e-2", "done", 18),
    ]
    for row, path in zip(results, elements, strict=True):
        assert row["best mIoU"] == max(filter(None, RunDirectory(path).evaluations().values()))
    capsys.readouterr()
    launch("logs", str(elements[1]))
    assert "launch: attempt 1 on" in capsys.readouterr().out


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.row(19)
def test_of_a_sweep_only_the_element_that_is_preempted_is_requeued(
    every_cluster: Cluster,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopwatch: Callable[[Run], None],
) -> None:
    cluster = every_cluster
    enter(cluster, tmp_path, monkeypatch)
    out, table, reference = tmp_path / "sweep", tmp_path / "table.json", tmp_path / "reference"
    longer = {"training__epochs": 60, "training__evaluate_every_epochs": 0}
    shared = [word for word in train(dataset, out, **longer) if word not in ("--run_dir", str(out))]
    rates = ["1e-3", "2e-3", "5e-3", "1e-2"]
    # Whole nodes: the intruder takes that of one element, and no other has room beside it.
    words = ["--partition", "preempt", "--exclusive", "--optimizer.lr", ",".join(rates)]
    launch("sweep", "--out", str(out), *shared, *words)
    elements = sorted(path for path in out.iterdir() if path.name != "launch")
    numbers = [last_job(path) for path in elements]
    victim = RunDirectory(elements[2])
    wait_for(
        victim.latest_step, SECONDS, "a checkpoint of the third", cluster=cluster, number=numbers[2]
    )
    stopwatch(Run(cluster, elements[2], numbers[2]))
    preempt(cluster, numbers[2])
    ends = [wait_for_end(cluster, number, 3 * SECONDS) for number in numbers]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [
        ("COMPLETED", "1" if number == numbers[2] else "0") for number in numbers
    ]
    attempts = [len(JobDirectory.of_run(path).attempts()) for path in elements]
    assert attempts == [1, 1, 2, 1]
    launch("sweep", "--out", str(out), "--table", str(table))
    results = json.loads(table.read_text())
    assert [(row["optimizer.lr"], row["state"], row["step"]) for row in results] == [
        (rate, "done", 360) for rate in rates
    ]
    undisturbed(arguments(dataset, reference, **longer, optimizer__lr="5e-3"))
    assert_same(elements[2], reference)


@pytest.mark.faults
def test_a_pipeline_from_fields_to_maps(
    cluster: Cluster,
    here: Path,
    fields: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "pipe line"
    shared = [word for word in train(fields, out) if word not in ("--run_dir", str(out))]
    data = shared.index("--data.path")
    del shared[data : data + 2]
    launch("pipeline", "--source", str(fields), "--out", str(out), *shared, "--prepare.workers", "1")
    states = {Path(str(row["path"])).name: row for row in rows(out, capsys)}
    assert set(states) == {"dataset", "run", "run.evaluate", "maps"}
    number = str(states["maps"]["job"])
    assert wait_for_end(cluster, number, 2 * SECONDS)["JobState"] == "COMPLETED"
    wait_for_end(cluster, str(states["run.evaluate"]["job"]), SECONDS)
    assert {row["state"] for row in rows(out, capsys)} == {"done"}
    assert json.loads((out / "score.json").read_text())["miou"] > 0
    assert list((out / "maps").rglob("*.png"))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but hidden ones, by their relative path."""
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def test_a_preparation_in_parts(
    cluster: Cluster,
    here: Path,
    fields: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The bytes are those of one process, which made `dataset`."""
    out = tmp_path / "the set"
    options = ["--workers", "1", "--shard_tiles", "7"]
    launch("prepare", str(fields), str(out), *options, "--parts", "3")
    numbers = JobDirectory.beside(out).jobs()
    (array,) = {number.partition("_")[0] for number in numbers}
    assert numbers == [f"{array}_{task}" for task in range(3)]
    (row,) = rows(out, capsys)
    assert row["job"] == array and row["state"] != "ended"  # Slurm knows each of them by this id
    for number in numbers:
        assert wait_for_end(cluster, number, SECONDS)["JobState"] == "COMPLETED"
    assert contents(out) == contents(dataset)
    (row,) = rows(out, capsys)
    assert (row["state"], row["attempts"]) == ("done", 3)
    capsys.readouterr()
    launch("logs", str(out), "--task", "1")
    printed = capsys.readouterr().out
    assert "launch: attempt 1 on" in printed and printed.count("--part 1/3") == 1
    held = cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true").strip()
    wait = ["--dependency", f"afterok:{held}"]
    launch("prepare", str(fields), str(out), *options, "--parts", "3", *wait)
    assert rows(out, capsys)[0]["state"] == "pending"
    launch("cancel", str(out))
    assert rows(out, capsys)[0]["state"] == "cancelled"


def test_slurm_s_refusal_is_one_line(
    cluster: Cluster, here: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*train(dataset, tmp_path / "run"), "--partition", "nowhere"]
    assert main(["train", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch: error: sbatch: ") and "nowhere" in line
