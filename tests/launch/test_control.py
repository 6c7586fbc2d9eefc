"""Cancelling, resuming, and pipelines whose jobs wait for one another."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.jobdir import Attempt, JobDirectory
from tests.launch.conftest import FakeSlurm, queued


def options(slurm: FakeSlurm) -> dict[str, str]:
    """Of the last script that was submitted."""
    lines = [line.removeprefix("#SBATCH --") for line in slurm.script.splitlines() if "#SBATCH" in line]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


@pytest.fixture
def run_dir(config: Path, tmp_path: Path, slurm: FakeSlurm) -> Path:
    """A run that was launched on two nodes for an hour."""
    site = tmp_path / "site.yaml"
    site.write_text("setup: [module load x]\naccount: mine\n")
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--site", str(site)]
    assert main(["train", *words, "--nodes", "2", "--time", "60"]) == 0
    return tmp_path / "run"


def attempted(run_dir: Path, decision: str, job: str = "1", number: int = 1) -> None:
    JobDirectory.of_run(run_dir).began(
        Attempt(number=number, job=job, nodes=("n1",), tasks=2, began=1.0, ended=2.0, decision=decision)
    )


def test_resume_asks_for_the_same_again(run_dir: Path, slurm: FakeSlurm) -> None:
    attempted(run_dir, "left completing")
    before = options(slurm)
    assert main(["resume", str(run_dir)]) == 0
    assert options(slurm) == before and before["account"] == "mine"
    assert "\nmodule load x\n" in slurm.script
    assert JobDirectory.of_run(run_dir).jobs() == ["1", "2"]
    assert JobDirectory.of_run(run_dir).spec().max_attempts == 101  # the first, and a hundred again


def test_resume_with_other_resources(run_dir: Path, slurm: FakeSlurm) -> None:
    assert main(["resume", str(run_dir), "--nodes", "1", "--qos", "high"]) == 0
    assert options(slurm)["nodes"] == "1" and options(slurm)["qos"] == "high"
    assert options(slurm)["time"] == "60"
    assert main(["resume", str(run_dir)]) == 0  # what was said last is what is noted
    assert options(slurm)["nodes"] == "1"


def test_resume_keeps_the_code_unless_told(run_dir: Path, slurm: FakeSlurm) -> None:
    mark = JobDirectory.of_run(run_dir).code / "mark"
    mark.touch()
    assert main(["resume", str(run_dir)]) == 0
    assert mark.exists()
    assert main(["resume", str(run_dir), "--fresh_code"]) == 0
    assert not mark.exists()


@pytest.mark.parametrize(("state", "code"), [("PENDING", 2), ("RUNNING", 2), ("FAILED", 0)])
def test_what_is_queued_is_not_resumed(
    state: str, code: int, run_dir: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.hold(queued("1", state))
    assert main(["resume", str(run_dir)]) == code
    assert (f"job 1 is {state}" in capsys.readouterr().err) == bool(code)


def test_what_is_done_is_not_resumed(
    run_dir: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    attempted(run_dir, "done")
    assert main(["resume", str(run_dir)]) == 2
    assert "is done" in capsys.readouterr().err
    assert main(["resume", str(run_dir), "--nods", "2"]) == 2
    assert "did you mean --nodes?" in capsys.readouterr().err


def test_resume_of_several(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert main(["sweep", "--out", str(out), "--config", str(config), "--seed", "1,2,3"]) == 0
    attempted(out / "000-seed=1", "done", job="1_0")
    slurm.hold(queued("1_1"))
    assert main(["resume", str(out)]) == 0
    assert "array" not in options(slurm)
    assert JobDirectory.of_run(out / "002-seed=3").jobs() == ["1_2", "2"]
    assert JobDirectory.of_run(out / "001-seed=2").jobs() == ["1_1"]
    assert main(["resume", str(out / "002-seed=3"), "--fresh_code"]) == 0
    assert not JobDirectory.of_run(out / "002-seed=3").code.is_symlink()
    assert (out / "launch" / "code" / "launch").is_dir()


@pytest.fixture
def by_sbatch(run_dir: Path) -> Path:
    """The same, as if it were by a plain sbatch, which leaves no note of its resources."""
    job = JobDirectory.of_run(run_dir)
    job.write_spec(dataclasses.replace(job.spec(), resources={}))
    return run_dir


@pytest.mark.parametrize(
    "more", [[], ["--nodes", "2"], ["--gpus_per_node", "2"], ["--nodes", "2", "--gpus_per_task", "1"]]
)
def test_what_sbatch_submitted_does_not_go_on_with_fewer_ranks(
    more: list[str], by_sbatch: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    JobDirectory.of_run(by_sbatch).began(
        Attempt(number=1, job="1", nodes=("n1", "n2"), tasks=8, began=1.0)
    )
    before = slurm.calls("sbatch")
    for words in (more, [*more, "--dry_run"]):
        assert main(["resume", str(by_sbatch), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "by sbatch (it had 8 ranks on 2 nodes): say --nodes, and --gpus_per_node or" in line
    assert slurm.calls("sbatch") == before


@pytest.mark.parametrize("profile", [False, True])
def test_what_sbatch_submitted_goes_on_with_resources(
    profile: bool, by_sbatch: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    site = tmp_path / "own.yaml"
    site.write_text("train: {nodes: 2, gpus_per_node: 4}\n" if profile else "gpus_per_node: 4\n")
    more = [] if profile else ["--nodes", "2"]
    assert main(["resume", str(by_sbatch), "--site", str(site), *more]) == 0
    found = options(slurm)
    assert (found["nodes"], found["gpus-per-node"], found["ntasks-per-node"]) == ("2", "4", "4")
    assert main(["resume", str(by_sbatch)]) == 0  # they are noted now
    assert options(slurm) == found


def test_cancel_ends_what_is_alive(
    run_dir: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    JobDirectory.of_run(run_dir).submitted("2", by="successor")
    slurm.hold(queued("1", "FAILED"), queued("2", "PENDING"), queued("3"))
    capsys.readouterr()
    assert main(["cancel", str(run_dir)]) == 0
    assert slurm.calls("scancel") == ["2"]
    assert capsys.readouterr().out == f"{run_dir}: cancelled job 2, which was PENDING\n"
    slurm.hold()
    assert main(["cancel", str(run_dir)]) == 0
    assert slurm.calls("scancel") == ["2"]
    assert "nothing in the queue" in capsys.readouterr().out


def test_status_knows_of_a_cancellation_at_once(
    run_dir: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        capsys.readouterr()
        assert main(["status", str(run_dir)]) == 0
        return capsys.readouterr().out

    slurm.hold(queued("1", "PENDING"))
    assert shown().startswith(f"{run_dir}: pending")
    assert main(["cancel", str(run_dir)]) == 0
    slurm.hold(queued("1", "CANCELLED"))
    assert shown().startswith(f"{run_dir}: cancelled")


@pytest.fixture
def pipeline(config: Path, fields: Path, tmp_path: Path) -> list[str]:
    out = str(tmp_path / "pipe")
    return ["pipeline", "--source", str(fields), "--out", out, "--config", str(config)]


def test_each_stage_waits_for_the_one_it_needs(
    pipeline: list[str], tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--time", "50", "--prepare.time", "20", "--prepare.workers", "2", "--train.nodes", "2"]
    assert main([*pipeline, *more, "--seed", "5", "--predict", str(tmp_path)]) == 0
    out = tmp_path / "pipe"
    folders = ["dataset.launch", "run/launch", "run.evaluate.launch", "maps.launch"]
    jobs = [JobDirectory(out / name) for name in folders]
    assert [job.jobs() for job in jobs] == [["1"], ["2"], ["3"], ["4"]]
    assert [job.spec().dependents for job in jobs] == [("2",), ("3", "4"), (), ()]
    assert [job.spec().resources["time"] for job in jobs] == ["20", "50", "50", "50"]
    assert [job.spec().resources["nodes"] for job in jobs] == ["1", "2", "1", "1"]
    assert jobs[0].spec().command[-2:] == ("--workers", "2")
    assert f"path: {out / 'dataset'}" in jobs[1].config.read_text()
    assert jobs[3].spec().command[1:] == (
        "--checkpoint", str(out / "run"), str(tmp_path), "--out", str(out / "maps"),
    )  # fmt: skip
    scripts = [
        (job.submitit / f"{number}_submission.sh").read_text() for number, job in enumerate(jobs, 1)
    ]
    waits = [line for text in scripts for line in text.splitlines() if "dependency" in line]
    assert waits == [f"#SBATCH --dependency=afterok:{number}" for number in (1, 2, 2)]
    slurm.hold(queued("2", "PENDING"))
    assert main(pipeline) == 2
    assert "job 2" in capsys.readouterr().err


def test_a_stage_as_an_array(pipeline: list[str], tmp_path: Path, slurm: FakeSlurm) -> None:
    assert main([*pipeline, "--prepare.parts", "3", "--predict.parts", "2"]) == 0
    out = tmp_path / "pipe"
    dataset, maps = JobDirectory.beside(out / "dataset"), JobDirectory.beside(out / "maps")
    assert dataset.jobs() == ["1_0", "1_1", "1_2"] and maps.jobs() == ["4_0", "4_1"]
    waits = "#SBATCH --dependency=afterok:1\n"
    assert waits in (out / "run" / "launch" / "submitit" / "2_submission.sh").read_text()
    for task in range(2):
        JobDirectory(maps.path, task).began(
            Attempt(number=1, job=f"4_{task}", nodes=(), tasks=1, began=1.0, decision="done")
        )
    assert main([*pipeline, "--predict.parts", "2"]) == 0
    assert len(dataset.jobs()) == 4 and len(maps.jobs()) == 2


def test_only_folders_that_it_makes_are_private(
    pipeline: list[str], config: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    sweep = ["sweep", "--config", str(config), "--seed", "1,2", "--out"]
    for out, mode in ((shared, 0o755), (tmp_path / "new", 0o700)):
        assert main([*sweep, str(out)]) == 0
        assert main([*pipeline, "--out", str(out)]) == 0
        assert stat.S_IMODE(out.stat().st_mode) == mode
        for made in ("launch", "000-seed=1", "000-seed=1/launch", "run", "dataset.launch"):
            assert stat.S_IMODE((out / made).stat().st_mode) == 0o700


def test_what_is_there_is_left_out(
    pipeline: list[str], dataset: Path, tmp_path: Path, slurm: FakeSlurm
) -> None:
    out = tmp_path / "pipe"
    out.mkdir()
    (out / "dataset").symlink_to(dataset)
    (out / "score.json").touch()
    assert main(pipeline) == 0
    assert JobDirectory.of_run(out / "run").jobs() == ["1"]
    assert JobDirectory.beside(out / "maps").jobs() == ["2"]
    assert not (out / "dataset.launch").exists() and not (out / "run.evaluate.launch").exists()
    attempted(out / "run", "done")
    assert main(pipeline) == 0
    assert JobDirectory.of_run(out / "run").jobs() == ["1"]
    assert "dependency" not in options(slurm)


def test_resume_takes_the_waiting_jobs_along(
    pipeline: list[str], tmp_path: Path, slurm: FakeSlurm
) -> None:
    assert main(pipeline) == 0
    run_dir = tmp_path / "pipe" / "run"
    attempted(run_dir, "given up", job="2")
    slurm.hold(queued("2", "FAILED"), queued("3", "PENDING", "DependencyNeverSatisfied"))
    assert main(["resume", str(run_dir)]) == 0
    assert slurm.calls("scontrol") == [
        f"update JobId={number} Dependency=afterok:5" for number in (3, 4)
    ]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["--evaluate.batch_siz", "2"], "did you mean --batch_size?"),
        (["--predict.nodes", "2"], "one process"),
        (["--run_dir", "x"], "--out DIR"),
        (["--nods", "2"], "did you mean --nodes?"),
        (["--source", "nowhere"], "there is no source nowhere"),
    ],
)
def test_nothing_is_queued_of_a_wrong_pipeline(
    more: list[str],
    wanted: str,
    pipeline: list[str],
    tmp_path: Path,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*pipeline, *more]) == 2
    assert wanted in capsys.readouterr().err
    assert slurm.calls("sbatch") == [] and not (tmp_path / "pipe").exists()
