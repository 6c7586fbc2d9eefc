"""The other scripts of slurm/, and what they make of the words after their names."""

from __future__ import annotations

import http.client
import json
import re
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from agrivision.cli import main
from launch.cluster import Cluster
from launch.jobdir import JobDirectory
from tests.slurm import jobs
from tests.slurm.hooks import MOMENTS, moment
from tests.slurm.jobs import preempt, wait_for, wait_for_end, wait_for_state
from tests.slurm.runs import SCRIPTS, References, environment, hook, submit
from tests.training.runs import arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory."""
    return References(dataset, tmp_path_factory.mktemp("trained")).get(training__epochs=1)


def script(cluster: Cluster, folder: Path, name: str, *words: str, options: Sequence[str] = ()) -> str:
    options = [f"--chdir={folder}", *options]
    return jobs.submit(cluster, SCRIPTS / f"{name}.sbatch", *words, options=options)


def wait_for_array(cluster: Cluster, number: str) -> None:
    """Wait until all tasks have ended well."""

    def states() -> set[str]:
        found = {record["JobState"] for record in jobs.jobs(cluster, number)}
        return found if found <= jobs.ENDED else set()

    found = wait_for(states, 240, f"all tasks of {number} have ended")
    assert found == {"COMPLETED"}, jobs.jobs(cluster, number)


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder but hidden ones, by their relative path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {str(path.relative_to(folder)): path for path in found}
    return {name: path.read_bytes() for name, path in names.items() if not re.search(r"(^|/)\.", name)}


def test_prepare_as_an_array(cluster: Cluster, fields: Path, dataset: Path, tmp_path: Path) -> None:
    """The bytes are those of one process, which made `dataset`."""
    out = tmp_path / "out"
    words = [str(fields), str(out), "--workers", "1", "--shard_tiles", "7"]
    number = script(cluster, tmp_path, "prepare", *words)
    wait_for_array(cluster, number)
    assert files(out) == files(dataset)
    logs = sorted(path.name for path in tmp_path.glob("agrivision-*.out"))
    assert logs == [f"agrivision-{number}_{task}.out" for task in range(4)]
    job = JobDirectory.beside(out)
    assert [JobDirectory(job.path, task).attempts()[-1].decision for task in range(4)] == ["done"] * 4


@pytest.mark.faults
def test_predict_as_an_array(cluster: Cluster, fields: Path, trained: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(trained), str(fields), "--batch_size", "2"]
    assert main(["predict", *words, "--out", str(tmp_path / "alone")]) == 0
    number = script(cluster, tmp_path, "predict", *words, "--out", str(tmp_path / "array"))
    wait_for_array(cluster, number)
    assert files(tmp_path / "array") == files(tmp_path / "alone")


@pytest.mark.faults
@pytest.mark.row(37)
def test_a_preempted_prediction_goes_on(
    every_cluster: Cluster,
    fields: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """One task of two has to make room: it predicts each of its batches once, in two attempts."""
    words = ["--checkpoint", str(trained), str(fields), "--batch_size", "2"]
    assert main(["predict", *words, "--out", str(tmp_path / "alone")]) == 0
    hook(monkeypatch, batch=0.5)
    moments = tmp_path / "moments"
    moments.mkdir()
    monkeypatch.setenv(MOMENTS, str(moments))
    number = script(
        every_cluster, tmp_path, "predict", *words, "--out", str(tmp_path / "array"),
        options=["--array=0-1", "--partition=preempt", "--exclusive", "--ntasks-per-node=1"],
    )  # fmt: skip
    victim = f"{number}_0"
    begun = moments / moment("task 0 batch 3", restart=0)
    wait_for(begun.exists, 60, "its third batch", cluster=every_cluster, number=victim)
    before = time.monotonic()
    preempt(every_cluster, victim)
    again = moments / moment("task 0 batch 1", restart=1)
    wait_for(again.exists, 60, "it goes on", cluster=every_cluster, number=victim)
    record_property("seconds lost", round(time.monotonic() - before, 1))
    wait_for_array(every_cluster, number)
    assert files(tmp_path / "array") == files(tmp_path / "alone")
    restarts = [jobs.job(every_cluster, f"{number}_{task}")["Restarts"] for task in range(2)]
    assert restarts == ["1", "0"]
    done = [len(list(moments.glob(f"task {task} batch *"))) for task in range(2)]
    assert done == [12, 12]  # 48 tiles by two, in two parts: nothing is predicted twice


@pytest.mark.faults
def test_evaluate(cluster: Cluster, dataset: Path, trained: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(trained), "--data", str(dataset), "--split", "val"]
    assert main(["evaluate", *words, "--json", str(tmp_path / "alone.json")]) == 0
    number = script(
        cluster, tmp_path, "evaluate", *words, "--json", str(tmp_path / "job.json"),
        options=["--ntasks-per-node=2"],
    )  # fmt: skip
    assert wait_for_end(cluster, number, 120)["JobState"] == "COMPLETED", jobs.log(cluster, number)
    assert json.loads((tmp_path / "job.json").read_text()) == json.loads(
        (tmp_path / "alone.json").read_text()
    )


@pytest.mark.parametrize("words", [("ddp", "--quick"), ("gpu", "--quick")], ids=["ddp", "gpu"])
def test_a_benchmark(cluster: Cluster, tmp_path: Path, words: Sequence[str]) -> None:
    """It measures where it was submitted to: there, ranks of a job and not processes of its own."""
    options = [f"--chdir={ROOT}", f"--output={tmp_path}/bench.out"]
    ranks = ["--ntasks-per-node=2"] if words[0] == "ddp" else []
    number = jobs.submit(
        cluster, ROOT / "benchmarks" / "bench.sbatch", *words, options=[*options, *ranks]
    )
    log = tmp_path / "bench.out"
    assert wait_for_end(cluster, number, 200)["JobState"] == "COMPLETED", log.read_text()
    assert "this only shows that it runs" in log.read_text()


def listeners(port: int) -> set[str]:
    """The IPv4 addresses on which somebody listens at a port, as /proc writes them, and all of IPv6."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


