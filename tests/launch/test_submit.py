"""Submission: the script, what is frozen, what is refused before anything is queued."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.jobdir import JobDirectory
from launch.resources import build
from launch.submit import Attempts, Setting, script
from tests.launch.conftest import FakeSlurm, queued

ODD = [
    "a b",
    "it's",
    'say "x"',
    "$(touch HACK)",
    "`touch HACK`",
    "a;touch HACK",
    "#no",
    "*",
    "&&",
    "-n",
    "ünï",
]
Complaint = Callable[[], str]


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """The one line on stderr."""

    def read() -> str:
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("launch: error: "), lines
        return lines[0]

    return read


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if ".home" not in path.parts}


def test_dry_run_prints_and_changes_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_slurm: None
) -> None:
    before = files(tmp_path)
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--nodes", "2-4"]
    words += [
        "--gpus_per_node",
        "a100:4",
        "--time",
        "1:30:00",
        "--partition",
        "gpu",
        "--reservation",
        "r",
    ]
    assert main(["train", *words, "--dry_run"]) == 0
    assert files(tmp_path) == before
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n")
    options = {line for line in text.splitlines() if line.startswith("#SBATCH")}
    assert options == {
        f"#SBATCH --{option}"
        for option in (
            "gpus-per-node=a100:4",
            "job-name=run",
            "mincpus=4",
            "nodes=2-4",
            "open-mode=append",
            f"output={tmp_path}/run/launch/slurm-%j.out",
            "partition=gpu",
            "requeue",
            "reservation=r",
            "signal=USR1@180",
            "time=90",
        )
    }


@pytest.mark.parametrize(
    ("nodes", "told", "not_told"),
    [
        # Slurm would count the tasks of the first start, and wait for as many ever after.
        ("2-4", ["--mincpus=12", "export AGRIVISION_RANKS_PER_NODE=4"], ["ntasks", "cpus-per-task"]),
        ("4", ["--ntasks-per-node=4", "--cpus-per-task=3"], ["mincpus", "AGRIVISION_RANKS"]),
    ],
)
def test_a_range_of_nodes_names_no_tasks(
    nodes: str,
    told: list[str],
    not_told: list[str],
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--nodes", nodes]
    words += ["--gpus_per_node", "4", "--cpus_per_task", "3"]
    assert main([*words, "--dry_run"]) == 0
    script = capsys.readouterr().out
    assert all(text in script for text in told)
    assert not any(text in script for text in not_told)


def test_the_script_that_is_submitted_is_the_one_that_was_shown(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], slurm: FakeSlurm
) -> None:
    words = ["train", "--config", str(config), "--run_dir", str(tmp_path / "run"), "--qos", "high"]
    assert main([*words, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert main(words) == 0
    assert slurm.script.rstrip() == shown.rstrip()
    assert capsys.readouterr().out == f"job 1, in {tmp_path}/run/launch\n"


@pytest.mark.parametrize("name", ODD)
def test_names_reach_python_literally(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teller = tmp_path / "teller's $HOME"
    teller.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['PYTHONPATH'], os.environ['PYTHONSAFEPATH']]))\n"
    )
    teller.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(teller))
    monkeypatch.setenv("PYTHONPATH", "before")
    folder = tmp_path / name / "launch"
    folder.mkdir(parents=True, mode=0o700)
    setting = Setting(resources=build({"comment": name}), setup=(), python=("python",))
    text = script(folder, folder / "code", name, setting)
    file = tmp_path / "script.sh"
    file.write_text(text)
    done = subprocess.run(["bash", str(file)], cwd=tmp_path, capture_output=True, text=True, check=True)
    arguments, path, safe = json.loads(done.stdout)
    assert arguments == ["-u", "-m", "submitit.core._submit", str(folder / "submitit")]
    assert path == f"{folder / 'code'}:before"
    assert safe == "1"
    assert not (tmp_path / "HACK").exists()


def test_the_shell_outlives_the_signals_and_its_children_do_not(tmp_path: Path) -> None:
    setting = Setting(resources=build({}), setup=("umask 022", "echo set up"), python=("python",))
    text = script(tmp_path, tmp_path / "code", "x", setting)
    lines = [line for line in text.splitlines() if "submitit" not in line]
    file = tmp_path / "script.sh"
    ask = "import os; from signal import *; os.kill(os.getppid(), SIGTERM); print(getsignal(SIGTERM))"
    file.write_text("\n".join([*lines, f'"{sys.executable}" -c "{ask}"', "echo still here"]))
    done = subprocess.run(["bash", str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set up", "0", "still here"]  # 0 is SIG_DFL


@pytest.mark.parametrize("char", ["%", "\\", ":", "\n", "\x1b", "\x7f"])
def test_paths_that_no_script_can_hold_are_refused(
    char: str, config: Path, tmp_path: Path, slurm: FakeSlurm, complaint: Complaint
) -> None:
    before = files(tmp_path)
    run_dir = tmp_path / f"a{char}j"
    assert main(["train", "--config", str(config), "--run_dir", str(run_dir)]) == 2
    assert "a" in complaint()
    assert files(tmp_path) == before and slurm.calls("sbatch") == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["train", "--run_dir", "r", "--gpus_per_nod", "2"], "did you mean --gpus_per_node?"),
        (["train", "--run_dir", "r", "--optimizer.l", "2"], "did you mean optimizer.lr?"),
        (["train", "--run_dir", "r", "--optimizer.lr", "fast"], "a number"),
        (["train", "--run_dir", "r", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", "c"], "c"),
        (["evaluate", "--checkpoint", "nowhere", "--data", "d"], "there is no checkpoint nowhere"),
        (["evaluate", "--data", "d"], "checkpoint"),
        (
            ["evaluate", "--checkpoint", "r", "--data", "d", "--batch_siz", "2"],
            "did you mean --batch_size?",
        ),
        (["evaluate", "--checkpoint", "r", "--data", "d", "--batch_size", "two"], "two"),
        (["prepare", "nowhere", "out"], "there is no source nowhere"),
        (["prepare", "source"], "out"),
        (["prepare", "nowhere", "out", "--nodes", "2"], "one process"),
        (["predict", "--checkpoint", "nowhere", "x", "--out", "y"], "there is no checkpoint nowhere"),
        (
            ["predict", "--checkpoint", "nowhere", "x", "--out", "y", "--tasks_per_node", "2"],
            "one process",
        ),
        (["train", "--run_dir", "r", "--site", "nowhere.yaml"], "nowhere.yaml"),
        (["trian"], "did you mean train?; the commands are train, prepare"),
        (["statu"], "did you mean status?"),
        (["frobnicate"], "'frobnicate'; the commands are train, prepare"),
        (["status", "nowhere"], "nowhere"),
        (["resume"], "resume"),
    ],
)
def test_refusals_are_one_line(
    words: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slurm: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(words)
    output = capsys.readouterr()
    if words == ["resume"]:  # help
        assert code == 0 and wanted in output.out
        return
    assert code == 2
    (line,) = output.err.splitlines()
    assert line.startswith("launch: error: ") and wanted in line
    assert slurm.calls("sbatch") == []


def test_what_is_pickled(config: Path, tmp_path: Path, slurm: FakeSlurm) -> None:
    run_dir = tmp_path / "run"
    mask = os.umask(0o022)
    try:
        assert main(["train", "--config", str(config), "--run_dir", str(run_dir)]) == 0
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)
    folder = run_dir / "launch" / "submitit"
    with (folder / "1_submitted.pkl").open("rb") as file:
        call = pickle.load(file)
    assert call.function == Attempts(str(run_dir / "launch"))
    assert (call.args, call.kwargs) == ((), {})
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_frozen(
    config: Path, dataset: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--config", "config.yaml", "--run_dir", "run", "--seed", "4", "--nodes", "2"]
    words += ["--srun_args", "--mpi=none --label", "--max_attempts", "7", "--dependency", "afterok:9"]
    assert main(["train", *words]) == 0
    job = JobDirectory.of_run(tmp_path / "run")
    spec = job.spec()
    assert spec.command == ("train", "--config", str(job.config), "--run_dir", str(tmp_path / "run"))
    assert spec.python == (sys.executable,)
    assert spec.srun == ("--mpi=none", "--label")
    assert (spec.max_attempts, spec.signal_seconds) == (7, 180)
    assert spec.cwd == str(tmp_path) and spec.run_dir == str(tmp_path / "run")
    assert "dependency" not in spec.resources and spec.resources["nodes"] == "2"
    assert "seed: 4" in job.config.read_text() and str(dataset) in job.config.read_text()
    assert (job.code / "agrivision" / "cli.py").is_file() and (job.code / "launch").is_dir()
    assert job.jobs() == ["1"]
    assert "#SBATCH --dependency=afterok:9" in slurm.script.replace("'", "")


@pytest.fixture
def preparation(fields: Path, tmp_path: Path) -> list[str]:
    return ["prepare", str(fields), str(tmp_path / "set"), "--workers", "1"]


def test_parts_are_one_array(
    preparation: list[str],
    tmp_path: Path,
    slurm: FakeSlurm,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main([*preparation, "--parts", "3", "--dry_run"]) == 0
    shown = capfd.readouterr().out
    assert not (tmp_path / "set.launch").exists()
    assert main([*preparation, "--parts", "3", "--qos", "low"]) == 0
    assert capfd.readouterr().out == f"job 1, in {tmp_path}/set.launch\n"
    assert "#SBATCH --array=0-2%3\n" in slurm.script
    assert slurm.script.replace("#SBATCH --qos=low\n", "").rstrip() == shown.rstrip()
    job = JobDirectory.beside(tmp_path / "set")
    for task in range(3):
        spec = JobDirectory(job.path, task).spec()
        assert spec.command == (*preparation, "--part", f"{task}/3")
        with (job.submitit / f"1_{task}_submitted.pkl").open("rb") as file:
            assert pickle.load(file).function == Attempts(str(job.path), task)
    slurm.hold(queued("1_0", "COMPLETED"), queued("1_1"), queued("1_2", "PENDING", "Priority"))
    assert main(["status", str(tmp_path / "set")]) == 0
    out = capfd.readouterr().out
    assert "completed" not in out and "done 1, pending 1, running 1" in out and "job 1," in out
    assert main([*preparation, "--parts", "3"]) == 2
    assert "job 1_1" in capfd.readouterr().err
    for task in range(2):
        (job.path / f"slurm-1_{task}.out").write_text(f"log of {task}\n")
    assert main(["logs", str(tmp_path / "set")]) == 0
    assert capfd.readouterr().out == (
        "==> task 0 <==\nlog of 0\n==> task 1 <==\nlog of 1\n==> task 2 <==\n"
    )
    assert main(["logs", str(tmp_path / "set"), "--task", "1"]) == 0
    assert capfd.readouterr().out == "log of 1\n"
    for words, wanted in ((["-f"], "3 tasks: say which with --task"), (["--task", "3"], "no task 3")):
        assert main(["logs", str(tmp_path / "set"), *words]) == 2
        assert wanted in capfd.readouterr().err
    assert main(["resume", str(tmp_path / "set")]) == 2
    assert "job 1_1 is RUNNING" in capfd.readouterr().err
    assert main(["cancel", str(tmp_path / "set")]) == 0
    assert slurm.calls("scancel") == ["1_1 1_2"]
    slurm.hold()
    capfd.readouterr()
    assert main(["resume", str(tmp_path / "set")]) == 2
    assert "submit it as before" in capfd.readouterr().err


def test_another_number_of_parts_takes_the_place_of_the_first(
    preparation: list[str], tmp_path: Path, slurm: FakeSlurm
) -> None:
    folder = tmp_path / "set.launch"
    for parts, files in ((3, {"job-0", "job-1", "job-2"}), (1, {"job"}), (2, {"job-0", "job-1"})):
        assert main([*preparation, "--parts", str(parts)]) == 0
        assert {file.stem for file in folder.glob("job*.json")} == files
    assert JobDirectory(folder).jobs() == ["1_0", "1_1", "1_2", "2", "3_0", "3_1"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["prepare", "--parts", "2", "--part", "0/2"], "give only one of the two"),
        (["prepare", "--parts", "0"], "at least 1"),
        (["train", "--parts", "2"], "train is neither"),
        (["sweep", "--parts", "2", "--out", "s", "--seed", "1,2"], "train is neither"),
        (["resume", "--parts", "2", "set"], "does not divide anew"),
    ],
)
def test_parts_that_are_refused(
    words: list[str],
    wanted: str,
    preparation: list[str],
    config: Path,
    slurm: FakeSlurm,
    complaint: Complaint,
) -> None:
    command, *more = words
    before = {"prepare": preparation[1:], "resume": []}.get(command, ["--config", str(config)])
    assert main([command, *before, *more]) == 2
    assert wanted in complaint()
    assert slurm.calls("sbatch") == []


def test_data_that_cannot_be_seen_from_here(
    config: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    assert main([*words, "--dry_run"]) == 0
    assert capsys.readouterr().err == ""
    unseen = f"{tmp_path}/av2022 has no dataset.json, seen from here"
    for path, problem in (
        (tmp_path / "av2022", f"{unseen}: the job will fail unless its nodes see it"),
        ("", "no --data.path is given: the job will fail"),
    ):
        assert main([*words, f"--data.path={path}"]) == 0
        assert capsys.readouterr().err == f"launch: warning: {problem}\n"
    assert JobDirectory.of_run(tmp_path / "run").jobs() == ["1", "2"]  # warned, not refused
    swept = ["sweep", "--out", str(tmp_path / "sweep"), "--config", str(config), "--dry_run"]
    swept += ["--data.path", str(tmp_path / "av2022"), "--optimizer.lr", "1e-3,2e-3"]
    assert main(swept) == 0
    (line,) = capsys.readouterr().err.splitlines()  # not once for each run
    assert unseen in line


def test_a_directory_has_one_job_in_the_queue(
    config: Path, tmp_path: Path, slurm: FakeSlurm, complaint: Complaint
) -> None:
    words = ["train", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    assert main(words) == 0
    slurm.hold(queued("1", "PENDING"))
    assert main(words) == 2
    assert "job 1" in complaint()
    slurm.hold(queued("1", "FAILED"))
    assert main(words) == 0
    assert JobDirectory.of_run(tmp_path / "run").jobs() == ["1", "2"]


def test_slurm_s_refusal_is_one_line(
    config: Path, tmp_path: Path, slurm: FakeSlurm, complaint: Complaint
) -> None:
    slurm.refuse(
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed\n"
    )
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--partition", "x"]
    assert main(["train", *words]) == 1
    assert complaint() == (
        "launch: error: sbatch: invalid partition specified: x; Batch job submission failed"
    )
    assert JobDirectory.of_run(tmp_path / "run").jobs() == []


def test_the_shell_s_wishes_count_less_than_the_command_line(
    config: Path, tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PARTITION": "shell", "ACCOUNT": "shell", "WAIT": "1"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "99")  # launched from inside of a job
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--partition", "mine"]
    assert main(["train", *words]) == 0
    assert "--partition=mine" in slurm.script and "--account=shell" in slurm.script
    names = {name for name in slurm.environment if name.startswith(("SBATCH_", "SLURM_"))}
    assert names == {"SLURM_CONF"}
    assert os.environ["SBATCH_PARTITION"] == "shell"


def test_without_slurm_it_says_so(
    config: Path, tmp_path: Path, no_slurm: None, complaint: Complaint
) -> None:
    assert main(["train", "--config", str(config), "--run_dir", str(tmp_path / "run")]) == 2
    assert "no sbatch on the PATH" in complaint()


def test_login_nodes_need_no_torch(config: Path, tmp_path: Path) -> None:
    words = ["--config", str(config), "--run_dir", str(tmp_path / "run"), "--dry_run"]
    code = (
        "import sys; from launch.__main__ import main;"
        f"assert main({['train', *words]!r}) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