@pytest.mark.faults
def test_tensorboard(cluster: Cluster, trained: Path, tmp_path: Path) -> None:
    number = script(cluster, tmp_path, "tensorboard", str(trained))
    tunnel = r"^  ssh -N -L 6006:127\.0\.0\.1:(\d+) -J \S+ n1$"

    def line() -> re.Match[str] | None:
        return re.search(tunnel, jobs.log(cluster, number), re.MULTILINE)

    found = wait_for(line, 60, "it says how to reach it", cluster=cluster, number=number)
    assert found is not None
    port = int(found[1])
    addresses = wait_for(lambda: listeners(port), 120, "it listens", cluster=cluster, number=number)
    assert addresses == {"0100007F"}
    (log,) = tmp_path.glob("agrivision-*.out")
    word = re.search(r"http://localhost:6006/([\w-]{32})/", log.read_text())
    assert word is not None and stat.S_IMODE(log.stat().st_mode) == 0o600
    for path, status in ((f"/{word[1]}/", 200), ("/", 404), ("/data/runs", 404)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().status == status
        connection.close()
    jobs.cancel(cluster, number)
    wait_for_state(cluster, number, "CANCELLED", seconds=60)
    wait_for(lambda: not listeners(port), 30, "nobody listens any more")


HOSTILE = [
    "a b",
    "q'u\"ote",
    "$(touch HACK)",
    "`touch HACK`",
    "; touch HACK;",
    "new\nline",
    "-x",
    "ü*?[a]",
    "%j",
]


def end_of(cluster: Cluster, number: str, log: Path) -> tuple[str, str]:
    """How a job ended, and what it printed; its record has lines that no reader of it expects."""

    def ended() -> str:
        line = cluster.run("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T")
        return line.strip() if line.strip() in jobs.ENDED else ""

    return wait_for(ended, 150, f"job {number} has ended"), log.read_text()


def test_hostile_names_end_as_they_are(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """All of them at once, in the run directory's path, the configuration's and a parameter."""
    folder = tmp_path
    for name in HOSTILE:
        folder /= name
    folder.mkdir(parents=True)
    config = folder / "con fig;$(touch HACK).yaml"
    words = arguments(dataset, folder / "run", training__epochs=1, monitor__images=0)[1:]
    config.write_text("seed: 3\n")
    words += ["--config", str(config), "--data.train_split", "train"]
    run = submit(cluster, folder / "run", words, [f"--chdir={tmp_path}"])
    state, log = end_of(cluster, run.number, tmp_path / f"agrivision-{run.number}.out")
    assert state == "COMPLETED", log
    assert run.attempts[-1].decision == "done"
    assert yaml.safe_load((run.path / "config.yaml").read_text())["seed"] == 3
    assert not list(tmp_path.rglob("HACK"))


@pytest.mark.parametrize("value", ["$(touch HACK)", "; touch HACK", "new\nline", "'\"", "--"])
def test_hostile_parameters_are_refused(
    cluster: Cluster, dataset: Path, tmp_path: Path, value: str
) -> None:
    words = ["--run_dir", str(tmp_path / "run"), "--data.path", str(dataset)]
    run = submit(cluster, tmp_path / "run", [*words, "--model.norm", value], [f"--chdir={tmp_path}"])
    state, log = end_of(cluster, run.number, tmp_path / f"agrivision-{run.number}.out")
    assert state == "FAILED"
    (line,) = log.splitlines()
    assert " launch: error: " in line and "model.norm" in line
    assert not list(tmp_path.rglob("HACK"))
